//! The attacker on the path: flips bits, inserts copies of records, dials with recordings.

use std::time::Duration;

use bytes::Bytes;

use super::Side;
use super::net::{Item, Purpose, Wire};
use super::world::{Happening, World};
use crate::wire::Space;

impl World<'_> {
    /// The next byte on some wire is changed. The wire dies soon after: a length that was changed
    /// makes the receiver wait for bytes that never come.
    pub fn flip(&mut self) {
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
    pub fn replay(&mut self) {
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
