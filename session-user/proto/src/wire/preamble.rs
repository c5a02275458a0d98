//! The first bytes of every transport, in clear: who speaks, in which versions, and for what.

use super::WireError;
use super::varint::Reader;
use crate::limits::{ROUTING_TOKEN_BYTES_MAX, VERSION};

const MAGIC: [u8; 4] = *b"HFST";

/// A single-use name of a session on the wire.
pub type ResumeToken = [u8; 16];

/// What the dialler wants of this transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A TLS handshake follows and makes a new session.
    Full,
    /// Records of an existing session follow.
    Resume(ResumeToken),
}

/// The dialler's first bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// Lowest version that the dialler speaks.
    pub version_min: u8,
    /// Highest version that the dialler speaks.
    pub version_max: u8,
    /// What follows.
    pub kind: Kind,
    /// Opaque to units; for relays and gateway fleets. At most [`ROUTING_TOKEN_BYTES_MAX`] bytes.
    pub routing: Vec<u8>,
}

impl Preamble {
    /// A preamble of this implementation's version without a routing token.
    pub fn new(kind: Kind) -> Self {
        Self {
            version_min: VERSION,
            version_max: VERSION,
            kind,
            routing: Vec::new(),
        }
    }

    /// Appends the bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&MAGIC);
        out.push(self.version_min);
        out.push(self.version_max);
        out.push(match self.kind {
            Kind::Full => 1,
            Kind::Resume(_) => 2,
        });
        debug_assert!(self.routing.len() <= ROUTING_TOKEN_BYTES_MAX);
        out.push(self.routing.len() as u8);
        out.extend_from_slice(&self.routing);
        if let Kind::Resume(token) = self.kind {
            out.extend_from_slice(&token);
        }
    }

    /// Parses the front of `bytes`: the preamble and how many bytes it took, or `None` while more
    /// are needed. Wrong bytes are refused as early as they can be told.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, WireError> {
        let known = bytes.len().min(MAGIC.len());
        if bytes[..known] != MAGIC[..known] {
            return Err(WireError::Magic);
        }
        match Self::read(bytes) {
            Err(WireError::Truncated(_)) => Ok(None),
            other => other.map(Some),
        }
    }

    fn read(bytes: &[u8]) -> Result<(Self, usize), WireError> {
        let mut reader = Reader::new(bytes);
        reader.array::<4>("the preamble")?;
        let [version_min, version_max] = reader.array("the preamble")?;
        if version_min == 0 || version_min > version_max {
            return Err(WireError::Invalid("the version range"));
        }
        let kind = reader.u8("the preamble")?;
        if !matches!(kind, 1 | 2) {
            return Err(WireError::Invalid("the kind of transport"));
        }
        let len = reader.u8("the preamble")? as usize;
        if len > ROUTING_TOKEN_BYTES_MAX {
            return Err(WireError::TooLong {
                what: "the routing token",
                got: len,
                limit: ROUTING_TOKEN_BYTES_MAX,
            });
        }
        let routing = reader.bytes(len, "the routing token")?.to_vec();
        let kind = match kind {
            1 => Kind::Full,
            _ => Kind::Resume(reader.array("the resume token")?),
        };
        let used = bytes.len() - reader.rest().len();
        Ok((
            Self {
                version_min,
                version_max,
                kind,
                routing,
            },
            used,
        ))
    }

    /// Whether this implementation's version is in the dialler's range.
    pub fn speaks_our_version(&self) -> bool {
        (self.version_min..=self.version_max).contains(&VERSION)
    }
}

/// What the acceptor says to a preamble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Go on.
    Ok,
    /// No common version.
    Version,
    /// No session has this resume token. A hint only: believed after a full handshake.
    UnknownSession,
    /// A limit on sessions or handshakes is reached: try again later.
    Busy,
    /// The unit is shutting down and takes no new transports.
    Draining,
}

impl Status {
    const fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Version => 1,
            Self::UnknownSession => 2,
            Self::Busy => 3,
            Self::Draining => 4,
        }
    }
}

/// The acceptor's first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The version chosen; with [`Status::Version`], the highest that the acceptor speaks.
    pub version: u8,
    /// The answer.
    pub status: Status,
}

impl Reply {
    /// Bytes of every reply.
    pub const BYTES: usize = 8;

    /// A reply in this implementation's version.
    pub const fn new(status: Status) -> Self {
        Self {
            version: VERSION,
            status,
        }
    }

    /// The bytes.
    pub const fn encode(self) -> [u8; Self::BYTES] {
        [
            MAGIC[0],
            MAGIC[1],
            MAGIC[2],
            MAGIC[3],
            self.version,
            self.status.code(),
            0,
            0,
        ]
    }

    /// Parses the front of `bytes`; `None` while more are needed.
    pub fn parse(bytes: &[u8]) -> Result<Option<Self>, WireError> {
        let known = bytes.len().min(MAGIC.len());
        if bytes[..known] != MAGIC[..known] {
            return Err(WireError::Magic);
        }
        let Some(raw) = bytes.first_chunk::<{ Self::BYTES }>() else {
            return Ok(None);
        };
        let status = match raw[5] {
            0 => Status::Ok,
            1 => Status::Version,
            2 => Status::UnknownSession,
            3 => Status::Busy,
            4 => Status::Draining,
            _ => return Err(WireError::Invalid("the status of the reply")),
        };
        Ok(Some(Self {
            version: raw[4],
            status,
        }))
    }
}
