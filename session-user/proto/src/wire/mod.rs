//! The bytes on the wire: varints, the preamble, record headers, frames and parameters.
//!
//! Parsing never panics, never allocates more than the input's length justifies, and tells what
//! was wrong. `docs/protocol.md` has the layouts.

mod ack;
pub mod close_code;
mod datagram;
mod dscp;
mod frame;
mod packed;
mod packet;
mod params;
mod parse;
mod preamble;
mod record;
mod service;
mod target;
mod varint;

pub use ack::Ack;
pub use datagram::{DatagramHeader, Fragment};
pub use dscp::Dscp;
pub use frame::{Frame, FrameType, Space, StreamHeader};
pub use packed::{Codec, PackedHeader};
pub use packet::{ConnectionId, PacketHeader};
pub use params::{Params, flow_feature};
pub use preamble::{Kind, Preamble, Reply, ResumeToken, Status};
pub use record::RecordHeader;
pub use service::{Mode, Packing, Route, Service};
pub use target::Target;
pub use varint::{Reader, VARINT_MAX, put_varint, varint_bytes};

/// What was wrong with bytes from a peer (or from whoever sits on the path).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The input ends before the item does.
    #[error("the bytes end in the middle of {0}")]
    Truncated(&'static str),
    /// A preamble or reply does not begin with the protocol's magic.
    #[error("these are not the bytes of a Holdfast peer (wrong magic)")]
    Magic,
    /// A field has a value that the specification does not allow.
    #[error("{0} has a value that is not allowed")]
    Invalid(&'static str),
    /// A length is above its limit.
    #[error("{what} is {got} bytes long, the limit is {limit}")]
    TooLong {
        /// Which item.
        what: &'static str,
        /// Its length as claimed.
        got: usize,
        /// The limit.
        limit: usize,
    },
    /// A frame that must be understood is not known.
    #[error("frame type 0x{0:02x} is critical and unknown: the peer speaks a newer version")]
    UnknownCritical(u8),
    /// A frame stands in the wrong record space.
    #[error("frame {0:?} may not stand in this record space")]
    WrongSpace(FrameType),
}
