//! Received bytes in order that the application has not taken, as they came.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::{Buf, Bytes};

use crate::Time;

/// Small pieces are joined up to this size, in bytes.
const JOINED_BYTES: usize = 16 * 1024;

/// A reader that took something within this time takes the rest soon.
const READER_SLOW: Duration = Duration::from_millis(100);

/// A queue of them. Each shares the buffer that it came in, which is large and used again once nothing shares it; or has
/// one of its own.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    queue: VecDeque<Bytes>,
    bytes: usize,
    /// The last so many share the buffers that they came in.
    loose: usize,
    /// When some were taken last.
    taken_at: Option<Time>,
}

impl Pieces {
    pub fn push(&mut self, data: Bytes) {
        self.bytes += data.len();
        self.queue.push_back(data);
        self.loose += 1;
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Pieces that share the buffers that they came in.
    pub fn loose(&self) -> usize {
        self.loose
    }

    pub fn first(&self) -> Option<&Bytes> {
        self.queue.front()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Bytes> {
        self.queue.iter()
    }

    /// The first `taken` bytes are gone. At most [`Self::bytes`].
    pub fn take(&mut self, now: Time, taken: usize) {
        debug_assert!(taken <= self.bytes);
        let mut left = taken;
        while left > 0 {
            let Some(front) = self.queue.front_mut() else {
                break;
            };
            let now = left.min(front.len());
            front.advance(now);
            left -= now;
            if front.is_empty() {
                self.queue.pop_front();
            }
        }
        self.loose = self.loose.min(self.queue.len());
        self.bytes -= taken;
        self.taken_at = Some(now);
    }

    /// Whether those that share buffers are little for that, and not about to go.
    pub fn waste_buffers(&self, now: Time) -> bool {
        let taken_at = self.taken_at;
        if taken_at.is_some_and(|at| now.since(at) < READER_SLOW) {
            return false;
        }
        let loose = self.queue.iter().rev().take(self.loose);
        loose.map(Bytes::len).sum::<usize>() < self.loose * JOINED_BYTES
    }

    /// Moves what shares buffers into its own, so that a slow reader does not hold on to the large ones that its few bytes
    /// came in. Small pieces are joined.
    pub fn compact(&mut self) {
        if self.loose == 0 {
            return;
        }
        // The tail may grow with every call, so what is large enough is left as it is.
        let settled = self.queue.len() - self.loose.min(self.queue.len());
        let mut tail: Vec<Bytes> = self.queue.drain(settled..).collect();
        if let Some(last) = self.queue.pop_back() {
            if last.len() < JOINED_BYTES {
                tail.insert(0, last);
            } else {
                self.queue.push_back(last);
            }
        }
        let mut left: usize = tail.iter().map(Bytes::len).sum();
        let mut joined = Vec::with_capacity(left.min(JOINED_BYTES));
        for piece in tail {
            joined.extend_from_slice(&piece);
            left -= piece.len();
            if joined.len() >= JOINED_BYTES {
                let next = Vec::with_capacity(left.min(JOINED_BYTES));
                let full = std::mem::replace(&mut joined, next);
                self.queue.push_back(Bytes::from(full));
            }
        }
        if !joined.is_empty() {
            self.queue.push_back(Bytes::from(joined));
        }
        self.loose = 0;
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
}
