//! Memory that all sessions of a unit share, beside what each may have for itself.
//!
//! It is divided without a list of who has what, as switches divide their buffers among queues (Choudhury and Hahne,
//! "Dynamic Queue Length Thresholds for Shared-Memory Packet Switches", 1998): a session may have as much as is free. One
//! alone gets half, each of two a third, and some is left for whoever comes next. Where little is free, a session still
//! moves on, with what [`SENDING_MIN`] and the first windows of its streams allow: it waits for its own peer and readers,
//! never for another session.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that a session may have unacknowledged, however little is free; and all that it may have while nothing carries
/// it, which may be for hours: what is divided by what is free must come back.
const SENDING_MIN: usize = 256 * 1024;

/// Bounds what all sessions that have a clone of it hold together, of bytes that are not acknowledged and of credit for
/// streams. By default there is no bound.
#[derive(Clone, Debug, Default)]
pub struct SharedMemory {
    sending: Arc<Pool>,
    receiving: Arc<Pool>,
}

impl SharedMemory {
    /// `bytes` for all sessions: half for what they send, half for what they may receive.
    pub fn new(bytes: usize) -> Self {
        let pool = || {
            Arc::new(Pool {
                bytes: bytes / 2,
                used: AtomicUsize::new(0),
            })
        };
        Self {
            sending: pool(),
            receiving: pool(),
        }
    }

    /// The bound, in bytes.
    pub fn total_bytes(&self) -> usize {
        self.sending.bytes.saturating_mul(2)
    }

    /// Bytes that wait for acknowledgements, in all sessions.
    pub fn sending_bytes(&self) -> usize {
        self.sending.used.load(Ordering::Relaxed)
    }

    /// Windows of all streams of all sessions, in bytes: what they hold for applications is less, and may become as much.
    pub fn receiving_bytes(&self) -> usize {
        self.receiving.used.load(Ordering::Relaxed)
    }

    /// A session's part of what is sent.
    pub(super) fn sending(&self) -> Part {
        Part::of(&self.sending)
    }

    /// A session's part of what is received.
    pub(super) fn receiving(&self) -> Part {
        Part::of(&self.receiving)
    }
}

#[derive(Debug)]
struct Pool {
    bytes: usize,
    /// No order is needed: a session that sees an older sum has a little more or less than its part, for a moment.
    used: AtomicUsize,
}

impl Default for Pool {
    fn default() -> Self {
        Self {
            bytes: usize::MAX,
            used: AtomicUsize::new(0),
        }
    }
}

/// What one session has of a pool. It is given back with the session.
#[derive(Debug)]
pub(super) struct Part {
    pool: Arc<Pool>,
    used: usize,
}

impl Part {
    fn of(pool: &Arc<Pool>) -> Self {
        Self {
            pool: Arc::clone(pool),
            used: 0,
        }
    }

    pub fn used(&self) -> usize {
        self.used
    }

    pub fn add(&mut self, bytes: usize) {
        self.used += bytes;
        self.pool.used.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn sub(&mut self, bytes: usize) {
        self.used -= bytes;
        self.pool.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Bytes that nobody has.
    pub fn free(&self) -> usize {
        let used = self.pool.used.load(Ordering::Relaxed);
        self.pool.bytes.saturating_sub(used)
    }

    /// The most that a session may have unacknowledged for now; little while it is `adrift`, if there is a bound.
    pub fn sending_limit(&self, adrift: bool) -> usize {
        if adrift && self.pool.bytes != usize::MAX {
            SENDING_MIN
        } else {
            self.free().max(SENDING_MIN)
        }
    }
}

impl Default for Part {
    /// Of a pool of its own, without a bound.
    fn default() -> Self {
        Self::of(&Arc::default())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.pool.used.fetch_sub(self.used, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOTAL: usize = 64 << 20;

    /// Each of `parts` takes up to its limit, a record at a time in turn.
    fn fill(parts: &mut [Part]) {
        const RECORD: usize = 16 * 1024;
        loop {
            let mut more = false;
            for part in &mut *parts {
                if part.used() + RECORD <= part.sending_limit(false) {
                    part.add(RECORD);
                    more = true;
                }
            }
            if !more {
                return;
            }
        }
    }

    #[test]
    fn all_have_alike_and_some_is_left() {
        for count in [1, 2, 5] {
            let memory = SharedMemory::new(TOTAL);
            let mut parts: Vec<Part> = (0..count).map(|_| memory.sending()).collect();
            fill(&mut parts);
            let fair = TOTAL / 2 / (count + 1);
            for part in &parts {
                assert!(part.used().abs_diff(fair) < fair / 8, "{}", part.used());
            }
            drop(parts);
            assert_eq!(memory.sending_bytes(), 0);
        }
    }

    #[test]
    fn where_nothing_is_free_each_moves_on() {
        let memory = SharedMemory::new(TOTAL);
        let mut parts: Vec<Part> = (0..1000).map(|_| memory.sending()).collect();
        fill(&mut parts);
        assert!(parts.iter().all(|p| p.used() == SENDING_MIN));
    }
}
