//! The addresses by which targets know the units that are dialled for.
//!
//! Each unit has one in each of the configured networks, the same for ever: across handovers, sessions and restarts, as
//! its identity is. Loopback networks serve for targets on this host; others, which must be routed to this host, for
//! targets behind it.
//!
//! The address is drawn from the unit's SPIFFE ID, so that it is the same even where nothing can be remembered; where
//! two units draw the same, the later takes the next one that is free, and the file remembers it:
//!
//! ```json
//! { "127.64.0.0/10": { "spiffe://fleet.example/lorry-17": "127.81.4.200" } }
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ipnet::IpNet;
use ring::digest;

use crate::remembered;

/// Where the addresses are remembered, in the unit's state folder.
const FILE: &str = "peers.json";

/// Units by their SPIFFE IDs, for each network.
type Book = BTreeMap<IpNet, BTreeMap<String, IpAddr>>;

/// What went wrong with the file of addresses.
#[derive(Debug, thiserror::Error)]
#[error("the addresses of peers in {path}: {source}")]
pub struct BookError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// How targets see one unit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SeenAs {
    addresses: Vec<IpAddr>,
}

impl SeenAs {
    /// With these addresses.
    #[cfg(test)]
    pub fn of(addresses: &[&str]) -> Self {
        let read = |text: &&str| text.parse().unwrap();
        let addresses = addresses.iter().map(read).collect();
        Self { addresses }
    }

    /// All of its addresses, in the order of the configured networks.
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// The address from which a target is dialled; `here`: whether the target is on this host. `None` leaves it to the
    /// kernel.
    pub fn towards(&self, target: IpAddr, here: bool) -> Option<IpAddr> {
        let family = |ip: &&IpAddr| ip.is_ipv4() == target.is_ipv4();
        let mut fitting = self.addresses.iter().filter(family);
        let found = fitting.clone().find(|ip| ip.is_loopback() == here);
        // IPv6 has one loopback address: there a target on this host sees a routed one.
        found.or(fitting.next().filter(|_| here)).copied()
    }

    /// The address that a target is told of: one that others could reach, if there is one.
    pub fn told(&self) -> Option<IpAddr> {
        let routed = self.addresses.iter().find(|ip| !ip.is_loopback());
        routed.or(self.addresses.first()).copied()
    }
}

/// The addresses of all units.
#[derive(Debug)]
pub struct PeerAddresses {
    networks: Vec<IpNet>,
    /// None where nothing can be remembered.
    file: Option<PathBuf>,
    book: Mutex<Kept>,
    /// The version of the book that the file has. Whoever writes holds it, and writes for all that wait meanwhile:
    /// where thousands of units come at once, the file is not written for each.
    written: Mutex<u64>,
}

/// The book as it is, and how often it has changed.
#[derive(Debug)]
struct Kept {
    book: Book,
    /// The addresses that units have, for each network.
    taken: BTreeMap<IpNet, BTreeSet<IpAddr>>,
    version: u64,
}

