//! Captured processes in other network namespaces, where nothing is but a loopback interface.

use std::{
    fs::File,
    io::Read as _,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::Instant,
};

use nix::{
    sched::{CloneFlags, setns},
    unistd::{pipe, write},
};
use session_ebpf_common::Ports;
use tokio::time::timeout;
use tracing::level_filters::LevelFilter;

use super::{
    elsewhere::{Agent, enter, leave, loopback_up, say, sys_admin, sys_ptrace, until},
    harness::{App, PATIENCE, ask, captured, closed, everything, in_netns, run, scope},
};
use crate::capture::{
    Capture, CaptureConfig, CaptureError, NamespaceError,
    kernel::Kernel,
    namespaces::Namespaces,
    own_sockets,
    udp::{Half, Plan},
};

const FAR4: &str = "192.0.2.7:443";
const FAR6: &str = "[2001:db8::7]:443";
#[test]
fn the_first_connection_waits_until_the_agent_listens() {
    for to in [FAR4, FAR6] {
        in_netns(async move || {
            let (agent, scope) = Agent::start(&[everything()]);
            let said = run(&scope, move || {
                leave(true)?;
                Ok(say(&[to, FAR4, FAR6]))
            });
            let right = [to, FAR4, FAR6].map(|to| captured(to, 1)).join("\n");
            assert_eq!(said.await, Ok(right));
            let counters = agent.with(|capture| capture.counters()).await;
            assert_eq!(
                (counters.held, counters.held_again, counters.agent_gone),
                (3, 0, 0),
                "{counters:?}"
            );
            assert_eq!(
                (counters.delivered, counters.in_flight),
                (3, 0),
                "{counters:?}"
            );
        });
    }
}

#[test]
fn a_target_says_there_what_it_says_here() {
    in_netns(async || {
        let (_agent, scope) = Agent::start(&[everything()]);
        let said = run(&scope, || {
            leave(true)?;
            Ok(say(&[
                "192.0.2.7:81",
                "[2001:db8::7]:81",
                "192.0.2.7:82",
                "[2001:db8::7]:82",
            ]))
        });
        let right = "ECONNREFUSED\nECONNREFUSED\nEHOSTUNREACH\nEHOSTUNREACH";
        assert_eq!(said.await.as_deref(), Ok(right));
    });
}

#[test]
fn two_namespaces_have_400_connections_over_the_same_ports() {
    const EACH: usize = 200;
    in_netns(async || {
        let (agent, scope) = Agent::start(&[everything()]);
        let usual = agent.with(|capture| capture.namespaces.own_entry().ports);
        let usual = usual.await;
        // Both live until both are done.
        let ((wait, go), (wait_too, go_too)) = (pipe().unwrap(), pipe().unwrap());
        let start = |number: usize, mut wait: File| {
            App::start(&scope, move || {
                leave(true)?;
                let mut open = Vec::new();
                for index in 0..EACH {
                    let to = match index % 2 {
                        0 => format!("198.51.{number}.{index}:{}", 1000 + index),
                        _ => format!("[2001:db8:{number:x}::{index:x}]:{}", 1000 + index),
                    };
                    let stream = TcpStream::connect(to.parse::<SocketAddr>().unwrap())?;
                    let said = super::harness::greeting(&stream)?;
                    if said != captured(&to, 1) {
                        return Ok(said);
                    }
                    open.push(stream);
                }
                let mut byte = [0];
                wait.read_exact(&mut byte)?;
                Ok("all right".to_owned())
            })
        };
        let apps = [start(1, wait.into()), start(2, wait_too.into())];
        let began = Instant::now();
        while agent.with(|capture| capture.counters().delivered).await < 2 * EACH as u64 {
            assert!(began.elapsed() < PATIENCE);
            tokio::task::yield_now().await;
        }
        let ports: Vec<_> = agent.entries().await.iter().map(|e| e.ports).collect();
        assert_eq!(ports, [usual, usual]);
        write(&go, b"+").unwrap();
        write(&go_too, b"+").unwrap();
        for app in apps {
            assert_eq!(app.result().await.as_deref(), Ok("all right"));
        }
    });
}

#[test]
fn a_usual_port_that_is_taken_costs_one_connection() {
    in_netns(async || {
        let (agent, scope) = Agent::start(&[everything()]);
        let usual = agent.with(|capture| capture.namespaces.own().ports()).await;
        let said = run(&scope, move || {
            leave(true)?;
            let _taken = TcpListener::bind((Ipv4Addr::UNSPECIFIED, usual.v4))?;
            Ok(say(&[FAR4, FAR4, FAR6]))
        });
        // Nobody can change where the held SYN goes; the wrong server does not get it.
        let right = format!("ECONNREFUSED\n{}\n{}", captured(FAR4, 1), captured(FAR6, 1));
        assert_eq!(said.await, Ok(right));
    });
}

