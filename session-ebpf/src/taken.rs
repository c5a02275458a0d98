//! Which of the agent's IPv6 ports a socket with a port of its own can reach.
//!
//! IPv4 has an address on loopback for each destination. All IPv6 connections lead to `::1`: two from one source port,
//! which differ by their destinations, are told apart there by the agent's port alone.

use aya_ebpf::{
    bindings::{
        bpf_sock, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
    },
    helpers::generated::{bpf_sk_release, bpf_skc_lookup_tcp},
    programs::SockAddrContext,
};
use session_ebpf_common::{Ports, V6_PORTS};

use crate::{
    access::load,
    ctx::{SockAddr as _, Words},
    maps,
};

/// `::1`.
pub const LOOPBACK6: Words = [0, 0, 0, 1_u32.to_be()];
/// Bytes of an IPv6 tuple.
const TUPLE_BYTES: u32 = size_of::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2>() as u32;
/// The network namespace of the socket that calls (`BPF_F_CURRENT_NETNS`).
const CURRENT_NETNS: u64 = u64::MAX;

/// The slot of [`Ports::v6`] for a connection to `addr` and `port`: `first`, or the next one that no other connection
/// from the same address and port leads to. If there is none, `first`, and the kernel says EADDRNOTAVAIL.
#[inline(always)]
pub fn free_slot(
    ctx: &SockAddrContext,
    ports: &Ports,
    first: usize,
    addr: &Words,
    port: u16,
) -> usize {
    let own = ctx.local_port();
    if own == 0 {
        // The kernel chooses one that is free.
        return first;
    }
    let source = ctx.source6();
    // Not bound to an address, it gets that of the way to `::1`.
    let source = if source == [0; 4] { LOOPBACK6 } else { source };
    for step in 0..V6_PORTS {
        let slot = (first + step) & (V6_PORTS - 1);
        let tuple = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 {
            saddr: LOOPBACK6,
            daddr: source,
            sport: ports.v6[slot].to_be(),
            dport: own.to_be(),
        };
        if is_free(ctx, tuple, addr, port) {
            return slot;
        }
    }
    first
}

/// Whether a connection to `addr` and `port` may use the pair, seen as its answers have it.
#[inline(always)]
fn is_free(
    ctx: &SockAddrContext,
    tuple: bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
    addr: &Words,
    port: u16,
) -> bool {
    let mut tuple = bpf_sock_tuple {
        __bindgen_anon_1: bpf_sock_tuple__bindgen_ty_1 { ipv6: tuple },
    };
    // SAFETY: context and tuple outlive the call; the length is that of an IPv6 tuple. What is returned is null, or a
    // socket of which a reference is held.
    let sk: *mut bpf_sock = unsafe {
        bpf_skc_lookup_tcp(
            ctx.raw().cast(),
            &raw mut tuple,
            TUPLE_BYTES,
            CURRENT_NETNS,
            0,
        )
    };
    if sk.is_null() {
        return true;
    }
    let listens = load!((*sk).state) == maps::TCP_LISTEN;
    // The pair that a second connection to one destination needs is taken natively, too.
    let same = maps::app_socket(sk)
        .is_some_and(|app| app.original.addr == *addr && app.original.port == port);
    // SAFETY: the lookup took a reference to this socket; it is given back exactly once.
    unsafe { bpf_sk_release(sk.cast()) };
    listens || same
}
