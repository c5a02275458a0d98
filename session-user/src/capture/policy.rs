//! Capture rules, compiled for the kernel.
//!
//! The kernel looks up the longest prefix that holds a destination and finds a [`Policy`]: an ordered list of port and
//! uid ranges. The rules say something else: they stand in an order, and the first that matches decides, however long
//! its prefix is. So for every prefix that any rule mentions, this module works out beforehand everything that holds
//! inside it, in the order of the rules; what the kernel finds is then always the whole answer.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
    sync::Arc,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use session_ebpf_common::{
    NAMED_PEER, POLICY_RULES_MAX, POLICY_SLOTS, PREFIXES_MAX, Policy, PortRule, RULE_EARLY,
    RULE_FAIL_CLOSED, action,
};
use thiserror::Error;

use super::rule::{Action, CaptureRule};

/// Rules that cannot be given to the kernel.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RuleError {
    /// A rule without destinations.
    #[error("capture rule {rule}: `to` is empty; name at least one prefix, such as 0.0.0.0/0")]
    NoDestination {
        /// Position of the rule, from 1.
        rule: usize,
    },
    /// A port or uid range whose end is before its start.
    #[error("capture rule {rule}: {what} range {first}-{last} ends before it starts")]
    Backward {
        /// Position of the rule, from 1.
        rule: usize,
        /// What the range is of.
        what: &'static str,
        /// Start of the range.
        first: u32,
        /// End of the range.
        last: u32,
    },
    /// More entries hold for one prefix than the kernel's table has room for.
    #[error(
        "capture rule {rule}: with it {count} entries apply to {prefix}, at most {POLICY_RULES_MAX} can; a rule has one \
         for each of its port ranges times its uid ranges: merge ranges or rules"
    )]
    TooManyEntries {
        /// Position of the last rule that applies, from 1.
        rule: usize,
        /// The prefix.
        prefix: IpNet,
        /// Entries that apply.
        count: usize,
    },
    /// More rules than can be numbered.
    #[error("capture: {count} rules, at most {} fit", u16::MAX)]
    TooManyRules {
        /// How many there are.
        count: usize,
    },
    /// Too many prefixes of one family.
    #[error("capture: {count} prefixes of one address family, at most {} fit; aggregate them", PREFIXES_MAX / 2)]
    TooManyPrefixes {
        /// How many there are.
        count: usize,
    },
    /// Too many different lists of entries.
    #[error("capture: {count} different combinations of rules, at most {} fit; merge rules", POLICY_SLOTS / 2)]
    TooManyPolicies {
        /// How many there are.
        count: usize,
    },
}

impl RuleError {
    /// Position of the rule at fault, from 1; `None` if it is all of them together.
    pub fn rule(&self) -> Option<usize> {
        match self {
            Self::NoDestination { rule }
            | Self::Backward { rule, .. }
            | Self::TooManyEntries { rule, .. } => Some(*rule),
            Self::TooManyRules { .. }
            | Self::TooManyPrefixes { .. }
            | Self::TooManyPolicies { .. } => None,
        }
    }
}

/// What the kernel is given: for each prefix the policy that holds inside it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compiled {
    /// IPv4 prefixes.
    pub v4: BTreeMap<Ipv4Net, Arc<Policy>>,
    /// IPv6 prefixes.
    pub v6: BTreeMap<Ipv6Net, Arc<Policy>>,
}

/// The rules with one more behind them, which takes everything to the `reserved` ranges to the agent: their addresses
/// stand for names, so no other rule is for them, and nothing goes there directly, also when the agent is dead. The
/// rules keep their positions.
pub fn reserve(rules: &[CaptureRule], reserved: &[IpNet]) -> Vec<CaptureRule> {
    let mut rules = rules.to_vec();
    for rule in rules.iter_mut().filter(|rule| rule.names.is_empty()) {
        rule.except.extend(reserved);
    }
    rules.push(CaptureRule {
        to: reserved.to_vec(),
        action: Action::Capture {
            peer: NAMED_PEER,
            fail_closed: true,
            early: false,
        },
        ..CaptureRule::capture(NAMED_PEER)
    });
    rules
}

/// Whether rules can be given to the kernel.
pub fn check(rules: &[CaptureRule]) -> Result<(), RuleError> {
    compile(rules).map(drop)
}

