//! Several transports: dialling, accepting, losing, choosing and retiring them.

use bytes::Bytes;

use super::event::{Event, Handle, TransportFault, Violation};
use super::receive::Stop;
use super::transport::{Phase, Transport};
use super::{Role, Session};
use crate::limits::{RESUME_TOKENS_AHEAD, TRANSPORTS_MAX};
use crate::wire::{Ack, Frame, Kind, Preamble, Reply, ResumeToken, Status};

/// A transport's name under the keys: unique for both diallers.
const fn wire_id(counter: u64, dialler: Role) -> u64 {
    counter << 1 | dialler.bit()
}

impl Session {
    /// A socket to the peer is connected: the preamble, RESUME with what we hold and, unless it
    /// is a standby, every unacknowledged record without a transport go out on it in one flight,
    /// before any answer. New records follow on it as well.
    pub fn dial(&mut self, standby: bool) -> Result<Handle, TransportFault> {
        if !self.is_open() {
            return Err(TransportFault::Closed);
        }
        let counter = self.dial_next;
        self.dial_next += 1;
        let hard = !self.transports.values().any(|t| t.dialled && t.can_carry());
        let mut transport = Transport::new(Phase::AwaitReply, wire_id(counter, self.role), true);
        let token = self.names.resume_token(self.role.sends(), counter);
        let mut preamble = Vec::with_capacity(64);
        Preamble::new(Kind::Resume(token)).encode(&mut preamble);
        transport.push_clear(Bytes::from(preamble));
        let handle = self.add_transport(transport);
        let ack = Ack::of(&self.received);
        self.send_unretained(
            handle,
            &Frame::Resume {
                counter,
                hard,
                standby,
                ack,
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
    /// transport: now if there is one, otherwise with the next [`Self::dial`].
    pub fn transport_lost(&mut self, handle: Handle) {
        if self.transports.remove(&handle).is_none() {
            return;
        }
        self.retained.unschedule(handle);
        self.ack.repeat();
        if self.active == Some(handle) {
            self.active = None;
        }
        if self.active.is_none() {
            if let Some(other) = self.fallback() {
                self.activate(other);
            }
        } else if let Some(active) = self.active {
            self.schedule_waiting(active);
        }
    }

    /// The newest transport that both ends are authenticated on.
    fn fallback(&self) -> Option<Handle> {
        let usable = self
            .transports
            .iter()
            .filter(|(_, t)| t.phase == Phase::Up && t.can_carry());
        usable.max_by_key(|(_, t)| t.wire_id).map(|(&h, _)| h)
    }

    /// New records go to `handle` from now on, and the peer is asked to do the same.
    pub fn set_active(&mut self, handle: Handle) {
        let usable = self
            .transports
            .get(&handle)
            .is_some_and(Transport::can_carry);
        if !usable || self.active == Some(handle) {
            return;
        }
        self.status_sent += 1;
        let others = self
            .transports
            .iter()
            .any(|(&h, t)| h != handle && t.can_carry());
        let status = Frame::TransportStatus {
            seq: self.status_sent,
            hard: !others,
            standby: false,
        };
        self.send_unretained(handle, &status);
        self.activate(handle);
    }

    /// No new records go to `handle`; once its last is acknowledged, it is closed in order.
    pub fn retire(&mut self, handle: Handle) {
        if let Some(transport) = self.transports.get_mut(&handle) {
            transport.draining = true;
        }
        self.leave(handle);
    }

    fn leave(&mut self, handle: Handle) {
        if self.active == Some(handle) {
            self.active = None;
            if let Some(other) = self.fallback() {
                self.activate(other);
            }
        }
    }

    /// New records go to `handle`, unless it takes none: the peer may ask for a transport that
    /// this end has just retired.
    fn activate(&mut self, handle: Handle) {
        let usable = self
            .transports
            .get(&handle)
            .is_some_and(Transport::can_carry);
        if !usable {
            return;
        }
        self.active = Some(handle);
        self.schedule_waiting(handle);
        self.unblock();
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
                transport.push_retained(number, len);
            });
    }

    pub(super) fn handle_resume(
        &mut self,
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
        self.stats.resumes += 1;
        self.events.push_back(Event::TokensChanged);
        self.handle_ack(ack)?;
        if hard {
            self.give_up_others(handle);
        }
        let ack = Ack::of(&self.received);
        self.send_unretained(handle, &Frame::Resumed { ack });
        if !standby || self.active.is_none() {
            self.activate(handle);
        }
        self.events.push_back(Event::TransportUp(handle));
        Ok(())
    }

    pub(super) fn handle_resumed(&mut self, handle: Handle, ack: &Ack) -> Result<(), Stop> {
        let transport = self
            .transports
            .get_mut(&handle)
            .ok_or(TransportFault::Unknown)?;
        if transport.phase != Phase::AwaitResumed {
            return Err(Violation::protocol("RESUMED where none may be").into());
        }
        transport.phase = Phase::Up;
        self.stats.resumes += 1;
        self.handle_ack(ack)?;
        self.events.push_back(Event::TransportUp(handle));
        if self.active.is_none() {
            self.activate(handle);
        }
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
            self.transports.remove(&handle);
            self.retained.unschedule(handle);
            self.ack.repeat();
            if self.active == Some(handle) {
                self.active = None;
            }
            self.events.push_back(Event::TransportDone(handle));
        }
    }

    pub(super) fn handle_status(&mut self, handle: Handle, seq: u64, hard: bool, standby: bool) {
        if seq <= self.status_seen {
            return;
        }
        self.status_seen = seq;
        if !self
            .transports
            .get(&handle)
            .is_some_and(Transport::can_carry)
        {
            return;
        }
        if hard {
            self.give_up_others(handle);
        }
        if !standby {
            self.activate(handle);
        } else {
            self.leave(handle);
        }
    }

    pub(super) fn handle_transport_close(&mut self, handle: Handle) {
        if let Some(transport) = self.transports.get_mut(&handle) {
            transport.close_received = true;
            transport.draining = true;
        }
        self.leave(handle);
    }
}
