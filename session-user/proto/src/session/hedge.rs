//! Silence, and what is done about it before it is certain.
//!
//! A transport that does not answer in time may be dead, or late. So what is unacknowledged on it
//! goes out on a second one too, together with all that is new, and the first answer decides: on the
//! second, the session moves there; on the first, it stays, and a few duplicates were the price.

use std::time::Duration;

use super::event::{Event, Handle};
use super::retained::Copies;
use super::transport::{Phase, Transport};
use super::{Role, Session};
use crate::Time;
use crate::limits::{HEDGE_BYTES_MAX, OWN_PING_TOKENS};
use crate::wire::Frame;

/// Records go out on two transports.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hedge {
    /// The silent one.
    pub from: Handle,
    /// The other.
    pub to: Handle,
    /// Bytes that may still be sent on both.
    pub room: usize,
}

impl Session {
    /// When a transport is silent, or is to be asked whether it is.
    pub(super) fn pulse_deadline(&self) -> Option<Time> {
        if !self.is_open() {
            return None;
        }
        let ours = self.transports.values().filter(|t| t.can_fall_silent());
        ours.filter_map(|t| t.pulse.deadline()).min()
    }

    pub(super) fn check_pulses(&mut self, now: Time) {
        if !self.is_open() {
            return;
        }
        let mut last = None;
        while let Some(handle) = self.transports.after(last) {
            last = Some(handle);
            let Some(transport) = self.transports.get_mut(&handle) else {
                continue;
            };
            if !transport.can_fall_silent() {
                continue;
            }
            if transport.pulse.must_ask(now) {
                self.ask(now, handle);
            } else if transport.pulse.falls_silent(now) {
                self.fell_silent(now, handle);
            }
        }
    }

    fn fell_silent(&mut self, now: Time, handle: Handle) {
        self.events.push_back(Event::TransportSilent(handle));
        self.hedge_against(now, handle);
        // What waited for its queue may go elsewhere.
        self.queues_changed();
    }

    /// The driver knows that `handle` answers no more, before the session's own answers are late: such as
    /// from TCP's acknowledgements, which have stopped while much is under way. No more than what silence
    /// does follows from it, so it may be wrong.
    pub fn suspect(&mut self, now: Time, handle: Handle) {
        self.now = now;
        let falls = |t: &mut Transport| t.can_fall_silent() && t.pulse.becomes_silent();
        if self.is_open() && self.transports.get_mut(&handle).is_some_and(falls) {
            self.fell_silent(now, handle);
        }
    }

    /// Bytes that `handle`'s socket took and the peer has not acknowledged.
    pub fn in_flight(&self, handle: Handle) -> u64 {
        (self.transports.get(&handle)).map_or(0, |t| t.pulse.in_flight())
    }

    /// The driver knows a round-trip time of `handle` from elsewhere, such as the kernel's of the TCP
    /// handshake. It counts until there is one of the session's own.
    pub fn assume_rtt(&mut self, handle: Handle, rtt: Duration) {
        if let Some(transport) = self.transports.get_mut(&handle)
            && transport.pulse.rtt().is_none()
        {
            transport.pulse.measured(rtt);
        }
    }

    /// The smoothed round-trip time of `handle` from a record to its acknowledgement, once it is known.
    /// It holds all queues on the way.
    pub fn rtt(&self, handle: Handle) -> Option<Duration> {
        self.transports.get(&handle)?.pulse.rtt()
    }

    /// Whether what was sent on `handle` is not answered in time, and still is not.
    pub fn is_silent(&self, handle: Handle) -> bool {
        self.transports
            .get(&handle)
            .is_some_and(|t| t.pulse.is_silent())
    }

