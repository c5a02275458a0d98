//! LZ4 by `lz4_flex`.
//!
//! Its stream writer alone keeps its table of matches from piece to piece; the functions for blocks would
//! hash the whole dictionary again for each, at a third of the speed. What the writer puts around the
//! blocks is the same each time and never sent. To unpack, the function for blocks is all that is
//! needed: it has no state that a peer could bring into disorder, and no size but that which it is given.

use std::io::Write as _;

use lz4_flex::block::decompress_into_with_dict;
use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};

use super::{CodecError, WINDOW_BYTES};
use crate::wire::Codec;

/// Magic number, two bytes of flags and a checksum of them (`lz4_Frame_format.md`).
const FRAME_HEADER_BYTES: usize = 7;
/// In front of each block: its length, and this bit if it is stored as it is.
const STORED: u32 = 1 << 31;

pub(super) struct Packer {
    writer: FrameEncoder<Vec<u8>>,
    /// The frame has its header.
    begun: bool,
}

impl Packer {
    pub fn new() -> Self {
        let info = FrameInfo::new()
            .block_mode(BlockMode::Linked)
            .block_size(BlockSize::Max64KB);
        Self {
            writer: FrameEncoder::with_frame_info(info, Vec::new()),
            begun: false,
        }
    }

    pub fn restart(&mut self) {
        // The end of a frame makes the writer forget it. Writing to a Vec does not fail.
        if std::mem::take(&mut self.begun) && self.writer.try_finish().is_err() {
            *self = Self::new();
        }
    }

    pub fn pack(&mut self, plain: &[u8]) -> Option<&[u8]> {
        self.writer.get_mut().clear();
        let written = self.writer.write_all(plain);
        written.and_then(|()| self.writer.flush()).ok()?;
        let skipped = if self.begun { 0 } else { FRAME_HEADER_BYTES };
        self.begun = true;
        let framed = self.writer.get_ref().get(skipped..)?;
        let (info, block) = framed.split_first_chunk()?;
        let info = u32::from_le_bytes(*info);
        (info & STORED == 0 && info as usize == block.len()).then_some(block)
    }
}

/// The latest bytes that came out: the dictionary of the next block.
#[derive(Default)]
pub(super) struct Unpacker {
    history: Vec<u8>,
}

impl Unpacker {
    pub fn restart(&mut self) {
        self.history.clear();
    }

    pub fn unpack(&mut self, packed: &[u8], plain_bytes: usize) -> Result<Vec<u8>, CodecError> {
        // Zeroed, for a match that begins at itself copies what stands there.
        let mut plain = vec![0; plain_bytes];
        let window = self.history.len().saturating_sub(WINDOW_BYTES);
        let got = decompress_into_with_dict(packed, &mut plain, &self.history[window..])
            .map_err(|_| CodecError::Corrupt(Codec::Lz4))?;
        if got != plain_bytes {
            return Err(CodecError::Size(plain_bytes));
        }
        self.remember(&plain);
        Ok(plain)
    }

    /// Two windows are kept, so that bytes are moved once for each window and not for each piece.
    fn remember(&mut self, plain: &[u8]) {
        if self.history.capacity() == 0 {
            self.history.reserve_exact(2 * WINDOW_BYTES);
        }
        if self.history.len() + plain.len() > 2 * WINDOW_BYTES {
            let old = self.history.len().saturating_sub(WINDOW_BYTES);
            self.history.drain(..old);
        }
        self.history.extend_from_slice(plain);
    }
}
