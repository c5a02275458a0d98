//! Filters of single commands: what `holdfast run --only` and `--except` leave of what the rules capture.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    str::FromStr,
};

use aya::{
    Ebpf,
    maps::{HashMap, LpmTrie, MapData, MapError, lpm_trie::Key},
};
use ipnet::IpNet;
use session_ebpf_common::{
    FILTER_PREFIXES_MAX, FILTER_RANGES_MAX, FILTERS_MAX, FilterPolicy, FilterRange,
};
use thiserror::Error;

use super::{
    CaptureError,
    policy::{covering, normal},
    tables::{found_or_none, ignore_absent, take},
};

/// Networks that one filter may name, `only` and `except` together.
///
/// Every filter has so many prefixes at most, and one of its own for all other addresses; [`FILTERS_MAX`] of them fit.
/// As text they fit into the target of a symbolic link (4095 bytes), where pins keep them.
pub const FILTER_NETS_MAX: usize = 48;
const _: () = assert!((FILTER_NETS_MAX + 1) * FILTERS_MAX as usize <= FILTER_PREFIXES_MAX as usize);

/// A network with ports, written `NET[:PORTS]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The network.
    pub net: IpNet,
    /// Its ports; all, if none were given.
    pub ports: RangeInclusive<u16>,
}

/// What a `Destination` looks like.
const EXPECTED: &str = "expected NET[:PORTS], such as 10.0.0.0/8, 198.51.100.7:443, 10.0.0.0/8:8000-8999 or \
                        [2001:db8::/32]:443";

impl FromStr for Destination {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a destination: {EXPECTED}");
        let (net, ports) = split(text).ok_or_else(wrong)?;
        let net: Option<IpNet> = net
            .parse()
            .ok()
            .or_else(|| net.parse::<IpAddr>().ok().map(IpNet::from));
        let ports = ports.map_or(Some(0..=u16::MAX), port_range);
        let (net, ports) = net.zip(ports).ok_or_else(wrong)?;
        Ok(Self { net, ports })
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = (self.ports.start(), self.ports.end());
        match (self.net, *first == 0 && *last == u16::MAX) {
            (net, true) => return write!(f, "{net}"),
            (IpNet::V4(net), false) => write!(f, "{net}:{first}")?,
            (IpNet::V6(net), false) => write!(f, "[{net}]:{first}")?,
        }
        if first == last {
            return Ok(());
        }
        write!(f, "-{last}")
    }
}

/// Network and ports. An IPv6 network with ports stands in brackets.
fn split(text: &str) -> Option<(&str, Option<&str>)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (net, rest) = rest.split_once(']')?;
        return match rest {
            "" => Some((net, None)),
            _ => Some((net, Some(rest.strip_prefix(':')?))),
        };
    }
    match text.split_once(':') {
        Some((net, ports)) if !ports.contains(':') => Some((net, Some(ports))),
        _ => Some((text, None)),
    }
}

fn port_range(text: &str) -> Option<RangeInclusive<u16>> {
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = port(first).zip(port(last))?;
    (first <= last).then_some(first..=last)
}

/// What is left captured of one command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Nothing else stays captured; empty means everything.
    pub only: Vec<Destination>,
    /// This goes direct, also where `only` names it.
    pub except: Vec<Destination>,
}

/// A filter that cannot be given to the kernel.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum FilterError {
    /// Too many networks.
    #[error(
        "{count} networks in --only and --except, at most {FILTER_NETS_MAX} can be; aggregate them"
    )]
    TooManyNets {
        /// How many there are.
        count: usize,
    },
    /// Too many port ranges for one prefix.
    #[error("{count} port ranges apply to {prefix}, at most {FILTER_RANGES_MAX} can; merge ranges")]
    TooManyRanges {
        /// The prefix.
        prefix: IpNet,
        /// How many there are.
        count: usize,
    },
    /// Too many scopes have a filter.
    #[error("{FILTERS_MAX} commands have a filter already, and no more can")]
    TooManyFilters,
}

