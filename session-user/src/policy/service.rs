//! Which streams use more than one link: a pure function of where they come from and go to.

use std::ops::RangeInclusive;

use ipnet::IpNet;
use session_proto::wire::{Service, Target};

use crate::glob;

/// Transports on one link beside its first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lanes {
    /// None: all streams share one.
    #[default]
    Shared,
    /// So many for bulk streams, so that interactive ones do not wait behind them.
    Bulk(u64),
    /// Every stream has one to itself, as far as there are enough.
    PerStream,
}

/// Streams that have something in common, and how their records use the links.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceRule {
    /// Destinations; empty means all.
    pub to: Vec<IpNet>,
    /// Destination ports; empty means all.
    pub ports: Vec<RangeInclusive<u16>>,
    /// Names or patterns of the application's cgroup, below the root of the hierarchy; what is inside of
    /// a cgroup belongs to it. Empty means all.
    pub cgroups: Vec<String>,
    /// What the streams get.
    pub service: Service,
}

/// Rules in order: the first that matches decides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceRules {
    /// The rules.
    pub rules: Vec<ServiceRule>,
    /// What a stream gets that no rule names.
    pub default: Service,
}

impl ServiceRules {
    /// What a stream to `target` gets; a host name is in no network. `cgroup` is asked for at most once, and
    /// only if it matters: it returns the cgroup's path below the root, without a slash in front, or `None`
    /// where it is not known.
    pub fn choose(&self, target: &Target, cgroup: impl FnOnce() -> Option<String>) -> Service {
        let rule = self.find(target, cgroup);
        rule.map_or(self.default, |position| self.rules[position].service)
    }

    /// Position of the rule that decides; arguments as for [`ServiceRules::choose`].
    pub fn find(&self, target: &Target, cgroup: impl FnOnce() -> Option<String>) -> Option<usize> {
        let mut asked = Asked::Not(cgroup);
        let (ip, port) = match target {
            Target::Addr(addr) => (Some(addr.ip()), addr.port()),
            Target::Name(_, port) => (None, *port),
        };
        let fits = |rule: &ServiceRule| {
            let within = |net: &IpNet| ip.is_some_and(|ip| net.contains(&ip));
            let to = rule.to.is_empty() || rule.to.iter().any(within);
            let port = rule.ports.is_empty() || rule.ports.iter().any(|r| r.contains(&port));
            to && port && (rule.cgroups.is_empty() || asked.matches(&rule.cgroups))
        };
        self.rules.iter().position(fits)
    }
}

/// A question that is asked once.
enum Asked<F> {
    Not(F),
    Answered(Option<String>),
}

impl<F: FnOnce() -> Option<String>> Asked<F> {
    fn matches(&mut self, patterns: &[String]) -> bool {
        if let Self::Not(_) = self
            && let Self::Not(ask) = std::mem::replace(self, Self::Answered(None))
        {
            *self = Self::Answered(ask());
        }
        let Self::Answered(Some(cgroup)) = self else {
            return false;
        };
        let mut ends: Vec<usize> = cgroup.match_indices('/').map(|(at, _)| at).collect();
        ends.push(cgroup.len());
        let within = |pattern: &String| {
            let pattern = pattern.trim_matches('/');
            ends.iter()
                .any(|end| glob::matches(pattern, &cgroup[..*end]))
        };
        patterns.iter().any(within)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use session_proto::wire::{Mode, Packing};

    const REDUNDANT: Service = Service {
        mode: Mode::Redundant,
        own_lane: false,
        packing: Packing::Unsaid,
    };
    const BONDED: Service = Service {
        mode: Mode::Bonded,
        own_lane: false,
        packing: Packing::Unsaid,
    };

    fn rule(
        to: &[&str],
        ports: &[RangeInclusive<u16>],
        cgroups: &[&str],
        s: Service,
    ) -> ServiceRule {
        ServiceRule {
            to: to.iter().map(|n| n.parse().unwrap()).collect(),
            ports: ports.to_vec(),
            cgroups: cgroups.iter().map(|c| (*c).to_owned()).collect(),
            service: s,
        }
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let rules = ServiceRules {
            rules: vec![
                rule(&["192.0.2.0/24"], &[5060..=5061], &[], REDUNDANT),
                rule(&[], &[], &["backup.slice"], BONDED),
                rule(&[], &[], &["/system.slice/*.service/"], REDUNDANT),
            ],
            default: Service::default(),
        };
        let choose = |to: &str, cgroup: Option<&str>| {
            rules.choose(&Target::Addr(to.parse().unwrap()), || {
                cgroup.map(str::to_owned)
            })
        };
        assert_eq!(choose("192.0.2.7:5060", None), REDUNDANT);
        assert_eq!(choose("192.0.2.7:80", None), Service::default());
        let inner = Some("backup.slice/job.scope");
        assert_eq!(choose("198.51.100.1:80", inner), BONDED);
        assert_eq!(choose("198.51.100.1:80", Some("backup.slice")), BONDED);
        let service = Some("system.slice/voice.service/inner");
        assert_eq!(choose("[2001:db8::1]:80", service), REDUNDANT);
        assert_eq!(
            choose("[2001:db8::1]:80", Some("user.slice")),
            Service::default()
        );
    }

    #[test]
    fn the_cgroup_is_not_looked_for_where_no_rule_asks() {
        let rules = ServiceRules {
            rules: vec![rule(&["192.0.2.0/24"], &[], &[], BONDED)],
            default: Service::default(),
        };
        let target = Target::Addr("192.0.2.1:80".parse().unwrap());
        assert_eq!(rules.choose(&target, || panic!("nobody asked")), BONDED);
    }

    #[test]
    fn a_name_is_in_no_network() {
        let rules = ServiceRules {
            rules: vec![
                rule(&["0.0.0.0/0", "::/0"], &[], &[], BONDED),
                rule(&[], &[22..=22], &[], REDUNDANT),
            ],
            default: Service::default(),
        };
        let choose = |port| rules.choose(&Target::Name("a.example".to_owned(), port), || None);
        assert_eq!(choose(22), REDUNDANT);
        assert_eq!(choose(80), Service::default());
    }
}
