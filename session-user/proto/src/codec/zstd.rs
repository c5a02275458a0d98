//! Zstandard by its own library, through `zstd-safe`.
//!
//! There is no packer in Rust that comes near it, and a C compiler builds `ring` and `aws-lc-rs` already. The
//! library is told the largest window that it may allocate for; a frame that asks for more is refused.

use zstd_safe::zstd_sys::{ZSTD_EndDirective, ZSTD_strategy};
use zstd_safe::{
    CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer, ResetDirective, compress_bound,
};

use super::{CodecError, WINDOW_LOG};
use crate::limits::STREAM_DATA_BYTES_MAX;
use crate::wire::Codec;

/// What higher levels save on a link of more than some ten megabits is less than they cost.
pub(super) const FAST: [CParameter; 1] = [CParameter::CompressionLevel(1)];
/// The search of level 8, with tables that are as small as the window: they hold all of it, and the context takes no more
/// than with the other parameters.
pub(super) const THOROUGH: [CParameter; 6] = [
    CParameter::CompressionLevel(8),
    CParameter::Strategy(ZSTD_strategy::ZSTD_lazy2),
    CParameter::HashLog(13),
    CParameter::ChainLog(13),
    CParameter::SearchLog(4),
    CParameter::MinMatch(5),
];
/// Half of what an unpacker grants: the contexts of both ends take 305 and 222 KiB then, instead of 520 and 350, and
/// text becomes no longer.
const PACKER_WINDOW_LOG: u32 = WINDOW_LOG - 1;
/// Beyond what a piece takes at most: the frame's header, and those of the blocks that it is split into.
const OUT_SPARE_BYTES: usize = 64;

fn out_of_memory<T>(_: T) -> CodecError {
    CodecError::Memory(Codec::Zstd)
}

pub(super) struct Packer {
    context: CCtx<'static>,
    out: Vec<u8>,
}

impl Packer {
    pub fn new(parameters: &[CParameter]) -> Result<Self, CodecError> {
        let mut context = CCtx::try_create().ok_or(CodecError::Memory(Codec::Zstd))?;
        let common = [
            CParameter::WindowLog(PACKER_WINDOW_LOG),
            // Neither is known when the first piece goes out, or needed: records are authenticated.
            CParameter::ContentSizeFlag(false),
            CParameter::ChecksumFlag(false),
        ];
        for parameter in parameters.iter().chain(&common) {
            context.set_parameter(*parameter).map_err(out_of_memory)?;
        }
        let out = vec![0; compress_bound(STREAM_DATA_BYTES_MAX) + OUT_SPARE_BYTES];
        Ok(Self { context, out })
    }

    pub fn restart(&mut self) {
        // It fails only for a context in the middle of another call.
        let _ = self.context.reset(ResetDirective::SessionOnly);
    }

    pub fn pack(&mut self, plain: &[u8]) -> Option<&[u8]> {
        let mut input = InBuffer::around(plain);
        let mut output = OutBuffer::around(&mut self.out[..]);
        let flush = ZSTD_EndDirective::ZSTD_e_flush;
        let left = self
            .context
            .compress_stream2(&mut output, &mut input, flush);
        let (taken, written) = (input.pos(), output.pos());
        (left.ok()? == 0 && taken == plain.len()).then(|| &self.out[..written])
    }
}

pub(super) struct Unpacker {
    context: DCtx<'static>,
}

impl Unpacker {
    pub fn new() -> Result<Self, CodecError> {
        let mut context = DCtx::try_create().ok_or(CodecError::Memory(Codec::Zstd))?;
        context
            .set_parameter(DParameter::WindowLogMax(WINDOW_LOG))
            .map_err(out_of_memory)?;
        Ok(Self { context })
    }

    pub fn restart(&mut self) {
        // It fails only for a context in the middle of another call.
        let _ = self.context.reset(ResetDirective::SessionOnly);
    }

    pub fn unpack(&mut self, packed: &[u8], plain_bytes: usize) -> Result<Vec<u8>, CodecError> {
        // With a byte to spare: while there is room, the library holds nothing back.
        let mut plain = vec![0; plain_bytes + 1];
        let mut input = InBuffer::around(packed);
        let mut output = OutBuffer::around(&mut plain[..]);
        loop {
            let before = (input.pos(), output.pos());
            let hint = self
                .context
                .decompress_stream(&mut output, &mut input)
                .map_err(|_| CodecError::Corrupt(Codec::Zstd))?;
            // Packers never end their frame.
            if hint == 0 {
                return Err(CodecError::Corrupt(Codec::Zstd));
            }
            let now = (input.pos(), output.pos());
            if now.0 == packed.len() || now.1 > plain_bytes || now == before {
                break;
            }
        }
        let (taken, written) = (input.pos(), output.pos());
        if taken != packed.len() || written != plain_bytes {
            return Err(CodecError::Size(plain_bytes));
        }
        plain.truncate(plain_bytes);
        Ok(plain)
    }
}

#[cfg(test)]
impl Packer {
    /// What the library has allocated, and the buffer of what comes out.
    pub fn memory_bytes(&self) -> usize {
        self.context.sizeof() + self.out.len()
    }
}

#[cfg(test)]
impl Unpacker {
    /// What the library has allocated.
    pub fn memory_bytes(&self) -> usize {
        self.context.sizeof()
    }
}
