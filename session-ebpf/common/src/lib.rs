//! Plain-old-data shared by Holdfast's eBPF programs and its agent.
//!
//! Everything here crosses the kernel boundary inside BPF maps, so each type has a fixed layout: fixed-width
//! integers, explicit padding, and its size asserted below. Addresses are four words in network order with IPv4
//! written as v4-mapped IPv6; ports are in host order unless a name says otherwise.
#![no_std]
// A call that is not inlined costs the verifier its knowledge of map values.
#![allow(clippy::inline_always)]

mod bypass;
mod filter;
mod policy;
mod udp;

pub use bypass::{
    BYPASS_FLOWS_MAX, BYPASS_LARGE, BYPASS_NO_SLOT, BYPASS_SMALL_MAX, BYPASS_UNREAD_MAX,
    BypassSlot, Bypassed, phase,
};
pub use filter::{
    FILTER_LEVELS, FILTER_PREFIXES_MAX, FILTER_RANGES_MAX, FILTERS_MAX, FilterPolicy, FilterRange,
};
pub use policy::{
    DNS_PEER, DNS_PORT, NAMED_PEER, POLICY_RULES_MAX, POLICY_SLOTS, PREFIXES_MAX, Policy, PortRule,
    RULE_EARLY, RULE_FAIL_CLOSED, action, protocol,
};
pub use udp::{
    Assigned, CONNECTED, CONVERSATION_IDLE_NS, CONVERSATIONS_MAX, Conversation, Destination,
    HELD_BYTES_MAX, HELD_RING_BYTES, HeldDatagram, Opening, Stranded, TELL_AGAIN_NS, UDP_IDS_MAX,
    UDP_PREFIX6, id_address, id_of, is_for_many, opener, port_of,
};

/// Ports on `::1` over which captured IPv6 connections are spread. A power of two.
///
/// All captured IPv6 connections share one address, so each port adds one range of ephemeral ports (about 28,000
/// concurrent connections by default). IPv4 needs no such list: it is spread over addresses in 127.0.0.0/9.
pub const V6_PORTS: usize = 16;
/// Slots for handshakes between `connect()` and the agent's accept queue.
pub const HANDSHAKE_SLOTS: u32 = 65_536;
/// Handshakes in flight above which a new connection is no longer captured.
///
/// Lower than [`HANDSHAKE_SLOTS`] because the check (in the connect hook) and the insertion (when the local port is
/// known) are apart: the difference is room for the connects that pass between them.
pub const HANDSHAKES_ADMITTED: u64 = HANDSHAKE_SLOTS as u64 - 4096;

/// [`Settings::gate`]: SYNs are held until the agent has heard from the target.
pub const GATE_ON: u32 = 1;

/// [`Settings::names`]: questions about names go to the agent.
pub const NAMES_ON: u32 = 1;

/// How long the agent may leave a connection unlooked at before it is taken to hang, in nanoseconds.
pub const HUNG_AFTER_NS: u64 = 1_000_000_000;

/// Longest headers of a SYN: 60 bytes of IP and 60 of TCP, the most that either can have.
pub const SYN_BYTES_MAX: usize = 120;
/// Bytes of the ring in which the programs tell of held SYNs: about 4,800 of them.
pub const KNOCKS_BYTES: u32 = 1 << 20;

