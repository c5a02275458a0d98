//! An agent with a gate, and what applications do that leave its network namespace.

use std::{collections::BTreeSet, io, net::Ipv4Addr, os::fd::AsRawFd as _, thread, time::Instant};

use nix::sched::{CloneFlags, unshare};
use session_ebpf_common::Namespace;
use tokio::sync::{mpsc, oneshot};

use super::harness::{PATIENCE, answer, ask, scope};
use crate::capture::{Capture, CaptureConfig, CaptureRule, Entered, GateEvent, Scope};

/// What the agent says of these ports.
const REFUSED: u16 = 81;
const UNREACHABLE: u16 = 82;

type Job = Box<dyn FnOnce(&mut Capture)>;

/// What is asked of the agent.
enum Ask {
    Survey(oneshot::Sender<()>),
    Do(Job),
}

/// An agent with a gate. It lets everything through but what goes to some ports.
pub struct Agent {
    asks: mpsc::UnboundedSender<Ask>,
}

impl Agent {
    /// Starts it with these rules, and makes a cgroup that it captures.
    pub fn start(rules: &[CaptureRule]) -> (Self, Scope) {
        Self::with_names(rules, false)
    }

    /// The same; `names`: whether it takes questions about names.
    pub fn with_names(rules: &[CaptureRule], names: bool) -> (Self, Scope) {
        let scope = scope();
        let mut capture = Capture::load(&CaptureConfig {
            rules: rules.to_vec(),
            gate: true,
            names,
            ..CaptureConfig::default()
        })
        .unwrap_or_else(|error| panic!("{error}"));
        capture
            .attach(scope.path())
            .unwrap_or_else(|error| panic!("{error}"));
        let (asks, inbox) = mpsc::unbounded_channel();
        tokio::task::spawn_local(live(capture, inbox));
        (Self { asks }, scope)
    }

    /// Does something with its capture.
    pub async fn with<T: 'static>(&self, job: impl FnOnce(&mut Capture) -> T + 'static) -> T {
        let (reply, answer) = oneshot::channel();
        let job = move |capture: &mut Capture| {
            let _ = reply.send(job(capture));
        };
        let sent = self.asks.send(Ask::Do(Box::new(job)));
        assert!(sent.is_ok(), "the agent lives");
        answer.await.expect("an answer")
    }

    /// Looks where its processes are, and settles that.
    pub async fn survey(&self) {
        let (reply, answer) = oneshot::channel();
        assert!(self.asks.send(Ask::Survey(reply)).is_ok());
        answer.await.expect("an answer");
    }

    /// In how many other namespaces it listens.
    pub async fn others(&self) -> usize {
        self.with(|capture| capture.other_namespaces()).await
    }

    /// What its programs know of them.
    pub async fn entries(&self) -> Vec<Namespace> {
        self.with(|capture| capture.namespaces.entries()).await
    }
}

async fn live(mut capture: Capture, mut inbox: mpsc::UnboundedReceiver<Ask>) {
    let mut gate = capture.take_gate().expect("a gate");
    let entrance = capture.entrance();
    loop {
        tokio::select! {
            asked = inbox.recv() => match asked {
                Some(Ask::Survey(reply)) => {
                    survey(&mut capture);
                    let _ = reply.send(());
                }
                Some(Ask::Do(job)) => job(&mut capture),
                None => return,
            },
            departed = capture.departed() => {
                capture.forget_departed(departed);
                survey(&mut capture);
            }
            opened = capture.opened() => capture.take_in(opened),
            event = gate.next() => match event.expect("the ring") {
                GateEvent::Newcomer(newcomer) => {
                    // What it says is seen by what follows.
                    capture.welcome(&newcomer);
                }
                GateEvent::Knock(knock) => {
                    match knock.original.port() {
                        REFUSED => gate.refuse(&knock, libc::ECONNREFUSED),
                        UNREACHABLE => gate.refuse(&knock, libc::EHOSTUNREACH),
                        _ => gate.admit(&knock).map(|_| ()),
                    }.expect("a raw socket");
                }
                GateEvent::Gone(_) | GateEvent::Postponed => {}
            },
            connection = entrance.accept() => {
                let connection = connection.expect("a connection");
                tokio::task::spawn_local(answer(connection));
            }
        }
    }
}

/// Looks where processes are, and settles that, until nothing is in doubt.
fn survey(capture: &mut Capture) {
    loop {
        let found = capture.survey().look();
        if !capture.settle(&found, &BTreeSet::new()) {
            return;
        }
    }
}

/// Listens where a process is.
pub async fn enter(capture: &mut Capture, pid: u32, netns: Option<u64>) -> Entered {
    let (reply, mut entered) = oneshot::channel();
    capture.enter(pid, netns, reply);
    loop {
        tokio::select! {
            biased;
            entered = &mut entered => return entered.expect("an answer"),
            opened = capture.opened() => capture.take_in(opened),
        }
    }
}

/// In an application: goes to a namespace of its own, with a loopback interface that is up or not.
pub fn leave(up: bool) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    if up { loopback_up() } else { Ok(()) }
}

/// Sets lo up, as netdevice(7) says.
pub fn loopback_up() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: a live descriptor, and the structure that the request reads.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// In an application: what several connects say, one after the other.
pub fn say(tos: &[&str]) -> String {
    let said = tos.iter().map(|to| match ask(to) {
        Ok(said) => said,
        Err(error) => format!(
            "{:?}",
            nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(0))
        ),
    });
    said.collect::<Vec<_>>().join("\n")
}

/// In an application: tries again and again.
pub fn until(mut good: impl FnMut() -> bool) -> io::Result<()> {
    let began = Instant::now();
    while !good() {
        if began.elapsed() > PATIENCE {
            return Err(io::Error::other("never"));
        }
        thread::yield_now();
    }
    Ok(())
}

/// Gives this thread CAP_SYS_ADMIN, or takes it away for the time being.
pub fn sys_admin(held: bool) -> io::Result<()> {
    capability(1 << 21, held)
}

/// The same with CAP_SYS_PTRACE.
pub fn sys_ptrace(held: bool) -> io::Result<()> {
    capability(1 << 19, held)
}

/// In this thread's effective set: capset(2).
fn capability(bit: u32, held: bool) -> io::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    // Two times effective, permitted and inheritable.
    let mut sets = [[0_u32; 3]; 2];
    // SAFETY: the header and the sets are as long as this version says.
    let got = unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()) };
    if held {
        sets[0][0] |= bit;
    } else {
        sets[0][0] &= !bit;
    }
    // SAFETY: as above.
    let set = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
    if got == 0 && set == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
