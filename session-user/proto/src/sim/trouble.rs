//! What a seed decides about the faults of links, hosts and drivers, and when they come: at any time,
//! or soon after something that they must not disturb.

use std::time::Duration;

use super::Side;
use super::net::Link;
use super::rng::{Rng, mix};
use super::script::{Action, Script};
use super::world::{Happening, World};

/// Something in the life of a session that a fault may follow upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    /// A full handshake is complete, and neither end has said HELLO.
    Begin,
    /// A transport is dialled.
    Dial,
    /// A transport is authenticated.
    Up,
    /// An end moves softly.
    Move,
    /// A key epoch begins.
    Rekey,
    /// A renewal begins.
    Renewal,
    /// An end closes the session.
    Close,
    /// A transport falls silent.
    Silent,
    /// A host wakes.
    Wake,
    /// A transport is lost.
    Lost,
}

/// `action` follows `after` the `nth` time that `moment` comes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trigger {
    moment: Moment,
    nth: u64,
    after: Duration,
    action: Action,
}

/// A link on which nothing goes wrong is not the slowest: one-way delay and bytes per millisecond.
const SAFE_DELAY_MAX: Duration = Duration::from_millis(40);
const SAFE_RATE_MIN: u64 = 1_000;

impl Script {
    /// Draws the faults that came to the simulator later, from a source of their own.
    pub fn draw_trouble(&mut self, calm_ms: u64) {
        let mut rng = Rng::new(mix(self.seed ^ 0x0701_0b1e_0000));
        let rng = &mut rng;
        if rng.chance(450) {
            self.draw_preference(rng);
        }
        if rng.chance(500) {
            self.draw_safe(rng);
        }
        self.last_move = rng.chance(250);
        let troubles = match rng.below(20) {
            0..3 => 0,
            3..7 => 1,
            7..16 => rng.range(2, 6),
            _ => rng.range(6, 15),
        };
        for _ in 0..troubles {
            let action = if rng.chance(750) {
                self.draw_one(rng)
            } else {
                self.draw_fault(rng)
            };
            if rng.chance(500) {
                self.at(rng, calm_ms, action);
            } else {
                self.triggers.push(Trigger::draw(rng, action));
            }
        }
    }

    fn draw_preference(&mut self, rng: &mut Rng) {
        while self.links.len() < 2 || (self.links.len() < 4 && rng.chance(300)) {
            self.links.push(Link::draw(rng));
        }
        let mut order: Vec<usize> = (0..self.links.len()).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, rng.below(i as u64 + 1) as usize);
        }
        self.preference = Some(order);
    }

    fn draw_safe(&mut self, rng: &mut Rng) {
        if self.links.len() < 2 {
            self.links.push(Link::draw(rng));
        }
        let safe = rng.below(self.links.len() as u64) as usize;
        let link = &mut self.links[safe];
        link.delay = link.delay.min(SAFE_DELAY_MAX);
        link.jitter = link.jitter.min(link.delay / 2);
        link.rate = link.rate.max(SAFE_RATE_MIN);
        self.safe = Some(safe);
    }

    fn draw_one(&self, rng: &mut Rng) -> Action {
        let link = rng.below(self.links.len() as u64) as usize;
        let side = rng.pick(&Side::BOTH);
        let for_ms = rng.log_range(10, 8_000);
        match rng.below(100) {
            0..12 => Action::Loss {
                link,
                per_mille: rng.pick(&[20, 100, 300, 300, 300]),
                for_ms,
            },
            12..24 => Action::SmallMtu {
                link,
                bytes: rng.pick(&[40, 100, 576, 1_280, 1_400]),
                for_ms,
                dies: rng.chance(300),
            },
            24..36 => Action::NatForgets { link },
            36..46 => Action::AddressGone { link, side },
            46..56 => Action::Sleep {
                side,
                for_ms: rng.log_range(20, 60_000),
                nat: rng.chance(300),
            },
            56..64 => Action::BothLose,
            64..80 => draw_both_move(rng, 0),
            80..90 => Action::Flap {
                link,
                times: rng.range(4, 24) as u8,
                every_ms: rng.log_range(1, 200),
            },
            _ => Action::LateDriver {
                side,
                for_ms: for_ms.min(3_000),
                backwards: rng.chance(500),
            },
        }
    }
}

/// Both ends move, perhaps more than once, and what they leave or go to perhaps dies.
pub(super) fn draw_both_move(rng: &mut Rng, tries: u8) -> Action {
    let deaths = if rng.chance(400) { 0 } else { rng.below(16) };
    Action::BothMove {
        gap_us: if rng.chance(200) {
            0
        } else {
            rng.log_range(10, 200_000)
        },
        again: rng.chance(300),
        deaths: deaths as u8,
        tries,
    }
}

impl Trigger {
    fn draw(rng: &mut Rng, action: Action) -> Self {
        let moment = rng.pick(&[
            Moment::Begin,
            Moment::Dial,
            Moment::Up,
            Moment::Move,
            Moment::Rekey,
            Moment::Renewal,
            Moment::Close,
            Moment::Silent,
            Moment::Wake,
            Moment::Lost,
        ]);
        let most = match moment {
            Moment::Begin => 1,
            Moment::Rekey => 12,
            _ => 3,
        };
        Self {
            moment,
            nth: rng.range(1, most),
            after: if rng.chance(200) {
                Duration::ZERO
            } else {
                rng.micros(1, 300_000)
            },
            action,
        }
    }
}

impl World<'_> {
    /// `moment` has come: what is to follow upon it is put in the queue.
    pub fn moment(&mut self, moment: Moment) {
        if self.calm || self.script.triggers.is_empty() {
            return;
        }
        let times = &mut self.moments[moment as usize];
        *times += 1;
        let nth = *times;
        let due: Vec<Trigger> = (self.script.triggers.iter().copied())
            .filter(|t| t.moment == moment && t.nth == nth)
            .collect();
        for trigger in due {
            self.check.tally.triggered += 1;
            let at = self.now + trigger.after;
            if at < self.script.calm_at {
                self.at(at, Happening::Act(trigger.action));
            }
        }
    }
}

/// How often each moment has come.
pub(super) type Moments = [u64; Moment::Lost as usize + 1];
