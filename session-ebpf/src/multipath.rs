//! Multipath TCP. The connect hook runs for the first subflow, a TCP socket, and what an application asks of its socket
//! later is asked of the one above (`mptcp_connect` of net/mptcp/protocol.c): so both know where the connection goes.

use aya_ebpf::{bindings::bpf_sock, helpers::generated::bpf_skc_to_mptcp_sock};
use session_ebpf_common::AppSocket;

use crate::maps::{self, HAS_MPTCP};

/// The socket above a subflow; null for any other socket.
#[inline(always)]
fn above(sk: *mut bpf_sock) -> *mut bpf_sock {
    if HAS_MPTCP.load() == 0 || sk.is_null() {
        return core::ptr::null_mut();
    }
    // SAFETY: the verifier checks that this is a live socket; what is returned is null or lives as long.
    unsafe { bpf_skc_to_mptcp_sock(sk.cast()) }.cast()
}

/// The socket above a subflow, if it is one, remembers the same. Without memory for it, it tells the agent's address.
#[inline(always)]
pub fn remember(sk: *mut bpf_sock, app: &AppSocket) {
    if let Some(slot) = maps::new_app_socket(above(sk)) {
        *slot = *app;
    }
}

/// Forgets it.
#[inline(always)]
pub fn forget(sk: *mut bpf_sock) {
    maps::forget_app_socket(above(sk));
}
