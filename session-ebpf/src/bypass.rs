//! The local bypass: messages of an application go straight into the queue of the agent's socket, past TCP on loopback.
//!
//! Only in this direction: what is put into an application's own socket this way, the application reads differently
//! (splice, MSG_WAITALL, SO_RCVLOWAT). `Bypassed::may_redirect` says when a message may be redirected, and why the order
//! stays. The agent says through `BYPASS_SHARED` what it has read.

use aya_ebpf::{
    Global,
    bindings::{BPF_F_INGRESS, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, bpf_sock, sk_action::SK_PASS},
    btf_maps::SkStorage,
    helpers::generated::{
        bpf_map_delete_elem, bpf_probe_read_kernel, bpf_skc_to_tcp_sock, bpf_sock_hash_update,
    },
    macros::{btf_map, map, sk_msg},
    maps::{Array, HashMap, SockHash},
    programs::{SkMsgContext, SockOpsContext},
};
use session_ebpf_common::{
    BYPASS_NO_SLOT, BypassSlot, Bypassed, DNS_PORT, FlowKey, counter, phase,
};

use crate::{access::load, maps, ops::SockOps as _};

/// 1 where the bypass is on. Otherwise the verifier removes what belongs to it.
#[unsafe(no_mangle)]
static LOCAL_BYPASS: Global<u8> = Global::new(0);
/// Where fields are in this kernel's `struct tcp_sock`, in bytes: TCP's next sequence number (`write_seq`), the protocol
/// above (`icsk_ulp_ops`) and the socket's flags (`sk_flags`); and the bit of `SOCK_ZEROCOPY` in those.
#[unsafe(no_mangle)]
static BYPASS_WRITE_SEQ: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static BYPASS_ULP: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static BYPASS_FLAGS: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static BYPASS_ZEROCOPY: Global<u32> = Global::new(0);

/// Sockets of applications. Their messages go through [`past_tcp`].
#[map]
static BYPASS_APPS: SockHash<FlowKey> = SockHash::with_max_entries(1, 0);
/// Accepted sockets of the agent.
#[map]
static BYPASS_AGENTS: SockHash<FlowKey> = SockHash::with_max_entries(1, 0);
/// Which of `BYPASS_SHARED` a connection has, once the agent has taken it.
#[map]
static BYPASS_SLOTS: HashMap<FlowKey, u32> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);
/// What the agent and [`past_tcp`] tell each other.
#[map]
static BYPASS_SHARED: Array<BypassSlot> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[btf_map]
static BYPASSED: SkStorage<Bypassed> = SkStorage::new();

/// The application's side of a captured connection is established, and nothing that it sent has been acknowledged: TCP Fast
/// Open is off at the agent's listeners. Bytes that were taken with the SYN would lie before `snd_una`, and so be counted
/// where they are read, but not where they are sent: the agent would seem to have read all while as many bytes still wait
/// in TCP's queue, and what is redirected then would overtake those.
#[inline(always)]
pub fn begin(ctx: &SockOpsContext, sk: *mut bpf_sock, key: &FlowKey) {
    if LOCAL_BYPASS.load() == 0 {
        return;
    }
    let Some(app) = maps::app_socket(sk) else {
        return;
    };
    // A socket that is not captured any more may carry what it was. Questions about names are short, and may be answered
    // by the agent itself.
    if app.key != *key || app.original.port == DNS_PORT {
        return;
    }
    // Completions of what is sent without copying would be wrong.
    if tcp_field(sk, BYPASS_FLAGS.load()).is_none_or(has_zerocopy) {
        return;
    }
    let Some(state) = maps::storage(&BYPASSED, sk, true) else {
        maps::count(counter::NO_STORAGE);
        return;
    };
    *state = Bypassed {
        key: *key,
        seq: load!((*ctx.raw()).snd_una),
        slot: BYPASS_NO_SLOT,
        ..Bypassed::default()
    };
    // SAFETY: the context is valid while the program runs; the verifier checks the map and the key's place. A socket that
    // the kernel refuses, such as a subflow of Multipath TCP, goes on by TCP.
    unsafe {
        let mut key = *key;
        bpf_sock_hash_update(
            ctx.raw(),
            (&raw const BYPASS_APPS).cast_mut().cast(),
            (&raw mut key).cast(),
            0,
        );
    }
}

