//! UDP: sizes, ancillary data, and calls that move several datagrams.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::AsRawFd;
use std::time::Duration;

use crate::conformance::sys::PollFlags;
use anyhow::Context;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg,
    recvmsg, sendmmsg, sendmsg,
};
use socket2::Socket;

use super::udp::{next, next_from, text};
use crate::conformance::client::{Peer, await_unread, wait_for};
use crate::conformance::seen::{class, digest, pattern, poll_names};
use crate::conformance::wire::UdpHow;
use crate::conformance::world::socket_addr;
use crate::conformance::{Case, Seen, sys};

/// UDP_GRO, which libc names only for some targets.
const UDP_GRO: i32 = 104;

pub const CASES: &[Case] = &[
    Case::new("udp_empty", "datagrams without bytes", empty),
    Case::new(
        "udp_largest",
        "65,507 bytes there and back (65,487 and less over IPv6)",
        largest,
    ),
    Case::new("udp_too_large", "one byte more: EMSGSIZE", too_large),
    Case::new(
        "udp_no_fragments",
        "IP_PMTUDISC_DO and more than the link's MTU: EMSGSIZE",
        no_fragments,
    ),
    Case::new(
        "udp_truncated",
        "a buffer that is too small: MSG_TRUNC, the length, the rest is gone",
        truncated,
    ),
    Case::new("udp_peek", "MSG_PEEK: the datagram stays", peek),
    Case::new(
        "udp_pending",
        "FIONREAD is the next datagram's length",
        pending,
    ),
    Case::new(
        "udp_order",
        "500 datagrams, each answered before the next",
        order,
    ),
    Case::new("udp_vectors", "sendmsg of pieces is one datagram", vectors),
    Case::new(
        "udp_packet_info",
        "IP_PKTINFO or IPV6_PKTINFO of an answer",
        packet_info,
    ),
    Case::new(
        "udp_service",
        "IP_TOS or IPV6_TCLASS arrives at the target",
        service,
    ),
    Case::new(
        "udp_service_of_answer",
        "IP_RECVTOS or IPV6_RECVTCLASS tells what the target has set",
        service_of_answer,
    ),
    Case::new(
        "udp_several",
        "sendmmsg and recvmmsg with the sources",
        several,
    ),
    Case::new(
        "udp_segments_sent",
        "UDP_SEGMENT: one call, ten datagrams",
        segments_sent,
    ),
    Case::new(
        "udp_segments_received",
        "UDP_GRO: several datagrams in one call, cut at their size",
        segments_received,
    ),
    Case::new(
        "udp_grown_answer",
        "a small request, an answer of 20,000 bytes",
        grown,
    ),
    Case::new(
        "udp_options_read_back",
        "SO_SNDBUF, SO_RCVBUF, SO_BROADCAST, TTL after connect",
        options,
    ),
    Case::new("udp_mtu", "IP_MTU or IPV6_MTU of a connected socket", mtu),
];

fn connected(peer: &Peer, to: std::net::SocketAddr) -> anyhow::Result<Socket> {
    let socket = peer.udp()?;
    socket.connect(&to.into())?;
    Ok(socket)
}

fn empty(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Echo)?;
    let socket = connected(peer, script.addr())?;
    for _ in 0..2 {
        seen.call("send", sys::send(&socket, b"", 0));
        seen.call("recv", sys::recv(&socket, &mut [0; 10], 0));
    }
    Ok(())
}

/// What a datagram may hold: IPv6 leaves room for no more without options.
fn most(peer: &Peer) -> usize {
    if peer.v6() { 65_527 } else { 65_507 }
}

fn largest(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Describe)?;
    let socket = connected(peer, script.addr())?;
    sys::set_option(&socket, libc::SOL_SOCKET, libc::SO_SNDBUF, 200_000)?;
    for length in [1472, 1473, 9000, 65_487, 65_507] {
        seen.call("send", sys::send(&socket, &pattern(0, length), 0));
        seen.call("the target got", text(&socket));
    }
    let grow = peer.udp_peer(1, UdpHow::Grow)?;
    socket.connect(&grow.addr().into())?;
    sys::set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUF, 400_000)?;
    sys::send(&socket, b"65507", 0)?;
    seen.call("recv", next(&socket));
    Ok(())
}

