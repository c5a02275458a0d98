//! The table, event by event, with a clock of its own.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::message::{AddressFacts, LinkFacts, News, RouteFacts};
use super::model::{LinkSnapshot, LinkState, Unusable};
use super::table::Table;

const DEBOUNCE: Duration = Duration::from_millis(100);
const UP: u32 = 1 | 1 << 16;
const PEER: &str = "203.0.113.1";

struct Bench {
    table: Table,
    now: Instant,
}

fn link(index: u32, flags: u32) -> News {
    News::Link(LinkFacts {
        index,
        name: Some(format!("wifi{index}")),
        hardware: 1,
        flags,
        operstate: Some(if flags & UP == UP { 6 } else { 2 }),
        mtu: Some(1500),
        kind: Some("veth".to_owned()),
    })
}

fn facts(index: u32, ip: &str, flags: u32) -> AddressFacts {
    AddressFacts {
        index,
        ip: ip.parse().unwrap(),
        prefix: 24,
        scope: 0,
        flags,
    }
}

fn default_route(index: u32, gateway: &str) -> RouteFacts {
    let gateway: IpAddr = gateway.parse().unwrap();
    let dst = if gateway.is_ipv4() {
        "0.0.0.0/0"
    } else {
        "::/0"
    };
    RouteFacts {
        index,
        dst: dst.parse().unwrap(),
        gateway: Some(gateway),
        metric: 100,
        source: None,
    }
}

fn route(index: u32, gateway: &str) -> News {
    News::Routes {
        hops: vec![default_route(index, gateway)],
        replace: false,
    }
}

impl Bench {
    /// A table that has read `news` as its first reading.
    fn started(news: Vec<News>) -> Bench {
        let mut bench = Bench {
            table: Table::new(DEBOUNCE),
            now: Instant::now(),
        };
        bench.table.want_reading(bench.now);
        bench.read(news);
        bench
    }

    /// Two links, both usable.
    fn usual() -> (Bench, LinkSnapshot) {
        let mut bench = Bench::started([one(1), one(2)].concat());
        let first = bench.snapshot().expect("the first snapshot");
        (bench, first)
    }

    fn tell(&mut self, news: News) {
        self.table.handle_news(news, self.now);
    }

    /// A whole reading, which must be due.
    fn read(&mut self, news: Vec<News>) {
        assert!(self.table.poll_reading(self.now), "no reading is wanted");
        for news in news {
            self.tell(news);
        }
        self.table.handle_read_end(true, self.now);
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.table.handle_timeout(self.now);
    }

    fn snapshot(&mut self) -> Option<LinkSnapshot> {
        self.table.poll_snapshot(self.now)
    }

    fn why_not(&mut self, name: &str) -> Unusable {
        let snapshot = self.snapshot().expect("something changed");
        let link = snapshot.link(name).expect("it is there");
        link.usable_for(PEER.parse().unwrap()).unwrap_err()
    }
}

fn one(index: u32) -> Vec<News> {
    vec![
        link(index, UP),
        News::Address(facts(index, &format!("10.0.{index}.2"), 0)),
        route(index, &format!("10.0.{index}.1")),
    ]
}

#[test]
fn what_was_there_at_the_start_is_usable_at_once() {
    let (mut bench, first) = Bench::usual();
    assert_eq!(first.version, 1);
    let link = first.link("wifi1").unwrap();
    assert_eq!(
        link.usable_for(PEER.parse().unwrap()),
        Ok("10.0.1.2".parse().unwrap())
    );
    assert!(bench.snapshot().is_none(), "nothing changed");
}

#[test]
fn a_lost_carrier_is_urgent_and_needs_no_reading() {
    let (mut bench, _) = Bench::usual();
    bench.tell(link(1, 1));
    assert!(bench.table.is_urgent());
    let snapshot = bench.snapshot().unwrap();
    assert_eq!(snapshot.lost().collect::<Vec<_>>(), ["wifi1"]);
    assert_eq!((snapshot.version, snapshot.changes[0].at), (2, bench.now));
    assert!(!bench.table.is_urgent());
    // And the rest of the truth follows: the kernel drops IPv4 routes without a word.
    bench.pass(Duration::from_millis(20));
    bench.read([vec![link(1, 1)], one(2)].concat());
    let snapshot = bench.snapshot().unwrap();
    assert!(snapshot.link("wifi1").unwrap().routes.is_empty());
    assert_eq!(snapshot.lost().count(), 0);
}

