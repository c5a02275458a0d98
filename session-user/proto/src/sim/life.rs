//! How ends find each other and part: dialling, closing, forgetting.

use std::time::Duration;

use super::Side;
use super::net::Purpose;
use super::script::Action;
use super::world::{Happening, World};
use crate::session::Session;

/// Wires of one end above which nothing more is dialled at random.
const WIRES_MAX: usize = 12;

impl World<'_> {
    /// The initiator dials when nothing carries its records.
    pub fn keep_dialled(&mut self) {
        if self.is_asleep(Side::Initiator) {
            return;
        }
        let driven = self.script.preference.is_some();
        if driven {
            self.drive();
        }
        let host = &self.hosts[Side::Initiator as usize];
        let Some(session) = &host.session else { return };
        if session.is_ending() || session.active().is_some() || host.connecting > 0 {
            return;
        }
        if !session.is_open() {
            if session.transports().next().is_none() {
                self.begin_again();
            }
            return;
        }
        if driven || self.rejoin.is_some() || host.redial_at.is_some_and(|at| at >= self.now) {
            return;
        }
        let backoff = host.backoff;
        let at = self.now + backoff;
        let host = self.host(Side::Initiator);
        host.backoff = (backoff * 2).clamp(Duration::from_millis(10), Duration::from_secs(2));
        host.redial_at = Some(at);
        self.after(backoff, Happening::Redial);
    }

    pub fn redial(&mut self) {
        let host = self.host(Side::Initiator);
        host.redial_at = None;
        let idle = host.connecting == 0
            && host
                .session
                .as_ref()
                .is_some_and(|s| s.is_open() && s.active().is_none());
        if idle {
            self.dial(Side::Initiator, false, false);
        }
    }

    /// `side` dials over a link that is up, if there is one.
    pub fn dial(&mut self, side: Side, standby: bool, replaces: bool) {
        let up: Vec<usize> = (0..self.links.len())
            .filter(|&l| self.links[l].up)
            .collect();
        if up.is_empty() || self.host(side).wires.len() > WIRES_MAX {
            return;
        }
        let link = self.rng.pick(&up);
        self.host(side).connecting += 1;
        self.connect(side, link, Purpose::Resume { standby, replaces });
    }

    /// The initiator dials a lane beside its active transport.
    pub fn dial_lane(&mut self) {
        let host = &self.hosts[Side::Initiator as usize];
        let active = host.session.as_ref().and_then(Session::active);
        let Some(link) = active.and_then(|h| self.link_of(h)) else {
            return;
        };
        if self.links[link].up && host.wires.len() <= WIRES_MAX {
            self.check.tally.lanes += 1;
            self.host(Side::Initiator).connecting += 1;
            self.connect(Side::Initiator, link, Purpose::Lane);
        }
    }

    /// The session has ended at `side`.
    pub fn session_closed(&mut self, side: Side, code: u64, by_peer: bool) {
        let peer_may = self.hosts[side.other() as usize].may_end;
        let host = self.host(side);
        let allowed = if by_peer { peer_may } else { host.may_end };
        host.ended = Some((code, by_peer));
        host.apps.clear();
        host.wanted = 0;
        if !allowed {
            self.fail(format!("{side:?}: the session closed with code {code} (by peer: {by_peer}) though nobody asked"));
        }
    }

    /// `side` closes the session.
    pub fn close(&mut self, side: Side, code: u64) {
        let now = self.now;
        let host = self.host(side);
        host.may_end = true;
        if let Some(session) = &mut host.session {
            session.close(now, code, "as the script has it");
        }
        self.trace(|| format!("{side:?} closes"));
    }

    /// Once all is delivered: one end closes, and nothing may stay behind. True when all is over.
    pub fn wind_up(&mut self) -> bool {
        let ending = self
            .hosts
            .iter()
            .any(|h| h.is_over() || h.ended.is_some() || h.may_end);
        if !ending && !self.parting {
            if !self.is_drained() {
                return false;
            }
            if !self.last_move() {
                return false;
            }
            self.check_end();
            self.parting = true;
            let side = self.rng.pick(&Side::BOTH);
            self.act(Action::Close { side });
            if self.rng.chance(300) {
                self.act(Action::Close { side: side.other() });
            }
            self.settle(side);
            self.settle(side.other());
            if self.rng.chance(200) {
                let wires: Vec<usize> = self.wires.keys().copied().collect();
                for wire in wires {
                    self.kill(wire);
                }
            }
        }
        for side in Side::BOTH {
            if self.hosts[side as usize].is_over() {
                self.leave(side);
            }
        }
        let [initiator, responder] = &self.hosts;
        // A responder whose initiator closed unheard keeps the session until its hold time ends.
        initiator.is_over() && (responder.is_over() || responder.wires.is_empty())
    }

    /// Nothing stays behind of a session that is over.
    pub fn leave(&mut self, side: Side) {
        let host = self.host(side);
        host.tokens.clear();
        let wires = std::mem::take(&mut host.wires);
        host.timer_at = None;
        for wire in wires.into_values() {
            self.close_end(wire, side, false);
        }
    }

    /// The responder is started anew.
    pub fn forget(&mut self) {
        self.trace(|| "the responder forgets the session".to_owned());
        let host = self.host(Side::Responder);
        host.session = None;
        host.apps.clear();
        host.wanted = 0;
        host.may_end = true;
        self.leave(Side::Responder);
    }
}
