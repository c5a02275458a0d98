//! The checkers: what must hold after every step, and at the end.

use std::ops::Range;

use super::app::{App, Over};
use super::host::Host;
use super::tally::Tally;
use super::trouble::Moment;
use super::world::World;
use super::{Mutation, Side};
use crate::session::{Handle, Session, StreamId};

/// What the checkers remember from step to step, by the side that sends.
#[derive(Debug, Default)]
pub(super) struct Check {
    pub tally: Tally,
    /// Lowest unacknowledged record and bytes retained when acknowledgements were last checked.
    seen: [(u64, usize); 2],
    /// Key epochs begun.
    rekeys: [u64; 2],
    /// The step of the last progress, and what stood then.
    progress: (u64, [u64; 4]),
}

impl Check {
    /// A new session begins.
    pub fn begin_anew(&mut self) {
        self.seen = Default::default();
        self.rekeys = Default::default();
    }

    /// Steps since anything was delivered, acknowledged, opened or connected.
    pub fn idle_steps(&mut self) -> u64 {
        let Tally {
            bytes,
            streams,
            resumes,
            arrived,
            ..
        } = self.tally;
        let now = [
            bytes + arrived,
            streams,
            resumes,
            self.seen[0].0 + self.seen[1].0,
        ];
        if self.progress.1 != now {
            self.progress = (self.tally.steps, now);
        }
        self.tally.steps - self.progress.0
    }
}

