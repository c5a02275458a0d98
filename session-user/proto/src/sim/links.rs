//! What links do to the wires on them.

use std::time::Duration;

use super::Side;
use super::tally::Fault;
use super::world::{Happening, World};
use crate::wire::Mode;

/// `TCP_USER_TIMEOUT` of the agent: bytes that nobody acknowledges end their connection.
const USER_TIMEOUT: Duration = Duration::from_secs(20);
/// Keep-alive of the agent: an idle connection that nobody answers for ends.
const KEEP_ALIVE: Duration = Duration::from_secs(90);

impl World<'_> {
    /// Counts a fault.
    pub fn note(&mut self, fault: Fault) {
        self.check.tally.faults[fault as usize] += 1;
        if matches!(fault, Fault::Loss | Fault::SmallMtu) {
            let met = self.hosts.iter().flat_map(|h| &h.session).any(|s| {
                let spread = |id| s.service(id).is_some_and(|asks| asks.mode != Mode::Single);
                s.streams().any(spread)
            });
            self.check.tally.half_dead += u64::from(met);
        }
    }

    fn is_safe(&self, link: usize) -> bool {
        self.script.safe == Some(link)
    }

    /// A link goes down, and comes back.
    pub fn cut(&mut self, link: usize, for_ms: u64) {
        if self.is_safe(link) {
            return;
        }
        self.links[link].up = false;
        for wire in self.wires_on(link) {
            self.kill(wire);
        }
        self.after(Duration::from_millis(for_ms), Happening::LinkUp { link });
    }

    /// A link goes down or up, `left` times more.
    pub fn flap(&mut self, link: usize, left: u8, every_ms: u64) {
        if self.is_safe(link) || self.calm {
            return;
        }
        if self.links[link].up {
            self.links[link].up = false;
            for wire in self.wires_on(link) {
                self.kill(wire);
            }
        } else {
            self.link_up(link);
        }
        let next = if left > 0 {
            let (left, every_ms) = (left - 1, every_ms.max(1));
            Happening::Flap {
                link,
                left,
                every_ms,
            }
        } else {
            Happening::LinkUp { link }
        };
        self.after(Duration::from_millis(every_ms), next);
    }

    pub fn link_up(&mut self, link: usize) {
        self.links[link].up = true;
        self.link_came(link);
    }

    /// A link swallows what the sides of `from` send.
    pub fn hole(&mut self, link: usize, from: [bool; 2], for_ms: u64, dies: bool) {
        if self.is_safe(link) {
            return;
        }
        self.links[link].hole = from;
        let ends = Happening::HoleEnds { link, dies };
        self.after(Duration::from_millis(for_ms), ends);
    }

    /// A blackhole heals, or its wires die.
    pub fn hole_ends(&mut self, link: usize, dies: bool) {
        self.links[link].hole = [false; 2];
        if dies {
            for wire in self.wires_on(link) {
                self.kill(wire);
            }
        } else {
            self.release(link);
        }
    }

    /// A link loses packets for a time.
    pub fn lose(&mut self, link: usize, per_mille: u64, for_ms: u64) {
        if self.is_safe(link) {
            return;
        }
        self.note(Fault::Loss);
        self.links[link].loss = per_mille;
        self.after(Duration::from_millis(for_ms), Happening::LossEnds { link });
    }

    /// Segments above `bytes` never arrive.
    pub fn shrink(&mut self, link: usize, bytes: usize, for_ms: u64, dies: bool) {
        if self.is_safe(link) {
            return;
        }
        self.note(Fault::SmallMtu);
        self.links[link].mtu = Some(bytes);
        let ends = Happening::MtuEnds { link, dies };
        self.after(Duration::from_millis(for_ms), ends);
    }

    /// Segments of all sizes pass again: TCP has found out, or its connections end.
    pub fn mtu_ends(&mut self, link: usize, dies: bool) {
        self.links[link].mtu = None;
        for wire in self.wires_on(link) {
            let Some(found) = self.wires.get_mut(&wire).filter(|w| !w.unsaid) else {
                continue;
            };
            let was_stuck = found.pipes.iter().any(|p| !p.delivers());
            for pipe in &mut found.pipes {
                pipe.let_go();
            }
            if dies && was_stuck {
                self.kill(wire);
            }
        }
        self.release(link);
    }

    /// What is established on `link` gets nothing through any more.
    pub fn nat_forgets(&mut self, link: usize) {
        if self.is_safe(link) {
            return;
        }
        self.note(Fault::NatForgets);
        if self.flows.plan.is_some() {
            self.rebind(link);
        }
        for wire in self.wires_on(link) {
            if let Some(found) = self.wires.get_mut(&wire) {
                for pipe in &mut found.pipes {
                    pipe.hold();
                }
            }
            for side in Side::BOTH {
                self.left_to_tcp(wire, side);
            }
        }
    }

    /// The address of `side` on `link` is another one now: it knows, the other end does not.
    pub fn address_gone(&mut self, link: usize, side: Side) {
        if self.is_safe(link) {
            return;
        }
        self.note(Fault::AddressGone);
        if self.flows.plan.is_some() && side == Side::Initiator {
            self.new_socket(link);
        }
        for wire in self.wires_on(link) {
            if let Some(found) = self.wires.get_mut(&wire) {
                found.dead = true;
                for pipe in &mut found.pipes {
                    pipe.kill(&mut self.rng);
                }
            }
            self.after(Duration::ZERO, Happening::Learn { wire, side });
            let other = side.other();
            if self.rng.chance(300) {
                let late = self.rng.micros(1_000_000, 8_000_000);
                self.after(late, Happening::Learn { wire, side: other });
            } else {
                self.left_to_tcp(wire, other);
            }
        }
    }

    /// Nothing but the timers of its own TCP tells `side` that `wire` is of no use.
    fn left_to_tcp(&mut self, wire: usize, side: Side) {
        self.after(KEEP_ALIVE, Happening::Learn { wire, side });
        let Some(found) = self.wires.get_mut(&wire) else {
            return;
        };
        found.unsaid = true;
        if !found.pipes[side as usize].is_empty() {
            self.tcp_waits(wire, side);
        }
    }

    /// `side` has sent something that nobody acknowledges.
    pub fn tcp_waits(&mut self, wire: usize, side: Side) {
        let Some(found) = self.wires.get_mut(&wire) else {
            return;
        };
        if !std::mem::replace(&mut found.waited_for[side as usize], true) {
            self.after(USER_TIMEOUT, Happening::Learn { wire, side });
        }
    }

    /// Whether TCP of `from` will wait in vain for the acknowledgement of what goes on `wire` now.
    pub fn is_in_vain(&self, wire: usize, from: Side) -> bool {
        let sleeps = self.asleep[from.other() as usize];
        let unsaid = self.wires.get(&wire).is_some_and(|w| w.unsaid);
        unsaid || sleeps.is_some_and(|until| until > self.now + USER_TIMEOUT)
    }

    /// From now on every link works and nobody interferes.
    pub fn calm_down(&mut self) {
        self.trace(|| "calm".to_owned());
        self.calm = true;
        for side in Side::BOTH {
            self.wake(side);
            self.driver_wakes(side);
        }
        for link in 0..self.links.len() {
            self.links[link].up = true;
            self.links[link].loss = 0;
            if self.links[link].mtu.is_some() {
                self.mtu_ends(link, false);
            }
            if self.links[link].hole != [false; 2] {
                self.hole_ends(link, false);
            }
        }
        let doubtful: Vec<usize> = self
            .wires
            .iter()
            .filter(|(_, w)| w.tampered && !w.dead)
            .map(|(&id, _)| id)
            .collect();
        for wire in doubtful {
            self.kill(wire);
        }
        for side in Side::BOTH {
            self.open_wanted(side);
        }
        self.flows_calm();
    }
}
