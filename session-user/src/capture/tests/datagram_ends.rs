//! Datagrams that are refused, answered directly, kept on loopback, or outlive the agent.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use nix::unistd::pipe;
use session_ebpf_common::{DNS_PEER, Destination, MAPPED, UDP_IDS_MAX};
use socket2::{Domain, Protocol, Socket, Type};

use super::harness::{
    App, FLOW_IDLE, HERE4, HERE6, PATIENCE, ToPeers, answered, capture, closed, direct_echo,
    everything, exchange, hear, in_netns, rule, run, scope, talk,
};
use crate::capture::udp::{Route, UdpTables};
use crate::capture::{Action, Capture, CaptureConfig, CaptureRule, Protocols};
use crate::requests::{FlowInput, RequestQueue};

const FAR4: &str = "192.0.2.7:443";
const FAR6: &str = "[2001:db8::7]:443";
const FAR: [&str; 3] = [FAR4, FAR6, "[::ffff:192.0.2.7]:443"];

fn addr(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

fn unbound(to: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, Some(Protocol::UDP))?;
    Ok(socket.into())
}

/// A socket that shares its port.
fn at(port: u16) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&SocketAddr::new(HERE4.parse().expect("an address"), port).into())?;
    Ok(socket)
}

#[test]
fn a_closed_port_is_told_to_a_connected_socket() {
    in_netns(async || {
        let (mut capture, scope) = capture(&[everything()]);
        let _heard = talk(&mut capture);
        for to in FAR {
            let connected = run(&scope, move || {
                let socket = unbound(addr(to))?;
                socket.connect(addr(to))?;
                socket.send(b"refuse")?;
                hear(&socket)
            });
            assert_eq!(connected.await, Err("ECONNREFUSED".into()), "{to}");
            // One that is not connected hears of it no more than it would natively; nor of a host that is not there.
            let unconnected = run(&scope, move || {
                let socket = unbound(addr(to))?;
                socket.send_to(b"refuse", addr(to))?;
                socket.send_to(b"unreachable", addr(to))?;
                exchange(&socket, addr(to), "x")
            });
            assert!(unconnected.await.is_ok(), "{to}");
        }
    });
}

#[test]
fn a_rule_refuses_datagrams_too() {
    in_netns(async || {
        let refuse = CaptureRule {
            action: Action::Refuse,
            ..everything()
        };
        let (capture, scope) = capture(&[refuse]);
        for to in FAR {
            let result = run(&scope, move || {
                let socket = unbound(addr(to))?;
                socket.send_to(b"x", addr(to)).map(|_| String::new())
            });
            assert_eq!(result.await, Err("ECONNREFUSED".into()), "{to}");
        }
        assert_eq!(capture.counters().refused, 3);
    });
}

#[test]
fn other_protocols_destinations_and_cgroups_are_left_alone() {
    in_netns(async || {
        let tcp = CaptureRule {
            protocols: Protocols::Tcp,
            ..rule(&["10.9.0.0/24"], 1)
        };
        let rules = [
            tcp,
            rule(&["192.0.2.0/24", "224.0.0.0/4", "255.0.0.0/8"], 1),
        ];
        let (mut capture, scope) = capture(&rules);
        let _heard = talk(&mut capture);
        let (near, local) = (direct_echo(HERE4), direct_echo("127.0.0.1"));
        for to in [near, local] {
            let said = run(&scope, move || exchange(&unbound(to)?, to, "x"))
                .await
                .unwrap();
            assert!(said.starts_with("direct "), "{said}");
        }
        let many = run(&scope, || {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
            socket.set_broadcast(true)?;
            socket.set_multicast_if_v4(&HERE4.parse().map_err(io::Error::other)?)?;
            let socket = UdpSocket::from(socket);
            socket.send_to(b"x", "224.0.0.251:5353")?;
            // Without a route to anywhere there is none to everybody either.
            let _ = socket.send_to(b"x", "255.255.255.255:67");
            Ok(String::new())
        });
        many.await.unwrap();
        let elsewhere = super::harness::scope();
        let other = run(&elsewhere, || {
            unbound(addr(FAR4))?
                .send_to(b"x", FAR4)
                .map(|_| String::new())
        });
        assert_eq!(other.await, Err("ENETUNREACH".into()));
        assert_eq!(capture.counters(), Default::default());
    });
}

