//! The getsockopt hook: a captured application that asks how its connection goes out is told what it set, and what the
//! link has, not what the loopback hop needs.

use aya_ebpf::{bindings::bpf_sockopt, macros::cgroup_sockopt, programs::SockoptContext};
use session_ebpf_common::{AppSocket, NAME_BYTES};

use crate::{
    access::load,
    maps::{self, DEVICES},
};

/// Verdict: go on with what the kernel and this program say.
const DONE: i32 = 1;

const SOL_IP: i32 = 0;
const SOL_SOCKET: i32 = 1;
const SOL_TCP: i32 = 6;
const SOL_IPV6: i32 = 41;
const SO_BINDTODEVICE: i32 = 25;
const TCP_MAXSEG: i32 = 2;
const TCP_CONGESTION: i32 = 13;
const IP_MTU: i32 = 14;
const IPV6_MTU: i32 = 24;

/// Kernels before 5.18 fail a call with a larger buffer, unless the program says that it changed nothing.
const PAGE_BYTES: i32 = 4096;
/// Headers before the data of a segment with timestamps: IPv4 or IPv6, TCP and the option.
const HEADERS4: u32 = 20 + 20 + 12;
const HEADERS6: u32 = 40 + 20 + 12;
/// The third word of a v4-mapped address.
const MAPPED: u32 = 0xffff_u32.to_be();

/// An option was read.
#[cgroup_sockopt(getsockopt)]
pub fn getsockopt(ctx: SockoptContext) -> i32 {
    let opt = ctx.sockopt;
    if load!((*opt).optlen) > PAGE_BYTES {
        // SAFETY: as for loads; the verifier also checks that the field may be written by this hook.
        unsafe { core::ptr::write_volatile(&raw mut (*opt).optlen, 0) };
        return DONE;
    }
    let (level, name) = (load!((*opt).level), load!((*opt).optname));
    let asked = matches!(
        (level, name),
        (SOL_SOCKET, SO_BINDTODEVICE)
            | (SOL_TCP, TCP_CONGESTION | TCP_MAXSEG)
            | (SOL_IP, IP_MTU)
            | (SOL_IPV6, IPV6_MTU)
    );
    if !asked {
        return DONE;
    }
    // SAFETY: the context is valid while the program runs; not volatile, for the verifier tracks this field as a socket
    // pointer.
    let sk = unsafe { (*opt).__bindgen_anon_1.sk };
    if let Some(app) = maps::app_socket(sk) {
        tell(opt, level, name, app);
    }
    DONE
}

#[inline(always)]
fn tell(opt: *mut bpf_sockopt, level: i32, name: i32, app: &AppSocket) {
    match (level, name) {
        (SOL_SOCKET, _) => device(opt, app),
        (SOL_TCP, TCP_CONGESTION) => congestion(opt, app),
        (SOL_TCP, _) if app.mtu != 0 => {
            let v4 = app.original.addr[2] == MAPPED && app.original.addr[0] == 0;
            let headers = if v4 { HEADERS4 } else { HEADERS6 };
            at_most(opt, app.mtu.saturating_sub(headers));
        }
        _ if app.mtu != 0 => at_most(opt, app.mtu),
        _ => {}
    }
}

/// The device that the socket was bound to until it was captured.
#[inline(always)]
fn device(opt: *mut bpf_sockopt, app: &AppSocket) {
    if app.device == 0 || load!((*opt).optlen) != 0 {
        return;
    }
    // SAFETY: the name is copied at once; the agent replaces it as a whole.
    let Some(name) = (unsafe { DEVICES.get(app.device) }).copied() else {
        return;
    };
    if write_name(opt, &name) {
        let len = name.iter().take_while(|byte| **byte != 0).count() + 1;
        // SAFETY: as above.
        unsafe { core::ptr::write_volatile(&raw mut (*opt).optlen, len as i32) };
    }
}

/// The congestion control from before, unless the application has chosen another since.
#[inline(always)]
fn congestion(opt: *mut bpf_sockopt, app: &AppSocket) {
    let Some(now) = value::<[u8; 6]>(opt) else {
        return;
    };
    // SAFETY: `value` has compared its place with the end of the buffer.
    let is_ours = unsafe { now.read_unaligned() } == *b"cubic\0";
    if is_ours && app.congestion[0] != 0 {
        write_name(opt, &app.congestion);
    }
}

/// Lowers a number that is of the loopback hop.
#[inline(always)]
fn at_most(opt: *mut bpf_sockopt, limit: u32) {
    let Some(place) = value::<u32>(opt) else {
        return;
    };
    // SAFETY: `value` has compared its place with the end of the buffer.
    unsafe {
        if place.read_unaligned() > limit {
            place.write_unaligned(limit);
        }
    }
}

/// Writes a name with its final zeros, if there is room for it.
#[inline(always)]
fn write_name(opt: *mut bpf_sockopt, name: &[u8; NAME_BYTES]) -> bool {
    let Some(place) = value::<[u8; NAME_BYTES]>(opt) else {
        return false;
    };
    // SAFETY: `value` has compared its place with the end of the buffer.
    unsafe { place.write_unaligned(*name) };
    true
}

/// Where a value of this size stands in the caller's buffer, if there is room for it.
#[inline(always)]
fn value<T>(opt: *mut bpf_sockopt) -> Option<*mut T> {
    // SAFETY: the context is valid while the program runs; not volatile, for the verifier tracks these fields as the
    // buffer's bounds.
    let (start, end) = unsafe {
        (
            (*opt).__bindgen_anon_2.optval as usize,
            (*opt).__bindgen_anon_3.optval_end as usize,
        )
    };
    (start + size_of::<T>() <= end).then_some(start as *mut T)
}
