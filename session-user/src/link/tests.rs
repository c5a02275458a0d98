//! The monitor against a real kernel, each test in a network namespace of its own.

use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};

use super::*;

/// Generous: the machine may be busy with something else.
const PATIENCE: Duration = Duration::from_secs(20);

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "ip {arguments}");
}

fn ip_batch(lines: &str) {
    let mut child = Command::new("ip")
        .args(["-force", "-batch", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(lines.as_bytes())
        .unwrap();
    assert!(child.wait().unwrap().success());
}

/// In a fresh namespace: `wifi0` and `lte0`, each a veth whose far end is here as well, with
/// addresses of both families and default routes.
fn lab(test: impl FnOnce() + Send + 'static) {
    let body = move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace takes root");
        ip("link set lo up");
        for (n, name) in [(1, "wifi0"), (2, "lte0")] {
            ip(&format!("link add {name} type veth peer name far{n}"));
            ip(&format!("link set far{n} up"));
            ip(&format!("link set {name} up"));
            add_addresses(n, name);
        }
        test();
    };
    std::thread::spawn(body).join().unwrap();
}

fn add_addresses(n: u32, name: &str) {
    ip(&format!("addr add 10.0.{n}.2/24 dev {name}"));
    ip(&format!("addr add 2001:db8:{n}::2/64 dev {name} nodad"));
    ip(&format!(
        "route add default via 10.0.{n}.1 dev {name} metric {n}00"
    ));
    ip(&format!(
        "-6 route add default via 2001:db8:{n}::1 dev {name} metric {n}00"
    ));
}

struct Watch {
    monitor: LinkMonitor,
    runtime: tokio::runtime::Runtime,
}

impl Watch {
    fn start(config: &MonitorConfig) -> Watch {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let monitor = LinkMonitor::start(config).unwrap();
        Watch { monitor, runtime }
    }

    /// Waits for a snapshot that fits.
    fn until(&mut self, what: &str, fits: impl Fn(&LinkSnapshot) -> bool) -> Arc<LinkSnapshot> {
        let monitor = &mut self.monitor;
        let wait = async {
            let mut snapshot = monitor.snapshot();
            while !fits(&snapshot) {
                snapshot = monitor.changed().await.unwrap();
            }
            snapshot
        };
        let found = self
            .runtime
            .block_on(async { tokio::time::timeout(PATIENCE, wait).await });
        found.unwrap_or_else(|_| panic!("{what} did not happen: {:#?}", self.monitor.snapshot()))
    }
}

fn v4() -> IpAddr {
    "203.0.113.1".parse().unwrap()
}

fn v6() -> IpAddr {
    "2001:db8:ff::1".parse().unwrap()
}

fn usable(snapshot: &LinkSnapshot, link: &str, to: IpAddr) -> Result<SourceAddress, Unusable> {
    snapshot.link(link).expect("the link").usable_for(to)
}

fn lost(snapshot: &LinkSnapshot, link: &str) -> bool {
    let mut changes = snapshot.changes.iter().rev();
    changes
        .find(|c| c.link == link)
        .is_some_and(|c| c.kind == ChangeKind::Lost)
}

#[test]
fn the_first_snapshot_is_whole() {
    lab(|| {
        let watch = Watch::start(&MonitorConfig::default());
        let snapshot = watch.monitor.snapshot();
        assert_eq!(snapshot.version, 1);
        assert_eq!(
            usable(&snapshot, "wifi0", v4()),
            Ok("10.0.1.2".parse().unwrap())
        );
        assert_eq!(
            usable(&snapshot, "lte0", v6()),
            Ok("2001:db8:2::2".parse().unwrap())
        );
        let link = snapshot.link("wifi0").unwrap();
        assert_eq!((link.kind, link.mtu), (LinkKind::Ethernet, 1500));
        assert_eq!(link.route_to(v4()).unwrap().metric, 100);
        let lo = snapshot.link("lo").unwrap();
        assert_eq!(lo.kind, LinkKind::Loopback);
        assert_eq!(
            lo.usable_for("127.0.0.1".parse().unwrap()),
            Ok("127.0.0.1".parse().unwrap())
        );
        assert!(lo.usable_for(v4()).is_err());
    });
}

#[test]
fn down_is_told_at_once_and_up_after_the_debounce() {
    lab(|| {
        let config = MonitorConfig {
            debounce: Duration::from_millis(300),
            ..MonitorConfig::default()
        };
        let mut watch = Watch::start(&config);
        ip("link set wifi0 down");
        let snapshot = watch.until("the loss", |s| lost(s, "wifi0"));
        let reason = usable(&snapshot, "wifi0", v4()).unwrap_err();
        assert_eq!(reason.to_string(), "wifi0 is down");
        assert!(usable(&snapshot, "lte0", v4()).is_ok());
        // The kernel says nothing of the routes that it dropped; the monitor finds out.
        watch.until("the end of the routes", |s| {
            s.link("wifi0").unwrap().routes.is_empty()
        });

        let began = Instant::now();
        ip("link set wifi0 up");
        ip("route add default via 10.0.1.1 dev wifi0 metric 100");
        let snapshot = watch.until("the return", |s| usable(s, "wifi0", v4()).is_ok());
        assert!(began.elapsed() >= config.debounce);
        assert!(!lost(&snapshot, "wifi0"));
    });
}

#[test]
fn the_far_end_going_down_is_a_lost_carrier() {
    lab(|| {
        let mut watch = Watch::start(&MonitorConfig::default());
        ip("link set far1 down");
        let snapshot = watch.until("the loss", |s| lost(s, "wifi0"));
        assert!(snapshot.link("wifi0").unwrap().admin_up);
        let reason = usable(&snapshot, "wifi0", v4()).unwrap_err();
        assert_eq!(reason.to_string(), "no carrier on wifi0");
        ip("link set far1 up");
        watch.until("the return", |s| usable(s, "wifi0", v4()).is_ok());
    });
}

#[test]
fn addresses_come_and_go() {
    lab(|| {
        let mut watch = Watch::start(&MonitorConfig::default());
        ip("addr del 10.0.1.2/24 dev wifi0");
        let snapshot = watch.until("its end", |s| {
            matches!(usable(s, "wifi0", v4()), Err(Unusable::NoAddress { .. }))
        });
        assert!(
            usable(&snapshot, "wifi0", v6()).is_ok(),
            "IPv6 is still there"
        );
        assert!(
            !snapshot
                .link("wifi0")
                .unwrap()
                .holds("10.0.1.2".parse().unwrap())
        );
        ip("addr add 10.0.1.9/24 dev wifi0");
        ip("route replace default via 10.0.1.1 dev wifi0 metric 100");
        watch.until("the new address", |s| {
            usable(s, "wifi0", v4()) == Ok("10.0.1.9".parse().unwrap())
        });
        ip("addr flush dev wifi0");
        watch.until("the loss", |s| lost(s, "wifi0"));
    });
}

#[test]
fn a_tentative_address_waits_for_duplicate_detection() {
    lab(|| {
        let mut watch = Watch::start(&MonitorConfig::default());
        ip("addr del 2001:db8:1::2/64 dev wifi0");
        ip("addr add 2001:db8:1::77/64 dev wifi0");
        let found: IpAddr = "2001:db8:1::77".parse().unwrap();
        let address = |s: &LinkSnapshot| {
            let link = s.link("wifi0").unwrap();
            link.addresses.iter().find(|a| a.ip == found).copied()
        };
        // Detection takes about a second, so the first sight of it is a tentative one.
        let snapshot = watch.until("the address", |s| address(s).is_some());
        assert!(address(&snapshot).unwrap().tentative);
        assert!(!snapshot.link("wifi0").unwrap().holds(found));
        let snapshot = watch.until("its detection", |s| {
            address(s).is_some_and(|a| !a.tentative)
        });
        assert!(snapshot.link("wifi0").unwrap().holds(found));
    });
}

#[test]
fn a_removed_route_is_found_out_and_a_replaced_one_is_no_loss() {
    lab(|| {
        let mut watch = Watch::start(&MonitorConfig::default());
        ip("route replace default via 10.0.1.254 dev wifi0 metric 100");
        let gateway: IpAddr = "10.0.1.254".parse().unwrap();
        let snapshot = watch.until("the new route alone", |s| {
            let routes = &s.link("wifi0").unwrap().routes;
            let mut defaults = routes.iter().filter(|r| r.dst.to_string() == "0.0.0.0/0");
            defaults.next().is_some_and(|r| r.gateway == Some(gateway)) && defaults.next().is_none()
        });
        assert!(snapshot.changes.is_empty());
        ip("route del default dev wifi0");
        let snapshot = watch.until("the end of the route", |s| {
            usable(s, "wifi0", v4()).is_err()
        });
        let reason = usable(&snapshot, "wifi0", v4()).unwrap_err();
        assert_eq!(reason.to_string(), "no route to 203.0.113.1 over wifi0");
        assert!(usable(&snapshot, "wifi0", "10.0.1.55".parse().unwrap()).is_ok());
    });
}

#[test]
fn links_are_deleted_made_and_renamed() {
    lab(|| {
        let mut watch = Watch::start(&MonitorConfig::default());
        ip("link del wifi0");
        let snapshot = watch.until("its end", |s| s.link("wifi0").is_none());
        assert!(lost(&snapshot, "wifi0"));
        ip("link add new0 type veth peer name far1");
        ip("link set new0 name wifi0");
        ip("link set far1 up");
        ip("link set wifi0 up");
        add_addresses(1, "wifi0");
        let snapshot = watch.until("the new one", |s| {
            s.link("wifi0")
                .is_some_and(|link| link.usable_for(v4()).is_ok())
        });
        assert!(snapshot.link("new0").is_none());
    });
}

#[test]
fn an_overrun_ends_with_the_truth() {
    lab(|| {
        let config = MonitorConfig {
            // The kernel's minimum: a few notifications fill it.
            receive_buffer_bytes: 2304,
            ..MonitorConfig::default()
        };
        let mut watch = Watch::start(&config);
        let mut lines = String::new();
        for round in 0..4 {
            for n in 0..250 {
                lines += &format!("addr add 10.77.{round}.{n}/32 dev lte0\n");
            }
            for n in (0..250).filter(|n| n % 50 != round) {
                lines += &format!("addr del 10.77.{round}.{n}/32 dev lte0\n");
            }
        }
        lines += "link set wifi0 down\n";
        ip_batch(&lines);
        let kept = |s: &LinkSnapshot| {
            let addresses = &s.link("lte0").unwrap().addresses;
            let flood = addresses
                .iter()
                .filter(|a| a.ip.to_string().starts_with("10.77."));
            flood
                .map(|a| a.ip.to_string())
                .collect::<std::collections::BTreeSet<_>>()
        };
        let expected: std::collections::BTreeSet<_> = (0..4)
            .flat_map(|round| (0..5).map(move |n| format!("10.77.{round}.{}", 50 * n + round)))
            .collect();
        let snapshot = watch.until("the truth", |s| kept(s) == expected && lost(s, "wifi0"));
        assert!(usable(&snapshot, "lte0", v4()).is_ok());
        assert!(
            watch.monitor.overruns() > 0,
            "the flood was too small to prove anything"
        );
    });
}

#[test]
fn a_refresh_changes_nothing_where_nothing_changed() {
    lab(|| {
        let mut watch = Watch::start(&MonitorConfig::default());
        watch.monitor.refresh();
        ip("link set wifi0 mtu 1400");
        let snapshot = watch.until("the MTU", |s| s.link("wifi0").unwrap().mtu == 1400);
        assert!(snapshot.changes.is_empty());
    });
}

#[test]
fn the_thread_ends_with_its_owner() {
    lab(|| {
        let monitor = LinkMonitor::start(&MonitorConfig::default()).unwrap();
        let mut reader = monitor.subscribe();
        drop(monitor);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let end = async { tokio::time::timeout(PATIENCE, reader.changed()).await };
        let end = runtime.unwrap().block_on(end);
        assert!(end.expect("the thread goes on").is_err());
    });
}

/// From before the `ip` command to the message, and from there to a reader that was waiting.
/// Printed; judged only generously, because the machine may be busy.
#[test]
fn how_long_a_loss_takes() {
    lab(|| {
        let mut watch = Watch::start(&MonitorConfig::default());
        let (mut told, mut own) = (Vec::new(), Vec::new());
        for _ in 0..10 {
            let reader = loss_reader(watch.monitor.subscribe());
            let began = Instant::now();
            ip("link set wifi0 down");
            let (at, seen) = reader.join().unwrap();
            told.push(at - began);
            own.push(seen - at);
            ip("link set wifi0 up");
            ip("route add default via 10.0.1.1 dev wifi0 metric 100");
            watch.until("the return", |s| usable(s, "wifi0", v4()).is_ok());
        }
        told.sort();
        own.sort();
        println!(
            "`ip link set down` to message read: p50 {:?}, max {:?}",
            told[5], told[9]
        );
        println!(
            "message read to reader awake: p50 {:?}, max {:?}",
            own[5], own[9]
        );
        assert!(own[5] < Duration::from_secs(1));
    });
}

/// Waits, in a thread of its own, for the next loss; returns when its message was read and when
/// this reader knew.
fn loss_reader(
    mut reader: tokio::sync::watch::Receiver<Arc<LinkSnapshot>>,
) -> std::thread::JoinHandle<(Instant, Instant)> {
    let version = reader.borrow_and_update().version;
    let lost = move |s: &Arc<LinkSnapshot>| {
        let mut changes = s.changes_since(version);
        changes.find(|c| c.kind == ChangeKind::Lost).map(|c| c.at)
    };
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let snapshot = reader.wait_for(|s| lost(s).is_some()).await.unwrap();
            (lost(&snapshot).unwrap(), Instant::now())
        })
    })
}
