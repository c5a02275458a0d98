//! Capture rules, compiled for the kernel.
//!
//! The kernel looks up the longest prefix that holds a destination and finds a [`Policy`]: an ordered list of port
//! ranges. The rules say more than that: a rule has exceptions, and a destination whose port the most specific rule does
//! not name falls through to a less specific one. So for every prefix that any rule mentions, this module works out
//! beforehand everything that holds inside it; what the kernel finds is then always the whole answer.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use session_ebpf_common::{
    POLICY_RULES_MAX, POLICY_SLOTS, PREFIXES_MAX, Policy, PortRule, RULE_FAIL_CLOSED,
};
use thiserror::Error;

/// Which destinations are captured, and for which peer. The longest matching prefix of all rules decides; between equal
/// prefixes the earlier rule does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptureRule {
    /// Destinations. v4-mapped IPv6 prefixes mean IPv4.
    pub to: Vec<IpNet>,
    /// Destinations inside `to` that this rule leaves alone (another rule may still claim them).
    pub except: Vec<IpNet>,
    /// Destination ports; empty means all.
    pub ports: Vec<RangeInclusive<u16>>,
    /// Index of the peer that carries the connections, handed back with each of them.
    pub peer: u32,
    /// Refuse connections while the agent cannot take them, instead of letting them go direct.
    pub fail_closed: bool,
}

/// Rules that cannot be given to the kernel.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RuleError {
    /// A rule without destinations.
    #[error("capture rule {rule}: `to` is empty; name at least one prefix, such as 0.0.0.0/0")]
    NoDestination {
        /// Position of the rule, from 1.
        rule: usize,
    },
    /// A port range whose end is before its start.
    #[error("capture rule {rule}: port range {first}-{last} ends before it starts")]
    BackwardPorts {
        /// Position of the rule, from 1.
        rule: usize,
        /// Start of the range.
        first: u16,
        /// End of the range.
        last: u16,
    },
    /// More port ranges hold for one prefix than the kernel's table has room for.
    #[error(
        "capture: {count} port ranges apply to {prefix}, at most {POLICY_RULES_MAX} can; merge ranges or rules"
    )]
    TooManyPorts {
        /// The prefix.
        prefix: IpNet,
        /// Ranges that apply, from this rule and from less specific ones.
        count: usize,
    },
    /// Too many prefixes of one family.
    #[error("capture: {count} prefixes of one address family, at most {} fit; aggregate them", PREFIXES_MAX / 2)]
    TooManyPrefixes {
        /// How many there are.
        count: usize,
    },
    /// Too many different port lists.
    #[error("capture: {count} different combinations of ports, peers and exceptions, at most {} fit", POLICY_SLOTS / 2)]
    TooManyPolicies {
        /// How many there are.
        count: usize,
    },
}

/// What the kernel is given: for each prefix the policy that holds inside it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compiled {
    /// IPv4 prefixes.
    pub v4: BTreeMap<Ipv4Net, Policy>,
    /// IPv6 prefixes.
    pub v6: BTreeMap<Ipv6Net, Policy>,
}

/// Compiles rules.
pub fn compile(rules: &[CaptureRule]) -> Result<Compiled, RuleError> {
    let index = Index::new(rules)?;
    let mut compiled = Compiled::default();
    let mut distinct = HashSet::new();
    for prefix in index.prefixes() {
        let policy = index.policy(prefix)?;
        distinct.insert(policy);
        match prefix {
            IpNet::V4(net) => compiled.v4.insert(net, policy),
            IpNet::V6(net) => compiled.v6.insert(net, policy),
        };
    }
    let count = compiled.v4.len().max(compiled.v6.len());
    // Half of each table: an update inserts what is new before it removes what is old.
    if count > PREFIXES_MAX as usize / 2 {
        return Err(RuleError::TooManyPrefixes { count });
    }
    if distinct.len() > POLICY_SLOTS as usize / 2 {
        return Err(RuleError::TooManyPolicies {
            count: distinct.len(),
        });
    }
    Ok(compiled)
}

/// The rules, by prefix.
struct Index<'a> {
    rules: &'a [CaptureRule],
    to: HashMap<IpNet, Vec<usize>>,
    except: HashMap<IpNet, Vec<usize>>,
}

impl<'a> Index<'a> {
    fn new(rules: &'a [CaptureRule]) -> Result<Self, RuleError> {
        let mut index = Self {
            rules,
            to: HashMap::new(),
            except: HashMap::new(),
        };
        for (position, rule) in rules.iter().enumerate() {
            check(position + 1, rule)?;
            for net in &rule.to {
                index.to.entry(normal(*net)).or_default().push(position);
            }
            for net in &rule.except {
                index.except.entry(normal(*net)).or_default().push(position);
            }
        }
        Ok(index)
    }

    fn prefixes(&self) -> HashSet<IpNet> {
        self.to.keys().chain(self.except.keys()).copied().collect()
    }