#[test]
fn a_process_that_is_entered_before_it_connects_needs_no_gate() {
    in_netns(async || {
        let scope = scope();
        let config = CaptureConfig {
            rules: vec![everything()],
            ..CaptureConfig::default()
        };
        let mut capture = Capture::load(&config).unwrap();
        capture.attach(scope.path()).unwrap();
        let ((mut there, here), (wait, go)) = {
            let ((there, here), (wait, go)) = (pipe().unwrap(), pipe().unwrap());
            ((File::from(there), here), (File::from(wait), go))
        };
        let app = App::start(&scope, move || {
            let mut wait = wait;
            leave(true)?;
            write(&here, b"+")?;
            wait.read_exact(&mut [0])?;
            Ok(say(&[FAR4, FAR6]))
        });
        there.read_exact(&mut [0]).unwrap();
        enter(&mut capture, app.pid().as_raw() as u32, None)
            .await
            .unwrap();
        enter(&mut capture, app.pid().as_raw() as u32, None)
            .await
            .unwrap();
        assert_eq!(capture.other_namespaces(), 1);
        let _reports = super::harness::serve(std::rc::Rc::new(capture));
        write(&go, b"+").unwrap();
        let right = format!("{}\n{}", captured(FAR4, 1), captured(FAR6, 1));
        assert_eq!(app.result().await, Ok(right));
    });
}

/// Ports at which somebody listens in a namespace: the state `0A` of proc(5), /proc/net/tcp.
fn listening(netns: File) -> usize {
    let look = move || {
        setns(netns, CloneFlags::CLONE_NEWNET).expect("the namespace");
        ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"]
            .map(|table| {
                let table = std::fs::read_to_string(table).unwrap_or_default();
                let is_listener = |line: &&str| line.split_whitespace().nth(3) == Some("0A");
                table.lines().filter(is_listener).count()
            })
            .iter()
            .sum()
    };
    thread::spawn(look).join().expect("a count")
}

