//! Datagrams that were sent before the agent was in their network namespace: the programs keep them off its loopback
//! interface, and hand them over in a ring.
//!
//! They wait here for a moment. When the agent does not come, they are lost as any datagram may be.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use aya::maps::{MapData, RingBuf};
use etherparse::{NetHeaders, PacketHeaders, TransportHeader};
use session_ebpf_common::{HELD_BYTES_MAX, HeldDatagram};
use session_proto::wire::Dscp;
use tokio::io::unix::AsyncFd;

use super::super::CaptureError;

/// Datagrams that wait at once, and of those the ones of one network namespace: at most 2 KiB each.
const HELD_MAX: usize = 128;
const HELD_EACH: usize = 32;
/// One that has waited for so long is dropped: whoever sent it has sent another.
const STALE_AFTER: Duration = Duration::from_secs(2);
/// Bytes before the packet in a [`HeldDatagram`].
const HEAD: usize = size_of::<HeldDatagram>() - HELD_BYTES_MAX;

/// A datagram as its application sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Cookie of the network namespace.
    pub netns: u64,
    /// The application's address and port.
    pub app: SocketAddr,
    /// The address that stands for its destination, and the port where the agent was expected.
    pub to: SocketAddr,
    /// What it says.
    pub data: Vec<u8>,
    /// What it asks of the networks.
    pub dscp: Dscp,
}

/// The ring, and those that wait.
pub struct Held {
    ring: AsyncFd<RingBuf<MapData>>,
    waiting: Waiting,
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let waiting = self.waiting.0.len();
        f.debug_struct("Held")
            .field("waiting", &waiting)
            .finish_non_exhaustive()
    }
}

impl Held {
    /// Has the current runtime watch the ring.
    pub fn open(ring: RingBuf<MapData>) -> Result<Self, CaptureError> {
        // SAFETY: the ring keeps its descriptor for its whole life, and the registration owns it.
        let ring = unsafe { AsyncFd::register_with_interest(ring, tokio::io::Interest::READABLE) };
        Ok(Self {
            ring: ring.map_err(|error| CaptureError::Runtime {
                what: "watch the ring of held datagrams",
                source: error.into_parts().1,
            })?,
            waiting: Waiting::default(),
        })
    }

    /// The next that the programs hand over. Cancel-safe.
    pub async fn next(&mut self) -> io::Result<Datagram> {
        loop {
            let mut guard = self.ring.readable_mut().await?;
            let Some(told) = guard.get_inner_mut().next() else {
                guard.clear_ready();
                continue;
            };
            let datagram = decode(&told);
            drop(told);
            match datagram {
                Some(datagram) => return Ok(datagram),
                None => tracing::error!("the programs have held something that is no datagram"),
            }
        }
    }

    /// Lets one wait; false if too many do.
    pub fn keep(&mut self, datagram: Datagram) -> bool {
        self.waiting.keep(datagram, Instant::now())
    }

    /// Those of a network namespace, the oldest first.
    pub fn take(&mut self, netns: u64) -> Vec<Datagram> {
        self.waiting.take(netns, Instant::now())
    }
}

/// Those that wait, the oldest first.
#[derive(Default)]
struct Waiting(VecDeque<(Instant, Datagram)>);

impl Waiting {
    fn forget_stale(&mut self, now: Instant) {
        let stale = |since: Instant| now.saturating_duration_since(since) > STALE_AFTER;
        while self.0.front().is_some_and(|(since, _)| stale(*since)) {
            self.0.pop_front();
        }
    }

    fn keep(&mut self, datagram: Datagram, now: Instant) -> bool {
        self.forget_stale(now);
        let others = self.0.iter();
        let same = others.filter(|(_, other)| other.netns == datagram.netns);
        let room = self.0.len() < HELD_MAX && same.count() < HELD_EACH;
        if room {
            self.0.push_back((now, datagram));
        }
        room
    }

    fn take(&mut self, netns: u64, now: Instant) -> Vec<Datagram> {
        self.forget_stale(now);
        let all = std::mem::take(&mut self.0).into_iter();
        let (taken, left) = all.partition::<Vec<_>, _>(|(_, held)| held.netns == netns);
        self.0 = left.into();
        taken.into_iter().map(|(_, held)| held).collect()
    }
}

