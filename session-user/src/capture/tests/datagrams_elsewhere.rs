//! Datagrams of captured processes in other network namespaces, where nothing is but a loopback interface.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nix::{
    sched::{CloneFlags, setns},
    unistd::pipe,
};
use session_ebpf_common::NetnsOfThread;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::mpsc;

use super::{
    elsewhere::{Agent, leave, loopback_up, sys_admin, until},
    harness::{
        App, Heard, PATIENCE, PEERS, answered, ask, closed, everything, exchange, hear, in_netns,
        quiet, rule, run, talk,
    },
};
use crate::capture::kernel_types::netns_of_thread;
use crate::capture::udp::{Route, UdpTables};

const FAR4: &str = "192.0.2.7:443";
const FAR6: &str = "[2001:db8::7]:443";
const MAPPED: &str = "[::ffff:192.0.2.7]:443";
const SHUT4: &str = "198.51.100.1:443";
const SHUT6: &str = "[2001:db8:5::1]:443";

fn addr(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// A socket that nobody has bound.
fn unbound(to: &str) -> io::Result<UdpSocket> {
    let family = Domain::for_address(addr(to));
    let socket = Socket::new(family, Type::DGRAM, Some(Protocol::UDP))?;
    Ok(socket.into())
}

/// In an application: a datagram by a socket that is connected or not, and what comes back.
fn say(to: &str, connected: bool, text: &str) -> io::Result<String> {
    let socket = unbound(to)?;
    if !connected {
        return exchange(&socket, addr(to), text);
    }
    socket.connect(addr(to))?;
    assert_eq!(socket.peer_addr()?, addr(to));
    socket.send(text.as_bytes())?;
    hear(&socket)
}

/// In an application: what [`say`] says, or its error by name.
fn outcome(to: &str, connected: bool) -> String {
    say(to, connected, "x").unwrap_or_else(|error| {
        let errno = nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(0));
        format!("{errno:?}")
    })
}

/// In an application that does not wait for long: whether there is an answer.
fn answers_soon(to: &str) -> io::Result<()> {
    let socket = unbound(to)?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    socket.connect(addr(to))?;
    socket.send(b"x")?;
    socket.recv(&mut [0; 100]).map(drop)
}

/// An agent that answers datagrams, as [`talk`] does.
async fn talking(agent: &Agent) -> mpsc::UnboundedReceiver<Heard> {
    agent.with(talk).await
}

#[test]
fn the_first_datagram_waits_until_the_agent_is_there() {
    for (to, known) in [(FAR4, FAR4), (MAPPED, FAR4)] {
        for connected in [false, true] {
            in_netns(async move || {
                let (agent, scope) = Agent::start(&[everything()]);
                let _heard = talking(&agent).await;
                let said = run(&scope, move || {
                    leave(true)?;
                    say(to, connected, "hello")?;
                    say(to, connected, "again")
                });
                assert_eq!(said.await, Ok(answered(known, 1, "again", to)));
                let counters = agent.with(|capture| capture.counters()).await;
                assert_eq!(
                    (counters.udp4, counters.agent_gone, counters.udp_dropped),
                    (2, 0, 0),
                    "{counters:?}"
                );
            });
        }
    }
}

fn datagrams() -> [Vec<u8>; 3] {
    [vec![], b"one".to_vec(), vec![7; 1900]]
}

#[test]
fn many_at_once_wait_and_arrive_as_they_were() {
    in_netns(async || {
        let (agent, scope) = Agent::start(&[everything()]);
        let mut heard = talking(&agent).await;
        let said = run(&scope, || {
            leave(true)?;
            let socket = unbound(FAR4)?;
            // The longest is lost, as any may be.
            socket.send_to(&[8; 9000], addr(FAR4))?;
            for data in datagrams() {
                socket.send_to(&data, addr(FAR4))?;
            }
            hear(&socket)
        });
        said.await.unwrap();
        let mut missing = datagrams().to_vec();
        while !missing.is_empty() {
            let data = heard.recv().await.unwrap().data;
            missing.retain(|other| *other != data);
        }
    });
}