    /// Everything that holds for addresses whose longest mentioned prefix is `prefix`.
    fn policy(&self, prefix: IpNet) -> Result<Policy, RuleError> {
        let mut excepted = HashSet::new();
        let mut candidates = Vec::new();
        // From the longest to the shortest: the order of precedence.
        for net in covering(prefix) {
            excepted.extend(self.except.get(&net).into_iter().flatten().copied());
            candidates.extend(self.to.get(&net).into_iter().flatten().copied());
        }
        let mut taken = HashSet::new();
        let ranges: Vec<PortRule> = candidates
            .into_iter()
            .filter(|position| !excepted.contains(position) && taken.insert(*position))
            .flat_map(|position| port_rules(&self.rules[position]))
            .collect();
        if ranges.len() > POLICY_RULES_MAX {
            return Err(RuleError::TooManyPorts {
                prefix,
                count: ranges.len(),
            });
        }
        let mut policy = Policy {
            count: ranges.len() as u32,
            ..Policy::default()
        };
        policy.rules[..ranges.len()].copy_from_slice(&ranges);
        Ok(policy)
    }
}

fn check(number: usize, rule: &CaptureRule) -> Result<(), RuleError> {
    if rule.to.is_empty() {
        return Err(RuleError::NoDestination { rule: number });
    }
    match rule.ports.iter().find(|range| range.is_empty()) {
        Some(range) => Err(RuleError::BackwardPorts {
            rule: number,
            first: *range.start(),
            last: *range.end(),
        }),
        None => Ok(()),
    }
}

fn port_rules(rule: &CaptureRule) -> Vec<PortRule> {
    let flags = if rule.fail_closed {
        RULE_FAIL_CLOSED
    } else {
        0
    };
    let one = |range: &RangeInclusive<u16>| PortRule {
        first: *range.start(),
        last: *range.end(),
        peer: rule.peer,
        flags,
    };
    if rule.ports.is_empty() {
        vec![one(&(0..=u16::MAX))]
    } else {
        rule.ports.iter().map(one).collect()
    }
}

/// The prefix without host bits, and as IPv4 if it is v4-mapped.
fn normal(net: IpNet) -> IpNet {
    if let IpNet::V6(v6) = net
        && v6.prefix_len() >= 96
        && let Some(v4) = v6.addr().to_ipv4_mapped()
    {
        return make(IpAddr::V4(v4), v6.prefix_len() - 96);
    }
    net.trunc()
}

/// `prefix` and every shorter one that contains it, longest first.
fn covering(prefix: IpNet) -> impl Iterator<Item = IpNet> {
    (0..=prefix.prefix_len())
        .rev()
        .map(move |len| make(prefix.addr(), len))
}

