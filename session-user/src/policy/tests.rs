use super::*;
use crate::link::{Address, LinkState, Route, Scope};
use proptest::prelude::*;
use std::time::Duration;

const V4: &str = "192.0.2.1:7843";
const V6: &str = "[2001:db8::1]:7843";

/// A usable link with an IPv4 and an IPv6 address and both default routes.
fn link(index: u32, name: &str, metric: u32) -> Link {
    let address = |ip: &str, prefix| Address {
        ip: ip.parse().unwrap(),
        prefix,
        scope: Scope::Global,
        tentative: false,
        deprecated: false,
        temporary: false,
    };
    let route = |dst: &str| Route {
        dst: dst.parse().unwrap(),
        gateway: None,
        metric,
        source: None,
    };
    Link {
        index,
        name: name.to_owned(),
        kind: LinkKind::Ethernet,
        admin_up: true,
        carrier: true,
        addresses: vec![
            address(&format!("10.0.{index}.2"), 24),
            address(&format!("2001:db8:{index}::2"), 64),
        ],
        routes: vec![route("0.0.0.0/0"), route("::/0")],
        mtu: 1500,
        state: LinkState::Usable,
        since: Instant::now(),
    }
}

fn snapshot(links: Vec<Link>) -> LinkSnapshot {
    LinkSnapshot {
        version: 1,
        links,
        read_at: Instant::now(),
        changes: Vec::new(),
    }
}

fn config(prefer: &[&str]) -> PolicyConfig {
    PolicyConfig {
        prefer: prefer.iter().map(|p| (*p).to_owned()).collect(),
        ..PolicyConfig::default()
    }
}

fn on(link: &Link) -> Path {
    Path {
        link: link.name.clone(),
        source: link.addresses[0].ip,
        remote: V4.parse().unwrap(),
    }
}

fn ask(links: &[Link], config: &PolicyConfig, current: Option<&Path>) -> Decision {
    let history = PathHistory::default();
    let remotes = [V4.parse().unwrap()];
    let snapshot = snapshot(links.to_vec());
    choose(
        &snapshot,
        config,
        current,
        &remotes,
        &history,
        Instant::now(),
    )
}

/// `stay`, `hold`, `hard:LINK` or `return:LINK`.
fn action(decision: &Decision) -> String {
    match &decision.action {
        Action::Stay => "stay".to_owned(),
        Action::Hold => "hold".to_owned(),
        Action::HardHandover { to } => format!("hard:{}", to.link),
        Action::Return { to } => format!("return:{}", to.link),
    }
}

fn order(decision: &Decision) -> Vec<&str> {
    let links = decision.ordered.iter().map(|c| c.path.link.as_str());
    links.collect()
}