/// Sends to an application of which it is not known when it is ready, until it answers.
fn ask_server(socket: &UdpSocket, server: SocketAddr) -> (String, SocketAddr) {
    socket
        .set_read_timeout(Some(Duration::from_millis(100)))
        .expect("a socket");
    let mut buffer = [0; 100];
    for _ in 0..600 {
        let _ = socket.send_to(b"question", server);
        if let Ok((len, from)) = socket.recv_from(&mut buffer) {
            return (String::from_utf8_lossy(&buffer[..len]).into_owned(), from);
        }
    }
    panic!("the server does not answer");
}

#[test]
fn a_server_answers_directly_whoever_spoke_to_it_first() {
    in_netns(async || {
        let (mut capture, outer) = capture(&[everything()]);
        let mut heard = talk(&mut capture);
        // Programs attached at two levels must not make more of it.
        let inner = crate::capture::Scope::create(outer.path(), "inner").unwrap();
        capture.attach(inner.path()).unwrap();
        for connects in [false, true] {
            let server = App::start(&inner, move || {
                let socket = UdpSocket::from(at(4711)?);
                socket.set_read_timeout(Some(PATIENCE))?;
                let mut buffer = [0; 100];
                let (_, client) = socket.recv_from(&mut buffer)?;
                if connects {
                    // As servers do that give each client a socket of its own.
                    let own = UdpSocket::from(at(4711)?);
                    own.connect(client)?;
                    own.send(b"answer")?;
                } else {
                    socket.send_to(b"answer", client)?;
                }
                // What the server begins itself is captured.
                exchange(&socket, addr(FAR4), "update")?;
                exchange(&socket, addr(FAR4), "again")
            });
            let asked = tokio::task::spawn_blocking(|| {
                let client = UdpSocket::bind((HERE4, 0)).unwrap();
                ask_server(&client, addr("10.9.0.1:4711"))
            });
            let (said, from) = asked.await.unwrap();
            assert_eq!((&*said, from), ("answer", addr("10.9.0.1:4711")));
            let captured = answered(FAR4, 1, "again", FAR4);
            assert_eq!(server.result().await, Ok(captured));
            for text in [b"update".to_vec(), b"again".to_vec()] {
                let heard = heard.recv().await.unwrap();
                assert_eq!((&*heard.target, heard.data), (FAR4, text));
            }
        }
    });
}

#[test]
fn who_spoke_first_is_not_asked_where_nothing_may_go_direct_and_the_port_is_the_kernels() {
    in_netns(async || {
        let (mut capture, scope) = capture(&[closed(&["10.9.0.0/24"], 1)]);
        let mut heard = talk(&mut capture);
        for (port, direct) in [(0, false), (4712, true)] {
            // Whoever is spoken to has spoken first, or somebody in its name.
            let stranger = UdpSocket::bind((HERE4, 0)).unwrap();
            stranger.set_read_timeout(Some(PATIENCE)).unwrap();
            let to = stranger.local_addr().unwrap();
            let (mut port_of, tell) = pipe().map(|(r, w)| (File::from(r), File::from(w))).unwrap();
            let app = App::start(&scope, move || {
                let socket = UdpSocket::bind((HERE4, port))?;
                socket.set_read_timeout(Some(PATIENCE))?;
                (&tell).write_all(&socket.local_addr()?.port().to_be_bytes())?;
                let mut buffer = [0; 100];
                socket.recv_from(&mut buffer)?;
                socket.send_to(b"secret", to)?;
                Ok(String::new())
            });
            let port = tokio::task::spawn_blocking(move || {
                let mut bytes = [0; 2];
                port_of
                    .read_exact(&mut bytes)
                    .map(|()| u16::from_be_bytes(bytes))
            });
            let port = port.await.unwrap().unwrap();
            stranger.send_to(b"first", (HERE4, port)).unwrap();
            app.result().await.unwrap();
            if direct {
                let mut buffer = [0; 100];
                assert_eq!(stranger.recv(&mut buffer).unwrap(), 6);
            } else {
                let seen = heard.recv().await.unwrap();
                assert_eq!((seen.target, &*seen.data), (to.to_string(), &b"secret"[..]));
            }
        }
        assert!(heard.try_recv().is_err(), "a server's answer was captured");
    });
}

