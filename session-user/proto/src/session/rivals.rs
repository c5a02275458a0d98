//! Streams that use their credit up fast, again and again.
//!
//! Where more is sent than a path carries all credit is used, and each stream moves in proportion to its window. So these come
//! to have the same.

use std::time::Duration;

use crate::Time;

/// A stream is one of them while it uses half of its window within this time. Where its window is what limits it, that takes a
/// round trip.
const FAST: Duration = Duration::from_secs(2);

/// How many of a session there are.
#[derive(Debug, Default)]
pub(super) struct Rivals {
    /// Times as long as [`FAST`] are numbered; this is the latest one in which there was one.
    period: u64,
    /// Those of that one, and of the one before.
    now: u64,
    before: u64,
}

/// What is known of one stream.
#[derive(Debug, Default)]
pub(super) struct Pace {
    renewed_at: Option<Time>,
    /// Behind the last period that it was counted in.
    counted: u64,
}

fn period(now: Time) -> u64 {
    now.since(Time::ZERO).as_secs() / FAST.as_secs()
}

impl Rivals {
    /// Half of the window of a stream is used. It counts if that is not the first time.
    pub fn renewed(&mut self, pace: &mut Pace, now: Time) {
        let last = pace.renewed_at.replace(now);
        if last.is_some_and(|last| now.since(last) < FAST) {
            self.count(pace, period(now));
        }
    }

    fn count(&mut self, pace: &mut Pace, period: u64) {
        if period != self.period {
            let follows = period == self.period + 1;
            self.before = if follows { self.now } else { 0 };
            self.now = 0;
            self.period = period;
        }
        if pace.counted != period + 1 {
            pace.counted = period + 1;
            self.now += 1;
        }
    }

    /// How many there have been of late.
    pub fn of_late(&self, now: Time) -> u64 {
        match period(now).saturating_sub(self.period) {
            0 => self.now.max(self.before),
            1 => self.now,
            _ => 0,
        }
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
        for millis in [0, 600, 1_200, 1_800] {
            for pace in &mut paces {
                rivals.renewed(pace, at(millis));
            }
        }
        assert_eq!(rivals.of_late(at(1_800)), 3);
        // The next period begins with one of them; the others still count.
        rivals.renewed(&mut paces[0], at(2_100));
        assert_eq!(rivals.of_late(at(2_100)), 3);
        for millis in [3_900, 4_100] {
            rivals.renewed(&mut paces[0], at(millis));
        }
        assert_eq!(rivals.of_late(at(4_100)), 1);
    }

    #[test]
    fn who_takes_long_or_does_it_once_is_not_counted() {
        let mut rivals = Rivals::default();
        let [mut fast, mut slow] = [Pace::default(), Pace::default()];
        for second in 0..20 {
            rivals.renewed(&mut fast, at(second * 1_000));
            rivals.renewed(&mut Pace::default(), at(second * 1_000));
            if second % 3 == 0 {
                rivals.renewed(&mut slow, at(second * 1_000));
            }
        }
        assert_eq!(rivals.of_late(at(19_000)), 1);
    }

    #[test]
    fn those_that_have_stopped_do_not_count_for_long() {
        let mut rivals = Rivals::default();
        let mut pace = Pace::default();
        for millis in [0, 500, 1_000] {
            rivals.renewed(&mut pace, at(millis));
        }
        assert_eq!(
            [1_000, 3_999, 4_000].map(|t| rivals.of_late(at(t))),
            [1, 1, 0]
        );
    }
}
