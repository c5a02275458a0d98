//! Many connections at once.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::conformance::sys::PollFlags;
use anyhow::Context;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::Socket;

use crate::conformance::client::{Peer, Script, wait_for};
use crate::conformance::seen::{epoll_names, errno_name};
use crate::conformance::stream::{drain, put, take};
use crate::conformance::{Case, Family, Seen, sys};

pub const CASES: &[Case] = &[
    Case::new(
        "threads",
        "16 threads, each connects and talks 20 times",
        threads,
    ),
    Case::new(
        "one_after_the_other",
        "300 connections, each closed before the next",
        one_after_the_other,
    ),
    Case::new(
        "connections_1000",
        "1,000 connections stand at once, and all talk",
        thousand,
    )
    .heavy(),
    Case::new(
        "connections_10000",
        "10,000 connections in a burst, and all talk",
        ten_thousand,
    )
    .only(&[Family::V4, Family::V6])
    .heavy(),
];

/// What a burst may take; SYNs that are lost at a full queue are sent again after 1, 2, 4 s.
const LIMIT: Duration = Duration::from_secs(60);

fn threads(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.echo_to_many()?;
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                for _ in 0..20 {
                    let said = talk(peer, &script).unwrap_or_else(|e| format!("{e:#}"));
                    if said != "right" {
                        failures
                            .lock()
                            .unwrap_or_else(|e| e.into_inner())
                            .push(said);
                    }
                }
            });
        }
    });
    let mut failures = failures.into_inner().context("poisoned")?;
    failures.sort();
    failures.dedup();
    seen.note("failures", format!("{failures:?}"));
    Ok(())
}

fn talk(peer: &Peer, script: &Script<'_>) -> anyhow::Result<String> {
    let socket = peer.tcp()?;
    if let Err(error) = peer.connect(&socket, script.addr()) {
        return Ok(errno_name(&error));
    }
    put(&socket, b"hello")?;
    let echo = take(&socket, 5);
    socket.shutdown(std::net::Shutdown::Write)?;
    let end = drain(&socket);
    let right = echo.starts_with("5 bytes") && end.ends_with("then the end");
    Ok(if right {
        "right".to_owned()
    } else {
        format!("{echo}; {end}")
    })
}

fn one_after_the_other(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.echo_to_many()?;
    let mut right = 0;
    for _ in 0..300 {
        right += usize::from(talk(peer, &script)? == "right");
    }
    seen.note("right", right);
    Ok(())
}

fn thousand(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    burst(peer, seen, 1000)
}

fn ten_thousand(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    burst(peer, seen, 10_000)
}

/// Begins `count` connects without waiting, waits for all, and has all talk.
fn burst(peer: &Peer, seen: &mut Seen, count: usize) -> anyhow::Result<()> {
    let script = peer.echo_to_many()?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let mut sockets = Vec::with_capacity(count);
    let mut at_once = std::collections::BTreeSet::new();
    for number in 0..count {
        let socket = peer.tcp()?;
        socket.set_nonblocking(true)?;
        match peer.connect(&socket, script.addr()) {
            Ok(()) => at_once.insert("ok".to_owned()),
            Err(error) => at_once.insert(errno_name(&error)),
        };
        let flags = EpollFlags::EPOLLOUT | EpollFlags::EPOLLONESHOT;
        epoll.add(&socket, EpollEvent::new(flags, number as u64))?;
        sockets.push(socket);
    }
    seen.note("connect", format!("{at_once:?}"));

    let connected = await_all(&epoll, count)?;
    seen.note("events", format!("{connected:?}"));

    seen.note("right answers", all_talk(&sockets)?);
    Ok(())
}

/// Waits for an event of each; returns which there were.
fn await_all(epoll: &Epoll, count: usize) -> anyhow::Result<std::collections::BTreeSet<String>> {
    let deadline = Instant::now() + LIMIT;
    let mut events = vec![EpollEvent::empty(); 1024];
    let (mut waiting, mut kinds) = (count, std::collections::BTreeSet::new());
    while waiting > 0 && Instant::now() < deadline {
        let n = epoll.wait(&mut events, EpollTimeout::from(1000u16))?;
        for event in &events[..n] {
            kinds.insert(epoll_names(event.events()));
        }
        waiting -= n;
    }
    if waiting > 0 {
        kinds.insert(format!("{waiting} without an event"));
    }
    Ok(kinds)
}

fn all_talk(sockets: &[Socket]) -> anyhow::Result<usize> {
    for socket in sockets {
        socket.set_nonblocking(false)?;
        // One that is refused shows in the count.
        let _ = sys::send(socket, b"x", libc::MSG_NOSIGNAL);
    }
    let deadline = Instant::now() + LIMIT;
    let mut right = 0;
    for socket in sockets {
        let left = deadline.saturating_duration_since(Instant::now());
        wait_for(socket, PollFlags::POLLIN, left)?;
        let mut byte = [0; 1];
        let n = sys::recv(socket, &mut byte, libc::MSG_DONTWAIT);
        right += usize::from(n.is_ok_and(|n| n == 1) && byte == *b"x");
    }
    Ok(right)
}
