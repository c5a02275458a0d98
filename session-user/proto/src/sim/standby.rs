//! Transports beside the one that carries, as the agent's driver keeps them: those that are ready, and
//! those that must go.

use std::time::Duration;

use super::Side;
use super::net::Purpose;
use super::world::World;
use crate::limits::SILENCE_MARGIN;
use crate::session::{Handle, Session};

/// What stays silent for this time, or three round trips, is given up.
const DOOM: Duration = Duration::from_secs(1);
/// Standbys kept at once.
const STANDBYS_MAX: usize = 3;
/// A peer's process that is scheduled late answers within this time.
const PEER_BUSY: Duration = Duration::from_millis(60);
const LOOK_AGAIN: Duration = Duration::from_millis(2);

impl World<'_> {
    fn links_in_use(&self) -> Vec<usize> {
        let host = &self.hosts[Side::Initiator as usize];
        let wires = host.wires.values().filter_map(|w| self.wires.get(w));
        let first = wires.filter(|w| w.purpose != Purpose::Lane);
        first.map(|w| w.link).collect()
    }

    pub fn dial_standby(&mut self, link: usize) {
        let busy = self.driver.standby.is_some() || self.driver.attempt.is_some();
        if !busy && !self.links_in_use().contains(&link) {
            self.driver.standby = Some(self.start_dial(link));
        }
    }

    pub fn tend_standbys(&mut self, ordered: &[usize]) {
        self.retire_doubles();
        let used = self.links_in_use();
        if used.len() > STANDBYS_MAX {
            return;
        }
        let wanted = |l: &&usize| !self.rank(**l).0 && !used.contains(l);
        if let Some(&link) = ordered.iter().find(wanted) {
            self.dial_standby(link);
        }
    }

    fn is_lane_in_use(&self, handle: Handle, active: Option<Handle>) -> bool {
        let wire = self.hosts[Side::Initiator as usize].wires.get(&handle);
        let wire = wire.and_then(|w| self.wires.get(w));
        let path = active.and_then(|h| self.link_of(h));
        wire.is_some_and(|w| w.purpose == Purpose::Lane && Some(w.link) == path)
    }

    /// Of several transports on one link the active one stays, or else the newest; and the lanes of the
    /// path in use.
    fn retire_doubles(&mut self) {
        let host = &self.hosts[Side::Initiator as usize];
        let active = host.session.as_ref().and_then(Session::active);
        let mut handles = host.up();
        handles.reverse();
        handles.sort_by_key(|h| active != Some(*h));
        let mut seen = Vec::new();
        let mut surplus = Vec::new();
        for handle in handles {
            if self.is_lane_in_use(handle, active) {
                continue;
            }
            let link = self.link_of(handle);
            if seen.contains(&link) && !host.retired.contains(&handle) {
                surplus.push(handle);
            }
            seen.push(link);
        }
        for handle in surplus {
            self.retire(Side::Initiator, handle);
        }
    }

    /// Unless something comes from `handle` soon, it is given up.
    pub fn doom(&mut self, handle: Handle) {
        let at = self.now + DOOM.max(self.rtt(handle) * 3);
        self.driver.doomed.entry(handle).or_insert(at);
        self.look_at(at);
    }

    /// Where TCP's own acknowledgements come, a transport is not called silent yet.
    pub fn vouch(&mut self, side: Side) {
        let now = self.now;
        if self.script.preference.is_none() {
            return;
        }
        let host = &mut self.hosts[side as usize];
        let Some(session) = &mut host.session else {
            return;
        };
        let suspects: Vec<Handle> = session.suspects(now).collect();
        for handle in suspects {
            let Some(wire) = host.wires.get(&handle).and_then(|w| self.wires.get(w)) else {
                continue;
            };
            let pipe = &wire.pipes[side as usize];
            let still = now.since(pipe.arrived_at + self.links[wire.link].delay);
            let longest = if pipe.is_empty() {
                PEER_BUSY
            } else {
                SILENCE_MARGIN
            };
            if still < longest {
                session.vouch(handle, now + longest.saturating_sub(still).max(LOOK_AGAIN));
            }
        }
    }
}
