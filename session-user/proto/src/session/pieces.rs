//! Received bytes in order that the application has not taken, as they came.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use bytes::{Buf, Bytes};

use crate::Time;
use crate::limits::READ_BYTES_MAX;

/// Small pieces are joined up to this size, in bytes.
const JOINED_BYTES: usize = 16 * 1024;

/// A reader that took something within this time takes the rest soon.
const READER_SLOW: Duration = Duration::from_millis(100);

/// What lies between the bytes of two records that came one behind the other is not more, in bytes: a tag and two headers.
const BETWEEN_BYTES: usize = 64;

/// So many pieces in one buffer count once, and so many may wait for a reader that takes some: a piece costs memory and a share
/// of a write, however little is in it.
const RUN_PIECES: usize = 16;

/// A queue of them. Each shares the buffer that it came in, which is large and used again once nothing shares it; or has
/// one of its own.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    queue: VecDeque<Piece>,
    bytes: usize,
    /// The last so many share the buffers that they came in.
    loose: usize,
    /// As many buffers as that is.
    buffers: usize,
    /// Where the pieces that came in the last one lie in memory.
    last: Range<usize>,
    /// How many these are.
    run: usize,
    /// When some were taken last.
    taken_at: Option<Time>,
}

#[derive(Debug)]
struct Piece {
    bytes: Bytes,
    /// It came in the same buffer as the one before, as far as one can tell.
    follows: bool,
}

impl From<Bytes> for Piece {
    fn from(bytes: Bytes) -> Self {
        Self {
            bytes,
            follows: false,
        }
    }
}

