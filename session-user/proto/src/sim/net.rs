//! The emulated network: links, and connections ("wires") that keep order and lose nothing until
//! they die, as TCP's do.
//!
//! A wire dies with bytes in flight at independent points in its two directions; each end learns
//! of it at a time of its own. A link may also swallow everything in one direction without a word
//! (a blackhole) and later heal or die, lose packets, which TCP turns into stalls, or pass only
//! small ones. A wire may be stuck for ever while new ones on its link work (a NAT forgot it).

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

use super::Side;
use super::rng::Rng;
use super::tap::Tap;
use crate::Time;
use crate::session::Handle;
use std::time::Duration;

/// TCP's first retransmission after this time; the next after double of it.
const RETRANSMIT_AFTER: Duration = Duration::from_millis(200);
/// Times that one segment is lost in a row, at most.
const LOST_IN_A_ROW_MAX: u32 = 4;

/// What a link is like; the same for both directions.
#[derive(Clone, Debug)]
pub(super) struct Link {
    /// One way, without queueing.
    pub delay: Duration,
    /// Most that is added to it.
    pub jitter: Duration,
    /// Bytes per millisecond.
    pub rate: u64,
    /// Bytes in flight on one wire, per direction, at most.
    pub buffer: usize,
    /// Most bytes that arrive at once.
    pub segment: u64,
    /// Wires can be made on it.
    pub up: bool,
    /// By the side that sends: nothing gets through, and nobody is told.
    pub hole: [bool; 2],
    /// Segments lost, per thousand.
    pub loss: u64,
    /// Larger segments never arrive.
    pub mtu: Option<usize>,
}

impl Link {
    /// A link drawn at random, from a local network to a slow and distant one.
    pub fn draw(rng: &mut Rng) -> Self {
        let delay = rng.micros(50, 150_000);
        Self {
            delay,
            jitter: delay.mul_f64(rng.below(500) as f64 / 1000.0),
            rate: rng.log_range(50, 50_000),
            buffer: rng.log_range(2 * 1024, 256 * 1024) as usize,
            segment: rng.pick(&[40, 1_448, 1_448, 9_000, 65_536, 65_536]),
            up: true,
            hole: [false; 2],
            loss: 0,
            mtu: None,
        }
    }

    /// How long one wire takes to carry `bytes` at most while nothing is lost: what its window holds
    /// each time that the window has been through.
    pub fn time_for(&self, bytes: usize) -> Duration {
        let window = (self.buffer - self.buffer / 3).max(1);
        let sending = Duration::from_nanos(window as u64 * 1_000_000 / self.rate);
        let turns = u32::try_from(bytes.div_ceil(window)).unwrap_or(u32::MAX);
        (self.delay + self.jitter + sending) * turns
    }

    /// How much later a segment arrives because it was lost, perhaps more than once: what follows it
    /// makes TCP send it again after a round trip, or else a timer does.
    fn lost_for(&self, rng: &mut Rng) -> Duration {
        let mut late = Duration::ZERO;
        let mut timer = RETRANSMIT_AFTER + self.delay * 2;
        for _ in 0..LOST_IN_A_ROW_MAX {
            if !rng.chance(self.loss) {
                break;
            }
            if late.is_zero() && rng.chance(500) {
                late = self.delay * 2;
            } else {
                late += timer;
                timer *= 2;
            }
        }
        late
    }
}

/// What a wire was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The full handshake of the main session.
    First,
    /// A further transport; `standby` as [`crate::session::Session::dial`] has it.
    Resume {
        standby: bool,
        /// Once it is up, the older ones are retired.
        replaces: bool,
    },
    /// A lane of the path that the initiator sends on.
    Lane,
    /// A full handshake that asks for a session which the peer seems not to know.
    Rejoin,
    /// An attacker's: nobody is at the dialling end.
    Attack,
}

/// What travels.
#[derive(Debug)]
pub(super) enum Item {
    Data(Bytes),
    /// The sender closed its end.
    Fin,
}

/// One direction of a wire.
#[derive(Debug, Default)]
pub(super) struct Pipe {
    /// In order; each with the time before which it does not arrive.
    flight: VecDeque<(Time, Item)>,
    flight_bytes: usize,
    busy_until: Time,
    last_at: Time,
    /// Nothing that is written now arrives any more.
    dead: bool,
    /// Nothing but this many of the first in flight arrives, and nobody is told.
    stuck: Option<usize>,
    /// When something last arrived.
    pub arrived_at: Time,
    fin_sent: bool,
    pub tap: Tap,
    /// A bit of what is sent next is changed.
    pub flip: bool,
}

impl Pipe {
    /// Room for further bytes. A dead pipe swallows all: a sender that has not been told goes on.
    pub fn room(&self, link: &Link) -> usize {
        if self.fin_sent {
            0
        } else if self.dead {
            link.buffer
        } else {
            // As the kernel does: a full socket is not writable again for a few bytes.
            let free = link.buffer.saturating_sub(self.flight_bytes);
            if free < link.buffer / 3 { 0 } else { free }
        }
    }

