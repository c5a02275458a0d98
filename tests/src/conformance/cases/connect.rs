//! Connections that come about.

use std::io;
use std::time::Duration;

use anyhow::Context;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::conformance::client::{Peer, first_events, settled, wait_for};
use crate::conformance::seen::{errno_of, shown};
use crate::conformance::stream::{put, take};
use crate::conformance::sys::PollFlags;
use crate::conformance::wire::Step;
use crate::conformance::world::Place;
use crate::conformance::{Case, Seen, sys};

pub const CASES: &[Case] = &[
    Case::new("connect", "connects and waits; talks", connect),
    Case::new(
        "connect_nonblocking",
        "EINPROGRESS, POLLOUT, SO_ERROR, connect again: done, then EISCONN",
        nonblocking,
    ),
    Case::new(
        "connect_connected",
        "connect on a connected socket: EISCONN, and it goes on",
        connected,
    ),
    Case::new(
        "connect_unspec_reconnect",
        "dissolves the association by AF_UNSPEC and connects elsewhere",
        unspec,
    ),
    Case::new(
        "connect_after_refused",
        "the same socket connects after a refusal",
        after_refused,
    ),
    Case::new(
        "connect_first_of_many",
        "tries addresses one after the other until one works",
        first_of_many,
    ),
    Case::new(
        "connect_happy_eyeballs",
        "starts the next attempt while the last is silent (RFC 8305)",
        happy_eyeballs,
    ),
    Case::new(
        "connect_while_polling",
        "one thread polls while another connects",
        while_polling,
    ),
    Case::new(
        "connect_accepted_late",
        "the server listens and accepts later; what was sent meanwhile arrives",
        accepted_late,
    ),
    Case::new(
        "connect_backlog_full",
        "the server's accept queue is full, then not",
        backlog_full,
    ),
    Case::new(
        "connect_fast_open",
        "MSG_FASTOPEN: data with the connect, twice",
        fast_open,
    ),
    Case::new(
        "connect_fast_open_option",
        "TCP_FASTOPEN_CONNECT: the connect waits for the first write",
        fast_open_option,
    ),
    Case::new("connect_mptcp", "a Multipath TCP socket", mptcp),
    Case::new(
        "connect_link_local",
        "a link-local destination with and without its scope",
        link_local,
    )
    .only(&[crate::conformance::Family::V6]),
    Case::new(
        "connect_loopback",
        "a server on the own host, and a closed port there",
        loopback,
    ),
    Case::new(
        "connect_v6only",
        "an IPV6_V6ONLY socket to an IPv6 address",
        v6only,
    )
    .only(&[crate::conformance::Family::V6]),
    Case::new(
        "connect_v6only_mapped",
        "an IPV6_V6ONLY socket to a v4-mapped address",
        v6only_mapped,
    )
    .only(&[crate::conformance::Family::Mapped]),
];

fn hello(seen: &mut Seen, socket: &Socket) -> anyhow::Result<()> {
    put(socket, b"hello")?;
    seen.note("echo", take(socket, 5));
    Ok(())
}

fn connect(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.tcp()?;
    seen.call("connect", peer.connect(&socket, script.addr()));
    seen.note("poll", settled(&socket, PollFlags::POLLOUT)?);
    hello(seen, &socket)?;
    drop(socket);
    seen.peer(script.report()?);
    Ok(())
}

fn nonblocking(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.tcp()?;
    peer.connect_later(seen, &socket, script.addr())?;
    let to = SockAddr::from(script.addr());
    seen.call("connect again", socket.connect(&to));
    seen.call("and again", socket.connect(&to));
    socket.set_nonblocking(false)?;
    hello(seen, &socket)
}

fn connected(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.dial(&script)?;
    let elsewhere = peer.at(Place::Target, 9);
    seen.call("connect elsewhere", socket.connect(&elsewhere.into()));
    seen.call("connect again", socket.connect(&script.addr().into()));
    hello(seen, &socket)
}