impl Filter {
    /// Whether it leaves everything as it is.
    pub fn is_empty(&self) -> bool {
        self.only.is_empty() && self.except.is_empty()
    }

    /// For each prefix what holds inside it. Both families have one for all addresses, so that every lookup finds one.
    fn compile(&self) -> Result<BTreeMap<IpNet, FilterPolicy>, FilterError> {
        let count = self.only.len() + self.except.len();
        if count > FILTER_NETS_MAX {
            return Err(FilterError::TooManyNets { count });
        }
        let named = self.only.iter().chain(&self.except);
        let mut prefixes: BTreeSet<IpNet> = named.map(|to| normal(to.net)).collect();
        prefixes.extend([IpNet::V4(Default::default()), IpNet::V6(Default::default())]);
        prefixes
            .into_iter()
            .map(|prefix| Ok((prefix, self.policy(prefix)?)))
            .collect()
    }

    fn policy(&self, prefix: IpNet) -> Result<FilterPolicy, FilterError> {
        let within: BTreeSet<IpNet> = covering(prefix).collect();
        let holding = |list: &[Destination], keep: u32| -> Vec<FilterRange> {
            let holds = list.iter().filter(|to| within.contains(&normal(to.net)));
            let range = |to: &Destination| FilterRange {
                first: *to.ports.start(),
                last: *to.ports.end(),
                keep,
            };
            holds.map(range).collect()
        };
        let mut ranges = holding(&self.except, 0);
        ranges.extend(holding(&self.only, 1));
        let mut policy = FilterPolicy {
            count: ranges.len() as u32,
            otherwise: u32::from(self.only.is_empty()),
            ..FilterPolicy::default()
        };
        let Some(slots) = policy.ranges.get_mut(..ranges.len()) else {
            let count = ranges.len();
            return Err(FilterError::TooManyRanges { prefix, count });
        };
        slots.copy_from_slice(&ranges);
        Ok(policy)
    }
}

/// As it would be typed.
impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let only = self.only.iter().map(|to| format!("--only {to}"));
        let except = self.except.iter().map(|to| format!("--except {to}"));
        f.write_str(&only.chain(except).collect::<Vec<_>>().join(" "))
    }
}

impl FromStr for Filter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut filter = Self::default();
        let mut words = text.split_ascii_whitespace();
        while let Some(option) = words.next() {
            let to = words.next().unwrap_or_default().parse()?;
            match option {
                "--only" => filter.only.push(to),
                "--except" => filter.except.push(to),
                other => return Err(format!("`{other}` is neither --only nor --except")),
            }
        }
        Ok(filter)
    }
}

/// The filters as the kernel has them.
pub struct Filters {
    numbers: HashMap<MapData, u64, u32>,
    v4: LpmTrie<MapData, [u8; 8], FilterPolicy>,
    v6: LpmTrie<MapData, [u8; 20], FilterPolicy>,
    live: BTreeMap<u64, Live>,
    next: u32,
}

/// A filter that stands.
struct Live {
    number: u32,
    filter: Filter,
    prefixes: Vec<IpNet>,
}

impl Filters {
    /// Takes the maps, which are still empty.
    pub fn new(ebpf: &mut Ebpf) -> Result<Self, CaptureError> {
        Ok(Self {
            numbers: take(ebpf, "FILTERS")?,
            v4: take(ebpf, "FILTERED4")?,
            v6: take(ebpf, "FILTERED6")?,
            live: BTreeMap::new(),
            next: 0,
        })
    }

    /// How many stand.
    pub fn len(&self) -> u32 {
        // At most `FILTERS_MAX`.
        self.live.len() as u32
    }