#[test]
fn programs_at_two_levels_hold_a_datagram_once() {
    in_netns(async || {
        let (agent, outer) = Agent::start(&[everything()]);
        let inner = crate::capture::Scope::create(outer.path(), "inner").unwrap();
        let path = inner.path().to_owned();
        let attached = agent.with(move |capture| capture.attach(&path));
        attached.await.unwrap();
        let mut heard = talking(&agent).await;
        let said = run(&inner, || {
            leave(true)?;
            say(FAR4, true, "first")?;
            say(FAR4, true, "last")
        });
        assert_eq!(said.await, Ok(answered(FAR4, 1, "last", FAR4)));
        for text in ["first", "last"] {
            assert_eq!(heard.recv().await.unwrap().data, text.as_bytes());
        }
    });
}

#[test]
fn what_is_not_held_goes_by_its_rule_until_the_agent_is_there() {
    in_netns(async || {
        let shut = closed(&["198.51.100.0/24", "2001:db8:5::/48"], 1);
        let (agent, scope) = Agent::with_names(&[shut, everything()], true);
        let _heard = talking(&agent).await;
        for (first, before) in [
            // No address there stands for an IPv6 destination before the agent has come.
            (FAR6, "ENETUNREACH"),
            (SHUT6, "ECONNREFUSED"),
            // A question whose first datagram seems to fail is not asked again.
            ("203.0.113.1:53", "ENETUNREACH"),
        ] {
            for connected in [false, true] {
                let said = run(&scope, move || {
                    leave(true)?;
                    let said = outcome(first, connected);
                    until(|| say(first, connected, "x").is_ok())?;
                    Ok(said)
                });
                assert_eq!(said.await.as_deref(), Ok(before), "{first} {connected}");
                // Looking who is left where it was, the agent might find the next one before it says anything.
                comes_to(async || agent.others().await == 0).await;
            }
        }
        // Where it may not go direct it is held all the same.
        let said = run(&scope, || {
            leave(true)?;
            say("198.51.100.1:53", true, "x")
        });
        assert!(said.await.is_ok());
    });
}

#[test]
fn every_family_works_where_only_loopback_is() {
    in_netns(async || {
        let (agent, scope) = Agent::start(&[everything()]);
        let _heard = talking(&agent).await;
        let said = run(&scope, || {
            leave(true)?;
            // Now the agent is there.
            ask(FAR4)?;
            for (to, known) in [(FAR4, FAR4), (FAR6, FAR6), (MAPPED, FAR4)] {
                for connected in [false, true] {
                    let said = say(to, connected, "x")?;
                    assert_eq!(said, answered(known, 1, "x", to));
                }
                let socket = unbound(to)?;
                socket.connect(addr(to))?;
                socket.send(b"refuse")?;
                let error = hear(&socket).expect_err("the target refuses");
                assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED), "{to}");
            }
            Ok("all right".to_owned())
        });
        assert_eq!(said.await.as_deref(), Ok("all right"));
    });
}

#[test]
fn questions_about_names_come_from_there_but_for_those_to_its_own_resolver() {
    in_netns(async || {
        let (agent, scope) = Agent::with_names(&[], true);
        let _heard = talking(&agent).await;
        let said = run(&scope, || {
            leave(true)?;
            // A question by TCP waits for the agent.
            ask("203.0.113.1:53")?;
            let captured = say("203.0.113.1:53", true, "x")?;
            let local = outcome("127.0.0.53:53", true);
            Ok(format!("{captured} {local}"))
        });
        let captured = answered("203.0.113.1:53", PEERS - 1, "x", "203.0.113.1:53");
        assert_eq!(said.await, Ok(format!("{captured} ECONNREFUSED")));
    });
}

