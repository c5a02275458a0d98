//! Where a stream goes.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

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

/// A text that names no target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected HOST:PORT with an address or a host name (ASCII; an international name in its xn-- form), such as 192.0.2.1:22, [2001:db8::1]:443 or db.example:5432"
)]
pub struct BadTarget;

impl FromStr for Target {
    type Err = BadTarget;

    fn from_str(text: &str) -> Result<Self, BadTarget> {
        if let Ok(addr) = text.parse() {
            return Ok(Self::Addr(addr));
        }
        let (host, port) = text.rsplit_once(':').ok_or(BadTarget)?;
        // `parse` alone would take "+80".
        let digits = port.bytes().all(|b| b.is_ascii_digit());
        let port = port.parse().ok().filter(|_| digits).ok_or(BadTarget)?;
        Self::of_host(host, port)
    }
}

/// Whether a host name may have this byte: letters, digits, hyphens and (in practice) underscores, and
/// the dots between labels. Anything else would reach a resolver and a log as it is.
fn is_of_name(b: u8) -> bool {
    b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_')
}

impl Target {
    /// A target by its host, an address or a name.
    pub fn of_host(host: &str, port: u16) -> Result<Self, BadTarget> {
        if let Ok(ip) = host.parse() {
            return Ok(Self::Addr(SocketAddr::new(ip, port)));
        }
        let fits = !host.is_empty() && host.len() <= HOST_NAME_BYTES_MAX;
        if port == 0 || !fits || !host.bytes().all(is_of_name) {
            return Err(BadTarget);
        }
        Ok(Self::Name(host.to_owned(), port))
    }

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
                if !raw.iter().copied().all(is_of_name) {
                    return Err(WireError::Invalid("a host name"));
                }
                let name = String::from_utf8_lossy(raw).into_owned();
                Ok(Self::Name(name, reader.u16(WHAT)?))
            }
            _ => Err(WireError::Invalid("the address type of a target")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_as_people_write_them() {
        let addr = |text: &str| Ok(Target::Addr(text.parse().unwrap()));
        let name = |name: &str, port| Ok(Target::Name(name.to_owned(), port));
        assert_eq!("192.0.2.1:22".parse(), addr("192.0.2.1:22"));
        assert_eq!("[2001:db8::1]:443".parse(), addr("[2001:db8::1]:443"));
        assert_eq!("db.example:5432".parse(), name("db.example", 5432));
        assert_eq!(Target::of_host("2001:db8::1", 1), addr("[2001:db8::1]:1"));
        for bad in [
            "",
            ":80",
            "db.example",
            "db.example:",
            "db.example:0",
            "db.example:+80",
            "db.example:65536",
            "a b:80",
            "b\u{fc}cher.example:80",
            "2001:db8::1",
        ] {
            assert_eq!(bad.parse::<Target>(), Err(BadTarget), "{bad}");
        }
        assert_eq!(Target::of_host(&"a".repeat(256), 1), Err(BadTarget));
    }
}
