//! The ICMP errors that tell an application's kernel what became of its datagrams: pure functions of addresses.

use std::net::{IpAddr, SocketAddr};

use etherparse::{
    Icmpv4Type, Icmpv6Type, IpHeaders, PacketBuilder, icmpv4::DestUnreachableHeader,
    icmpv6::DestUnreachableCode,
};

use super::super::syn::ipv6;

/// Hop limit of the packets made here, which never leave loopback.
const HOP_LIMIT: u8 = 64;

/// Why a destination is not to be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreachable {
    /// Its host says that nobody has the port: the only one that a connected socket fails by (`icmp_err_convert` in the
    /// kernel's net/ipv4/icmp.c).
    Port,
    /// The last router did not reach the host.
    Host,
    /// No router knew the way.
    Network,
    /// Somebody forbids it.
    Prohibited,
}

impl Unreachable {
    /// What the network would have said, had a socket failed with `errno`; `None` for nothing at all.
    pub fn from_errno(errno: i32) -> Option<Self> {
        match errno {
            libc::ECONNREFUSED | libc::ECONNRESET => Some(Self::Port),
            libc::ENETUNREACH | libc::ENETDOWN => Some(Self::Network),
            libc::EACCES | libc::EPERM => Some(Self::Prohibited),
            libc::EHOSTUNREACH | libc::EHOSTDOWN => Some(Self::Host),
            _ => None,
        }
    }

    fn v4(self) -> Icmpv4Type {
        Icmpv4Type::DestinationUnreachable(match self {
            Self::Port => DestUnreachableHeader::Port,
            Self::Host => DestUnreachableHeader::Host,
            Self::Network => DestUnreachableHeader::Network,
            Self::Prohibited => DestUnreachableHeader::HostProhibited,
        })
    }

    fn v6(self) -> Icmpv6Type {
        Icmpv6Type::DestinationUnreachable(match self {
            Self::Port => DestUnreachableCode::Port,
            Self::Host => DestUnreachableCode::Address,
            Self::Network => DestUnreachableCode::NoRoute,
            Self::Prohibited => DestUnreachableCode::Prohibited,
        })
    }
}

/// The packet that says so of a datagram from `app` to `to`. Its headers alone are quoted, by which the kernel finds the
/// socket.
pub fn packet(app: SocketAddr, to: SocketAddr, why: Unreachable) -> Vec<u8> {
    let (mut quoted, mut out) = (Vec::new(), Vec::new());
    let datagram = (between(app.ip(), to.ip())).udp(app.port(), to.port());
    let mut made = datagram.write_to_vec(&mut quoted, &[]).is_ok();
    let back = between(to.ip(), app.ip());
    made &= match to {
        SocketAddr::V4(_) => back
            .icmpv4(why.v4())
            .write_to_vec(&mut out, &quoted)
            .is_ok(),
        SocketAddr::V6(_) => back
            .icmpv6(why.v6())
            .write_to_vec(&mut out, &quoted)
            .is_ok(),
    };
    debug_assert!(made, "the packet is far below every limit");
    out
}

fn between(from: IpAddr, to: IpAddr) -> etherparse::PacketBuilderStep<IpHeaders> {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ip(IpHeaders::Ipv4(
            etherparse::Ipv4Header {
                source: from.octets(),
                destination: to.octets(),
                time_to_live: HOP_LIMIT,
                ..etherparse::Ipv4Header::default()
            },
            etherparse::Ipv4Extensions::default(),
        )),
        (from, to) => PacketBuilder::ip(ipv6(from, to)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{NetHeaders, PacketHeaders, TransportHeader};

    #[test]
    fn the_error_quotes_the_datagram() {
        for (app, to) in [
            ("127.0.0.1:5000", "127.128.1.2:6000"),
            ("[2001:db8::1]:5000", "[2001:db8::2]:6000"),
        ] {
            let (app, to): (SocketAddr, SocketAddr) = (app.parse().unwrap(), to.parse().unwrap());
            let out = packet(app, to, Unreachable::Port);
            let outer = PacketHeaders::from_ip_slice(&out).unwrap();
            match outer.transport.as_ref() {
                Some(TransportHeader::Icmpv4(icmp)) => {
                    assert_eq!(icmp.icmp_type, Unreachable::Port.v4());
                }
                Some(TransportHeader::Icmpv6(icmp)) => {
                    assert_eq!(icmp.icmp_type, Unreachable::Port.v6());
                }
                other => panic!("{other:?}"),
            }
            let inner = PacketHeaders::from_ip_slice(outer.payload.slice()).unwrap();
            let ends: (IpAddr, IpAddr) = match inner.net {
                Some(NetHeaders::Ipv4(ip, _)) => (ip.source.into(), ip.destination.into()),
                Some(NetHeaders::Ipv6(ip, _)) => (ip.source.into(), ip.destination.into()),
                other => panic!("{other:?}"),
            };
            let Some(TransportHeader::Udp(udp)) = inner.transport else {
                panic!("not UDP")
            };
            assert_eq!(ends, (app.ip(), to.ip()));
            assert_eq!((udp.source_port, udp.destination_port), (5000, 6000));
        }
    }

    #[test]
    fn only_a_refusal_is_told_as_a_closed_port() {
        assert_eq!(
            Unreachable::from_errno(libc::ECONNREFUSED),
            Some(Unreachable::Port)
        );
        assert_eq!(
            Unreachable::from_errno(libc::EHOSTUNREACH),
            Some(Unreachable::Host)
        );
        assert_eq!(Unreachable::from_errno(libc::ETIMEDOUT), None);
        assert_eq!(Unreachable::from_errno(libc::EMSGSIZE), None);
    }
}
