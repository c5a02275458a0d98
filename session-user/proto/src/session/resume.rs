//! Several transports: dialling, accepting, losing, choosing and retiring them.

use std::time::Duration;

use bytes::Bytes;

use super::event::{Event, Handle, TransportFault, Violation};
use super::receive::Stop;
use super::transport::{Phase, Transport};
use super::{Role, Session};
use crate::Time;
use crate::limits::{RESUME_TOKENS_AHEAD, TRANSPORTS_MAX};
use crate::wire::{Ack, Frame, Kind, Preamble, Reply, ResumeToken, Route, Status};

/// A transport's name under the keys: unique for both diallers.
const fn wire_id(counter: u64, dialler: Role) -> u64 {
    counter << 1 | dialler.bit()
}

impl Session {
    /// A socket to the peer is connected: the preamble, RESUME with what we hold and, unless it
    /// is a standby, every unacknowledged record without a transport go out on it in one flight,
    /// before any answer. New records follow on it as well.
    pub fn dial(&mut self, standby: bool) -> Result<Handle, TransportFault> {
        self.dial_over(Route::default(), standby)
    }

    /// The same over a path that is not the first one's, or as a further lane of a path.
    pub fn dial_over(&mut self, route: Route, standby: bool) -> Result<Handle, TransportFault> {
        if !self.is_open() {
            return Err(TransportFault::Closed);
        }
        let counter = self.dial_next;
        self.dial_next += 1;
        let hard = !self.transports.values().any(|t| t.dialled && t.can_carry());
        let mut transport = Transport::new(Phase::AwaitReply, wire_id(counter, self.role), true);
        transport.route = route;
        let token = self.names.resume_token(self.role.sends(), counter);
        let mut preamble = Vec::with_capacity(64);
        Preamble::new(Kind::Resume(token)).encode(&mut preamble);
        transport.push_clear(Bytes::from(preamble));
        transport.to_carry = !standby;
        let handle = self.add_transport(transport);
        let ack = Ack::of(&self.received);
        self.send_unretained(
            handle,
            &Frame::Resume {
                counter,
                hard,
                standby,
                ack,
                route,
            },
        );
        if !standby {
            self.activate(handle);
        }
        Ok(handle)
    }

    /// The names under which the peer may resume this session next, with their counters.
    pub fn expected_tokens(&self) -> Vec<(ResumeToken, u64)> {
        let next = self.accepted_highest + 1;
        (next..next + RESUME_TOKENS_AHEAD)
            .map(|c| (self.names.resume_token(self.role.receives(), c), c))
            .collect()
    }

    /// A socket came whose preamble named the token of `counter`. Nothing is sent on it but the
    /// reply until RESUME proves to be the peer's.
    pub fn accept_transport(&mut self, counter: u64) -> Result<Handle, TransportFault> {
        if counter <= self.accepted_highest {
            return Err(TransportFault::StaleResume {
                counter,
                highest: self.accepted_highest,
            });
        }
        self.drop_rivals(counter);
        if self.transports.len() >= TRANSPORTS_MAX {
            return Err(TransportFault::Refused(Status::Busy));
        }
        let dialler = self.role.other();
        let mut transport = Transport::new(Phase::AwaitResume, wire_id(counter, dialler), false);
        transport.push_clear(Bytes::copy_from_slice(&Reply::new(Status::Ok).encode()));
        Ok(self.add_transport(transport))
    }

    /// Whoever saw a token can name it too. What proves itself does so with its first bytes, so of
    /// several unproven sockets with one counter the latest is kept, and no slot is held for long.
    fn drop_rivals(&mut self, counter: u64) {
        let rival = wire_id(counter, self.role.other());
        let old = |t: &Transport| t.phase == Phase::AwaitResume && t.wire_id == rival;
        let rivals: Vec<Handle> = self
            .transports
            .iter()
            .filter(|(_, t)| old(t))
            .map(|(&h, _)| h)
            .collect();
        for handle in rivals {
            self.transports.remove(&handle);
            self.events.push_back(Event::TransportDone(handle));
        }
    }

    /// The peer proved by a full handshake that it still holds this session and will dial with
    /// `counter` next.
    pub fn expect_counter(&mut self, counter: u64) {
        self.accepted_highest = self.accepted_highest.max(counter.saturating_sub(1));
        self.events.push_back(Event::TokensChanged);
    }