fn too_large(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Quiet)?;
    let socket = connected(peer, script.addr())?;
    sys::set_option(&socket, libc::SOL_SOCKET, libc::SO_SNDBUF, 200_000)?;
    let bytes = pattern(0, most(peer) + 1);
    seen.call("send", sys::send(&socket, &bytes, 0));
    Ok(())
}

fn no_fragments(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Describe)?;
    let socket = connected(peer, script.addr())?;
    if peer.v6() {
        let (level, name) = (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER);
        sys::set_option(&socket, level, name, libc::IPV6_PMTUDISC_DO)?;
    } else {
        let (level, name) = (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER);
        sys::set_option(&socket, level, name, libc::IP_PMTUDISC_DO)?;
    }
    let fits = if peer.v6() { 1452 } else { 1472 };
    for length in [fits, fits + 1] {
        let sent = sys::send(&socket, &pattern(0, length), 0);
        if seen.call("send", sent).is_some() {
            seen.call("the target got", text(&socket));
        }
    }
    Ok(())
}

fn truncated(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Echo)?;
    let socket = connected(peer, script.addr())?;
    sys::send(&socket, &pattern(0, 100), 0)?;
    let mut bytes = [0; 10];
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::empty();
    let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut slices, None, flags)?;
    seen.note("bytes", message.bytes);
    seen.note("flag", message.flags.contains(MsgFlags::MSG_TRUNC));
    sys::send(&socket, &pattern(0, 100), 0)?;
    let n = sys::recv(&socket, &mut [0; 10], libc::MSG_TRUNC);
    seen.call("recv", n);
    sys::send(&socket, b"next", 0)?;
    seen.call("the next", text(&socket));
    Ok(())
}

fn peek(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Echo)?;
    let socket = connected(peer, script.addr())?;
    sys::send(&socket, b"hello", 0)?;
    let mut bytes = [0; 10];
    seen.call("peek", sys::recv(&socket, &mut bytes, libc::MSG_PEEK));
    seen.call("recv", text(&socket));
    Ok(())
}

fn pending(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Echo)?;
    let socket = connected(peer, script.addr())?;
    sys::send(&socket, &[1; 30], 0)?;
    await_unread(&socket, 30)?;
    sys::send(&socket, &[2; 50], 0)?;
    seen.call("FIONREAD", sys::ioctl_int(&socket, libc::FIONREAD));
    seen.call("recv", next(&socket));
    seen.call("recv", next(&socket));
    seen.call("FIONREAD", sys::ioctl_int(&socket, libc::FIONREAD));
    Ok(())
}

fn order(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Echo)?;
    let socket = connected(peer, script.addr())?;
    let mut right = 0;
    for number in 0..500usize {
        let bytes = pattern(number * 50, 50);
        sys::send(&socket, &bytes, 0)?;
        right += usize::from(next(&socket)? == digest(&bytes));
    }
    seen.note("right answers", right);
    Ok(())
}

fn vectors(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Describe)?;
    let socket = connected(peer, script.addr())?;
    let pieces = [&b"one"[..], b"", b"two", b"three"].map(IoSlice::new);
    seen.call("sendmsg", socket.send_vectored(&pieces));
    seen.call("the target got", text(&socket));
    Ok(())
}