fn unspec(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let first = peer.script(&[Step::Read(5), Step::ReadToEnd])?;
    let second = peer.script(&[Step::Echo])?;
    let socket = peer.dial(&first)?;
    put(&socket, b"first")?;
    seen.call("AF_UNSPEC", sys::disconnect(&socket));
    let name = socket.peer_addr().map(|_| "a name");
    seen.note("getpeername", shown(&name));
    seen.call("connect", peer.connect(&socket, second.addr()));
    hello(seen, &socket)?;
    let name = socket.peer_addr()?.as_socket() == Some(second.addr());
    seen.note("getpeername is the second", name);
    Ok(())
}

fn after_refused(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.tcp()?;
    seen.call("connect", peer.connect(&socket, peer.closed_port()));
    seen.call("connect again", peer.connect(&socket, script.addr()));
    hello(seen, &socket)
}

fn first_of_many(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let all = [
        peer.closed_port(),
        peer.at(Place::NoHost, 80),
        peer.at(Place::NoNetwork, 80),
        script.addr(),
    ];
    for (number, addr) in all.into_iter().enumerate() {
        let socket = peer.tcp()?;
        let what = format!("attempt {number}");
        if seen.call(&what, peer.connect(&socket, addr)).is_some() {
            return hello(seen, &socket);
        }
    }
    Ok(())
}

fn happy_eyeballs(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let mut attempts = Vec::new();
    for addr in [peer.at(Place::Silent, 80), script.addr()] {
        let socket = peer.tcp()?;
        socket.set_nonblocking(true)?;
        seen.call("connect", peer.connect(&socket, addr));
        // RFC 8305 recommends 250 ms before the next attempt.
        let events = first_events(&socket, Duration::from_millis(250))?;
        seen.note("poll", &events);
        attempts.push(socket);
        if events == "OUT" {
            break;
        }
    }
    seen.note("attempts", attempts.len());
    let last = attempts.pop().context("no attempt")?;
    last.set_nonblocking(false)?;
    hello(seen, &last)
}

fn while_polling(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.tcp()?;
    socket.set_nonblocking(true)?;
    // A socket that is not connected yet says OUT|HUP at once: the poller waits for data instead.
    let polled = std::thread::scope(|scope| -> anyhow::Result<String> {
        let connected = peer.connect(&socket, script.addr());
        let poller = scope.spawn(|| wait_for(&socket, PollFlags::POLLIN, Duration::from_secs(5)));
        seen.call("connect", connected);
        seen.note("poll", first_events(&socket, Duration::from_secs(5))?);
        put(&socket, b"hello")?;
        let polled = poller
            .join()
            .map_err(|_| anyhow::anyhow!("the poller panicked"))??;
        Ok(crate::conformance::seen::poll_names(polled))
    })?;
    seen.note("the other thread's poll", polled);
    seen.note("echo", take(&socket, 5));
    Ok(())
}

fn accepted_late(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let mut tcp = peer.plain(&[Step::Read(5), Step::Say(b"late".to_vec())]);
    tcp.accept_on_go = true;
    let script = peer.serve(tcp)?;
    let socket = peer.dial(&script)?;
    seen.call("send", sys::send(&socket, b"hello", 0));
    let quiet = wait_for(&socket, PollFlags::POLLIN, Duration::from_millis(200))?;
    seen.note("poll", crate::conformance::seen::poll_names(quiet));
    script.go()?;
    seen.note("recv", take(&socket, 4));
    seen.peer(script.report()?);
    Ok(())
}

fn backlog_full(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let mut tcp = peer.plain(&[Step::Echo]);
    (tcp.backlog, tcp.full, tcp.accept_on_go) = (0, true, true);
    let script = peer.serve(tcp)?;
    let socket = peer.tcp()?;
    socket.set_nonblocking(true)?;
    seen.call("connect", peer.connect(&socket, script.addr()));
    seen.note("poll", first_events(&socket, Duration::from_millis(300))?);
    script.go()?;
    // The SYN is sent again after 1 s, then after 2 s more.
    seen.note("poll", first_events(&socket, Duration::from_secs(5))?);
    let error = socket.take_error()?.and_then(|e| e.raw_os_error());
    seen.note("SO_ERROR", errno_of(error.unwrap_or(0)));
    socket.set_nonblocking(false)?;
    hello(seen, &socket)
}

