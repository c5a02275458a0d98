//! The fence around captured datagrams: what goes to an address that stands for a destination stays on loopback, and the
//! agent can tell that it comes from a captured application.
//!
//! An application may choose a link for a single datagram (IP_PKTINFO, IP_UNICAST_IF), after which the kernel would send
//! what is meant for the agent there, as it is. And any process of this host can send to the agent's port; only those of
//! captured cgroups are marked here, and the agent's sockets drop the rest.
//!
//! A datagram that was sent in a network namespace where the agent has no socket yet does not go on, for nobody would be
//! there, or somebody else. It goes to the agent through a ring buffer, and is read when the agent has come.

use core::arch::asm;

use aya_ebpf::{
    bindings::{__sk_buff, bpf_sock},
    helpers::generated::{bpf_sk_fullsock, bpf_sk_lookup_udp, bpf_sk_release, bpf_skb_load_bytes},
    macros::cgroup_skb,
    programs::SkBuffContext,
};
use session_ebpf_common::{HELD_BYTES_MAX, HeldDatagram, Stranded, Words, counter, id_of};

use crate::{
    access::load,
    connect::IPPROTO_UDP,
    gate::{CURRENT_NETNS, IPV4, byte},
    maps::{self, HELD_DATAGRAMS, SETTINGS},
    ops::mapped,
};

/// Verdicts of a cgroup_skb program.
const PASS: i32 = 1;
const DROP: i32 = 0;
/// Drop it as a queue that is full would, which UDP tells nobody but a socket that asks for all errors (IP_RECVERR;
/// `udp_send_skb` in the kernel's net/ipv4/udp.c).
const VANISH: i32 = 2;
/// Index of the loopback device in every network namespace (`LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;
/// Offsets of the source and of the destination in an IP header.
const FROM4_AT: u32 = 12;
const TO4_AT: u32 = 16;
const TO6_AT: u32 = 24;

/// A packet that a captured cgroup sends.
#[cgroup_skb(egress)]
pub fn fence_udp(ctx: SkBuffContext) -> i32 {
    let skb = ctx.skb.skb;
    let Some(sk) = udp_sender(skb) else {
        return PASS;
    };
    if destination(skb).is_none_or(|to| id_of(&to).is_none()) {
        return PASS;
    }
    if load!((*skb).ifindex) != LOOPBACK {
        maps::count(counter::UDP_STRAY);
        return DROP;
    }
    let Some(settings) = SETTINGS.get(0) else {
        return PASS;
    };
    let mut verdict = PASS;
    // What goes to IPv6 destinations has no way to anywhere before the agent has come.
    if load!((*skb).protocol) == IPV4
        && let Some(stranded) = maps::stranded(sk)
        && stranded.netns_cookie != 0
    {
        // Programs attached at two levels run twice: what the first has kept for the agent has the mark.
        let met = if load!((*skb).mark) == settings.udp_mark {
            Met::Nobody
        } else {
            meet(skb, stranded)
        };
        match met {
            Met::Agent => {}
            Met::Nobody => verdict = VANISH,
            // A closed port answers.
            Met::Void => return PASS,
        }
    }
    // SAFETY: the context is valid while the program runs; the verifier checks that the field may be written.
    unsafe { core::ptr::write_volatile(&raw mut (*skb).mark, settings.udp_mark) };
    verdict
}

/// The socket that sends the packet, if it is one of UDP.
#[inline(always)]
fn udp_sender(skb: *mut __sk_buff) -> Option<*mut bpf_sock> {
    // SAFETY: the context is valid while the program runs; not volatile, for the verifier tracks this field as a socket
    // pointer.
    let sk = unsafe { (*skb).__bindgen_anon_2.sk };
    if sk.is_null() {
        return None;
    }
    // SAFETY: the verifier has seen that the pointer is not null.
    let sk: *mut bpf_sock = unsafe { bpf_sk_fullsock(sk) };
    (!sk.is_null() && load!((*sk).protocol) == IPPROTO_UDP).then_some(sk)
}

