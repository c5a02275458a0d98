//! Which rule decides, what a command's filter leaves, and that `explain` says what the programs do.

use std::{
    io::{self, ErrorKind},
    net::{SocketAddr, UdpSocket},
    rc::Rc,
};

use nix::unistd::{Uid, setuid};

use super::harness::{
    HERE4, HERE6, ask, capture, captured, direct, direct_server, everything, hear, in_netns, rule,
    run, scope, serve, talk,
};
use crate::capture::{
    Action, Capture, CaptureError, CaptureRule, Explanation, Filter, FilterError, Protocol,
    Protocols, Question, Scope, Verdict,
};

/// In an application: what becomes of a connection. Without a way to anywhere, "unreachable" is direct.
fn outcome(to: SocketAddr, protocol: Protocol) -> String {
    let result = match protocol {
        Protocol::Tcp => ask(to),
        Protocol::Udp => {
            let here = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            UdpSocket::bind(here).and_then(|socket| {
                socket.connect(to)?;
                // Nobody answers but the agent.
                match exchange_connected(&socket) {
                    Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(direct(to)),
                    said => said,
                }
            })
        }
    };
    match result {
        Ok(said) if said.starts_with("direct") => "direct".into(),
        Ok(said) => said
            .split(" peer ")
            .next()
            .unwrap_or_default()
            .replace(" for ", " by "),
        Err(error) if error.kind() == ErrorKind::NetworkUnreachable => "direct".into(),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => "refuse".into(),
        Err(error) => error.to_string(),
    }
}

fn exchange_connected(socket: &UdpSocket) -> io::Result<String> {
    socket.send(b"?")?;
    let said = hear(socket)?;
    Ok(said.replace(" ? from ", " peer "))
}

/// The same, as explained.
fn explained(answer: &Explanation, to: SocketAddr) -> String {
    let to = SocketAddr::new(to.ip().to_canonical(), to.port());
    match answer.verdict {
        Verdict::Capture => format!("{to} by {}", answer.peer.expect("a peer")),
        verdict => verdict.to_string(),
    }
}

/// Has an application of `uid` in `scope` connect to everything, and compares with what is explained. Returns what
/// became of each connection.
async fn compare(
    capture: &Capture,
    scope: &Scope,
    uid: u32,
    protocol: Protocol,
    targets: &[SocketAddr],
) -> Vec<String> {
    let all = targets.to_vec();
    let seen = run(scope, move || {
        setuid(Uid::from_raw(uid)).map_err(io::Error::from)?;
        let outcomes = all.iter().map(|to| outcome(*to, protocol));
        Ok(outcomes.collect::<Vec<_>>().join(";"))
    });
    let seen = seen.await.expect("the application's answer");
    let seen: Vec<String> = seen.split(';').map(str::to_owned).collect();
    for (to, seen) in targets.iter().zip(&seen) {
        let question = Question {
            to: *to,
            uid,
            protocol,
        };
        let answer = capture
            .explain(scope.path(), None, &question)
            .expect("an answer");
        assert_eq!(explained(&answer, *to), *seen, "{question:?} {answer:?}");
    }
    seen
}

fn with(action: Action, to: &[&str]) -> CaptureRule {
    CaptureRule {
        action,
        ..rule(to, 0)
    }
}

