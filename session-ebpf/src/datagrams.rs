//! The hooks of UDP sockets: datagrams that are sent without connect() or past it, the sources of those that come, and
//! which sockets are bound.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use aya_log_ebpf::info;
use session_ebpf_common::{counter, port_of};

use crate::{
    connect::IPPROTO_UDP,
    ctx::{ALLOW, SockAddr as _, Words, interrupt, refuse},
    maps,
    udp::{self, Fate, Hop},
};

/// What becomes of one datagram.
enum Outcome {
    Direct,
    Refused,
    Redirected(Hop),
    /// The call is to be made again.
    Again,
}

/// sendto() or sendmsg() with an IPv4 destination, also a v4-mapped one.
#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    let addr = ctx.addr4();
    match send(&ctx, &addr) {
        Outcome::Redirected(hop) => {
            ctx.set_addr4(&hop.addr);
            ctx.set_port(hop.port);
            ALLOW
        }
        Outcome::Direct => {
            if has_our_source(&ctx) {
                ctx.free_source4();
            }
            ALLOW
        }
        Outcome::Refused => refuse(),
        Outcome::Again => interrupt(),
    }
}

/// sendto() or sendmsg() with an IPv6 destination.
#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    let addr = ctx.addr6();
    match send(&ctx, &addr) {
        Outcome::Redirected(hop) => {
            ctx.set_addr6(&hop.addr);
            ctx.set_port(hop.port);
            ALLOW
        }
        Outcome::Direct => {
            if has_our_source(&ctx) {
                ctx.free_source6();
            }
            ALLOW
        }
        Outcome::Refused => refuse(),
        Outcome::Again => interrupt(),
    }
}

/// Not for UDP-Lite, whose sockets come here too.
#[inline(always)]
fn send(ctx: &SockAddrContext, addr: &Words) -> Outcome {
    if ctx.protocol() != IPPROTO_UDP {
        return Outcome::Direct;
    }
    match udp::fate(ctx, addr, ctx.port()) {
        Fate::Captured(hop) => captured(ctx, hop),
        Fate::Direct => Outcome::Direct,
        Fate::Refused => Outcome::Refused,
    }
}

/// A captured datagram must not be sent by a device that the socket is bound to. The kernel has read the device already
/// when this hook runs, so the socket is freed and the call made again.
#[inline(always)]
fn captured(ctx: &SockAddrContext, hop: Hop) -> Outcome {
    if ctx.device() == 0 {
        return Outcome::Redirected(hop);
    }
    if ctx.unbind_device() {
        return Outcome::Again;
    }
    info!(
        ctx,
        "a socket stays bound to its device, its owner lacks CAP_NET_RAW"
    );
    match udp::give_up(hop.claim, counter::DEVICE_BOUND) {
        Fate::Refused => Outcome::Refused,
        _ => Outcome::Direct,
    }
}

/// Whether a captured connect() has given the socket a loopback address, which is of no use to a datagram that goes
/// elsewhere.
#[inline(always)]
fn has_our_source(ctx: &SockAddrContext) -> bool {
    maps::app_socket(ctx.sock()).is_some() && ctx.source_is_loopback()
}

/// The source of a datagram on an IPv4 socket.
#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    let (addr, port) = (ctx.addr4(), ctx.port());
    if let Some(destination) = udp::destination_of(&ctx, &addr, port) {
        let (addr, port) = (destination.addr, destination.port as u16);
        ctx.set_addr4(&addr);
        ctx.set_port(port);
        udp::note_heard(&ctx, &addr, port, true);
    } else {
        udp::note_heard(&ctx, &addr, port, false);
    }
    ALLOW
}

/// The source of a datagram on an IPv6 socket, v4-mapped ones included.
#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    let (addr, port) = (ctx.addr6(), ctx.port());
    if let Some(destination) = udp::destination_of(&ctx, &addr, port) {
        let (addr, port) = (destination.addr, destination.port as u16);
        ctx.set_addr6(&addr);
        ctx.set_port(port);
        udp::note_heard(&ctx, &addr, port, true);
    } else {
        udp::note_heard(&ctx, &addr, port, false);
    }
    ALLOW
}

/// bind() of an IPv4 socket.
#[cgroup_sock_addr(bind4)]
pub fn bind4(ctx: SockAddrContext) -> i32 {
    if ctx.protocol() == IPPROTO_UDP {
        note_bound(&ctx);
    }
    ALLOW
}

/// bind() of an IPv6 socket.
#[cgroup_sock_addr(bind6)]
pub fn bind6(ctx: SockAddrContext) -> i32 {
    if ctx.protocol() == IPPROTO_UDP {
        note_bound(&ctx);
    }
    ALLOW
}

/// Remembers who chose the port.
#[inline(always)]
fn note_bound(ctx: &SockAddrContext) {
    let by = if ctx.port() == 0 {
        port_of::KERNEL
    } else {
        port_of::APPLICATION
    };
    maps::note_bound(ctx.sock(), by);
}
