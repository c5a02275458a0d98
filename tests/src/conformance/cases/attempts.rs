//! Connections that do not come about.

use std::time::{Duration, Instant};

use crate::conformance::sys::PollFlags;

use crate::conformance::client::{Peer, first_events, settled};
use crate::conformance::seen::{errno_of, shown};
use crate::conformance::stream::{put, take};
use crate::conformance::wire::Step;
use crate::conformance::world::Place;
use crate::conformance::{Case, PURE, Seen, sys};

pub const CASES: &[Case] = &[
    Case::new("refused", "a closed port: ECONNREFUSED", |p, s| {
        waits(p, s, p.closed_port())
    }),
    Case::new("refused_nonblocking", "the same, with poll", |p, s| {
        polls(p, s, p.closed_port())
    }),
    Case::new("no_host", "an address without a host", |p, s| {
        waits(p, s, p.at(Place::NoHost, 80))
    }),
    Case::new("no_host_nonblocking", "the same, with poll", |p, s| {
        polls(p, s, p.at(Place::NoHost, 80))
    }),
    Case::new("no_network", "a network without a route", |p, s| {
        waits(p, s, p.at(Place::NoNetwork, 80))
    }),
    Case::new("no_network_nonblocking", "the same, with poll", |p, s| {
        polls(p, s, p.at(Place::NoNetwork, 80))
    }),
    Case::new("prohibited", "a firewall that says no by ICMP", |p, s| {
        waits(p, s, p.at(Place::Prohibited, 80))
    }),
    Case::new("prohibited_nonblocking", "the same, with poll", |p, s| {
        polls(p, s, p.at(Place::Prohibited, 80))
    }),
    Case::new(
        "silent_few_syns",
        "a silent address with TCP_SYNCNT 1: ETIMEDOUT after 3 s",
        few_syns,
    ),
    Case::new(
        "silent_user_timeout",
        "a silent address with TCP_USER_TIMEOUT: ETIMEDOUT",
        user_timeout,
    ),
    Case::new(
        "silent_send_timeout",
        "a silent address with SO_SNDTIMEO: EINPROGRESS",
        send_timeout,
    ),
    Case::new(
        "silent_in_progress",
        "a connect that goes on: poll, EALREADY, names, state, send, recv",
        in_progress,
    ),
    Case::new(
        "silent_closed",
        "close during connect, then another connect",
        closed,
    ),
    Case::new("silent_shutdown", "shutdown during connect", shut_down),
    Case::new(
        "silent_unspec",
        "AF_UNSPEC during connect, then another connect",
        unspec,
    ),
    Case::new(
        "silent_interrupted",
        "a signal interrupts connect: EINTR, then EALREADY",
        interrupted,
    ),
    Case::new(
        "connect_listener",
        "connect on a socket that listens: EISCONN",
        listener,
    ),
    Case::new(
        "connect_wrong_family",
        "an address of another family, and one that is too short",
        wrong_family,
    )
    .only(PURE),
    Case::new(
        "connect_port_zero",
        "a destination without a port",
        port_zero,
    ),
    Case::new(
        "not_connected",
        "send, recv, shutdown and names of a socket that never was connected",
        not_connected,
    ),
];

fn waits(peer: &Peer, seen: &mut Seen, to: std::net::SocketAddr) -> anyhow::Result<()> {
    let socket = peer.tcp()?;
    seen.call("connect", peer.connect(&socket, to));
    let error = socket.take_error()?.and_then(|e| e.raw_os_error());
    seen.note("SO_ERROR", errno_of(error.unwrap_or(0)));
    seen.note("recv", take(&socket, 1));
    Ok(())
}

fn polls(peer: &Peer, seen: &mut Seen, to: std::net::SocketAddr) -> anyhow::Result<()> {
    let socket = peer.tcp()?;
    socket.set_nonblocking(true)?;
    seen.call("connect", peer.connect(&socket, to));
    seen.note("poll", settled(&socket, PollFlags::POLLOUT)?);
    let error = socket.take_error()?.and_then(|e| e.raw_os_error());
    seen.note("SO_ERROR", errno_of(error.unwrap_or(0)));
    let error = socket.take_error()?.and_then(|e| e.raw_os_error());
    seen.note("SO_ERROR again", errno_of(error.unwrap_or(0)));
    seen.call("connect again", socket.connect(&to.into()));
    seen.note("recv", take(&socket, 1));
    Ok(())
}

fn few_syns(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let socket = peer.tcp()?;
    sys::set_option(&socket, libc::IPPROTO_TCP, libc::TCP_SYNCNT, 1)?;
    seen.call("connect", peer.connect(&socket, peer.at(Place::Silent, 80)));
    Ok(())
}

