//! Where a stream goes.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use super::WireError;
use super::varint::Reader;
use crate::limits::HOST_NAME_BYTES_MAX;

/// The destination of a stream, as the application named it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// An address; the peer dials it.
    Addr(SocketAddr),
    /// A host name and a port; the peer resolves it when the stream opens.
    Name(String, u16),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addr(addr) => addr.fmt(f),
            // It came from a peer and goes to logs.
            Self::Name(name, port) => write!(f, "{}:{port}", name.escape_debug()),
        }
    }
}

impl Target {
    /// Address type 4 (4 bytes), 6 (16 bytes) or 3 (length byte and name), then the port.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let port = match self {
            Self::Addr(addr) => {
                match addr.ip() {
                    IpAddr::V4(ip) => {
                        out.push(4);
                        out.extend_from_slice(&ip.octets());
                    }
                    IpAddr::V6(ip) => {
                        out.push(6);
                        out.extend_from_slice(&ip.octets());
                    }
                }
                addr.port()
            }
            Self::Name(name, port) => {
                debug_assert!(name.len() <= HOST_NAME_BYTES_MAX);
                out.push(3);
                out.push(name.len() as u8);
                out.extend_from_slice(name.as_bytes());
                *port
            }
        };
        out.extend_from_slice(&port.to_be_bytes());
    }

    pub(super) fn parse(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        const WHAT: &str = "the target";
        match reader.u8(WHAT)? {
            4 => {
                let ip = IpAddr::from(reader.array::<4>(WHAT)?);
                Ok(Self::Addr(SocketAddr::new(ip, reader.u16(WHAT)?)))
            }
            6 => {
                let ip = IpAddr::from(reader.array::<16>(WHAT)?);
                Ok(Self::Addr(SocketAddr::new(ip, reader.u16(WHAT)?)))
            }
            3 => {
                let len = reader.u8(WHAT)? as usize;
                if len == 0 || len > HOST_NAME_BYTES_MAX {
                    return Err(WireError::Invalid("the length of a host name"));
                }
                let raw = reader.bytes(len, WHAT)?;
                // A label is letters, digits, hyphens and (in practice) underscores; anything else
                // would reach a resolver and a log as it is.
                let allowed = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
                if !raw.iter().all(allowed) {
                    return Err(WireError::Invalid("a host name"));
                }
                let name = String::from_utf8_lossy(raw).into_owned();
                Ok(Self::Name(name, reader.u16(WHAT)?))
            }
            _ => Err(WireError::Invalid("the address type of a target")),
        }
    }
}
