//! UDP: names, errors, filters.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use crate::conformance::sys::PollFlags;
use anyhow::Context;
use socket2::{SockAddr, Socket};

use crate::conformance::client::{Peer, settled, wait_for};
use crate::conformance::seen::{digest, errno_of, name_class, pattern, poll_names, shown};
use crate::conformance::wire::UdpHow;
use crate::conformance::world::Place;
use crate::conformance::{Case, Seen, sys};

pub const CASES: &[Case] = &[
    Case::new("udp_connected", "connect, send, recv", connected),
    Case::new(
        "udp_unconnected",
        "sendto and recvfrom: the source is the target",
        unconnected,
    ),
    Case::new(
        "udp_many_destinations",
        "one socket, ten destinations: each answer has the right source",
        many,
    ),
    Case::new(
        "udp_filter",
        "a connected socket hears nobody but its peer",
        filter,
    ),
    Case::new(
        "udp_no_filter",
        "an unconnected socket hears a stranger too",
        no_filter,
    ),
    Case::new(
        "udp_peer_name",
        "getpeername of a connected socket",
        peer_name,
    ),
    Case::new(
        "udp_sock_name",
        "getsockname: family and kind of address",
        sock_name,
    ),
    Case::new(
        "udp_refused",
        "a closed port: ECONNREFUSED at the next call",
        refused,
    ),
    Case::new(
        "udp_refused_unconnected",
        "a closed port and a socket that is not connected: nothing",
        refused_unconnected,
    ),
    Case::new(
        "udp_no_host",
        "an address without a host: nothing, as no error queue is asked for",
        |p, s| unreachable(p, s, Place::NoHost),
    ),
    Case::new(
        "udp_no_network",
        "a network without a route: nothing either",
        |p, s| unreachable(p, s, Place::NoNetwork),
    ),
    Case::new(
        "udp_error_queue",
        "IP_RECVERR or IPV6_RECVERR and a closed port: the queue tells",
        error_queue,
    ),
    Case::new(
        "udp_disconnect",
        "AF_UNSPEC: the socket hears everybody again",
        disconnect,
    ),
    Case::new(
        "udp_reconnect",
        "connects to another destination",
        reconnect,
    ),
    Case::new(
        "udp_send_to_elsewhere",
        "sendto from a connected socket to another address",
        elsewhere,
    ),
    Case::new(
        "udp_not_connected",
        "send without a destination: EDESTADDRREQ",
        not_connected,
    ),
    Case::new(
        "udp_server",
        "binds a port, is sent to, and answers",
        server,
    ),
    Case::new(
        "udp_bound_client",
        "binds a port, then sends: the answer comes there",
        bound_client,
    ),
    Case::new(
        "udp_receive_timeout",
        "SO_RCVTIMEO and a peer that keeps quiet: EAGAIN",
        quiet,
    ),
    Case::new(
        "udp_many_sockets",
        "200 sockets at once, each with its own answer",
        many_sockets,
    ),
];

/// The next datagram's length and hash.
pub fn next(socket: impl AsFd) -> std::io::Result<String> {
    let mut bytes = vec![0; 70_000];
    let n = sys::recv(socket, &mut bytes, 0)?;
    Ok(digest(&bytes[..n]))
}

/// The next datagram's text.
pub fn text(socket: impl AsFd) -> std::io::Result<String> {
    let mut bytes = vec![0; 2000];
    let n = sys::recv(socket, &mut bytes, 0)?;
    Ok(String::from_utf8_lossy(&bytes[..n]).into_owned())
}

/// The next datagram with its source.
pub fn next_from(socket: &Socket) -> anyhow::Result<(Vec<u8>, SocketAddr)> {
    use std::mem::MaybeUninit;
    let mut room = vec![MaybeUninit::uninit(); 70_000];
    let (n, from) = socket.recv_from(&mut room)?;
    let bytes = sys::filled(&room[..n]);
    Ok((bytes, from.as_socket().context("no source")?))
}

fn connected(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Echo)?;
    let socket = peer.udp()?;
    seen.call("connect", socket.connect(&script.addr().into()));
    for length in [1, 100, 1400] {
        seen.call("send", sys::send(&socket, &pattern(0, length), 0));
        seen.call("recv", next(&socket));
    }
    Ok(())
}