impl PeerAddresses {
    /// Reads what is remembered in the folder `state`, and makes the folder if there is none. Where that is not possible
    /// addresses are not remembered, which is logged. A file that cannot be understood is an error: overwriting it would
    /// give units other addresses.
    pub fn open(state: &Path, networks: &[IpNet]) -> Result<Self, BookError> {
        let path = state.join(FILE);
        let failed = |source| BookError {
            path: path.clone(),
            source,
        };
        let (book, file) = match fs::create_dir_all(state).and_then(|()| remembered::read(&path)) {
            Ok(book) => (book, Some(path)),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => return Err(failed(error)),
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "the addresses of peers are not remembered: two that draw the same may change places at a restart");
                (Book::new(), None)
            }
        };
        Ok(Self {
            networks: networks.iter().map(IpNet::trunc).collect(),
            file,
            book: Mutex::new(Kept {
                taken: taken(&book),
                book,
                version: 0,
            }),
            written: Mutex::new(0),
        })
    }

    /// The addresses of a unit, which it has from now on if it had none. Reads and writes a file.
    pub fn of(&self, unit: &str) -> SeenAs {
        let mut locked = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = &mut *locked;
        let mut addresses = Vec::new();
        let mut new = false;
        for &network in &self.networks {
            let known = kept.book.entry(network).or_default();
            let taken = kept.taken.entry(network).or_default();
            match known.get(unit) {
                Some(&address) => addresses.push(address),
                None => match draw(unit, network, taken) {
                    Some(address) => {
                        known.insert(unit.to_owned(), address);
                        taken.insert(address);
                        addresses.push(address);
                        new = true;
                    }
                    None => {
                        tracing::error!(unit, %network, "no address is left for a peer: make the network larger");
                    }
                },
            }
        }
        kept.version += u64::from(new);
        let version = kept.version;
        drop(locked);
        if let Some(file) = self.file.as_ref().filter(|_| new)
            && let Err(error) = self.write(file, version)
        {
            tracing::error!(%error, path = %file.display(), "the address of a peer cannot be remembered");
        }
        SeenAs { addresses }
    }

    /// Returns when the file has at least this version of the book.
    fn write(&self, file: &Path, version: u64) -> io::Result<()> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if *written >= version {
            return Ok(());
        }
        let kept = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        let (book, latest) = (kept.book.clone(), kept.version);
        drop(kept);
        remembered::write(file, &book)?;
        *written = latest;
        Ok(())
    }

    /// All units that have addresses, and which.
    pub fn all(&self) -> Vec<(String, Vec<IpAddr>)> {
        let kept = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        let mut units: BTreeMap<&String, Vec<IpAddr>> = BTreeMap::new();
        for network in &self.networks {
            for (unit, address) in kept.book.get(network).into_iter().flatten() {
                units.entry(unit).or_default().push(*address);
            }
        }
        let owned = |(unit, addresses): (&String, _)| (unit.clone(), addresses);
        units.into_iter().map(owned).collect()
    }
}

/// The first free address from the one that the unit's name leads to. The first and the last of a network are left out,
/// for they mean something else in IPv4 (and an anycast address in IPv6, RFC 4291 section 2.6.1).
fn draw(unit: &str, network: IpNet, taken: &BTreeSet<IpAddr>) -> Option<IpAddr> {
    let host_bits = u32::from(network.max_prefix_len() - network.prefix_len());
    // Of larger networks this part is enough, and hosts are counted without overflow.
    let hosts = 1_u64.checked_shl(host_bits.min(62))?.checked_sub(2)?;
    if hosts == 0 || taken.len() as u64 >= hosts {
        return None;
    }
    let hash = digest::digest(&digest::SHA256, unit.as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_ref()[..8]);
    let first = u64::from_be_bytes(first) % hosts;
    (0..=taken.len() as u64)
        .map(|step| nth(network, 1 + (first + step) % hosts))
        .find(|address| !taken.contains(address))
}

fn taken(book: &Book) -> BTreeMap<IpNet, BTreeSet<IpAddr>> {
    let addresses = |units: &BTreeMap<String, IpAddr>| units.values().copied().collect();
    let networks = book.iter();
    networks
        .map(|(network, units)| (*network, addresses(units)))
        .collect()
}