fn packet_info(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Echo)?;
    let socket = peer.udp()?;
    sys::set_option(&socket, libc::IPPROTO_IP, libc::IP_PKTINFO, 1)?;
    if peer.socket6() {
        let (level, name) = (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO);
        sys::set_option(&socket, level, name, 1)?;
    }
    socket.send_to(b"hello", &script.addr().into())?;
    let mut bytes = [0; 10];
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let mut control = nix::cmsg_space!([u8; 128]);
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut slices,
        Some(&mut control),
        MsgFlags::empty(),
    )?;
    seen.note("bytes", message.bytes);
    for part in message.cmsgs()? {
        let (index, addr) = match part {
            ControlMessageOwned::Ipv4PacketInfo(info) => {
                let addr = u32::from_be(info.ipi_addr.s_addr);
                (
                    info.ipi_ifindex as u32,
                    std::net::Ipv4Addr::from(addr).into(),
                )
            }
            ControlMessageOwned::Ipv6PacketInfo(info) => {
                let addr = std::net::Ipv6Addr::from(info.ipi6_addr.s6_addr);
                (info.ipi6_ifindex, std::net::IpAddr::from(addr))
            }
            other => {
                seen.note("something else", format!("{other:?}"));
                continue;
            }
        };
        let name = nix::net::if_::if_indextoname(index)?;
        seen.note("interface", name.to_string_lossy());
        seen.note("to", class(addr));
    }
    Ok(())
}

fn service(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Describe)?;
    let socket = connected(peer, script.addr())?;
    let (level, name) = if peer.v6() {
        (libc::IPPROTO_IPV6, libc::IPV6_TCLASS)
    } else {
        (libc::IPPROTO_IP, libc::IP_TOS)
    };
    for value in [0x10, 0xb8] {
        seen.call("set", sys::set_option(&socket, level, name, value));
        sys::send(&socket, b"hello", 0)?;
        seen.call("the target got", text(&socket));
    }
    Ok(())
}

fn service_of_answer(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::EchoService)?;
    let socket = connected(peer, script.addr())?;
    let (level, set, told) = if peer.v6() {
        let level = libc::IPPROTO_IPV6;
        (level, libc::IPV6_TCLASS, libc::IPV6_RECVTCLASS)
    } else {
        (libc::IPPROTO_IP, libc::IP_TOS, libc::IP_RECVTOS)
    };
    seen.call("ask", sys::set_option(&socket, level, told, 1));
    for value in [0xb8, 0] {
        sys::set_option(&socket, level, set, value)?;
        sys::send(&socket, b"hello", 0)?;
        let mut bytes = [0; 10];
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let mut control = nix::cmsg_space!([u8; 64]);
        let (fd, flags) = (socket.as_raw_fd(), MsgFlags::empty());
        let message = recvmsg::<SockaddrStorage>(fd, &mut slices, Some(&mut control), flags)?;
        for part in message.cmsgs()? {
            seen.note("told", format!("{part:?}"));
        }
    }
    Ok(())
}

fn several(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(4, UdpHow::Echo)?;
    let socket = peer.udp()?;
    let bytes: Vec<[u8; 3]> = (0..4u8).map(|n| [n; 3]).collect();
    let slices: Vec<[IoSlice<'_>; 1]> = bytes.iter().map(|b| [IoSlice::new(b)]).collect();
    let to: Vec<Option<SockaddrStorage>> = (0..4)
        .map(|n| Some(SockaddrStorage::from(script.addr_of(n))))
        .collect();
    let mut headers = MultiHeaders::preallocate(4, None);
    let fd = socket.as_raw_fd();
    let sent = sendmmsg(fd, &mut headers, &slices, &to, [], MsgFlags::empty())?.count();
    seen.note("sendmmsg", sent);
    let mut right = 0;
    let mut got = 0;
    while got < 4 {
        let mut room = [[0u8; 10]; 4];
        let mut into: Vec<[IoSliceMut<'_>; 1]> =
            room.iter_mut().map(|r| [IoSliceMut::new(r)]).collect();
        let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(4, None);
        let flags = MsgFlags::MSG_WAITFORONE;
        let messages = recvmmsg(fd, &mut headers, into.iter_mut(), flags, None)?;
        for message in messages {
            let first = message.iovs().next().and_then(|b| b.first().copied());
            let from = message.address.and_then(|a| socket_addr(&a));
            let number = usize::from(first.context("an empty datagram")?);
            right += usize::from(from == Some(script.addr_of(number)));
            got += 1;
        }
    }
    seen.note("recvmmsg", got);
    seen.note("right sources", right);
    Ok(())
}

fn segments_sent(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Describe)?;
    let socket = connected(peer, script.addr())?;
    let bytes = pattern(0, 9 * 1000 + 500);
    let size = 1000;
    let sent = sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(&bytes)],
        &[ControlMessage::UdpGsoSegments(&size)],
        MsgFlags::empty(),
        None,
    );
    seen.call("sendmsg", sent.map_err(std::io::Error::from));
    let mut got = Vec::new();
    for _ in 0..10 {
        got.push(text(&socket)?);
    }
    // Datagrams may change places.
    got.sort();
    seen.note("the target got", got.join("; "));
    Ok(())
}