/// Compiles rules.
pub fn compile(rules: &[CaptureRule]) -> Result<Compiled, RuleError> {
    let index = Index::new(rules)?;
    let mut compiled = Compiled::default();
    let mut distinct: HashSet<Arc<Policy>> = HashSet::new();
    for prefix in index.prefixes() {
        let policy = Arc::new(index.policy(prefix)?);
        // Kept once: there are many more prefixes than policies.
        let policy = match distinct.get(&policy) {
            Some(known) => Arc::clone(known),
            None => policy,
        };
        distinct.insert(Arc::clone(&policy));
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
        if rules.len() > usize::from(u16::MAX) {
            return Err(RuleError::TooManyRules { count: rules.len() });
        }
        let mut index = Self {
            rules,
            to: HashMap::new(),
            except: HashMap::new(),
        };
        for (position, rule) in rules.iter().enumerate() {
            check_one(position + 1, rule)?;
            for net in &rule.to {
                index.to.entry(normal(*net)).or_default().push(position);
            }
            for net in &rule.except {
                index.except.entry(normal(*net)).or_default().push(position);
            }
        }
        Ok(index)
    }

    /// In order, so that an error is the same each time.
    fn prefixes(&self) -> BTreeSet<IpNet> {
        self.to.keys().chain(self.except.keys()).copied().collect()
    }

    /// Everything that holds for addresses whose longest mentioned prefix is `prefix`.
    fn policy(&self, prefix: IpNet) -> Result<Policy, RuleError> {
        let mut excepted = HashSet::new();
        // In the order of the rules: the order of precedence.
        let mut candidates = BTreeSet::new();
        for net in covering(prefix) {
            excepted.extend(self.except.get(&net).into_iter().flatten().copied());
            candidates.extend(self.to.get(&net).into_iter().flatten().copied());
        }
        let mut policy = Policy::default();
        let mut count = 0;
        for position in candidates.difference(&excepted.into_iter().collect()) {
            let rule = &self.rules[*position];
            for entry in entries(*position, rule) {
                if let Some(slot) = policy.rules.get_mut(count) {
                    *slot = entry;
                }
                count += 1;
            }
            if count > POLICY_RULES_MAX {
                return Err(RuleError::TooManyEntries {
                    rule: position + 1,
                    prefix,
                    count,
                });
            }
            // What stands behind a rule that takes everything is never asked.
            if rule.takes_all() {
                break;
            }
        }
        policy.count = count as u32;
        Ok(policy)
    }
}

fn check_one(number: usize, rule: &CaptureRule) -> Result<(), RuleError> {
    if rule.to.is_empty() && rule.names.is_empty() {
        return Err(RuleError::NoDestination { rule: number });
    }
    let ports = rule
        .ports
        .iter()
        .map(|r| ("port", u32::from(*r.start()), u32::from(*r.end())));
    let uids = rule.uids.iter().map(|r| ("uid", *r.start(), *r.end()));
    match ports.chain(uids).find(|(_, first, last)| first > last) {
        Some((what, first, last)) => Err(RuleError::Backward {
            rule: number,
            what,
            first,
            last,
        }),
        None => Ok(()),
    }
}

/// One entry for each port range and uid range.
fn entries(position: usize, rule: &CaptureRule) -> impl Iterator<Item = PortRule> {
    let (action, peer, flags) = match rule.action {
        Action::Direct => (action::DIRECT, 0, 0),
        Action::Refuse => (action::REFUSE, 0, 0),
        Action::Capture {
            peer,
            fail_closed,
            early,
        } => {
            let closed = if fail_closed { RULE_FAIL_CLOSED } else { 0 };
            let early = if early { RULE_EARLY } else { 0 };
            (action::CAPTURE, peer, closed | early)
        }
    };
    let uids = or_all(&rule.uids, 0..=u32::MAX);
    or_all(&rule.ports, 0..=u16::MAX)
        .into_iter()
        .flat_map(move |ports| {
            uids.clone()
                .into_iter()
                .map(move |uids| (ports.clone(), uids))
        })
        .map(move |(ports, uids)| PortRule {
            first: *ports.start(),
            last: *ports.end(),
            peer,
            flags,
            uid_first: *uids.start(),
            uid_last: *uids.end(),
            // `Index::new` has counted the rules.
            rule: position as u16,
            protocols: rule.protocols.bits(),
            action,
        })
}

/// The ranges, or `all` where there is none.
fn or_all<T: Clone>(
    ranges: &[RangeInclusive<T>],
    all: RangeInclusive<T>,
) -> Vec<RangeInclusive<T>> {
    if ranges.is_empty() {
        vec![all]
    } else {
        ranges.to_vec()
    }
}

/// The prefix without host bits, and as IPv4 if it is v4-mapped.
pub(super) fn normal(net: IpNet) -> IpNet {
    if let IpNet::V6(v6) = net
        && v6.prefix_len() >= 96
        && let Some(v4) = v6.addr().to_ipv4_mapped()
    {
        return make(IpAddr::V4(v4), v6.prefix_len() - 96);
    }
    net.trunc()
}

/// `prefix` and every shorter one that contains it, longest first.
pub(super) fn covering(prefix: IpNet) -> impl Iterator<Item = IpNet> {
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
mod tests;
