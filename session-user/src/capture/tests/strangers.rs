//! What the agent cannot enter, and who is in the way there.

use std::{
    fs::File,
    io::{self, Read as _},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::{pipe, write},
};
use session_ebpf_common::{NAMESPACES_MAX, NetnsOfThread};
use socket2::{Domain, Socket, Type};

use super::{
    elsewhere::{Agent, enter, leave, say, until},
    harness::{App, PATIENCE, ask, captured, closed, everything, in_netns, run},
};
use crate::capture::{
    NamespaceError, Newcomer, Scope, kernel::knows_namespace, kernel_types::netns_of_thread,
    namespaces::OTHERS_MAX,
};

const FAR4: &str = "192.0.2.7:443";
const SHUT4: &str = "198.51.100.1:443";
/// Longer than it takes until a SYN is sent again, twice.
const TWO_RETRANSMISSIONS: Duration = Duration::from_millis(3500);

/// As many other namespaces as there may be, each with a process that stays.
async fn fill(agent: &Agent, scope: &Scope) -> Vec<(App, OwnedFd)> {
    let mut apps = Vec::new();
    for _ in 0..OTHERS_MAX {
        let (wait, go) = pipe().unwrap();
        let app = App::start(scope, move || {
            leave(true)?;
            let said = ask(FAR4)?;
            File::from(wait).read_exact(&mut [0])?;
            Ok(said)
        });
        apps.push((app, go));
    }
    let began = Instant::now();
    while agent.others().await < OTHERS_MAX {
        assert!(began.elapsed() < PATIENCE);
        tokio::task::yield_now().await;
    }
    apps
}

/// Lets them end.
async fn end(apps: Vec<(App, OwnedFd)>) {
    for (app, go) in apps {
        write(&go, b"+").unwrap();
        assert_eq!(app.result().await, Ok(captured(FAR4, 1)));
    }
}

#[test]
fn too_many_namespaces_leave_room_to_say_so() {
    in_netns(async || {
        let (agent, scope) = Agent::start(&[closed(&["198.51.100.0/24"], 1), everything()]);
        let apps = fill(&agent, &scope).await;
        let said = run(&scope, || {
            leave(true)?;
            // The first one waits until its SYN is sent again.
            Ok(say(&[FAR4, FAR4, SHUT4]))
        });
        let right = "ECONNREFUSED\nENETUNREACH\nECONNREFUSED";
        assert_eq!(said.await.as_deref(), Ok(right));
        // However many there were before, the programs hear of the next.
        let all_known = agent.with(|capture| {
            let error = NamespaceError::TooMany { max: OTHERS_MAX };
            let cookies = (1_u64 << 40)..(1 << 40) + 2 * u64::from(NAMESPACES_MAX);
            let mut known = cookies.map(|cookie| {
                capture
                    .namespaces
                    .refuse(&mut capture.kernel, cookie, &error);
                knows_namespace(&capture.kernel, cookie)
            });
            known.all(|known| known)
        });
        assert!(all_known.await);
        end(apps).await;
    });
}

#[test]
fn whoever_listens_where_the_agent_could_not_come_gets_nothing() {
    for to in [FAR4, SHUT4] {
        in_netns(async move || {
            let (agent, scope) = Agent::start(&[closed(&["198.51.100.0/24"], 1), everything()]);
            let usual = agent.with(|capture| capture.namespaces.own().ports()).await;
            let apps = fill(&agent, &scope).await;
            let said = run(&scope, move || {
                leave(true)?;
                let impostor = TcpListener::bind((Ipv4Addr::UNSPECIFIED, usual.v4))?;
                impostor.set_nonblocking(true)?;
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
                let to: SocketAddr = to.parse().map_err(io::Error::other)?;
                let connected = socket.connect_timeout(&to.into(), TWO_RETRANSMISSIONS);
                let accepted = impostor.accept().map(drop);
                let kind = |result: io::Result<()>| result.map_err(|error| error.kind());
                Ok(format!("{:?} {:?}", kind(connected), kind(accepted)))
            });
            let right = "Err(TimedOut) Err(WouldBlock)";
            assert_eq!(said.await.as_deref(), Ok(right));
            let counters = agent.with(|capture| capture.counters()).await;
            assert!(counters.held_again >= 1, "{counters:?}");
            end(apps).await;
        });
    }
}