#[test]
fn without_an_agent_datagrams_go_direct_or_are_refused() {
    in_netns(async || {
        let shut = closed(&["192.0.2.0/24", "2001:db8::/48"], 1);
        let (mut capture, scope) = capture(&[shut, everything()]);
        let _heard = talk(&mut capture);
        capture.marker.close();
        for near in [direct_echo(HERE4), direct_echo(HERE6)] {
            let said = run(&scope, move || exchange(&unbound(near)?, near, "x"))
                .await
                .unwrap();
            assert!(said.starts_with("direct "), "{said}");
            let connected = run(&scope, move || {
                let socket = unbound(near)?;
                socket.connect(near)?;
                exchange(&socket, near, "x")
            });
            let said = connected.await.unwrap();
            assert!(said.starts_with("direct "), "{said}");
        }
        for to in FAR {
            let sent = run(&scope, move || {
                let socket = unbound(addr(to))?;
                socket.send_to(b"x", addr(to)).map(|_| String::new())
            });
            assert_eq!(sent.await, Err("ECONNREFUSED".into()), "{to}");
            let connected = run(&scope, move || {
                unbound(addr(to))?.connect(addr(to)).map(|()| String::new())
            });
            assert_eq!(connected.await, Err("ECONNREFUSED".into()), "{to}");
        }
        let counters = capture.counters();
        assert_eq!(
            (counters.agent_gone, counters.refused),
            (12, 6),
            "{counters:?}"
        );
    });
}

#[test]
fn a_connected_socket_notices_that_the_agent_has_gone() {
    in_netns(async || {
        let (mut capture, scope) = capture(&[everything()]);
        // Nobody runs them: the sockets close.
        drop(capture.take_datagrams());
        for to in FAR {
            let result = run(&scope, move || {
                let socket = unbound(addr(to))?;
                socket.connect(addr(to))?;
                socket.send(b"x")?;
                hear(&socket)
            });
            assert_eq!(result.await, Err("ECONNREFUSED".into()), "{to}");
        }
    });
}

#[test]
fn a_link_chosen_for_one_datagram_does_not_carry_it_as_it_is() {
    in_netns(async || {
        let (mut capture, scope) = capture(&[everything()]);
        let _heard = talk(&mut capture);
        let result = run(&scope, || {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
            let index = nix::net::if_::if_nametoindex("d0")?.to_be();
            // SAFETY: a live descriptor, and a pointer to an int with its length.
            let set = unsafe {
                libc::setsockopt(
                    std::os::fd::AsRawFd::as_raw_fd(&socket),
                    libc::IPPROTO_IP,
                    libc::IP_UNICAST_IF,
                    (&raw const index).cast(),
                    4,
                )
            };
            assert_eq!(set, 0);
            UdpSocket::from(socket)
                .send_to(b"x", FAR4)
                .map(|_| String::new())
        });
        let outcome = result.await;
        let counters = capture.counters();
        // Kernels before 5.18 or so ignore the option where it leads nowhere.
        assert_eq!(
            (outcome, counters.udp_stray),
            (Err("EPERM".into()), 1),
            "{counters:?}"
        );
    });
}

#[test]
fn a_stranger_cannot_use_what_was_captured_for_others() {
    in_netns(async || {
        let (mut capture, inside) = capture(&[everything()]);
        let (ready, tell) = pipe().unwrap();
        let (go, wait) = (File::from(ready), File::from(tell));
        let app = App::start(&inside, move || {
            let socket = unbound(addr(FAR4))?;
            socket.connect(addr(FAR4))?;
            let table = std::fs::read_to_string("/proc/self/net/udp")?;
            let line = table
                .lines()
                .find(|line| line.contains(" 01 "))
                .unwrap_or_default();
            (&wait).write_all(format!("{line}\n").as_bytes())?;
            drop(wait);
            socket.send(b"own")?;
            hear(&socket)
        });
        let line = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            io::BufRead::read_line(&mut io::BufReader::new(&go), &mut line).unwrap();
            line
        })
        .await
        .unwrap();
        let (ip, port) = line
            .split_ascii_whitespace()
            .nth(2)
            .and_then(|remote| remote.split_once(':'))
            .unwrap_or_else(|| panic!("no connected socket: {line}"));
        let ip = u32::from_str_radix(ip, 16).unwrap().to_ne_bytes();
        let to = SocketAddr::new(ip.into(), u16::from_str_radix(port, 16).unwrap());
        assert_eq!(&ip[..1], &[127]);
        assert!(ip[1] >= 128, "{to}");
        let outside = scope();
        let sent = run(&outside, move || {
            unbound(to)?.send_to(b"stranger", to).map(|_| String::new())
        });
        sent.await.unwrap();
        let mut heard = talk(&mut capture);
        assert_eq!(heard.recv().await.unwrap().data, b"own");
        assert_eq!(app.result().await, Ok(answered(FAR4, 1, "own", FAR4)));
        // It was sent before what has arrived, or is dropped as well.
        tokio::task::yield_now().await;
        assert!(heard.try_recv().is_err());
    });
}

