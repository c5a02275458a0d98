//! PACKED: bytes of a stream that went through a codec.

use super::WireError;
use super::frame::{ArrayVec, FrameType};
use super::varint::{Reader, varint_bytes};
use crate::limits::STREAM_DATA_BYTES_MAX;

/// How the bytes of a stream are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Codec {
    /// Blocks of LZ4 (its `lz4_Block_format.md`), each with the 64 KiB before it as its dictionary.
    Lz4,
    /// One frame of Zstandard (RFC 8878) with a window of 64 KiB, flushed behind each piece.
    Zstd,
}

impl Codec {
    /// All of them, in the order of their codes.
    pub const ALL: [Self; 2] = [Self::Lz4, Self::Zstd];

    /// What stands for it in a PACKED frame.
    pub const fn code(self) -> u8 {
        match self {
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }

    const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Lz4),
            2 => Some(Self::Zstd),
            _ => None,
        }
    }

    /// What stands for it in a set of codecs, such as [`super::Params::codecs`].
    pub const fn bit(self) -> u64 {
        1 << self.code()
    }

    /// A place in arrays of as many as there are codecs.
    pub const fn index(self) -> usize {
        self.code() as usize - 1
    }

    /// Its name, as operators know it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

/// What precedes the data of a PACKED frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedHeader {
    /// The stream.
    pub id: u64,
    /// Offset of the first byte, before it was packed.
    pub offset: u64,
    /// How it is packed.
    pub codec: Codec,
    /// The codec knows nothing of what came before.
    pub fresh: bool,
    /// Bytes that come out: 1 to [`STREAM_DATA_BYTES_MAX`], and more than went in.
    pub plain_bytes: usize,
}

const FRESH: u8 = 0x08;
const CODEC: u8 = 0x07;

impl PackedHeader {
    /// Most bytes of type, length and header: 1 + 4 + 8 + 8 + 1 + 4.
    pub const BYTES_MAX: usize = 26;

    /// Writes frame type, length and header for `data_bytes` of packed data so that they end at the end
    /// of `room` (at least [`Self::BYTES_MAX`]), and returns how many bytes they take.
    pub fn write_before(&self, room: &mut [u8], data_bytes: usize) -> usize {
        let plain_bytes = self.plain_bytes as u64;
        let numbers = varint_bytes(self.id) + varint_bytes(self.offset);
        let body = numbers + 1 + varint_bytes(plain_bytes) + data_bytes;
        let mut head = ArrayVec::default();
        head.push(FrameType::Packed as u8);
        head.varint(body as u64);
        head.varint(self.id);
        head.varint(self.offset);
        head.push(self.codec.code() | if self.fresh { FRESH } else { 0 });
        head.varint(plain_bytes);
        head.write_before(room)
    }

    pub(super) fn encode_frame(&self, data: &[u8], out: &mut Vec<u8>) {
        let mut room = [0; Self::BYTES_MAX];
        let len = self.write_before(&mut room, data.len());
        out.extend_from_slice(&room[room.len() - len..]);
        out.extend_from_slice(data);
    }

    /// The header and the data behind it.
    pub(super) fn parse<'a>(body: &mut Reader<'a>) -> Result<(Self, &'a [u8]), WireError> {
        const WHAT: &str = "a PACKED frame";
        let (id, offset) = (body.varint(WHAT)?, body.varint(WHAT)?);
        let flags = body.u8(WHAT)?;
        let codec = Codec::from_code(flags & CODEC).filter(|_| flags & !(CODEC | FRESH) == 0);
        let codec = codec.ok_or(WireError::Invalid("the codec of a PACKED frame"))?;
        let plain_bytes = body.length(STREAM_DATA_BYTES_MAX, "the data in a PACKED frame")?;
        let data = body.rest();
        // What does not shrink goes as it is; so credit, which counts plain bytes, bounds memory too.
        if data.is_empty() || data.len() >= plain_bytes {
            return Err(WireError::Invalid("the size of a PACKED frame"));
        }
        let header = Self {
            id,
            offset,
            codec,
            fresh: flags & FRESH != 0,
            plain_bytes,
        };
        Ok((header, data))
    }
}
