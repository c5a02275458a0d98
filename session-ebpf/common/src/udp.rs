//! What captured UDP needs: the ids that stand for destinations, and who began a conversation.
//!
//! A datagram has no connection to carry its destination, so each destination has an id, and the id stands in the loopback
//! address to which the datagram goes instead: 127.128.0.0/9 for IPv4, [`UDP_PREFIX6`] for IPv6. The agent reads the id
//! from there and answers from that address; the programs turn it back into the destination's own.

use crate::{MAPPED, Words, is_mapped};

/// Destinations that have an id at once. Beyond it new ones go direct or are refused, as their rules say.
pub const UDP_IDS_MAX: u32 = 65_536;
/// Conversations of bound sockets of which it is remembered who began them; the least recently used is forgotten.
pub const CONVERSATIONS_MAX: u32 = 16_384;
/// Bits of an id. Ids are drawn at random, so that an old one is not soon somebody else's.
const ID_MASK: u32 = 0x007f_ffff;
/// Longest packet that is kept for the agent while it comes to a network namespace, with its headers. Longer ones are
/// dropped.
pub const HELD_BYTES_MAX: usize = 2032;
/// Bytes of the ring in which they wait: 127 of them.
pub const HELD_RING_BYTES: u32 = 1 << 18;
/// The upper half of 127.0.0.0/8; the lower one is TCP's.
const NET4: u32 = 0x7f80_0000;
/// The last address of that: nothing goes there but with SO_BROADCAST (`udp_sendmsg` in `net/ipv4/udp.c`: EACCES), so it stands
/// for no id.
const BROADCAST4: u32 = NET4 | ID_MASK;
/// First half of the addresses that stand for IPv6 destinations, network order. A unique local prefix (RFC 4193) of
/// Holdfast's own, drawn at random once, so that it is nobody's network: fde6:b481:678d:568e::/64.
pub const UDP_PREFIX6: [u32; 2] = [0xfde6_b481_u32.to_be(), 0x678d_568e_u32.to_be()];

/// In [`Destination::port`]: the sockets that send there are connected to it, and hear nobody else. Those that are not
/// have an id of their own for the same destination, so that the agent can tell them apart.
pub const CONNECTED: u32 = 1 << 16;

/// Where datagrams of a cgroup go.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Destination {
    /// Address, network order, IPv4 as v4-mapped.
    pub addr: [u32; 4],
    /// Port in the lower half, and [`CONNECTED`].
    pub port: u32,
    /// Index of the configured peer that carries them, or [`crate::DNS_PEER`].
    pub peer: u32,
    /// Id of the cgroup that the sending thread is in.
    pub cgroup: u64,
    /// Cookie of the network namespace.
    pub netns_cookie: u64,
}

/// The id of a [`Destination`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Assigned {
    /// When a program last asked for it, in nanoseconds of CLOCK_MONOTONIC (coarse).
    pub used_at: u64,
    /// The id.
    pub id: u32,
    /// 0.
    pub pad: u32,
}

/// A bound socket's port and who is at the other end.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Conversation {
    /// Cookie of the network namespace.
    pub netns_cookie: u64,
    /// The other end's address, network order, IPv4 as v4-mapped.
    pub remote: [u32; 4],
    /// Its port.
    pub remote_port: u16,
    /// The port that the socket is bound to.
    pub local_port: u16,
    /// 0.
    pub pad: u32,
}

/// How long who began a conversation counts after its last datagram, in nanoseconds: as long as a flow lives that nobody
/// uses (`flow_idle`, by default). Whoever has the port later is another.
pub const CONVERSATION_IDLE_NS: u64 = 300_000_000_000;

/// What is known of a [`Conversation`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Opening {
    /// When a datagram of it was last seen, in nanoseconds of CLOCK_MONOTONIC (coarse).
    pub used_at: u64,
    /// One of [`opener`].
    pub by: u32,
    /// 0.
    pub pad: u32,
}

impl Opening {
    /// Whether it still counts.
    #[inline(always)]
    pub fn counts(&self, now: u64) -> bool {
        now.saturating_sub(self.used_at) <= CONVERSATION_IDLE_NS
    }
}

/// Who chose the port of a bound socket.
pub mod port_of {
    /// The kernel: the application asked for any.
    pub const KERNEL: u32 = 1;
    /// The application: it may be a server, whom others know by it.
    pub const APPLICATION: u32 = 2;
}

/// Who began a [`Conversation`].
pub mod opener {
    /// The socket of this host: it is captured.
    pub const OURS: u32 = 1;
    /// The other end: what is sent there is an answer, and goes direct.
    pub const THEIRS: u32 = 2;
}

