//! What is captured and what is left alone, refused or reset.

use std::{
    io::{self, Read as _},
    net::{SocketAddrV6, TcpStream},
    rc::Rc,
    time::Duration,
};

use nix::{
    sched::{CloneFlags, unshare},
    unistd::{Uid, setuid},
};
use socket2::{Domain, Socket, Type};

use super::harness::{
    HERE4, HERE6, PATIENCE, ask, capture, captured, closed, direct, direct_server, everything,
    in_netns, rule, run, serve,
};
use crate::capture::{CaptureRule, Counters, kernel::pretend_in_flight};

#[test]
fn loopback_is_untouched() {
    in_netns(async || {
        let (capture, scope) = capture(&[everything()]);
        let capture = Rc::new(capture);
        let _reports = serve(capture.clone());
        for here in ["127.0.0.1", "127.5.5.5", "::1"] {
            let server = direct_server(here);
            assert_eq!(run(&scope, move || ask(server)).await, Ok(direct(server)));
        }
        let server = direct_server("127.0.0.1");
        let mapped = format!("[::ffff:127.0.0.1]:{}", server.port());
        assert_eq!(run(&scope, || ask(&mapped)).await, Ok(direct(&mapped)));
        // Linux connects the unspecified address to loopback.
        let unspecified = run(&scope, move || ask(format!("0.0.0.0:{}", server.port())));
        assert_eq!(unspecified.await, Ok(direct(server)));
        let counters = Counters {
            // A server here may have the number of one of the agent's sixteen ports, at another address.
            unknown: 0,
            ..capture.counters()
        };
        assert_eq!(counters, Counters::default());
    });
}

#[test]
fn link_local_destinations_are_untouched() {
    in_netns(async || {
        let (capture, scope) = capture(&[everything()]);
        let result = run(&scope, || {
            let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
            socket.set_nonblocking(true)?;
            let device = nix::net::if_::if_nametoindex("d0")?;
            let to =
                SocketAddrV6::new("fe80::77".parse().map_err(io::Error::other)?, 80, 0, device);
            // Nobody answers there; that the SYN is on its way to the link is enough.
            match socket.connect(&to.into()) {
                Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
                    Ok("on its way".into())
                }
                other => Ok(format!("{other:?}")),
            }
        });
        assert_eq!(result.await, Ok("on its way".into()));
        assert_eq!(capture.counters(), Default::default());
    });
}

#[test]
fn only_configured_destinations_are_captured() {
    in_netns(async || {
        let (near4, near6) = (direct_server(HERE4), direct_server(HERE6));
        let rules = [
            CaptureRule {
                ports: vec![80..=80],
                ..rule(&["10.9.0.0/24"], 9)
            },
            CaptureRule {
                except: vec!["10.9.0.1/32".parse().unwrap()],
                ..rule(&["10.0.0.0/8"], 7)
            },
            CaptureRule {
                ports: vec![1..=1, 443..=444],
                ..rule(&["2001:db8::/32"], 8)
            },
        ];
        let (capture, scope) = capture(&rules);
        let capture = Rc::new(capture);
        let _reports = serve(capture.clone());
        assert_eq!(
            run(&scope, move || ask(near4)).await,
            Ok(direct(near4)),
            "excepted"
        );
        assert_eq!(
            run(&scope, move || ask(near6)).await,
            Ok(direct(near6)),
            "another port"
        );
        for (to, peer) in [
            ("10.1.2.3:22", 7),
            ("10.9.0.1:80", 9),
            ("10.9.0.2:80", 9),
            ("10.9.0.2:81", 7),
            ("[2001:db8:9::1]:1", 8),
            ("[2001:db8:9::1]:444", 8),
        ] {
            assert_eq!(run(&scope, move || ask(to)).await, Ok(captured(to, peer)));
        }
        assert_eq!(
            run(&scope, || ask("203.0.113.1:80")).await,
            Err("ENETUNREACH".into()),
            "outside of every rule"
        );
        let counters = capture.counters();
        assert_eq!(
            (counters.captured4, counters.captured6, counters.delivered),
            (4, 2, 6),
            "{counters:?}"
        );
    });
}

#[test]
fn rules_can_be_replaced() {
    in_netns(async || {
        let server = direct_server(HERE4);
        let (mut capture, scope) =
            capture(&[rule(&["10.9.0.0/24"], 1), rule(&["192.0.2.0/24"], 2)]);
        capture
            .update_rules(&[rule(&["192.0.2.0/25"], 3), rule(&["192.0.2.0/24"], 4)])
            .unwrap();
        let backward = CaptureRule {
            ports: vec![std::ops::RangeInclusive::new(2, 1)],
            ..everything()
        };
        capture.update_rules(&[backward]).unwrap_err();
        let _reports = serve(Rc::new(capture));
        assert_eq!(
            run(&scope, move || ask(server)).await,
            Ok(direct(server)),
            "no longer captured"
        );
        assert_eq!(
            run(&scope, || ask("192.0.2.1:80")).await,
            Ok(captured("192.0.2.1:80", 3))
        );
        assert_eq!(
            run(&scope, || ask("192.0.2.200:80")).await,
            Ok(captured("192.0.2.200:80", 4))
        );
    });
}

#[test]
fn processes_outside_of_the_cgroup_are_untouched() {
    in_netns(async || {
        let server = direct_server(HERE4);
        let (capture, _scope) = capture(&[everything()]);
        let other = super::harness::scope();
        assert_eq!(run(&other, move || ask(server)).await, Ok(direct(server)));
        assert_eq!(capture.counters(), Default::default());
    });
}

