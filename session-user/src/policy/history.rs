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

/// What became of the dials over each path. Data only: times come from the caller.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PathHistory {
    failures: BTreeMap<(String, SocketAddr), Failures>,
}

impl PathHistory {
    /// One failed dial may be bad luck; from this many in a row on the path is demoted.
    pub const FAILURES_TOLERATED: u32 = 2;
    /// The first demotion lasts this long, and each further failure doubles it.
    pub const BACKOFF_FIRST: Duration = Duration::from_secs(1);
    /// A demotion never lasts longer. A path that works again is thus noticed within a minute.
    pub const BACKOFF_MAX: Duration = Duration::from_secs(60);
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

    /// A dial over `link` to `remote` succeeded.
    pub fn record_success(&mut self, link: &str, remote: SocketAddr) {
        self.failures.remove(&(link.to_owned(), remote));
    }

    /// A link came back: what failed over it before says nothing of it now.
    pub fn forget_link(&mut self, link: &str) {
        self.failures.retain(|(name, _), _| name != link);
    }

    /// Until when the path is demoted, if it is at `now`. Ask again then.
    pub fn demoted_until(&self, link: &str, remote: SocketAddr, now: Instant) -> Option<Instant> {
        let failures = self.failures.get(&(link.to_owned(), remote))?;
        let beyond = failures.in_a_row.checked_sub(Self::FAILURES_TOLERATED)?;
        let factor = 1_u32.checked_shl(beyond.min(16)).unwrap_or(u32::MAX);
        let backoff = (Self::BACKOFF_FIRST * factor).min(Self::BACKOFF_MAX);
        Some(failures.last + backoff).filter(|until| *until > now)
    }

    /// How many paths have failed since they last worked.
    pub fn len(&self) -> usize {
        self.failures.len()
    }

    /// Whether no path has.
    pub fn is_empty(&self) -> bool {
        self.failures.is_empty()
    }

    /// When the first of the present demotions ends: the time to ask the policy again.
    pub fn next_end(&self, now: Instant) -> Option<Instant> {
        (self.failures.keys())
            .filter_map(|(link, remote)| self.demoted_until(link, *remote, now))
            .min()
    }
}