/// Reads a [`HeldDatagram`]; `None` for what is none of UDP.
fn decode(told: &[u8]) -> Option<Datagram> {
    if told.len() != size_of::<HeldDatagram>() {
        return None;
    }
    let (head, packet) = told.split_at(HEAD);
    let netns = u64::from_ne_bytes(head.get(..8)?.try_into().ok()?);
    let len = u32::from_ne_bytes(head.get(8..12)?.try_into().ok()?);
    let headers = PacketHeaders::from_ip_slice(packet.get(..len as usize)?).ok()?;
    let (from, to, dscp) = match headers.net? {
        NetHeaders::Ipv4(ip, _) => (ip.source.into(), ip.destination.into(), ip.dscp),
        NetHeaders::Ipv6(ip, _) => (ip.source.into(), ip.destination.into(), ip.dscp()),
        NetHeaders::Arp(_) => return None,
    };
    let TransportHeader::Udp(udp) = headers.transport? else {
        return None;
    };
    Some(Datagram {
        netns,
        app: SocketAddr::new(from, udp.source_port),
        to: SocketAddr::new(to, udp.destination_port),
        data: headers.payload.slice().to_vec(),
        dscp: Dscp::of_tos(dscp.value() << 2),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{IpDscp, IpHeaders, Ipv4Extensions, Ipv4Header, PacketBuilder};

    /// As the programs write it.
    fn told(netns: u64, packet: &[u8]) -> Vec<u8> {
        let mut told = vec![0xa5; size_of::<HeldDatagram>()];
        told[..8].copy_from_slice(&netns.to_ne_bytes());
        told[8..12].copy_from_slice(&(packet.len() as u32).to_ne_bytes());
        told[HEAD..HEAD + packet.len()].copy_from_slice(packet);
        told
    }

    fn datagram(netns: u64) -> Datagram {
        Datagram {
            netns,
            app: "127.0.0.1:5000".parse().unwrap(),
            to: "127.128.1.2:6000".parse().unwrap(),
            data: b"hello".to_vec(),
            dscp: Dscp::of_tos(0xb8),
        }
    }

    fn packet(data: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        let mut ip = Ipv4Header {
            time_to_live: 64,
            source: [127, 0, 0, 1],
            destination: [127, 128, 1, 2],
            dscp: IpDscp::EF,
            ..Ipv4Header::default()
        };
        ip.set_payload_len(8 + data.len()).unwrap();
        let ends = PacketBuilder::ip(IpHeaders::Ipv4(ip, Ipv4Extensions::default()));
        let built = ends.udp(5000, 6000).write_to_vec(&mut packet, data);
        built.unwrap();
        packet
    }

    #[test]
    fn what_is_told_is_read() {
        assert_eq!(decode(&told(7, &packet(b"hello"))), Some(datagram(7)));
        let empty = decode(&told(7, &packet(b""))).unwrap();
        assert_eq!(empty.data, b"");
    }

    #[test]
    fn what_is_no_datagram_is_told_apart() {
        assert_eq!(decode(&[]), None);
        assert_eq!(decode(&told(7, b"")), None);
        let whole = packet(b"hello");
        for len in 0..whole.len() {
            assert_eq!(decode(&told(7, &whole[..len])), None, "{len}");
        }
        let mut longer = told(7, &whole);
        longer[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert_eq!(decode(&longer), None);
        for at in 0..whole.len() {
            for value in [0, 0x45, 0x60, 0xff] {
                let mut changed = whole.clone();
                changed[at] = value;
                // Whatever it says, it is read or it is not.
                let _ = decode(&told(7, &changed));
            }
        }
    }

    #[test]
    fn they_wait_for_their_own_namespace_and_not_for_long() {
        let (mut waiting, now) = (Waiting::default(), Instant::now());
        for netns in [1, 2, 1] {
            assert!(waiting.keep(datagram(netns), now));
        }
        assert_eq!(waiting.take(1, now), [datagram(1), datagram(1)]);
        assert!(waiting.take(1, now).is_empty());
        let later = now + STALE_AFTER + Duration::from_millis(1);
        assert!(waiting.take(2, later).is_empty());
    }

    #[test]
    fn those_that_wait_are_bounded() {
        let (mut waiting, now) = (Waiting::default(), Instant::now());
        let kept = |waiting: &mut Waiting, netns, now| {
            (0..2 * HELD_MAX)
                .filter(|_| waiting.keep(datagram(netns), now))
                .count()
        };
        assert_eq!(kept(&mut waiting, 1, now), HELD_EACH);
        let all: usize = (2..10).map(|netns| kept(&mut waiting, netns, now)).sum();
        assert_eq!(all + HELD_EACH, HELD_MAX);
        let later = now + 2 * STALE_AFTER;
        assert_eq!(kept(&mut waiting, 1, later), HELD_EACH);
    }
}
