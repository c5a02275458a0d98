//! Which rule decides about a name, and about a connection to it.
//!
//! A name is decided about twice. When it is asked for, nobody knows the port yet: the first rule whose pattern matches
//! says whether the name is captured. When somebody connects, the port and the protocol are known: the first of the
//! rules that capture the name and hold for both says through which peer. Once a name is captured nothing goes to it
//! directly, for its address stands for nothing outside of this host.

use crate::capture::{Action, CaptureRule, Protocol};
use crate::glob;

/// What becomes of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It is answered with reserved addresses, because of the rule at this position.
    Capture(usize),
    /// It is said not to exist, because of the rule at this position.
    Refuse(usize),
    /// Its question goes on: because of the rule at this position, or because none matches.
    Direct(Option<usize>),
}

/// How a connection to a captured name goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// Position of the rule.
    pub rule: usize,
    /// Index of the peer.
    pub peer: u32,
    /// Whether it succeeds before the target has answered.
    pub early: bool,
}

/// The rules for names, in their order.
#[derive(Clone, Debug, Default)]
pub struct NameRules {
    /// With their positions among all rules.
    rules: Vec<(usize, CaptureRule)>,
}

impl NameRules {
    /// Those of all capture rules that are for names.
    pub fn new(rules: &[CaptureRule]) -> Self {
        let for_names = rules
            .iter()
            .enumerate()
            .filter(|(_, r)| !r.names.is_empty());
        Self {
            rules: for_names.map(|(at, rule)| (at, rule.clone())).collect(),
        }
    }

    /// Whether any name can be captured.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// What becomes of `name`, which is in lower case and without the dot at its end.
    pub fn decide(&self, name: &str) -> Decision {
        match self.matching(name).next() {
            None => Decision::Direct(None),
            Some((at, rule)) => match rule.action {
                Action::Capture { .. } => Decision::Capture(at),
                Action::Refuse => Decision::Refuse(at),
                Action::Direct => Decision::Direct(Some(at)),
            },
        }
    }

    /// How a connection to `name` goes; `None` if no rule takes it, so that it is refused.
    pub fn way(&self, name: &str, port: u16, protocol: Protocol) -> Option<Way> {
        for (rule, matching) in self.matching(name) {
            let Action::Capture { peer, early, .. } = matching.action else {
                return None;
            };
            if matching.holds(port, protocol) {
                return Some(Way { rule, peer, early });
            }
        }
        None
    }

    /// The rules before `end` (a position), or all, and why each does not decide about a connection to `name`.
    pub fn passed(
        &self,
        name: &str,
        port: u16,
        protocol: Protocol,
        end: Option<usize>,
    ) -> Vec<(usize, String)> {
        let before = self
            .rules
            .iter()
            .filter(|(at, _)| end.is_none_or(|end| *at < end));
        let why = |rule: &CaptureRule| {
            if !is_of(rule, name) {
                return format!("{name} is not among {}", rule.names.join(", "));
            }
            match rule.action {
                Action::Capture { .. } => format!("it is not for port {port} of {protocol}"),
                _ => "it came behind the rule that captures the name".to_owned(),
            }
        };
        before.map(|(at, rule)| (*at, why(rule))).collect()
    }

    fn matching<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (usize, &'a CaptureRule)> {
        let matching = self.rules.iter().filter(move |(_, rule)| is_of(rule, name));
        matching.map(|(at, rule)| (*at, rule))
    }
}

fn is_of(rule: &CaptureRule, name: &str) -> bool {
    rule.names
        .iter()
        .any(|pattern| glob::matches(pattern, name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::Protocols;

    fn rule(names: &[&str], action: Action) -> CaptureRule {
        CaptureRule {
            names: names.iter().map(|n| (*n).to_owned()).collect(),
            action,
            ..CaptureRule::capture(0)
        }
    }

    fn capture(peer: u32) -> Action {
        Action::Capture {
            peer,
            fail_closed: true,
            early: false,
        }
    }

    fn rules() -> NameRules {
        let ssh = CaptureRule {
            ports: vec![22..=22],
            protocols: Protocols::Tcp,
            ..rule(&["*.corp.example"], capture(1))
        };
        let network = CaptureRule {
            to: vec!["10.0.0.0/8".parse().unwrap()],
            ..CaptureRule::capture(9)
        };
        NameRules::new(&[
            rule(&["www.corp.example"], Action::Direct),
            network,
            rule(&["ads.*"], Action::Refuse),
            ssh,
            rule(&["*.corp.example", "corp.example"], capture(2)),
        ])
    }

    #[test]
    fn the_first_rule_that_matches_a_name_decides() {
        let rules = rules();
        for (name, expected) in [
            ("www.corp.example", Decision::Direct(Some(0))),
            ("ads.corp.example", Decision::Refuse(2)),
            ("db.corp.example", Decision::Capture(3)),
            ("a.b.corp.example", Decision::Capture(3)),
            ("corp.example", Decision::Capture(4)),
            ("xcorp.example", Decision::Direct(None)),
            ("", Decision::Direct(None)),
        ] {
            assert_eq!(rules.decide(name), expected, "{name}");
        }
    }

    #[test]
    fn the_first_rule_that_holds_for_the_port_says_where_it_goes() {
        let rules = rules();
        let peer = |name: &str, port, protocol| rules.way(name, port, protocol).map(|w| w.peer);
        assert_eq!(peer("db.corp.example", 22, Protocol::Tcp), Some(1));
        assert_eq!(peer("db.corp.example", 22, Protocol::Udp), Some(2));
        assert_eq!(peer("db.corp.example", 443, Protocol::Tcp), Some(2));
        assert_eq!(peer("www.corp.example", 443, Protocol::Tcp), None);
        assert_eq!(peer("other.example", 443, Protocol::Tcp), None);
        let passed = rules.passed("db.corp.example", 443, Protocol::Tcp, Some(4));
        let why: Vec<&str> = passed.iter().map(|(_, why)| why.as_str()).collect();
        assert_eq!(
            why,
            [
                "db.corp.example is not among www.corp.example",
                "db.corp.example is not among ads.*",
                "it is not for port 443 of tcp",
            ]
        );
    }
}
