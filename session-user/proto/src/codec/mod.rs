//! Codecs with a memory: what packs one direction of one stream, and what unpacks it.
//!
//! Each piece that goes into a [`Packer`] comes out packed by itself, so that a record can be sent as soon
//! as it is full; what came before is its dictionary. Pieces go into the [`Unpacker`] in the same order, whole.
//! Nothing is shared between streams or directions.
//!
//! An unpacker is fed by a peer. What it allocates is bounded by [`UNPACKER_BYTES_MAX`] and the size that
//! its caller allows for a piece, and bytes that no packer made end in an error.

mod lz4;
#[cfg(test)]
mod tests;
mod zstd;

use std::fmt;

use crate::limits::STREAM_DATA_BYTES_MAX;
pub use crate::wire::Codec;

/// How far back a packed piece may refer, in bytes.
const WINDOW_BYTES: usize = 1 << WINDOW_LOG;
const WINDOW_LOG: u32 = 16;

/// What an unpacker keeps between two pieces, at most, in bytes: a context of zstd with buffers for its window
/// (350 KiB in version 1.5.7). That of LZ4 has two windows.
pub const UNPACKER_BYTES_MAX: usize = 384 * 1024;

/// Bytes that cannot be unpacked, or a codec that cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// There is no memory for it.
    #[error("there is no memory for {}", .0.name())]
    Memory(Codec),
    /// No packer made these bytes, or others came before them.
    #[error("these bytes do not come from a packer of {}", .0.name())]
    Corrupt(Codec),
    /// They hold another number of bytes than was said.
    #[error("the packed bytes do not hold the {0} that they should")]
    Size(usize),
}

/// How to pack: a codec, and how much it takes upon itself. What comes out is unpacked alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// LZ4.
    Lz4,
    /// Zstandard at its fastest usual level.
    Zstd,
    /// Zstandard with a longer search: text becomes a twelfth shorter, in four times the time.
    ZstdThorough,
}

impl Method {
    /// All of them, in the order of [`Method::index`].
    pub const ALL: [Self; 3] = [Self::Lz4, Self::Zstd, Self::ZstdThorough];

    /// What unpacks it.
    pub const fn codec(self) -> Codec {
        match self {
            Self::Lz4 => Codec::Lz4,
            Self::Zstd | Self::ZstdThorough => Codec::Zstd,
        }
    }

    /// A place in arrays of as many as there are methods.
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl From<Codec> for Method {
    fn from(codec: Codec) -> Self {
        match codec {
            Codec::Lz4 => Self::Lz4,
            Codec::Zstd => Self::Zstd,
        }
    }
}

/// Packs one direction of one stream.
pub struct Packer {
    method: Method,
    kind: PackerKind,
}

enum PackerKind {
    Lz4(lz4::Packer),
    Zstd(zstd::Packer),
}

impl Packer {
    /// One that knows of no bytes yet.
    pub fn new(method: impl Into<Method>) -> Result<Self, CodecError> {
        let method = method.into();
        let kind = match method {
            Method::Lz4 => PackerKind::Lz4(lz4::Packer::new()),
            Method::Zstd => PackerKind::Zstd(zstd::Packer::new(&zstd::FAST)?),
            Method::ZstdThorough => PackerKind::Zstd(zstd::Packer::new(&zstd::THOROUGH)?),
        };
        Ok(Self { method, kind })
    }

    /// How it packs.
    pub const fn method(&self) -> Method {
        self.method
    }

    /// Forgets all that it was given, as a new one.
    pub fn restart(&mut self) {
        match &mut self.kind {
            PackerKind::Lz4(packer) => packer.restart(),
            PackerKind::Zstd(packer) => packer.restart(),
        }
    }

    /// The next piece, packed: at most [`STREAM_DATA_BYTES_MAX`] bytes of it. `None` where it does not become
    /// shorter: then nothing more comes of this packer until it is restarted, since the other end does not get
    /// the piece from it.
    pub fn pack(&mut self, plain: &[u8]) -> Option<&[u8]> {
        if plain.len() > STREAM_DATA_BYTES_MAX {
            return None;
        }
        let packed = match &mut self.kind {
            PackerKind::Lz4(packer) => packer.pack(plain),
            PackerKind::Zstd(packer) => packer.pack(plain),
        };
        packed.filter(|packed| !packed.is_empty() && packed.len() < plain.len())
    }
}

impl fmt::Debug for Packer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Packer").field(&self.method).finish()
    }
}

/// Unpacks one direction of one stream.
pub struct Unpacker(UnpackerKind);

enum UnpackerKind {
    Lz4(lz4::Unpacker),
    Zstd(zstd::Unpacker),
}

impl Unpacker {
    /// One that knows of no bytes yet.
    pub fn new(codec: Codec) -> Result<Self, CodecError> {
        Ok(Self(match codec {
            Codec::Lz4 => UnpackerKind::Lz4(lz4::Unpacker::default()),
            Codec::Zstd => UnpackerKind::Zstd(zstd::Unpacker::new()?),
        }))
    }

    /// What it unpacks.
    pub const fn codec(&self) -> Codec {
        match self.0 {
            UnpackerKind::Lz4(_) => Codec::Lz4,
            UnpackerKind::Zstd(_) => Codec::Zstd,
        }
    }

    /// Forgets all that it was given, as a new one.
    pub fn restart(&mut self) {
        match &mut self.0 {
            UnpackerKind::Lz4(unpacker) => unpacker.restart(),
            UnpackerKind::Zstd(unpacker) => unpacker.restart(),
        }
    }

    /// The `plain_bytes` bytes (at most [`STREAM_DATA_BYTES_MAX`]) that are packed in `packed`, a whole piece.
    /// After an error it must be restarted.
    pub fn unpack(&mut self, packed: &[u8], plain_bytes: usize) -> Result<Vec<u8>, CodecError> {
        if plain_bytes > STREAM_DATA_BYTES_MAX {
            return Err(CodecError::Size(plain_bytes));
        }
        match &mut self.0 {
            UnpackerKind::Lz4(unpacker) => unpacker.unpack(packed, plain_bytes),
            UnpackerKind::Zstd(unpacker) => unpacker.unpack(packed, plain_bytes),
        }
    }
}

impl fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Unpacker").field(&self.codec()).finish()
    }
}
