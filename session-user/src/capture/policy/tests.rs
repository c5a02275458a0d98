use proptest::prelude::*;

use super::*;
use crate::capture::rule::{Protocol, Protocols, Question};

fn rule(to: &[&str], except: &[&str], ports: &[RangeInclusive<u16>], peer: u32) -> CaptureRule {
    let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    CaptureRule {
        to: nets(to),
        except: nets(except),
        ports: ports.to_vec(),
        ..CaptureRule::capture(peer)
    }
}

/// What the kernel does with the compiled tables.
fn decide(compiled: &Compiled, question: &Question) -> Option<PortRule> {
    let (addr, port) = (question.to.ip(), question.to.port());
    let policy = match addr {
        IpAddr::V4(addr) => {
            let holding = compiled.v4.iter().filter(|(net, _)| net.contains(&addr));
            holding
                .max_by_key(|(net, _)| net.prefix_len())
                .map(|(_, policy)| policy.as_ref())
        }
        IpAddr::V6(addr) => {
            let holding = compiled.v6.iter().filter(|(net, _)| net.contains(&addr));
            holding
                .max_by_key(|(net, _)| net.prefix_len())
                .map(|(_, policy)| policy.as_ref())
        }
    }?;
    policy.decide(port, question.uid, question.protocol.bit())
}

/// The peer that carries a TCP connection.
fn lookup(compiled: &Compiled, addr: IpAddr, port: u16) -> Option<u32> {
    let question = Question {
        to: (addr, port).into(),
        uid: 0,
        protocol: Protocol::Tcp,
    };
    let entry = decide(compiled, &question)?;
    (entry.action == action::CAPTURE).then_some(entry.peer)
}