fn make(addr: IpAddr, len: u8) -> IpNet {
    match addr {
        IpAddr::V4(addr) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0);
            IpNet::V4(Ipv4Net::new_assert(
                Ipv4Addr::from(u32::from(addr) & mask),
                len,
            ))
        }
        IpAddr::V6(addr) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
            IpNet::V6(Ipv6Net::new_assert(
                Ipv6Addr::from(u128::from(addr) & mask),
                len,
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rule(to: &[&str], except: &[&str], ports: &[RangeInclusive<u16>], peer: u32) -> CaptureRule {
        let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        CaptureRule {
            to: nets(to),
            except: nets(except),
            ports: ports.to_vec(),
            peer,
            fail_closed: false,
        }
    }

    /// What the kernel does with the compiled tables.
    fn lookup(compiled: &Compiled, addr: IpAddr, port: u16) -> Option<u32> {
        let policy = match addr {
            IpAddr::V4(addr) => {
                let holding = compiled.v4.iter().filter(|(net, _)| net.contains(&addr));
                holding
                    .max_by_key(|(net, _)| net.prefix_len())
                    .map(|(_, policy)| policy)
            }
            IpAddr::V6(addr) => {
                let holding = compiled.v6.iter().filter(|(net, _)| net.contains(&addr));
                holding
                    .max_by_key(|(net, _)| net.prefix_len())
                    .map(|(_, policy)| policy)
            }
        }?;
        let live = &policy.rules[..policy.count as usize];
        live.iter()
            .find(|rule| rule.first <= port && port <= rule.last)
            .map(|rule| rule.peer)
    }

    /// What the rules say, read literally.
    fn meaning(rules: &[CaptureRule], addr: IpAddr, port: u16) -> Option<u32> {
        let fits = |rule: &&CaptureRule| {
            (rule.ports.is_empty() || rule.ports.iter().any(|range| range.contains(&port)))
                && !rule.except.iter().any(|net| net.contains(&addr))
        };
        let longest = |rule: &CaptureRule| {
            rule.to
                .iter()
                .filter(|net| net.contains(&addr))
                .map(IpNet::prefix_len)
                .max()
        };
        let claims = rules
            .iter()
            .filter(fits)
            .filter_map(|rule| Some((longest(rule)?, rule.peer)));
        // Of equal lengths the first wins; `min_by_key` keeps the first.
        claims
            .min_by_key(|(len, _)| std::cmp::Reverse(*len))
            .map(|(_, peer)| peer)
    }

    #[test]
    fn exceptions_and_nested_rules() {
        let rules = [
            rule(&["10.0.0.0/8"], &["10.1.0.0/16"], &[], 1),
            rule(&["10.1.2.0/24"], &[], &[443..=443], 2),
            rule(&["0.0.0.0/0"], &["10.1.2.0/24"], &[22..=22], 3),
        ];
        let compiled = compile(&rules).unwrap();
        let peer = |addr: &str, port| lookup(&compiled, addr.parse().unwrap(), port);
        assert_eq!(peer("10.9.9.9", 80), Some(1));
        assert_eq!(peer("10.1.1.1", 80), None);
        assert_eq!(peer("10.1.1.1", 22), Some(3));
        assert_eq!(peer("10.1.2.3", 443), Some(2));
        assert_eq!(peer("10.1.2.3", 80), None);
        assert_eq!(peer("10.1.2.3", 22), None);
        assert_eq!(peer("192.0.2.1", 22), Some(3));
        assert_eq!(peer("2001:db8::1", 22), None);
    }

    #[test]
    fn equal_prefixes_share_their_ports_in_order() {
        let rules = [
            rule(&["192.0.2.0/24"], &[], &[1..=100], 1),
            rule(&["192.0.2.7/24"], &[], &[50..=200], 2),
        ];
        let compiled = compile(&rules).unwrap();
        assert_eq!(compiled.v4.len(), 1, "host bits do not make another prefix");
        let peer = |port| lookup(&compiled, "192.0.2.1".parse().unwrap(), port);
        assert_eq!((peer(50), peer(150), peer(201)), (Some(1), Some(2), None));
    }

    #[test]
    fn mapped_prefixes_are_ipv4() {
        let compiled =
            compile(&[rule(&["::ffff:10.0.0.0/104", "2001:db8::/32"], &[], &[], 5)]).unwrap();
        assert_eq!(lookup(&compiled, "10.200.0.1".parse().unwrap(), 1), Some(5));
        assert_eq!(compiled.v6.len(), 1);
    }

    #[test]
    fn bad_rules_are_named() {
        let backward = RangeInclusive::new(9, 3);
        assert_eq!(
            compile(&[rule(&["::/0"], &[], &[backward], 0)]),
            Err(RuleError::BackwardPorts {
                rule: 1,
                first: 9,
                last: 3
            })
        );
        let empty = compile(&[rule(&["::/0"], &[], &[], 0), rule(&[], &[], &[], 0)]);
        assert_eq!(empty, Err(RuleError::NoDestination { rule: 2 }));
        let many: Vec<_> = (0..17).map(|port| port..=port).collect();
        let crowded = compile(&[rule(&["::/0"], &[], &many, 0)]);
        assert!(
            matches!(crowded, Err(RuleError::TooManyPorts { count: 17, .. })),
            "{crowded:?}"
        );
    }

    #[test]
    fn limits_hold() {
        let net = |index: u32| IpNet::new(IpAddr::V4(Ipv4Addr::from(index << 8)), 24).unwrap();
        let mut wide = rule(&["0.0.0.0/0"], &[], &[], 0);
        wide.to.extend((0..PREFIXES_MAX / 2).map(net));
        assert!(matches!(
            compile(&[wide]),
            Err(RuleError::TooManyPrefixes { .. })
        ));
        let varied: Vec<_> = (0..600)
            .map(|peer| CaptureRule {
                to: vec![net(peer)],
                ..rule(&["::/0"], &[], &[], peer)
            })
            .collect();
        assert_eq!(
            compile(&varied),
            Err(RuleError::TooManyPolicies { count: 600 })
        );
    }

    fn small_net() -> impl Strategy<Value = IpNet> {
        // Few addresses and short prefixes, so that rules overlap often.
        (0_u32..16, 0_u8..=4).prop_map(|(bits, len)| {
            IpNet::new(IpAddr::V4(Ipv4Addr::from(bits << 28)), len).unwrap()
        })
    }

    fn small_rule() -> impl Strategy<Value = CaptureRule> {
        let nets = |least| prop::collection::vec(small_net(), least..4);
        let ports = prop::collection::vec(
            (0_u16..8, 0_u16..8).prop_map(|(a, b)| a.min(b)..=a.max(b)),
            0..3,
        );
        (nets(1), nets(0), ports, 0_u32..100).prop_map(|(to, except, ports, peer)| CaptureRule {
            to,
            except,
            ports,
            peer,
            fail_closed: false,
        })
    }

    proptest! {
        #[test]
        fn compiled_tables_mean_what_the_rules_mean(rules in prop::collection::vec(small_rule(), 0..6)) {
            let compiled = compile(&rules).unwrap();
            for (addr, port) in (0_u32..16).flat_map(|addr| (0_u16..9).map(move |port| (addr, port))) {
                let addr = IpAddr::V4(Ipv4Addr::from(addr << 28 | 0x0123_4567));
                prop_assert_eq!(lookup(&compiled, addr, port), meaning(&rules, addr, port), "{} {}", addr, port);
            }
        }
    }
}