    /// Gives the cgroup with this id a filter. On an error nothing of it is left.
    pub fn insert(&mut self, cgroup: u64, filter: &Filter) -> Result<(), CaptureError> {
        let policies = filter.compile()?;
        if self.len() >= FILTERS_MAX {
            return Err(FilterError::TooManyFilters.into());
        }
        self.remove(cgroup);
        let live = Live {
            number: self.next,
            filter: filter.clone(),
            prefixes: policies.keys().copied().collect(),
        };
        // A number does not come again while anything of an older filter may be there.
        self.next = self.next.wrapping_add(1);
        let number = live.number;
        // Before it can be inserted, so that it is removed whatever fails.
        self.live.insert(cgroup, live);
        let mut inserted = || -> Result<(), MapError> {
            for (prefix, policy) in &policies {
                match prefix {
                    IpNet::V4(_) => self.v4.insert(&key4(number, *prefix), policy, 0)?,
                    IpNet::V6(_) => self.v6.insert(&key6(number, *prefix), policy, 0)?,
                }
            }
            self.numbers.insert(cgroup, number, 0)
        };
        inserted().map_err(|error| {
            self.remove(cgroup);
            CaptureError::map("writing the filter of a command", error)
        })
    }

    /// Removes the filter of the cgroup with this id, if it has one.
    pub fn remove(&mut self, cgroup: u64) {
        let Some(live) = self.live.remove(&cgroup) else {
            return;
        };
        // First what leads to the rest, so that no connection sees a part of it.
        let mut results = vec![ignore_absent(self.numbers.remove(&cgroup))];
        for prefix in live.prefixes {
            results.push(ignore_absent(match prefix {
                IpNet::V4(_) => self.v4.remove(&key4(live.number, prefix)),
                IpNet::V6(_) => self.v6.remove(&key6(live.number, prefix)),
            }));
        }
        for error in results.into_iter().filter_map(Result::err) {
            tracing::warn!(%error, "a part of a command's filter stays in the kernel's table");
        }
    }

    /// The filter of the cgroup with this id, and whether connections to `to` stay captured: as the kernel's own tables
    /// say.
    pub fn look(&self, cgroup: u64, to: SocketAddr) -> Result<Option<(&Filter, bool)>, MapError> {
        let Some(number) = found_or_none(self.numbers.get(&cgroup, 0))? else {
            return Ok(None);
        };
        let address = IpNet::from(to.ip().to_canonical());
        let policy = match address {
            IpNet::V4(_) => self.v4.get(&key4(number, address), 0),
            IpNet::V6(_) => self.v6.get(&key6(number, address), 0),
        };
        let keeps = found_or_none(policy)?.is_none_or(|policy| policy.keeps(to.port()));
        Ok((self.live.get(&cgroup)).map(|live| (&live.filter, keeps)))
    }
}

fn key4(number: u32, net: IpNet) -> Key<[u8; 8]> {
    let mut data = [0; 8];
    data[..4].copy_from_slice(&number.to_be_bytes());
    if let IpAddr::V4(addr) = net.addr() {
        data[4..].copy_from_slice(&addr.octets());
    }
    Key::new(32 + u32::from(net.prefix_len()), data)
}