#[test]
fn two_namespaces_talk_from_the_same_port_at_once() {
    const EACH: usize = 300;
    in_netns(async || {
        let (agent, scope) = Agent::start(&[everything()]);
        let _heard = talking(&agent).await;
        let start = |name: &'static str| {
            App::start(&scope, move || {
                leave(true)?;
                ask(FAR4)?;
                for to in [FAR4, FAR6] {
                    let any = if to == FAR4 { "0.0.0.0" } else { "[::]" };
                    let socket = UdpSocket::bind(format!("{any}:4711"))?;
                    for number in 0..EACH {
                        let text = format!("{name} {number}");
                        let said = exchange(&socket, addr(to), &text)?;
                        if said != answered(to, 1, &text, to) {
                            return Ok(said);
                        }
                    }
                }
                Ok("all right".to_owned())
            })
        };
        let apps = [start("one"), start("two")];
        for app in apps {
            assert_eq!(app.result().await.as_deref(), Ok("all right"));
        }
        // What the agent leaves has no flows.
        let counters = || agent.with(|capture| capture.counters());
        comes_to(async || agent.others().await == 0 && counters().await.udp_flows == 0).await;
        let counters = counters().await;
        let each = 2 * EACH as u64;
        assert_eq!(
            (counters.udp4, counters.udp6, counters.udp_dropped),
            (each, each, 0),
            "{counters:?}"
        );
    });
}

#[test]
fn an_id_is_of_no_use_in_another_namespace() {
    in_netns(async || {
        let (agent, scope) = Agent::start(&[everything()]);
        let mut heard = talking(&agent).await;
        let ((told, tell), (wait, go)) = (pipe().unwrap(), pipe().unwrap());
        let (mut told, mut tell) = (File::from(told), File::from(tell));
        let app = App::start(&scope, move || {
            leave(true)?;
            let socket = UdpSocket::bind("0.0.0.0:4711")?;
            socket.connect(addr(FAR4))?;
            socket.send(b"own")?;
            hear(&socket)?;
            // Where it is connected to: the line of the one such socket, proc(5).
            let table = std::fs::read_to_string("/proc/thread-self/net/udp")?;
            let line = table.lines().find(|line| line.contains(" 01 "));
            let remote = line.and_then(|line| line.split_ascii_whitespace().nth(2));
            tell.write_all(remote.unwrap_or_default().as_bytes())?;
            drop(tell);
            File::from(wait).read_exact(&mut [0])?;
            Ok(String::new())
        });
        assert_eq!(heard.recv().await.unwrap().data, b"own");
        let remote = tokio::task::spawn_blocking(move || {
            let mut remote = String::new();
            told.read_to_string(&mut remote).map(|_| remote)
        });
        let remote = remote.await.unwrap().unwrap();
        let (ip, port) = remote.split_once(':').unwrap();
        let ip = u32::from_str_radix(ip, 16).unwrap().to_ne_bytes();
        let to = SocketAddr::from((ip, u16::from_str_radix(port, 16).unwrap()));
        // From the very address and port that has the flow there.
        let stranger = run(&scope, move || {
            leave(true)?;
            ask(FAR4)?;
            let socket = UdpSocket::bind("0.0.0.0:4711")?;
            socket.connect(to)?;
            socket.send(b"stranger")?;
            hear(&socket)
        });
        assert_eq!(stranger.await, Err("ECONNREFUSED".to_owned()));
        assert!(heard.try_recv().is_err(), "it was heard");
        nix::unistd::write(&go, b"+").unwrap();
        app.result().await.unwrap();
    });
}

#[test]
fn a_usual_port_that_is_taken_costs_one_datagram() {
    in_netns(async || {
        let (agent, scope) = Agent::start(&[everything()]);
        let _heard = talking(&agent).await;
        let usual = agent.with(|capture| capture.namespaces.own_entry().ports);
        let usual = usual.await.udp4;
        let said = run(&scope, move || {
            leave(true)?;
            let impostor = UdpSocket::bind(("0.0.0.0", usual))?;
            impostor.set_nonblocking(true)?;
            let socket = unbound(FAR4)?;
            socket.connect(addr(FAR4))?;
            socket.send(b"first")?;
            let error = hear(&socket).expect_err("nobody else's");
            assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED));
            socket.connect(addr(FAR4))?;
            socket.send(b"x")?;
            let said = hear(&socket)?;
            let got = impostor.recv(&mut [0; 100]).map_err(|error| error.kind());
            assert_eq!(got, Err(io::ErrorKind::WouldBlock));
            Ok(said)
        });
        assert_eq!(said.await, Ok(answered(FAR4, 1, "x", FAR4)));
    });
}

