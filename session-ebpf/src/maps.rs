//! Every map and load-time constant of the programs, and the few operations on them that need raw pointers.

use core::{
    arch::asm,
    sync::atomic::{Ordering, compiler_fence},
};

use aya_ebpf::{
    Global,
    bindings::{BPF_ANY, BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    btf_maps::SkStorage,
    helpers::{
        bpf_get_current_pid_tgid, bpf_ktime_get_ns, bpf_probe_read_kernel,
        generated::{
            bpf_get_current_task, bpf_map_lookup_elem, bpf_sk_release, bpf_sk_storage_delete,
            bpf_sk_storage_get,
        },
    },
    macros::{btf_map, map},
    maps::{Array, HashMap, LpmTrie, LruHashMap, RingBuf, SockMap},
};
use session_ebpf_common::{
    AppSocket, Assigned, CONVERSATIONS_MAX, COUNTERS as COUNTER_SLOTS, Conversation, DEVICES_MAX,
    Destination, FILTER_PREFIXES_MAX, FILTERS_MAX, FilterPolicy, FlowKey, HANDSHAKE_SLOTS,
    HELD_RING_BYTES, HUNG_AFTER_NS, KNOCKS_BYTES, NAME_BYTES, NAMESPACES_MAX, Namespace,
    NetnsOfThread, Newcomer, Opening, Original, POLICY_SLOTS, PREFIXES_MAX, Policy, Settings,
    Stranded, TELL_AGAIN_NS, UDP_IDS_MAX, counter,
};

use crate::access::load;

/// `BPF_TCP_LISTEN` of the kernel's bpf.h.
pub const TCP_LISTEN: u32 = 10;

/// 1 where the kernel has `bpf_set_retval` (5.18). Below, a refusal shows as EPERM instead of ECONNREFUSED; the
/// verifier removes the branch that is not taken.
#[unsafe(no_mangle)]
pub static HAS_SET_RETVAL: Global<u8> = Global::new(1);

/// 1 where the kernel has `bpf_skc_to_mptcp_sock` (5.19, with CONFIG_MPTCP).
#[unsafe(no_mangle)]
pub static HAS_MPTCP: Global<u8> = Global::new(0);

/// Where the kernel has a thread's network namespace; all 0 where that is not known.
#[unsafe(no_mangle)]
pub static NETNS_OF_THREAD: Global<NetnsOfThread> = Global::new(NetnsOfThread {
    nsproxy: 0,
    net: 0,
    cookie: 0,
});

#[map]
pub static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);
/// The network namespaces that the agent has looked at, by their cookies.
#[map]
static NAMESPACES: HashMap<u64, Namespace> = HashMap::with_max_entries(NAMESPACES_MAX, 0);
/// A socket on which the agent listens for nobody. The kernel takes it out when the agent has closed it, and so when the
/// agent has died: however that came, and whichever network namespace asks.
#[map]
static AGENT: SockMap = SockMap::with_max_entries(1, 0);
#[map]
pub static PREFIXES4: LpmTrie<[u8; 4], u32> =
    LpmTrie::with_max_entries(PREFIXES_MAX, 1 /* BPF_F_NO_PREALLOC */);
#[map]
pub static PREFIXES6: LpmTrie<[u8; 16], u32> =
    LpmTrie::with_max_entries(PREFIXES_MAX, 1 /* BPF_F_NO_PREALLOC */);
#[map]
pub static POLICIES: Array<Policy> = Array::with_max_entries(POLICY_SLOTS, 0);
/// Numbers of filters, by the id of their scope's cgroup.
#[map]
pub static FILTERS: HashMap<u64, u32> = HashMap::with_max_entries(FILTERS_MAX, 0);
/// What filters say: by number (network order) and IPv4 address.
#[map]
pub static FILTERED4: LpmTrie<[u8; 8], FilterPolicy> =
    LpmTrie::with_max_entries(FILTER_PREFIXES_MAX, 1 /* BPF_F_NO_PREALLOC */);
/// The same for IPv6.
#[map]
pub static FILTERED6: LpmTrie<[u8; 20], FilterPolicy> =
    LpmTrie::with_max_entries(FILTER_PREFIXES_MAX, 1 /* BPF_F_NO_PREALLOC */);
