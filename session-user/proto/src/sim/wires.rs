//! What the world does with wires: makes, fills, closes and kills them.

use std::time::Duration;

use super::net::{Item, Purpose, Wire};
use super::world::{Happening, World};
use super::{Mutation, Side};
use crate::Time;

/// Wires above which closed ones are forgotten.
const WIRES_KEPT: usize = 40;

impl World<'_> {
    /// Makes a wire that is not connected yet.
    pub fn add_wire(&mut self, wire: Wire) -> usize {
        let id = self.wires_made;
        self.wires_made += 1;
        self.wires.insert(id, wire);
        id
    }

    /// Puts `item` on its way over `wire`.
    pub fn transmit(&mut self, wire: usize, from: Side, item: Item) {
        let Some(found) = self.wires.get_mut(&wire) else {
            return;
        };
        let link = &self.links[found.link];
        let data = matches!(item, Item::Data(_));
        let at = found.pipes[from as usize].send(self.now, link, &mut self.rng, item);
        if data && self.is_in_vain(wire, from) {
            self.tcp_waits(wire, from);
        }
        if let Some(at) = at {
            self.at(at, Happening::Arrive { wire, from });
        }
    }

    /// Something may have arrived on `wire`.
    pub fn arrive(&mut self, wire: usize, from: Side) {
        let Some(found) = self.wires.get_mut(&wire) else {
            return;
        };
        if self.links[found.link].hole[from as usize] {
            return;
        }
        if self.mutation == Some(Mutation::DeafStandby)
            && self.script.safe == Some(found.link)
            && self.live.has_stood(self.now)
        {
            found.pipes[from as usize].hold();
        }
        let Some(item) = found.pipes[from as usize].arrive(self.now) else {
            return;
        };
        let to = from.other();
        let end = &mut found.ends[to as usize];
        if !end.open {
            return;
        }
        match item {
            Item::Data(data) => {
                end.input.extend_from_slice(&data);
                self.received(wire, to);
            }
            Item::Fin => self.learn(wire, to, "the peer closed it"),
        }
    }

    /// `side` closes its end of `wire`; with `reset`, what it sent last may never arrive.
    pub fn close_end(&mut self, wire: usize, side: Side, reset: bool) {
        let Some(found) = self.wires.get_mut(&wire) else {
            return;
        };
        let end = &mut found.ends[side as usize];
        if !end.open {
            return;
        }
        end.open = false;
        end.handle = None;
        if reset && !found.dead && !found.unsaid {
            found.pipes[side as usize].kill(&mut self.rng);
            let delay = self.links[found.link].delay;
            self.after(
                delay,
                Happening::Learn {
                    wire,
                    side: side.other(),
                },
            );
        } else {
            self.transmit(wire, side, Item::Fin);
        }
        self.forget_closed(wire);
    }

    /// Closed wires stay for a while, so that an attacker has something to replay.
    fn forget_closed(&mut self, wire: usize) {
        let closed = |w: &Wire| !w.ends[0].open && !w.ends[1].open;
        if self.wires.len() > WIRES_KEPT && self.wires.get(&wire).is_some_and(closed) {
            self.wires.remove(&wire);
        }
    }

    /// A wire dies; each end hears of it at a time of its own.
    pub fn kill(&mut self, wire: usize) {
        let Some(found) = self.wires.get_mut(&wire).filter(|w| !w.dead) else {
            return;
        };
        found.dead = true;
        for pipe in &mut found.pipes {
            pipe.kill(&mut self.rng);
        }
        self.trace(|| format!("wire {wire} dies"));
        for side in Side::BOTH {
            let delay = match self.rng.below(4) {
                0 => Duration::ZERO,
                1 => self.rng.micros(1, 1_000),
                2 => self.rng.micros(1_000, 200_000),
                _ => self.rng.micros(100_000, 8_000_000),
            };
            self.after(delay, Happening::Learn { wire, side });
        }
    }

    /// All wires on `link` that are alive.
    pub fn wires_on(&self, link: usize) -> Vec<usize> {
        let alive = self.wires.iter().filter(|(_, w)| w.link == link && !w.dead);
        alive.map(|(&id, _)| id).collect()
    }

    /// What was held back by a blackhole goes on its way.
    pub fn release(&mut self, link: usize) {
        for wire in self.wires_on(link) {
            for from in Side::BOTH {
                let now = self.now + self.links[link].delay;
                let arrivals: Vec<Time> =
                    self.wires[&wire].pipes[from as usize].arrivals().collect();
                for at in arrivals {
                    self.at(at.max(now), Happening::Arrive { wire, from });
                }
            }
        }
    }

    /// A new connection attempt of `dialler`.
    pub fn connect(&mut self, dialler: Side, link: usize, purpose: Purpose) -> usize {
        let wire = self.add_wire(Wire::new(link, dialler, purpose));
        self.trace(|| format!("{dialler:?} connects wire {wire} over link {link}: {purpose:?}"));
        let link = &self.links[link];
        let jitter = Duration::from_nanos(self.rng.below(link.jitter.as_nanos() as u64 + 1));
        self.after(link.delay * 2 + jitter, Happening::Connected { wire });
        wire
    }
}