/// Whom a datagram meets that was sent before the agent was in its network namespace.
enum Met {
    /// The agent.
    Agent,
    /// Nobody who may have it.
    Nobody,
    /// Nobody at all, and the agent does not come.
    Void,
}

/// Looks who is at the port of a datagram to an IPv4 destination. The agent is given what is for it, also where it has
/// another port than was expected: then it tells the application so.
#[inline(always)]
fn meet(skb: *mut __sk_buff, stranded: &mut Stranded) -> Met {
    let cookie = stranded.netns_cookie;
    let Some(ports) = ports4(skb) else {
        return Met::Nobody;
    };
    let bytes = ports.to_ne_bytes();
    let port = u16::from_be_bytes([bytes[2], bytes[3]]);
    if maps::agent_lives() {
        let Some(here) = maps::namespace(cookie) else {
            keep(skb, cookie);
            return Met::Nobody;
        };
        let own = here.ports.udp4;
        if maps::is_of(here, cookie) && own != 0 {
            if own == port {
                stranded.netns_cookie = 0;
                return Met::Agent;
            }
            keep(skb, cookie);
            return Met::Nobody;
        }
    }
    if somebody_has(skb, ports) {
        Met::Nobody
    } else {
        Met::Void
    }
}

/// Both ports of a packet of UDP over IPv4, as they stand in it.
#[inline(always)]
fn ports4(skb: *mut __sk_buff) -> Option<u32> {
    let header = u32::from(byte(skb, 0)? & 0x0f) * 4;
    words::<1>(skb, header).map(|[ports]| ports)
}

/// Gives the agent a packet. Without room for it the packet is lost, as any may be.
#[inline(always)]
fn keep(skb: *mut __sk_buff, netns_cookie: u64) {
    let mut len = u64::from(load!((*skb).len));
    if len > HELD_BYTES_MAX as u64 {
        return;
    }
    // SAFETY: this is no instruction. It keeps the compiler from making one comparison of two, of which older verifiers
    // learn neither bound.
    unsafe { asm!("/* {len} */", len = inout(reg) len, options(nomem, nostack)) };
    if len == 0 {
        return;
    }
    let len = len as u32;
    let Some(mut slot) = HELD_DATAGRAMS.reserve::<HeldDatagram>(0) else {
        return;
    };
    let to = slot.as_mut_ptr();
    // SAFETY: the slot holds a HeldDatagram, whose `packet` has room for `len` bytes, which the verifier checks as well.
    // What is not written there is not read either.
    let loaded = unsafe {
        (&raw mut (*to).netns_cookie).write(netns_cookie);
        (&raw mut (*to).len).write(len);
        (&raw mut (*to).pad).write(0);
        bpf_skb_load_bytes(skb.cast(), 0, (&raw mut (*to).packet).cast(), len)
    };
    if loaded == 0 {
        slot.submit(0);
    } else {
        slot.discard(0);
    }
}

/// Whether anybody takes what goes where a packet to an IPv4 destination goes.
#[inline(always)]
fn somebody_has(skb: *mut __sk_buff, ports: u32) -> bool {
    let Some([from, to]) = words::<2>(skb, FROM4_AT) else {
        return true;
    };
    let tuple = [from, to, ports];
    // SAFETY: `struct bpf_sock_tuple` is addresses and ports of IPv4 or of IPv6, told apart by the length that is given;
    // it outlives the call.
    let sk = unsafe {
        bpf_sk_lookup_udp(
            skb.cast(),
            tuple.as_ptr().cast_mut().cast(),
            size_of_val(&tuple) as u32,
            CURRENT_NETNS,
            0,
        )
    };
    if sk.is_null() {
        return false;
    }
    // SAFETY: the lookup took a reference to this socket; it is given back exactly once.
    unsafe { bpf_sk_release(sk.cast()) };
    true
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
