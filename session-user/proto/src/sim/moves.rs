//! Both ends act at once: each moves, or loses all and dials.

use std::time::Duration;

use super::Side;
use super::net::Wire;
use super::script::Action;
use super::tally::Fault;
use super::trouble::Moment;
use super::world::{Happening, World};
use crate::session::Session;

/// Times that transports to move to are looked for.
const TRIES_MAX: u8 = 3;

impl World<'_> {
    /// The wires that both ends can send on, newest last.
    pub fn common_wires(&self) -> Vec<usize> {
        let usable = |w: &Wire, side: Side| {
            let host = &self.hosts[side as usize];
            let up = |s: &Session| {
                w.ends[side as usize]
                    .handle
                    .is_some_and(|h| s.is_up(h) && !host.retired.contains(&h))
            };
            host.session.as_ref().is_some_and(up)
        };
        let both = |w: &Wire| Side::BOTH.iter().all(|&side| usable(w, side));
        let all = self.wires.iter().filter(|(_, w)| !w.dead && both(w));
        all.map(|(&id, _)| id).collect()
    }

    /// The wire that `side` sends on.
    pub fn active_wire(&self, side: Side) -> Option<usize> {
        let host = &self.hosts[side as usize];
        let active = host.session.as_ref()?.active()?;
        host.wires.get(&active).copied()
    }

    /// Each end moves softly, within `gap`; then what `deaths` names dies in the middle.
    pub fn both_move(&mut self, gap: Duration, again: bool, deaths: u8, tries: u8) {
        let open = |s: &Session| s.is_open();
        let sessions = self.hosts.iter().map(|h| h.session.as_ref());
        if !sessions.flatten().all(open) || self.asleep != [None; 2] {
            return;
        }
        let wires = self.common_wires();
        if wires.len() < 3 && tries < TRIES_MAX {
            self.dial(Side::Initiator, true, false);
            let gap_us = gap.as_micros() as u64;
            let later = Action::BothMove {
                gap_us,
                again,
                deaths,
                tries: tries + 1,
            };
            let delay = self.slowest_link() * 5;
            return self.after(delay, Happening::Act(later));
        }
        if wires.len() < 2 {
            return;
        }
        self.note(Fault::BothMove);
        let first = self.rng.pick(&Side::BOTH);
        let olds = Side::BOTH.map(|side| self.active_wire(side));
        let one = self.rng.below(wires.len() as u64) as usize;
        let step = 1 + self.rng.below(wires.len() as u64 - 1) as usize;
        let (one, two) = (wires[one], wires[(one + step) % wires.len()]);
        self.act(Action::MoveTo {
            side: first,
            wire: one,
        });
        let crossing = Action::MoveTo {
            side: first.other(),
            wire: two,
        };
        self.after(gap, Happening::Act(crossing));
        if again {
            let side = first;
            let wire = self.rng.pick(&wires);
            let third = Action::MoveTo { side, wire };
            self.after(gap, Happening::Act(third));
        }
        let doomed = [olds[0], olds[1], Some(one), Some(two)];
        for (bit, wire) in doomed.into_iter().enumerate() {
            if let Some(wire) = wire.filter(|_| deaths & 1 << bit != 0) {
                let within = self.slowest_link().as_micros() as u64 * 2 + 1;
                let soon = Duration::from_micros(self.rng.below(within));
                self.after(soon, Happening::Die { wire });
            }
        }
    }

    pub fn move_to(&mut self, side: Side, wire: usize) {
        let Some(handle) = (self.wires.get(&wire)).and_then(|w| w.ends[side as usize].handle)
        else {
            return;
        };
        if let Some(session) = self.session(side) {
            session.set_active(handle);
        }
        self.driver_moved(side);
        self.moment(Moment::Move);
    }

    /// Both ends lose every transport and know it at once.
    pub fn both_lose(&mut self) {
        let safe = self.script.safe;
        let lost: Vec<usize> = (self.wires.iter())
            .filter(|(_, w)| !w.dead && Some(w.link) != safe)
            .map(|(&id, _)| id)
            .collect();
        self.note(Fault::BothLose);
        for wire in lost {
            if let Some(found) = self.wires.get_mut(&wire) {
                found.dead = true;
                for pipe in &mut found.pipes {
                    pipe.kill(&mut self.rng);
                }
            }
            for side in Side::BOTH {
                self.after(Duration::ZERO, Happening::Learn { wire, side });
            }
        }
        for side in Side::BOTH {
            let standby = self.rng.chance(200);
            self.after(
                Duration::ZERO,
                Happening::Act(Action::Dial { side, standby }),
            );
        }
    }

    pub fn slowest_link(&self) -> Duration {
        let delays = self.links.iter().map(|l| l.delay + l.jitter);
        delays.max().unwrap_or_default()
    }
}
