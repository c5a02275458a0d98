//! The fence around captured datagrams: what goes to an address that stands for a destination stays on loopback, and the
//! agent can tell that it comes from a captured application.
//!
//! An application may choose a link for a single datagram (IP_PKTINFO, IP_UNICAST_IF), after which the kernel would send
//! what is meant for the agent there, as it is. And any process of this host can send to the agent's port; only those of
//! captured cgroups are marked here, and the agent's sockets drop the rest.

use aya_ebpf::{
    bindings::{__sk_buff, bpf_sock},
    helpers::generated::{bpf_sk_fullsock, bpf_skb_load_bytes},
    macros::cgroup_skb,
    programs::SkBuffContext,
};
use session_ebpf_common::{Words, counter, id_of};

use crate::{access::load, connect::IPPROTO_UDP, gate::IPV4, maps, maps::SETTINGS, ops::mapped};

/// Verdicts of a cgroup_skb program.
const PASS: i32 = 1;
const DROP: i32 = 0;
/// Index of the loopback device in every network namespace (`LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;
/// Offsets of the destination in an IP header.
const TO4_AT: u32 = 16;
const TO6_AT: u32 = 24;

/// A packet that a captured cgroup sends.
#[cgroup_skb(egress)]
pub fn fence_udp(ctx: SkBuffContext) -> i32 {
    let skb = ctx.skb.skb;
    if !is_udp(skb) {
        return PASS;
    }
    if destination(skb).is_none_or(|to| id_of(&to).is_none()) {
        return PASS;
    }
    if load!((*skb).ifindex) != LOOPBACK {
        maps::count(counter::UDP_STRAY);
        return DROP;
    }
    if let Some(settings) = SETTINGS.get(0) {
        // SAFETY: the context is valid while the program runs; the verifier checks that the field may be written.
        unsafe { core::ptr::write_volatile(&raw mut (*skb).mark, settings.udp_mark) };
    }
    PASS
}

#[inline(always)]
fn is_udp(skb: *mut __sk_buff) -> bool {
    // SAFETY: the context is valid while the program runs; not volatile, for the verifier tracks this field as a socket
    // pointer.
    let sk = unsafe { (*skb).__bindgen_anon_2.sk };
    if sk.is_null() {
        return false;
    }
    // SAFETY: the verifier has seen that the pointer is not null.
    let sk: *mut bpf_sock = unsafe { bpf_sk_fullsock(sk) };
    !sk.is_null() && load!((*sk).protocol) == IPPROTO_UDP
}

/// Where the packet goes.
#[inline(always)]
fn destination(skb: *mut __sk_buff) -> Option<Words> {
    if load!((*skb).protocol) == IPV4 {
        return words::<1>(skb, TO4_AT).map(|[v4]| mapped(v4));
    }
    words::<4>(skb, TO6_AT)
}

/// Words of the packet, from its IP header on.
#[inline(always)]
fn words<const N: usize>(skb: *mut __sk_buff, offset: u32) -> Option<[u32; N]> {
    let mut words = [0_u32; N];
    // SAFETY: the buffer outlives the call and its length is given.
    let loaded = unsafe {
        bpf_skb_load_bytes(
            skb.cast(),
            offset,
            words.as_mut_ptr().cast(),
            size_of::<[u32; N]>() as u32,
        )
    };
    (loaded == 0).then_some(words)
}
