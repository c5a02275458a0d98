//! What became of the dials over each path.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How often and when dials over a path failed in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Failures {
    in_a_row: u32,
    last: Instant,
}

/// How often and when a path fell silent while it was in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Silences {
    in_a_row: u32,
    last: Instant,
}

/// What became of the dials over each path. Data only: times come from the caller.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PathHistory {
    failures: BTreeMap<(String, SocketAddr), Failures>,
    silences: BTreeMap<(String, SocketAddr), Silences>,
}

impl PathHistory {
    /// One failed dial may be bad luck; from this many in a row on the path is demoted.
    pub const FAILURES_TOLERATED: u32 = 2;
    /// The first demotion lasts this long, and each further failure doubles it.
    pub const BACKOFF_FIRST: Duration = Duration::from_secs(1);
    /// A demotion never lasts longer. A path that works again is thus noticed within a minute.
    pub const BACKOFF_MAX: Duration = Duration::from_secs(60);
    /// A path that fell silent is demoted for this long, and for double with each further time: it
    /// may answer a dial, and lose half of what follows.
    pub const SILENCE_FIRST: Duration = Duration::from_secs(3);
    /// One that has not fallen silent for so long after its demotion has a clean record.
    pub const SILENCE_FORGIVEN: Duration = Duration::from_secs(120);
    /// More paths than this are not remembered; the one that failed longest ago is forgotten.
    pub const PATHS_MAX: usize = 256;

    /// A dial over `link` to `remote` failed at `now`.
    pub fn record_failure(&mut self, link: &str, remote: SocketAddr, now: Instant) {
        let key = (link.to_owned(), remote);
        if !self.failures.contains_key(&key) && self.failures.len() >= Self::PATHS_MAX {
            let oldest = self.failures.iter().min_by_key(|(_, f)| f.last);
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                self.failures.remove(&oldest);
            }
        }
        let known = self.failures.get(&key).map_or(0, |f| f.in_a_row);
        let failures = Failures {
            in_a_row: known.saturating_add(1),
            last: now,
        };
        self.failures.insert(key, failures);
    }

    /// The path in use over `link` to `remote` did not answer in time at `now`, and another did.
    pub fn record_silence(&mut self, link: &str, remote: SocketAddr, now: Instant) {
        let key = (link.to_owned(), remote);
        if !self.silences.contains_key(&key) && self.silences.len() >= Self::PATHS_MAX {
            let oldest = self.silences.iter().min_by_key(|(_, s)| s.last);
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                self.silences.remove(&oldest);
            }
        }
        let known = self.silences.get(&key).filter(|s| {
            let until = s.last + Self::silenced_for(s.in_a_row);
            now.saturating_duration_since(until) < Self::SILENCE_FORGIVEN
        });
        let silences = Silences {
            in_a_row: known.map_or(0, |s| s.in_a_row).saturating_add(1),
            last: now,
        };
        self.silences.insert(key, silences);
    }

    fn silenced_for(times: u32) -> Duration {
        let factor = 1_u32 << times.saturating_sub(1).min(16);
        (Self::SILENCE_FIRST * factor).min(Self::BACKOFF_MAX)
    }

    /// A dial over `link` to `remote` succeeded.
    pub fn record_success(&mut self, link: &str, remote: SocketAddr) {
        self.failures.remove(&(link.to_owned(), remote));
    }

    /// A link came back: what failed over it before says nothing of it now.
    pub fn forget_link(&mut self, link: &str) {
        self.failures.retain(|(name, _), _| name != link);
        self.silences.retain(|(name, _), _| name != link);
    }

    /// Until when the path is demoted, if it is at `now`. Ask again then.
    pub fn demoted_until(&self, link: &str, remote: SocketAddr, now: Instant) -> Option<Instant> {
        let key = (link.to_owned(), remote);
        let failed = self.failures.get(&key).and_then(|failures| {
            let beyond = failures.in_a_row.checked_sub(Self::FAILURES_TOLERATED)?;
            let factor = 1_u32.checked_shl(beyond.min(16)).unwrap_or(u32::MAX);
            Some(failures.last + (Self::BACKOFF_FIRST * factor).min(Self::BACKOFF_MAX))
        });
        let silent = self.silences.get(&key);
        let silent = silent.map(|s| s.last + Self::silenced_for(s.in_a_row));
        failed.max(silent).filter(|until| *until > now)
    }

    /// How many paths are held against: dials over them failed, or they fell silent.
    pub fn len(&self) -> usize {
        self.failures.len() + self.silences.len()
    }

    /// Whether no path has.
    pub fn is_empty(&self) -> bool {
        self.failures.is_empty() && self.silences.is_empty()
    }

    /// When the first of the present demotions ends: the time to ask the policy again.
    pub fn next_end(&self, now: Instant) -> Option<Instant> {
        (self.failures.keys().chain(self.silences.keys()))
            .filter_map(|(link, remote)| self.demoted_until(link, *remote, now))
            .min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_falls_silent_again_and_again_is_left_alone_for_longer() {
        let remote: SocketAddr = "192.0.2.1:7843".parse().unwrap();
        let start = Instant::now();
        let mut history = PathHistory::default();
        history.record_silence("wlan0", remote, start);
        let first = start + PathHistory::SILENCE_FIRST;
        assert_eq!(history.demoted_until("wlan0", remote, start), Some(first));
        // A dial that succeeds proves little: half of what follows may be lost.
        history.record_success("wlan0", remote);
        assert_eq!(history.demoted_until("wlan0", remote, start), Some(first));
        assert_eq!(history.demoted_until("wlan0", remote, first), None);
        history.record_silence("wlan0", remote, first);
        let second = first + PathHistory::SILENCE_FIRST * 2;
        assert_eq!(history.demoted_until("wlan0", remote, first), Some(second));
        for _ in 0..40 {
            history.record_silence("wlan0", remote, second);
        }
        let longest = second + PathHistory::BACKOFF_MAX;
        assert_eq!(history.next_end(second), Some(longest));
        // Two good minutes, and it starts anew.
        let later = longest + PathHistory::SILENCE_FORGIVEN;
        history.record_silence("wlan0", remote, later);
        let anew = later + PathHistory::SILENCE_FIRST;
        assert_eq!(history.demoted_until("wlan0", remote, later), Some(anew));
        history.forget_link("wlan0");
        assert!(history.is_empty());
    }
}