/// One case: what happens to `wifi0` and `lte0`, which link is in use, what is done.
#[test]
fn actions() {
    type Change = fn(&mut Vec<Link>, &mut PolicyConfig);
    let cases: &[(&str, Change, Option<&str>, &str)] = &[
        ("first path", |_, _| {}, None, "hard:wifi0"),
        ("nothing there", |l, _| l.clear(), None, "hold"),
        ("preferred in use", |_, _| {}, Some("wifi0"), "stay"),
        ("preferred is back", |_, _| {}, Some("lte0"), "return:wifi0"),
        (
            "set down",
            |l, _| l[0].admin_up = false,
            Some("wifi0"),
            "hard:lte0",
        ),
        (
            "no carrier",
            |l, _| l[0].carrier = false,
            Some("wifi0"),
            "hard:lte0",
        ),
        (
            "deleted",
            |l, _| drop(l.remove(0)),
            Some("wifi0"),
            "hard:lte0",
        ),
        (
            "no route",
            |l, _| l[0].routes.clear(),
            Some("wifi0"),
            "hard:lte0",
        ),
        (
            "the other is lost",
            |l, _| l[1].carrier = false,
            Some("wifi0"),
            "stay",
        ),
        (
            "both lost",
            |l, _| l.iter_mut().for_each(|l| l.carrier = false),
            Some("wifi0"),
            "hold",
        ),
        (
            "settling is not yet back",
            |l, _| l[0].state = LinkState::Settling { until: l[0].since },
            Some("lte0"),
            "stay",
        ),
        (
            "settling does not end a path in use",
            |l, _| l[1].state = LinkState::Settling { until: l[1].since },
            Some("lte0"),
            "return:wifi0",
        ),
        (
            "settling alone in use",
            |l, _| {
                l.remove(1);
                l[0].state = LinkState::Settling { until: l[0].since };
            },
            Some("wifi0"),
            "stay",
        ),
        (
            "address renumbered",
            |l, _| l[0].addresses[0].ip = "10.0.1.77".parse().unwrap(),
            Some("wifi0"),
            "hard:wifi0",
        ),
        (
            "address is a duplicate",
            |l, _| l[0].addresses[0].tentative = true,
            Some("wifi0"),
            "hard:lte0",
        ),
        (
            "unlisted are equals",
            |l, c| {
                c.prefer.clear();
                l[1].routes[0].metric = 9000;
            },
            Some("lte0"),
            "stay",
        ),
        (
            "one pattern is one preference",
            |_, c| c.prefer = vec!["*0".to_owned()],
            Some("lte0"),
            "stay",
        ),
        (
            "chosen by hand",
            |_, c| c.manual = Some("lte0".to_owned()),
            Some("wifi0"),
            "return:lte0",
        ),
        (
            "chosen by hand and in use",
            |_, c| c.manual = Some("lte0".to_owned()),
            Some("lte0"),
            "stay",
        ),
        (
            "chosen by hand but lost",
            |l, c| {
                c.manual = Some("lte0".to_owned());
                l[1].carrier = false;
            },
            Some("lte0"),
            "hard:wifi0",
        ),
        (
            "excluded while in use",
            |_, c| c.exclude = vec!["wifi*".to_owned()],
            Some("wifi0"),
            "return:lte0",
        ),
        (
            "excluded beats preferred",
            |_, c| c.exclude = vec!["wifi0".to_owned()],
            None,
            "hard:lte0",
        ),
        (
            "all excluded",
            |_, c| c.exclude = vec!["*".to_owned()],
            Some("wifi0"),
            "hold",
        ),
        (
            "loopback is not meant",
            |l, _| l.iter_mut().for_each(|l| l.kind = LinkKind::Loopback),
            None,
            "hold",
        ),
    ];
    for (what, change, current, expected) in cases {
        let before = [link(1, "wifi0", 100), link(2, "lte0", 200)];
        let current = current.map(|name| on(before.iter().find(|l| l.name == name).unwrap()));
        let (mut links, mut config) = (before.to_vec(), config(&["wifi0", "lte0"]));
        change(&mut links, &mut config);
        let decision = ask(&links, &config, current.as_ref());
        assert_eq!(action(&decision), *expected, "{what}: {}", decision.reason);
        assert!(!decision.reason.is_empty(), "{what}");
    }
}

#[test]
fn listed_first_then_by_metric_then_by_name() {
    let links = [
        link(1, "zeta", 50),
        link(2, "beta", 100),
        link(3, "alpha", 100),
        link(4, "wlan1", 900),
        link(5, "eth0", 800),
    ];
    let decision = ask(&links, &config(&["wlan*", "eth0"]), None);
    assert_eq!(order(&decision), ["wlan1", "eth0", "zeta", "alpha", "beta"]);
}

#[test]
fn both_families_in_configured_order_then_the_next_link() {
    let links = [link(1, "wifi0", 1), link(2, "lte0", 2)];
    let remotes = [V6.parse().unwrap(), V4.parse().unwrap()];
    let history = PathHistory::default();
    let snapshot = snapshot(links.to_vec());
    let now = Instant::now();
    let decision = choose(
        &snapshot,
        &config(&["wifi0"]),
        None,
        &remotes,
        &history,
        now,
    );
    let paths: Vec<_> = (decision.ordered.iter())
        .map(|c| (c.path.link.as_str(), c.path.source.to_string()))
        .collect();
    let expected = [
        ("wifi0", "2001:db8:1::2"),
        ("wifi0", "10.0.1.2"),
        ("lte0", "2001:db8:2::2"),
        ("lte0", "10.0.2.2"),
    ];
    assert_eq!(paths, expected.map(|(link, ip)| (link, ip.to_owned())));
}