    /// The counter of our next RESUME.
    pub fn next_counter(&self) -> u64 {
        self.dial_next
    }

    /// Whether both ends are authenticated on `handle`.
    pub fn is_up(&self, handle: Handle) -> bool {
        self.transports
            .get(&handle)
            .is_some_and(|t| t.phase == Phase::Up)
    }

    /// Whether the peer has said that it sends nothing more on `handle`: its end of the connection
    /// is then no loss.
    pub fn is_parting(&self, handle: Handle) -> bool {
        self.transports
            .get(&handle)
            .is_none_or(|t| t.close_received && t.close_sent)
    }

    /// `handle`'s socket or link is gone. What was unacknowledged on it goes out on another
    /// transport: now if there is one, otherwise with the next [`Self::dial`]. The peer is told.
    pub fn transport_lost(&mut self, handle: Handle) {
        let Some(mut lost) = self.transports.remove(&handle) else {
            return;
        };
        self.forget_transport(handle);
        self.move_datagrams(&mut lost);
        let news = !lost.done_told && lost.phase != Phase::AwaitResume && self.is_open();
        let Some(active) = self.active.filter(|_| news) else {
            return;
        };
        if self
            .transports
            .get(&active)
            .is_some_and(|t| t.phase == Phase::Up)
        {
            self.send_unretained(active, &Frame::TransportLost { id: lost.wire_id });
        }
    }

    /// Nothing is scheduled on `gone` any more; if it was the active one, another is.
    fn forget_transport(&mut self, gone: Handle) {
        self.retained.unschedule(gone);
        self.ack.repeat();
        self.queues_changed();
        let hedge = self.hedge.take_if(|h| h.from == gone || h.to == gone);
        self.look_again(hedge.map(|h| h.from));
        if self.active == Some(gone) {
            self.active = None;
        }
        if let Some(active) = self.active {
            self.schedule_waiting(active);
            // What had its other copy on a silent one has none now.
            return self.rescue(active);
        }
        let copied = hedge.map(|h| h.to).filter(|to| *to != gone);
        if let Some(other) = copied.or_else(|| self.fallback(gone)) {
            self.ask_to_use(other, false);
            self.activate(other);
        }
    }

    /// New records go to `handle` from now on, and the peer is asked to do the same. What is under
    /// way on the old one stays there.
    pub fn set_active(&mut self, handle: Handle) {
        let usable = self
            .transports
            .get(&handle)
            .is_some_and(Transport::can_carry);
        if !usable || self.active == Some(handle) {
            return;
        }
        self.ask_to_use(handle, false);
        self.move_softly(handle);
    }

    /// The transport that is left works: what the new one does not take at once goes on over it.
    pub(super) fn move_softly(&mut self, handle: Handle) {
        let from = self.active;
        self.activate(handle);
        if self.active == Some(handle) {
            self.ease(from, handle);
        }
    }

    /// No new records go to `handle`; once its last is acknowledged, it is closed in order.
    pub fn retire(&mut self, handle: Handle) {
        if let Some(transport) = self.transports.get_mut(&handle) {
            transport.draining = true;
        }
        self.leave(handle);
        self.queues_changed();
    }

    pub(super) fn leave(&mut self, handle: Handle) {
        if self.active == Some(handle) {
            self.active = None;
            if let Some(other) = self.fallback(handle) {
                self.ask_to_use(other, false);
                self.activate(other);
            }
        }
    }

    /// New records go to `handle`, unless it takes none: the peer may ask for a transport that
    /// this end has just retired.
    pub(super) fn activate(&mut self, handle: Handle) {
        let usable = self
            .transports
            .get(&handle)
            .is_some_and(Transport::can_carry);
        if !usable {
            return;
        }
        if self.active.replace(handle) != Some(handle) {
            self.begin_term(handle);
        }
        self.settle_hedge();
        self.schedule_waiting(handle);
        self.rescue(handle);
        self.look_again(Some(handle));
        self.unblock();
        self.queues_changed();
    }

    /// Everything without a transport goes on `handle`, oldest first, as it was sealed.
    fn schedule_waiting(&mut self, handle: Handle) {
        let Some(transport) = self.transports.get_mut(&handle).filter(|t| t.can_carry()) else {
            return;
        };
        let stats = &mut self.stats;
        self.retained
            .schedule_waiting(handle, |number, len, again| {
                if again {
                    stats.records_resent += 1;
                    stats.bytes_resent += len as u64;
                }
                transport.push_retained(number, len, !again);
            });
    }

