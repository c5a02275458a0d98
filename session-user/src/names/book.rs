//! Which reserved address stands for which name.
//!
//! A name's place in the ranges is drawn from a hash of the name, so that it is the same after a restart even where
//! nothing can be remembered; where two names draw the same, the later takes the next place that is free, and a file
//! remembers it:
//!
//! ```json
//! { "names": { "db.corp.example": 4711 } }
//! ```
//!
//! There are places for a bounded number of names. Beyond it the name that was used longest ago makes room: unless
//! somebody is connected to it, or may still hold an answer with its address.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use ring::digest;
use serde::{Deserialize, Serialize};
use session_proto::wire::Target;
use tokio::sync::Notify;

use super::is_host;
use crate::remembered;

/// Where the names are remembered, in the unit's state folder.
const FILE: &str = "names.json";
/// Names that have addresses, at most: a few MiB of memory, and of the file.
const NAMES_MAX: u32 = 32_768;
/// Applications hold on to an address for longer than they should.
const GRACE: Duration = Duration::from_secs(300);
/// A name that was connected to keeps its address for so long after: applications that resolve once connect again later.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600);
/// The file is written at most so often.
const WRITE_EVERY: Duration = Duration::from_secs(5);

/// What went wrong with the file of names.
#[derive(Debug, thiserror::Error)]
#[error("the addresses of names in {path}: {source}")]
pub struct BookError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// The reserved ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ranges {
    /// Of IPv4.
    pub v4: Ipv4Net,
    /// Of IPv6.
    pub v6: Ipv6Net,
}

impl Ranges {
    /// A /64 of unique local addresses (RFC 4193) that is `unit`'s own, by its SPIFFE ID: the same after a restart.
    pub fn own6(unit: &str) -> Ipv6Net {
        let mut hash = digest::Context::new(&digest::SHA256);
        hash.update(b"addresses that stand for names\0");
        hash.update(unit.as_bytes());
        let hash = hash.finish();
        let mut octets = [0; 16];
        octets[0] = 0xfd;
        octets[1..6].copy_from_slice(&hash.as_ref()[..5]);
        Ipv6Net::new_assert(Ipv6Addr::from(octets), 64)
    }

    /// Both.
    pub fn networks(&self) -> [IpNet; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// The place of an address; `None` outside of the ranges.
    fn place(&self, ip: IpAddr) -> Option<u128> {
        match ip.to_canonical() {
            IpAddr::V4(ip) if self.v4.contains(&ip) => {
                Some(u128::from(u32::from(ip) - u32::from(self.v4.network())))
            }
            IpAddr::V6(ip) if self.v6.contains(&ip) => {
                Some(u128::from(ip) - u128::from(self.v6.network()))
            }
            _ => None,
        }
    }

    fn addresses(&self, place: u32) -> Addresses {
        // Places are fewer than either range has addresses.
        Addresses {
            v4: Ipv4Addr::from(u32::from(self.v4.network()) | place),
            v6: Ipv6Addr::from(u128::from(self.v6.network()) | u128::from(place)),
        }
    }

    /// Places from 1 up to this. The first and the last address of an IPv4 network mean something else.
    fn places(&self) -> u32 {
        let bits = u32::from((32 - self.v4.prefix_len()).min(128 - self.v6.prefix_len()));
        1_u32
            .checked_shl(bits)
            .unwrap_or(u32::MAX)
            .saturating_sub(2)
    }
}

/// The addresses that stand for one name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Of IPv4.
    pub v4: Ipv4Addr,
    /// Of IPv6.
    pub v6: Ipv6Addr,
}