#[test]
fn a_link_out_of_the_question_says_why() {
    let mut links = [
        link(1, "a", 1),
        link(2, "b", 1),
        link(3, "c", 1),
        link(4, "d", 1),
    ];
    links[0].carrier = false;
    links[1].routes.clear();
    links[2].addresses.clear();
    let mut config = config(&[]);
    config.exclude = vec!["d".to_owned()];
    let decision = ask(&links, &config, None);
    let expected = [
        ("a", "no carrier on a"),
        ("b", "no route to 192.0.2.1 over b"),
        ("c", "no IPv4 address on c"),
        ("d", "excluded by the configuration"),
    ];
    let expected = expected.map(|(link, why)| (link.to_owned(), why.to_owned()));
    assert_eq!(decision.rejected, expected);
}

#[test]
fn failing_paths_come_last_until_their_backoff_ends() {
    let links = [link(1, "wifi0", 1), link(2, "lte0", 2)];
    let (config, snapshot) = (config(&["wifi0"]), snapshot(links.to_vec()));
    let remotes: [SocketAddr; 1] = [V4.parse().unwrap()];
    let start = Instant::now();
    let mut history = PathHistory::default();
    let first = |history: &PathHistory, now| {
        let decision = choose(&snapshot, &config, None, &remotes, history, now);
        decision.ordered[0].path.link.clone()
    };
    history.record_failure("wifi0", remotes[0], start);
    assert_eq!(first(&history, start), "wifi0", "one failure is tolerated");
    history.record_failure("wifi0", remotes[0], start);
    assert_eq!(first(&history, start), "lte0");
    assert_eq!(
        history.next_end(start),
        Some(start + PathHistory::BACKOFF_FIRST)
    );
    assert_eq!(first(&history, start + PathHistory::BACKOFF_FIRST), "wifi0");
    history.record_failure("wifi0", remotes[0], start);
    assert_eq!(
        first(&history, start + PathHistory::BACKOFF_FIRST),
        "lte0",
        "doubled"
    );
    for _ in 0..100 {
        history.record_failure("wifi0", remotes[0], start);
    }
    assert_eq!(
        history.next_end(start),
        Some(start + PathHistory::BACKOFF_MAX)
    );
    // No return to a link whose dials fail, but no flight from one that carries traffic either.
    let ask = |current: &Link| {
        let current = on(current);
        action(&choose(
            &snapshot,
            &config,
            Some(&current),
            &remotes,
            &history,
            start,
        ))
    };
    assert_eq!(ask(&links[1]), "stay");
    assert_eq!(ask(&links[0]), "stay");
    history.record_success("wifi0", remotes[0]);
    assert_eq!(first(&history, start), "wifi0");
}

#[test]
fn a_failing_address_gives_way_to_another_over_the_same_link() {
    let snapshot = snapshot(vec![link(1, "wifi0", 1), link(2, "lte0", 2)]);
    let remotes: [SocketAddr; 2] = [V4.parse().unwrap(), V6.parse().unwrap()];
    let now = Instant::now();
    let mut history = PathHistory::default();
    history.record_failure("wifi0", remotes[0], now);
    history.record_failure("wifi0", remotes[0], now);
    let decision = choose(
        &snapshot,
        &config(&["wifi0"]),
        None,
        &remotes,
        &history,
        now,
    );
    let first = &decision.ordered[0].path;
    assert_eq!((first.link.as_str(), first.remote), ("wifi0", remotes[1]));
    assert_eq!(decision.ordered.last().unwrap().path.remote, remotes[0]);
}

#[test]
fn a_path_that_loses_large_packets_comes_after_those_that_do_not() {
    let links = [link(1, "wifi0", 100), link(2, "lte0", 200)];
    let remotes = [V4.parse().unwrap()];
    let mut config = config(&["wifi0", "lte0"]);
    let now = Instant::now();
    let mut history = PathHistory::default();
    history.record_swallowed("wifi0", remotes[0], 1500, now);
    let ask = |links: &[Link], config: &PolicyConfig, current: &Link| {
        let snapshot = snapshot(links.to_vec());
        let current = on(current);
        choose(&snapshot, config, Some(&current), &remotes, &history, now)
    };
    let left = ask(&links, &config, &links[0]);
    assert_eq!(action(&left), "return:lte0");
    assert_eq!(order(&left), ["lte0", "wifi0"]);
    // It works, though: a standby is kept on it.
    assert!(!left.ordered[1].demoted);
    assert!(left.ordered[1].reason.contains("large packets"));
    assert_eq!(action(&ask(&links, &config, &links[1])), "stay");
    assert_eq!(action(&ask(&links[..1], &config, &links[0])), "stay");
    config.manual = Some("wifi0".to_owned());
    assert_eq!(action(&ask(&links, &config, &links[1])), "return:wifi0");
}