    pub(super) fn handle_resume(
        &mut self,
        now: Time,
        handle: Handle,
        counter: u64,
        hard: bool,
        standby: bool,
        ack: &Ack,
    ) -> Result<(), Stop> {
        let transport = self
            .transports
            .get_mut(&handle)
            .ok_or(TransportFault::Unknown)?;
        let dialler = self.role.other();
        if transport.phase != Phase::AwaitResume || transport.wire_id != wire_id(counter, dialler) {
            return Err(Violation::protocol("RESUME where none may be").into());
        }
        if counter <= self.accepted_highest {
            let highest = self.accepted_highest;
            return Err(TransportFault::StaleResume { counter, highest }.into());
        }
        self.accepted_highest = counter;
        transport.phase = Phase::Up;
        transport.pulse.opens(now);
        self.stats.resumes += 1;
        self.events.push_back(Event::TokensChanged);
        // First of all: whatever follows may lead to further frames on this transport.
        let held = Ack::of(&self.received);
        self.send_unretained(handle, &Frame::Resumed { ack: held });
        self.handle_ack(now, handle, ack, Duration::ZERO)?;
        if hard {
            self.give_up_others(handle);
        }
        // The dialler learns its round-trip time from the answer, this end from its own question.
        self.ask(now, handle);
        let alone = self.active.is_none();
        if !standby && !hard {
            self.move_softly(handle);
        } else if !standby || alone {
            self.activate(handle);
        }
        if standby && alone {
            // The peer did not ask for it: both may do the same with different ones.
            self.ask_to_use(handle, false);
        }
        self.events.push_back(Event::TransportUp(handle));
        self.queues_changed();
        self.look_again(self.active);
        Ok(())
    }

    pub(super) fn handle_resumed(
        &mut self,
        now: Time,
        handle: Handle,
        ack: &Ack,
    ) -> Result<(), Stop> {
        let transport = self
            .transports
            .get_mut(&handle)
            .ok_or(TransportFault::Unknown)?;
        if transport.phase != Phase::AwaitResumed {
            return Err(Violation::protocol("RESUMED where none may be").into());
        }
        transport.phase = Phase::Up;
        transport.pulse.opens(now);
        let to_carry = transport.to_carry;
        if let Some(began) = transport.began {
            transport.pulse.measured(now.since(began));
        }
        self.stats.resumes += 1;
        self.handle_ack(now, handle, ack, Duration::ZERO)?;
        self.answered(now, handle);
        self.events.push_back(Event::TransportUp(handle));
        self.queues_changed();
        let alone = self.active.is_none();
        if alone {
            self.activate(handle);
        }
        // RESUME asked the peer to send here, and has no place in the order of requests: one of the
        // peer's, or an older one of ours, may have passed it. This one settles it.
        if let Some(active) = self.active.filter(|_| to_carry || alone) {
            self.ask_to_use(active, false);
        }
        self.look_again(self.active);
        Ok(())
    }

    /// The peer says that its other transports are lost: what is unacknowledged on them must not
    /// wait for their sockets to find out.
    fn give_up_others(&mut self, kept: Handle) {
        let lost: Vec<Handle> = self
            .transports
            .iter()
            .filter(|(h, t)| **h != kept && !t.dialled && t.phase == Phase::Up)
            .map(|(&h, _)| h)
            .collect();
        for handle in lost {
            self.give_up(handle);
        }
    }

    /// The peer has lost one of the transports.
    pub(super) fn handle_transport_lost(&mut self, on: Handle, id: u64) {
        let lost = self.transports.iter().find(|(_, t)| t.wire_id == id);
        // It can hardly be the one that this came on.
        if let Some(handle) = lost.map(|(&h, _)| h).filter(|h| *h != on) {
            self.give_up(handle);
        }
    }

    fn give_up(&mut self, handle: Handle) {
        let lost = self.transports.remove(&handle);
        self.forget_transport(handle);
        if let Some(mut lost) = lost {
            self.move_datagrams(&mut lost);
        }
        self.events.push_back(Event::TransportDone(handle));
    }

    pub(super) fn handle_transport_close(&mut self, handle: Handle) {
        if let Some(transport) = self.transports.get_mut(&handle) {
            transport.close_received = true;
            transport.draining = true;
        }
        self.leave(handle);
        self.queues_changed();
    }
}