/// What the rules say, read literally: position and action of the first that fits.
fn meaning(rules: &[CaptureRule], question: &Question) -> Option<(usize, Action)> {
    let (addr, port) = (question.to.ip(), question.to.port());
    let fits = |rule: &CaptureRule| {
        let protocol = match question.protocol {
            Protocol::Tcp => rule.protocols != Protocols::Udp,
            Protocol::Udp => rule.protocols != Protocols::Tcp,
        };
        protocol
            && rule.to.iter().any(|net| net.contains(&addr))
            && !rule.except.iter().any(|net| net.contains(&addr))
            && (rule.ports.is_empty() || rule.ports.iter().any(|r| r.contains(&port)))
            && (rule.uids.is_empty() || rule.uids.iter().any(|r| r.contains(&question.uid)))
    };
    let position = rules.iter().position(fits)?;
    Some((position, rules[position].action))
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
fn reserved_ranges_are_the_agents_alone() {
    let names = CaptureRule {
        names: vec!["*.corp.example".to_owned()],
        ..CaptureRule::capture(7)
    };
    let direct = CaptureRule {
        action: Action::Direct,
        ..rule(&["198.18.5.0/24"], &[], &[], 0)
    };
    let rules = [direct, names, rule(&["0.0.0.0/0", "::/0"], &[], &[], 1)];
    let nets = ["198.18.0.0/15", "fd00:1:2:3::/64"].map(|net| net.parse().unwrap());
    let reserved = reserve(&rules, &nets);
    let compiled = compile(&reserved).unwrap();
    let peer = |addr: &str| lookup(&compiled, addr.parse().unwrap(), 443);
    for stands_for_a_name in ["198.18.5.1", "198.19.255.255", "fd00:1:2:3::1"] {
        assert_eq!(peer(stands_for_a_name), Some(NAMED_PEER));
    }
    assert_eq!(
        (peer("198.20.0.1"), peer("fd00:1:2:4::1")),
        (Some(1), Some(1))
    );
    let question = Question {
        to: "198.18.5.1:443".parse().unwrap(),
        uid: 0,
        protocol: Protocol::Udp,
    };
    let entry = decide(&compiled, &question).unwrap();
    assert_eq!(
        (entry.flags, usize::from(entry.rule)),
        (RULE_FAIL_CLOSED, rules.len())
    );
}

#[test]
fn the_first_rule_wins_over_a_longer_prefix() {
    let direct = CaptureRule {
        action: Action::Direct,
        ..rule(&["192.0.2.0/24"], &[], &[22..=22], 0)
    };
    let rules = [
        direct,
        rule(&["0.0.0.0/0"], &[], &[], 1),
        rule(&["192.0.2.7/32"], &[], &[], 2),
    ];
    let compiled = compile(&rules).unwrap();
    let peer = |port| lookup(&compiled, "192.0.2.7".parse().unwrap(), port);
    assert_eq!((peer(22), peer(80)), (None, Some(1)));
    let narrow = &compiled.v4[&"192.0.2.7/32".parse().unwrap()];
    assert_eq!(narrow.count, 2, "what is never asked takes no room");
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
        Err(RuleError::Backward {
            rule: 1,
            what: "port",
            first: 9,
            last: 3
        })
    );
    let uids = CaptureRule {
        uids: vec![RangeInclusive::new(9, 3)],
        ..rule(&["::/0"], &[], &[], 0)
    };
    assert!(matches!(
        compile(&[uids]),
        Err(RuleError::Backward { what: "uid", .. })
    ));
    let empty = compile(&[rule(&["::/0"], &[], &[], 0), rule(&[], &[], &[], 0)]);
    assert_eq!(empty, Err(RuleError::NoDestination { rule: 2 }));
    let many: Vec<_> = (0..11).map(|port| port..=port).collect();
    let crowded = CaptureRule {
        uids: vec![1..=1, 3..=3, 5..=5],
        ..rule(&["::/0"], &[], &many, 0)
    };
    let crowded = compile(&[rule(&["::/1"], &[], &[1..=9], 0), crowded]);
    assert_eq!(
        crowded,
        Err(RuleError::TooManyEntries {
            rule: 2,
            prefix: "::/0".parse().unwrap(),
            count: 33
        })
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
    let varied: Vec<_> = (0..1100)
        .map(|peer| CaptureRule {
            to: vec![net(peer)],
            ..CaptureRule::capture(peer)
        })
        .collect();
    assert_eq!(
        compile(&varied),
        Err(RuleError::TooManyPolicies { count: 1100 })
    );
}

fn small_net() -> impl Strategy<Value = IpNet> {
    // Few addresses and short prefixes, so that rules overlap often.
    (0_u32..16, 0_u8..=4)
        .prop_map(|(bits, len)| IpNet::new(IpAddr::V4(Ipv4Addr::from(bits << 28)), len).unwrap())
}

fn small_rule() -> impl Strategy<Value = CaptureRule> {
    let nets = |least| prop::collection::vec(small_net(), least..4);
    let ports = prop::collection::vec(
        (0_u16..8, 0_u16..8).prop_map(|(a, b)| a.min(b)..=a.max(b)),
        0..3,
    );
    let uids = prop::collection::vec(
        (0_u32..4, 0_u32..4).prop_map(|(a, b)| a.min(b)..=a.max(b)),
        0..3,
    );
    let protocols = prop::sample::select(vec![Protocols::Both, Protocols::Tcp, Protocols::Udp]);
    let action = prop_oneof![
        Just(Action::Direct),
        Just(Action::Refuse),
        (0_u32..100, any::<bool>(), any::<bool>()).prop_map(|(peer, fail_closed, early)| {
            Action::Capture {
                peer,
                fail_closed,
                early,
            }
        }),
    ];
    (nets(1), nets(0), ports, uids, protocols, action).prop_map(
        |(to, except, ports, uids, protocols, action)| CaptureRule {
            to,
            names: Vec::new(),
            except,
            ports,
            protocols,
            uids,
            action,
        },
    )
}

/// Position and action of an entry.
fn told(entry: PortRule) -> (usize, Action) {
    let action = match entry.action {
        action::CAPTURE => Action::Capture {
            peer: entry.peer,
            fail_closed: entry.flags & RULE_FAIL_CLOSED != 0,
            early: entry.flags & RULE_EARLY != 0,
        },
        action::REFUSE => Action::Refuse,
        _ => Action::Direct,
    };
    (usize::from(entry.rule), action)
}

proptest! {
    #[test]
    fn compiled_tables_mean_what_the_rules_mean(rules in prop::collection::vec(small_rule(), 0..6)) {
        let compiled = compile(&rules).unwrap();
        for (addr, port) in (0_u32..16).flat_map(|addr| (0_u16..9).map(move |port| (addr, port))) {
            let addr = IpAddr::V4(Ipv4Addr::from(addr << 28 | 0x0123_4567));
            for (uid, protocol) in (0..5).flat_map(|uid| [(uid, Protocol::Tcp), (uid, Protocol::Udp)]) {
                let question = Question { to: (addr, port).into(), uid, protocol };
                prop_assert_eq!(
                    decide(&compiled, &question).map(told),
                    meaning(&rules, &question),
                    "{:?}", question
                );
                let first = rules.iter().position(|rule| rule.mismatch(&question).is_none());
                prop_assert_eq!(first, meaning(&rules, &question).map(|(position, _)| position));
            }
        }
    }
}
