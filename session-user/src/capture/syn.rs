//! A held SYN, and the packets that answer it: pure functions of bytes.

use std::net::IpAddr;

use etherparse::{
    Icmpv4Type, Icmpv6Type, IpHeaders, NetSlice, PacketBuilder, SlicedPacket, TcpHeader,
    TransportSlice, icmpv4::DestUnreachableHeader, icmpv6::DestUnreachableCode,
};

/// Hop limit of the packets made here, which never leave loopback.
const HOP_LIMIT: u8 = 64;
const IPV6_HEADER_BYTES: u16 = 40;
/// Offset of the checksum in a TCP header.
const CHECKSUM_AT: usize = 16;

/// A SYN as the application's kernel sent it.
#[derive(Clone, Debug)]
pub struct Syn {
    bytes: Vec<u8>,
    from: IpAddr,
    to: IpAddr,
    tcp: TcpHeader,
}

/// Why a connection is not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The target answered with a reset.
    Reset,
    /// No router knew the way.
    NetworkUnreachable,
    /// The last router did not reach the host.
    HostUnreachable,
    /// Somebody forbids it.
    Prohibited,
}

impl Refusal {
    /// What an application would have seen on the wire had its own connect() failed with `errno`; `None` for nothing at
    /// all. Errors that say nothing of the network are told as an unreachable host.
    pub fn from_errno(errno: i32) -> Option<Self> {
        match errno {
            libc::ETIMEDOUT => None,
            libc::ECONNREFUSED | libc::ECONNRESET => Some(Self::Reset),
            libc::ENETUNREACH | libc::ENETDOWN => Some(Self::NetworkUnreachable),
            libc::EACCES | libc::EPERM => Some(Self::Prohibited),
            _ => Some(Self::HostUnreachable),
        }
    }
}

impl Syn {
    /// Reads a packet that the gate has told of; `None` if it is no SYN.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes = alone(bytes)?;
        let (from, to, tcp) = headers(&bytes)?;
        Some(Self {
            bytes,
            from,
            to,
            tcp,
        })
    }

    /// Where the packet was sent to.
    pub fn to(&self) -> IpAddr {
        self.to
    }

    /// Where the packet came from.
    pub fn from(&self) -> IpAddr {
        self.from
    }

    /// The SYN itself, with the checksum that its sender left to the device.
    pub fn whole(&self) -> Vec<u8> {
        let payload: &[u8] = &[];
        let sum = match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                (self.tcp).calc_checksum_ipv4_raw(from.octets(), to.octets(), payload)
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                (self.tcp).calc_checksum_ipv6_raw(from.octets(), to.octets(), payload)
            }
            // A packet has one family.
            _ => Ok(0),
        };
        let mut bytes = self.bytes.clone();
        let at = bytes.len() - self.tcp.header_len() + CHECKSUM_AT;
        // An error says that the payload is too long, and there is none.
        bytes[at..at + 2].copy_from_slice(&sum.unwrap_or_default().to_be_bytes());
        bytes
    }

    /// The packet that tells the application's kernel of a refusal.
    pub fn refused(&self, refusal: Refusal) -> Vec<u8> {
        let back = match (self.to, self.from) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                PacketBuilder::ipv4(from.octets(), to.octets(), HOP_LIMIT)
            }
            (from, to) => PacketBuilder::ip(ipv6(from, to)),
        };
        let mut out = Vec::new();
        let made = match (refusal, self.to) {
            // RFC 9293, 3.10.7.1: what answers a SYN to a closed port.
            (Refusal::Reset, _) => back
                .tcp(self.tcp.destination_port, self.tcp.source_port, 0, 0)
                .rst()
                .ack(self.tcp.sequence_number.wrapping_add(1))
                .write_to_vec(&mut out, &[])
                .is_ok(),
            (_, IpAddr::V4(_)) => back
                .icmpv4(Icmpv4Type::DestinationUnreachable(match refusal {
                    Refusal::NetworkUnreachable => DestUnreachableHeader::Network,
                    Refusal::Prohibited => DestUnreachableHeader::HostProhibited,
                    _ => DestUnreachableHeader::Host,
                }))
                .write_to_vec(&mut out, &self.bytes)
                .is_ok(),
            (_, IpAddr::V6(_)) => back
                .icmpv6(Icmpv6Type::DestinationUnreachable(match refusal {
                    Refusal::NetworkUnreachable => DestUnreachableCode::NoRoute,
                    Refusal::Prohibited => DestUnreachableCode::Prohibited,
                    _ => DestUnreachableCode::Address,
                }))
                .write_to_vec(&mut out, &self.bytes)
                .is_ok(),
        };
        debug_assert!(made, "the packet is far below every limit");
        out
    }
}

/// Where a SYN comes from and goes to, and its TCP header. What is read is looked at where it is: as a whole, headers with
/// all that may be among them take kilobytes.
fn headers(bytes: &[u8]) -> Option<(IpAddr, IpAddr, TcpHeader)> {
    let packet = SlicedPacket::from_ip(bytes).ok()?;
    let (from, to) = match packet.net? {
        NetSlice::Ipv4(ip) => {
            let ip = ip.header();
            (ip.source_addr().into(), ip.destination_addr().into())
        }
        NetSlice::Ipv6(ip) => {
            let ip = ip.header();
            (ip.source_addr().into(), ip.destination_addr().into())
        }
        NetSlice::Arp(_) => return None,
    };
    match packet.transport? {
        TransportSlice::Tcp(tcp) if tcp.syn() && !tcp.ack() => Some((from, to, tcp.to_header())),
        _ => None,
    }
}