#[test]
fn ids_are_given_up_when_no_socket_has_them() {
    in_netns(async || {
        let (mut capture, scope) = capture(&[everything()]);
        let datagrams = capture.take_datagrams().unwrap();
        let mut ids = datagrams.ids;
        let ((ready, tell), (hold, release)) = (pipe().unwrap(), pipe().unwrap());
        let (ready, tell) = (File::from(ready), File::from(tell));
        let (hold, release) = (File::from(hold), File::from(release));
        let held = release.try_clone().unwrap();
        let app = App::start(&scope, move || {
            drop(held);
            let mut connected = Vec::new();
            for to in [FAR4, FAR6] {
                let socket = unbound(addr(to))?;
                socket.connect(addr(to))?;
                connected.push(socket);
            }
            unbound(addr(FAR4))?.send_to(b"x", "192.0.2.9:53")?;
            unbound(addr(FAR6))?.send_to(b"x", "[2001:db8::9]:53")?;
            (&tell).write_all(b"+")?;
            // Until it is killed or told.
            let _ = (&hold).read(&mut [0])?;
            Ok(String::new())
        });
        tokio::task::spawn_blocking(move || (&ready).read_exact(&mut [0]))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(ids.in_use(), 4);
        let tables = [Arc::new(UdpTables::open())];
        let mut collect = |idle| {
            let count = ids.collect(idle, &tables).unwrap();
            (count, ids.in_use())
        };
        assert_eq!(collect(Duration::from_secs(3600)), (0, 4));
        assert_eq!(collect(Duration::ZERO), (2, 2));
        (&release).write_all(b"+").unwrap();
        app.result().await.unwrap();
        assert_eq!(collect(Duration::ZERO), (2, 0));
    });
}

#[test]
fn no_connected_socket_sends_past_a_capture_that_has_ended() {
    in_netns(async || {
        let (capture, scope) = capture(&[everything()]);
        let ((ready, tell), (hold, release)) = (pipe().unwrap(), pipe().unwrap());
        let (ready, tell) = (File::from(ready), File::from(tell));
        let (hold, release) = (File::from(hold), File::from(release));
        let app = App::start(&scope, move || {
            let sockets = FAR.map(|to| {
                let socket = unbound(addr(to)).expect("a socket");
                socket.connect(addr(to)).expect("captured");
                socket
            });
            (&tell).write_all(b"+")?;
            (&hold).read_exact(&mut [0])?;
            let heard = sockets.map(|socket| {
                let _ = socket.send(b"x");
                let error = hear(&socket).expect_err("nobody is there");
                error.raw_os_error().unwrap_or(0).to_string()
            });
            Ok(heard.join(" "))
        });
        tokio::task::spawn_blocking(move || (&ready).read_exact(&mut [0]))
            .await
            .unwrap()
            .unwrap();
        super::harness::quiet(|| drop(capture));
        (&release).write_all(b"+").unwrap();
        // A closed port answers where loopback is all there is; where it is not, the socket has been ended.
        let (refused, aborted) = (libc::ECONNREFUSED, libc::ECONNABORTED);
        let expected = format!("{refused} {aborted} {refused}");
        assert_eq!(app.result().await, Ok(expected));
    });
}

#[test]
fn sockets_of_a_killed_agent_are_ended_before_its_route_goes() {
    in_netns(async || {
        leave_route();
        let socket = UdpSocket::bind("[::]:0").unwrap();
        socket.connect("[fde6:b481:678d:568e::7]:9").unwrap();
        // The next one captures no IPv6.
        let (_capture, _scope) = capture(&[rule(&["0.0.0.0/0"], 1)]);
        assert!(!route_is_there());
        // It is connected to nothing any more: with a default route, this would have left the host.
        let error = socket.send(b"x").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EDESTADDRREQ), "{error}");
    });
}