#[test]
fn a_namespace_without_captured_processes_is_let_go() {
    in_netns(async || {
        let (agent, scope) = Agent::start(&[everything()]);
        let ((mut there, here), (mut wait, go)) = {
            let ((there, here), (wait, go)) = (pipe().unwrap(), pipe().unwrap());
            ((File::from(there), here), (File::from(wait), go))
        };
        let app = App::start(&scope, move || {
            leave(true)?;
            let said = ask(FAR4);
            write(&here, b"+")?;
            wait.read_exact(&mut [0])?;
            said
        });
        // Not on the thread that the agent lives on.
        tokio::task::spawn_blocking(move || there.read_exact(&mut [0]))
            .await
            .unwrap()
            .unwrap();
        let netns = File::open(format!("/proc/{}/ns/net", app.pid())).unwrap();
        agent.survey().await;
        assert_eq!(agent.others().await, 1, "somebody is there");
        assert_eq!(listening(netns.try_clone().unwrap()), 17);
        write(&go, b"+").unwrap();
        assert_eq!(app.result().await, Ok(captured(FAR4, 1)));
        // The end of the process is noticed without being asked for.
        let left = timeout(PATIENCE, async {
            while agent.others().await > 0 {
                tokio::task::yield_now().await;
            }
        });
        left.await.expect("it is left");
        let began = Instant::now();
        while listening(netns.try_clone().unwrap()) > 0 {
            assert!(began.elapsed() < PATIENCE);
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn a_loopback_interface_that_is_down_is_told_of_and_tried_again() {
    in_netns(async || {
        let shut = closed(&["198.51.100.0/24"], 1);
        let (agent, scope) = Agent::start(&[shut, everything()]);
        let said = run(&scope, || {
            leave(false)?;
            // Until the agent has looked, what is sent to it cannot leave.
            let first = say(&[FAR4]);
            until(|| say(&["198.51.100.1:80"]) == "ECONNREFUSED")?;
            let then = say(&[FAR4]);
            loopback_up()?;
            until(|| ask(FAR4).is_ok())?;
            Ok(format!("{first} {then}"))
        });
        // Nothing is reached there with or without us; but a rule that refuses is kept.
        assert_eq!(said.await.as_deref(), Ok("ENETUNREACH ENETUNREACH"));
        assert!(agent.with(|capture| capture.counters().agent_gone).await >= 2);
    });
}

#[test]
fn what_cannot_be_entered_is_told_apart() {
    in_netns(async || {
        let (mut capture, _scope) = super::harness::capture(&[everything()]);
        let nobody = enter(&mut capture, u32::MAX >> 1, None).await;
        assert!(
            nobody
                .as_ref()
                .is_err_and(|e| matches!(**e, NamespaceError::Ended { .. })),
            "{nobody:?}"
        );
        assert_eq!(capture.other_namespaces(), 0);
        let own = enter(&mut capture, nix::unistd::gettid().as_raw() as u32, None).await;
        assert!(own.is_ok(), "{own:?}");
        assert_eq!(capture.other_namespaces(), 0, "it is the agent's own");
    });
}

#[test]
fn a_process_that_may_not_be_looked_at_is_where_it_says() {
    in_netns(async || {
        // It holds more than the agent uses, as a command of root does where the agent's own set is bounded.
        sys_ptrace(false).unwrap();
        let (mut capture, scope) = super::harness::capture(&[everything()]);
        let (wait, go) = pipe().unwrap();
        let app = App::start(&scope, move || {
            File::from(wait).read_exact(&mut [0])?;
            ask(FAR4)
        });
        let pid = app.pid().as_raw() as u32;
        assert!(std::fs::metadata(format!("/proc/{pid}/ns/net")).is_err());
        let own = crate::capture::own_netns().unwrap();
        enter(&mut capture, pid, Some(own)).await.unwrap();
        enter(&mut capture, pid, None).await.unwrap();
        let elsewhere = enter(&mut capture, pid, Some(1)).await;
        assert!(
            elsewhere
                .as_ref()
                .is_err_and(|e| matches!(**e, NamespaceError::Hidden { .. })),
            "{elsewhere:?}"
        );
        let _reports = super::harness::serve(std::rc::Rc::new(capture));
        write(&go, b"+").unwrap();
        assert_eq!(app.result().await, Ok(captured(FAR4, 1)));
    });
}

#[test]
fn without_an_agent_connections_elsewhere_go_direct_or_are_refused() {
    in_netns(async || {
        let shut = closed(&["198.51.100.0/24"], 1);
        let (agent, scope) = Agent::start(&[shut, everything()]);
        agent.with(|capture| capture.marker.close()).await;
        let said = run(&scope, || {
            leave(true)?;
            Ok(say(&[FAR4, "198.51.100.1:80"]))
        });
        assert_eq!(said.await.as_deref(), Ok("ENETUNREACH\nECONNREFUSED"));
        let counters = agent.with(|capture| capture.counters()).await;
        assert_eq!((counters.agent_gone, counters.held), (2, 0), "{counters:?}");
    });
}

#[test]
fn an_agent_that_may_not_enter_leaves_connections_to_their_rules() {
    for capability in [sys_admin, sys_ptrace] {
        in_netns(async move || {
            capability(false).unwrap();
            let shut = closed(&["198.51.100.0/24"], 1);
            let (agent, scope) = Agent::start(&[shut, everything()]);
            let said = run(&scope, move || {
                capability(true)?;
                leave(true)?;
                Ok(say(&[FAR4, "198.51.100.1:80", FAR6]))
            });
            let right = "ENETUNREACH\nECONNREFUSED\nENETUNREACH";
            assert_eq!(said.await.as_deref(), Ok(right));
            let counters = agent.with(|capture| capture.counters()).await;
            assert_eq!((counters.agent_gone, counters.held), (3, 0), "{counters:?}");
        });
    }
}

#[test]
fn the_address_that_is_told_is_one_of_the_namespace() {
    in_netns(async || {
        let (_agent, scope) = Agent::start(&[everything()]);
        let said = run(&scope, || {
            leave(true)?;
            for line in [
                "link add e0 type veth peer name e1",
                "link set e0 up mtu 1400",
                "link set e1 up",
                "addr add 10.77.0.1/24 dev e0",
                "route add default via 10.77.0.2",
            ] {
                let status = std::process::Command::new("ip")
                    .args(line.split(' '))
                    .status()?;
                assert!(status.success(), "ip {line}");
            }
            // The agent looks when it enters, which the first connection makes it do.
            ask(FAR4)?;
            let stream = TcpStream::connect(FAR4.parse::<SocketAddr>().unwrap())?;
            super::harness::greeting(&stream)?;
            Ok(stream.local_addr()?.ip().to_string())
        });
        assert_eq!(said.await.as_deref(), Ok("10.77.0.1"));
    });
}

/// Elsewhere connections are captured all the same; here it would be an agent that captures half of what its rules say.
#[test]
fn without_sockets_for_datagrams_in_its_own_namespace_the_agent_does_not_begin() {
    in_netns(async || {
        let plan = Plan::new(&[everything()]).unwrap();
        let (own, mut sockets) = own_sockets(false, plan).unwrap();
        sockets.udp.as_mut().unwrap().spoil();
        let mut kernel =
            Kernel::load(Ports::default(), false, LevelFilter::OFF, None, None).unwrap();
        let udp = Half::new(&mut kernel, plan, &[everything()]).unwrap();
        let begun = Namespaces::begin(
            &mut kernel,
            tokio::runtime::Handle::current(),
            own,
            sockets,
            Ports::default(),
            udp,
        );
        let error = begun.unwrap_err();
        assert!(matches!(error, CaptureError::Runtime { .. }), "{error}");
    });
}
