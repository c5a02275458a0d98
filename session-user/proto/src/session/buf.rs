//! A buffer that becomes a record without its bytes being moved.

use bytes::buf::Limit;
use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::pool::{BESIDE_BYTES, Pool};
use crate::Time;
use crate::limits::{RECORD_HEADER_BYTES, TAG_BYTES};
use crate::seal::RecordKey;
use crate::wire::{PackedHeader, RecordHeader, Space, StreamHeader};

/// Room in front of the data for the record header and the longest frame header.
const HEADROOM: usize = RECORD_HEADER_BYTES + PackedHeader::BYTES_MAX;
const _: () = assert!(StreamHeader::BYTES_MAX <= PackedHeader::BYTES_MAX);
const _: () = assert!(HEADROOM + TAG_BYTES <= BESIDE_BYTES);

/// What the data is framed as.
#[derive(Clone, Copy, Debug)]
pub(super) enum DataHeader {
    Plain(StreamHeader),
    Packed(PackedHeader),
}

impl DataHeader {
    fn write_before(&self, room: &mut [u8], data_bytes: usize) -> usize {
        match self {
            Self::Plain(header) => header.write_before(room, data_bytes),
            Self::Packed(header) => header.write_before(room, data_bytes),
        }
    }
}

/// A record as it goes out.
#[derive(Debug)]
pub(super) struct Sealed {
    pub bytes: Bytes,
    /// Of the buffer that it keeps alive.
    pub buffer_bytes: usize,
}

/// Application bytes on their way into a record: read them from a socket straight into
/// [`Self::unfilled`]; the headers are written before them and the tag behind them.
#[derive(Debug)]
pub struct SendBuf {
    buf: BytesMut,
    room: usize,
}

impl SendBuf {
    /// A buffer for at most `room` bytes of data. [`super::Session::send_buf`] has one that was used before.
    pub fn with_capacity(room: usize) -> Self {
        Self::within(BytesMut::with_capacity(HEADROOM + room + TAG_BYTES), room)
    }

    /// The same out of `pool`.
    pub(super) fn of(pool: &mut Pool, now: Time, room: usize) -> Self {
        Self::within(pool.take(now, room), room)
    }

    fn within(mut buf: BytesMut, room: usize) -> Self {
        buf.resize(HEADROOM, 0);
        Self { buf, room }
    }

    /// A buffer that holds a copy of `data`.
    pub fn copy_of(data: &[u8]) -> Self {
        Self::with_capacity(data.len()).filled(data)
    }

    /// The same out of `pool`.
    pub(super) fn copy_in(pool: &mut Pool, now: Time, data: &[u8]) -> Self {
        Self::of(pool, now, data.len()).filled(data)
    }

    fn filled(mut self, data: &[u8]) -> Self {
        self.buf.extend_from_slice(data);
        self
    }

    /// Bytes of data so far.
    pub fn len(&self) -> usize {
        self.buf.len() - HEADROOM
    }

    /// Bytes of data that it can hold.
    pub fn room(&self) -> usize {
        self.room
    }

    /// The same buffer without data.
    pub fn cleared(mut self) -> Self {
        self.buf.truncate(HEADROOM);
        self
    }

    /// Whether a copy of the data would need half of the memory, or less.
    pub fn is_mostly_empty(&self) -> bool {
        self.len() * 2 + BESIDE_BYTES <= self.buf.capacity()
    }

    /// Whether there is no data yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Room for further data, at most `max` bytes of it.
    pub fn unfilled(&mut self, max: usize) -> Limit<&mut BytesMut> {
        let left = (self.room - self.len()).min(max);
        (&mut self.buf).limit(left)
    }

    /// The data.
    pub fn data(&self) -> &[u8] {
        &self.buf[HEADROOM..]
    }

    /// Frames and seals the data as a record of space R.
    pub(super) fn seal(
        mut self,
        stream: &DataHeader,
        epoch: u32,
        number: u64,
        key: &RecordKey,
    ) -> Sealed {
        let data_bytes = self.len();
        let frame_bytes = stream.write_before(&mut self.buf[..HEADROOM], data_bytes);
        self.buf
            .advance(HEADROOM - frame_bytes - RECORD_HEADER_BYTES);
        seal_record(self.buf, Space::Retained, epoch, number, key)
    }
}

/// Seals `frames`, in a buffer out of `pool`.
pub(super) fn seal_copy(
    pool: &mut Pool,
    now: Time,
    frames: &[u8],
    space: Space,
    epoch: u32,
    number: u64,
    key: &RecordKey,
) -> Sealed {
    let mut record = pool.take(now, frames.len());
    record.resize(RECORD_HEADER_BYTES, 0);
    record.extend_from_slice(frames);
    seal_record(record, space, epoch, number, key)
}

/// Seals what stands behind the [`RECORD_HEADER_BYTES`] of room at the front of `record`.
fn seal_record(
    mut record: BytesMut,
    space: Space,
    epoch: u32,
    number: u64,
    key: &RecordKey,
) -> Sealed {
    let payload_bytes = record.len() - RECORD_HEADER_BYTES + TAG_BYTES;
    let header = RecordHeader {
        space,
        payload_bytes,
        epoch,
        number,
    }
    .encode();
    record[..RECORD_HEADER_BYTES].copy_from_slice(&header);
    let tag = key.seal(&header, number, &mut record[RECORD_HEADER_BYTES..]);
    record.extend_from_slice(&tag);
    Sealed {
        buffer_bytes: record.capacity(),
        bytes: record.freeze(),
    }
}
