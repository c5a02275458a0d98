//! getpeername(2), getsockname(2), and what kind of socket it is.

use std::net::SocketAddr;

use crate::conformance::sys::PollFlags;
use anyhow::Context;
use socket2::Socket;

use crate::conformance::client::{Peer, settled};
use crate::conformance::seen::{name_class, shown};
use crate::conformance::stream::{put, take};
use crate::conformance::wire::Step;
use crate::conformance::{Case, Seen, sys};

/// SO_PEERNAME, which libc does not name.
const SO_PEERNAME: i32 = 28;

pub const CASES: &[Case] = &[
    Case::new(
        "peer_name",
        "getpeername is what was connected to",
        peer_name,
    ),
    Case::new(
        "peer_name_option",
        "SO_PEERNAME is what was connected to",
        peer_name_option,
    ),
    Case::new(
        "peer_name_after_reset",
        "getpeername after the peer's reset",
        peer_name_after_reset,
    ),
    Case::new(
        "peer_name_after_ends",
        "getpeername after both directions have ended",
        peer_name_after_ends,
    ),
    Case::new(
        "sock_name",
        "getsockname: family and kind of address",
        sock_name,
    ),
    Case::new(
        "sock_name_repeated",
        "getsockname stays what it is, and differs between sockets",
        sock_name_repeated,
    ),
    Case::new(
        "socket_facts",
        "SO_TYPE, SO_PROTOCOL, SO_DOMAIN, SO_ACCEPTCONN",
        facts,
    ),
    Case::new(
        "source_at_the_target",
        "from which address the server sees the connection come",
        source,
    ),
];

fn peer_of(socket: &Socket) -> anyhow::Result<SocketAddr> {
    socket.peer_addr()?.as_socket().context("no address")
}

fn describe(seen: &mut Seen, name: SocketAddr, target: SocketAddr) {
    seen.note("it is the target", name == target);
    let family = if name.is_ipv4() {
        "AF_INET"
    } else {
        "AF_INET6"
    };
    seen.note("family", family);
    if let SocketAddr::V6(v6) = name {
        seen.note("scope and flow", v6.scope_id() + v6.flowinfo());
    }
}

fn peer_name(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.dial(&script)?;
    describe(seen, peer_of(&socket)?, script.addr());
    Ok(())
}

fn peer_name_option(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.dial(&script)?;
    // The kernel refuses room for more than there is.
    let room = if peer.socket6() { 28 } else { 16 };
    let bytes = sys::option_bytes(&socket, libc::SOL_SOCKET, SO_PEERNAME, room)?;
    let expected = socket2::SockAddr::from(script.addr());
    seen.note("length", bytes.len());
    // Family, port, address: the rest is padding of IPv4's and the scope of IPv6's.
    let meaning = if peer.socket6() { 24 } else { 8 };
    let same = raw(&expected).starts_with(&bytes[..meaning.min(bytes.len())]);
    seen.note("it is the target", same);
    Ok(())
}

/// The bytes of an address as the kernel has them.
fn raw(addr: &socket2::SockAddr) -> Vec<u8> {
    match addr.as_socket() {
        Some(SocketAddr::V4(v4)) => [
            &(libc::AF_INET as u16).to_ne_bytes()[..],
            &v4.port().to_be_bytes(),
            &v4.ip().octets(),
        ]
        .concat(),
        Some(SocketAddr::V6(v6)) => [
            &(libc::AF_INET6 as u16).to_ne_bytes()[..],
            &v6.port().to_be_bytes(),
            &[0; 4],
            &v6.ip().octets(),
        ]
        .concat(),
        None => Vec::new(),
    }
}

fn peer_name_after_reset(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Read(1), Step::Reset])?;
    let socket = peer.dial(&script)?;
    put(&socket, b"x")?;
    seen.note("poll", settled(&socket, PollFlags::POLLHUP)?);
    let name = socket.peer_addr().map(|_| "a name");
    seen.note("getpeername", shown(&name));
    Ok(())
}

fn peer_name_after_ends(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::ReadToEnd, Step::Close])?;
    let socket = peer.dial(&script)?;
    socket.shutdown(std::net::Shutdown::Write)?;
    seen.note("recv", take(&socket, 1));
    let name = socket.peer_addr().map(|_| "a name");
    seen.note("getpeername", shown(&name));
    Ok(())
}

fn local(socket: &Socket) -> anyhow::Result<SocketAddr> {
    socket.local_addr()?.as_socket().context("no address")
}

fn sock_name(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.tcp()?;
    seen.note("before", name_class(local(&socket)?));
    peer.connect(&socket, script.addr())?;
    seen.note("after", name_class(local(&socket)?));
    Ok(())
}

fn sock_name_repeated(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let mut tcp = peer.plain(&[Step::Echo]);
    tcp.connections = 2;
    let script = peer.serve(tcp)?;
    let (one, two) = (peer.dial(&script)?, peer.dial(&script)?);
    seen.note("stays", local(&one)? == local(&one)?);
    seen.note("differs", local(&one)? != local(&two)?);
    Ok(())
}

fn facts(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.dial(&script)?;
    for (what, name) in [
        ("SO_TYPE", libc::SO_TYPE),
        ("SO_PROTOCOL", libc::SO_PROTOCOL),
        ("SO_DOMAIN", libc::SO_DOMAIN),
        ("SO_ACCEPTCONN", libc::SO_ACCEPTCONN),
        ("SO_ERROR", libc::SO_ERROR),
    ] {
        seen.call(what, sys::option(&socket, libc::SOL_SOCKET, name));
    }
    Ok(())
}

fn source(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Source])?;
    let socket = peer.dial(&script)?;
    drop(socket);
    seen.peer(script.report()?);
    Ok(())
}