    /// Sends `item`; returns when it arrives, unless the pipe is dead.
    pub fn send(&mut self, now: Time, link: &Link, rng: &mut Rng, item: Item) -> Option<Time> {
        if self.dead {
            return None;
        }
        let bytes = match &item {
            Item::Data(data) => data.len(),
            Item::Fin => {
                self.fin_sent = true;
                0
            }
        };
        let start = self.busy_until.max(now);
        self.busy_until = start + Duration::from_nanos(bytes as u64 * 1_000_000 / link.rate);
        let jitter = Duration::from_nanos(rng.below(link.jitter.as_nanos() as u64 + 1));
        let mut at = (self.busy_until + link.delay + jitter).max(self.last_at);
        if link.loss > 0 {
            at = (self.busy_until + link.delay + jitter + link.lost_for(rng)).max(at);
        }
        self.last_at = at;
        if link.mtu.is_some_and(|mtu| bytes > mtu) {
            self.stuck.get_or_insert(self.flight.len());
        }
        self.flight_bytes += bytes;
        self.flight.push_back((at, item));
        self.stuck.is_none().then_some(at)
    }

    /// Nothing in flight arrives any more, and nobody is told.
    pub fn hold(&mut self) {
        self.stuck = Some(0);
    }

    /// What was held goes on.
    pub fn let_go(&mut self) {
        self.stuck = None;
    }

    /// Whether what is written now arrives.
    pub fn delivers(&self) -> bool {
        !self.dead && self.stuck.is_none()
    }

    /// Whether all that was written has arrived.
    pub fn is_empty(&self) -> bool {
        self.flight.is_empty()
    }

    /// Bytes that were written and have not arrived.
    pub fn in_flight(&self) -> usize {
        self.flight_bytes
    }

    /// What arrives next, if its time has come.
    pub fn arrive(&mut self, now: Time) -> Option<Item> {
        if self.flight.front().is_none_or(|(at, _)| *at > now) {
            return None;
        }
        match &mut self.stuck {
            Some(0) => return None,
            Some(left) => *left -= 1,
            None => {}
        }
        self.arrived_at = now;
        let (_, item) = self.flight.pop_front()?;
        if let Item::Data(data) = &item {
            self.flight_bytes -= data.len();
        }
        Some(item)
    }

    /// When each item in flight may arrive at the earliest.
    pub fn arrivals(&self) -> impl Iterator<Item = Time> + '_ {
        self.flight.iter().map(|(at, _)| *at)
    }

    /// Dies: of what is in flight, only the first part still arrives, cut at any byte.
    pub fn kill(&mut self, rng: &mut Rng) {
        self.dead = true;
        if let Some(first) = self.stuck {
            self.flight.truncate(first);
        }
        let mut left = match rng.below(3) {
            0 => 0,
            1 => self.flight_bytes,
            _ => rng.below(self.flight_bytes as u64 + 1) as usize,
        };
        self.flight_bytes = left;
        let mut kept = VecDeque::new();
        for (at, item) in std::mem::take(&mut self.flight) {
            // The end of a connection never outruns the bytes before it, and dies with the rest.
            let Item::Data(data) = item else { break };
            if left == 0 {
                break;
            }
            let part = data.slice(..left.min(data.len()));
            left -= part.len();
            kept.push_back((at, Item::Data(part)));
        }
        self.flight = kept;
    }
}

/// What stands at one end of a wire.
#[derive(Debug, Default)]
pub(super) struct WireEnd {
    /// The socket is open here.
    pub open: bool,
    /// The session's name for it, once there is one.
    pub handle: Option<Handle>,
    /// Bytes that arrived and nobody has taken.
    pub input: BytesMut,
}

/// One emulated connection.
#[derive(Debug)]
pub(super) struct Wire {
    pub link: usize,
    pub dialler: Side,
    pub purpose: Purpose,
    pub ends: [WireEnd; 2],
    /// By the side that sends.
    pub pipes: [Pipe; 2],
    pub dead: bool,
    /// Only the timers of TCP itself tell its ends that it is of no use any more.
    pub unsaid: bool,
    /// By the side that sends: TCP's patience runs.
    pub waited_for: [bool; 2],
    /// Connection attempts that were lost.
    pub tries: u32,
    /// Someone on the path changed what it carries: faults on it say nothing about the sessions.
    pub tampered: bool,
    /// All that the dialler wrote, for an attacker to use.
    pub tape: Vec<u8>,
}

/// Most bytes of one wire that an attacker keeps.
const TAPE_BYTES_MAX: usize = 64 * 1024;

impl Wire {
    pub fn new(link: usize, dialler: Side, purpose: Purpose) -> Self {
        Self {
            link,
            dialler,
            purpose,
            ends: Default::default(),
            pipes: Default::default(),
            dead: false,
            unsaid: false,
            waited_for: [false; 2],
            tries: 0,
            tampered: false,
            tape: Vec::new(),
        }
    }

    /// Keeps what the dialler wrote.
    pub fn record(&mut self, from: Side, bytes: &[u8]) {
        if from == self.dialler {
            let room = TAPE_BYTES_MAX - self.tape.len();
            self.tape.extend_from_slice(&bytes[..room.min(bytes.len())]);
        }
    }
}
