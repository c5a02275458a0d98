//! Checkers of what must go on while things go wrong: as long as one link works and both ends have a
//! transport on it, every record arrives; and a doubt costs no more than it may.

use std::collections::VecDeque;
use std::time::Duration;

use super::world::World;
use super::{Mutation, Side};
use crate::Time;
use crate::limits::{HEDGE_BYTES_MAX, RECORD_HEADER_BYTES, RECORD_PAYLOAD_BYTES_MIN};
use crate::session::{Handle, Session};

/// A record is acknowledged within this time and that of what is ahead of it, whatever other links do.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// Records are watched at this distance in time, to keep little.
const WATCH_EVERY: Duration = Duration::from_millis(20);

/// What is watched, by the side that sends.
#[derive(Debug, Default)]
pub(super) struct Live {
    /// Since when both ends have had a transport on the safe link.
    since: Option<Time>,
    marks: [VecDeque<Mark>; 2],
    /// Since when an end has sent on none of its transports.
    idle_since: [Option<Time>; 2],
    doubts: [Doubt; 2],
}

/// Everything below a number had been sealed at a time.
#[derive(Debug)]
struct Mark {
    below: u64,
    at: Time,
    /// When it must be acknowledged, as far as is known.
    due: Time,
    /// Wires that it had to wait for already.
    waited: Vec<usize>,
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
    /// Since when both ends have had a transport on the safe link.
    pub fn since(&self) -> Option<Time> {
        self.since
    }

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
        self.live.since.get_or_insert(self.now);
        for side in Side::BOTH {
            self.watch_records(side);
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

    fn watch_records(&mut self, side: Side) {
        let Some(session) = &self.hosts[side as usize].session else {
            return;
        };
        let (lowest, next) = (session.lowest_unacknowledged(), session.next_record());
        let marks = &mut self.live.marks[side as usize];
        while marks.front().is_some_and(|m| m.below <= lowest) {
            marks.pop_front();
        }
        let fresh =
            (marks.back()).is_none_or(|m| m.below < next && self.now.since(m.at) >= WATCH_EVERY);
        if fresh && next > lowest {
            marks.push_back(Mark {
                below: next,
                at: self.now,
                due: self.now + ANSWER_WITHIN,
                waited: Vec::new(),
            });
            self.check.tally.watched += 1;
        }
        let due = |m: &&Mark| m.due < self.now;
        let Some(below) = marks.front().filter(due).map(|m| m.below) else {
            return;
        };
        let ahead = self.ahead(side, lowest, below);
        let Some(mark) = self.live.marks[side as usize].front_mut() else {
            return;
        };
        let new = ahead.into_iter().find(|(w, _)| !mark.waited.contains(w));
        if let Some((wire, time)) = new {
            mark.waited.push(wire);
            mark.due = self.now + time + ANSWER_WITHIN;
            return;
        }
        let (ms, waited) = (mark.at.as_nanos() / 1_000_000, format!("{:?}", mark.waited));
        let session = &self.hosts[side as usize].session;
        let carriers: Vec<u64> = (session.iter())
            .flat_map(|s| s.carriers(lowest).map(Handle::as_u64))
            .collect();
        self.fail(format!(
            "{side:?}: records from {lowest} on transports {carriers:?} to {below}, sealed by {ms} ms, are not acknowledged, though one link works and nothing is ahead of them any more (waited for wires {waited}): {}",
            self.describe()
        ));
    }

    /// The wires that carry record `lowest` of `side` and deliver what they are given, with the time
    /// that they need for what goes before the end of the records below `below`, and for the answer.
    fn ahead(&self, side: Side, lowest: u64, below: u64) -> Vec<(usize, Duration)> {
        let host = &self.hosts[side as usize];
        let Some(session) = &host.session else {
            return Vec::new();
        };
        let there = &self.hosts[side.other() as usize].session;
        let time = |handle: Handle| {
            let &id = host.wires.get(&handle)?;
            let wire = self.wires.get(&id)?;
            let [pipe, back] = [side, side.other()].map(|s| &wire.pipes[s as usize]);
            let link = &self.links[wire.link];
            if !pipe.delivers() || !back.delivers() || link.hole != [false; 2] {
                return None;
            }
            let answer = wire.ends[side.other() as usize].handle;
            let answer = answer
                .zip(there.as_ref())
                .map_or(0, |(h, s)| s.queued_bytes(h));
            let ahead = session.bytes_ahead(handle, below) + pipe.in_flight();
            let time = link.time_for(ahead) + link.time_for(answer + back.in_flight());
            (!time.is_zero()).then_some((id, time))
        };
        let carriers = session.carriers(lowest).filter_map(time);
        carriers.chain(self.answering(side, lowest)).collect()
    }

    /// The wires over which the other end may be telling `side` that it has record `lowest`, with the time that they need
    /// for it: where it came from, the other end may send no more.
    fn answering(&self, side: Side, lowest: u64) -> Vec<(usize, Duration)> {
        let there = &self.hosts[side.other() as usize].session;
        let Some(there) = there.as_ref().filter(|s| s.has_received(lowest)) else {
            return Vec::new();
        };
        let time = |&id: &usize| {
            let wire = self.wires.get(&id)?;
            let back = &wire.pipes[side.other() as usize];
            let queued = wire.ends[side.other() as usize].handle;
            let queued = queued.map_or(0, |h| there.queued_bytes(h));
            let under_way = queued + back.in_flight();
            let delivers = back.delivers() && self.links[wire.link].hole == [false; 2];
            (delivers && under_way > 0).then(|| (id, self.links[wire.link].time_for(under_way)))
        };
        let host = &self.hosts[side as usize];
        host.wires.values().filter_map(time).collect()
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