#[map]
pub static HANDSHAKES: HashMap<FlowKey, Original> = HashMap::with_max_entries(HANDSHAKE_SLOTS, 0);
/// Names of the host's links, by their index.
#[map]
pub static DEVICES: HashMap<u32, [u8; NAME_BYTES]> = HashMap::with_max_entries(DEVICES_MAX, 0);
/// Tells the agent of held handshakes.
#[map]
pub static KNOCKS: RingBuf = RingBuf::with_byte_size(KNOCKS_BYTES, 0);
/// Datagrams that wait for the agent to come to their network namespace. A ring of their own, so that however many there
/// are, the agent hears of handshakes.
#[map]
pub static HELD_DATAGRAMS: RingBuf = RingBuf::with_byte_size(HELD_RING_BYTES, 0);
/// Ids of UDP destinations. Not allocated in advance, like the next: most hosts need few.
#[map]
pub static UDP_IDS: HashMap<Destination, Assigned> =
    HashMap::with_max_entries(UDP_IDS_MAX, 1 /* BPF_F_NO_PREALLOC */);
/// UDP destinations by their ids.
#[map]
pub static UDP_DESTINATIONS: HashMap<u32, Destination> =
    HashMap::with_max_entries(UDP_IDS_MAX, 1 /* BPF_F_NO_PREALLOC */);
/// Who began the conversations of bound UDP sockets.
#[map]
pub static CONVERSATIONS: LruHashMap<Conversation, Opening> =
    LruHashMap::with_max_entries(CONVERSATIONS_MAX, 0);
#[map]
static COUNTERS: Array<u64> = Array::with_max_entries(COUNTER_SLOTS, 0);
/// Captured sockets of applications.
#[btf_map]
static APP_SOCKETS: SkStorage<AppSocket> = SkStorage::new();
/// Accepted sockets of the agent. A map of its own, so that the agent's getpeername stays truthful.
#[btf_map]
static ACCEPTED: SkStorage<Original> = SkStorage::new();
/// UDP sockets that were bound by their application: one of `port_of`.
#[btf_map]
static BOUND: SkStorage<u32> = SkStorage::new();
/// UDP sockets of network namespaces that the agent did not know.
#[btf_map]
static STRANDED: SkStorage<Stranded> = SkStorage::new();

/// Adds to a counter, atomically. By hand, because the target offers no atomic type with arithmetic, while the
/// instruction set has had this one from the start.
#[inline(always)]
fn add(index: u32, amount: i64) {
    if let Some(cell) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: the cell is an aligned u64 inside a map value, valid for the program's life.
        unsafe {
            asm!("lock *(u64 *)({cell} + 0) += {amount}", cell = in(reg) cell, amount = in(reg) amount)
        };
    }
}

/// Adds one to a counter.
#[inline(always)]
pub fn count(index: u32) {
    add(index, 1);
}

/// Handshakes in flight.
#[inline(always)]
pub fn in_flight() -> u64 {
    // SAFETY: an aligned u64 inside a map value, valid for the program's life; volatile, for others change it.
    COUNTERS
        .get_ptr(counter::IN_FLIGHT)
        .map_or(0, |cell| unsafe { cell.read_volatile() })
}

/// Whether the agent lives.
#[inline(always)]
pub fn agent_lives() -> bool {
    let first = 0_u32;
    // SAFETY: the verifier checks the map and its key; the socket that it returns is null or referenced.
    let sk: *mut bpf_sock = unsafe {
        bpf_map_lookup_elem(
            core::ptr::from_ref(&AGENT).cast_mut().cast(),
            core::ptr::from_ref(&first).cast(),
        )
    }
    .cast();
    if sk.is_null() {
        return false;
    }
    let state = load!((*sk).state);
    // SAFETY: the lookup took a reference to this socket; it is given back exactly once.
    unsafe { bpf_sk_release(sk.cast()) };
    state == TCP_LISTEN
}

/// Whether the calling thread is in another network namespace than its socket: the agent would look for it there in vain.
/// Not known everywhere.
#[inline(always)]
pub fn thread_is_elsewhere(netns_cookie: u64) -> bool {
    cookie_of_thread().is_some_and(|own| own != netns_cookie)
}

