//! How fast a transport carries data: from what was written, and when it was acknowledged.
//!
//! The estimate is BBR's delivery rate (draft-cheng-iccrg-delivery-rate-estimation): what was under
//! way when a record went out, over the time until it was acknowledged. Where the application set the
//! pace, a sample says only that the path carries at least so much.

use std::time::Duration;

/// Bytes of one transport, in space R.
#[derive(Debug, Default)]
pub(super) struct Rate {
    written: u64,
    delivered: u64,
    bytes_per_s: Option<u64>,
    /// The same with what the application's pace allowed.
    carried: u64,
}

/// What stood when a record went out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    /// Bytes written, with the record.
    written: u64,
    /// Bytes delivered before it.
    delivered: u64,
}

impl Rate {
    /// The socket took `bytes` more.
    pub fn written(&mut self, bytes: usize) -> Sent {
        self.written += bytes as u64;
        Sent {
            written: self.written,
            delivered: self.delivered,
        }
    }

    /// The record that `sent` belongs to was acknowledged `after` it went out. `busy`: there was always
    /// more to send; `None`: the time says nothing of this transport.
    pub fn delivered(&mut self, sent: Sent, after: Duration, busy: Option<bool>) {
        self.delivered = self.delivered.max(sent.written);
        let micros = u64::try_from(after.as_micros()).unwrap_or(u64::MAX);
        // No time, no rate: the clock has not moved.
        let Some(busy) = busy.filter(|_| micros > 0) else {
            return;
        };
        let bytes = sent.written - sent.delivered.min(sent.written);
        let sample = bytes.saturating_mul(1_000_000) / micros;
        self.carried = towards(self.carried, sample);
        self.bytes_per_s = match self.bytes_per_s {
            None => busy.then_some(sample),
            Some(known) if busy || sample >= known => Some(towards(known, sample)),
            known => known,
        };
    }

    /// Nothing is under way any more.
    pub fn forget(&mut self) {
        self.delivered = self.written;
    }

    pub fn bytes_per_s(&self) -> Option<u64> {
        self.bytes_per_s
    }

    /// What it has carried lately, in bytes a second: all that is known as long as the application, or the processor, sets
    /// the pace.
    pub fn carried(&self) -> u64 {
        self.bytes_per_s.unwrap_or(self.carried)
    }

    pub fn in_flight(&self) -> u64 {
        self.written - self.delivered
    }
}

/// The estimate after one more sample: one bad sample is no slow path.
fn towards(known: u64, sample: u64) -> u64 {
    sample.max(known - known.saturating_sub(sample) / 8)
}

impl Sent {
    /// A later record shares the mark of an earlier one: what was delivered before the earlier counts.
    pub fn join(&mut self, later: Self) {
        self.written = later.written;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_rate_is_what_was_under_way_over_the_time_it_took() {
        let mut rate = Rate::default();
        let sent = rate.written(50_000);
        assert_eq!(rate.in_flight(), 50_000);
        rate.delivered(sent, MS * 10, Some(true));
        assert_eq!(rate.bytes_per_s(), Some(5_000_000));
        assert_eq!(rate.in_flight(), 0);
    }

    #[test]
    fn an_application_that_sends_little_says_nothing_of_the_path() {
        let mut rate = Rate::default();
        let sent = rate.written(100);
        rate.delivered(sent, MS * 40, Some(false));
        assert_eq!(rate.bytes_per_s(), None);
        assert_eq!(rate.carried(), 2_500);
        let sent = rate.written(50_000);
        rate.delivered(sent, MS * 10, Some(true));
        let sent = rate.written(100);
        rate.delivered(sent, MS * 40, Some(false));
        assert_eq!(rate.bytes_per_s(), Some(5_000_000));
        // But a path that was always busy has become slower.
        for _ in 0..60 {
            let sent = rate.written(10_000);
            rate.delivered(sent, MS * 10, Some(true));
        }
        assert!(rate.bytes_per_s().is_some_and(|r| r < 1_100_000));
        assert_eq!(Some(rate.carried()), rate.bytes_per_s());
    }

    /// It was fast while the application set the pace, and has become slow.
    #[test]
    fn the_first_time_that_a_path_is_busy_counts_alone() {
        let mut rate = Rate::default();
        let sent = rate.written(1_000_000);
        rate.delivered(sent, MS * 10, Some(false));
        assert_eq!(rate.carried(), 100_000_000);
        for _ in 0..40 {
            let sent = rate.written(1_000);
            rate.delivered(sent, MS * 10, Some(false));
        }
        assert!(rate.carried() < 1_000_000, "{}", rate.carried());
        let sent = rate.written(5_000);
        rate.delivered(sent, MS * 10, Some(true));
        assert_eq!(rate.bytes_per_s(), Some(500_000));
    }
}