/// The headers as a packet of their own: where the SYN had data, its length counts them.
fn alone(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = bytes.to_vec();
    let length = u16::try_from(bytes.len()).ok()?;
    match bytes.first()? >> 4 {
        4 => bytes.get_mut(2..4)?.copy_from_slice(&length.to_be_bytes()),
        _ => {
            let payload = length.checked_sub(IPV6_HEADER_BYTES)?;
            bytes.get_mut(4..6)?.copy_from_slice(&payload.to_be_bytes());
        }
    }
    Some(bytes)
}

/// Headers of an IPv6 packet from `from` to `to`.
pub(super) fn ipv6(from: IpAddr, to: IpAddr) -> IpHeaders {
    let octets = |ip: IpAddr| match ip {
        IpAddr::V6(ip) => ip.octets(),
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
    };
    IpHeaders::Ipv6(
        etherparse::Ipv6Header {
            source: octets(from),
            destination: octets(to),
            hop_limit: HOP_LIMIT,
            ..etherparse::Ipv6Header::default()
        },
        etherparse::Ipv6Extensions::default(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{PacketHeaders, TransportHeader};
    use proptest::prelude::*;

    fn syn(v4: bool) -> Vec<u8> {
        let back = if v4 {
            PacketBuilder::ipv4([127, 0, 0, 1], [127, 1, 2, 3], 64)
        } else {
            let one = std::net::Ipv6Addr::LOCALHOST;
            PacketBuilder::ip(ipv6(one.into(), one.into()))
        };
        let mut out = Vec::new();
        back.tcp(40_000, 443, 0xffff_ffff, 65_535)
            .syn()
            .options_raw(&[2, 4, 0xff, 0xd7, 4, 2, 1, 1])
            .unwrap()
            .write_to_vec(&mut out, &[])
            .unwrap();
        out
    }

    #[test]
    fn a_syn_goes_on_with_a_whole_checksum() {
        for v4 in [true, false] {
            let right = syn(v4);
            let mut half = right.clone();
            let at = half.len() - 28 + CHECKSUM_AT;
            half[at] ^= 0x5a;
            assert_eq!(Syn::parse(&half).unwrap().whole(), right);
        }
    }

    #[test]
    fn data_in_a_syn_is_left_out() {
        for v4 in [true, false] {
            let right = syn(v4);
            let mut with_data = right.clone();
            let length = if v4 { right.len() } else { right.len() - 40 } as u16 + 500;
            let at = if v4 { 2 } else { 4 };
            with_data[at..at + 2].copy_from_slice(&length.to_be_bytes());
            let whole = Syn::parse(&with_data).unwrap().whole();
            assert_eq!(whole.len(), right.len());
            assert_eq!(whole[at..at + 2], right[at..at + 2]);
            assert_eq!(whole[whole.len() - 28..], right[right.len() - 28..]);
        }
    }

    #[test]
    fn a_reset_acknowledges_the_syn() {
        for v4 in [true, false] {
            let answer = Syn::parse(&syn(v4)).unwrap().refused(Refusal::Reset);
            let packet = PacketHeaders::from_ip_slice(&answer).unwrap();
            let Some(TransportHeader::Tcp(tcp)) = packet.transport else {
                panic!("not TCP")
            };
            assert!(tcp.rst && tcp.ack && !tcp.syn);
            assert_eq!((tcp.source_port, tcp.destination_port), (443, 40_000));
            assert_eq!(tcp.acknowledgment_number, 0);
        }
    }

    #[test]
    fn an_unreachable_target_is_told_by_icmp_with_the_syn_in_it() {
        for v4 in [true, false] {
            let syn = syn(v4);
            let answer = Syn::parse(&syn).unwrap().refused(Refusal::HostUnreachable);
            let packet = PacketHeaders::from_ip_slice(&answer).unwrap();
            match packet.transport {
                Some(TransportHeader::Icmpv4(icmp)) if v4 => assert_eq!(
                    icmp.icmp_type,
                    Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Host)
                ),
                Some(TransportHeader::Icmpv6(icmp)) if !v4 => assert_eq!(
                    icmp.icmp_type,
                    Icmpv6Type::DestinationUnreachable(DestUnreachableCode::Address)
                ),
                other => panic!("{other:?}"),
            }
            assert!(answer.ends_with(&syn));
        }
    }

    #[test]
    fn errors_are_told_as_the_network_would() {
        assert_eq!(Refusal::from_errno(libc::ETIMEDOUT), None);
        assert_eq!(
            Refusal::from_errno(libc::ECONNREFUSED),
            Some(Refusal::Reset)
        );
        assert_eq!(
            Refusal::from_errno(libc::ENETUNREACH),
            Some(Refusal::NetworkUnreachable)
        );
        assert_eq!(
            Refusal::from_errno(libc::EMFILE),
            Some(Refusal::HostUnreachable)
        );
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..140)) {
            if let Some(syn) = Syn::parse(&bytes) {
                syn.whole();
                syn.refused(Refusal::Reset);
                syn.refused(Refusal::NetworkUnreachable);
            }
        }
    }
}
