//! Network namespaces that are out of reach: which, why, and when they are tried again.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::netns::NamespaceError;

/// When the agent asks again where only the caller was in another place, or had gone.
const BRIEFLY: Duration = Duration::from_millis(20);
/// When it asks again what may soon be otherwise, such as an interface that is down.
const SOON: Duration = Duration::from_secs(1);
/// When it asks again what only the operator can change, and at the latest.
const LATER: Duration = Duration::from_secs(60);
/// Namespaces by number that are remembered. What is not is not told of.
const REMEMBERED_MAX: usize = 1024;

impl NamespaceError {
    /// After which time it is worth while to try again.
    pub(super) fn retry_after(&self) -> Duration {
        match self {
            Self::Hidden { .. } | Self::Closed { .. } | Self::TooMany { .. } => LATER,
            Self::Ended { .. } | Self::Elsewhere { .. } => BRIEFLY,
            _ => SOON,
        }
    }
}

/// Those that the programs know of, by cookie. Times are of CLOCK_MONOTONIC.
#[derive(Debug, Default)]
pub struct Refused {
    retry_at: BTreeMap<u64, Duration>,
    /// The oldest first.
    order: VecDeque<u64>,
}

impl Refused {
    /// Whether one is among them.
    pub fn contains(&self, cookie: u64) -> bool {
        self.retry_at.contains_key(&cookie)
    }

    /// Whether it is too early to ask about one again: what the programs have told meanwhile is of before.
    pub fn is_early(&self, cookie: u64, now: Duration) -> bool {
        self.retry_at.get(&cookie).is_some_and(|at| now < *at)
    }

    /// Adds one.
    pub fn insert(&mut self, cookie: u64, retry_at: Duration) {
        if self.retry_at.insert(cookie, retry_at).is_none() {
            self.order.push_back(cookie);
        }
    }

    /// It is not out of reach any more.
    pub fn remove(&mut self, cookie: u64) {
        if self.retry_at.remove(&cookie).is_some() {
            self.order.retain(|refused| *refused != cookie);
        }
    }

    /// Takes the oldest out while there is no room below `max` for one more that is not among them.
    pub fn make_room(&mut self, cookie: u64, max: usize) -> Option<u64> {
        if self.contains(cookie) || self.order.len() < max {
            return None;
        }
        let oldest = self.order.pop_front()?;
        self.retry_at.remove(&oldest);
        Some(oldest)
    }
}

/// Why one could not be opened.
#[derive(Debug)]
struct Trouble {
    why: String,
    tries: u32,
    retry_at: Duration,
}

/// Those with captured processes that could not be opened, by number.
#[derive(Debug, Default)]
pub struct Troubles(BTreeMap<u64, Trouble>);

impl Troubles {
    /// Why one could not be opened.
    pub fn why(&self, inode: u64) -> Option<&str> {
        Some(&self.0.get(&inode)?.why)
    }

    /// How often that was tried, if it may be tried again now.
    pub fn due(&self, inode: u64, now: Duration) -> Option<u32> {
        match self.0.get(&inode) {
            None => Some(0),
            Some(trouble) => (trouble.retry_at <= now).then_some(trouble.tries),
        }
    }

    /// Notes an attempt that failed; whether it is the first, to be told of.
    pub fn note(&mut self, inode: u64, error: &NamespaceError, now: Duration) -> bool {
        let before = self.0.get(&inode).map(|trouble| trouble.tries);
        if before.is_none() && self.0.len() >= REMEMBERED_MAX {
            return false;
        }
        let tries = before.unwrap_or(0).saturating_add(1);
        let doubled = error.retry_after().max(SOON) * (1 << (tries - 1).min(6));
        let trouble = Trouble {
            why: error.to_string(),
            tries,
            retry_at: now + doubled.min(LATER),
        };
        self.0.insert(inode, trouble);
        before.is_none()
    }

    /// It is open.
    pub fn remove(&mut self, inode: u64) {
        self.0.remove(&inode);
    }

    /// What is no more need not be remembered.
    pub fn retain(&mut self, lives: impl Fn(u64) -> bool) {
        self.0.retain(|inode, _| lives(*inode));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1000);

    #[test]
    fn room_is_made_before_it_is_needed() {
        let mut refused = Refused::default();
        for cookie in 0..3 {
            assert_eq!(refused.make_room(cookie, 3), None);
            refused.insert(cookie, NOW);
        }
        assert_eq!(refused.make_room(1, 3), None, "it has its place");
        assert_eq!(refused.make_room(7, 3), Some(0));
        assert_eq!(refused.make_room(7, 3), None);
        assert!(!refused.contains(0));
        refused.remove(1);
        assert_eq!(refused.make_room(8, 1), Some(2));
        assert_eq!(refused.make_room(8, 1), None);
    }

    #[test]
    fn what_fails_again_is_tried_less_often() {
        let mut troubles = Troubles::default();
        assert_eq!(troubles.due(1, NOW), Some(0));
        assert!(troubles.note(1, &NamespaceError::LoopbackDown, NOW));
        assert_eq!(troubles.due(1, NOW), None);
        assert_eq!(troubles.due(1, NOW + SOON), Some(1));
        assert!(!troubles.note(1, &NamespaceError::LoopbackDown, NOW));
        assert_eq!(troubles.due(1, NOW + SOON), None);
        assert_eq!(troubles.due(1, NOW + 2 * SOON), Some(2));
        for _ in 0..100 {
            troubles.note(1, &NamespaceError::LoopbackDown, NOW);
        }
        assert_eq!(troubles.due(1, NOW + LATER), Some(102));
        troubles.retain(|inode| inode != 1);
        assert_eq!(troubles.due(1, NOW), Some(0));
    }

    #[test]
    fn troubles_are_bounded() {
        let mut troubles = Troubles::default();
        for inode in 0..2 * REMEMBERED_MAX as u64 {
            let told = troubles.note(inode, &NamespaceError::LoopbackDown, NOW);
            assert_eq!(told, inode < REMEMBERED_MAX as u64);
        }
        assert_eq!(troubles.0.len(), REMEMBERED_MAX);
    }
}