#[test]
fn a_program_that_tries_all_ports_does_not_exhaust_the_agent() {
    in_netns(async || {
        let (mut capture, scope) = capture(&[closed(&["192.0.2.0/24"], 1), everything()]);
        let heard = talk(&mut capture);
        let result = run(&scope, || {
            let socket = unbound(addr(FAR4))?;
            let mut refused = 0;
            for number in 0..66_000_u32 {
                let host = Ipv4Addr::new(192, 0, 2, (number / 60_000) as u8 + 1);
                let to = SocketAddr::from((host, (number % 60_000 + 1) as u16));
                match socket.send_to(b"x", to) {
                    Err(error) if error.raw_os_error() == Some(libc::ECONNREFUSED) => refused += 1,
                    sent => drop(sent?),
                }
            }
            // Those that have an id keep it.
            socket.send_to(b"x", "192.0.2.1:1")?;
            Ok(refused.to_string())
        });
        let refused: u64 = result.await.unwrap().parse().unwrap();
        let counters = capture.counters();
        assert_eq!(refused, 66_000 - u64::from(UDP_IDS_MAX), "{counters:?}");
        assert_eq!(
            (counters.udp_full, counters.refused),
            (refused, refused),
            "{counters:?}"
        );
        assert!(counters.udp_flows <= 16_384, "{counters:?}");
        drop(heard);
    });
}

#[test]
fn an_id_may_stand_for_the_agent_itself_and_for_loopback() {
    in_netns(async || {
        let (mut capture, scope) = capture(&[everything()]);
        let mut datagrams = capture.take_datagrams().unwrap();
        let stub = [0, 0, MAPPED, 0x7f00_0035_u32.to_be()];
        let destination = Destination {
            addr: stub,
            port: 53,
            peer: DNS_PEER,
            netns_cookie: capture.namespaces.own_cookie(),
            ..Destination::default()
        };
        datagrams.ids.assign(0x1234, &destination).unwrap();
        let port = capture.namespaces.own_entry().ports.udp4;
        let own = Arc::new(RequestQueue::default());
        tokio::task::spawn_local(datagrams.run(ToPeers(vec![Arc::clone(&own)]), FLOW_IDLE));
        let app = App::start(&scope, move || {
            let socket = unbound(addr(FAR4))?;
            exchange(
                &socket,
                SocketAddr::from(([127, 128, 0x12, 0x34], port)),
                "who",
            )
        });
        own.flows.available().await;
        let Some(FlowInput::Datagram(flow, data, _)) = own.flows.pop() else {
            panic!("a datagram")
        };
        assert_eq!(
            (&*flow.target.to_string(), &*data),
            ("127.0.0.53:53", &b"who"[..])
        );
        flow.end().deliver(b"me");
        assert_eq!(app.result().await, Ok("me from 127.0.0.53:53".into()));
    });
}

/// Leaves the route as an agent does that is killed.
fn leave_route() {
    let mut route = Route::open(Arc::new(UdpTables::open())).unwrap();
    route.add().unwrap();
    std::mem::forget(route);
}

/// Whether the route of IPv6 datagrams is there.
fn route_is_there() -> bool {
    let mut command = std::process::Command::new("ip");
    command.args(["-6", "route", "show", "table", "local"]);
    let output = super::harness::quiet(|| command.output()).expect("ip, from iproute2");
    String::from_utf8_lossy(&output.stdout).contains("fde6:b481:678d:568e::/64 dev lo")
}

#[test]
fn the_route_is_there_only_while_it_is_needed() {
    in_netns(async || {
        let load = |rules: Vec<CaptureRule>| {
            let config = CaptureConfig {
                rules,
                ..CaptureConfig::default()
            };
            Capture::load(&config).unwrap_or_else(|error| panic!("{error}"))
        };
        let tcp = CaptureRule {
            protocols: Protocols::Tcp,
            ..everything()
        };
        let mut capture = load(vec![rule(&["0.0.0.0/0"], 1), tcp.clone()]);
        assert!(!route_is_there());
        capture.update_rules(&[everything()]).unwrap();
        assert!(route_is_there());
        capture.update_rules(std::slice::from_ref(&tcp)).unwrap();
        assert!(!route_is_there());
        capture.update_rules(&[everything()]).unwrap();
        drop(capture);
        assert!(!route_is_there());
        // One that an agent which was killed has left is taken over, or removed.
        for rules in [vec![everything()], vec![tcp]] {
            leave_route();
            let wanted = rules == vec![everything()];
            let capture = load(rules);
            assert_eq!(route_is_there(), wanted);
            drop(capture);
            assert!(!route_is_there());
        }
    });
}
