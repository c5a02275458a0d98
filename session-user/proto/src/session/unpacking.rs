//! Packed bytes of a stream, as they come: kept as they are until all before them is there, then unpacked.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;

use super::Session;
use super::event::{StreamId, Violation};
use crate::codec::Unpacker;
use crate::wire::{Codec, PackedHeader, close_code};

/// How many streams may be packed at once in one direction of a session, and how many are.
#[derive(Clone, Debug, Default)]
pub(super) struct Slots {
    taken: Arc<AtomicUsize>,
    most: usize,
}

/// One of them; it is free again when this is dropped.
#[derive(Debug)]
struct Slot(Arc<AtomicUsize>);

impl Slots {
    pub fn new(most: usize) -> Self {
        Self {
            taken: Arc::default(),
            most,
        }
    }

    /// How many there may be.
    pub fn most(&self) -> usize {
        self.most
    }

    // A session is one task's at a time, so nobody comes in between.
    fn take(&self) -> Option<Slot> {
        if self.taken.load(Ordering::Relaxed) >= self.most {
            return None;
        }
        self.taken.fetch_add(1, Ordering::Relaxed);
        Some(Slot(Arc::clone(&self.taken)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a frame brought of a stream.
#[derive(Debug)]
pub(super) enum Piece {
    Plain(Bytes),
    Packed(Packed),
}

/// The data of a PACKED frame.
#[derive(Debug)]
pub(super) struct Packed {
    pub codec: Codec,
    pub fresh: bool,
    pub plain_bytes: usize,
    /// Fewer than `plain_bytes`, which is what they are counted as.
    pub data: Bytes,
}

impl Piece {
    /// Bytes of the stream in it.
    pub fn len(&self) -> usize {
        match self {
            Self::Plain(data) => data.len(),
            Self::Packed(packed) => packed.plain_bytes,
        }
    }
}

/// What unpacks one direction of a stream.
#[derive(Debug, Default)]
pub(super) struct Unpacking {
    unpacker: Option<(Box<Unpacker>, Slot)>,
    /// Offset of the first byte that came packed afresh.
    begun_at: u64,
    /// The sender has given up what packs there, and nothing was packed since.
    over_at: Option<u64>,
    slots: Slots,
    /// Bytes that came packed, and what came out of them.
    pub packed_bytes: u64,
    /// See `packed_bytes`.
    pub plain_bytes: u64,
}

impl Unpacking {
    pub fn new(slots: Slots) -> Self {
        Self {
            slots,
            ..Self::default()
        }
    }

    pub fn codec(&self) -> Option<Codec> {
        self.unpacker.as_ref().map(|(u, _)| u.codec())
    }

    /// The next bytes of the stream, those from `offset` on, which come packed.
    pub fn unpack(&mut self, offset: u64, packed: &Packed) -> Result<Bytes, Violation> {
        if packed.fresh {
            self.begin(packed.codec)?;
            self.begun_at = offset;
        }
        let known = self.unpacker.as_mut();
        let Some((unpacker, _)) = known.filter(|(u, _)| u.codec() == packed.codec) else {
            return Err(Violation::protocol(
                "packed data without what it follows upon",
            ));
        };
        let plain = unpacker
            .unpack(&packed.data, packed.plain_bytes)
            .map_err(|_| Violation::protocol("packed data that cannot be unpacked"))?;
        self.packed_bytes += packed.data.len() as u64;
        self.plain_bytes += plain.len() as u64;
        Ok(plain.into())
    }

    fn begin(&mut self, codec: Codec) -> Result<(), Violation> {
        if let Some((unpacker, _)) = self.unpacker.as_mut().filter(|(u, _)| u.codec() == codec) {
            unpacker.restart();
            return Ok(());
        }
        self.unpacker = None;
        let slot = self.slots.take();
        let slot = slot.ok_or(Violation::protocol("more packed streams than allowed"))?;
        let unpacker = Unpacker::new(codec).map_err(|_| Violation {
            code: close_code::INTERNAL,
            what: "no memory to unpack data",
        })?;
        self.unpacker = Some((Box::new(unpacker), slot));
        Ok(())
    }

    /// The sender gave up what packs at `at`; all below `next` is in order. Records come in any order, so what follows may
    /// be here already, as it is or packed afresh.
    pub fn over(&mut self, at: u64, next: u64) {
        if at > next {
            self.over_at = self.over_at.max(Some(at));
        } else if at > self.begun_at {
            // What ends a later one may have come before this.
            self.unpacker = None;
        }
    }

    /// All below `next` is in order.
    pub fn reached(&mut self, next: u64) {
        if self.over_at.is_some_and(|at| at <= next) {
            self.end();
        }
    }

    /// Nothing more comes packed, or it begins afresh.
    pub fn end(&mut self) {
        self.over_at = None;
        self.unpacker = None;
    }
}

impl Session {
    pub(super) fn handle_packed(
        &mut self,
        header: &PackedHeader,
        data: Bytes,
    ) -> Result<(), Violation> {
        if self.config.codecs() & header.codec.bit() == 0 {
            return Err(Violation::protocol(
                "data packed by a codec that was not announced",
            ));
        }
        let packed = Packed {
            codec: header.codec,
            fresh: header.fresh,
            plain_bytes: header.plain_bytes,
            data,
        };
        let plain_bytes = header.plain_bytes as u64;
        self.arrived(header.id, plain_bytes, |recv| {
            recv.insert_packed(header.offset, packed)
        })
    }

    pub(super) fn handle_packing_over(
        &mut self,
        id: StreamId,
        offset: u64,
    ) -> Result<(), Violation> {
        match self.peer_stream(id)? {
            Some(stream) => stream.recv.packing_over(offset),
            // The stream is over.
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Packer;

    const PLAIN: [u8; 4096] = [7; 4096];

    fn fresh() -> Packed {
        let mut packer = Packer::new(Codec::Lz4).unwrap();
        Packed {
            codec: Codec::Lz4,
            fresh: true,
            plain_bytes: PLAIN.len(),
            data: Bytes::copy_from_slice(packer.pack(&PLAIN).unwrap()),
        }
    }

    #[test]
    fn the_end_of_packing_may_come_behind_what_follows_it() {
        let slots = Slots::new(1);
        let mut first = Unpacking::new(slots.clone());
        assert_eq!(first.unpack(0, &fresh()).unwrap(), PLAIN[..]);
        // The next bytes came as they are, in a record that was faster.
        first.over(4096, 5000);
        assert!(first.codec().is_none());
        // So there is room for another stream.
        Unpacking::new(slots).unpack(0, &fresh()).unwrap();
    }

    #[test]
    fn late_news_of_an_earlier_packing_leaves_a_later_one() {
        let mut stream = Unpacking::new(Slots::new(1));
        stream.unpack(0, &fresh()).unwrap();
        stream.unpack(8192, &fresh()).unwrap();
        stream.over(4096, 12_288);
        assert!(stream.codec().is_some());
        // The end of the second overtakes the bytes before it, and then the end of the first comes.
        stream.over(16_384, 12_288);
        stream.over(4096, 12_288);
        assert!(stream.codec().is_some());
        stream.reached(16_384);
        assert!(stream.codec().is_none());
    }
}