#[test]
fn a_caller_who_is_elsewhere_keeps_nobody_out() {
    in_netns(async || {
        let (agent, scope) = Agent::start(&[everything()]);
        let said = run(&scope, || {
            let before = File::open("/proc/thread-self/ns/net")?;
            leave(true)?;
            let there = File::open("/proc/thread-self/ns/net")?;
            let of_there = || Socket::new(Domain::IPV4, Type::STREAM, None);
            let sockets = [of_there()?, of_there()?];
            setns(&before, CloneFlags::CLONE_NEWNET)?;
            let to: SocketAddr = FAR4.parse().map_err(io::Error::other)?;
            let said = sockets.map(|socket| {
                let error = socket.connect(&to.into()).err();
                error.map(|error| error.kind())
            });
            // Somebody who is there needs not wait for long.
            setns(&there, CloneFlags::CLONE_NEWNET)?;
            let began = Instant::now();
            until(|| ask(FAR4).is_ok())?;
            let soon = began.elapsed() < Duration::from_secs(20);
            Ok(format!("{said:?} {soon}"))
        });
        // Where the kernel does not tell where threads are, the agent has to look.
        let known = netns_of_thread() != NetnsOfThread::default();
        let first = if known {
            "NetworkUnreachable"
        } else {
            "ConnectionRefused"
        };
        let right = format!("[Some({first}), Some(NetworkUnreachable)] true");
        assert_eq!(said.await, Ok(right));
        assert_eq!(agent.with(|capture| capture.counters().not_held).await, 0);
    });
}

#[test]
fn a_thread_that_has_ended_is_asked_about_once() {
    in_netns(async || {
        let (mut capture, _scope) = super::harness::capture(&[everything()]);
        let cookie = 1 << 40;
        let newcomer = Newcomer {
            netns_cookie: cookie,
            tid: u32::MAX >> 1,
            tgid: u32::MAX >> 1,
        };
        assert!(capture.welcome(&newcomer), "others may be there: look");
        assert!(
            knows_namespace(&capture.kernel, cookie),
            "what waits there is answered"
        );
        // A busy machine may take longer between two than the refusal lasts.
        let told_before = (0..100).any(|_| !capture.welcome(&newcomer));
        assert!(told_before, "each time as if it were new");
        let again = async {
            while !capture.welcome(&newcomer) {
                tokio::task::yield_now().await;
            }
        };
        let again = tokio::time::timeout(PATIENCE, again).await;
        again.expect("told of before, but only for a moment");
    });
}

#[test]
fn a_namespace_is_closed_when_two_surveys_find_nobody() {
    in_netns(async || {
        let (mut capture, scope) = super::harness::capture(&[everything()]);
        let ((there, here), (wait, _go)) = (pipe().unwrap(), pipe().unwrap());
        let app = App::start(&scope, move || {
            leave(true)?;
            write(&here, b"+")?;
            File::from(wait).read_exact(&mut [0])?;
            Ok(String::new())
        });
        File::from(there).read_exact(&mut [0]).unwrap();
        let pid = app.pid();
        enter(&mut capture, pid.as_raw() as u32, None)
            .await
            .unwrap();
        let cookie = capture.namespaces.probes()[0].0;
        let look = |capture: &mut crate::capture::Capture, busy: &[u64]| {
            let found = capture.survey().look();
            let due = capture.settle(&found, &busy.iter().copied().collect());
            (due, capture.other_namespaces())
        };
        assert_eq!(look(&mut capture, &[]), (false, 1), "somebody is there");
        kill(pid, Signal::SIGKILL).unwrap();
        app.result().await.unwrap_err();
        assert_eq!(look(&mut capture, &[]), (true, 1));
        assert_eq!(look(&mut capture, &[cookie]), (false, 1), "somebody waits");
        assert_eq!(look(&mut capture, &[]), (true, 1));
        assert_eq!(look(&mut capture, &[]), (false, 0));
    });
}