#[test]
fn explain_says_what_the_programs_do() {
    in_netns(async || {
        let (near4, near6) = (direct_server(HERE4), direct_server(HERE6));
        let (shut, local) = (direct_server(HERE4), direct_server("127.0.0.1"));
        let rules = [
            CaptureRule {
                ports: vec![shut.port()..=shut.port()],
                protocols: Protocols::Tcp,
                ..with(Action::Refuse, &["10.0.0.0/8", "127.0.0.0/8"])
            },
            CaptureRule {
                uids: vec![7..=7, 1000..=1999],
                ..with(Action::Direct, &["10.9.0.1/32", "2001:db8:9::/64"])
            },
            CaptureRule {
                ports: vec![80..=89],
                uids: vec![0..=0],
                ..rule(&["192.0.2.0/24"], 3)
            },
            CaptureRule {
                protocols: Protocols::Udp,
                ..with(Action::Refuse, &["192.0.2.0/24", "2001:db8:7::/48"])
            },
            with(Action::Direct, &["192.0.2.128/25"]),
            with(Action::Refuse, &["2001:db8:5::/48"]),
            CaptureRule {
                except: vec![
                    "203.0.113.0/24".parse().unwrap(),
                    "2001:db8:6::/48".parse().unwrap(),
                ],
                ..rule(&["0.0.0.0/0", "::/0"], 7)
            },
            // Never asked: the one before takes all.
            with(Action::Refuse, &["192.0.2.1/32"]),
        ];
        let (mut capture, scope) = capture(&rules);
        let _heard = talk(&mut capture);
        let capture = Rc::new(capture);
        let _reports = serve(capture.clone());
        let mut targets = vec![near4, near6, shut, local];
        for to in [
            "192.0.2.1:80",
            "192.0.2.1:90",
            "192.0.2.200:80",
            "192.0.2.200:90",
            "203.0.113.1:80",
            "198.51.100.1:80",
            "[2001:db8:5::1]:1",
            "[2001:db8:6::1]:1",
            "[2001:db8:7::1]:1",
            "[::ffff:192.0.2.1]:80",
            "[::ffff:192.0.2.200]:90",
        ] {
            targets.push(to.parse().unwrap());
        }
        let mut seen = Vec::new();
        for uid in [0, 7, 1500, 65534] {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                seen.push(compare(&capture, &scope, uid, protocol, &targets).await);
            }
        }
        // That both agree says nothing if both are wrong: some by hand.
        let (root, root_udp, service, nobody) = (&seen[0], &seen[1], &seen[2], &seen[6]);
        assert_eq!(root[0], format!("{near4} by 7"));
        assert_eq!((&*service[0], &*service[1]), ("direct", "direct"));
        assert_eq!((&*root[2], &*root[3]), ("refuse", "direct"), "{root:?}");
        assert_eq!(
            (&*root[4], &*root[6]),
            ("192.0.2.1:80 by 3", "192.0.2.200:80 by 3")
        );
        assert_eq!((&*nobody[4], &*nobody[6]), ("192.0.2.1:80 by 7", "direct"));
        assert_eq!((&*root[10], &*root[11]), ("refuse", "direct"));
        assert_eq!(
            (&*root_udp[4], &*root_udp[5], &*root_udp[12]),
            ("192.0.2.1:80 by 3", "refuse", "refuse")
        );
        assert_eq!(root_udp[0], format!("{near4} by 7"));
    });
}

#[test]
fn a_refusal_needs_no_agent() {
    in_netns(async || {
        let (capture, scope) = capture(&[with(Action::Refuse, &["192.0.2.0/24"]), everything()]);
        capture.close();
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let refused = run(&scope, move || {
                Ok(outcome("192.0.2.1:80".parse().unwrap(), protocol))
            });
            assert_eq!(refused.await, Ok("refuse".into()));
        }
        assert_eq!(capture.counters().refused, 2);
    });
}

#[test]
fn the_reasons_are_told() {
    in_netns(async || {
        let rules = [
            CaptureRule {
                ports: vec![22..=22],
                ..with(Action::Refuse, &["192.0.2.0/24"])
            },
            rule(&["192.0.2.0/24"], 4),
            everything(),
        ];
        let (capture, scope) = capture(&rules);
        let question = |to: &str| Question {
            to: to.parse().unwrap(),
            uid: 0,
            protocol: Protocol::Tcp,
        };
        let inner = Scope::create(scope.path(), "inner").unwrap();
        let answer = capture
            .explain(inner.path(), None, &question("192.0.2.1:80"))
            .unwrap();
        assert_eq!((answer.rule, answer.peer), (Some(1), Some(4)));
        assert_eq!(answer.passed, [(0, "port 80 is not in 22".to_owned())]);
        assert_eq!(answer.attachment.as_deref(), Some(scope.path()));
        // Nothing is pinned here, so nothing outlives the agent.
        assert_eq!(answer.agent_dead, Verdict::Direct);
        let local = capture
            .explain(inner.path(), None, &question("127.0.0.1:80"))
            .unwrap();
        assert_eq!((local.verdict, local.rule), (Verdict::Direct, None));
        assert_eq!(local.reason, "loopback is never captured");
        let other = super::harness::scope();
        let outside = capture
            .explain(other.path(), None, &question("192.0.2.1:80"))
            .unwrap();
        assert_eq!((outside.verdict, outside.rule), (Verdict::Direct, Some(1)));
        assert_eq!(outside.reason, "its cgroup is not captured");
        inner.remove().unwrap();
    });
}

