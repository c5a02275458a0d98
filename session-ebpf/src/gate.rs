//! The gate: holds the SYN of a captured connection until the agent has heard from the target.
//!
//! Without it every captured connect() would succeed, because the agent's listener always does. The first SYN goes to
//! the agent through a ring buffer and not onto loopback; the agent sends it on by itself once the target is connected,
//! or answers with what the target said. Retransmissions are held as well, for one that slips through would connect the
//! application to a target that has not answered.
//!
//! A SYN goes on by itself only to the agent's own listener, or to a port where nobody listens, which answers with a reset.
//! It never goes to another that listens where the agent could not, or does not any more: then it is held until the
//! application's time is over.
//!
//! It runs for every packet that captured cgroups send. All but the handshakes of captured sockets leave it after one
//! look into the socket's storage.

use aya_ebpf::{
    bindings::{__sk_buff, bpf_sock},
    helpers::generated::{bpf_sk_fullsock, bpf_sk_lookup_tcp, bpf_sk_release, bpf_skb_load_bytes},
    macros::cgroup_skb,
    programs::SkBuffContext,
};
use session_ebpf_common::{
    AppSocket, FlowKey, Knock, Namespace, SYN_BYTES_MAX, counter, gate, knock,
};

use crate::{
    access::load,
    maps::{self, HANDSHAKES, KNOCKS},
};

/// Verdicts of a cgroup_skb program.
const PASS: i32 = 1;
const HOLD: i32 = 0;

/// `BPF_F_CURRENT_NETNS` of the kernel's bpf.h.
pub const CURRENT_NETNS: u64 = u64::MAX;
/// `ETH_P_IP` as the context has it.
pub const IPV4: u32 = 0x0800_u16.to_be() as u32;
const IPV6_HEADER_BYTES: u32 = 40;
/// Offset of the flags in a TCP header, and those that tell a first SYN from everything else.
const TCP_FLAGS_AT: u32 = 13;
/// Offset of the header's length, in the upper half of the byte and in words.
const TCP_LENGTH_AT: u32 = 12;
const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const SYN_ACK_RST_FIN: u8 = 0x17;
/// How often is looked whether the agent's end stands: tens of microseconds, several times what the kernel needs for it.
const LOOKS: u32 = 1024;

/// A packet that a captured cgroup sends.
#[cgroup_skb(egress)]
pub fn hold_syn(ctx: SkBuffContext) -> i32 {
    let skb = ctx.skb.skb;
    let Some(app) = captured_sender(skb) else {
        return PASS;
    };
    if app.gate == gate::OPEN || app.gate == gate::PASSED {
        return PASS;
    }
    let (flags, headers) = (tcp_flags(skb), headers_len(skb));
    if flags & SYN_ACK_RST_FIN != SYN {
        let says_something = flags & FIN != 0 || load!((*skb).len) > headers;
        return behind(app, says_something);
    }
    if app.gate == gate::ARMED {
        return first(skb, app, headers);
    }
    again(skb, app)
}

/// State of the captured socket that sends the packet, if one does.
#[inline(always)]
fn captured_sender<'a>(skb: *mut __sk_buff) -> Option<&'a mut AppSocket> {
    // SAFETY: the context is valid while the program runs; not volatile, for the verifier tracks this field as a socket
    // pointer.
    let sk = unsafe { (*skb).__bindgen_anon_2.sk };
    if sk.is_null() {
        return None;
    }
    // SAFETY: the verifier has seen that the pointer is not null.
    let sk: *mut bpf_sock = unsafe { bpf_sk_fullsock(sk) };
    maps::app_socket(sk)
}

/// Where the packet's TCP header begins.
#[inline(always)]
fn tcp_at(skb: *mut __sk_buff) -> u32 {
    if load!((*skb).protocol) == IPV4 {
        u32::from(byte(skb, 0).unwrap_or(0) & 0x0f) * 4
    } else {
        // A socket that sends extension headers of its own is not held.
        IPV6_HEADER_BYTES
    }
}

/// The packet's TCP flags; none if it has no such header.
#[inline(always)]
fn tcp_flags(skb: *mut __sk_buff) -> u8 {
    byte(skb, tcp_at(skb) + TCP_FLAGS_AT).unwrap_or(0)
}

/// Length of the packet's headers.
#[inline(always)]
fn headers_len(skb: *mut __sk_buff) -> u32 {
    let tcp = tcp_at(skb);
    tcp + u32::from(byte(skb, tcp + TCP_LENGTH_AT).unwrap_or(0) >> 4) * 4
}

/// A byte of the packet, from its IP header on.
#[inline(always)]
pub fn byte(skb: *mut __sk_buff, offset: u32) -> Option<u8> {
    let mut byte = 0_u8;
    // SAFETY: the buffer outlives the call and its length is given.
    let loaded = unsafe { bpf_skb_load_bytes(skb.cast(), offset, (&raw mut byte).cast(), 1) };
    (loaded == 0).then_some(byte)
}

