//! The getsockname hooks: a captured application sees the address that its connection would have had, not loopback.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{
    ctx::{ALLOW, SockAddr as _, Words, id_of, is_local},
    maps,
};

/// The address to tell in place of `addr`, if it is the loopback hop's.
#[inline(always)]
fn source(ctx: &SockAddrContext, addr: &Words) -> Option<Words> {
    // On IPv6 the kernel may choose the address itself that stands for the destination.
    let ours = id_of(addr).is_some() || is_local(addr);
    if !ours || addr[3] == 0 {
        return None;
    }
    let app = maps::app_socket(ctx.sock())?;
    let known = app.source[3] != 0;
    known.then_some(app.source)
}

/// getsockname() on an IPv4 socket.
#[cgroup_sock_addr(getsockname4)]
pub fn getsockname4(ctx: SockAddrContext) -> i32 {
    if let Some(source) = source(&ctx, &ctx.addr4()) {
        ctx.set_addr4(&source);
    }
    ALLOW
}

/// getsockname() on an IPv6 socket, v4-mapped included.
#[cgroup_sock_addr(getsockname6)]
pub fn getsockname6(ctx: SockAddrContext) -> i32 {
    if let Some(source) = source(&ctx, &ctx.addr6()) {
        ctx.set_addr6(&source);
    }
    ALLOW
}
