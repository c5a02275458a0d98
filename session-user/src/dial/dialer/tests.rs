use super::*;
use crate::dial::AllowRule;
use nix::sched::{CloneFlags, unshare};
use std::future::Future;
use std::process::Command;
use std::time::Instant as StdInstant;

const LONG: Duration = Duration::from_secs(20);

fn allow(to: &[&str]) -> AllowList {
    AllowList::parse(&[AllowRule {
        peer: "client".to_owned(),
        to: to.iter().map(|t| (*t).to_owned()).collect(),
    }])
    .unwrap()
}

/// Runs in a network namespace of its own, with loopback up.
fn isolated<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let body = move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace takes root");
        ip("link set lo up");
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(test());
    };
    std::thread::spawn(body).join().unwrap();
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "ip {arguments}");
}

fn caller() -> Caller {
    Caller {
        name: "client".to_owned(),
        id: "spiffe://test.example/client".to_owned(),
        seen_as: SeenAs::default(),
    }
}

/// No address is this host's, beside loopback.
fn nobody(_: IpAddr) -> bool {
    false
}

fn target(addr: &str) -> Target {
    Target::Addr(addr.parse().unwrap())
}

async fn fails(target: &Target, rules: &[&str], timeout: Duration) -> DialError {
    dial_target(&caller(), nobody, target, &allow(rules), timeout)
        .await
        .expect_err("the dial should fail")
}

#[test]
fn connects_by_address_and_sets_the_socket_up() {
    isolated(|| async {
        for bind in ["127.0.0.1:0", "[::1]:0"] {
            let listener = std::net::TcpListener::bind(bind).unwrap();
            let addr = listener.local_addr().unwrap();
            let rules = ["127.0.0.0/8:*", "[::1]:*"];
            let stream =
                dial_target(&caller(), nobody, &Target::Addr(addr), &allow(&rules), LONG).await;
            let stream = stream.unwrap();
            assert_eq!(stream.peer_addr().unwrap(), addr);
            let (sent, _) = listener.accept().unwrap();
            assert!(sent.peer_addr().unwrap().ip().is_loopback());
            let socket = stream.tcp().unwrap();
            assert!(socket.tcp_nodelay().unwrap());
            assert_eq!(socket.linger().unwrap(), Some(Duration::ZERO));
        }
    });
}

#[test]
fn a_dropped_stream_is_a_reset_for_the_target() {
    isolated(|| async {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let target = Target::Addr(listener.local_addr().unwrap());
        let stream =
            dial_target(&caller(), nobody, &target, &allow(&["127.0.0.0/8:*"]), LONG).await;
        let (mut seen, _) = listener.accept().unwrap();
        drop(stream.unwrap());
        let error = io::Read::read(&mut seen, &mut [0; 1]).expect_err("a clean end");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    });
}

#[test]
fn a_mapped_address_is_dialled_as_ipv4() {
    isolated(|| async {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let target = target(&format!("[::ffff:127.0.0.1]:{port}"));
        let stream = dial_target(&caller(), nobody, &target, &allow(&["127.0.0.1:*"]), LONG).await;
        assert!(stream.unwrap().peer_addr().unwrap().is_ipv4());
    });
}

#[test]
fn refused() {
    isolated(|| async {
        let error = fails(&target("127.0.0.1:9"), &["127.0.0.1:9"], LONG).await;
        assert_eq!(error.errno(), libc::ECONNREFUSED, "{error}");
        let text = error.to_string();
        assert!(text.starts_with("cannot connect to 127.0.0.1:9"), "{text}");
    });
}

#[test]
fn no_route_is_network_unreachable() {
    isolated(|| async {
        let error = fails(&target("192.0.2.1:80"), &["0.0.0.0/0:*"], LONG).await;
        assert_eq!(error.errno(), libc::ENETUNREACH, "{error}");
    });
}

#[test]
fn an_unreachable_route_is_host_unreachable() {
    isolated(|| async {
        ip("route add unreachable 192.0.2.0/24");
        let error = fails(&target("192.0.2.1:80"), &["0.0.0.0/0:*"], LONG).await;
        assert_eq!(error.errno(), libc::EHOSTUNREACH, "{error}");
    });
}

/// On one CPU the kernel does all of the handshake within connect().
#[test]
fn a_target_on_this_host_is_connected_at_once_or_refuses_at_once() {
    isolated(|| async {
        let socket = || Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        // The softirq may be put off to a thread of the kernel's where there is much to do.
        let mut tries = (0..100).map(|_| begin(&socket(), addr).unwrap());
        assert!(tries.any(|connected| connected));
        drop(listener);
        let mut tries = (0..100).map(|_| begin(&socket(), addr));
        let refused = tries.find_map(Result::err).unwrap();
        assert_eq!(refused.raw_os_error(), Some(libc::ECONNREFUSED));
    });
}

