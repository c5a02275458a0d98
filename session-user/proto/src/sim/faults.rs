//! What goes wrong: the script's actions, and the attacker on the path.

use std::time::Duration;

use bytes::Bytes;

use super::Side;
use super::net::{Item, Purpose, Wire};
use super::script::Action;
use super::world::{Happening, World};
use crate::session::{Handle, Session};
use crate::wire::{Space, close_code};

impl World<'_> {
    /// Does what the script says.
    pub fn act(&mut self, action: Action) {
        if !matches!(action, Action::Open { .. }) {
            self.trace(|| format!("script: {action:?}"));
        }
        match action {
            Action::Cut { link, for_ms } => self.cut(link, for_ms),
            Action::Outage { for_ms } => {
                for link in 0..self.links.len() {
                    self.cut(link, for_ms);
                }
            }
            Action::Kill => {
                if let Some(wire) = self.pick_wire() {
                    self.kill(wire);
                }
            }
            Action::Hole {
                link,
                from_initiator,
                from_responder,
                for_ms,
                dies,
            } => {
                self.links[link].hole = [from_initiator, from_responder];
                self.after(
                    Duration::from_millis(for_ms),
                    Happening::HoleEnds { link, dies },
                );
            }
            Action::Move => self.dial(Side::Initiator, false, true),
            Action::Dial { side, standby } => self.dial(side, standby, false),
            Action::Switch { side } => {
                if let Some(handle) = self.pick_up(side)
                    && let Some(session) = self.session(side)
                {
                    session.set_active(handle);
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
            Action::Close { side } => self.close(side, close_code::SHUTDOWN),
        }
    }

    fn pick_wire(&mut self) -> Option<usize> {
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

    fn cut(&mut self, link: usize, for_ms: u64) {
        self.links[link].up = false;
        for wire in self.wires_on(link) {
            self.kill(wire);
        }
        self.after(Duration::from_millis(for_ms), Happening::LinkUp { link });
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

    /// From now on every link works and nobody interferes.
    pub fn calm_down(&mut self) {
        self.trace(|| "calm".to_owned());
        self.calm = true;
        for link in 0..self.links.len() {
            self.links[link].up = true;
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
    }

    /// The next byte on some wire is changed. The wire dies soon after: a length that was changed
    /// makes the receiver wait for bytes that never come.
    fn flip(&mut self) {
        let Some(wire) = self.pick_wire() else { return };
        if let Some(found) = self.wires.get_mut(&wire) {
            found.tampered = true;
            let from = self.rng.pick(&Side::BOTH);
            found.pipes[from as usize].flip = true;
        }
        let soon = self.rng.micros(1_000, 3_000_000);
        self.after(soon, Happening::Die { wire });
    }

    /// Carries what `side` wrote on `wire`, with whatever the attacker does to it.
    pub fn carry(&mut self, wire: usize, side: Side, mut bytes: Vec<u8>) {
        let copies = if self.calm {
            0
        } else {
            self.script.copies_per_mille
        };
        let Some(found) = self.wires.get_mut(&wire) else {
            return;
        };
        found.record(side, &bytes);
        let honest = !found.tampered;
        let pipe = &mut found.pipes[side as usize];
        if std::mem::take(&mut pipe.flip) {
            let at = self.rng.below(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << self.rng.below(8);
        }
        if copies == 0 {
            return self.carry_segments(wire, side, &bytes);
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let Some(found) = self.wires.get_mut(&wire) else {
                return;
            };
            let (taken, seen) = found.pipes[side as usize].tap.follow(rest);
            let (now, later) = rest.split_at(taken);
            self.carry_segments(wire, side, now);
            rest = later;
            if let Some(seen) = seen {
                let own = seen.clone();
                // A damaged record would be no copy of anything.
                if honest {
                    self.kept[side as usize].keep(seen);
                }
                if self.rng.chance(copies) {
                    self.insert_copy(wire, side, own.bytes);
                }
            }
        }
    }

    /// Copies of records: the one just seen, or one of space R that went this way before.
    fn insert_copy(&mut self, wire: usize, side: Side, own: Vec<u8>) {
        let kept = &self.kept[side as usize].records;
        let old: Vec<usize> = (0..kept.len())
            .filter(|&i| kept[i].space == Space::Retained)
            .collect();
        let copy = if self.rng.chance(500) || old.is_empty() {
            own
        } else {
            let at = self.rng.pick(&old);
            self.kept[side as usize].records[at].bytes.clone()
        };
        self.check.tally.copies += 1;
        self.carry_segments(wire, side, &copy);
    }

    fn carry_segments(&mut self, wire: usize, side: Side, bytes: &[u8]) {
        let mut rest = bytes;
        // Many tiny segments cost time and show nothing new.
        let tiny = self.check.tally.wire_bytes < 30_000;
        let floor = if tiny { 1 } else { 1_448 };
        while !rest.is_empty() {
            let Some(found) = self.wires.get(&wire) else {
                return;
            };
            let most = self.links[found.link].segment.max(floor * 2);
            let n = self.rng.range(floor, most).min(rest.len() as u64) as usize;
            let (now, later) = rest.split_at(n);
            self.transmit(wire, side, Item::Data(Bytes::copy_from_slice(now)));
            rest = later;
        }
    }

    /// An attacker dials with what a wire carried before.
    fn replay(&mut self) {
        let tapes: Vec<usize> = (self.wires.iter())
            .filter(|(_, w)| !w.tape.is_empty() && matches!(w.purpose, Purpose::Resume { .. }))
            .map(|(&id, _)| id)
            .collect();
        if tapes.is_empty() {
            return;
        }
        let source = &self.wires[&self.rng.pick(&tapes)];
        let mut copy = Wire::new(source.link, source.dialler, Purpose::Attack);
        copy.tape.clone_from(&source.tape);
        copy.tampered = true;
        let link = source.link;
        let wire = self.add_wire(copy);
        self.check.tally.replays += 1;
        let delay = self.links[link].delay * 2;
        self.after(delay, Happening::Connected { wire });
    }

    /// The attacker's wire is connected: it sends its recording, whole or in part or damaged.
    pub fn attack_begins(&mut self, wire: usize) {
        let Some(found) = self.wires.get_mut(&wire) else {
            return;
        };
        let dialler = found.dialler;
        let mut tape = std::mem::take(&mut found.tape);
        for end in &mut found.ends {
            end.open = true;
        }
        match self.rng.below(4) {
            0 => tape.truncate(self.rng.below(tape.len() as u64 + 1) as usize),
            1 => {
                let at = self.rng.below(tape.len() as u64) as usize;
                tape[at] ^= 1 << self.rng.below(8);
            }
            _ => {}
        }
        self.trace(|| format!("an attacker replays {} bytes on wire {wire}", tape.len()));
        self.carry_segments(wire, dialler, &tape);
        self.after(
            Duration::from_secs(5),
            Happening::Late {
                wire,
                side: dialler.other(),
            },
        );
        let soon = self.rng.micros(1_000, 4_000_000);
        self.after(soon, Happening::Die { wire });
    }
}
