//! The getpeername hooks: a captured application sees the destination that it asked for.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use session_ebpf_common::Original;

use crate::{
    ctx::{ALLOW, SockAddr as _},
    maps,
};

#[inline(always)]
fn original(ctx: &SockAddrContext) -> Option<&Original> {
    maps::app_socket(ctx.sock()).map(|app| &app.original)
}

/// getpeername() on an IPv4 socket.
#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    if let Some(original) = original(&ctx) {
        ctx.set_addr4(&original.addr);
        ctx.set_port(original.port);
    }
    ALLOW
}

/// getpeername() on an IPv6 socket, v4-mapped included.
#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    if let Some(original) = original(&ctx) {
        ctx.set_addr6(&original.addr);
        ctx.set_port(original.port);
    }
    ALLOW
}
