//! What someone on the path does: finds the records in a stream of bytes, keeps some, puts copies
//! in between, and flips bits.

use crate::limits::RECORD_HEADER_BYTES;
use crate::wire::{RecordHeader, Space};

/// Records kept by an attacker, for each direction of the session.
const KEPT_RECORDS_MAX: usize = 48;
/// Longest record that is kept.
const KEPT_BYTES_MAX: usize = 4 * 1024;

/// A sealed record that was seen.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub space: Space,
    pub bytes: Vec<u8>,
}

/// Follows the records in one direction of a wire.
#[derive(Debug, Default)]
pub(super) struct Tap {
    /// Bytes of preamble or reply that still come first.
    pub greeting: usize,
    current: Vec<u8>,
    /// Framing was lost, by a bit that was flipped.
    lost: bool,
}

impl Tap {
    /// Takes the front of `bytes` up to the end of the record that it completes. Returns how many
    /// bytes that were, and the record; without one, all of `bytes` were taken.
    pub fn follow(&mut self, bytes: &[u8]) -> (usize, Option<Seen>) {
        let mut taken = self.greeting.min(bytes.len());
        self.greeting -= taken;
        while taken < bytes.len() && !self.lost {
            let (space, total) = self.expected();
            let part = (total - self.current.len()).min(bytes.len() - taken);
            self.current.extend_from_slice(&bytes[taken..taken + part]);
            taken += part;
            if let Some(space) = space.filter(|_| self.current.len() == total) {
                let bytes = std::mem::take(&mut self.current);
                return (taken, Some(Seen { space, bytes }));
            }
        }
        (bytes.len(), None)
    }

    /// How long the current record is, with its space; the header's length until that is there.
    fn expected(&mut self) -> (Option<Space>, usize) {
        let Some(raw) = self.current.first_chunk::<RECORD_HEADER_BYTES>() else {
            return (None, RECORD_HEADER_BYTES);
        };
        match RecordHeader::parse(raw) {
            Ok(header) => (
                Some(header.space),
                RECORD_HEADER_BYTES + header.payload_bytes,
            ),
            Err(_) => {
                self.lost = true;
                (None, RECORD_HEADER_BYTES)
            }
        }
    }
}

/// What the attacker has kept of one direction.
#[derive(Debug, Default)]
pub(super) struct Kept {
    pub records: Vec<Seen>,
    next: usize,
}

impl Kept {
    /// Keeps `seen`, instead of the oldest if there are many.
    pub fn keep(&mut self, seen: Seen) {
        if seen.bytes.len() > KEPT_BYTES_MAX {
            return;
        }
        if self.records.len() < KEPT_RECORDS_MAX {
            self.records.push(seen);
        } else {
            self.records[self.next] = seen;
            self.next = (self.next + 1) % KEPT_RECORDS_MAX;
        }
    }
}
