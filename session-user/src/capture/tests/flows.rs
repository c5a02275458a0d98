//! Every way of connecting ends at the agent with the right destination, and getpeername says the same.

use std::{
    collections::BTreeSet,
    io::{self, Write as _},
    net::{SocketAddr, TcpStream},
    os::fd::AsRawFd as _,
    rc::Rc,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::wait::waitpid,
    unistd::{ForkResult, fork},
};
use socket2::{Domain, Socket, Type};

use super::harness::{
    App, HERE4, HERE6, PATIENCE, ask, capture, captured, direct, direct_server, disconnect,
    everything, greeting, in_netns, run, serve,
};
use crate::capture::{cgroup, kernel::handshakes_filed};

const FAR4: &str = "192.0.2.7:443";
const FAR6: &str = "[2001:db8::7]:443";

fn addr(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

fn socket(domain: Domain) -> io::Result<Socket> {
    Socket::new(domain, Type::STREAM, None)
}

/// Runs one application with everything captured and expects that it reached the agent for `to`.
fn expect(to: &'static str, body: impl FnOnce() -> io::Result<String> + Send + 'static) {
    in_netns(async move || {
        let (capture, scope) = capture(&[everything()]);
        let capture = Rc::new(capture);
        let _reports = serve(capture.clone());
        assert_eq!(run(&scope, body).await, Ok(captured(to, 1)));
        let counters = capture.counters();
        assert_eq!(
            (counters.delivered, counters.in_flight),
            (1, 0),
            "{counters:?}"
        );
        assert_eq!(counters.no_cubic, 0, "{counters:?}");
    });
}

#[test]
fn the_cgroup_of_the_application_is_told() {
    in_netns(async || {
        let (capture, scope) = capture(&[everything()]);
        let app = run(&scope, || TcpStream::connect(FAR4).map(|_| String::new()));
        let entrance = capture.entrance();
        let (outcome, captured) = tokio::join!(app, entrance.accept());
        assert_eq!(outcome, Ok(String::new()));
        let name = cgroup::name_of(captured.expect("a captured connection").cgroup);
        let root = cgroup::cgroup2_root().expect("cgroup v2");
        let path = scope
            .path()
            .strip_prefix(&root)
            .expect("a path below the root");
        assert_eq!(name.as_deref(), path.to_str());
        assert_eq!(cgroup::name_of(u64::MAX), None);
    });
}

#[test]
fn ipv4() {
    expect(FAR4, || ask(FAR4));
}

#[test]
fn ipv6() {
    expect(FAR6, || ask(FAR6));
}

#[test]
fn ipv6_only() {
    expect(FAR6, || {
        let socket = socket(Domain::IPV6)?;
        socket.set_only_v6(true)?;
        socket.connect(&addr(FAR6).into())?;
        greeting(&socket.into())
    });
}

#[test]
fn mapped_ipv4() {
    in_netns(async || {
        let (capture, scope) = capture(&[everything()]);
        let _reports = serve(Rc::new(capture));
        let result = run(&scope, || ask("[::ffff:192.0.2.7]:443")).await;
        assert_eq!(
            result,
            Ok("192.0.2.7:443 for 1 peer [::ffff:192.0.2.7]:443".into())
        );
    });
}

#[test]
fn non_blocking() {
    for (domain, to) in [(Domain::IPV4, FAR4), (Domain::IPV6, FAR6)] {
        expect(to, move || {
            let socket = socket(domain)?;
            socket.set_nonblocking(true)?;
            match socket.connect(&addr(to).into()) {
                Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
                other => {
                    return Err(io::Error::other(format!(
                        "expected EINPROGRESS, got {other:?}"
                    )));
                }
            }
            let mut wait = [PollFd::new(
                std::os::fd::AsFd::as_fd(&socket),
                PollFlags::POLLOUT,
            )];
            poll(
                &mut wait,
                PollTimeout::try_from(PATIENCE).map_err(io::Error::other)?,
            )?;
            if let Some(error) = socket.take_error()? {
                return Err(error);
            }
            socket.set_nonblocking(false)?;
            greeting(&socket.into())
        });
    }
}

#[test]
fn bound_to_an_address_first() {
    for (domain, here, to) in [
        (Domain::IPV4, "10.9.0.1:0", FAR4),
        (Domain::IPV6, "[2001:db8:9::1]:0", FAR6),
        (Domain::IPV4, "0.0.0.0:4711", FAR4),
        (Domain::IPV6, "[::]:4711", FAR6),
        (Domain::IPV4, "10.9.0.1:4711", FAR4),
    ] {
        expect(to, move || {
            let socket = socket(domain)?;
            socket.bind(&addr(here).into())?;
            socket.connect(&addr(to).into())?;
            greeting(&socket.into())
        });
    }
}

#[test]
fn bound_without_a_port() {
    expect(FAR4, || {
        let socket = socket(Domain::IPV4)?;
        let on: libc::c_int = 1;
        // SAFETY: a live descriptor, and a pointer to an int with its length.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_IP,
                libc::IP_BIND_ADDRESS_NO_PORT,
                (&raw const on).cast(),
                4,
            )
        };
        assert_eq!(result, 0);
        socket.bind(&addr(&format!("{HERE4}:0")).into())?;
        socket.connect(&addr(FAR4).into())?;
        greeting(&socket.into())
    });
}

#[test]
fn bound_to_a_device() {
    for (domain, to) in [(Domain::IPV4, FAR4), (Domain::IPV6, FAR6)] {
        expect(to, move || {
            let socket = socket(domain)?;
            socket.bind_device(Some(b"d0"))?;
            socket.connect(&addr(to).into())?;
            greeting(&socket.into())
        });
    }
}

