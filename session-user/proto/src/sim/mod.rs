//! The simulator: two sessions, an emulated network, applications, faults and checkers, all from
//! one seed.
//!
//! [`run`] decides with the seed what happens (`script`, `plan`, `trouble`), lets it happen in virtual
//! time (`world`, over the wires of `net` and `wires`), drives both sessions as the agent's driver does
//! (`host`, `settle`, `app`, `renew`, `rejoin`, and in a share of the runs `driver` and `standby`), lets
//! links, hosts and drivers fail (`faults`, `links`, `sleep`, `moves`), has an attacker copy, replay and
//! damage what travels (`tap`, `attack`), and asks the checkers after every step (`check`, `live`,
//! `agree`). In a share of the runs there are flows as well (`flow_plan`, `flows`, `steady`), over UDP
//! (`packets`) and over the wires. The same seed gives the same run on every machine.
//!
//! A wire never loses or reorders bytes while it lives: transports are TCP. What TCP does not keep
//! from a session is here: the death of connections with bytes in flight, each end hearing of it at
//! its own time, late or never; several connections that overtake each other; stalls; silence.

mod agree;
mod app;
mod attack;
mod check;
mod driver;
mod faults;
mod flow_plan;
mod flows;
mod host;
mod life;
mod links;
mod live;
mod moves;
mod net;
mod packets;
mod plan;
mod rejoin;
mod renew;
pub mod rng;
mod script;
mod settle;
mod sleep;
mod standby;
mod steady;
mod tally;
mod tap;
mod trouble;
mod wires;
mod world;

use std::fmt;

pub use tally::{Fault, Tally};

use crate::Time;

/// One end of the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Side {
    Initiator = 0,
    Responder = 1,
}

impl Side {
    pub const BOTH: [Self; 2] = [Self::Initiator, Self::Responder];

    pub const fn other(self) -> Self {
        match self {
            Self::Initiator => Self::Responder,
            Self::Responder => Self::Initiator,
        }
    }

    /// The side that opened stream `id`.
    pub const fn opener(id: u64) -> Self {
        if id & 1 == 0 {
            Self::Initiator
        } else {
            Self::Responder
        }
    }
}

/// Something made wrong on purpose, so that a test can see that the checkers find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// A byte is changed between the session and the application.
    WrongByte,
    /// Bytes vanish between the session and the application, after they were acknowledged.
    LostBytes,
    /// An application counts a byte that nobody sent.
    InventedByte,
    /// A record that the receiver acknowledged is taken not to be there.
    ForgottenRecord,
    /// The application at one end is never told the end of a stream.
    LostEnd,
    /// A stream ends before all bytes have been sent.
    EarlyEnd,
    /// A stream that came to its end at both ends is taken for reset at one.
    OneSidedEnd,
    /// A session holds more than its budget.
    Hoarding,
    /// Deadlines are never served.
    IgnoredTimer,
    /// An end never comes to rest.
    Restless,
    /// A session is closed though nobody asked.
    StrayClose,
    /// A transport is ended as if its bytes were bad.
    StrayFault,
    /// What the safe link carries does not arrive.
    DeafStandby,
    /// One end's last move is hidden from the checker.
    TwoMinds,
    /// A doubt may cost next to nothing.
    LavishDoubt,
    /// A datagram is another one than was sent.
    WrongDatagram,
    /// A datagram is another's than the one whose it was said to be.
    WrongSource,
    /// Datagrams are taken to have come before.
    TwiceDelivered,
    /// A datagram is taken for one that nobody sent.
    InventedDatagram,
    /// Answers to addresses of an attacker may cost next to nothing.
    LavishAnswer,
    /// An attacker is taken to have moved the peer's address.
    StolenAddress,
    /// No datagram is delivered once all is calm.
    DeafFlows,
    /// The answers in a conversation are not heard.
    DeafConversation,
    /// A session may hold no bytes of datagrams.
    HoardedDatagrams,
    /// An application is not told that a byte is urgent.
    LostMark,
    /// Every byte is taken for urgent.
    StrayMark,
}

/// A seed with this bit has only the faults that the simulator began with: the seeds of that time name
/// the runs that they named then.
pub const FEW_FAULTS: u64 = 1 << 63;

/// A seed with this bit has only streams that ask for nothing, and no lanes: the seeds of the time
/// before these name the runs that they named then.
pub const PLAIN_STREAMS: u64 = 1 << 62;

/// A seed with this bit has no flows: the seeds of the time before these name the runs that they named
/// then.
pub const NO_FLOWS: u64 = 1 << 61;

/// A seed with this bit has no urgent bytes: the seeds of the time before these name the runs that they
/// named then.
pub const NO_MARKS: u64 = 1 << 60;

/// A seed with this bit has nothing packed: the seeds of the time before name the runs that they named then.
pub const NO_PACKING: u64 = 1 << 59;

/// How to run a seed.
#[derive(Default)]
pub struct Options<'a> {
    /// Receives what happens, line by line.
    pub trace: Option<&'a mut dyn FnMut(&str)>,
    /// What to make wrong.
    pub mutation: Option<Mutation>,
}

/// A run in which something was not as it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The seed that repeats it.
    pub seed: u64,
    /// When it happened, in the run's own time.
    pub at: Time,
    /// What was wrong.
    pub what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, at, what } = self;
        let ms = at.as_nanos() as f64 / 1e6;
        writeln!(f, "seed {seed} failed after {ms:.3} ms: {what}")?;
        write!(
            f,
            "replay it with: cargo run --release -p session-proto --features sim --example sim -- --seed {seed} --trace"
        )
    }
}

impl std::error::Error for Failure {}

/// Runs `seed` to its end.
pub fn run(seed: u64, options: Options<'_>) -> Result<Tally, Failure> {
    world::World::new(seed, options).run()
}
