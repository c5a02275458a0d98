//! Streams whose credit runs out fast, and which share what windows may grow to.
//!
//! Where more is sent than a path carries, all credit is used, and each stream moves in proportion to its window.

use std::time::Duration;

use crate::Time;

/// A stream that uses half of its window within this time moves as much as its window lets it, on paths with round-trip times
/// of up to twice as much; on others its window need not grow.
const FAST: Duration = Duration::from_secs(1);

/// How many of a session there are.
#[derive(Debug, Default)]
pub(super) struct Rivals {
    /// Seconds of the session's clock.
    second: u64,
    /// Those that were fast in it so far, and in the one before.
    now: u64,
    before: u64,
}

/// What is known of one stream.
#[derive(Debug, Default)]
pub(super) struct Pace {
    renewed_at: Option<Time>,
    /// Behind the last second that it was counted in.
    counted: u64,
}

impl Rivals {
    /// Credit of a stream is renewed: half of its window is used. Whether that was fast.
    pub fn renewed(&mut self, pace: &mut Pace, now: Time) -> bool {
        let last = pace.renewed_at.replace(now);
        // One that is new has not been slow.
        let fast = last.is_none_or(|last| now.since(last) < FAST);
        if fast {
            self.count(pace, now);
        }
        fast
    }

    fn count(&mut self, pace: &mut Pace, now: Time) {
        let second = now.since(Time::ZERO).as_secs();
        if second != self.second {
            let follows = second == self.second + 1;
            self.before = if follows { self.now } else { 0 };
            self.now = 0;
            self.second = second;
        }
        if pace.counted != second + 1 {
            pace.counted = second + 1;
            self.now += 1;
        }
    }

    /// How many there have been of late.
    pub fn count_of_late(&self) -> u64 {
        self.now.max(self.before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Time {
        Time::ZERO + Duration::from_millis(millis)
    }

    #[test]
    fn those_that_were_fast_of_late_are_counted_once() {
        let mut rivals = Rivals::default();
        let mut paces = [Pace::default(), Pace::default(), Pace::default()];
        for millis in [0, 300, 600, 900] {
            for pace in &mut paces {
                assert!(rivals.renewed(pace, at(millis)));
            }
        }
        assert_eq!(rivals.count_of_late(), 3);
        // The next second begins with one of them; the others still count.
        assert!(rivals.renewed(&mut paces[0], at(1_100)));
        assert_eq!(rivals.count_of_late(), 3);
        for millis in [1_900, 2_100] {
            assert!(rivals.renewed(&mut paces[0], at(millis)));
        }
        assert_eq!(rivals.count_of_late(), 1);
    }

    #[test]
    fn who_takes_long_is_no_rival() {
        let mut rivals = Rivals::default();
        let mut pace = Pace::default();
        assert!(rivals.renewed(&mut pace, at(0)));
        for second in [10, 11, 12] {
            assert!(!rivals.renewed(&mut pace, at(second * 1_000)));
        }
        assert_eq!(rivals.count_of_late(), 1);
        assert!(rivals.renewed(&mut pace, at(12_500)));
        assert!(rivals.renewed(&mut pace, at(13_400)));
        assert_eq!(rivals.count_of_late(), 1);
        let mut other = Pace::default();
        assert!(rivals.renewed(&mut other, at(60_000)));
        assert_eq!(rivals.count_of_late(), 1);
    }
}
