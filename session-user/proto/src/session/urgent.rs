//! Urgent data: a mark on one byte of a stream, as TCP's urgent pointer sets it (RFC 9293, section 3.8.5; RFC 6093).
//!
//! A direction of a stream has one mark at most, the newest. It travels in the record of its byte, so that neither
//! comes without the other, over whichever transports.

use super::Session;
use super::event::{StreamError, StreamId, Violation};
use crate::Time;
use crate::wire::{Frame, StreamHeader};

/// What is around the data in a record's payload, at most: a header of URGENT and one of STREAM.
const AROUND_BYTES: usize = 64;

impl Session {
    /// As [`Session::write`]; the first byte of `data` is urgent. The bytes are copied.
    pub fn write_urgent(
        &mut self,
        now: Time,
        id: StreamId,
        data: &[u8],
    ) -> Result<(), StreamError> {
        let place = self.place_data(id).unwrap_or_default();
        let Some(header) = self.claim(now, id, data.len())? else {
            return Ok(());
        };
        let offset = header.offset;
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.packing.sends(offset, data);
        }
        let (first, rest) = data.split_at(data.len().min(self.plain_record_bytes(place)));
        let mut frames = Vec::with_capacity(first.len() + AROUND_BYTES);
        // In front: who takes the bytes must know by then where to stop.
        Frame::Urgent { id, offset }.encode(&mut frames);
        let with_it = Frame::Stream {
            header,
            data: first,
        };
        with_it.encode(&mut frames);
        self.flush_frames(now);
        self.rekey_if_due(now);
        self.seal_frames_at(now, &frames, place);
        let behind = StreamHeader {
            offset: offset + first.len() as u64,
            ..header
        };
        self.seal_pieces(now, &behind, rest, place);
        Ok(())
    }

    /// Whether the next byte of `id` is urgent: then [`Session::readable`] shows it alone.
    pub fn is_urgent(&self, id: StreamId) -> bool {
        self.streams.get(&id).is_some_and(|s| s.recv.is_at_mark())
    }

    pub(super) fn handle_urgent(&mut self, id: StreamId, offset: u64) -> Result<(), Violation> {
        match self.peer_stream(id)? {
            Some(stream) => stream.recv.mark(offset),
            // The stream is over.
            None => Ok(()),
        }
    }
}