fn user_timeout(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let socket = peer.tcp()?;
    socket.set_tcp_user_timeout(Some(Duration::from_millis(800)))?;
    seen.call("connect", peer.connect(&socket, peer.at(Place::Silent, 80)));
    Ok(())
}

fn send_timeout(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let socket = peer.tcp()?;
    let limit = Duration::from_millis(300);
    socket.set_write_timeout(Some(limit))?;
    let began = Instant::now();
    seen.call("connect", peer.connect(&socket, peer.at(Place::Silent, 80)));
    // The kernel counts in ticks, and rounds.
    seen.note("it took its time", began.elapsed() > limit * 9 / 10);
    Ok(())
}

fn in_progress(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let to = peer.at(Place::Silent, 80);
    let socket = peer.tcp()?;
    socket.set_nonblocking(true)?;
    seen.call("connect", peer.connect(&socket, to));
    seen.note("poll", first_events(&socket, Duration::from_millis(300))?);
    seen.call("connect again", socket.connect(&to.into()));
    let name = socket.peer_addr().map(|_| "a name");
    seen.note("getpeername", shown(&name));
    seen.note("state", super::options::tcp_state(&socket)?);
    seen.call("send", sys::send(&socket, b"x", libc::MSG_NOSIGNAL));
    seen.call("recv", sys::recv(&socket, &mut [0; 1], 0));
    let error = socket.take_error()?.and_then(|e| e.raw_os_error());
    seen.note("SO_ERROR", errno_of(error.unwrap_or(0)));
    Ok(())
}

fn talks(peer: &Peer, seen: &mut Seen, socket: &socket2::Socket) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    socket.set_nonblocking(false)?;
    seen.call("connect elsewhere", peer.connect(socket, script.addr()));
    put(socket, b"hello")?;
    seen.note("echo", take(socket, 5));
    Ok(())
}

fn attempt(peer: &Peer, seen: &mut Seen) -> anyhow::Result<socket2::Socket> {
    let socket = peer.tcp()?;
    socket.set_nonblocking(true)?;
    seen.call("connect", peer.connect(&socket, peer.at(Place::Silent, 80)));
    Ok(socket)
}

fn closed(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    drop(attempt(peer, seen)?);
    talks(peer, seen, &peer.tcp()?)
}

fn shut_down(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let socket = attempt(peer, seen)?;
    seen.call("shutdown", socket.shutdown(std::net::Shutdown::Both));
    seen.note("poll", settled(&socket, PollFlags::empty())?);
    Ok(())
}

fn unspec(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let socket = attempt(peer, seen)?;
    seen.call("AF_UNSPEC", sys::disconnect(&socket));
    talks(peer, seen, &socket)
}

fn interrupted(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let to = peer.at(Place::Silent, 80);
    let socket = peer.tcp()?;
    sys::interrupt_after(200)?;
    seen.call("connect", peer.connect(&socket, to));
    socket.set_nonblocking(true)?;
    seen.call("connect again", socket.connect(&to.into()));
    Ok(())
}

fn listener(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let socket = peer.tcp()?;
    socket.bind(&peer.own(0).into())?;
    socket.listen(1)?;
    // The kernel refuses before any hook runs, so this one is not counted.
    let to = peer.closed_port();
    seen.call("connect", socket.connect(&to.into()));
    Ok(())
}

fn wrong_family(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let socket = peer.tcp()?;
    let other = if peer.v6() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let mut address = [0u8; 28];
    address[..2].copy_from_slice(&(other as u16).to_ne_bytes());
    let result = sys::connect_raw(&socket, &address);
    seen.call("connect", result);
    seen.call("connect in short", sys::connect_raw(&socket, &address[..8]));
    Ok(())
}

fn port_zero(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let socket = peer.tcp()?;
    // No rule is about port 0, so it is not captured.
    let to = peer.at(Place::Target, 0);
    seen.call("connect", socket.connect(&to.into()));
    Ok(())
}

fn not_connected(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let socket = peer.tcp()?;
    seen.call("send", sys::send(&socket, b"x", libc::MSG_NOSIGNAL));
    seen.call("recv", sys::recv(&socket, &mut [0; 1], 0));
    let ended = socket.shutdown(std::net::Shutdown::Write);
    seen.call("shutdown", ended);
    let name = socket.peer_addr().map(|_| "a name");
    seen.note("getpeername", shown(&name));
    seen.note("poll", settled(&socket, PollFlags::empty())?);
    // TCP takes an address only with MSG_FASTOPEN.
    let to = socket2::SockAddr::from(peer.closed_port());
    let sent = socket.send_to_with_flags(b"x", &to, libc::MSG_NOSIGNAL);
    seen.call("sendto", sent);
    Ok(())
}
