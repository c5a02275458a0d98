//! The service that an application asks of the networks for a datagram.

use super::WireError;
use super::varint::Reader;

/// A differentiated services codepoint (RFC 2474, section 3): the upper six bits of what `IP_TOS` and `IPV6_TCLASS` set.
/// The lower two, which are for congestion (RFC 3168), belong to each network path by itself and are not carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Dscp(u8);

impl Dscp {
    /// That of a Type of Service octet (IPv4) or a Traffic Class (IPv6).
    pub const fn of_tos(tos: u8) -> Self {
        Self(tos >> 2)
    }

    /// As such an octet, with nothing said of congestion.
    pub const fn tos(self) -> u8 {
        self.0 << 2
    }

    /// Whether nothing is asked for.
    pub const fn is_default(self) -> bool {
        self.0 == 0
    }

    pub(super) fn encode(self, out: &mut Vec<u8>) {
        out.push(self.0);
    }

    pub(super) fn parse(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        match reader.u8("the service of a datagram")? {
            value @ 0..64 => Ok(Self(value)),
            _ => Err(WireError::Invalid("the service of a datagram")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn congestion_is_left_out() {
        assert_eq!(Dscp::of_tos(0xb8 | 0x03).tos(), 0xb8);
        assert!(Dscp::of_tos(0x03).is_default());
        assert!(!Dscp::of_tos(0x04).is_default());
    }

    #[test]
    fn six_bits_and_no_more_are_read() {
        let parse = |byte| Dscp::parse(&mut Reader::new(&[byte]));
        assert_eq!(parse(63), Ok(Dscp::of_tos(0xff)));
        assert!(matches!(parse(64), Err(WireError::Invalid(_))));
        let nothing = Dscp::parse(&mut Reader::new(&[]));
        assert!(matches!(nothing, Err(WireError::Truncated(_))));
    }
}