fn unconnected(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Echo)?;
    let socket = peer.udp()?;
    seen.call("sendto", socket.send_to(b"hello", &script.addr().into()));
    let (bytes, from) = next_from(&socket)?;
    seen.note("recvfrom", digest(&bytes));
    seen.note("from the target", from == script.addr());
    let name = socket.peer_addr().map(|_| "a name");
    seen.note("getpeername", shown(&name));
    Ok(())
}

fn many(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(10, UdpHow::Echo)?;
    let socket = peer.udp()?;
    for number in 0..10 {
        let to = SockAddr::from(script.addr_of(number));
        socket.send_to(&[number as u8], &to)?;
    }
    let mut right = 0;
    for _ in 0..10 {
        let (bytes, from) = next_from(&socket)?;
        let number = usize::from(*bytes.first().context("empty")?);
        right += usize::from(from == script.addr_of(number));
    }
    seen.note("right sources", right);
    Ok(())
}

fn filter(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::StrangerFirst)?;
    let socket = peer.udp()?;
    socket.connect(&script.addr().into())?;
    for what in ["one", "two"] {
        sys::send(&socket, what.as_bytes(), 0)?;
        seen.call("recv", text(&socket));
    }
    let more = wait_for(&socket, PollFlags::POLLIN, Duration::from_millis(100))?;
    seen.note("more", poll_names(more));
    Ok(())
}

fn no_filter(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::StrangerFirst)?;
    let socket = peer.udp()?;
    socket.send_to(b"hello", &script.addr().into())?;
    let mut from_target = Vec::new();
    for _ in 0..2 {
        let (_, from) = next_from(&socket)?;
        seen.note("from the target's address", from.ip() == script.addr().ip());
        from_target.push(from == script.addr());
    }
    from_target.sort_unstable();
    seen.note("one from the target", from_target == [false, true]);
    Ok(())
}

fn peer_name(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Echo)?;
    let socket = peer.udp()?;
    socket.connect(&script.addr().into())?;
    let name = socket.peer_addr()?.as_socket();
    seen.note("before traffic", name == Some(script.addr()));
    sys::send(&socket, b"x", 0)?;
    seen.call("recv", next(&socket));
    let name = socket.peer_addr()?.as_socket();
    seen.note("after traffic", name == Some(script.addr()));
    Ok(())
}

fn sock_name(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Echo)?;
    let socket = peer.udp()?;
    let name = |socket: &Socket| -> anyhow::Result<String> {
        Ok(name_class(
            socket.local_addr()?.as_socket().context("no address")?,
        ))
    };
    seen.note("before", name(&socket)?);
    socket.connect(&script.addr().into())?;
    seen.note("after", name(&socket)?);
    Ok(())
}

fn refused(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let socket = peer.udp()?;
    socket.connect(&peer.closed_port().into())?;
    seen.call("send", sys::send(&socket, b"x", 0));
    seen.note("poll", settled(&socket, PollFlags::POLLERR)?);
    seen.call("recv", next(&socket));
    seen.call("send", sys::send(&socket, b"x", 0));
    settled(&socket, PollFlags::POLLERR)?;
    seen.call("send again", sys::send(&socket, b"x", 0));
    settled(&socket, PollFlags::empty())?;
    let error = sys::option(&socket, libc::SOL_SOCKET, libc::SO_ERROR)?;
    seen.note("SO_ERROR", errno_of(error));
    Ok(())
}

fn refused_unconnected(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let socket = peer.udp()?;
    let to = SockAddr::from(peer.closed_port());
    for _ in 0..2 {
        seen.call("sendto", socket.send_to(b"x", &to));
        seen.note("poll", settled(&socket, PollFlags::empty())?);
    }
    Ok(())
}

fn unreachable(peer: &Peer, seen: &mut Seen, place: Place) -> anyhow::Result<()> {
    let socket = peer.udp()?;
    seen.call("connect", socket.connect(&peer.at(place, 53).into()));
    seen.call("send", sys::send(&socket, b"x", 0));
    seen.note("poll", settled(&socket, PollFlags::empty())?);
    seen.call("send again", sys::send(&socket, b"x", 0));
    Ok(())
}