/// Number of counters in the `COUNTERS` map.
pub const COUNTERS: u32 = 24;
/// Indices into the `COUNTERS` map.
pub mod counter {
    /// Captured connections whose destination is IPv4 (v4-mapped included).
    pub const CAPTURED4: u32 = 0;
    /// Captured connections whose destination is IPv6.
    pub const CAPTURED6: u32 = 1;
    /// Matching connections that found no living agent, or none in their network namespace.
    pub const AGENT_GONE: u32 = 2;
    /// Matching connections not captured because too many handshakes were in flight.
    pub const HANDSHAKES_FULL: u32 = 3;
    /// Matching connections for which the kernel had no memory left for per-socket state.
    pub const NO_STORAGE: u32 = 4;
    /// Matching connections of a socket bound to a device that the hook was not allowed to unbind.
    pub const DEVICE_BOUND: u32 = 5;
    /// Connections refused because their rule says so, be it always or while they cannot be captured.
    pub const REFUSED: u32 = 6;
    /// Handshakes handed to an accepted socket of the agent.
    pub const DELIVERED: u32 = 7;
    /// Handshakes that ended before the agent's side was established.
    pub const ABANDONED: u32 = 8;
    /// Handshakes that the agent accepted without a stored destination.
    pub const UNKNOWN: u32 = 9;
    /// Sockets that could not be put on the cubic congestion control.
    pub const NO_CUBIC: u32 = 10;
    /// Handshakes in flight now: a gauge, not a count.
    pub const IN_FLIGHT: u32 = 11;
    /// SYNs that were held.
    pub const HELD: u32 = 12;
    /// Retransmissions of held SYNs, which were held as well.
    pub const HELD_AGAIN: u32 = 13;
    /// SYNs that were let through because the agent could not be told of them.
    pub const NOT_HELD: u32 = 14;
    /// Matching connections that found an agent that does not answer.
    pub const AGENT_HUNG: u32 = 15;
    /// When the agent was told of a connection since which it has not said that it looks, in nanoseconds of CLOCK_MONOTONIC;
    /// 0 if there is none. Not a count: the programs set it, and the agent sets it back when it has looked at all that it
    /// was told of, or at some of it where that does not end.
    pub const UNANSWERED_SINCE: u32 = 16;
    /// Captured `connect()`s of UDP sockets and datagrams that were sent without it, to IPv4 destinations.
    pub const UDP4: u32 = 17;
    /// The same to IPv6 destinations.
    pub const UDP6: u32 = 18;
    /// Matching `connect()`s and datagrams for which no id was left.
    pub const UDP_FULL: u32 = 19;
    /// Ids that were given to destinations of UDP.
    pub const UDP_IDS: u32 = 20;
    /// Captured datagrams that were about to leave the host as they are, since their application had chosen a link for
    /// each of them, and were dropped.
    pub const UDP_STRAY: u32 = 21;
    /// Messages of applications that went past TCP.
    pub const BYPASSED: u32 = 22;
    /// Messages of connections that have the bypass, and went by TCP.
    pub const NOT_BYPASSED: u32 = 23;
}

/// An address as four words, network order, IPv4 as v4-mapped.
pub type Words = [u32; 4];

/// The third word of a v4-mapped address.
pub const MAPPED: u32 = 0xffff_u32.to_be();

/// Whether `addr` is a v4-mapped address.
#[inline(always)]
pub fn is_mapped(addr: &Words) -> bool {
    addr[0] == 0 && addr[1] == 0 && addr[2] == MAPPED
}

/// Whether `addr` is a loopback or the unspecified address (which Linux connects to loopback): never captured.
#[inline(always)]
pub fn is_local(addr: &Words) -> bool {
    if is_mapped(addr) {
        return u32::from_be(addr[3]) >> 24 == 127 || addr[3] == 0;
    }
    addr[0] == 0 && addr[1] == 0 && addr[2] == 0 && u32::from_be(addr[3]) <= 1
}

/// Whether `addr` is an IPv6 link-local or multicast address, which is never captured: it means something only on one
/// link of this host, so no peer could reach it.
#[inline(always)]
pub fn is_of_one_link(addr: &Words) -> bool {
    let first = u32::from_be(addr[0]);
    first >> 22 == 0xfe80 >> 6 || first >> 24 == 0xff
}

/// The address byte by byte.
#[inline(always)]
pub fn octets(addr: &Words) -> [u8; 16] {
    let mut bytes = [0_u8; 16];
    for (chunk, word) in bytes.chunks_exact_mut(4).zip(addr) {
        chunk.copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}

/// What the agent tells the programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Cookie of the agent's own network namespace.
    pub own_netns: u64,
    /// Process id (thread group) of the agent in the initial pid namespace; its own sockets are never captured.
    pub agent_tgid: u32,
    /// Mark of the datagrams that captured applications send to the agent: others are not theirs, and dropped.
    pub udp_mark: u32,
    /// [`GATE_ON`], or 0.
    pub gate: u32,
    /// Scopes that have a filter: while there is none, no filter is looked for.
    pub filters: u32,
    /// [`NAMES_ON`], or 0.
    pub names: u32,
    /// The ports that the agent will listen on in a network namespace that it does not know yet; all 0 where it may not
    /// enter any.
    pub usual: Ports,
    /// None.
    pub padding: [u16; 3],
}

/// Ports of the agent's sockets in a network namespace.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ports {
    /// Of the IPv4 listener; 0 where there are no listeners at all.
    pub v4: u16,
    /// Of the IPv6 listeners on `::1`; all 0 where that does not exist.
    pub v6: [u16; V6_PORTS],
    /// Of the socket for datagrams to IPv4 destinations; 0 where none are captured.
    pub udp4: u16,
    /// Of the socket for datagrams to IPv6 destinations; 0 where none are captured.
    pub udp6: u16,
}

