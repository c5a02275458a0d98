//! The last move: when all else is over, both ends move at once, and must agree in the end.

use std::time::Duration;

use super::live::all_open;
use super::script::Action;
use super::trouble::draw_both_move;
use super::world::{Happening, World};
use super::{Mutation, Side};
use crate::Time;

/// Longest time until a side hears of a death, and a little more for dialling anew.
const SETTLED_AFTER: Duration = Duration::from_secs(12);
/// The ends agree by then, or never will.
const AGREED_WITHIN: Duration = Duration::from_secs(30);
/// Time for dialling anew what was cleared away.
const CLEARED_AFTER: Duration = Duration::from_secs(4);
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How far the last move has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum LastMove {
    #[default]
    NotYet,
    /// What a NAT forgot has died; both ends have heard of it by then.
    Waits(Time),
    /// Begun then.
    Since(Time),
    Over,
}

impl World<'_> {
    /// True once the ends agree after the last move, if there is to be one.
    pub fn last_move(&mut self) -> bool {
        match self.last_move {
            LastMove::Over => true,
            _ if !self.script.last_move || !all_open(&self.hosts) => true,
            LastMove::NotYet => {
                self.look_for_agreement();
                self.last_move = LastMove::Waits(self.clear_unsaid());
                false
            }
            LastMove::Waits(until) if self.now < until => false,
            LastMove::Waits(_) => {
                self.last_move = LastMove::Since(self.now);
                let mut action = draw_both_move(&mut self.rng, 0);
                // Not both of the new ones: then there is nothing left to agree on but a new dial.
                if let Action::BothMove { deaths, .. } = &mut action
                    && *deaths >= 12
                {
                    *deaths -= 8;
                }
                self.act(action);
                false
            }
            LastMove::Since(at) if self.now < at + SETTLED_AFTER => false,
            LastMove::Since(at) => {
                if self.agree() && self.rests() {
                    self.check.tally.agreements += 1;
                    self.last_move = LastMove::Over;
                    return true;
                }
                if self.now > at + AGREED_WITHIN {
                    let what = if self.agree() {
                        "an idle session does not rest"
                    } else {
                        "the ends do not agree"
                    };
                    self.fail(format!("{what}: {}", self.describe()));
                }
                false
            }
        }
    }

    pub fn look_for_agreement(&mut self) {
        if self.last_move != LastMove::Over && !self.parting {
            self.after(LOOK_EVERY, Happening::Agree);
        }
    }

    /// An end may move to a wire that is dead and notice nothing as long as it has nothing to send: none
    /// is left to be chosen. Returns by when all is heard.
    fn clear_unsaid(&mut self) -> Time {
        let unsaid: Vec<usize> = (self.wires.iter())
            .filter(|(_, w)| w.unsaid && (w.ends[0].open || w.ends[1].open))
            .map(|(&id, _)| id)
            .collect();
        if unsaid.is_empty() {
            return self.now;
        }
        for wire in unsaid {
            for side in Side::BOTH {
                let soon = self.rng.micros(1, 1_000_000);
                self.after(soon, Happening::Learn { wire, side });
            }
        }
        self.now + CLEARED_AFTER
    }

    /// Whether neither session wants to be called again before something happens.
    fn rests(&self) -> bool {
        let mut sessions = self.hosts.iter().filter_map(|h| h.session.as_ref());
        sessions.all(|s| s.poll_timeout().is_none())
    }

    /// Whether both ends send on the same wire.
    fn agree(&self) -> bool {
        if self.mutation == Some(Mutation::TwoMinds) {
            return false;
        }
        let wires = Side::BOTH.map(|side| self.active_wire(side));
        wires[0].is_some() && wires[0] == wires[1]
    }
}
