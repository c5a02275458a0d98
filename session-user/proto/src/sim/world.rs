//! Virtual time: the queue of what happens next, and the loop that lets it happen.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use super::check::{Check, Tally};
use super::host::Host;
use super::net::{Item, Link, Purpose, Wire};
use super::rejoin::Rejoin;
use super::rng::{Rng, mix};
use super::script::{Action, Script};
use super::tap::Kept;
use super::{Failure, Mutation, Options, Side};
use crate::Time;
use crate::session::StreamId;

/// A run that has not drained so long after the network was healed never will.
const DRAIN_MAX: Duration = Duration::from_secs(180);
/// Steps without any progress after which something goes round in circles.
const IDLE_STEPS_MAX: u64 = 20_000;
/// Wires above which closed ones are forgotten.
const WIRES_KEPT: usize = 40;

/// What the queue holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Happening {
    /// Something arrives on a wire.
    Arrive { wire: usize, from: Side },
    /// A connection attempt ends.
    Connected { wire: usize },
    /// A side hears that a wire is dead.
    Learn { wire: usize, side: Side },
    /// A wire must be authenticated by now.
    Late { wire: usize, side: Side },
    /// A wire dies.
    Die { wire: usize },
    /// A deadline of a session.
    Timer { side: Side },
    /// An application goes on reading or writing after its pause.
    Tick {
        side: Side,
        id: StreamId,
        write: bool,
    },
    /// A target has been dialled.
    Target { id: StreamId },
    /// The responder decides on a HELLO.
    Decide { attempt: u32 },
    /// The initiator looks for a path.
    Redial,
    /// A link comes back.
    LinkUp { link: usize },
    /// A blackhole ends.
    HoleEnds { link: usize, dies: bool },
    /// Something of the script.
    Act(Action),
    /// From now on nothing goes wrong.
    Calm,
}

/// Everything there is.
pub(super) struct World<'a> {
    pub script: Script,
    pub rng: Rng,
    pub now: Time,
    queue: BinaryHeap<Reverse<(Time, u64, Happening)>>,
    queued: u64,
    pub links: Vec<Link>,
    /// The link of the full handshake.
    pub first_link: usize,
    pub wires: BTreeMap<usize, Wire>,
    wires_made: usize,
    pub hosts: [Host; 2],
    pub rejoin: Option<Rejoin>,
    /// By the side that sends.
    pub kept: [Kept; 2],
    /// Full handshakes begun for the main session.
    pub attempt: u32,
    pub calm: bool,
    pub parting: bool,
    pub check: Check,
    pub mutation: Option<Mutation>,
    pub failure: Option<String>,
    trace: Option<&'a mut dyn FnMut(&str)>,
}

impl<'a> World<'a> {
    /// The world of `seed` before anything happened.
    pub fn new(seed: u64, options: Options<'a>) -> Self {
        let script = Script::new(seed);
        let mut world = Self {
            rng: Rng::new(mix(seed ^ 0x0043_0000)),
            now: Time::ZERO,
            queue: BinaryHeap::new(),
            queued: 0,
            links: script.links.clone(),
            first_link: 0,
            wires: BTreeMap::new(),
            wires_made: 0,
            hosts: Side::BOTH.map(Host::new),
            rejoin: None,
            kept: Default::default(),
            attempt: 0,
            calm: false,
            parting: false,
            check: Check::default(),
            mutation: options.mutation,
            failure: None,
            trace: options.trace,
            script,
        };
        for (at, action) in world.script.actions.clone() {
            world.at(at, Happening::Act(action));
        }
        world.at(world.script.calm_at, Happening::Calm);
        world.begin();
        world
    }

    /// Runs to the end.
    pub fn run(mut self) -> Result<Tally, Failure> {
        let outcome = self.go_on();
        let at = self.now;
        outcome.map_err(|what| Failure {
            seed: self.script.seed,
            at,
            what,
        })?;
        Ok(self.check.tally)
    }

    fn go_on(&mut self) -> Result<(), String> {
        let end = self.script.calm_at + DRAIN_MAX;
        loop {
            if self.settle_all() {
                return Ok(());
            }
            self.fallen()?;
            let Some(Reverse((at, _, happening))) = self.queue.pop() else {
                return Err(format!(
                    "nothing more will ever happen: {}",
                    self.describe()
                ));
            };
            if at > end {
                return Err(format!("not drained: {}", self.describe()));
            }
            self.check.tally.steps += 1;
            if self.check.idle_steps() > IDLE_STEPS_MAX {
                return Err(format!("going round in circles: {}", self.describe()));
            }
            self.now = at;
            self.happen(happening);
            self.fallen()?;
        }
    }

    fn fallen(&mut self) -> Result<(), String> {
        self.failure.take().map_or(Ok(()), Err)
    }

    /// Lets both ends act until they rest, then asks the checkers. True once all is over.
    fn settle_all(&mut self) -> bool {
        for side in Side::BOTH {
            self.settle(side);
        }
        self.keep_dialled();
        if self.failure.is_none() {
            self.check_step();
        }
        self.failure.is_none() && self.calm && self.wind_up()
    }

    /// Queues `happening` for `at`.
    pub fn at(&mut self, at: Time, happening: Happening) {
        self.queued += 1;
        self.queue.push(Reverse((at, self.queued, happening)));
    }

    /// Queues `happening` for `delay` from now.
    pub fn after(&mut self, delay: Duration, happening: Happening) {
        self.at(self.now + delay, happening);
    }

    /// The run has failed: the first reason counts.
    pub fn fail(&mut self, what: String) {
        self.trace(|| format!("FAILURE {what}"));
        self.failure.get_or_insert(what);
    }

    /// A line for whoever watches.
    pub fn trace(&mut self, line: impl FnOnce() -> String) {
        let now = self.now.as_nanos();
        if let Some(sink) = &mut self.trace {
            sink(&format!("{:>12.6} ms  {}", now as f64 / 1e6, line()));
        }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Arrive { wire, from } => self.arrive(wire, from),
            Happening::Connected { wire } => self.connected_wire(wire),
            Happening::Learn { wire, side } => self.wire_gone(wire, side, "it died"),
            Happening::Late { wire, side } => self.late(wire, side),
            Happening::Die { wire } => self.kill(wire),
            Happening::Timer { side } => self.timer(side),
            Happening::Tick { side, id, write } => self.tick(side, id, write),
            Happening::Target { id } => self.target_dialled(id),
            Happening::Decide { attempt } => self.decide(attempt),
            Happening::Redial => self.redial(),
            Happening::LinkUp { link } => self.links[link].up = true,
            Happening::HoleEnds { link, dies } => self.hole_ends(link, dies),
            Happening::Act(action) => self.act(action),
            Happening::Calm => self.calm_down(),
        }
    }

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
        let at = found.pipes[from as usize].send(self.now, link, &mut self.rng, item);
        if let Some(at) = at {
            self.at(at, Happening::Arrive { wire, from });
        }
    }

    /// Something may have arrived on `wire`.
    fn arrive(&mut self, wire: usize, from: Side) {
        let Some(found) = self.wires.get_mut(&wire) else {
            return;
        };
        if self.links[found.link].hole[from as usize] {
            return;
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
            Item::Fin => self.wire_gone(wire, to, "the peer closed it"),
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
        if reset && !found.dead {
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