impl Ports {
    /// Where datagrams to IPv4 destinations (`v4`) or to IPv6 ones go; 0 where none are captured.
    #[inline(always)]
    pub fn udp(&self, v4: bool) -> u16 {
        if v4 { self.udp4 } else { self.udp6 }
    }
}

/// Network namespaces that the programs can know at once: those with listeners and those without.
pub const NAMESPACES_MAX: u32 = 1024;
/// [`Namespace::flags`]: `DEVICES` has the names of its links.
pub const NAMES_KNOWN: u16 = 1;

/// A network namespace that the agent has looked at.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    /// Its cookie, which is its key as well: the kernel may give the memory of an entry that is replaced to another one
    /// while a program still reads it. What was read is right if this is right afterwards.
    pub cookie: u64,
    /// Where the agent listens in it; the IPv4 port is 0 where it cannot.
    pub ports: Ports,
    /// [`NAMES_KNOWN`], or 0.
    pub flags: u16,
    /// Where it cannot: when the agent is to be told of it again, in nanoseconds of CLOCK_MONOTONIC.
    pub retry_at: u64,
    /// What a connection there would have without capture.
    pub native: Native,
}

impl Namespace {
    /// Whether the agent listens at `port` in it.
    #[inline(always)]
    pub fn listens_at(&self, port: u32) -> bool {
        port != 0
            && (u32::from(self.ports.v4) == port
                || self.ports.v6.iter().any(|own| u32::from(*own) == port))
    }
}

/// Tells the agent of a connect(), or of a datagram, in a network namespace where it does not listen.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Newcomer {
    /// Cookie of the socket's network namespace.
    pub netns_cookie: u64,
    /// The thread that called, in the initial pid namespace.
    pub tid: u32,
    /// Its process.
    pub tgid: u32,
}

/// Offsets in bytes on the way from a thread to the cookie of its network namespace, in this kernel; all 0 where they are
/// not known.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetnsOfThread {
    /// `nsproxy` in `struct task_struct` (linux/sched.h).
    pub nsproxy: u32,
    /// `net_ns` in `struct nsproxy` (linux/nsproxy.h).
    pub net: u32,
    /// `net_cookie` in `struct net` (net/net_namespace.h).
    pub cookie: u32,
}

/// What a connection over the default routes has: captured applications that ask are told so.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Native {
    /// Its source address over IPv4, as v4-mapped; all 0 where there is none.
    pub source4: [u32; 4],
    /// The same over IPv6.
    pub source6: [u32; 4],
    /// MTU of the link over IPv4, in bytes; 0 where there is none.
    pub mtu4: u32,
    /// The same over IPv6.
    pub mtu6: u32,
}

/// Longest name of a congestion control or of a link, with its final zero (`TCP_CA_NAME_MAX`, `IFNAMSIZ`).
pub const NAME_BYTES: usize = 16;
/// Links whose names are known to the programs.
pub const DEVICES_MAX: u32 = 1024;

/// Where an application wanted to go.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Original {
    /// Destination address, network order, IPv4 as v4-mapped.
    pub addr: [u32; 4],
    /// Destination port.
    pub port: u16,
    /// 1 once the agent has let a held handshake through, else 0.
    pub admitted: u16,
    /// Index of the configured peer that carries the connection.
    pub peer: u32,
    /// Id of the cgroup that the connecting thread is in.
    pub cgroup: u64,
    /// When connect() was called, in nanoseconds of CLOCK_MONOTONIC: tells two connections apart that had the same
    /// addresses one after the other.
    pub called_at: u64,
}

/// Names one handshake on the loopback hop from both of its ends.
///
/// Both addresses belong to it: connections to different 127.x.y.z may share address and port on their near side.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// Cookie of the network namespace.
    pub netns_cookie: u64,
    /// Local address of the application's socket.
    pub app_addr: [u32; 4],
    /// Loopback address to which the connection was redirected.
    pub agent_addr: [u32; 4],
    /// Local port of the application's socket.
    pub app_port: u32,
    /// Port of the agent's listener.
    pub agent_port: u32,
}

