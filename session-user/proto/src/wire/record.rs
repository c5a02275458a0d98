//! The clear header of a record: 16 bytes, authenticated with it.

use super::WireError;
use super::frame::Space;
use super::varint::VARINT_MAX;
use crate::limits::{RECORD_HEADER_BYTES, RECORD_PAYLOAD_BYTES_MAX, TAG_BYTES};

/// First byte of a record in space R. TLS records begin with 20 to 24, so the two never mix up.
const TYPE_RETAINED: u8 = 0x80;
/// First byte of a record in space U.
const TYPE_UNRETAINED: u8 = 0x81;

/// Type (1), sealed length (3), key epoch (4), number (8), all big-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// Which number space, and so which keys.
    pub space: Space,
    /// Bytes of ciphertext and tag behind the header.
    pub payload_bytes: usize,
    /// The key epoch ([`crate::seal::Epoch`] as a number).
    pub epoch: u32,
    /// The record's number in its space, at most [`VARINT_MAX`]: acknowledgements carry varints.
    pub number: u64,
}

impl RecordHeader {
    /// The bytes, which are also the AEAD's associated data.
    pub fn encode(&self) -> [u8; RECORD_HEADER_BYTES] {
        debug_assert!(self.payload_bytes < 1 << 24 && self.number <= VARINT_MAX);
        let mut out = [0; RECORD_HEADER_BYTES];
        out[..4].copy_from_slice(&(self.payload_bytes as u32).to_be_bytes());
        out[0] = match self.space {
            Space::Retained => TYPE_RETAINED,
            Space::Unretained => TYPE_UNRETAINED,
            // Space D has packets instead, and no record begins so: `parse` refuses it.
            Space::Datagram => 0,
        };
        out[4..8].copy_from_slice(&self.epoch.to_be_bytes());
        out[8..].copy_from_slice(&self.number.to_be_bytes());
        out
    }

    /// Parses a header. The length is checked here, before anything is buffered for it.
    pub fn parse(raw: &[u8; RECORD_HEADER_BYTES]) -> Result<Self, WireError> {
        let space = match raw[0] {
            TYPE_RETAINED => Space::Retained,
            TYPE_UNRETAINED => Space::Unretained,
            _ => return Err(WireError::Invalid("the record type")),
        };
        let payload_bytes = u32::from_be_bytes([0, raw[1], raw[2], raw[3]]) as usize;
        if payload_bytes > RECORD_PAYLOAD_BYTES_MAX {
            return Err(WireError::TooLong {
                what: "a record",
                got: payload_bytes,
                limit: RECORD_PAYLOAD_BYTES_MAX,
            });
        }
        if payload_bytes <= TAG_BYTES {
            return Err(WireError::Invalid("the record length"));
        }
        let mut epoch = [0; 4];
        epoch.copy_from_slice(&raw[4..8]);
        let mut number = [0; 8];
        number.copy_from_slice(&raw[8..]);
        let number = u64::from_be_bytes(number);
        if number > VARINT_MAX {
            return Err(WireError::Invalid("the record number"));
        }
        Ok(Self {
            space,
            payload_bytes,
            epoch: u32::from_be_bytes(epoch),
            number,
        })
    }
}