impl World<'_> {
    /// What must hold after every step.
    pub fn check_step(&mut self) {
        for side in Side::BOTH {
            self.check_memory(side);
            self.check_acknowledged(side);
            self.check_doubt(side);
            self.check_told(side);
            self.note_rekeys(side);
        }
        self.check_live();
        self.check_flows();
        if self.mutation == Some(Mutation::StrayClose) && self.check.tally.steps == 100 {
            let now = self.now;
            if let Some(session) = self.session(Side::Responder) {
                session.close(now, 0, "out of the blue");
            }
        }
    }

    /// An application that had to wait is told once it need not.
    fn check_told(&mut self, side: Side) {
        let host = &self.hosts[side as usize];
        let Some(session) = host.session.as_ref().filter(|_| !self.is_asleep(side)) else {
            return;
        };
        let waits = |(_, a): &(&StreamId, &App)| a.blocked && a.over.is_none();
        let mut waiting = host.apps.iter().filter(waits);
        let forgotten = waiting.find(|(id, _)| session.could_write(**id));
        if let Some((&id, _)) = forgotten {
            self.fail(format!(
                "{side:?} was not told that it can write on stream {id}: {}",
                self.describe()
            ));
        }
    }

    fn note_rekeys(&mut self, side: Side) {
        let session = self.hosts[side as usize].session.as_ref();
        let rekeys = session.map_or(0, |s| s.stats().rekeys);
        let before = std::mem::replace(&mut self.check.rekeys[side as usize], rekeys);
        if rekeys > before {
            self.moment(Moment::Rekey);
        }
    }

    fn check_memory(&mut self, side: Side) {
        let Some(session) = &self.hosts[side as usize].session else {
            return;
        };
        let held = session.memory_bytes();
        let mut budget = self.script.configs[side as usize].memory_bytes;
        if self.mutation == Some(Mutation::Hoarding) {
            budget /= 200;
        }
        let shared = &self.script.configs[side as usize].shared_memory;
        let (retained, charged) = (session.retained_bytes(), shared.sending_bytes());
        if retained > charged {
            self.fail(format!(
                "{side:?} retains {retained} bytes, and {charged} are charged to what its sessions share"
            ));
            return;
        }
        if held > budget {
            self.fail(format!(
                "{side:?} holds {held} bytes, its budget is {budget}"
            ));
        }
    }

    /// Every record that `side` has let go of was received by its peer.
    fn check_acknowledged(&mut self, side: Side) {
        let [Some(ours), Some(theirs)] =
            [side, side.other()].map(|s| self.hosts[s as usize].session.as_ref())
        else {
            return;
        };
        let now = (ours.lowest_unacknowledged(), ours.retained_bytes());
        let before = self.check.seen[side as usize];
        if now == before {
            return;
        }
        let forgotten = self.mutation == Some(Mutation::ForgottenRecord) && now.0 > 3;
        let lowest_missing = if forgotten {
            2
        } else {
            theirs.received_below()
        };
        let missing = if now.0 > lowest_missing {
            Some(lowest_missing)
        } else {
            (now.0..ours.next_record())
                .find(|&n| !ours.retains_record(n) && !theirs.has_received(n))
        };
        self.check.seen[side as usize] = now;
        if let Some(number) = missing {
            self.fail(format!(
                "{side:?} let go of record {number}, which its peer has not received"
            ));
        }
    }

    /// Nothing is delivered that was not sent.
    pub fn check_prefix(&mut self, side: Side, id: StreamId, got: u64) {
        let peer = &self.hosts[side.other() as usize];
        // The peer's application is gone with its session; what it sent may still arrive.
        let Some(sender) = peer.apps.get(&id) else {
            return;
        };
        if got > sender.sent {
            let sent = sender.sent;
            self.fail(format!(
                "{side:?}: {got} bytes of stream {id} were delivered, {sent} were sent"
            ));
        }
    }

    /// An urgent byte comes as one and alone, and no other does. It is an ordinary one only if the mark of a later one
    /// had come; `come`: the bytes below this offset may have.
    pub fn check_marks(
        &mut self,
        side: Side,
        id: StreamId,
        bytes: Range<u64>,
        urgent: bool,
        come: u64,
    ) {
        let urgent = match self.mutation {
            Some(Mutation::LostMark) => false,
            Some(Mutation::StrayMark) => true,
            _ => urgent,
        };
        let Some(sender) = self.hosts[side.other() as usize].apps.get(&id) else {
            return;
        };
        let last = sender.marks.range(bytes.clone()).next_back().copied();
        let superseded = |mark: &u64| {
            let next = sender.marks.range(mark + 1..).next();
            next.is_some_and(|next| *next < come)
        };
        let start = bytes.start;
        if urgent {
            self.check.tally.marks_seen += 1;
            if last != Some(start) || bytes.end != start + 1 {
                self.fail(format!(
                    "{side:?}: the bytes {bytes:?} of stream {id} are urgent, and nobody said so"
                ));
            }
        } else if let Some(mark) = last.filter(|mark| !superseded(mark)) {
            self.fail(format!(
                "{side:?}: the mark at offset {mark} of stream {id} was lost"
            ));
        }
    }

    /// The end of a stream comes behind all of its bytes.
    pub fn check_ended(&mut self, side: Side, id: StreamId) {
        let Some(app) = self.hosts[side as usize].apps.get(&id) else {
            return;
        };
        let (got, all) = (app.got, app.plan.habits[side.other() as usize].total);
        let finished = self.hosts[side.other() as usize]
            .apps
            .get(&id)
            .is_none_or(|a| a.finished);
        if got != all || !finished {
            self.fail(format!(
                "{side:?}: stream {id} ended after {got} bytes of {all} (ended there: {finished})"
            ));
        }
    }

    /// Whether everything that was begun is over, at both ends.
    pub fn is_drained(&self) -> bool {
        let sessions_rest =
            |s: &Session| s.is_open() && s.streams().next().is_none() && s.retained_bytes() == 0;
        self.rejoin.is_none()
            && self.flows_rest()
            && self.hosts.iter().all(|h| {
                h.wanted == 0
                    && h.retired.is_empty()
                    && h.apps.values().all(|a| a.over.is_some())
                    && h.session.as_ref().is_some_and(sessions_rest)
            })
            && self.hosts[0].generation == self.hosts[1].generation
    }

    /// Both ends saw the same.
    pub fn check_end(&mut self) {
        let ids: Vec<StreamId> = self
            .hosts
            .iter()
            .flat_map(|h| h.apps.keys().copied())
            .collect();
        for id in ids {
            if let Some(what) = self.unequal(id) {
                return self.fail(format!("stream {id}: {what}"));
            }
        }
        let stats = self
            .hosts
            .iter()
            .flat_map(|h| &h.session)
            .map(Session::stats);
        let [a, b] = stats.fold([(0, 0, 0); 2], |sum, s| {
            [
                sum[1],
                (s.records_sent, s.records_received, s.records_resent),
            ]
        });
        if a.0 != b.1 || b.0 != a.1 {
            self.fail(format!("records sent and received differ: {a:?}, {b:?}"));
        }
        let sessions = self
            .hosts
            .iter()
            .flat_map(|h| &h.session)
            .map(Session::stats);
        for stats in sessions {
            self.check.tally.resent += stats.records_resent;
            self.check.tally.doubled += stats.records_doubled;
            self.check.tally.packed += stats.plain_packed;
            self.check.tally.packed_to += stats.bytes_packed;
            self.check.tally.rekeys += stats.rekeys;
        }
        self.tally_flows();
    }

    fn unequal(&self, id: StreamId) -> Option<String> {
        let [opener, other] = [Side::opener(id), Side::opener(id).other()];
        let opened = self.hosts[opener as usize].apps.get(&id)?;
        let Some(accepted) = self.hosts[other as usize].apps.get(&id) else {
            let aborted = opened.over == Some(Over::Aborted);
            return (!aborted).then(|| "it never reached the other end".to_owned());
        };
        let fits = match (opened.over?, accepted.over?) {
            (Over::Done, Over::Done) => true,
            (Over::Refused | Over::Reset | Over::Aborted, Over::Refused) => {
                opened.plan.refuse.is_some()
            }
            // Each may end its half before it hears of the other's abort.
            (Over::Aborted, _) | (_, Over::Aborted) => true,
            _ => false,
        };
        let told = |a: &App| (a.over, a.sent, a.got);
        (!fits).then(|| {
            format!(
                "it ended as {:?} here and {:?} there",
                told(opened),
                told(accepted)
            )
        })
    }

    /// Number, link, what waits for the socket and what is in flight; `?`: not up, `!`: silent.
    fn describe_transport(&self, host: &Host, session: &Session, handle: Handle) -> String {
        let up = if session.is_up(handle) { "" } else { "?" };
        let silent = if session.is_silent(handle) { "!" } else { "" };
        let wire = host.wires.get(&handle).and_then(|w| self.wires.get(w));
        let link = wire.map_or_else(String::new, |w| {
            let (link, pipe) = (&self.links[w.link], &w.pipes[host.side as usize]);
            let (flight, rate) = (pipe.in_flight(), link.rate);
            format!(" on link {}, {flight} in flight at {rate} B/ms", w.link)
        });
        let (number, queued) = (handle.as_u64(), session.queued_bytes(handle));
        format!("{number}{up}{silent}{link}, {queued} queued")
    }

    /// The state of both ends in a few words, for a failure's message.
    pub fn describe(&self) -> String {
        let mut out = String::new();
        for host in &self.hosts {
            let open: Vec<String> = (host.apps.iter())
                .filter(|(_, a)| a.over.is_none())
                .map(|(id, a)| {
                    let total = |s: Side| a.plan.habits[s as usize].total;
                    let (to, from) = (total(host.side), total(host.side.other()));
                    format!(
                        "{id}: sent {}/{to} fin {} got {}/{from} end {}",
                        a.sent, a.finished, a.got, a.got_end
                    )
                })
                .collect();
            out += &format!(
                "{:?}: wanted {}, retired {:?}, apps [{}], ",
                host.side,
                host.wanted,
                host.retired,
                open.join("; ")
            );
            match &host.session {
                Some(s) => {
                    let streams: Vec<StreamId> = s.streams().collect();
                    let transports: Vec<String> = s
                        .transports()
                        .map(|h| self.describe_transport(host, s, h))
                        .collect();
                    out += &format!(
                        "streams {streams:?}, retained {}, active {:?} of {transports:?}, generation {}, open {}, closed {}. ",
                        s.retained_bytes(),
                        s.active().map(|h| h.as_u64()),
                        host.generation,
                        s.is_open(),
                        s.is_closed(),
                    );
                }
                None => out += "no session. ",
            }
        }
        out
    }
}
