//! bind(2) before connect(2).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Context;
use socket2::Socket;

use crate::conformance::client::Peer;
use crate::conformance::seen::class;
use crate::conformance::stream::{put, take};
use crate::conformance::wire::Step;
use crate::conformance::{Case, Seen, sys};

pub const CASES: &[Case] = &[
    Case::new(
        "bind_source_port",
        "binds a port and connects from it",
        source_port,
    ),
    Case::new(
        "bind_source_address",
        "binds an address of a link and connects from it",
        source_address,
    ),
    Case::new(
        "bind_address_no_port",
        "IP_BIND_ADDRESS_NO_PORT: the port is chosen at connect",
        address_no_port,
    ),
    Case::new(
        "bind_reuse_address",
        "SO_REUSEADDR: one port to twelve destinations, and not twice to one",
        reuse_address,
    ),
    Case::new(
        "bind_device",
        "SO_BINDTODEVICE, then connects",
        device_connect,
    ),
    Case::new(
        "bind_device_read_back",
        "SO_BINDTODEVICE reads back after connect",
        device_read_back,
    ),
    Case::new(
        "bind_foreign_address",
        "binds an address that the host has not",
        foreign,
    ),
    Case::new(
        "bind_loopback_connect",
        "binds loopback and connects to another host",
        loopback,
    ),
];

fn any(peer: &Peer) -> SocketAddr {
    let addr = if peer.socket6() {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    } else {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    };
    SocketAddr::new(addr, 0)
}

fn local(socket: &Socket) -> anyhow::Result<SocketAddr> {
    socket.local_addr()?.as_socket().context("no address")
}

fn hello(seen: &mut Seen, socket: &Socket) -> anyhow::Result<()> {
    put(socket, b"hello")?;
    seen.note("echo", take(socket, 5));
    Ok(())
}

fn source_port(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.tcp()?;
    seen.call("bind", socket.bind(&any(peer).into()));
    let port = local(&socket)?.port();
    seen.call("connect", peer.connect(&socket, script.addr()));
    seen.note("the port is kept", local(&socket)?.port() == port);
    hello(seen, &socket)
}

fn source_address(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.tcp()?;
    seen.call("bind", socket.bind(&peer.own(0).into()));
    let before = local(&socket)?;
    seen.call("connect", peer.connect(&socket, script.addr()));
    seen.note("the address is kept", local(&socket)? == before);
    hello(seen, &socket)
}

fn address_no_port(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.tcp()?;
    let set = sys::set_option(&socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1);
    seen.call("IP_BIND_ADDRESS_NO_PORT", set);
    seen.call("bind", socket.bind(&peer.own(0).into()));
    seen.note("port", local(&socket)?.port());
    seen.call("connect", peer.connect(&socket, script.addr()));
    seen.note("has a port", local(&socket)?.port() != 0);
    seen.note("address", class(local(&socket)?.ip()));
    hello(seen, &socket)
}

fn reuse_address(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    // Captured, they share sixteen pairs of ports over IPv6.
    let mut scripts = Vec::new();
    for _ in 0..12 {
        scripts.push(peer.script(&[Step::Echo])?);
    }
    let mut from = any(peer);
    let mut all = Vec::new();
    for (number, script) in scripts.iter().chain(scripts.last()).enumerate() {
        let socket = peer.tcp()?;
        socket.set_reuse_address(true)?;
        seen.call(&format!("bind {number}"), socket.bind(&from.into()));
        from.set_port(local(&socket)?.port());
        let what = format!("connect {number}");
        if seen
            .call(&what, peer.connect(&socket, script.addr()))
            .is_some()
        {
            hello(seen, &socket)?;
        }
        all.push(socket);
    }
    Ok(())
}

fn device_connect(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.tcp()?;
    seen.call("bind", socket.bind_device(Some(b"wifi0")));
    seen.call("connect", peer.connect(&socket, script.addr()));
    hello(seen, &socket)
}

fn device_read_back(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.tcp()?;
    socket.bind_device(Some(b"wifi0"))?;
    peer.connect(&socket, script.addr())?;
    let device = socket.device()?.unwrap_or_default();
    seen.note("device", String::from_utf8_lossy(&device));
    Ok(())
}

fn foreign(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let addr: IpAddr = if peer.v6() {
        "2001:db8:77::1".parse()?
    } else {
        "192.0.2.77".parse()?
    };
    let socket = peer.tcp()?;
    let to = peer.written(addr, 0);
    seen.call("bind", socket.bind(&to.into()));
    Ok(())
}

fn loopback(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let addr = if peer.v6() {
        IpAddr::V6(Ipv6Addr::LOCALHOST)
    } else {
        IpAddr::V4(Ipv4Addr::LOCALHOST)
    };
    let socket = peer.tcp()?;
    seen.call("bind", socket.bind(&peer.written(addr, 0).into()));
    // A martian on any link: natively there is no way out for it.
    // What leads nowhere is left alone, and so not counted.
    sys::set_option(&socket, libc::IPPROTO_TCP, libc::TCP_SYNCNT, 1)?;
    seen.call("connect", socket.connect(&script.addr().into()));
    Ok(())
}