fn filter(text: &str) -> Filter {
    text.parse().expect("a filter")
}

#[test]
fn a_filter_holds_for_one_scope_and_what_is_inside() {
    in_netns(async || {
        let server = direct_server(HERE4);
        let (mut capture, other) =
            capture(&[with(Action::Refuse, &["198.51.100.0/24"]), everything()]);
        let outer = scope();
        let text = format!(
            "--only 192.0.2.0/24 --only 198.51.100.0/24 --only 10.9.0.0/24:1-{} --only [2001:db8:1::/48]:443 --except 192.0.2.7:22",
            server.port() - 1
        );
        capture
            .attach_filtered(outer.path(), &filter(&text))
            .unwrap();
        let inner = Scope::create(outer.path(), "inner").unwrap();
        let capture = Rc::new(capture);
        let _reports = serve(capture.clone());
        let mut targets = vec![server];
        for to in [
            "192.0.2.7:22",
            "192.0.2.7:80",
            "203.0.113.1:80",
            "198.51.100.1:80",
            "[2001:db8:1::1]:443",
            "[2001:db8:1::1]:80",
            "[::ffff:192.0.2.7]:22",
        ] {
            targets.push(to.parse().unwrap());
        }
        let expected = [
            "direct",
            "direct",
            "192.0.2.7:80 by 1",
            "direct",
            "refuse",
            "[2001:db8:1::1]:443 by 1",
            "direct",
            "direct",
        ];
        for scope in [&outer, &inner] {
            let seen = compare(&capture, scope, 0, Protocol::Tcp, &targets).await;
            assert_eq!(seen, expected);
        }
        let unfiltered = compare(&capture, &other, 0, Protocol::Tcp, &targets).await;
        assert_eq!(unfiltered[0], format!("{server} by 1"));
        inner.remove().unwrap();
    });
}

#[test]
fn a_filter_goes_with_its_attachment() {
    in_netns(async || {
        let (mut capture, other) = capture(&[everything()]);
        let scope = scope();
        let to: SocketAddr = "192.0.2.7:80".parse().unwrap();
        capture
            .attach_filtered(scope.path(), &filter("--only 10.0.0.0/8"))
            .unwrap();
        let again = capture.attach_filtered(other.path(), &filter("--only 10.0.0.0/8"));
        assert!(
            matches!(again, Err(CaptureError::AlreadyAttached { .. })),
            "{again:?}"
        );
        assert_eq!(capture.kernel.filters.len(), 1);
        super::harness::quiet(|| capture.detach(scope.path())).unwrap();
        assert_eq!(capture.kernel.filters.len(), 0);
        assert_eq!(crate::capture::kernel::settings(&capture.kernel).filters, 0);
        capture.attach(scope.path()).unwrap();
        let many = Filter {
            only: vec!["10.0.0.0/8".parse().unwrap(); 49],
            ..Filter::default()
        };
        let refused = capture.attach_filtered(super::harness::scope().path(), &many);
        assert!(
            matches!(
                refused,
                Err(CaptureError::Filter(FilterError::TooManyNets { count: 49 }))
            ),
            "{refused:?}"
        );
        let _reports = serve(Rc::new(capture));
        assert_eq!(
            run(&scope, move || ask(to)).await,
            Ok(captured("192.0.2.7:80", 1))
        );
    });
}
