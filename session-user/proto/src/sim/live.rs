//! Checkers of what must go on while things go wrong: as long as one link works and both ends have a
//! transport on it, every record arrives; and a doubt costs no more than it may.

use std::collections::VecDeque;
use std::time::Duration;

use super::world::World;
use super::{Mutation, Side};
use crate::Time;
use crate::limits::{HEDGE_BYTES_MAX, RECORD_HEADER_BYTES, RECORD_PAYLOAD_BYTES_MIN};
use crate::session::{Handle, Session};

/// A record is acknowledged within this time and that of the bytes before it, whatever other links do.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// Records are watched at this distance in time, to keep little.
const WATCH_EVERY: Duration = Duration::from_millis(20);

/// What is watched, by the side that sends.
#[derive(Debug, Default)]
pub(super) struct Live {
    /// Since when both ends have had a transport on the safe link.
    since: Option<Time>,
    /// When everything below a number had been sealed.
    marks: [VecDeque<(Time, u64)>; 2],
    /// Since when an end has sent on none of its transports.
    idle_since: [Option<Time>; 2],
    doubts: [Doubt; 2],
}

/// What goes out twice while it is not known which of two transports works.
#[derive(Debug, Default)]
struct Doubt {
    between: Option<(Handle, Handle)>,
    /// Bytes sent again before it began, and when last looked at.
    before: u64,
    last: u64,
    /// A third transport may have caused some of them.
    mixed: bool,
}

impl Live {
    /// Whether both ends have had a transport on the safe link for a moment.
    pub fn has_stood(&self, now: Time) -> bool {
        self.since.is_some_and(|at| now > at + WATCH_EVERY)
    }
}

impl World<'_> {
    pub fn check_live(&mut self) {
        if self.script.safe.is_none() || self.few {
            return;
        }
        let stands = self.safe_link_stands();
        if !stands {
            self.live.since = None;
            self.live.idle_since = [None; 2];
            for marks in &mut self.live.marks {
                marks.clear();
            }
            return;
        }
        let since = *self.live.since.get_or_insert(self.now);
        for side in Side::BOTH {
            self.watch_records(side, since);
            self.watch_choice(side);
        }
    }

    /// An end that has a transport on a link that works sends on some transport.
    fn watch_choice(&mut self, side: Side) {
        let session = self.hosts[side as usize].session.as_ref();
        let idle = session.is_some_and(|s| s.active().is_none());
        let since = &mut self.live.idle_since[side as usize];
        let began = *since.get_or_insert(self.now);
        if !idle {
            *since = None;
        } else if self.now > began + ANSWER_WITHIN {
            self.fail(format!(
                "{side:?} sends on nothing, though one link works: {}",
                self.describe()
            ));
        }
    }

    /// Whether both ends have a transport on the link that works all the time, and are awake.
    fn safe_link_stands(&self) -> bool {
        if self.asleep != [None; 2] {
            return false;
        }
        let [ours, theirs] = &self.hosts;
        let (Some(a), Some(b)) = (&ours.session, &theirs.session) else {
            return false;
        };
        if !a.is_open() || !b.is_open() {
            return false;
        }
        let stands = |(handle, wire): (&Handle, &usize)| {
            self.wires.get(wire).is_some_and(|w| {
                let there = w.ends[Side::Responder as usize].handle;
                Some(w.link) == self.script.safe
                    && !w.dead
                    && !w.tampered
                    && a.is_up(*handle)
                    && there.is_some_and(|h| b.is_up(h) && !theirs.retired.contains(&h))
                    && !ours.retired.contains(handle)
            })
        };
        ours.wires.iter().any(stands)
    }

    fn watch_records(&mut self, side: Side, since: Time) {
        let config = &self.script.configs[side as usize];
        let Some(session) = &self.hosts[side as usize].session else {
            return;
        };
        let (lowest, next) = (session.lowest_unacknowledged(), session.next_record());
        let marks = &mut self.live.marks[side as usize];
        while marks.front().is_some_and(|(_, below)| *below <= lowest) {
            marks.pop_front();
        }
        let last = marks.back().copied();
        let fresh =
            last.is_none_or(|(at, below)| below < next && self.now.since(at) >= WATCH_EVERY);
        if fresh && next > lowest {
            marks.push_back((self.now, next));
            self.check.tally.watched += 1;
        }
        let Some(&(at, below)) = marks.front() else {
            return;
        };
        let link = &self.links[self.script.safe.unwrap_or_default()];
        let ahead = (config.memory_bytes + HEDGE_BYTES_MAX + link.buffer) as u64;
        let within = ANSWER_WITHIN + Duration::from_millis(ahead / link.rate);
        if self.now > at.max(since) + within {
            let ms = at.as_nanos() / 1_000_000;
            self.fail(format!(
                "{side:?}: records below {below}, sealed by {ms} ms, are not acknowledged after {within:?}, though one link works: {}",
                self.describe()
            ));
        }
    }

    /// While it is not known which of two transports works, a bounded number of bytes goes out on both.
    pub fn check_doubt(&mut self, side: Side) {
        let lavish = self.mutation == Some(Mutation::LavishDoubt);
        let Some(session) = &self.hosts[side as usize].session else {
            return;
        };
        let sent_again = session.stats().bytes_resent;
        let doubt = &mut self.live.doubts[side as usize];
        let between = session.hedged();
        if doubt.between != between {
            let before = doubt.last;
            *doubt = Doubt {
                between,
                before,
                ..Doubt::default()
            };
            if between.is_some() {
                self.check.tally.hedges += 1;
            }
        }
        doubt.last = sent_again;
        let Some((from, _)) = between else { return };
        let silent_too = |h: Handle| h != from && session.is_silent(h);
        doubt.mixed |= session.transports().count() != 2 || session.transports().any(silent_too);
        let record = RECORD_HEADER_BYTES + RECORD_PAYLOAD_BYTES_MIN;
        let most = if lavish {
            100
        } else {
            HEDGE_BYTES_MAX + record
        };
        let spent = sent_again - doubt.before;
        if spent > most as u64 && !doubt.mixed {
            self.fail(format!(
                "{side:?} sent {spent} bytes on two transports in doubt, {most} are allowed"
            ));
        }
    }

    /// A new session begins.
    pub fn live_anew(&mut self) {
        self.live = Live::default();
    }
}

/// Whether there is a session at both ends, and it is open.
pub(super) fn all_open(hosts: &[super::host::Host; 2]) -> bool {
    let open = |s: &Session| s.is_open();
    hosts.iter().all(|h| h.session.as_ref().is_some_and(open))
}
