//! Initial windows of transports.

use aya_ebpf::{
    bindings::{BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB},
    helpers::bpf_setsockopt,
    macros::{map, sock_ops},
    maps::{Array, LruHashMap},
    programs::SockOpsContext,
};
use session_ebpf_common::{Listening, WINDOW_SLOTS, WindowKey};

use crate::ops::SockOps;

const SOL_TCP: i32 = 6;
const TCP_BPF_IW: i32 = 1001;
/// A sock_ops program that returns 0 makes the kernel ignore its reply.
const DONE: u32 = 1;

/// What the agent listens on.
#[map]
static LISTENING: Array<Listening> = Array::with_max_entries(1, 0);
/// Initial windows in segments, by path.
#[map]
static WINDOWS: LruHashMap<WindowKey, u32> = LruHashMap::with_max_entries(WINDOW_SLOTS, 0);

/// Runs for the sockets of the agent's cgroup.
#[sock_ops]
pub fn transport_ops(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => dialled(&ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(&ctx),
        _ => {}
    }
    DONE
}

/// The agent names every transport that it dials before it does.
#[inline(always)]
fn dialled(ctx: &SockOpsContext) {
    let key = WindowKey {
        local: ctx.local_addr(),
        remote: ctx.remote_addr(),
        remote_port: SockOps::remote_port(ctx),
    };
    if let Some(segments) = window(&key) {
        set(ctx, segments);
    }
}

/// A peer's port says nothing; our own says that it is a transport.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    let Some(listening) = LISTENING.get(0) else {
        return;
    };
    let port = SockOps::local_port(ctx);
    if !listening.ports.iter().any(|own| u32::from(*own) == port) {
        return;
    }
    let key = WindowKey {
        local: ctx.local_addr(),
        remote: ctx.remote_addr(),
        remote_port: 0,
    };
    set(ctx, window(&key).unwrap_or(listening.segments));
}

#[inline(always)]
fn window(key: &WindowKey) -> Option<u32> {
    // SAFETY: the value is one aligned word, copied at once.
    unsafe { WINDOWS.get(key) }.copied()
}

#[inline(always)]
fn set(ctx: &SockOpsContext, segments: u32) {
    let mut value = segments.cast_signed();
    // SAFETY: the buffer outlives the call and its length is given. A refusal leaves the kernel's own window.
    unsafe {
        bpf_setsockopt(
            ctx.raw().cast(),
            SOL_TCP,
            TCP_BPF_IW,
            (&raw mut value).cast(),
            4,
        )
    };
}