/// The address `n` places behind a network's first.
fn nth(network: IpNet, n: u64) -> IpAddr {
    match network {
        // The network has more than `n` addresses, so `n` fits.
        IpNet::V4(net) => Ipv4Addr::from(u32::from(net.network()).wrapping_add(n as u32)).into(),
        IpNet::V6(net) => Ipv6Addr::from(u128::from(net.network()).wrapping_add(n.into())).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn networks(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn a_unit_keeps_its_addresses_over_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let nets = networks(&["127.64.0.0/10", "10.64.0.0/16", "2001:db8:64::/64"]);
        let open = || PeerAddresses::open(&dir.path().join("state"), &nets).unwrap();
        let first = open().of("spiffe://fleet.example/lorry-17");
        assert_eq!(first.addresses().len(), 3);
        for (network, address) in nets.iter().zip(first.addresses()) {
            assert!(network.contains(address), "{address} is not in {network}");
        }
        let again = open();
        assert_eq!(
            again
                .of("spiffe://fleet.example/lorry-18")
                .addresses()
                .len(),
            3
        );
        assert_eq!(again.of("spiffe://fleet.example/lorry-17"), first);
        assert_eq!(open().all().len(), 2);
    }

    #[test]
    fn the_source_fits_the_target() {
        let seen = SeenAs {
            addresses: ["127.64.0.9", "10.64.0.9", "2001:db8:64::9"]
                .map(|ip| ip.parse().unwrap())
                .to_vec(),
        };
        let towards = |target: &str, here| {
            let source = seen.towards(target.parse().unwrap(), here);
            source.map(|ip| ip.to_string()).unwrap_or_default()
        };
        assert_eq!(towards("127.0.0.1", true), "127.64.0.9");
        assert_eq!(towards("192.0.2.1", true), "127.64.0.9");
        assert_eq!(towards("192.0.2.1", false), "10.64.0.9");
        assert_eq!(towards("2001:db8::1", false), "2001:db8:64::9");
        assert_eq!(towards("2001:db8::1", true), "2001:db8:64::9");
        let only_loopback = SeenAs {
            addresses: vec!["127.64.0.9".parse().unwrap()],
        };
        assert_eq!(
            only_loopback.towards("192.0.2.1".parse().unwrap(), false),
            None
        );
        assert_eq!(seen.told(), Some("10.64.0.9".parse().unwrap()));
    }

    #[test]
    fn what_many_at_once_were_given_is_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let nets = networks(&["127.64.0.0/10"]);
        let addresses = PeerAddresses::open(dir.path(), &nets).unwrap();
        let seen = |unit: usize| addresses.of(&format!("unit-{unit}"));
        let given: Vec<SeenAs> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..32)
                .map(|unit| scope.spawn(move || seen(unit)))
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let again = PeerAddresses::open(dir.path(), &nets).unwrap();
        assert_eq!(again.all().len(), 32);
        for (unit, given) in given.iter().enumerate() {
            assert_eq!(again.of(&format!("unit-{unit}")), *given);
        }
    }

    #[test]
    fn a_full_network_has_no_address_and_nobody_shares_one() {
        let dir = tempfile::tempdir().unwrap();
        let addresses = PeerAddresses::open(dir.path(), &networks(&["10.0.0.0/29"])).unwrap();
        let mut seen: Vec<IpAddr> = (0..7)
            .flat_map(|unit| addresses.of(&format!("unit-{unit}")).addresses().to_vec())
            .collect();
        seen.sort();
        seen.dedup();
        let expected: Vec<IpAddr> = (1..=6).map(|n| IpAddr::from([10, 0, 0, n])).collect();
        assert_eq!(seen, expected);
        let none = PeerAddresses::open(dir.path(), &networks(&["10.0.0.0/31"])).unwrap();
        assert!(none.of("unit").addresses().is_empty());
    }

    #[test]
    fn a_file_that_is_not_understood_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "{ half").unwrap();
        let error = PeerAddresses::open(dir.path(), &networks(&["10.0.0.0/29"])).unwrap_err();
        assert!(error.to_string().contains(FILE), "{error}");
    }

    #[test]
    fn without_a_folder_addresses_are_drawn_all_the_same() {
        let nets = networks(&["127.64.0.0/10"]);
        let impossible = Path::new("/proc/nowhere/holdfast");
        let draw = || PeerAddresses::open(impossible, &nets).unwrap().of("unit");
        assert_eq!(draw(), draw());
        assert_eq!(draw().addresses().len(), 1);
    }

    proptest! {
        #[test]
        fn every_address_lies_inside_its_network(unit in ".{0,40}", prefix in 0_u8..=30, v6 in 64_u8..=126) {
            for network in [
                IpNet::new(IpAddr::from([10, 1, 2, 3]), prefix).unwrap().trunc(),
                IpNet::new("2001:db8::7".parse().unwrap(), v6).unwrap().trunc(),
            ] {
                let address = draw(&unit, network, &BTreeSet::new()).unwrap();
                prop_assert!(network.contains(&address) && address != network.network());
                prop_assert!(address != network.broadcast());
            }
        }
    }
}