/// Cookie of the network namespace of the calling thread.
#[inline(always)]
fn cookie_of_thread() -> Option<u64> {
    let at = NETNS_OF_THREAD.load();
    if at.nsproxy == 0 {
        return None;
    }
    // SAFETY: the helper takes no arguments.
    let task = unsafe { bpf_get_current_task() };
    let nsproxy = kernel_word(task + u64::from(at.nsproxy))?;
    let net = kernel_word(nsproxy + u64::from(at.net))?;
    kernel_word(net + u64::from(at.cookie))
}

/// A word of the kernel's memory.
#[inline(always)]
fn kernel_word(at: u64) -> Option<u64> {
    // SAFETY: the helper reads nothing where there is nothing.
    unsafe { bpf_probe_read_kernel(at as *const u64) }.ok()
}

/// Tells the agent of the calling thread, whose socket's network namespace has no listeners; false if there is no room
/// to tell.
#[inline(always)]
pub fn tell_newcomer(netns_cookie: u64) -> bool {
    let Some(mut slot) = KNOCKS.reserve::<Newcomer>(0) else {
        return false;
    };
    let process = bpf_get_current_pid_tgid();
    slot.write(Newcomer {
        netns_cookie,
        tid: process as u32,
        tgid: (process >> 32) as u32,
    });
    slot.submit(0);
    true
}

/// The agent was told of a connection.
#[inline(always)]
pub fn note_unanswered() {
    if let Some(cell) = COUNTERS.get_ptr_mut(counter::UNANSWERED_SINCE) {
        // SAFETY: an aligned u64 inside a map value, valid for the program's life; volatile, for others change it. Two
        // that set it at once set it to the same moment, as far as it matters.
        unsafe {
            if cell.read_volatile() == 0 {
                cell.write_volatile(bpf_ktime_get_ns());
            }
        }
    }
}

/// Whether the agent lives and looks at nothing: no heartbeat wakes it, so only one that was told of something is asked.
#[inline(always)]
pub fn agent_hangs() -> bool {
    let Some(cell) = COUNTERS.get_ptr(counter::UNANSWERED_SINCE) else {
        return false;
    };
    // SAFETY: as above; the helper takes no arguments and reads a clock.
    let (since, now) = unsafe { (cell.read_volatile(), bpf_ktime_get_ns()) };
    since != 0 && now.saturating_sub(since) > HUNG_AFTER_NS
}

/// What the agent has told of a network namespace, if it has. What is read of it is believed only if [`is_of`] says so
/// afterwards.
#[inline(always)]
pub fn namespace(netns_cookie: u64) -> Option<&'static Namespace> {
    // SAFETY: the map is allocated in advance, so this stays an element's value while the program runs; but an element
    // that is replaced may become another namespace's, which `is_of` tells.
    unsafe { NAMESPACES.get(netns_cookie) }
}

/// Tells the agent again of a namespace that it could not enter, if it is time for that, and then not for a moment,
/// however many datagrams are sent there meanwhile: until the agent has looked, and says when itself.
#[inline(always)]
pub fn ask_again(netns_cookie: u64) {
    let Some(here) = NAMESPACES.get_ptr_mut(netns_cookie) else {
        return;
    };
    // SAFETY: the helper takes no arguments and reads a clock; an aligned u64 inside a map value, valid for the program's
    // life; volatile, for others change it. Of an entry that has become another namespace's, only the time changes.
    let due = unsafe {
        let (due_at, now) = (&raw mut (*here).retry_at, bpf_ktime_get_ns());
        let due = now >= due_at.read_volatile();
        if due {
            due_at.write_volatile(now + TELL_AGAIN_NS);
        }
        due
    };
    if due {
        tell_newcomer(netns_cookie);
    }
}

/// Whether what was read of `here` was of the namespace with this cookie: it comes first in the value, so that it has
/// changed when anything else has. A CPU that reads out of order may very rarely miss that: then a connection goes to a
/// port where the agent does not listen, and is refused or held there.
#[inline(always)]
pub fn is_of(here: &Namespace, netns_cookie: u64) -> bool {
    compiler_fence(Ordering::SeqCst);
    // SAFETY: an aligned u64 inside a map value, valid for the program's life; volatile, for the agent changes it.
    unsafe { (&raw const here.cookie).read_volatile() == netns_cookie }
}

