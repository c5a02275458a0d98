//! UDP: one socket and several others, some of whom it has not spoken to.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use socket2::Socket;

use super::udp::next_from;
use crate::conformance::client::{Peer, wait_for};
use crate::conformance::seen::{digest, poll_names};
use crate::conformance::sys::PollFlags;
use crate::conformance::wire::UdpHow;
use crate::conformance::{Case, Seen};

pub const CASES: &[Case] = &[
    Case::new(
        "udp_one_source",
        "one socket, three targets: they see one address and port",
        one_source,
    ),
    Case::new(
        "udp_third_party",
        "somebody to whom a target has told the address speaks first, and is answered",
        third_party,
    ),
    Case::new(
        "udp_other_port",
        "the answer comes from another port, which goes on (TFTP, RFC 1350)",
        other_port,
    ),
    Case::new(
        "udp_connected_send_to",
        "connect, then sendto to the same address: the answer is heard",
        connected_send_to,
    ),
];

/// What the target calls the address that `socket` sends from.
fn seen_as(socket: &Socket, target: SocketAddr) -> anyhow::Result<SocketAddr> {
    socket.send_to(b"who am I?", &target.into())?;
    let (bytes, _) = next_from(socket)?;
    let text = String::from_utf8(bytes)?;
    text.parse().with_context(|| text.clone())
}

fn one_source(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(3, UdpHow::Whence)?;
    let socket = peer.udp()?;
    let mut sources = Vec::new();
    for number in [0, 1, 2, 0] {
        sources.push(seen_as(&socket, script.addr_of(number))?);
    }
    sources.dedup();
    seen.note("sources", sources.len());
    let other = peer.udp()?;
    let another = seen_as(&other, script.addr())?;
    seen.note("another socket has another", !sources.contains(&another));
    Ok(())
}

fn third_party(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let target = peer.udp_peer(1, UdpHow::Whence)?;
    let third = peer.udp_peer(1, UdpHow::Echo)?;
    let socket = peer.udp()?;
    let ours = seen_as(&socket, target.addr())?;
    for length in [5, 1_000] {
        third.send_to(ours, &vec![7; length])?;
        let (bytes, from) = next_from(&socket)?;
        seen.note("recvfrom", digest(&bytes));
        seen.note("from the third party", from == third.addr());
    }
    for text in ["answer", "one more"] {
        seen.call(
            "sendto",
            socket.send_to(text.as_bytes(), &third.addr().into()),
        );
        let (bytes, from) = next_from(&socket)?;
        seen.note("recvfrom", digest(&bytes));
        seen.note("from the third party", from == third.addr());
    }
    seen.note("still the same", seen_as(&socket, target.addr())? == ours);
    Ok(())
}

fn other_port(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::NewPort)?;
    let socket = peer.udp()?;
    socket.send_to(b"a file, please", &script.addr().into())?;
    let (bytes, from) = next_from(&socket)?;
    seen.note("recvfrom", digest(&bytes));
    seen.note("from the target's address", from.ip() == script.addr().ip());
    seen.note("from the target's port", from == script.addr());
    // The transfer goes on with the new port.
    for block in [b"acknowledged 1", b"acknowledged 2"] {
        seen.call("sendto", socket.send_to(block, &from.into()));
        let (bytes, again) = next_from(&socket)?;
        seen.note("recvfrom", digest(&bytes));
        seen.note("from there", again == from);
    }
    Ok(())
}

fn connected_send_to(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::StrangerFirst)?;
    let socket = peer.udp()?;
    socket.connect(&script.addr().into())?;
    seen.call("sendto", socket.send_to(b"hello", &script.addr().into()));
    let (bytes, from) = next_from(&socket)?;
    seen.note("recvfrom", digest(&bytes));
    seen.note("from the target", from == script.addr());
    let more = wait_for(&socket, PollFlags::POLLIN, Duration::from_millis(100))?;
    seen.note("more", poll_names(more));
    Ok(())
}