fn fast_open(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    // The first brings the cookie for the second.
    for _ in 0..2 {
        let mut tcp = peer.plain(&[Step::Read(5), Step::Say(b"world".to_vec()), Step::ReadToEnd]);
        tcp.fast_open = true;
        let script = peer.serve(tcp)?;
        let socket = peer.tcp()?;
        let to = SockAddr::from(script.addr());
        peer.count();
        let sent = socket.send_to_with_flags(b"hello", &to, libc::MSG_FASTOPEN);
        seen.call("sendto", sent);
        seen.note("recv", take(&socket, 5));
        drop(socket);
        seen.peer(script.report()?);
    }
    Ok(())
}

fn fast_open_option(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    for _ in 0..2 {
        let mut tcp = peer.plain(&[Step::Read(5), Step::Say(b"world".to_vec()), Step::ReadToEnd]);
        tcp.fast_open = true;
        let script = peer.serve(tcp)?;
        let socket = peer.tcp()?;
        sys::set_option(&socket, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, 1)?;
        seen.call("connect", peer.connect(&socket, script.addr()));
        seen.call("send", sys::send(&socket, b"hello", 0));
        seen.note("recv", take(&socket, 5));
        drop(socket);
        seen.peer(script.report()?);
    }
    Ok(())
}

fn mptcp(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let domain = if peer.socket6() {
        Domain::IPV6
    } else {
        Domain::IPV4
    };
    let made = Socket::new(domain, Type::STREAM, Some(Protocol::MPTCP));
    seen.note("socket", shown(&made.as_ref().map(|_| ()).map_err(copy)));
    let socket = made?;
    seen.call("connect", peer.connect(&socket, script.addr()));
    hello(seen, &socket)?;
    let name = socket.peer_addr()?.as_socket() == Some(script.addr());
    seen.note("getpeername is the target", name);
    Ok(())
}

fn copy(error: &io::Error) -> io::Error {
    io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EIO))
}

fn link_local(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let scope = nix::net::if_::if_nametoindex("wifi0")?;
    for (what, scope) in [("with its scope", scope), ("without", 0)] {
        let addr = std::net::SocketAddrV6::new(peer.link_local, 9, 0, scope);
        let socket = peer.tcp()?;
        // Never captured: it means another host on each link.
        seen.call(what, socket.connect(&std::net::SocketAddr::V6(addr).into()));
    }
    Ok(())
}

fn loopback(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let host = if peer.v6() {
        std::net::IpAddr::V6(std::net::Ipv6Addr::LOCALHOST)
    } else {
        std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST)
    };
    let listener = peer.tcp()?;
    listener.bind(&peer.written(host, 0).into())?;
    listener.listen(1)?;
    let addr = listener.local_addr()?;
    let socket = peer.tcp()?;
    // Never captured.
    seen.call("connect", socket.connect(&addr));
    let (accepted, from) = listener.accept()?;
    seen.note(
        "accept",
        Some(from.as_socket()) == Some(socket.local_addr()?.as_socket()),
    );
    put(&accepted, b"hello")?;
    seen.note("recv", take(&socket, 5));
    let name = socket.peer_addr()?.as_socket() == addr.as_socket();
    seen.note("getpeername is the listener", name);
    drop(listener);
    let refused = peer.tcp()?;
    seen.call("connect to nobody", refused.connect(&addr));
    Ok(())
}

fn v6only(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.tcp()?;
    socket.set_only_v6(true)?;
    seen.call("connect", peer.connect(&socket, script.addr()));
    hello(seen, &socket)
}

fn v6only_mapped(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.tcp()?;
    socket.set_only_v6(true)?;
    seen.call("connect", peer.connect(&socket, script.addr()));
    Ok(())
}