#[test]
fn coming_back_takes_the_debounce_time() {
    let (mut bench, _) = Bench::usual();
    bench.tell(link(1, 0));
    assert_eq!(bench.why_not("wifi1"), Unusable::Down("wifi1".to_owned()));
    bench.tell(link(1, UP));
    assert_eq!(
        bench.why_not("wifi1"),
        Unusable::Settling("wifi1".to_owned())
    );
    bench.pass(DEBOUNCE / 2);
    assert!(bench.snapshot().is_none());
    bench.pass(DEBOUNCE / 2);
    let snapshot = bench.snapshot().unwrap();
    assert_eq!(snapshot.gained().collect::<Vec<_>>(), ["wifi1"]);
    let kinds: Vec<_> = snapshot.changes_since(1).map(|c| c.kind).collect();
    assert_eq!(kinds, [super::ChangeKind::Lost, super::ChangeKind::Gained]);
}

#[test]
fn flapping_starts_the_debounce_anew() {
    let (mut bench, _) = Bench::usual();
    bench.tell(link(1, 0));
    for _ in 0..5 {
        bench.tell(link(1, UP));
        bench.pass(DEBOUNCE / 2);
        bench.tell(link(1, 0));
        bench.pass(DEBOUNCE / 2);
    }
    let snapshot = bench.snapshot().unwrap();
    assert_eq!(snapshot.gained().count(), 0);
    assert_eq!(
        snapshot.changes.len(),
        1,
        "one loss, however often it flaps"
    );
}

#[test]
fn an_operational_state_can_contradict_the_carrier() {
    let (mut bench, _) = Bench::usual();
    let News::Link(mut facts) = link(1, UP) else {
        unreachable!()
    };
    facts.operstate = Some(5);
    bench.tell(News::Link(facts));
    assert_eq!(
        bench.why_not("wifi1"),
        Unusable::NoCarrier("wifi1".to_owned())
    );
}

#[test]
fn an_address_that_goes_is_urgent() {
    let (mut bench, _) = Bench::usual();
    bench.tell(News::AddressGone(facts(1, "10.0.1.2", 0)));
    assert!(bench.table.is_urgent());
    let snapshot = bench.snapshot().unwrap();
    assert_eq!(snapshot.lost().collect::<Vec<_>>(), ["wifi1"]);
}

#[test]
fn a_tentative_address_is_none_yet_and_a_duplicate_never_is() {
    let only_v6 = |flags| {
        let mut address = facts(1, "2001:db8::2", flags);
        address.prefix = 64;
        vec![link(1, UP), News::Address(address), route(1, "fe80::1")]
    };
    let mut bench = Bench::started(only_v6(0x40));
    let to: IpAddr = "2001:db8:9::1".parse().unwrap();
    let usable = |snapshot: &LinkSnapshot| snapshot.link("wifi1").unwrap().usable_for(to);
    let tentative = Unusable::Tentative {
        link: "wifi1".to_owned(),
        ip: "2001:db8::2".parse().unwrap(),
    };
    assert_eq!(usable(&bench.snapshot().unwrap()), Err(tentative.clone()));
    bench.tell(News::Address(facts(1, "2001:db8::2", 0x40 | 0x08)));
    bench.snapshot();
    for news in only_v6(0) {
        bench.tell(news);
    }
    bench.pass(DEBOUNCE);
    let snapshot = bench.snapshot().unwrap();
    assert_eq!(usable(&snapshot), Ok("2001:db8::2".parse().unwrap()));
    for news in only_v6(0x08) {
        bench.tell(news);
    }
    let snapshot = bench.snapshot().unwrap();
    assert_eq!(usable(&snapshot), Err(tentative));
    assert_eq!(snapshot.lost().count(), 1);
}

