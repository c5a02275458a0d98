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

/// A path that loses large packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Narrow {
    /// Largest segment on it, in bytes.
    segment: u16,
    /// The link's MTU when that was found out.
    mtu: u32,
    since: Instant,
}

/// A path on which a dial with data in its SYN did not come up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Unopened {
    since: Instant,
    /// One without did not come up either, so the data may not have been the reason.
    dead: bool,
}

/// What became of the dials over each path. Data only: times come from the caller.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PathHistory {
    failures: BTreeMap<(String, SocketAddr), Failures>,
    silences: BTreeMap<(String, SocketAddr), Silences>,
    narrow: BTreeMap<(String, SocketAddr), Narrow>,
    unopened: BTreeMap<(String, SocketAddr), Unopened>,
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
    /// Segments that are tried on a path that loses large packets, in bytes: 1200 fit into the least MTU
    /// of IPv6 (1280), 1000 into what tunnels inside of tunnels leave.
    pub const SEGMENTS: [u16; 2] = [1200, 1000];
    /// After so long a path is tried with full segments again (RFC 4821 section 7.3).
    pub const NARROW_FOR: Duration = Duration::from_secs(600);
    /// For so long a path is dialled without data in the SYN after one with it did not come up.
    pub const UNOPENED_FOR: Duration = Duration::from_secs(600);
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

    /// Packets vanished for their size, on a link with this MTU. Returns the largest segment that the next
    /// transport may have; `None` if the smallest vanished too, so that size was not the reason.
    pub fn record_swallowed(
        &mut self,
        link: &str,
        remote: SocketAddr,
        mtu: u32,
        now: Instant,
    ) -> Option<u16> {
        let key = (link.to_owned(), remote);
        let had = self.segment(link, remote, now);
        let next = Self::SEGMENTS
            .into_iter()
            .find(|s| had.is_none_or(|had| *s < had));
        self.narrow.remove(&key);
        if self.narrow.len() >= Self::PATHS_MAX {
            let oldest = self.narrow.iter().min_by_key(|(_, n)| n.since);
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                self.narrow.remove(&oldest);
            }
        }
        let segment = next?;
        let since = now;
        self.narrow.insert(
            key,
            Narrow {
                segment,
                mtu,
                since,
            },
        );
        next
    }

    /// The largest segment on a path that loses large packets, in bytes.
    pub fn segment(&self, link: &str, remote: SocketAddr, now: Instant) -> Option<u16> {
        let narrow = self.narrow.get(&(link.to_owned(), remote))?;
        (now < narrow.since + Self::NARROW_FOR).then_some(narrow.segment)
    }

    /// A dial over the path with data in its SYN, or with the question for a cookie, did not come up.
    pub fn record_unopened(&mut self, link: &str, remote: SocketAddr, now: Instant) {
        let key = (link.to_owned(), remote);
        if !self.unopened.contains_key(&key) && self.unopened.len() >= Self::PATHS_MAX {
            let oldest = self.unopened.iter().min_by_key(|(_, u)| u.since);
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                self.unopened.remove(&oldest);
            }
        }
        let (since, dead) = (now, false);
        self.unopened.insert(key, Unopened { since, dead });
    }

    /// One without did not come up either.
    pub fn record_dead(&mut self, link: &str, remote: SocketAddr) {
        if let Some(unopened) = self.unopened.get_mut(&(link.to_owned(), remote)) {
            unopened.dead = true;
        }
    }

    /// The path let a SYN with data through, and the peer took it.
    pub fn record_fast_open(&mut self, link: &str, remote: SocketAddr) {
        self.unopened.remove(&(link.to_owned(), remote));
    }

    /// Whether a dial over the path may put data in its SYN.
    pub fn may_fast_open(&self, link: &str, remote: SocketAddr, now: Instant) -> bool {
        let unopened = self.unopened.get(&(link.to_owned(), remote));
        unopened.is_none_or(|u| now >= u.since + Self::UNOPENED_FOR)
    }

    /// A link whose MTU is not what it was (`mtu` tells by name) may have another path behind it.
    pub fn forget_other_mtu(&mut self, mtu: impl Fn(&str) -> Option<u32>) {
        self.narrow
            .retain(|(link, _), narrow| mtu(link).is_none_or(|now| now == narrow.mtu));
    }

    /// A dial over `link` to `remote` succeeded.
    pub fn record_success(&mut self, link: &str, remote: SocketAddr) {
        let key = (link.to_owned(), remote);
        self.failures.remove(&key);
        // Where nothing at all came up before, data in the SYN was not the reason.
        if self.unopened.get(&key).is_some_and(|u| u.dead) {
            self.unopened.remove(&key);
        }
    }

    /// A link came back: what failed over it before says nothing of it now.
    pub fn forget_link(&mut self, link: &str) {
        self.failures.retain(|(name, _), _| name != link);
        self.silences.retain(|(name, _), _| name != link);
        self.narrow.retain(|(name, _), _| name != link);
        self.unopened.retain(|(name, _), _| name != link);
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

    /// How many paths are held against: dials over them failed, they fell silent, or they lose large
    /// packets.
    pub fn len(&self) -> usize {
        self.failures.len() + self.silences.len() + self.narrow.len()
    }

    /// Whether no path has.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// When the first of the present demotions ends: the time to ask the policy again.
    pub fn next_end(&self, now: Instant) -> Option<Instant> {
        let narrow = self.narrow.values().map(|n| n.since + Self::NARROW_FOR);
        (self.failures.keys().chain(self.silences.keys()))
            .filter_map(|(link, remote)| self.demoted_until(link, *remote, now))
            .chain(narrow.filter(|until| *until > now))
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

    #[test]
    fn a_path_that_drops_syns_with_data_is_dialled_without() {
        let remote: SocketAddr = "192.0.2.1:7843".parse().unwrap();
        let start = Instant::now();
        let end = start + PathHistory::UNOPENED_FOR;
        let mut history = PathHistory::default();
        let may = |h: &PathHistory, now| h.may_fast_open("wlan0", remote, now);
        assert!(may(&history, start));
        history.record_unopened("wlan0", remote, start);
        assert!(!may(&history, start) && may(&history, end));
        assert!(history.may_fast_open("wwan0", remote, start));
        // It is no reason to prefer another path, and one without data that comes up shows who was to blame.
        assert_eq!(history.demoted_until("wlan0", remote, start), None);
        history.record_success("wlan0", remote);
        assert!(!may(&history, start));
        // One without that does not come up either shows that it was something else.
        history.record_dead("wlan0", remote);
        assert!(!may(&history, start));
        history.record_success("wlan0", remote);
        assert!(may(&history, start));

        history.record_unopened("wlan0", remote, start);
        history.record_fast_open("wlan0", remote);
        assert!(may(&history, start));
        history.record_unopened("wlan0", remote, start);
        history.forget_link("wlan0");
        assert!(may(&history, start));
        for port in 0..1000 {
            history.record_unopened("wlan0", SocketAddr::new(remote.ip(), port), start);
        }
        assert_eq!(history.unopened.len(), PathHistory::PATHS_MAX);
    }

    #[test]
    fn a_path_that_loses_large_packets_gets_smaller_ones_step_by_step() {
        let remote: SocketAddr = "192.0.2.1:7843".parse().unwrap();
        let start = Instant::now();
        let mut history = PathHistory::default();
        let swallowed = |h: &mut PathHistory| h.record_swallowed("wlan0", remote, 1500, start);
        assert_eq!(history.segment("wlan0", remote, start), None);
        assert_eq!(swallowed(&mut history), Some(1200));
        assert_eq!(swallowed(&mut history), Some(1000));
        assert_eq!(history.segment("wlan0", remote, start), Some(1000));
        assert_eq!(history.demoted_until("wlan0", remote, start), None);
        // The smallest vanished as well: it was something else.
        assert_eq!(swallowed(&mut history), None);
        assert_eq!(history.segment("wlan0", remote, start), None);

        swallowed(&mut history);
        let end = start + PathHistory::NARROW_FOR;
        assert_eq!(history.next_end(start), Some(end));
        assert_eq!(history.segment("wlan0", remote, end), None);
        history.forget_other_mtu(|_| None);
        history.forget_other_mtu(|_| Some(1500));
        assert_eq!(history.segment("wlan0", remote, start), Some(1200));
        history.forget_other_mtu(|_| Some(1400));
        assert!(history.is_empty());
        swallowed(&mut history);
        history.forget_link("wlan0");
        assert!(history.is_empty());
        for port in 0..1000 {
            let remote = SocketAddr::new(remote.ip(), port);
            history.record_swallowed("wlan0", remote, 1500, start);
        }
        assert_eq!(history.len(), PathHistory::PATHS_MAX);
    }
}
