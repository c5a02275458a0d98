//! What goes wrong: the script's actions.

use std::time::Duration;

use super::Side;
use super::net::Purpose;
use super::script::Action;
use super::tally::Fault;
use super::trouble::Moment;
use super::world::World;
use crate::session::{Handle, Session};
use crate::wire::close_code;

impl World<'_> {
    /// Does what the script says.
    pub fn act(&mut self, action: Action) {
        if !matches!(action, Action::Open { .. }) {
            self.trace(|| format!("script: {action:?}"));
        }
        match action {
            Action::Cut { .. }
            | Action::Outage { .. }
            | Action::Hole { .. }
            | Action::Loss { .. }
            | Action::SmallMtu { .. }
            | Action::NatForgets { .. }
            | Action::AddressGone { .. }
            | Action::Flap { .. } => self.act_on_link(action),
            Action::Kill => {
                if let Some(wire) = self.pick_wire() {
                    self.kill(wire);
                }
            }
            Action::Move => self.dial(Side::Initiator, false, true),
            Action::Lane => self.dial_lane(),
            Action::Dial { side, standby } => self.dial(side, standby, false),
            Action::Switch { side } => {
                if let Some(handle) = self.pick_up(side)
                    && let Some(session) = self.session(side)
                {
                    session.set_active(handle);
                    self.moment(Moment::Move);
                }
            }
            Action::Retire { side } => {
                if let Some(handle) = self.pick_up(side) {
                    self.retire(side, handle);
                }
            }
            Action::Burn { side, dials } => self.burn(side, dials),
            Action::Reauth => self.renewal_begin(),
            Action::Ping { side } => self.ping(side),
            Action::Flip => self.flip(),
            Action::Replay => self.replay(),
            Action::Open { side } => {
                self.host(side).wanted += 1;
                self.open_wanted(side);
            }
            Action::Forget => self.forget(),
            Action::Close { side } => {
                self.close(side, close_code::SHUTDOWN);
                self.moment(Moment::Close);
            }
            Action::Sleep { side, for_ms, nat } => self.fall_asleep(side, for_ms, nat),
            Action::LateDriver {
                side,
                for_ms,
                backwards,
            } => self.driver_is_late(side, for_ms, backwards),
            Action::BothLose => self.both_lose(),
            Action::BothMove {
                gap_us,
                again,
                deaths,
                tries,
            } => self.both_move(Duration::from_micros(gap_us), again, deaths, tries),
            Action::MoveTo { side, wire } => self.move_to(side, wire),
        }
    }

    fn act_on_link(&mut self, action: Action) {
        match action {
            Action::Cut { link, for_ms } => self.cut(link, for_ms),
            Action::Outage { for_ms } => {
                for link in 0..self.links.len() {
                    self.cut(link, for_ms);
                }
            }
            Action::Hole {
                link,
                from_initiator,
                from_responder,
                for_ms,
                dies,
            } => self.hole(link, [from_initiator, from_responder], for_ms, dies),
            Action::Loss {
                link,
                per_mille,
                for_ms,
            } => self.lose(link, per_mille, for_ms),
            Action::SmallMtu {
                link,
                bytes,
                for_ms,
                dies,
            } => self.shrink(link, bytes, for_ms, dies),
            Action::NatForgets { link } => self.nat_forgets(link),
            Action::AddressGone { link, side } => self.address_gone(link, side),
            Action::Flap {
                link,
                times,
                every_ms,
            } => {
                self.note(Fault::Flap);
                self.flap(link, times, every_ms);
            }
            _ => {}
        }
    }

    pub fn pick_wire(&mut self) -> Option<usize> {
        let alive: Vec<usize> = (self.wires.iter())
            .filter(|(_, w)| !w.dead && w.purpose != Purpose::Attack && w.ends[0].open)
            .map(|(&id, _)| id)
            .collect();
        (!alive.is_empty()).then(|| self.rng.pick(&alive))
    }

    fn pick_up(&mut self, side: Side) -> Option<Handle> {
        let host = &self.hosts[side as usize];
        // Before the session is open there is nothing to choose.
        let open = host.session.as_ref().is_some_and(Session::is_open);
        let up = if open { host.up() } else { Vec::new() };
        (!up.is_empty()).then(|| self.rng.pick(&up))
    }

    fn burn(&mut self, side: Side, dials: u64) {
        for _ in 0..dials {
            let standby = self.rng.chance(700);
            let Some(session) = self.session(side) else {
                return;
            };
            let Ok(handle) = session.dial(standby) else {
                return;
            };
            session.transport_lost(handle);
        }
    }

    fn ping(&mut self, side: Side) {
        for handle in self.hosts[side as usize].up() {
            let token = self.rng.draw();
            self.host(side).pings.insert(token);
            if let Some(session) = self.session(side) {
                session.ping(handle, token);
            }
        }
        self.suspect(side);
    }

    /// What a driver believes of the kernel's acknowledgements may be wrong.
    fn suspect(&mut self, side: Side) {
        if !self.rng.chance(400) {
            return;
        }
        let now = self.now;
        if let Some(handle) = self.pick_up(side)
            && let Some(session) = self.session(side)
        {
            session.suspect(now, handle);
            self.note(Fault::Suspicion);
        }
    }
}
