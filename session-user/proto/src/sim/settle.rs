//! What an end does with what its session has to say: events, bytes and deadlines.

use std::io::IoSlice;
use std::time::Duration;

use super::Mutation;
use super::Side;
use super::net::Purpose;
use super::trouble::Moment;
use super::world::{Happening, World};
use crate::limits::RESUME_TOKENS_AHEAD;
use crate::session::{Event, Handle, Session};

/// Events and writes that one change may lead to before the ends must come to rest.
const ROUNDS_MAX: usize = 10_000;

impl World<'_> {
    /// Acts on the session's events and writes what it has, until neither brings anything new.
    pub fn settle(&mut self, side: Side) {
        for _ in 0..ROUNDS_MAX {
            let mut rested = self.mutation != Some(Mutation::Restless);
            while let Some(event) = self.session(side).and_then(Session::poll_event) {
                rested = false;
                self.check.tally.events += 1;
                self.handle_event(side, event);
                if self.failure.is_some() {
                    return;
                }
            }
            // What is left out of a queue may be an event.
            let mut wrote = self.flush(side);
            wrote |= self.settle_flows(side);
            if !wrote && rested && !self.has_events(side) {
                return self.arm(side);
            }
        }
        self.fail(format!("{side:?} does not come to rest"));
    }

    fn has_events(&self, side: Side) -> bool {
        let session = self.hosts[side as usize].session.as_ref();
        session.is_some_and(Session::has_events)
    }

    /// Writes what the session has for every transport; true if anything was written.
    fn flush(&mut self, side: Side) -> bool {
        let Some(session) = self.session(side).filter(|s| !s.is_closed()) else {
            return false;
        };
        let handles: Vec<Handle> = session.transports().collect();
        let mut wrote = false;
        for handle in handles {
            wrote |= self.flush_one(side, handle);
        }
        wrote
    }

    fn flush_one(&mut self, side: Side, handle: Handle) -> bool {
        let mut wrote = false;
        loop {
            let now = self.now;
            let host = &mut self.hosts[side as usize];
            let Some(session) = &mut host.session else {
                return wrote;
            };
            if !session.prepare(now, handle) {
                return wrote;
            }
            let Some(&wire) = host.wires.get(&handle) else {
                self.fail(format!(
                    "{side:?} has bytes for transport {}, which is gone",
                    handle.as_u64()
                ));
                return false;
            };
            let Some(found) = self.wires.get(&wire) else {
                return wrote;
            };
            let room = found.pipes[side as usize].room(&self.links[found.link]);
            let mut slices = [IoSlice::new(&[]); 16];
            let filled = session.slices(handle, &mut slices);
            let total: usize = slices[..filled].iter().map(|s| s.len()).sum();
            let mut take = room.min(total);
            if take == 0 {
                return wrote;
            }
            // A socket takes what it likes.
            if self.rng.chance(250) {
                take = 1 + self.rng.below(take as u64) as usize;
            }
            let mut bytes = Vec::with_capacity(take);
            for slice in &slices[..filled] {
                let part = slice.len().min(take - bytes.len());
                bytes.extend_from_slice(&slice[..part]);
            }
            session.transmitted(now, handle, take);
            self.check.tally.wire_bytes += take as u64;
            self.carry(wire, side, bytes);
            wrote = true;
        }
    }

    fn handle_event(&mut self, side: Side, event: Event) {
        if !matches!(event, Event::ReauthData { .. }) {
            self.trace(|| format!("{side:?} {event:?}"));
        }
        match event {
            Event::Hello(_) => {
                let delay = self.rng.micros(1, 20_000);
                self.after(
                    delay,
                    Happening::Decide {
                        attempt: self.attempt,
                    },
                );
            }
            Event::Accepted(_) => {
                self.open_wanted(side);
                self.keep_warm();
            }
            Event::StreamOpened { id, target } => self.stream_opened(side, id, &target),
            Event::StreamConnected(id) => self.stream_connected(side, id),
            Event::StreamRefused { id, errno } => self.stream_refused(side, id, errno),
            Event::Readable(id) => self.readable(side, id),
            Event::StreamReset { id, .. } => self.stream_reset(side, id),
            Event::Writable | Event::StreamWritable(_) => self.writable(side),
            Event::StreamsAvailable => self.open_wanted(side),
            Event::TransportUp(handle) => self.transport_up(side, handle),
            Event::TransportDone(handle) => {
                if let Some(&wire) = self.host(side).wires.get(&handle) {
                    self.close_end(wire, side, false);
                }
                self.drop_transport(side, handle);
            }
            Event::TransportSilent(handle) => self.transport_silent(side, handle),
            Event::HandedOver { from, .. } => {
                self.check.tally.guesses += 1;
                if self.script.preference.is_some() {
                    self.driver_handed_over(side, from);
                }
            }
            Event::Pong { token, .. } => {
                if !self.host(side).pings.remove(&token) {
                    self.fail(format!("{side:?}: a PONG that nobody asked for"));
                }
            }
            Event::TokensChanged => self.learn_tokens(side),
            Event::ReauthData { generation, data } => self.renewal_data(side, generation, &data),
            Event::Reauthenticated { generation } => self.renewed(side, generation),
            Event::Closed { code, by_peer, .. } => self.session_closed(side, code, by_peer),
        }
    }

    pub fn learn_tokens(&mut self, side: Side) {
        let host = self.host(side);
        if let Some(session) = &host.session {
            host.tokens = session.expected_tokens().into_iter().collect();
            debug_assert_eq!(host.tokens.len() as u64, RESUME_TOKENS_AHEAD);
        }
    }

    pub fn transport_up(&mut self, side: Side, handle: Handle) {
        self.check.tally.resumes += 1;
        self.host(side).backoff = Duration::ZERO;
        self.moment(Moment::Up);
        if side == Side::Initiator {
            self.driver_up();
            self.keep_warm();
        }
        let purpose = self.hosts[side as usize]
            .wires
            .get(&handle)
            .and_then(|w| self.wires.get(w))
            .map(|w| (w.dialler, w.purpose));
        if purpose
            == Some((
                side,
                Purpose::Resume {
                    standby: false,
                    replaces: true,
                },
            ))
        {
            for old in self.hosts[side as usize]
                .up()
                .into_iter()
                .filter(|&h| h != handle)
            {
                self.retire(side, old);
            }
        }
    }

    /// Dials a standby, in runs that have one.
    fn keep_warm(&mut self) {
        let session = self.hosts[Side::Initiator as usize].session.as_ref();
        let alone = session.is_some_and(|s| s.transports().count() == 1);
        if self.script.warm && alone && self.script.preference.is_none() {
            self.dial(Side::Initiator, true, false);
        }
    }

    /// A driver may wait, give the transport up, or look for another one.
    fn transport_silent(&mut self, side: Side, handle: Handle) {
        self.check.tally.silences += 1;
        self.moment(Moment::Silent);
        if self.script.preference.is_some() {
            return self.driver_silent(side, handle);
        }
        match self.rng.below(3) {
            0 => {
                if let Some(&wire) = self.hosts[side as usize].wires.get(&handle) {
                    self.wire_gone(wire, side, "it is silent");
                }
            }
            1 if side == Side::Initiator => self.dial(side, false, false),
            _ => {}
        }
    }

    pub fn retire(&mut self, side: Side, handle: Handle) {
        self.trace(|| format!("{side:?} retires transport {}", handle.as_u64()));
        let host = self.host(side);
        host.retired.insert(handle);
        if let Some(session) = &mut host.session {
            session.retire(handle);
        }
    }

    /// The session's next deadline is put in the queue.
    fn arm(&mut self, side: Side) {
        let host = &mut self.hosts[side as usize];
        let Some(at) = host.session.as_ref().and_then(Session::poll_timeout) else {
            return;
        };
        if host
            .timer_at
            .is_none_or(|armed| at < armed || armed < self.now)
        {
            let at = at.max(self.now);
            host.timer_at = Some(at);
            self.at(at, Happening::Timer { side });
        }
    }

    pub fn timer(&mut self, side: Side) {
        let now = self.now;
        let host = self.host(side);
        if host.timer_at != Some(now) {
            // An earlier deadline took its place: were it armed again, there would be ever more of them.
            return;
        }
        host.timer_at = None;
        let Some(session) = &mut host.session else {
            return;
        };
        if session.poll_timeout().is_none_or(|at| at > now) {
            return;
        }
        if self.mutation == Some(Mutation::IgnoredTimer) {
            return;
        }
        self.vouch(side);
        let Some(session) = self.session(side) else {
            return;
        };
        session.handle_timeout(now);
        self.settle(side);
        let next = self.session(side).and_then(|s| s.poll_timeout());
        if next.is_some_and(|at| at <= now) {
            self.fail(format!("{side:?}: a deadline that was served stays"));
        }
    }
}
