//! Transports beside the one that carries: those that are kept ready, and those that must go.

use std::time::{Duration, Instant};

use session_proto::session::Handle;

use super::moves::wants_standby;
use super::narrow::RETRIED_LONG;
use super::{Driver, Side};
use crate::policy::{Choice, Lanes, Standby};

/// Standbys of one session at once.
const STANDBYS_MAX: usize = 3;
/// A lane without a stream is kept for so long.
const LANE_LINGERS: Duration = Duration::from_secs(2);
/// A silent transport that does not answer after this time, or after three round trips if that is
/// more, is given up.
const DOOM: Duration = Duration::from_secs(1);

impl Driver {
    /// Dials the standby that is missing most, and parts with what is not wanted. `ordered` is the
    /// policy's list.
    pub(super) fn tend_standbys(&mut self, ordered: &[Choice]) {
        if !self.carries() {
            return;
        }
        self.part_with_others(ordered);
        let Some(current) = self.current_path() else {
            return;
        };
        let first = |h: &Handle| self.session.route(*h).is_some_and(|r| r.lane == 0);
        let firsts = || self.carriers.iter().filter(|(h, _)| first(h));
        let has = |choice: &&Choice| {
            let path = &choice.path;
            firsts().any(|(_, c)| c.path.link == path.link && c.path.remote == path.remote)
        };
        let missing = ordered
            .iter()
            .filter(|choice| wants_standby(choice) && choice.path.link != current.link)
            .find(|choice| !has(choice))
            .filter(|_| firsts().count() <= STANDBYS_MAX);
        if let Some(choice) = missing {
            self.attempt_beside(choice.path.clone(), 0, "to have it ready");
        }
        self.tend_lanes();
    }

    /// Dials the next lane that is missing on the path in use.
    pub(super) fn tend_lanes(&mut self) {
        let wanted = self.lanes_wanted();
        if wanted.is_empty() || !self.carries() {
            return;
        }
        let Some(path) = self.current_path() else {
            return;
        };
        let stands = |lane: u64| {
            self.carriers.iter().any(|(h, c)| {
                self.session.route(*h).is_some_and(|r| r.lane == lane)
                    && c.path.link == path.link
                    && c.path.remote == path.remote
            })
        };
        let missing = wanted.into_iter().find(|lane| !stands(*lane));
        if let Some(lane) = missing {
            self.attempt_beside(path, lane, "as a lane");
        }
    }

    /// The lanes that the path in use is to have.
    fn lanes_wanted(&self) -> Vec<u64> {
        let Side::Initiator(initiator) = &self.side else {
            return Vec::new();
        };
        let mut lanes: Vec<u64> = match initiator.config.lanes {
            Lanes::Bulk(n) => (1..=n).collect(),
            Lanes::PerStream => Vec::new(),
            Lanes::Shared => return Vec::new(),
        };
        lanes.extend(self.own_lanes.wanted());
        lanes.sort_unstable();
        lanes.dedup();
        lanes
    }

    /// Retires what carries nothing and is not to be kept: on a link that is cold or excluded, beside a
    /// newer one on the same path, or a lane of a path that is not in use.
    fn part_with_others(&mut self, ordered: &[Choice]) {
        let active = self.session.active();
        let current = self.current_path();
        let lanes = self.lanes_wanted();
        let mut seen = Vec::new();
        let mut surplus = Vec::new();
        // The active one first, then the newest.
        let mut handles: Vec<Handle> = self.carriers.keys().rev().copied().collect();
        handles.sort_by_key(|h| active != Some(*h));
        for handle in handles {
            let Some(carrier) = self.carriers.get(&handle) else {
                continue;
            };
            let path = &carrier.path;
            let lane = self.session.route(handle).unwrap_or_default().lane;
            let in_use =
                (current.as_ref()).is_some_and(|c| c.link == path.link && c.remote == path.remote);
            let same_link = |c: &&Choice| c.path.link == path.link;
            let warm = ordered
                .iter()
                .filter(same_link)
                .any(|c| c.standby == Standby::Warm);
            let wanted = if lane == 0 {
                warm
            } else {
                in_use && lanes.contains(&lane)
            };
            let up = self.session.is_up(handle) && carrier.doomed_at.is_none();
            let key = (path.link.clone(), path.remote, lane);
            if active == Some(handle) || (up && wanted && !seen.contains(&key)) {
                seen.push(key);
            } else if up && !ordered.is_empty() {
                surplus.push(handle);
            }
        }
        for handle in surplus {
            if let Some(until) = self.session.eases(self.clock.now(), handle) {
                // It still helps the one that was moved to.
                self.look_again_at(self.clock.instant(until));
            } else {
                self.session.retire(handle);
            }
        }
    }

    /// A stream is over: its lane may be of no more use. The next stream may come soon, though.
    pub(super) fn lanes_may_go(&mut self) {
        if let Side::Initiator(initiator) = &self.side
            && initiator.config.lanes == Lanes::PerStream
        {
            self.look_again_at(Instant::now() + LANE_LINGERS);
        }
    }

    fn look_again_at(&mut self, at: Instant) {
        if let Side::Initiator(initiator) = &mut self.side {
            let sooner = initiator.look_at.is_none_or(|known| at < known);
            initiator.look_at = if sooner { Some(at) } else { initiator.look_at };
        }
    }

    /// Unless something comes from `handle` soon, it is given up.
    pub(super) fn doom(&mut self, handle: Handle) {
        // Only the side that dials can replace it.
        if matches!(self.side, Side::Responder(_)) {
            return;
        }
        let grace = DOOM.max(self.session.rtt(handle).unwrap_or_default() * 3);
        if let Some(carrier) = self.carriers.get_mut(&handle) {
            carrier.doomed_at.get_or_insert(Instant::now() + grace);
        }
    }

    /// Gives up what has stayed silent. What answers again may be of use again: the policy is asked in any
    /// case.
    pub(super) fn drop_doomed(&mut self, now: Instant) {
        let due = |at: &mut Instant| now >= *at;
        let (mut passed, mut dead) = (false, Vec::new());
        for (&handle, carrier) in &mut self.carriers {
            if carrier.doomed_at.take_if(due).is_none() {
                continue;
            }
            passed = true;
            if self.session.is_silent(handle) && self.session.active() != Some(handle) {
                dead.push((handle, carrier.path.clone()));
            }
        }
        if !passed {
            return;
        }
        for (handle, path) in dead {
            self.judge(handle, RETRIED_LONG);
            let opens = (self.carriers.get(&handle)).is_some_and(|c| c.opening.is_some());
            if opens && let Some(history) = self.history() {
                // Nobody has answered its SYN: a dial has failed.
                history.record_failure(&path.link, path.remote, now);
            }
            tracing::info!(link = %path.link, remote = %path.remote, "a silent transport is given up");
            self.drop_carrier(handle, "it stayed silent");
        }
        self.decide();
    }
}