/// No SYN, so the application's end stands. What it says first waits until the agent's does, too.
///
/// Where connect() itself sends the SYN, both ends stand before it returns, for one CPU does it all. The agent sends a held one on
/// from a CPU of its own, and there the handshake is still being finished while the application goes on elsewhere. While
/// the kernel replaces the request by the connection (`inet_ehash_insert` of net/ipv4/inet_hashtables.c), what comes finds neither of
/// them, but the listener, which resets it.
#[inline(always)]
fn behind(app: &mut AppSocket, says_something: bool) -> i32 {
    // Somebody began to listen while the SYN was under way.
    if app.gate == gate::FORSAKEN && !agent_listens(app) {
        return HOLD;
    }
    app.gate = match app.gate {
        // The acknowledgement that finishes the handshake must go on.
        gate::HELD | gate::FORSAKEN if !says_something => gate::ANSWERED,
        gate::ANSWERED if !says_something && is_filed(&app.key) => gate::ANSWERED,
        gate::ANSWERED => {
            await_agent(&app.key);
            gate::PASSED
        }
        // Without one before it, it finishes the handshake itself.
        _ => gate::PASSED,
    };
    PASS
}

/// Waits until the agent's end stands, or has had the time for it.
#[inline(always)]
fn await_agent(key: &FlowKey) {
    for _ in 0..LOOKS {
        if !is_filed(key) {
            break;
        }
    }
}

/// Whether the agent's end has not taken the handshake yet.
#[inline(always)]
fn is_filed(key: &FlowKey) -> bool {
    HANDSHAKES.get_ptr(key).is_some()
}

/// A retransmission: it may go on if the agent has let the handshake through; or if it hangs, and the connection's rule
/// would rather have it wait there than not be made; or if the agent has gone or could not come here, so that its port
/// answers with a reset.
#[inline(always)]
fn again(skb: *mut __sk_buff, app: &mut AppSocket) -> i32 {
    // SAFETY: one field is read at once; the agent's update of it is the only one there is.
    let admitted = unsafe { HANDSHAKES.get(app.key) }.is_some_and(|filed| filed.admitted != 0);
    let released = app.fail_closed == 0 && maps::agent_hangs();
    if admitted || (released && agent_listens(app)) {
        return PASS;
    }
    if forsaken(app) && !somebody_listens(skb, &app.key) {
        app.gate = gate::FORSAKEN;
        return PASS;
    }
    maps::count(counter::HELD_AGAIN);
    HOLD
}

/// The first SYN: it goes to the agent, or where that cannot be, to its listener. Where it has none yet, the next one is
/// the first.
#[inline(always)]
fn first(skb: *mut __sk_buff, app: &mut AppSocket, headers: u32) -> i32 {
    if tell(skb, app, headers) {
        app.gate = gate::HELD;
        maps::count(counter::HELD);
        return HOLD;
    }
    if !agent_listens(app) {
        maps::count(counter::HELD_AGAIN);
        return HOLD;
    }
    app.gate = gate::OPEN;
    maps::count(counter::NOT_HELD);
    PASS
}

/// Whether the agent lives and listens where this socket connects to.
#[inline(always)]
fn agent_listens(app: &AppSocket) -> bool {
    let (cookie, port) = (app.key.netns_cookie, app.agent_port);
    let listens = |here: &Namespace| here.listens_at(port) && maps::is_of(here, cookie);
    maps::agent_lives() && maps::namespace(cookie).is_some_and(listens)
}

/// Whether the agent has gone, or could not come here.
#[inline(always)]
fn forsaken(app: &AppSocket) -> bool {
    let cookie = app.key.netns_cookie;
    let kept_out = |here: &Namespace| here.ports.v4 == 0 && maps::is_of(here, cookie);
    maps::namespace(cookie).is_some_and(kept_out) || !maps::agent_lives()
}

/// Whether anybody listens where a SYN goes.
#[inline(always)]
fn somebody_listens(skb: *mut __sk_buff, key: &FlowKey) -> bool {
    let (from, to) = (key.app_port as u16, key.agent_port as u16);
    let (from, to) = (from.to_be_bytes(), to.to_be_bytes());
    let ports = u32::from_ne_bytes([from[0], from[1], to[0], to[1]]);
    let (own, agent) = (&key.app_addr, &key.agent_addr);
    let v4 = [own[3], agent[3], ports];
    let v6 = [
        own[0], own[1], own[2], own[3], agent[0], agent[1], agent[2], agent[3], ports,
    ];
    let (tuple, len) = if load!((*skb).protocol) == IPV4 {
        (v4.as_ptr(), size_of_val(&v4))
    } else {
        (v6.as_ptr(), size_of_val(&v6))
    };
    // SAFETY: `struct bpf_sock_tuple` is addresses and ports of IPv4 or of IPv6, told apart by the length that is given;
    // it outlives the call.
    let sk = unsafe {
        bpf_sk_lookup_tcp(
            skb.cast(),
            tuple.cast_mut().cast(),
            len as u32,
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

#[inline(always)]
fn tell(skb: *mut __sk_buff, app: &AppSocket, len: u32) -> bool {
    if len == 0 || len > SYN_BYTES_MAX as u32 {
        return false;
    }
    let Some(mut slot) = KNOCKS.reserve::<Knock>(0) else {
        return false;
    };
    slot.write(Knock {
        key: app.key,
        original: app.original,
        kind: knock::SYN,
        len,
        syn: [0; SYN_BYTES_MAX],
    });
    let to = slot.as_mut_ptr();
    // SAFETY: the slot holds a Knock, whose `syn` has room for `len` bytes, which the verifier checks as well.
    let loaded = unsafe { bpf_skb_load_bytes(skb.cast(), 0, (&raw mut (*to).syn).cast(), len) };
    if loaded != 0 {
        slot.discard(0);
        return false;
    }
    // Before it is told: noted afterwards, it could stand though the agent has looked, and nothing would take it back.
    maps::note_unanswered();
    slot.submit(0);
    true
}