#[test]
fn a_replaced_route_is_no_loss_and_a_removed_one_is() {
    let (mut bench, _) = Bench::usual();
    bench.pass(Duration::from_secs(1));
    bench.tell(News::RouteGone);
    bench.tell(route(1, "10.0.1.254"));
    let snapshot = bench.snapshot().unwrap();
    assert_eq!(snapshot.lost().count(), 0);
    assert!(
        !bench.table.poll_reading(bench.now),
        "a moment of quiet first"
    );
    bench.pass(Duration::from_millis(20));
    let new = vec![
        link(1, UP),
        News::Address(facts(1, "10.0.1.2", 0)),
        route(1, "10.0.1.254"),
    ];
    bench.read([new, one(2)].concat());
    let snapshot = bench.snapshot().unwrap();
    assert_eq!(snapshot.link("wifi1").unwrap().routes.len(), 1);
    assert_eq!(snapshot.lost().count(), 0);

    bench.pass(Duration::from_secs(1));
    bench.tell(News::RouteGone);
    bench.pass(Duration::from_millis(20));
    let without = vec![link(1, UP), News::Address(facts(1, "10.0.1.2", 0))];
    bench.read([without, one(2)].concat());
    let snapshot = bench.snapshot().unwrap();
    assert_eq!(snapshot.lost().collect::<Vec<_>>(), ["wifi1"]);
}

#[test]
fn a_reading_with_a_gap_is_repeated_and_removes_nothing() {
    let (mut bench, _) = Bench::usual();
    bench.pass(Duration::from_secs(1));
    bench.table.handle_gap(bench.now);
    assert!(bench.table.poll_reading(bench.now));
    bench.table.handle_gap(bench.now);
    bench.table.handle_read_end(true, bench.now);
    assert!(bench.snapshot().is_none(), "nothing is believed gone");
    bench.pass(Duration::from_secs(1));
    bench.read(one(2));
    let snapshot = bench.snapshot().unwrap();
    assert!(snapshot.link("wifi1").is_none());
    assert_eq!(snapshot.lost().collect::<Vec<_>>(), ["wifi1"]);
}

#[test]
fn a_storm_causes_few_readings() {
    let (mut bench, _) = Bench::usual();
    let mut readings = 0;
    for _ in 0..1000 {
        bench.pass(Duration::from_millis(1));
        bench.table.handle_gap(bench.now);
        if bench.table.poll_reading(bench.now) {
            readings += 1;
            bench.pass(Duration::from_millis(10));
            bench.table.handle_read_end(true, bench.now);
        }
    }
    // 10 ms of work each, a tenth of the time: at most one in 110 ms of about a second.
    assert!((5..=11).contains(&readings), "{readings}");
}

#[test]
fn changes_are_bounded() {
    let (mut bench, _) = Bench::usual();
    for _ in 0..LinkSnapshot::CHANGES_MAX {
        bench.tell(link(1, 0));
        bench.tell(link(1, UP));
        bench.pass(DEBOUNCE);
    }
    let snapshot = bench.snapshot().unwrap();
    assert_eq!(snapshot.changes.len(), LinkSnapshot::CHANGES_MAX);
}

#[test]
fn the_source_is_near_stable_and_not_deprecated() {
    for (addresses, expected) in [
        (vec![("10.9.9.9", 0), ("10.0.1.2", 0)], "10.0.1.2"),
        (vec![("10.0.1.3", 0x20), ("10.0.1.2", 0)], "10.0.1.2"),
        (vec![("10.0.1.3", 0x40), ("10.0.1.2", 0x80)], "10.0.1.2"),
        (vec![("10.0.1.3", 0x20)], "10.0.1.3"),
    ] {
        let mut news = vec![link(1, UP), route(1, "10.0.1.1")];
        for (ip, flags) in addresses {
            news.push(News::Address(facts(1, ip, flags)));
        }
        let snapshot = Bench::started(news).snapshot().unwrap();
        let link = snapshot.link("wifi1").unwrap();
        assert_eq!(link.state, LinkState::Usable);
        let source = link.usable_for(PEER.parse().unwrap());
        assert_eq!(source, Ok(expected.parse().unwrap()));
        // The same peer, written as a mapped address.
        let mapped = link.usable_for(format!("::ffff:{PEER}").parse().unwrap());
        assert_eq!(mapped, source);
    }
}