    /// Transports that [`Self::handle_timeout`] at `now` would call silent. What the kernel of either
    /// end holds back looks the same as what is lost; a driver that can tell says so with
    /// [`Self::vouch`] first.
    pub fn suspects(&self, now: Time) -> impl Iterator<Item = Handle> + '_ {
        let due = move |t: &Transport| {
            t.can_fall_silent()
                && t.pulse.is_waiting()
                && t.pulse.deadline().is_some_and(|at| now >= at)
        };
        (self.transports.iter())
            .filter(move |(_, t)| due(t))
            .map(|(&h, _)| h)
    }

    /// The path of `handle` is alive: TCP's own acknowledgements come, and what is late waits in a
    /// queue. It is not called silent before `until`, unless no answer at all has come for as long as
    /// one takes.
    pub fn vouch(&mut self, handle: Handle, until: Time) {
        if let Some(transport) = self.transports.get_mut(&handle) {
            transport.pulse.vouch(until);
        }
    }

    /// Something has happened that may have ended transports without a word, such as a suspend of
    /// the host: asks on every one.
    pub fn doubt_all(&mut self, now: Time) {
        self.now = now;
        let up = |t: &Transport| t.phase == Phase::Up;
        let handles: Vec<Handle> = (self.transports.iter())
            .filter(|(_, t)| up(t))
            .map(|(&h, _)| h)
            .collect();
        for handle in handles {
            self.doubt(now, handle);
        }
    }

    /// The same for one transport.
    pub fn doubt(&mut self, now: Time, handle: Handle) {
        if self.is_open() {
            self.ask(now, handle);
        }
    }

    /// Asks the peer on `handle` whether it is there; returns the question's token.
    pub(super) fn ask(&mut self, now: Time, handle: Handle) -> u64 {
        self.pings += 1;
        let token = OWN_PING_TOKENS + self.pings;
        self.send_unretained(handle, &Frame::Ping { token });
        if let Some(transport) = self.transports.get_mut(&handle) {
            transport.pulse.asked(token, now);
        }
        token
    }

    /// `silent` does not answer: another transport carries what it carries.
    fn hedge_against(&mut self, now: Time, silent: Handle) {
        if self.active != Some(silent) {
            let Some(active) = self.active else { return };
            if self.hedge.is_some_and(|h| h.to == silent) {
                self.copy_records(silent, active);
                return self.look_again(Some(active));
            }
            return self.hedge_beside(now, silent, active);
        }
        let Some(to) = self.fallback(silent) else {
            return;
        };
        if let Some(hedge) = self.hedge {
            // The other one is silent as well: a third may answer.
            let is_silent = |h| (self.transports.get(&h)).is_some_and(|t| t.pulse.is_silent());
            if !is_silent(hedge.to) || is_silent(to) {
                return;
            }
            self.retained.uncopy(hedge.to, Copies::All);
        }
        self.begin_term(to);
        let mut room = self.copy_some(silent, to, HEDGE_BYTES_MAX);
        for lane in self.lanes_beside(silent, to) {
            room = self.copy_some(lane, to, room);
        }
        let before = self.hedge.replace(Hedge {
            from: silent,
            to,
            room,
        });
        if before.is_some() {
            self.copy_left(to);
        }
        // Where nothing is unacknowledged, these tell which of the two works.
        self.ask(now, to);
        self.ask(now, silent);
        self.queues_changed();
    }

    /// The same for one that is not active. What is left on it came before a move, or belongs to a lane
    /// or a bond: it goes where everything goes now. A lane's path is in doubt as a whole.
    fn hedge_beside(&mut self, now: Time, silent: Handle, active: Handle) {
        let path = |h: Handle| self.transports.get(&h).map(|t| t.route.path);
        let lane = path(silent) == path(active);
        let elsewhere = self.hedge.map(|h| h.to).or_else(|| self.partner(active));
        let Some(other) = elsewhere.filter(|h| lane && *h != silent) else {
            return self.rescue(active);
        };
        self.retained.uncopy(silent, Copies::All);
        self.copy_left(other);
        self.ask(now, active);
    }

    /// What is on silent transports alone goes on `to` too, wherever its copy was until now. What the hedge is against has
    /// a bound of its own.
    fn copy_left(&mut self, to: Handle) {
        let against = self.hedge.map(|h| h.from);
        let left =
            |h: &Handle, t: &Transport| *h != to && Some(*h) != against && t.pulse.is_silent();
        let all = self.transports.iter();
        let silent: Vec<Handle> = all.filter(|(h, t)| left(h, t)).map(|(&h, _)| h).collect();
        for from in silent {
            self.copy_records(from, to);
        }
    }

    /// The other transports on the path of `silent`.
    fn lanes_beside(&self, silent: Handle, except: Handle) -> Vec<Handle> {
        let Some(route) = self.transports.get(&silent).map(|t| t.route) else {
            return Vec::new();
        };
        let beside = |h: &Handle, t: &Transport| {
            *h != silent && *h != except && t.route.path == route.path && t.route.lane != route.lane
        };
        let all = self.transports.iter();
        all.filter(|(h, t)| beside(h, t)).map(|(&h, _)| h).collect()
    }

    /// What is on `from` alone goes on `to` too.
    pub(super) fn copy_records(&mut self, from: Handle, to: Handle) {
        self.copy_some(from, to, usize::MAX);
    }

    /// What silent transports may have swallowed goes on `to` too. They are told of once, so nothing else
    /// would ever bring it along.
    pub(super) fn rescue(&mut self, to: Handle) {
        let silent = |(h, t): &(&Handle, &Transport)| **h != to && t.pulse.is_silent();
        let silent: Vec<Handle> = (self.transports.iter().filter(silent))
            .map(|(&h, _)| h)
            .collect();
        for &from in &silent {
            self.retained.uncopy(from, Copies::All);
        }
        for from in silent {
            self.copy_records(from, to);
        }
    }

    /// The same for the oldest of it, up to `room` bytes; returns what is left of these. None is left
    /// if not all was copied.
    fn copy_some(&mut self, from: Handle, to: Handle, room: usize) -> usize {
        let Some(transport) = self.transports.get_mut(&to).filter(|t| t.can_carry()) else {
            return 0;
        };
        let stats = &mut self.stats;
        self.retained.copy(from, to, room, |number, len| {
            stats.records_resent += 1;
            stats.bytes_resent += len as u64;
            transport.push_retained(number, len, false);
        })
    }

    /// The transport beside `except` that both ends are authenticated on and that has least in common
    /// with it, the newest of several; one that answers before one that is silent.
    pub(super) fn fallback(&self, except: Handle) -> Option<Handle> {
        let usable =
            |h: &Handle, t: &Transport| *h != except && t.phase == Phase::Up && t.can_carry();
        let route = self.transports.get(&except).map(|t| t.route);
        let distance = |t: &Transport| route.map_or(0, |r| r.distance(t.route));
        let first = |t: &Transport| t.route.lane == 0;
        self.transports
            .iter()
            .filter(|(h, t)| usable(h, t))
            .max_by_key(|(_, t)| (!t.pulse.is_silent(), distance(t), first(t), t.wire_id))
            .map(|(&h, _)| h)
    }

    /// The peer has answered on `handle`.
    pub(super) fn answered(&mut self, now: Time, handle: Handle) {
        if let Some(transport) = self.transports.get_mut(&handle) {
            transport.pulse.lives(now);
        }
        let Some(hedge) = self.hedge else { return };
        if handle == hedge.from {
            self.hedge = None;
            self.retained.uncopy(hedge.to, Copies::Guesses);
            if let Some(other) = self.transports.get_mut(&hedge.to) {
                let retained = &self.retained;
                other.purge(retained, |number| retained.is_on(number, hedge.to));
            }
            self.queues_changed();
        } else if handle == hedge.to {
            self.hedge = None;
            self.retained.keep_copies(hedge.from, hedge.to);
            self.abandon(hedge.from, hedge.to);
            self.active = None;
            self.ask_to_use(hedge.to, true);
            // It has carried since the other fell silent.
            let term = self.term(hedge.to);
            self.activate(hedge.to);
            self.set_term(hedge.to, term);
            self.events.push_back(Event::HandedOver {
                from: hedge.from,
                to: hedge.to,
            });
        }
    }

    /// Nothing is left on `silent`, nor on the lanes of its path that are silent, too: what was copied
    /// stays on `to`, and what there was no room for follows.
    fn abandon(&mut self, silent: Handle, to: Handle) {
        let mut dead = self.lanes_beside(silent, to);
        dead.retain(|h| self.is_silent(*h));
        dead.push(silent);
        for handle in dead {
            self.retained.keep_copies(handle, to);
            self.retained.unschedule(handle);
            if let Some(transport) = self.transports.get_mut(&handle) {
                let retained = &self.retained;
                transport.purge(retained, |number| retained.is_on(number, handle));
                transport.pulse.forget();
            }
        }
    }

    /// A silent transport may be helped in another way now.
    pub(super) fn look_again(&mut self, silent: Option<Handle>) {
        let is_silent = |h: &Handle| self.transports.get(h).is_some_and(|t| t.pulse.is_silent());
        if let Some(silent) = silent.filter(is_silent) {
            self.hedge_against(self.now, silent);
        }
    }

    /// The session has moved by other means: what is copied stays where it is, and nothing more is.
    pub(super) fn settle_hedge(&mut self) {
        if let Some(hedge) = self.hedge.take_if(|h| self.active != Some(h.from)) {
            self.retained.keep_copies(hedge.from, hedge.to);
            let silent = (self.transports.get(&hedge.from)).is_some_and(|t| t.pulse.is_silent());
            if let Some(active) = self.active.filter(|_| silent) {
                self.copy_records(hedge.from, active);
            }
        }
    }

    pub(super) fn handle_pong(&mut self, now: Time, handle: Handle, token: u64) {
        if token < OWN_PING_TOKENS {
            return self.events.push_back(Event::Pong { handle, token });
        }
        let ours = (self.transports.get_mut(&handle)).is_some_and(|t| t.pulse.answered(token, now));
        if ours {
            self.answered(now, handle);
        }
    }

    /// Asks the peer to send on `handle`; `hard`: and to send again there what it has sent elsewhere.
    pub(super) fn ask_to_use(&mut self, handle: Handle, hard: bool) {
        self.status_sent += 1;
        self.status_last = Some((handle, hard));
        let status = Frame::TransportStatus {
            seq: self.status_sent,
            seen: self.status_seen,
            hard,
            standby: false,
        };
        self.send_unretained(handle, &status);
    }

    /// Whether our latest request crossed the peer's, which had `seen` so many of ours, and wins: a hard
    /// one against a soft one, and the initiator's of two alike. One whose transport this end has left
    /// since crosses nothing: it may have been lost with it.
    fn stands_against(&self, seen: u64, hard: bool) -> bool {
        let ours = self.wins_against(seen, hard);
        ours.is_some_and(|h| self.active == Some(h))
    }

    /// Whether this end follows the peer's request though its own wins: the peer may follow that one, to
    /// a transport that this end left in the meantime, as a RESUME asked.
    fn misleads(&self, seen: u64, hard: bool) -> bool {
        let ours = self.wins_against(seen, hard);
        ours.is_some_and(|h| self.active != Some(h))
    }

    /// The transport of our latest request, if that crossed the peer's and wins.
    fn wins_against(&self, seen: u64, hard: bool) -> Option<Handle> {
        let (ours, ours_hard) = self.status_last.filter(|_| seen < self.status_sent)?;
        let wins = match (ours_hard, hard) {
            (true, false) => true,
            (false, true) => false,
            _ => self.role == Role::Initiator,
        };
        wins.then_some(ours)
    }

    pub(super) fn handle_status(
        &mut self,
        handle: Handle,
        seq: u64,
        seen: u64,
        hard: bool,
        standby: bool,
    ) {
        if seq <= self.status_seen {
            return;
        }
        self.status_seen = seq;
        let usable = (self.transports.get(&handle)).is_some_and(Transport::can_carry);
        if !usable {
            return;
        }
        if hard {
            let others: Vec<Handle> = self
                .transports
                .keys()
                .copied()
                .filter(|h| *h != handle)
                .collect();
            for other in others {
                self.copy_records(other, handle);
            }
        }
        if self.stands_against(seen, hard) {
            return;
        }
        let misleads = self.misleads(seen, hard);
        if standby {
            self.leave(handle);
        } else if hard {
            self.activate(handle);
        } else {
            self.move_softly(handle);
        }
        if let Some(active) = self.active.filter(|_| misleads) {
            self.ask_to_use(active, false);
        }
    }
}