#[test]
fn where_the_agent_cannot_come_datagrams_go_by_their_rules() {
    in_netns(async || {
        sys_admin(false).unwrap();
        let shut = closed(&["198.51.100.0/24", "2001:db8:5::/48"], 1);
        let (agent, scope) = Agent::start(&[shut, everything()]);
        let said = run(&scope, || {
            sys_admin(true)?;
            leave(true)?;
            let all = [FAR4, SHUT4, FAR6, SHUT6].map(|to| outcome(to, false));
            Ok(all.join(" "))
        });
        let right = "ENETUNREACH ECONNREFUSED ENETUNREACH ECONNREFUSED";
        assert_eq!(said.await.as_deref(), Ok(right));
        let counters = agent.with(|capture| capture.counters()).await;
        assert_eq!((counters.agent_gone, counters.udp4), (4, 0), "{counters:?}");
    });
}

#[test]
fn what_the_agent_would_look_for_at_the_wrong_thread_goes_by_its_rule() {
    in_netns(async || {
        if netns_of_thread() == NetnsOfThread::default() {
            println!("not run: the kernel does not tell where threads are");
            return;
        }
        let shut = closed(&["198.51.100.0/24"], 1);
        let (agent, scope) = Agent::start(&[shut, everything()]);
        let _heard = talking(&agent).await;
        let said = run(&scope, || {
            let here = File::open("/proc/thread-self/ns/net")?;
            leave(true)?;
            let sockets = [unbound(FAR4)?, unbound(SHUT4)?];
            setns(&here, CloneFlags::CLONE_NEWNET)?;
            let sent = sockets.iter().zip([FAR4, SHUT4]);
            let sent = sent.map(|(socket, to)| socket.send_to(b"x", to).map_err(|e| e.kind()));
            let sent: Vec<_> = sent.collect();
            // Its own namespace is another matter.
            Ok(format!("{sent:?} {}", say(FAR4, false, "x")?))
        });
        let right = answered(FAR4, 1, "x", FAR4);
        let right = format!("[Err(NetworkUnreachable), Err(ConnectionRefused)] {right}");
        assert_eq!(said.await, Ok(right));
        let counters = agent.with(|capture| capture.counters()).await;
        assert_eq!((counters.agent_gone, counters.udp4), (2, 1), "{counters:?}");
    });
}

#[test]
fn a_loopback_interface_that_comes_up_lets_datagrams_through() {
    in_netns(async || {
        let (agent, scope) = Agent::start(&[everything()]);
        let _heard = talking(&agent).await;
        let said = run(&scope, || {
            leave(false)?;
            let first = outcome(FAR4, true);
            loopback_up()?;
            until(|| answers_soon(FAR4).is_ok())?;
            Ok(first)
        });
        assert_eq!(said.await.as_deref(), Ok("ENETUNREACH"));
    });
}

/// Whether the route of IPv6 datagrams is in a network namespace.
fn has_route(netns: &File) -> bool {
    let netns = netns.try_clone().expect("a descriptor");
    let look = move || {
        setns(netns, CloneFlags::CLONE_NEWNET).expect("the namespace");
        let mut command = std::process::Command::new("ip");
        command.args(["-6", "route", "show", "table", "local"]);
        let output = quiet(|| command.output()).expect("ip, from iproute2");
        String::from_utf8_lossy(&output.stdout).contains("fde6:b481:678d:568e::/64 dev lo")
    };
    thread::spawn(look).join().expect("an answer")
}

/// Looks again and again, while the agent lives on.
async fn comes_to(mut good: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !good().await {
        assert!(began.elapsed() < PATIENCE, "never");
        tokio::task::yield_now().await;
    }
}

