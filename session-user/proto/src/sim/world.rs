//! Virtual time: the queue of what happens next, and the loop that lets it happen.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use super::agree::LastMove;
use super::check::Check;
use super::driver::Driver;
use super::flow_plan::{FlowAct, FlowPlan};
use super::flows::Flows;
use super::host::Host;
use super::live::Live;
use super::net::{Link, Wire};
use super::rejoin::Rejoin;
use super::rng::{Rng, mix};
use super::script::{Action, Script};
use super::sleep::{Asleep, Late};
use super::tally::Tally;
use super::tap::Kept;
use super::trouble::Moments;
use super::{
    FEW_FAULTS, Failure, Mutation, NO_FLOWS, NO_MARKS, NO_PACKING, Options, PLAIN_STREAMS, Side,
};
use crate::Time;
use crate::session::{FlowId, StreamId};

/// A run that has not drained so long after the network was healed never will.
const DRAIN_MAX: Duration = Duration::from_secs(180);
/// Steps without any progress after which something goes round in circles.
const IDLE_STEPS_MAX: u64 = 20_000;

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
    /// A link ceases to lose packets.
    LossEnds { link: usize },
    /// Large segments pass again.
    MtuEnds { link: usize, dies: bool },
    /// A link goes down or up.
    Flap {
        link: usize,
        left: u8,
        every_ms: u64,
    },
    /// A host goes on.
    Wake { side: Side },
    /// A driver finds out that its host has slept.
    Doubt { side: Side },
    /// A driver that was late hears of what was lost.
    DriverLearns { side: Side },
    /// A deadline of the initiator's driver.
    Look,
    /// The ends should agree on a transport.
    Agree,
    /// A packet of the UDP transport arrives.
    Packet { id: u64 },
    /// The application that opened a flow sends.
    FlowTick { side: Side, id: FlowId },
    /// A side proves that datagrams arrive.
    Proof { side: Side },
    /// Something of the plan for flows.
    Flow(FlowAct),
    /// Something of the script.
    Act(Action),
    /// From now on nothing goes wrong.
    Calm,
}

/// Everything there is.
pub(super) struct World<'a> {
    pub script: Script,
    /// The seed as it was given.
    seed: u64,
    /// Only the faults that the simulator began with.
    pub few: bool,
    pub rng: Rng,
    pub now: Time,
    queue: BinaryHeap<Reverse<(Time, u64, Happening)>>,
    queued: u64,
    pub links: Vec<Link>,
    /// The link of the full handshake.
    pub first_link: usize,
    pub wires: BTreeMap<usize, Wire>,
    pub wires_made: usize,
    pub hosts: [Host; 2],
    pub rejoin: Option<Rejoin>,
    /// By the side that sends.
    pub kept: [Kept; 2],
    /// Full handshakes begun for the main session.
    pub attempt: u32,
    /// Hosts that sleep, until when, and what waits for them.
    pub asleep: Asleep,
    pub backlog: [Vec<Happening>; 2],
    /// Drivers that learn of losses late.
    pub late: [Option<Late>; 2],
    pub driver: Driver,
    pub moments: Moments,
    pub live: Live,
    pub last_move: LastMove,
    pub flows: Flows,
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
        let few = seed & FEW_FAULTS != 0;
        let plain = few || seed & PLAIN_STREAMS != 0;
        let given = seed;
        let seed = seed & !(FEW_FAULTS | PLAIN_STREAMS | NO_FLOWS | NO_MARKS | NO_PACKING);
        let mut script = Script::new(seed, few, plain);
        let mut flows = Flows::default();
        if !plain && given & NO_FLOWS == 0 {
            flows.plan = FlowPlan::draw(&mut script);
        }
        if !plain && given & (NO_FLOWS | NO_MARKS) == 0 {
            script.draw_marks();
        }
        if !plain && given & (NO_FLOWS | NO_PACKING) == 0 {
            script.draw_packing();
        }
        let mut world = Self {
            seed: given,
            few,
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
            asleep: [None; 2],
            backlog: Default::default(),
            late: Default::default(),
            driver: Driver::default(),
            moments: Moments::default(),
            live: Live::default(),
            last_move: LastMove::default(),
            flows,
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
        world.flows_begin();
        world.begin();
        world
    }

    /// Runs to the end.
    pub fn run(mut self) -> Result<Tally, Failure> {
        let outcome = self.go_on();
        let at = self.now;
        outcome.map_err(|what| Failure {
            seed: self.seed,
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
            if !self.is_asleep(side) {
                self.settle(side);
            }
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
        if self.sleeps_through(happening) {
            return;
        }
        match happening {
            Happening::Arrive { wire, from } => self.arrive(wire, from),
            Happening::Connected { wire } => self.connected_wire(wire),
            Happening::Learn { wire, side } => self.learn(wire, side, "it died"),
            Happening::Late { wire, side } => self.late(wire, side),
            Happening::Die { wire } => self.kill(wire),
            Happening::Timer { side } => self.timer(side),
            Happening::Tick { side, id, write } => self.tick(side, id, write),
            Happening::Target { id } => self.target_dialled(id),
            Happening::Decide { attempt } => self.decide(attempt),
            Happening::Redial => self.redial(),
            Happening::LinkUp { link } => self.link_up(link),
            Happening::LossEnds { link } => self.links[link].loss = 0,
            Happening::MtuEnds { link, dies } => self.mtu_ends(link, dies),
            Happening::Flap {
                link,
                left,
                every_ms,
            } => self.flap(link, left, every_ms),
            Happening::Wake { side } => self.wake(side),
            Happening::Doubt { side } => self.doubt_all(side),
            Happening::DriverLearns { side } => self.driver_wakes(side),
            Happening::Look => self.look(),
            Happening::Agree => self.look_for_agreement(),
            Happening::HoleEnds { link, dies } => self.hole_ends(link, dies),
            Happening::Packet { id } => self.packet_arrives(id),
            Happening::FlowTick { side, id } => self.flow_tick(side, id),
            Happening::Proof { side } => self.proof(side),
            Happening::Flow(act) => self.flow_act(act),
            Happening::Act(action) => self.act(action),
            Happening::Calm => self.calm_down(),
        }
    }
}