fn error_queue(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let socket = peer.udp()?;
    sys::set_option(&socket, libc::IPPROTO_IP, libc::IP_RECVERR, 1)?;
    if peer.socket6() {
        let (level, name) = (libc::IPPROTO_IPV6, libc::IPV6_RECVERR);
        sys::set_option(&socket, level, name, 1)?;
    }
    socket.send_to(b"hello", &peer.closed_port().into())?;
    seen.note("poll", settled(&socket, PollFlags::POLLERR)?);
    seen.note("the queue", super::calls::queued_error(&socket)?);
    Ok(())
}

fn disconnect(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(2, UdpHow::Echo)?;
    let socket = peer.udp()?;
    socket.connect(&script.addr().into())?;
    seen.call("AF_UNSPEC", sys::disconnect(&socket));
    let name = socket.peer_addr().map(|_| "a name");
    seen.note("getpeername", shown(&name));
    seen.call("send", sys::send(&socket, b"x", 0));
    socket.send_to(b"hello", &script.addr_of(1).into())?;
    let (bytes, from) = next_from(&socket)?;
    seen.note("recvfrom", digest(&bytes));
    seen.note("from the second", from == script.addr_of(1));
    Ok(())
}

fn reconnect(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(2, UdpHow::Echo)?;
    let socket = peer.udp()?;
    for number in 0..2 {
        let to = script.addr_of(number);
        seen.call("connect", socket.connect(&to.into()));
        sys::send(&socket, &[number as u8; 3], 0)?;
        let (bytes, from) = next_from(&socket)?;
        seen.note("recv", digest(&bytes));
        seen.note("from it", from == to);
    }
    Ok(())
}

fn elsewhere(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(2, UdpHow::Echo)?;
    let socket = peer.udp()?;
    socket.connect(&script.addr().into())?;
    let other = SockAddr::from(script.addr_of(1));
    seen.call("sendto", socket.send_to(b"other", &other));
    // The answer comes from somebody whom the socket does not hear.
    let more = wait_for(&socket, PollFlags::POLLIN, Duration::from_millis(100))?;
    seen.note("poll", poll_names(more));
    sys::send(&socket, b"own", 0)?;
    seen.call("recv", text(&socket));
    Ok(())
}

fn not_connected(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let socket = peer.udp()?;
    seen.call("send", sys::send(&socket, b"x", 0));
    let read = sys::recv(&socket, &mut [0; 1], libc::MSG_DONTWAIT);
    seen.call("recv", read);
    Ok(())
}

fn server(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Describe)?;
    let socket = peer.udp()?;
    seen.call("bind", socket.bind(&peer.own(0).into()));
    let addr = socket.local_addr()?.as_socket().context("no address")?;
    // As the peer writes it.
    let ip = match addr.ip() {
        std::net::IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(addr.ip(), Into::into),
        ip @ std::net::IpAddr::V4(_) => ip,
    };
    script.send_to(SocketAddr::new(ip, addr.port()), b"request")?;
    let (bytes, from) = next_from(&socket)?;
    seen.note("recvfrom", digest(&bytes));
    seen.note("from the peer", from == script.addr());
    seen.call("sendto", socket.send_to(b"answer", &from.into()));
    seen.call("the peer's answer", text(&socket));
    Ok(())
}

fn bound_client(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Echo)?;
    let socket = peer.udp()?;
    seen.call("bind", socket.bind(&peer.own(0).into()));
    let before = socket.local_addr()?.as_socket();
    socket.send_to(b"hello", &script.addr().into())?;
    let (bytes, from) = next_from(&socket)?;
    seen.note("recvfrom", digest(&bytes));
    seen.note("from the target", from == script.addr());
    let after = socket.local_addr()?.as_socket();
    seen.note("the name is kept", before == after);
    Ok(())
}

fn quiet(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Quiet)?;
    let socket = peer.udp()?;
    socket.set_read_timeout(Some(Duration::from_millis(150)))?;
    socket.connect(&script.addr().into())?;
    sys::send(&socket, b"x", 0)?;
    seen.call("recv", next(&socket));
    Ok(())
}

fn many_sockets(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Echo)?;
    let mut sockets = Vec::new();
    for number in 0..200u8 {
        let socket = peer.udp()?;
        socket.connect(&script.addr().into())?;
        sys::send(&socket, &[number; 10], 0)?;
        sockets.push(socket);
    }
    let mut right = 0;
    for (number, socket) in (0..200u8).zip(&sockets) {
        right += usize::from(next(socket)? == digest(&[number; 10]));
    }
    seen.note("right answers", right);
    Ok(())
}