#[test]
fn without_an_agent_connections_go_direct_or_are_refused() {
    in_netns(async || {
        let (near4, near6) = (direct_server(HERE4), direct_server(HERE6));
        let shut = closed(&["192.0.2.0/24", "2001:db8:1::/48"], 1);
        let (capture, scope) = capture(&[shut, everything()]);
        capture.close();
        assert_eq!(run(&scope, move || ask(near4)).await, Ok(direct(near4)));
        assert_eq!(run(&scope, move || ask(near6)).await, Ok(direct(near6)));
        for to in [
            "192.0.2.1:80",
            "[::ffff:192.0.2.1]:80",
            "[2001:db8:1::1]:80",
        ] {
            assert_eq!(
                run(&scope, move || ask(to)).await,
                Err("ECONNREFUSED".into()),
                "{to}"
            );
        }
        let counters = capture.counters();
        assert_eq!(
            (counters.agent_gone, counters.refused),
            (5, 3),
            "{counters:?}"
        );
        assert_eq!(
            (counters.captured4, counters.captured6),
            (0, 0),
            "{counters:?}"
        );
    });
}

#[test]
fn too_many_handshakes_pass_by() {
    in_netns(async || {
        let server = direct_server(HERE4);
        let shut = closed(&["192.0.2.0/24"], 1);
        let (mut capture, scope) = capture(&[shut, everything()]);
        pretend_in_flight(
            &mut capture.kernel,
            session_ebpf_common::HANDSHAKES_ADMITTED,
        );
        assert_eq!(run(&scope, move || ask(server)).await, Ok(direct(server)));
        assert_eq!(
            run(&scope, || ask("192.0.2.1:80")).await,
            Err("ECONNREFUSED".into())
        );
        let counters = capture.counters();
        assert_eq!(
            (
                counters.handshakes_full,
                counters.refused,
                counters.captured4
            ),
            (2, 1, 0),
            "{counters:?}"
        );
        pretend_in_flight(&mut capture.kernel, 0);
        let _reports = serve(Rc::new(capture));
        assert_eq!(
            run(&scope, || ask("192.0.2.1:80")).await,
            Ok(captured("192.0.2.1:80", 1))
        );
    });
}

#[test]
fn without_ipv6_on_loopback_only_ipv4_is_captured() {
    in_netns(async || {
        // Of this test's own namespace.
        std::fs::write("/proc/sys/net/ipv6/conf/lo/disable_ipv6", "1").unwrap();
        let shut = closed(&["2001:db8:1::/48"], 1);
        let (capture, scope) = capture(&[shut, everything()]);
        let capture = Rc::new(capture);
        let _reports = serve(capture.clone());
        assert_eq!(
            run(&scope, || ask("[2001:db8:1::1]:80")).await,
            Err("ECONNREFUSED".into())
        );
        assert_eq!(capture.counters().agent_gone, 1);
        assert_eq!(
            run(&scope, || ask("192.0.2.1:80")).await,
            Ok(captured("192.0.2.1:80", 1))
        );
    });
}

#[test]
fn a_namespace_without_an_agent_is_passed_by() {
    in_netns(async || {
        let (capture, scope) = capture(&[everything()]);
        let result = run(&scope, || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            ask("192.0.2.1:80")
        });
        assert_eq!(result.await, Err("ENETUNREACH".into()));
        assert_eq!(capture.counters().agent_gone, 1);
    });
}

#[test]
fn a_refused_handshake_leaves_nothing() {
    in_netns(async || {
        let (capture, scope) = capture(&[everything()]);
        capture.close_accepting();
        for to in ["192.0.2.1:80", "[2001:db8::1]:80"] {
            assert_eq!(
                run(&scope, move || ask(to)).await,
                Err("ECONNREFUSED".into()),
                "{to}"
            );
        }
        let counters = capture.counters();
        assert_eq!(
            (counters.abandoned, counters.in_flight),
            (2, 0),
            "{counters:?}"
        );
        assert_eq!(crate::capture::kernel::handshakes_filed(&capture.kernel), 0);
    });
}

#[test]
fn a_stranger_at_the_listeners_is_reset() {
    in_netns(async || {
        let (capture, _scope) = capture(&[everything()]);
        let ports = capture.namespaces.own().ports();
        let _reports = serve(Rc::new(capture));
        let other = super::harness::scope();
        for to in [
            format!("127.0.0.1:{}", ports.v4),
            format!("[::1]:{}", ports.v6[3]),
        ] {
            let result = run(&other, move || {
                let mut stream = TcpStream::connect(&to)?;
                stream.set_read_timeout(Some(Duration::from_secs(30)))?;
                let mut buffer = [0; 10];
                Ok(format!("read {}", stream.read(&mut buffer)?))
            });
            assert_eq!(result.await, Err("ECONNRESET".into()));
        }
    });
}

#[test]
fn an_ordinary_user_bound_to_a_device_is_never_stuck() {
    in_netns(async || {
        let server = direct_server(HERE4);
        let (capture, scope) = capture(&[everything()]);
        let capture = Rc::new(capture);
        let _reports = serve(capture.clone());
        let result = run(&scope, move || {
            setuid(Uid::from_raw(65534)).map_err(io::Error::from)?;
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.bind_device(Some(b"d0"))?;
            socket.connect_timeout(&server.into(), PATIENCE / 2)?;
            super::harness::greeting(&socket.into())
        })
        .await
        .unwrap();
        let counters = capture.counters();
        // Kernels differ in whether the hook may unbind the socket of a user without CAP_NET_RAW.
        let unbound = counters.device_bound == 0;
        assert_eq!(
            result,
            if unbound {
                captured(&server.to_string(), 1)
            } else {
                direct(server)
            }
        );
    });
}