#[test]
fn fast_open() {
    expect(FAR4, || {
        let socket = socket(Domain::IPV4)?;
        // connect() by the first write, which is where the hook then runs.
        socket.send_to_with_flags(b"early", &addr(FAR4).into(), libc::MSG_FASTOPEN)?;
        greeting(&socket.into())
    });
}

#[test]
fn multipath_tcp() {
    in_netns(async || {
        let (capture, scope) = capture(&[everything()]);
        let _reports = serve(Rc::new(capture));
        let said = run(&scope, || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(socket2::Protocol::MPTCP))?;
            socket.connect(&addr(FAR4).into())?;
            greeting(&socket.into())
        });
        // getpeername of such a socket asks another hook point; only the destination is right.
        let said = said.await.unwrap();
        assert!(said.starts_with("192.0.2.7:443 for 1 "), "{said}");
    });
}

#[test]
fn one_port_to_many_destinations() {
    in_netns(async || {
        let (capture, scope) = capture(&[everything()]);
        let _reports = serve(Rc::new(capture));
        // One local address and port, several destinations at once: only the far end tells the connections apart.
        let result = run(&scope, || {
            let mut open = Vec::new();
            for last in 1..=20 {
                let socket = socket(Domain::IPV4)?;
                socket.set_reuse_address(true)?;
                socket.bind(&addr("10.9.0.1:4711").into())?;
                let to = format!("192.0.2.{last}:443");
                socket.connect(&addr(&to).into())?;
                let stream = TcpStream::from(socket);
                let said = greeting(&stream)?;
                if said != captured(&to, 1) {
                    return Ok(said);
                }
                open.push(stream);
            }
            Ok("all right".into())
        })
        .await;
        assert_eq!(result, Ok("all right".into()));
    });
}

#[test]
fn a_socket_connected_again_forgets() {
    in_netns(async || {
        let mut rule = everything();
        rule.except = vec![
            "10.9.0.0/24".parse().unwrap(),
            "2001:db8:9::/64".parse().unwrap(),
        ];
        let (capture, scope) = capture(&[rule]);
        let _reports = serve(Rc::new(capture));
        let (near4, near6, local4) = (
            direct_server(HERE4),
            direct_server(HERE6),
            direct_server("127.0.0.1"),
        );
        for (domain, route) in [
            (
                Domain::IPV4,
                vec![
                    addr(FAR4),
                    addr("192.0.2.9:80"),
                    near4,
                    addr(FAR4),
                    local4,
                    addr(FAR4),
                ],
            ),
            (
                Domain::IPV6,
                vec![addr(FAR6), addr("[2001:db8::9]:80"), near6, addr(FAR6)],
            ),
        ] {
            let expected: Vec<_> = route
                .iter()
                .map(|to| {
                    if [near4, near6, local4].contains(to) {
                        direct(to)
                    } else {
                        captured(&to.to_string(), 1)
                    }
                })
                .collect();
            let result = run(&scope, move || {
                let socket = socket(domain)?;
                let mut said = Vec::new();
                for to in route {
                    socket.connect(&to.into())?;
                    let stream = TcpStream::from(socket.try_clone()?);
                    said.push(greeting(&stream)?);
                    disconnect(&socket)?;
                    if stream.peer_addr().is_ok() {
                        return Err(io::Error::other("a disconnected socket still has a peer"));
                    }
                }
                Ok(said.join("\n"))
            });
            assert_eq!(result.await, Ok(expected.join("\n")));
        }
    });
}

#[test]
fn a_connection_survives_fork() {
    expect(FAR4, || {
        let stream = TcpStream::connect(addr(FAR4))?;
        // SAFETY: this process has a single thread.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => {
                waitpid(child, None)?;
                greeting(&stream)
            }
            ForkResult::Child => {
                let right = stream.peer_addr().is_ok_and(|peer| peer == addr(FAR4));
                let _ = (&stream).write_all(if right { b"child" } else { b"wrong" });
                // SAFETY: ends the process without running the parent's exit handlers.
                unsafe { libc::_exit(0) }
            }
        }
    });
}

#[test]
fn short_connections_keep_their_destinations() {
    const APPS: usize = 4;
    const EACH: usize = 500;
    in_netns(async || {
        let (capture, scope) = capture(&[everything()]);
        let capture = Rc::new(capture);
        let mut reports = serve(capture.clone());
        let destination = |app: usize, index: usize| match index % 2 {
            0 => format!("198.51.{app}.{}:{}", index % 250, 1000 + index),
            _ => format!("[2001:db8:{app:x}::{index:x}]:{}", 1000 + index),
        };
        let apps: Vec<_> = (0..APPS)
            .map(|app| {
                App::start(&scope, move || {
                    for index in 0..EACH {
                        let to = destination(app, index);
                        TcpStream::connect(addr(&to))?.write_all(to.as_bytes())?;
                    }
                    Ok(String::new())
                })
            })
            .collect();
        for app in apps {
            app.result().await.unwrap();
        }
        let mut seen = BTreeSet::new();
        while seen.len() < APPS * EACH {
            let one = tokio::time::timeout(PATIENCE, reports.recv()).await;
            let one = one
                .unwrap_or_else(|_| panic!("{} arrived, then none", seen.len()))
                .expect("the agent serves");
            assert_eq!(
                one.original,
                addr(&one.data),
                "what the agent was told, and what the application meant"
            );
            seen.insert(one);
        }
        let counters = capture.counters();
        assert_eq!(
            counters.captured4 + counters.captured6,
            (APPS * EACH) as u64,
            "{counters:?}"
        );
        assert_eq!(
            (counters.delivered, counters.in_flight),
            ((APPS * EACH) as u64, 0),
            "{counters:?}"
        );
        assert_eq!(
            handshakes_filed(&capture.kernel),
            0,
            "no handshake is left behind"
        );
    });
}