/// The application has ended its direction. Its socket is one of TCP alone again before it can wait for an answer: a read
/// that waits in a socket that takes part fails when the other end acknowledges the end.
#[inline(always)]
pub fn end(key: &FlowKey) {
    if LOCAL_BYPASS.load() == 0 {
        return;
    }
    // SAFETY: the verifier checks the map and the key's place. A socket that is not there is left alone.
    unsafe {
        bpf_map_delete_elem(
            (&raw const BYPASS_APPS).cast_mut().cast(),
            core::ptr::from_ref(key).cast(),
        );
    }
}

#[inline(always)]
fn has_zerocopy(flags: u64) -> bool {
    flags >> (BYPASS_ZEROCOPY.load() & 63) & 1 != 0
}

/// An application sends a message.
#[sk_msg]
pub fn past_tcp(ctx: SkMsgContext) -> u32 {
    if redirect(&ctx) {
        maps::count(counter::BYPASSED);
    } else {
        maps::count(counter::NOT_BYPASSED);
    }
    // Where it was redirected the kernel goes by that; see `sk_psock_msg_verdict` in net/core/skmsg.c.
    SK_PASS
}

/// Redirects it if that is right; otherwise it goes by TCP.
#[inline(always)]
fn redirect(ctx: &SkMsgContext) -> bool {
    // SAFETY: the context is valid while the program runs; not volatile, for the verifier tracks this field as a socket
    // pointer.
    let sk = unsafe { (*ctx.msg).__bindgen_anon_3.sk };
    let size = load!((*ctx.msg).size);
    let Some(state) = maps::storage(&BYPASSED, sk, false) else {
        return false;
    };
    // A protocol above, such as the kernel's TLS, gives its plain text to this program: that must go its own way.
    if tcp_field(sk, BYPASS_ULP.load()) != Some(0) {
        return false;
    }
    if state.slot == BYPASS_NO_SLOT {
        // SAFETY: the value is one aligned word, copied at once.
        let Some(slot) = (unsafe { BYPASS_SLOTS.get(state.key) }) else {
            return false;
        };
        state.slot = *slot;
    }
    let Some(shared) = BYPASS_SHARED.get_ptr_mut(state.slot) else {
        return false;
    };
    // SAFETY: an aligned u64 inside a map value, valid for the program's life; volatile, for the agent changes it.
    let read = unsafe { (&raw const (*shared).read).read_volatile() };
    let Some(seq) = tcp_field(sk, BYPASS_WRITE_SEQ.load()) else {
        return false;
    };
    let before = state.phase;
    let may = state.may_redirect(size, seq as u32, read);
    if may {
        let key = state.key;
        if BYPASS_AGENTS.redirect_msg(ctx, key, BPF_F_INGRESS.into()) == i64::from(SK_PASS) {
            state.redirected = state.redirected.wrapping_add(size.into());
            return true;
        }
        // The agent has closed its socket: TCP answers as it does then.
        state.phase = phase::LEFT;
    }
    if state.phase == phase::LEFT && before != phase::LEFT {
        // SAFETY: as above.
        unsafe { (&raw mut (*shared).left).write_volatile(1) };
    }
    false
}

/// Eight bytes of the kernel's `struct tcp_sock`.
#[inline(always)]
fn tcp_field(sk: *mut bpf_sock, offset: u32) -> Option<u64> {
    if sk.is_null() {
        return None;
    }
    let mut value = 0_u64;
    // SAFETY: the verifier checks that this is a live socket; a read from a wrong place fails or gives a wrong value, and
    // harms nothing else.
    unsafe {
        let tcp = bpf_skc_to_tcp_sock(sk.cast());
        if tcp.is_null() {
            return None;
        }
        let place = tcp.cast::<u8>().wrapping_add(offset as usize);
        let failed = bpf_probe_read_kernel((&raw mut value).cast(), 8, place.cast());
        (failed == 0).then_some(value)
    }
}
