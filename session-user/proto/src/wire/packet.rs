//! The clear header of a packet of the UDP transport: 21 bytes, authenticated with it.

use super::WireError;
use crate::limits::{PACKET_HEADER_BYTES, TAG_BYTES};

/// First byte of a packet of space D.
const TYPE_DATAGRAM: u8 = 0x82;

/// What a packet calls its session. Each path has names of its own, from which nobody but the two
/// ends can tell which session, or which other path, it belongs to.
pub type ConnectionId = [u8; 8];

/// Type (1), connection id (8), epoch (4), number (8), as they stand on the wire: epoch and number are
/// [hidden](crate::seal::Connection), so that they do not tell which paths belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketHeader {
    /// Which session and path.
    pub id: ConnectionId,
    /// The key epoch, hidden.
    pub epoch: u32,
    /// The packet's number, hidden.
    pub number: u64,
}

impl PacketHeader {
    /// The bytes, which are also the AEAD's associated data.
    pub fn encode(&self) -> [u8; PACKET_HEADER_BYTES] {
        let mut out = [0; PACKET_HEADER_BYTES];
        out[0] = TYPE_DATAGRAM;
        out[1..9].copy_from_slice(&self.id);
        out[9..13].copy_from_slice(&self.epoch.to_be_bytes());
        out[13..].copy_from_slice(&self.number.to_be_bytes());
        out
    }

    /// Parses the front of a packet: a driver that serves several sessions on one socket finds the one
    /// that a packet is for by its `id`.
    pub fn parse(packet: &[u8]) -> Result<Self, WireError> {
        if packet.len() <= PACKET_HEADER_BYTES + TAG_BYTES {
            return Err(WireError::Truncated("a packet"));
        }
        if packet[0] != TYPE_DATAGRAM {
            return Err(WireError::Invalid("the type of a packet"));
        }
        let mut out = Self {
            id: [0; 8],
            epoch: 0,
            number: 0,
        };
        out.id.copy_from_slice(&packet[1..9]);
        let mut epoch = [0; 4];
        epoch.copy_from_slice(&packet[9..13]);
        out.epoch = u32::from_be_bytes(epoch);
        let mut number = [0; 8];
        number.copy_from_slice(&packet[13..PACKET_HEADER_BYTES]);
        out.number = u64::from_be_bytes(number);
        Ok(out)
    }
}
