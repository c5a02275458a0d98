//! Ends that do nothing for a while: a host that sleeps, a driver that learns late.

use std::time::Duration;

use super::Side;
use super::script::Action;
use super::tally::Fault;
use super::trouble::Moment;
use super::world::{Happening, World};
use crate::Time;

/// A driver that has not been told yet.
#[derive(Debug)]
pub(super) struct Late {
    backwards: bool,
    lost: Vec<usize>,
}

impl World<'_> {
    /// `side` does nothing from now on, and does not see time pass.
    pub fn fall_asleep(&mut self, side: Side, for_ms: u64, nat: bool) {
        let until = (self.now + Duration::from_millis(for_ms)).min(self.script.calm_at);
        if self.calm || self.asleep[side as usize].is_some() {
            return;
        }
        self.note(Fault::Sleep);
        self.asleep[side as usize] = Some(until);
        self.at(until, Happening::Wake { side });
        if nat {
            for link in 0..self.links.len() {
                self.nat_forgets(link);
            }
        }
    }

    pub fn is_asleep(&self, side: Side) -> bool {
        self.asleep[side as usize].is_some()
    }

    /// `side` goes on: all that came meanwhile is there at once, and its driver asks on every
    /// transport as soon as it finds out that the host has slept.
    pub fn wake(&mut self, side: Side) {
        if self.asleep[side as usize].take().is_none() {
            return;
        }
        self.trace(|| format!("{side:?} wakes"));
        if self.rng.chance(500) {
            self.doubt_all(side);
        } else {
            let soon = self.rng.micros(1, 1_000_000);
            self.after(soon, Happening::Doubt { side });
        }
        for happening in std::mem::take(&mut self.backlog[side as usize]) {
            self.at(self.now, happening);
        }
        self.moment(Moment::Wake);
    }

    pub fn doubt_all(&mut self, side: Side) {
        let now = self.now;
        if let Some(session) = self.session(side) {
            session.doubt_all(now);
        }
        if side == Side::Initiator {
            self.driver_woke();
        }
    }

    /// Whose host must be awake for `happening`.
    fn concerns(&self, happening: Happening) -> Option<Side> {
        match happening {
            Happening::Arrive { from, .. } => Some(from.other()),
            Happening::Learn { side, .. }
            | Happening::Late { side, .. }
            | Happening::Timer { side }
            | Happening::Tick { side, .. }
            | Happening::Doubt { side }
            | Happening::FlowTick { side, .. }
            | Happening::DriverLearns { side } => Some(side),
            Happening::Target { id } => Some(Side::opener(id).other()),
            Happening::Decide { .. } => Some(Side::Responder),
            Happening::Redial | Happening::Look => Some(Side::Initiator),
            Happening::Connected { wire } => self.wires.get(&wire).map(|w| w.dialler),
            Happening::Act(action) => match action {
                Action::Switch { side }
                | Action::Dial { side, .. }
                | Action::Retire { side }
                | Action::Burn { side, .. }
                | Action::Ping { side }
                | Action::Open { side }
                | Action::Close { side }
                | Action::MoveTo { side, .. } => Some(side),
                Action::Move | Action::Reauth => Some(Side::Initiator),
                Action::Forget => Some(Side::Responder),
                _ => None,
            },
            _ => None,
        }
    }

    /// True if `happening` must wait until a host wakes; it is kept.
    pub fn sleeps_through(&mut self, happening: Happening) -> bool {
        if self.asleep == [None; 2] {
            return false;
        }
        let asleep = self.concerns(happening).filter(|s| self.is_asleep(*s));
        if let Some(side) = asleep {
            self.backlog[side as usize].push(happening);
        }
        asleep.is_some()
    }

    /// `side` hears of losses only after `for_ms`.
    pub fn driver_is_late(&mut self, side: Side, for_ms: u64, backwards: bool) {
        if self.calm || self.late[side as usize].is_some() {
            return;
        }
        self.note(Fault::LateDriver);
        self.late[side as usize] = Some(Late {
            backwards,
            lost: Vec::new(),
        });
        let delay = Duration::from_millis(for_ms);
        self.after(delay, Happening::DriverLearns { side });
    }

    /// `side` is told that `wire` is gone.
    pub fn learn(&mut self, wire: usize, side: Side, why: &str) {
        match &mut self.late[side as usize] {
            Some(late) => late.lost.push(wire),
            None => self.wire_gone(wire, side, why),
        }
    }

    /// The driver of `side` hears of everything at once.
    pub fn driver_wakes(&mut self, side: Side) {
        let Some(mut late) = self.late[side as usize].take() else {
            return;
        };
        if late.backwards {
            late.lost.reverse();
        }
        for wire in late.lost {
            self.wire_gone(wire, side, "it was lost some time ago");
        }
    }
}

/// Until when each side sleeps, if it does.
pub(super) type Asleep = [Option<Time>; 2];