fn key6(number: u32, net: IpNet) -> Key<[u8; 20]> {
    let mut data = [0; 20];
    data[..4].copy_from_slice(&number.to_be_bytes());
    if let IpAddr::V6(addr) = net.addr() {
        data[4..].copy_from_slice(&addr.octets());
    }
    Key::new(32 + u32::from(net.prefix_len()), data)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn filter(only: &[&str], except: &[&str]) -> Filter {
        let list = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        Filter {
            only: list(only),
            except: list(except),
        }
    }

    #[test]
    fn destinations_are_read_and_written() {
        for text in [
            "10.0.0.0/8",
            "198.51.100.7/32:443",
            "10.0.0.0/8:8000-8999",
            "2001:db8::/32",
            "[2001:db8::/32]:443",
            "[2001:db8::1/128]:1-65535",
        ] {
            assert_eq!(text.parse::<Destination>().unwrap().to_string(), text);
        }
        let host: Destination = "198.51.100.7:443".parse().unwrap();
        assert_eq!(host.to_string(), "198.51.100.7/32:443");
        let host: Destination = "2001:db8::1".parse().unwrap();
        assert_eq!(host.to_string(), "2001:db8::1/128");
        for wrong in [
            "",
            "x",
            "10.0.0.0/33",
            "10.0.0.1:",
            "10.0.0.1:0",
            "10.0.0.1:9-1",
            "10.0.0.1:1:2",
            "[::1",
            "[::1]443",
            "10.0.0.1:http",
            "db.internal:5432",
        ] {
            let error = wrong.parse::<Destination>().unwrap_err();
            assert!(error.contains("expected NET[:PORTS]"), "{error}");
        }
    }

    #[test]
    fn a_filter_comes_back_from_its_text() {
        let long = Destination {
            net: "2001:db8:1111:2222:3333:4444:5555:6666/128"
                .parse()
                .unwrap(),
            ports: 10_000..=20_000,
        };
        let whole = Filter {
            only: vec![],
            except: vec![long; FILTER_NETS_MAX],
        };
        assert!(whole.to_string().len() < 4096);
        for filter in [
            whole,
            filter(&["10.0.0.0/8", "::/0"], &["10.1.0.0/16:22"]),
            filter(&[], &[]),
        ] {
            assert_eq!(filter.to_string().parse(), Ok(filter));
        }
        assert!("--only".parse::<Filter>().is_err());
        assert!("10.0.0.0/8 --only".parse::<Filter>().is_err());
    }

    #[test]
    fn limits_hold() {
        let nets = |count: u8| {
            (0..count)
                .map(|n| format!("10.0.0.{n}"))
                .collect::<Vec<_>>()
        };
        let of =
            |texts: &[String]| filter(&texts.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
        assert!(of(&nets(48)).compile().is_ok());
        let many = of(&nets(49)).compile();
        assert_eq!(many, Err(FilterError::TooManyNets { count: 49 }));
        let ports: Vec<_> = (1..=17).map(|port| format!("10.0.0.0/8:{port}")).collect();
        assert!(matches!(
            of(&ports).compile(),
            Err(FilterError::TooManyRanges { count: 17, .. })
        ));
    }

    fn small() -> impl Strategy<Value = Destination> {
        // Few addresses, short prefixes and few ports, so that they overlap often.
        let ports = (0_u16..6, 0_u16..6).prop_map(|(a, b)| a.min(b)..=a.max(b));
        (0_u8..16, 0_u8..=4, ports).prop_map(|(bits, len, ports)| Destination {
            net: IpNet::new(IpAddr::from([bits << 4, 0, 0, 0]), len).unwrap(),
            ports,
        })
    }

    proptest! {
        #[test]
        fn compiled_filters_mean_what_is_typed(
            only in prop::collection::vec(small(), 0..4),
            except in prop::collection::vec(small(), 0..4),
        ) {
            let filter = Filter { only, except };
            let compiled = filter.compile().unwrap();
            for (bits, port) in (0_u8..16).flat_map(|bits| (0_u16..7).map(move |port| (bits, port))) {
                let addr = IpAddr::from([bits << 4 | 3, 1, 2, 3]);
                let named = |list: &[Destination]| {
                    list.iter().any(|to| to.net.contains(&addr) && to.ports.contains(&port))
                };
                let expected = (filter.only.is_empty() || named(&filter.only)) && !named(&filter.except);
                let holding = compiled.iter().filter(|(net, _)| net.contains(&addr));
                let (_, policy) = holding.max_by_key(|(net, _)| net.prefix_len()).unwrap();
                prop_assert_eq!(policy.keeps(port), expected, "{} {}", addr, port);
            }
        }
    }
}