/// TCP's simultaneous open: the only port that is left to dial from is the one that is dialled.
#[test]
fn a_dial_that_meets_itself_is_refused() {
    isolated(|| async {
        let range = "/proc/sys/net/ipv4/ip_local_port_range";
        std::fs::write(range, "40001 40001").unwrap();
        let rules = ["127.0.0.0/8:*", "0.0.0.0/8:*", "[::1]:*", "[::]:*"];
        for ip in ["127.0.0.1", "0.0.0.0", "[::1]", "[::]"] {
            let addr = format!("{ip}:40001");
            let error = fails(&target(&addr), &rules, LONG).await;
            assert_eq!(error.errno(), libc::ECONNREFUSED, "{addr}: {error}");
        }
    });
}

#[test]
fn silence_is_a_timeout() {
    isolated(|| async {
        // The far end of the pair drops frames that are for another station, and the fixed
        // neighbour keeps ARP, which would end in EHOSTUNREACH, out of it.
        ip("link add hole type veth peer name bottom");
        ip("link set bottom up");
        ip("addr add 192.0.2.2/24 dev hole");
        ip("link set hole up");
        ip("neigh add 192.0.2.1 lladdr 02:00:00:00:00:01 dev hole");
        let began = StdInstant::now();
        let timeout = Duration::from_millis(300);
        let error = fails(&target("192.0.2.1:80"), &["0.0.0.0/0:*"], timeout).await;
        assert_eq!(error.errno(), libc::ETIMEDOUT, "{error}");
        assert!(began.elapsed() >= timeout);
        assert!(began.elapsed() < LONG);
    });
}

#[test]
fn denied_before_anything_is_sent() {
    isolated(|| async {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let target = Target::Addr(listener.local_addr().unwrap());
        let error = fails(&target, &["0.0.0.0/0:*"], LONG).await;
        assert_eq!(error.errno(), libc::EACCES, "{error}");
        assert!(matches!(error, DialError::Denied(_)));
        let nobody = listener.accept().expect_err("somebody connected");
        assert_eq!(nobody.kind(), io::ErrorKind::WouldBlock);
    });
}

#[test]
fn a_name_leads_to_its_addresses() {
    isolated(|| async {
        // `localhost` is in /etc/hosts, so no name server takes part.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let target = Target::Name("localhost".to_owned(), port);
        let error = fails(&target, &["localhost:*"], LONG).await;
        assert_eq!(error.errno(), libc::EACCES, "rebinding: {error}");
        // ::1, if it is tried first, refuses; the next address is tried then.
        let rules = ["localhost:*", "127.0.0.0/8:*", "[::1]:*"];
        let stream = dial_target(&caller(), nobody, &target, &allow(&rules), LONG).await;
        assert_eq!(stream.unwrap().peer_addr().unwrap().port(), port);
    });
}

#[test]
fn a_name_without_an_address_is_host_unreachable() {
    isolated(|| async {
        // In a namespace without a route no name server answers; `.invalid` never exists.
        let target = Target::Name("nothing.invalid".to_owned(), 80);
        let error = fails(&target, &["*:*"], LONG).await;
        assert!(matches!(error, DialError::Resolve { .. }), "{error}");
        assert_eq!(error.errno(), libc::EHOSTUNREACH);
    });
}

#[tokio::test]
async fn impossible_names_never_reach_the_resolver() {
    let long = "a".repeat(64);
    let longer = format!("{}a", "a.".repeat(127));
    for name in [
        "",
        ".",
        "a..b",
        "a b",
        "a\0b",
        "\u{1b}[2J",
        &long,
        &longer,
        "bücher",
    ] {
        let target = Target::Name(name.to_owned(), 80);
        let error = fails(&target, &["*:*"], LONG).await;
        assert!(matches!(error, DialError::BadName(_)), "{name}: {error}");
        assert!(!error.to_string().contains(|c: char| c.is_control()));
    }
}

#[tokio::test]
async fn a_name_that_no_rule_admits_is_not_resolved() {
    let target = Target::Name("secret.example".to_owned(), 80);
    let error = fails(&target, &["10.0.0.0/8:443"], LONG).await;
    assert_eq!(error.errno(), libc::EACCES, "{error}");
}