/// A process in a network namespace where the agent is, connected and waiting to be told; and what tells it.
async fn resident(scope: &crate::capture::Scope) -> (App, File) {
    let (wait, go) = pipe().unwrap();
    let (connected, tell) = pipe().unwrap();
    let app = App::start(scope, move || {
        leave(true)?;
        ask(FAR4)?;
        let socket = unbound(FAR6)?;
        socket.connect(addr(FAR6))?;
        File::from(tell).write_all(b"+")?;
        File::from(wait).read_exact(&mut [0])?;
        let _ = socket.send(b"x");
        Ok(match hear(&socket) {
            Ok(said) => said,
            Err(error) => error.raw_os_error().unwrap_or(0).to_string(),
        })
    });
    let waits = tokio::task::spawn_blocking(|| File::from(connected).read_exact(&mut [0]));
    waits.await.unwrap().expect("it connects");
    (app, File::from(go))
}

#[test]
fn the_route_is_there_as_long_as_the_agent() {
    in_netns(async || {
        for agent_ends in [false, true] {
            let (agent, scope) = Agent::start(&[everything()]);
            let _heard = talking(&agent).await;
            let (app, mut go) = resident(&scope).await;
            comes_to(async || agent.others().await == 1).await;
            let netns = File::open(format!("/proc/{}/ns/net", app.pid())).unwrap();
            assert!(has_route(&netns));
            if agent_ends {
                drop(agent);
                comes_to(async || !has_route(&netns)).await;
                go.write_all(b"+").unwrap();
                // What it is connected to would lead elsewhere now: it was ended.
                let aborted = libc::ECONNABORTED.to_string();
                assert_eq!(app.result().await, Ok(aborted));
            } else {
                go.write_all(b"+").unwrap();
                assert_eq!(app.result().await, Ok(answered(FAR6, 1, "x", FAR6)));
                comes_to(async || agent.others().await == 0).await;
                comes_to(async || !has_route(&netns)).await;
            }
        }
    });
}

#[test]
fn the_route_follows_the_rules_there_too() {
    in_netns(async || {
        let (agent, scope) = Agent::start(&[everything()]);
        let (app, mut go) = resident(&scope).await;
        comes_to(async || agent.others().await == 1).await;
        let netns = File::open(format!("/proc/{}/ns/net", app.pid())).unwrap();
        for v6 in [true, false, true] {
            let net = if v6 { "::/0" } else { "0.0.0.0/0" };
            let rules = [rule(&[net], 1)];
            let updated = agent.with(move |capture| capture.update_rules(&rules));
            updated.await.unwrap();
            assert_eq!(has_route(&netns), v6);
            let entries = agent.entries().await;
            assert_eq!(entries[0].ports.udp6 != 0, v6, "{entries:?}");
        }
        go.write_all(b"+").unwrap();
        app.result().await.unwrap();
    });
}

#[test]
fn a_route_that_was_taken_over_stays() {
    in_netns(async || {
        let netns = File::open("/proc/thread-self/ns/net").unwrap();
        let open = || Route::open(Arc::new(UdpTables::open())).unwrap();
        let (mut old, mut new) = (open(), open());
        old.add().unwrap();
        let heir = old.heir();
        new.add().unwrap();
        assert!(heir.is_awaited());
        heir.take_over();
        drop(old);
        assert!(has_route(&netns) && !heir.is_awaited());
        drop(new);
        assert!(!has_route(&netns));
    });
}

#[test]
fn the_route_of_a_killed_agent_goes_there_too() {
    in_netns(async || {
        let (agent, scope) = Agent::start(&[rule(&["0.0.0.0/0"], 1)]);
        let ((told, tell), (wait, go)) = (pipe().unwrap(), pipe().unwrap());
        let app = App::start(&scope, move || {
            leave(true)?;
            let mut route = Route::open(Arc::new(UdpTables::open()))?;
            route.add()?;
            // As such an agent leaves it.
            std::mem::forget(route);
            File::from(tell).write_all(b"+")?;
            File::from(wait).read_exact(&mut [0])?;
            ask(FAR4)
        });
        let ready = tokio::task::spawn_blocking(move || File::from(told).read_exact(&mut [0]));
        ready.await.unwrap().unwrap();
        let netns = File::open(format!("/proc/{}/ns/net", app.pid())).unwrap();
        assert!(has_route(&netns));
        nix::unistd::write(&go, b"+").unwrap();
        assert!(app.result().await.is_ok());
        assert!(!has_route(&netns));
        drop(agent);
    });
}