#[test]
fn the_history_is_bounded() {
    let now = Instant::now();
    let mut history = PathHistory::default();
    for port in 1..=2 * PathHistory::PATHS_MAX as u16 {
        let remote = SocketAddr::from(([192, 0, 2, 1], port));
        history.record_failure("a", remote, now + Duration::from_millis(port.into()));
        history.record_failure("a", remote, now + Duration::from_millis(port.into()));
    }
    assert_eq!(history.len(), PathHistory::PATHS_MAX);
    let oldest = SocketAddr::from(([192, 0, 2, 1], 1));
    assert_eq!(history.demoted_until("a", oldest, now), None);
}

fn any_link(index: u32) -> impl Strategy<Value = Link> {
    let flags = proptest::array::uniform6(proptest::bool::weighted(0.8));
    let name = prop_oneof![Just("wlan"), Just("eth"), Just("lte")];
    (flags, name, 0_u32..4).prop_map(move |(on, name, metric)| {
        let mut link = link(index, &format!("{name}{index}"), metric);
        link.admin_up = on[0];
        link.carrier = on[1];
        link.addresses[0].tentative = !on[2];
        if !on[3] {
            link.routes.remove(0);
        }
        if !on[4] {
            link.state = LinkState::Unusable;
        }
        if !on[5] {
            link.kind = LinkKind::Loopback;
        }
        link
    })
}

fn any_links() -> impl Strategy<Value = Vec<Link>> {
    (any_link(1), any_link(2), any_link(3), 0_usize..4).prop_map(|(a, b, c, count)| {
        let mut links = vec![a, b, c];
        links.truncate(count);
        links
    })
}

proptest! {
    #[test]
    fn only_usable_links_and_always_the_same(
        links in any_links(),
        manual in proptest::option::of(prop_oneof![Just("wlan1"), Just("eth2")]),
        exclude in proptest::option::of(prop_oneof![Just("lte*"), Just("*3")]),
        failing in proptest::collection::vec((1_u32..4, 0_usize..2), 0..6),
        current in proptest::option::of(0_usize..3),
    ) {
        let now = Instant::now();
        let mut config = config(&["wlan*", "eth*"]);
        config.manual = manual.map(str::to_owned);
        config.exclude = exclude.map(str::to_owned).into_iter().collect();
        let remotes: [SocketAddr; 2] = [V4.parse().unwrap(), V6.parse().unwrap()];
        let mut history = PathHistory::default();
        for (index, remote) in failing {
            if let Some(link) = links.iter().find(|l| l.index == index) {
                history.record_failure(&link.name, remotes[remote], now);
            }
        }
        let current = current.and_then(|i| links.get(i)).map(on);
        let snapshot = snapshot(links);
        let ask = |current: Option<&Path>| choose(&snapshot, &config, current, &remotes, &history, now);
        let decision = ask(current.as_ref());
        prop_assert_eq!(&decision, &ask(current.as_ref()), "deterministic");
        for choice in &decision.ordered {
            let link = snapshot.link(&choice.path.link).unwrap();
            prop_assert_eq!(link.usable_for(choice.path.remote.ip()), Ok(choice.path.source));
            prop_assert!(forbid(link, &config).is_none());
        }
        let listed = |name: &str| decision.ordered.iter().any(|c| c.path.link == name);
        for link in &snapshot.links {
            let refused = decision.rejected.iter().any(|(name, _)| *name == link.name);
            prop_assert!(refused != listed(&link.name), "either listed or refused");
        }
        // Having followed the advice, there is nothing more to do.
        if let Action::HardHandover { to } | Action::Return { to } = &decision.action {
            prop_assert_eq!(to, &decision.ordered[0].path);
            prop_assert_eq!(ask(Some(to)).action, Action::Stay);
        }
    }
}