impl Pieces {
    pub fn push(&mut self, data: Bytes) {
        let start = data.as_ptr().addr();
        let end = start + data.len();
        // Two buffers may lie next to each other, too: no more is taken for one than one has.
        let behind = self.last.end..=self.last.end + BETWEEN_BYTES;
        let follows = self.loose > 0
            && self.run < RUN_PIECES
            && behind.contains(&start)
            && end - self.last.start <= READ_BYTES_MAX;
        if follows {
            self.last.end = end;
            self.run += 1;
        } else {
            self.last = start..end;
            self.run = 1;
            self.buffers += 1;
        }
        self.bytes += data.len();
        self.queue.push_back(Piece {
            bytes: data,
            follows,
        });
        self.loose += 1;
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Buffers that pieces came in and still share.
    pub fn buffers(&self) -> usize {
        self.buffers
    }

    pub fn first(&self) -> Option<&Bytes> {
        self.queue.front().map(|piece| &piece.bytes)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Bytes> {
        self.queue.iter().map(|piece| &piece.bytes)
    }

    /// The first `taken` bytes are gone. At most [`Self::bytes`].
    pub fn take(&mut self, now: Time, taken: usize) {
        debug_assert!(taken <= self.bytes);
        let mut left = taken;
        while left > 0 {
            let Some(front) = self.queue.front_mut() else {
                break;
            };
            let part = left.min(front.bytes.len());
            front.bytes.advance(part);
            left -= part;
            if front.bytes.is_empty() {
                self.pop();
            }
        }
        self.bytes -= taken;
        self.taken_at = Some(now);
    }

    /// The first is gone.
    fn pop(&mut self) {
        self.queue.pop_front();
        if self.loose <= self.queue.len() {
            return;
        }
        self.loose = self.queue.len();
        match self.queue.front_mut() {
            Some(next) if next.follows => next.follows = false,
            _ => self.buffers -= 1,
        }
    }

    /// Whether those that share buffers are little for that, and not about to go.
    pub fn waste_buffers(&self, now: Time) -> bool {
        let is_read = self.taken_at.is_some_and(|at| now.since(at) < READER_SLOW);
        if is_read && self.loose <= RUN_PIECES {
            return false;
        }
        let loose = self.queue.iter().rev().take(self.loose);
        loose.map(|p| p.bytes.len()).sum::<usize>() < self.loose * JOINED_BYTES
    }

    /// Moves what shares buffers into its own, so that a slow reader does not hold on to the large ones that its few bytes
    /// came in. Small pieces are joined.
    pub fn compact(&mut self) {
        if self.loose == 0 {
            return;
        }
        // The tail may grow with every call, so what is large enough is left as it is.
        let settled = self.queue.len() - self.loose.min(self.queue.len());
        let mut tail: Vec<Piece> = self.queue.drain(settled..).collect();
        if let Some(last) = self.queue.pop_back() {
            if last.bytes.len() < JOINED_BYTES {
                tail.insert(0, last);
            } else {
                self.queue.push_back(last);
            }
        }
        let mut left: usize = tail.iter().map(|p| p.bytes.len()).sum();
        let mut joined = Vec::with_capacity(left.min(JOINED_BYTES));
        for piece in tail {
            joined.extend_from_slice(&piece.bytes);
            left -= piece.bytes.len();
            if joined.len() >= JOINED_BYTES {
                let next = Vec::with_capacity(left.min(JOINED_BYTES));
                let full = std::mem::replace(&mut joined, next);
                self.queue.push_back(Bytes::from(full).into());
            }
        }
        if !joined.is_empty() {
            self.queue.push_back(Bytes::from(joined).into());
        }
        self.loose = 0;
        self.buffers = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Time {
        Time::ZERO + Duration::from_millis(millis)
    }

    #[test]
    fn what_is_small_on_average_gets_buffers_of_its_own() {
        let mut pieces = Pieces::default();
        assert!(!pieces.waste_buffers(at(0)));
        pieces.push(Bytes::from(vec![1; 3 * JOINED_BYTES]));
        pieces.push(Bytes::from_static(b"few"));
        assert!(!pieces.waste_buffers(at(0)));
        pieces.take(at(0), 2 * JOINED_BYTES);
        assert!(pieces.waste_buffers(at(100)));
        pieces.compact();
        assert!(!pieces.waste_buffers(at(100)));
        assert_eq!(pieces.bytes(), JOINED_BYTES + 3);
    }

    #[test]
    fn what_is_being_read_stays_where_it_is() {
        let mut pieces = Pieces::default();
        pieces.push(Bytes::from_static(b"few and some"));
        assert!(pieces.waste_buffers(at(0)));
        pieces.take(at(0), 3);
        assert!(!pieces.waste_buffers(at(99)));
        pieces.push(Bytes::from_static(b"more"));
        assert!(!pieces.waste_buffers(at(99)));
        assert!(pieces.waste_buffers(at(100)));
        pieces.take(at(100), 1);
        assert!(!pieces.waste_buffers(at(199)));
    }

    #[test]
    fn a_buffer_counts_once_until_the_last_of_it_is_gone() {
        const RECORD: usize = READ_BYTES_MAX / 4;
        let mut pieces = Pieces::default();
        for _ in 0..2 {
            let buffer = Bytes::from(vec![1; READ_BYTES_MAX]);
            for record in 0..4 {
                pieces.push(buffer.slice(record * RECORD + 30..(record + 1) * RECORD));
            }
        }
        // From another, and again with bytes of others between.
        let buffer = Bytes::from(vec![1; 4 * RECORD]);
        pieces.push(buffer.slice(..100));
        pieces.push(buffer.slice(RECORD..RECORD + 100));
        assert_eq!(pieces.buffers(), 4);
        let counts = [2, 2, 2, 2, 1, 1, 1, 1].map(|buffers| buffers + 2);
        for buffers in counts {
            pieces.take(at(0), 1);
            assert_eq!(pieces.buffers(), buffers);
            pieces.take(at(0), RECORD - 31);
        }
        assert_eq!(pieces.buffers(), 2);
        pieces.take(at(0), pieces.bytes());
        assert_eq!(pieces.buffers(), 0);
    }

    #[test]
    fn many_small_pieces_are_many_wherever_they_are() {
        let mut pieces = Pieces::default();
        let buffer = Bytes::from(vec![1; 9 * RUN_PIECES]);
        pieces.push(buffer.slice(..3));
        pieces.take(at(0), 1);
        for piece in 1..RUN_PIECES {
            pieces.push(buffer.slice(9 * piece..=9 * piece));
        }
        assert_eq!(pieces.buffers(), 1);
        assert!(!pieces.waste_buffers(at(1)));
        pieces.push(buffer.slice(9 * RUN_PIECES - 1..));
        assert_eq!(pieces.buffers(), 2);
        assert!(pieces.waste_buffers(at(1)));
        pieces.compact();
        assert_eq!((pieces.bytes(), pieces.iter().count()), (RUN_PIECES + 2, 1));
    }

    #[test]
    fn no_more_is_taken_for_one_buffer_than_one_has() {
        let mut pieces = Pieces::default();
        let two = Bytes::from(vec![1; 2 * READ_BYTES_MAX]);
        for from in (0..two.len()).step_by(READ_BYTES_MAX / 4) {
            pieces.push(two.slice(from..from + READ_BYTES_MAX / 4));
        }
        assert_eq!(pieces.buffers(), 2);
        pieces.compact();
        assert_eq!(pieces.buffers(), 0);
        pieces.push(Bytes::from_static(b"more"));
        assert_eq!(pieces.buffers(), 1);
    }
}
