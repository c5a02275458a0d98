//! What was told of flows' ends lately, so that a target that refuses each datagram does not fill the log.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// What is the same is told once in this time.
const EVERY: Duration = Duration::from_secs(60);
/// Different things that are remembered; what comes beyond them is told as one.
const KEPT_MAX: usize = 64;

/// What was told.
#[derive(Debug, Default)]
pub(super) struct Told {
    kept: HashMap<String, Since>,
    beyond: Option<Since>,
}

#[derive(Debug)]
struct Since {
    at: Instant,
    untold: u64,
}

impl Told {
    /// Whether to tell of `what` now: if so, how many of it were not told since the last time.
    pub fn tell(&mut self, now: Instant, what: &str) -> Option<u64> {
        if let Some(since) = self.kept.get_mut(what) {
            return since.tell(now);
        }
        if self.kept.len() >= KEPT_MAX {
            // What had something untold is not told any more: nothing of it came for long.
            self.kept.retain(|_, since| !since.is_old(now));
        }
        let fresh = Since { at: now, untold: 0 };
        if self.kept.len() < KEPT_MAX {
            self.kept.insert(what.to_owned(), fresh);
            return Some(0);
        }
        match &mut self.beyond {
            Some(since) => since.tell(now),
            None => {
                self.beyond = Some(fresh);
                Some(0)
            }
        }
    }
}

impl Since {
    fn is_old(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) >= EVERY
    }

    fn tell(&mut self, now: Instant) -> Option<u64> {
        if !self.is_old(now) {
            self.untold += 1;
            return None;
        }
        self.at = now;
        Some(std::mem::take(&mut self.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_told_once_in_a_while_and_then_how_often_it_was() {
        let mut told = Told::default();
        let now = Instant::now();
        assert_eq!(told.tell(now, "refused"), Some(0));
        for _ in 0..5 {
            assert_eq!(told.tell(now + EVERY / 2, "refused"), None);
        }
        assert_eq!(told.tell(now, "another"), Some(0));
        assert_eq!(told.tell(now + EVERY, "refused"), Some(5));
        assert_eq!(told.tell(now + EVERY, "refused"), None);
    }

    #[test]
    fn many_different_things_are_told_as_one() {
        let mut told = Told::default();
        let now = Instant::now();
        let count = |told: &mut Told, at| {
            let all = (0..1000).filter_map(|n| told.tell(at, &n.to_string()));
            all.count()
        };
        assert_eq!(count(&mut told, now), KEPT_MAX + 1);
        assert_eq!(count(&mut told, now), 0);
        assert!(count(&mut told, now + EVERY) <= KEPT_MAX + 1);
        assert!(told.kept.len() <= KEPT_MAX);
    }
}
