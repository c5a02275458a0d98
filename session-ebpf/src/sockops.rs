//! Socket operations: carry the destination from the application's socket to the agent's accepted one.
//!
//! Two programs, because they live in different cgroups. `app_ops` is attached to every captured cgroup, `agent_ops` to
//! the agent's own. Where one cgroup contains the other both run for a socket, and each finds nothing to do in the
//! other's events.
//!
//! A filed handshake ends in exactly one of two ways: the agent's side is established and takes it, or the
//! application's socket closes first. It is never removed when the application releases its socket: a short-lived
//! connection is released before the agent has looked.

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, bpf_sock,
    },
    helpers::bpf_get_netns_cookie,
    macros::sock_ops,
    programs::SockOpsContext,
};
use aya_log_ebpf::{debug, warn};
use session_ebpf_common::{
    AppSocket, FlowKey, Knock, Namespace, SYN_BYTES_MAX, counter, gate, knock,
};

use crate::{
    access::load,
    bypass,
    maps::{self, HANDSHAKES, KNOCKS},
    ops::SockOps,
};

/// A sock_ops program that returns 0 makes the kernel ignore its reply; there is no reason ever to do so.
const DONE: u32 = 1;
/// `BPF_TCP_CLOSE` of the kernel's bpf.h.
const TCP_CLOSE: u32 = 7;
/// `BPF_TCP_FIN_WAIT1`.
const TCP_FIN_WAIT1: u32 = 4;

/// Runs for the sockets of captured cgroups.
#[sock_ops]
pub fn app_ops(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => file(&ctx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => bypass::begin(&ctx, ctx.sock(), &ctx.key_of_app()),
        BPF_SOCK_OPS_STATE_CB => abandon(&ctx),
        _ => {}
    }
    DONE
}

/// Runs for the sockets of the agent's cgroup.
#[sock_ops]
pub fn agent_ops(ctx: SockOpsContext) -> u32 {
    if ctx.op() == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB {
        deliver(&ctx);
    }
    DONE
}

/// The SYN is about to be built: file the destination under the connection's addresses.
#[inline(always)]
fn file(ctx: &SockOpsContext) {
    let Some(app) = maps::app_socket(ctx.sock()) else {
        return;
    };
    let key = ctx.key_of_app();
    // A socket that an application disconnected and connected elsewhere may still carry an older destination.
    if key.agent_addr[3] != app.agent_word || key.agent_port != app.agent_port {
        return;
    }
    app.key = key;
    if !maps::file_handshake(&key, &app.original) {
        maps::count(counter::HANDSHAKES_FULL);
        warn!(ctx, "no room to file a handshake; the agent will reset it");
        return;
    }
    // Keep the flags that other programs set on this socket.
    if ctx
        .set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32)
        .is_err()
    {
        warn!(ctx, "no state callback for a captured socket");
    }
}

/// The application's socket closed: what the agent has not taken by now it never will. Or it ended its direction, which
/// concerns the local bypass alone.
#[inline(always)]
fn abandon(ctx: &SockOpsContext) {
    let (_, new) = ctx.states();
    if new != TCP_CLOSE && new != TCP_FIN_WAIT1 {
        return;
    }
    let Some(app) = maps::app_socket(ctx.sock()) else {
        return;
    };
    if new == TCP_FIN_WAIT1 {
        bypass::end(&app.key);
        return;
    }
    if maps::drop_handshake(&app.key) {
        maps::count(counter::ABANDONED);
        // Let through and not taken: the agent still waits for the connection.
        if app.gate != gate::OPEN && app.gate != gate::ARMED {
            tell_gone(app);
        }
    }
}

/// The agent need not wait for the target any more. If the ring is full it finds out when the target has answered.
#[inline(always)]
fn tell_gone(app: &AppSocket) {
    let Some(mut slot) = KNOCKS.reserve::<Knock>(0) else {
        return;
    };
    slot.write(Knock {
        key: app.key,
        original: app.original,
        kind: knock::GONE,
        len: 0,
        syn: [0; SYN_BYTES_MAX],
    });
    slot.submit(0);
}

/// The agent's side is established: move the destination into the accepted socket.
#[inline(always)]
fn deliver(ctx: &SockOpsContext) {
    let cookie = ctx.netns_cookie();
    let port = ctx.local_port();
    // What was read of another namespace says nothing: then the handshake is looked for.
    let others = |here: &Namespace| !here.listens_at(port) && maps::is_of(here, cookie);
    if maps::namespace(cookie).is_none_or(others) {
        return;
    }
    let key = ctx.key_of_agent();
    // SAFETY: the entry is copied at once; its key is this connection's own, so nobody else updates it meanwhile.
    let Some(original) = (unsafe { HANDSHAKES.get(key) }).copied() else {
        maps::count(counter::UNKNOWN);
        debug!(
            ctx,
            "a connection to the agent's port {} has no destination", port
        );
        return;
    };
    let Some(slot) = maps::accepted_socket(ctx.sock()) else {
        maps::count(counter::NO_STORAGE);
        warn!(ctx, "no memory for the destination of an accepted socket");
        return;
    };
    *slot = original;
    if maps::drop_handshake(&key) {
        maps::count(counter::DELIVERED);
    }
}

/// A handshake with the agent, as its two ends see it.
trait Handshake: SockOps {
    /// The full socket, or null.
    #[inline(always)]
    fn sock(&self) -> *mut bpf_sock {
        // SAFETY: as in `load!`; not volatile, for the verifier tracks this field as a socket pointer.
        unsafe { (*self.raw()).__bindgen_anon_2.sk }
    }

    /// Old and new state of a state callback, `BPF_TCP_*`.
    #[inline(always)]
    fn states(&self) -> (u32, u32) {
        (
            load!((*self.raw()).__bindgen_anon_1.args[0]),
            load!((*self.raw()).__bindgen_anon_1.args[1]),
        )
    }

    /// The handshake as seen from the application's socket.
    #[inline(always)]
    fn key_of_app(&self) -> FlowKey {
        FlowKey {
            netns_cookie: self.netns_cookie(),
            app_addr: self.local_addr(),
            agent_addr: self.remote_addr(),
            app_port: self.local_port(),
            agent_port: self.remote_port(),
        }
    }

    /// The handshake as seen from the agent's socket.
    #[inline(always)]
    fn key_of_agent(&self) -> FlowKey {
        FlowKey {
            netns_cookie: self.netns_cookie(),
            app_addr: self.remote_addr(),
            agent_addr: self.local_addr(),
            app_port: self.remote_port(),
            agent_port: self.local_port(),
        }
    }

    /// Cookie of the socket's network namespace.
    #[inline(always)]
    fn netns_cookie(&self) -> u64 {
        // SAFETY: the context is valid while the program runs.
        unsafe { bpf_get_netns_cookie(self.raw().cast()) }
    }
}

impl<T: SockOps> Handshake for T {}