/// A captured datagram that was sent where the agent has no socket yet, or another one than was expected.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldDatagram {
    /// Cookie of the network namespace.
    pub netns_cookie: u64,
    /// Bytes of `packet` in use.
    pub len: u32,
    /// 0.
    pub pad: u32,
    /// The packet from its IP header on; its checksum may be missing.
    pub packet: [u8; HELD_BYTES_MAX],
}

/// Kept with a UDP socket of a network namespace that the agent does not know yet.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stranded {
    /// Cookie of the network namespace; 0 once the agent was found there.
    pub netns_cookie: u64,
    /// When the agent was told of it, in nanoseconds of CLOCK_MONOTONIC (coarse).
    pub told_at: u64,
}

/// How long the agent is not told again that a socket waits for it, in nanoseconds: an application may send a million
/// datagrams in the meantime.
pub const TELL_AGAIN_NS: u64 = 100_000_000;

/// The id that an address stands for, if it may stand for one.
#[inline(always)]
pub fn id_of(addr: &Words) -> Option<u32> {
    let last = u32::from_be(addr[3]);
    let v4 = is_mapped(addr) && last & !ID_MASK == NET4 && last != BROADCAST4;
    let v6 = addr[0] == UDP_PREFIX6[0]
        && addr[1] == UDP_PREFIX6[1]
        && addr[2] == 0
        && last & !ID_MASK == 0;
    (v4 || v6).then_some(last & ID_MASK)
}

/// The address that stands for an id, of the family of the destination. One drawn at random may stand for none: see
/// [`id_of`].
#[inline(always)]
pub fn id_address(id: u32, destination: &Words) -> Words {
    if is_mapped(destination) {
        [0, 0, MAPPED, (NET4 | (id & ID_MASK)).to_be()]
    } else {
        [UDP_PREFIX6[0], UDP_PREFIX6[1], 0, (id & ID_MASK).to_be()]
    }
}

/// Whether `addr` is an IPv4 multicast address or the limited broadcast address: for many, on links of this host.
#[inline(always)]
pub fn is_for_many(addr: &Words) -> bool {
    let v4 = u32::from_be(addr[3]);
    is_mapped(addr) && (v4 >> 28 == 0xe || v4 == u32::MAX)
}

const _: () = {
    assert!(size_of::<Destination>() == 40);
    assert!(size_of::<Assigned>() == 16);
    assert!(size_of::<Conversation>() == 32);
    assert!(size_of::<Opening>() == 16);
    assert!(size_of::<HeldDatagram>() == 16 + HELD_BYTES_MAX);
    assert!(size_of::<Stranded>() == 16);
};

#[cfg(feature = "user")]
mod pod {
    // SAFETY: `repr(C)` structs of integers without implicit padding (sizes asserted above): any bytes are a value.
    unsafe impl aya::Pod for super::Destination {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Assigned {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Conversation {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_began_counts_for_a_while() {
        let opening = Opening {
            used_at: 7,
            ..Opening::default()
        };
        // Another processor's clock may be a little behind.
        assert!(opening.counts(6) && opening.counts(7 + CONVERSATION_IDLE_NS));
        assert!(!opening.counts(8 + CONVERSATION_IDLE_NS));
    }

    #[test]
    fn an_address_leads_back_to_its_id() {
        let (v4, v6) = ([0, 0, MAPPED, 1], [1, 2, 3, 4]);
        for id in [0, 1, 0x0012_3456, ID_MASK - 1] {
            for destination in [v4, v6] {
                assert_eq!(id_of(&id_address(id, &destination)), Some(id));
            }
        }
        assert_eq!(id_of(&id_address(ID_MASK, &v6)), Some(ID_MASK));
        // 127.255.255.255 is everybody's.
        assert_eq!(id_of(&id_address(ID_MASK, &v4)), None);
        for last in [0x7f00_0001_u32, 0x7f7f_ffff, 0x8000_0000, 0x7e80_0001] {
            assert_eq!(id_of(&[0, 0, MAPPED, last.to_be()]), None, "{last:x}");
        }
        assert_eq!(id_of(&[UDP_PREFIX6[0], UDP_PREFIX6[1], 1, 1]), None);
        assert_eq!(id_of(&v6), None);
    }

    #[test]
    fn what_is_for_many_is_told_apart() {
        let mapped = |v4: u32| [0, 0, MAPPED, v4.to_be()];
        for many in [0xe000_00fb, 0xefff_fffa, 0xffff_ffff] {
            assert!(is_for_many(&mapped(many)), "{many:x}");
        }
        for one in [0xdfff_ffff, 0xf000_0000, 0x0a09_0001] {
            assert!(!is_for_many(&mapped(one)), "{one:x}");
        }
        assert!(!is_for_many(&[0, 0, 0, u32::MAX]));
    }
}