/// Keeps a name's addresses its own for as long as it lives.
#[derive(Clone, Debug)]
pub struct Lease(#[expect(dead_code, reason = "counted, not read")] Arc<()>);

struct Entry {
    place: u32,
    used: Instant,
    /// Until then somebody may hold an answer.
    answered_until: Instant,
    leases: Arc<()>,
}

#[derive(Default)]
struct Inner {
    names: HashMap<Arc<str>, Entry>,
    places: HashMap<u32, Arc<str>>,
    unsaved: bool,
}

/// All names that have addresses.
pub struct Book {
    ranges: Ranges,
    /// Names at most.
    room: usize,
    /// How long an answer may be remembered.
    ttl: Duration,
    /// None where nothing can be remembered.
    file: Option<PathBuf>,
    inner: Mutex<Inner>,
    changed: Notify,
}

impl fmt::Debug for Book {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Book")
            .field("ranges", &self.ranges)
            .finish_non_exhaustive()
    }
}

#[derive(Default, Serialize, Deserialize)]
struct Remembered {
    names: BTreeMap<String, u32>,
}

impl Book {
    /// Reads what is remembered in the folder `state`, and makes the folder if there is none. Where that is not possible
    /// names are not remembered, which is logged. A file that cannot be understood is an error: overwriting it would
    /// give names other addresses.
    pub fn open(state: &Path, ranges: Ranges, ttl: Duration) -> Result<Self, BookError> {
        let path = state.join(FILE);
        let failed = |source| BookError {
            path: path.clone(),
            source,
        };
        let (known, file) = match fs::create_dir_all(state).and_then(|()| remembered::read(&path)) {
            Ok(known) => (known, Some(path)),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => return Err(failed(error)),
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "the addresses of names are not remembered: two that draw the same may change places at a restart");
                (Remembered::default(), None)
            }
        };
        let book = Self {
            room: ranges.places().min(NAMES_MAX) as usize,
            ranges,
            ttl,
            file,
            inner: Mutex::default(),
            changed: Notify::new(),
        };
        let now = Instant::now();
        let mut inner = book.lock();
        for (name, place) in known.names.into_iter().take(book.room) {
            // Somebody may have edited it, and the peer is told these.
            let free = is_host(&name) && !inner.places.contains_key(&place);
            if free && (1..=ranges.places()).contains(&place) {
                inner.insert(name.into(), place, now, now + ttl + GRACE);
            }
        }
        drop(inner);
        Ok(book)
    }

    /// The ranges.
    pub fn ranges(&self) -> Ranges {
        self.ranges
    }

    /// How long an answer may be remembered.
    pub fn ttl(&self) -> Duration {
        self.ttl
    }

    /// Whether an address stands for a name, or could.
    pub fn is_reserved(&self, ip: IpAddr) -> bool {
        self.ranges.place(ip).is_some()
    }

    /// The addresses of a name, in lower case and without the dot at its end, for an answer that is given now. It has
    /// them from now on if it had none; `None` if there is no room.
    pub fn answer(&self, name: &str, now: Instant) -> Option<Addresses> {
        let until = now + self.ttl + GRACE;
        let mut inner = self.lock();
        if let Some(entry) = inner.names.get_mut(name) {
            entry.used = now;
            entry.answered_until = until;
            return Some(self.ranges.addresses(entry.place));
        }
        if inner.names.len() >= self.room && !inner.make_room(now) {
            return None;
        }
        let place = inner.draw(name, self.ranges.places())?;
        inner.insert(name.into(), place, now, until);
        inner.unsaved = true;
        drop(inner);
        self.changed.notify_one();
        Some(self.ranges.addresses(place))
    }

    /// The name that an address stands for.
    pub fn name_of(&self, ip: IpAddr) -> Option<Arc<str>> {
        let place = u32::try_from(self.ranges.place(ip)?).ok()?;
        self.lock().places.get(&place).cloned()
    }

    /// What `target` means: the name that its address stands for, or itself. For those who say where they want to go and
    /// have resolved it by our answers. An error is the errno of an address that stands for no name.
    pub fn target_of(&self, target: Target) -> Result<Target, i32> {
        match target {
            Target::Addr(addr) if self.is_reserved(addr.ip()) => {
                let (name, _) =
                    (self.lease(addr.ip(), Instant::now())).ok_or(libc::EHOSTUNREACH)?;
                Ok(Target::Name(name.to_string(), addr.port()))
            }
            other => Ok(other),
        }
    }

    /// The same for a connection that is made now: the name keeps the address while the lease lives.
    pub fn lease(&self, ip: IpAddr, now: Instant) -> Option<(Arc<str>, Lease)> {
        let name = self.name_of(ip)?;
        let mut inner = self.lock();
        let entry = inner.names.get_mut(&name)?;
        entry.used = now;
        entry.answered_until = entry.answered_until.max(now + REMEMBERED);
        let lease = Lease(Arc::clone(&entry.leases));
        Some((name, lease))
    }

    /// Writes the file whenever there is something new, until it is dropped.
    pub async fn keep(self: Arc<Self>) {
        loop {
            self.changed.notified().await;
            let book = Arc::clone(&self);
            // It only fails when the runtime ends.
            let _ = tokio::task::spawn_blocking(move || book.save()).await;
            // A flood of names must not become one of writes.
            tokio::time::sleep(WRITE_EVERY).await;
        }
    }

    /// Writes the file, if there is something new.
    pub fn save(&self) {
        let Some(file) = &self.file else { return };
        let mut inner = self.lock();
        if !std::mem::take(&mut inner.unsaved) {
            return;
        }
        let names = inner.names.iter();
        let names = names.map(|(name, entry)| (name.to_string(), entry.place));
        let known = Remembered {
            names: names.collect(),
        };
        drop(inner);
        if let Err(error) = remembered::write(file, &known) {
            tracing::error!(%error, path = %file.display(), "the addresses of names cannot be remembered");
            // With the next change, or when the agent ends.
            self.lock().unsaved = true;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn insert(&mut self, name: Arc<str>, place: u32, used: Instant, answered_until: Instant) {
        self.places.insert(place, Arc::clone(&name));
        let entry = Entry {
            place,
            used,
            answered_until,
            leases: Arc::default(),
        };
        self.names.insert(name, entry);
    }

    /// Forgets the name that was used longest ago, of those that nobody needs; false if all are needed.
    fn make_room(&mut self, now: Instant) -> bool {
        let idle = self.names.iter().filter(|(_, entry)| {
            entry.answered_until <= now && Arc::strong_count(&entry.leases) == 1
        });
        let oldest = idle.min_by_key(|(_, entry)| entry.used);
        let Some((name, place)) = oldest.map(|(name, entry)| (Arc::clone(name), entry.place))
        else {
            return false;
        };
        self.names.remove(&name);
        self.places.remove(&place);
        true
    }

    /// The first free place from the one that the name leads to; `None` if there is none.
    fn draw(&self, name: &str, places: u32) -> Option<u32> {
        let hash = digest::digest(&digest::SHA256, name.as_bytes());
        let mut first = [0; 8];
        first.copy_from_slice(&hash.as_ref()[..8]);
        let first = u64::from_be_bytes(first).checked_rem(u64::from(places))?;
        (0..=self.places.len() as u64)
            .map(|step| 1 + ((first + step) % u64::from(places)) as u32)
            .find(|place| !self.places.contains_key(place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(60);

    fn ranges(v4: &str) -> Ranges {
        Ranges {
            v4: v4.parse().unwrap(),
            v6: "fd00:1:2:3::/64".parse().unwrap(),
        }
    }

    fn open(state: &Path, v4: &str) -> Book {
        Book::open(state, ranges(v4), TTL).unwrap()
    }

    #[test]
    fn a_name_keeps_its_addresses_over_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let now = Instant::now();
        let book = open(&state, "198.18.0.0/15");
        let first = book.answer("db.corp.example", now).unwrap();
        let other = book.answer("www.corp.example", now).unwrap();
        assert_ne!(first, other);
        assert!(book.ranges().v4.contains(&first.v4) && book.ranges().v6.contains(&first.v6));
        book.save();
        let again = open(&state, "198.18.0.0/15");
        assert_eq!(
            again.name_of(first.v4.into()).as_deref(),
            Some("db.corp.example")
        );
        assert_eq!(
            again.name_of(first.v6.into()).as_deref(),
            Some("db.corp.example")
        );
        assert_eq!(again.answer("db.corp.example", now), Some(first));
        let without = Book::open(Path::new("/proc/nowhere"), ranges("198.18.0.0/15"), TTL).unwrap();
        assert_eq!(without.answer("db.corp.example", now), Some(first));
    }

    #[test]
    fn names_that_draw_the_same_place_get_different_ones_and_the_file_tells_them() {
        let dir = tempfile::tempdir().unwrap();
        let now = Instant::now();
        let book = open(dir.path(), "10.0.0.0/28");
        let names: Vec<String> = (0..14).map(|n| format!("n{n}.example")).collect();
        let mut seen: Vec<_> = names
            .iter()
            .map(|n| book.answer(n, now).unwrap().v4)
            .collect();
        book.save();
        let again = open(dir.path(), "10.0.0.0/28");
        let later: Vec<_> = names
            .iter()
            .map(|n| again.answer(n, now).unwrap().v4)
            .collect();
        assert_eq!(seen, later);
        seen.sort();
        seen.dedup();
        let expected: Vec<_> = (1..=14).map(|n| Ipv4Addr::new(10, 0, 0, n)).collect();
        assert_eq!(seen, expected);
    }

    #[test]
    fn the_name_used_longest_ago_makes_room_unless_somebody_needs_it() {
        let dir = tempfile::tempdir().unwrap();
        let start = Instant::now();
        let book = open(dir.path(), "10.0.0.0/29");
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut all = Vec::new();
        for n in 0..6 {
            all.push(book.answer(&format!("n{n}"), at(n)).unwrap());
        }
        assert_eq!(
            book.answer("one-more", at(10)),
            None,
            "all may be remembered"
        );
        let (name, lease) = book.lease(all[0].v4.into(), at(0)).unwrap();
        assert_eq!(&*name, "n0");
        let late = TTL.as_secs() + GRACE.as_secs() + 10;
        assert_eq!(
            book.answer("one-more", at(late)).map(|a| a.v4),
            Some(all[1].v4)
        );
        assert_eq!(book.name_of(all[1].v6.into()).as_deref(), Some("one-more"));
        assert_eq!(
            book.name_of(all[0].v4.into()).as_deref(),
            Some("n0"),
            "it is in use"
        );
        drop(lease);
        assert_eq!(
            book.answer("another", at(late)).map(|a| a.v4),
            Some(all[2].v4),
            "whoever was connected may connect again"
        );
        let day_after = at(REMEMBERED.as_secs() + 1);
        assert_eq!(
            book.answer("a-day-later", day_after).map(|a| a.v4),
            Some(all[0].v4)
        );
    }

    #[test]
    fn what_is_outside_or_without_a_name_has_none() {
        let dir = tempfile::tempdir().unwrap();
        let book = open(dir.path(), "198.18.0.0/15");
        assert!(book.is_reserved("198.19.255.255".parse().unwrap()));
        assert!(book.is_reserved("::ffff:198.18.0.1".parse().unwrap()));
        assert!(!book.is_reserved("198.20.0.0".parse().unwrap()));
        for ip in ["198.18.0.1", "192.0.2.1", "fd00:1:2:3:ffff:ffff:ffff:ffff"] {
            assert_eq!(book.name_of(ip.parse().unwrap()), None, "{ip}");
        }
    }

    #[test]
    fn a_file_that_is_not_understood_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "{ half").unwrap();
        let error = Book::open(dir.path(), ranges("10.0.0.0/24"), TTL);
        let error = error.map(drop).unwrap_err();
        assert!(error.to_string().contains(FILE), "{error}");
    }

    #[test]
    fn each_unit_has_a_range_of_its_own() {
        let one = Ranges::own6("spiffe://fleet.example/lorry-17");
        assert_eq!(one, Ranges::own6("spiffe://fleet.example/lorry-17"));
        assert_ne!(one, Ranges::own6("spiffe://fleet.example/lorry-18"));
        assert!(one.addr().is_unique_local() && one.prefix_len() == 64);
    }
}