/// State kept with a captured socket of an application.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AppSocket {
    /// The handshake, once its local port is known.
    pub key: FlowKey,
    /// Where the application wanted to go.
    pub original: Original,
    /// Last word of the loopback address to which the connection was redirected, network order.
    pub agent_word: u32,
    /// Port to which the connection was redirected.
    pub agent_port: u32,
    /// One of [`gate`].
    pub gate: u32,
    /// Index of the link that the socket was bound to before it was captured; 0 for none.
    pub device: u32,
    /// The address that the connection would have had.
    pub source: [u32; 4],
    /// MTU of the link that it would have used; 0 where that is not known.
    pub mtu: u32,
    /// 1 if its rule refuses what cannot be captured, else 0.
    pub fail_closed: u32,
    /// The socket's congestion control before it was captured.
    pub congestion: [u8; NAME_BYTES],
}

/// States of [`AppSocket::gate`].
pub mod gate {
    /// Nothing is held.
    pub const OPEN: u32 = 0;
    /// The next SYN is to be held.
    pub const ARMED: u32 = 1;
    /// The agent was told of the SYN and has not let it through.
    pub const HELD: u32 = 2;
    /// It was let through.
    pub const PASSED: u32 = 3;
    /// It was let go to where nobody listened, to be answered by a reset: if somebody accepts it all the same, that is
    /// not the agent, and nothing more is sent.
    pub const FORSAKEN: u32 = 4;
    /// It was let through and answered, and the application's kernel has acknowledged the answer.
    pub const ANSWERED: u32 = 5;
}

/// What the programs tell the agent about a held handshake.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Knock {
    /// The handshake.
    pub key: FlowKey,
    /// Where the application wants to go.
    pub original: Original,
    /// One of [`knock`].
    pub kind: u32,
    /// Bytes of `syn` in use.
    pub len: u32,
    /// The headers of the SYN from its IP header on, its TCP checksum not yet computed. Data in a SYN (TCP Fast Open)
    /// is left out; the application's kernel sends it again.
    pub syn: [u8; SYN_BYTES_MAX],
}

/// Values of [`Knock::kind`].
pub mod knock {
    /// A SYN is held.
    pub const SYN: u32 = 1;
    /// The application closed its socket, or its time is over; `syn` is empty.
    pub const GONE: u32 = 2;
}

/// Ports that an agent listens on, at most, as far as initial windows go.
pub const LISTENING_PORTS: usize = 14;
/// Paths whose initial window is remembered.
pub const WINDOW_SLOTS: u32 = 4096;

/// Where the agent accepts transports.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Listening {
    /// The ports; 0 where there is none.
    pub ports: [u16; LISTENING_PORTS],
    /// Initial window in segments of a transport whose path is not known.
    pub segments: u32,
}

/// Names a path, and for a transport that is dialled the port that it goes to.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct WindowKey {
    /// Our address, network order, IPv4 as v4-mapped.
    pub local: [u32; 4],
    /// The peer's.
    pub remote: [u32; 4],
    /// The peer's port; 0 for a transport that the peer dialled.
    pub remote_port: u32,
}

const _: () = {
    assert!(size_of::<Listening>() == 32);
    assert!(size_of::<WindowKey>() == 36);
    assert!(V6_PORTS.is_power_of_two());
    assert!(size_of::<Settings>() == 72);
    assert!(size_of::<Ports>() == 38);
    assert!(size_of::<Namespace>() == 96);
    assert!(size_of::<Newcomer>() == 16);
    assert!(size_of::<NetnsOfThread>() == 12);
    assert!(size_of::<Native>() == 40);
    assert!(size_of::<PortRule>() == 24);
    assert!(size_of::<Policy>() == 4 + 24 * POLICY_RULES_MAX);
    assert!(size_of::<FilterRange>() == 8);
    assert!(size_of::<FilterPolicy>() == 8 + 8 * FILTER_RANGES_MAX);
    assert!(size_of::<Original>() == 40);
    assert!(size_of::<FlowKey>() == 48);
    assert!(size_of::<AppSocket>() == 144);
    assert!(size_of::<Bypassed>() == 80);
    assert!(size_of::<BypassSlot>() == 16);
    assert!(size_of::<Knock>() == 96 + SYN_BYTES_MAX);
};

#[cfg(feature = "user")]
mod pod {
    // SAFETY: `repr(C)` structs of integers without implicit padding (sizes asserted above): any bytes are a value.
    unsafe impl aya::Pod for super::Settings {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Namespace {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Policy {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::FilterPolicy {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Original {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::FlowKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::AppSocket {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Bypassed {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::BypassSlot {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Knock {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Listening {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::WindowKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::NetnsOfThread {}
}