/// Files a handshake; false if the map is full.
#[inline(always)]
pub fn file_handshake(key: &FlowKey, original: &Original) -> bool {
    if HANDSHAKES.insert(key, original, BPF_NOEXIST.into()).is_ok() {
        count(counter::IN_FLIGHT);
        return true;
    }
    // The same addresses again: programs attached at two levels run twice, and a stale entry is overwritten.
    HANDSHAKES.get_ptr(key).is_some() && HANDSHAKES.insert(key, original, BPF_ANY.into()).is_ok()
}

/// Removes a handshake; true for the one caller that did.
#[inline(always)]
pub fn drop_handshake(key: &FlowKey) -> bool {
    let removed = HANDSHAKES.remove(key).is_ok();
    if removed {
        add(counter::IN_FLIGHT, -1);
    }
    removed
}

/// What a map keeps with a socket; with `create`, made if there is nothing.
#[inline(always)]
pub fn storage<'a, T>(map: &SkStorage<T>, sk: *mut bpf_sock, create: bool) -> Option<&'a mut T> {
    if sk.is_null() {
        return None;
    }
    let flags = if create {
        u64::from(BPF_SK_STORAGE_GET_F_CREATE)
    } else {
        0
    };
    // SAFETY: the verifier checks that `map` is a socket storage of T and `sk` a live socket; the value it returns is
    // null or valid until the program ends. A socket is locked by whoever runs these hooks for it.
    unsafe {
        bpf_sk_storage_get(
            core::ptr::from_ref(map).cast_mut().cast(),
            sk.cast(),
            core::ptr::null_mut(),
            flags,
        )
        .cast::<T>()
        .as_mut()
    }
}

/// State of a captured application socket.
#[inline(always)]
pub fn app_socket<'a>(sk: *mut bpf_sock) -> Option<&'a mut AppSocket> {
    storage(&APP_SOCKETS, sk, false)
}

/// State of an application socket, made if it has none; None when the kernel has no memory for it.
#[inline(always)]
pub fn new_app_socket<'a>(sk: *mut bpf_sock) -> Option<&'a mut AppSocket> {
    storage(&APP_SOCKETS, sk, true)
}

/// Forgets the state of an application socket.
#[inline(always)]
pub fn forget_app_socket(sk: *mut bpf_sock) {
    if !sk.is_null() {
        // SAFETY: map and socket are checked by the verifier; a missing value is an error code that means nothing here.
        let _ = unsafe {
            bpf_sk_storage_delete(
                core::ptr::from_ref(&APP_SOCKETS).cast_mut().cast(),
                sk.cast(),
            )
        };
    }
}

/// Destination slot of an accepted socket of the agent, made if it has none.
#[inline(always)]
pub fn accepted_socket<'a>(sk: *mut bpf_sock) -> Option<&'a mut Original> {
    storage(&ACCEPTED, sk, true)
}

/// Remembers that an application has bound a UDP socket. Without memory for it, what it sends is captured by the rules.
#[inline(always)]
pub fn note_bound(sk: *mut bpf_sock, port_of: u32) {
    if let Some(bound) = storage(&BOUND, sk, true) {
        *bound = port_of;
    }
}

/// Who chose the port of a UDP socket that its application has bound, one of `port_of`; `None` if it has not.
#[inline(always)]
pub fn bound_by(sk: *mut bpf_sock) -> Option<u32> {
    storage(&BOUND, sk, false).map(|bound| *bound)
}

/// State of a UDP socket that waits for the agent, or did so.
#[inline(always)]
pub fn stranded<'a>(sk: *mut bpf_sock) -> Option<&'a mut Stranded> {
    storage(&STRANDED, sk, false)
}

/// The same, made if it has none; None when the kernel has no memory for it.
#[inline(always)]
pub fn new_stranded<'a>(sk: *mut bpf_sock) -> Option<&'a mut Stranded> {
    storage(&STRANDED, sk, true)
}