fn segments_received(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Echo)?;
    let socket = connected(peer, script.addr())?;
    seen.call(
        "set",
        sys::set_option(&socket, libc::IPPROTO_UDP, UDP_GRO, 1),
    );
    for number in 0..10u8 {
        sys::send(&socket, &[number; 700], 0)?;
    }
    let mut pieces = Vec::new();
    while pieces.len() < 10 {
        let mut bytes = vec![0; 65_536];
        let (length, size) = {
            let mut slices = [IoSliceMut::new(&mut bytes)];
            let mut control = nix::cmsg_space!(i32);
            let message = recvmsg::<SockaddrStorage>(
                socket.as_raw_fd(),
                &mut slices,
                Some(&mut control),
                MsgFlags::empty(),
            )?;
            let size = message.cmsgs()?.find_map(|c| match c {
                ControlMessageOwned::UdpGroSegments(size) => usize::try_from(size).ok(),
                _ => None,
            });
            (message.bytes, size.unwrap_or(message.bytes))
        };
        pieces.extend(bytes[..length].chunks(size.max(1)).map(digest));
    }
    pieces.sort();
    seen.note("datagrams", pieces.join("; "));
    Ok(())
}

fn grown(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Grow)?;
    let socket = peer.udp()?;
    socket.send_to(b"20000", &script.addr().into())?;
    let (bytes, from) = next_from(&socket)?;
    seen.note("recvfrom", digest(&bytes));
    seen.note("from the target", from == script.addr());
    let more = wait_for(&socket, PollFlags::POLLIN, Duration::from_millis(50))?;
    seen.note("more", poll_names(more));
    Ok(())
}

fn options(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Echo)?;
    let socket = peer.udp()?;
    let mut all = vec![
        ("SO_SNDBUF", libc::SOL_SOCKET, libc::SO_SNDBUF, 50_000),
        ("SO_RCVBUF", libc::SOL_SOCKET, libc::SO_RCVBUF, 60_000),
        ("SO_BROADCAST", libc::SOL_SOCKET, libc::SO_BROADCAST, 1),
    ];
    all.push(if peer.socket6() {
        let (level, name) = (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS);
        ("IPV6_UNICAST_HOPS", level, name, 77)
    } else {
        ("IP_TTL", libc::IPPROTO_IP, libc::IP_TTL, 77)
    });
    for &(_, level, name, value) in &all {
        sys::set_option(&socket, level, name, value)?;
    }
    socket.connect(&script.addr().into())?;
    for &(what, level, name, _) in &all {
        seen.call(what, sys::option(&socket, level, name));
    }
    Ok(())
}

fn mtu(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.udp_peer(1, UdpHow::Echo)?;
    let socket = connected(peer, script.addr())?;
    let mtu = if peer.v6() {
        sys::option(&socket, libc::IPPROTO_IPV6, libc::IPV6_MTU)
    } else {
        sys::option(&socket, libc::IPPROTO_IP, libc::IP_MTU)
    };
    seen.call("MTU", mtu);
    Ok(())
}
