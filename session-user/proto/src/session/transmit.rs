//! Sealing, scheduling and staging: what goes out, where, and in which order.

use std::io::IoSlice;

use super::buf::{DataHeader, Sealed, SendBuf, seal_copy};
use super::event::{Event, Handle};
use super::schedule::Place;
use super::transport::{Phase, Transport};
use super::{Session, State};
use crate::Time;
use crate::limits::{ACK_BYTES, ACK_DELAY, ACK_EVERY, ACK_RECORDS, CONTROL_RECORD_BYTES_MAX};
use crate::wire::{Ack, Frame, Space};

/// What is to be acknowledged, and when.
#[derive(Debug, Default)]
pub(super) struct AckState {
    records: u32,
    bytes: usize,
    first_at: Time,
    pub deadline: Option<Time>,
    /// Where the newest records came from: the path that the sender is listening on.
    on: Option<Handle>,
    /// When the last one went out.
    sent_at: Time,
}

impl AckState {
    pub fn note(&mut self, now: Time, on: Handle, bytes: usize) {
        if self.records == 0 {
            self.first_at = now;
            self.deadline = Some(now + ACK_DELAY);
        }
        self.records += 1;
        self.bytes += bytes;
        self.on = Some(on);
    }

    /// Something came out of order: the sender is to know soon, but not of every single record while
    /// several transports carry.
    pub fn soon(&mut self, now: Time) {
        let at = now.max(self.sent_at + ACK_EVERY);
        self.records = self.records.max(1);
        self.deadline = Some(self.deadline.map_or(at, |d| d.min(at)));
    }

    /// The peer waits for this one: it closes, or it has sent what we hold already.
    pub fn at_once(&mut self, now: Time) {
        self.records = self.records.max(1);
        self.deadline = Some(now);
    }

    /// The last acknowledgement may have been lost with its transport. Where no record of the sender
    /// is to be sent again, nothing else would make this end repeat it.
    pub fn repeat(&mut self) {
        self.at_once(Time::ZERO);
    }

    fn due(&self, now: Time) -> bool {
        self.records >= ACK_RECORDS
            || self.bytes >= ACK_BYTES
            || self.deadline.is_some_and(|d| now >= d)
    }

    fn pending(&self) -> bool {
        self.deadline.is_some()
    }

    /// Whether one goes along with what is sent anyway: that spares a write of its own later. Where one has just gone, the
    /// next few questions and answers need no record more each, whose sealing and opening cost as much as theirs.
    fn goes_along(&self, now: Time) -> bool {
        self.pending() && now.since(self.sent_at) >= ACK_DELAY
    }
}

impl Session {
    /// Makes ready what `handle`'s socket should be given; true if [`Self::slices`] has any.
    #[must_use]
    pub fn prepare(&mut self, now: Time, handle: Handle) -> bool {
        self.now = now;
        if self.active == Some(handle) {
            self.retry_reauth(now);
            self.flush_frames(now);
            self.flush_credit(now);
            self.flush_flow_ends(now);
        }
        self.finish_draining(handle);
        let acks_here = self.ack_target() == Some(handle);
        let Some(transport) = self.transports.get_mut(&handle) else {
            return false;
        };
        let goes_along = !transport.is_idle() && self.ack.goes_along(now);
        if acks_here && (self.ack.due(now) || goes_along) {
            self.send_ack(now, handle);
        }
        let Some(transport) = self.transports.get_mut(&handle) else {
            return false;
        };
        let sealed = transport.stage(now, &self.retained, &self.seal, &mut self.pool);
        self.epochs.sealed_more(sealed);
        // What was left out, because it was acknowledged over another transport, may have been all
        // that a draining transport waited for.
        self.finish_draining(handle);
        let Some(transport) = self.transports.get_mut(&handle) else {
            return false;
        };
        let sealed = transport.stage(now, &self.retained, &self.seal, &mut self.pool);
        self.epochs.sealed_more(sealed);
        let has_staged = transport.has_staged();
        if has_staged {
            transport.pulse.waits(now);
        }
        has_staged
    }

    /// Fills `slices` with the bytes to write to `handle`'s socket; returns how many were filled.
    pub fn slices<'a>(&'a self, handle: Handle, slices: &mut [IoSlice<'a>]) -> usize {
        self.transports.get(&handle).map_or(0, |t| t.slices(slices))
    }

    /// `handle`'s socket took `written` bytes of what [`Self::slices`] showed.
    pub fn transmitted(&mut self, now: Time, handle: Handle, written: usize) {
        if let Some(transport) = self.transports.get_mut(&handle) {
            transport.advance(&self.retained, now, written);
            transport.skip_acknowledged(&self.retained);
            self.queue_moved(handle);
        }
    }

    /// Bytes queued for `handle` that its socket has not taken.
    pub fn queued_bytes(&self, handle: Handle) -> usize {
        self.transports.get(&handle).map_or(0, |t| t.queued_bytes())
    }

    /// Asks the peer for a PONG on `handle`; `token` below [`crate::limits::OWN_PING_TOKENS`].
    pub fn ping(&mut self, handle: Handle, token: u64) {
        self.send_unretained(handle, &Frame::Ping { token });
    }

    /// Where an acknowledgement goes: back where the records came from while that stands.
    pub(super) fn ack_target(&self) -> Option<Handle> {
        let usable = |h: &Handle| {
            self.transports
                .get(h)
                .is_some_and(|t| t.phase == Phase::Up && !t.close_sent)
        };
        self.ack.on.filter(usable).or(self.active.filter(usable))
    }

    fn send_ack(&mut self, now: Time, handle: Handle) {
        let delay = now.since(self.ack.first_at);
        let delay_us = u64::try_from(delay.as_micros()).unwrap_or(0);
        self.ack = AckState {
            on: self.ack.on,
            sent_at: now,
            ..AckState::default()
        };
        self.send_unretained(
            handle,
            &Frame::Ack {
                ack: Ack::of(&self.received),
                delay_us,
            },
        );
    }

    /// Queues a frame of space U on `handle`.
    pub(super) fn send_unretained(&mut self, handle: Handle, frame: &Frame<'_>) {
        // Two sockets may name the same token, and so the same keys, until one proves to be the
        // peer's: nothing is sealed for either before that.
        let sealable = |t: &&mut Transport| t.phase != Phase::AwaitResume;
        if let Some(transport) = self.transports.get_mut(&handle).filter(sealable) {
            self.frames.clear();
            frame.encode(&mut self.frames);
            transport.push_unretained(self.now, &self.seal, &mut self.pool, &self.frames);
            self.epochs.sealed();
        }
    }

    /// Seals one record of application data.
    pub(super) fn seal_data(
        &mut self,
        now: Time,
        header: &DataHeader,
        data: SendBuf,
        place: Place,
    ) {
        self.rekey_if_due(now);
        let number = self.retained.next_number();
        let sealed = data.seal(header, self.seal.epoch().0, number, self.seal.retained());
        self.schedule(now, sealed, place);
    }

    /// Seals one record of other frames.
    pub(super) fn seal_frames(&mut self, frames: &[u8]) -> u64 {
        self.seal_frames_at(self.now, frames, self.place_control())
    }

    /// The same for a record whose place is known.
    pub(super) fn seal_frames_at(&mut self, now: Time, frames: &[u8], place: Place) -> u64 {
        let number = self.retained.next_number();
        let sealed = seal_copy(
            &mut self.pool,
            now,
            frames,
            Space::Retained,
            self.seal.epoch().0,
            number,
            self.seal.retained(),
        );
        self.schedule(now, sealed, place);
        number
    }

    /// Retains a sealed record and queues it where it goes.
    fn schedule(&mut self, now: Time, sealed: Sealed, place: Place) {
        self.epochs.sealed();
        self.stats.records_sent += 1;
        let number = self.retained.next_number();
        let len = sealed.bytes.len();
        self.retained.push(sealed, place);
        if place.copy.is_some() && place.doubled {
            self.stats.records_doubled += 1;
        } else if place.copy.is_some() {
            self.stats.records_resent += 1;
            self.stats.bytes_resent += len as u64;
            if let Some(hedge) = &mut self.hedge {
                hedge.room = hedge.room.saturating_sub(len);
            }
        }
        for handle in [place.on, place.copy].into_iter().flatten() {
            if let Some(transport) = self.transports.get_mut(&handle) {
                transport.push_retained(number, len, place.copy.is_none());
                if place.doubled && transport.pulse.is_unheard(now) {
                    self.ask(now, handle);
                }
            }
        }
    }

    pub(super) fn can_seal_frames(&self) -> bool {
        // Before ACCEPT or HELLO the peer's window is unknown, and there is nothing to seal.
        self.retained.span() < self.peer.record_window
            && self.retained.bytes() < self.config.memory_bytes / 2
    }

    /// Seals the frames that wait, in order.
    pub(super) fn flush_frames(&mut self, now: Time) {
        while !self.control.is_empty() && self.can_seal_frames() {
            self.rekey_if_due(now);
            let mut payload = self.control.pop_front().unwrap_or_default();
            while let Some(next) = self.control.front() {
                if payload.len() + next.len() > CONTROL_RECORD_BYTES_MAX {
                    break;
                }
                payload.extend_from_slice(next);
                self.control.pop_front();
            }
            let number = self.seal_frames(&payload);
            if let State::Closing { number: slot, .. } = &mut self.state {
                slot.get_or_insert(number);
            }
        }
        if self.control.is_empty() {
            self.packings.told(self.retained.next_number());
        }
    }

    /// Seals the credit that is due. It is cumulative, so it waits while no transport carries it.
    fn flush_credit(&mut self, now: Time) {
        while self.can_seal_frames() && self.is_open() {
            let mut payload = std::mem::take(&mut self.frames);
            payload.clear();
            if std::mem::take(&mut self.flow.max_data_due) {
                Frame::MaxData {
                    max: self.flow.recv_max,
                }
                .encode(&mut payload);
            }
            if std::mem::take(&mut self.flow.max_streams_due) {
                self.flow.remote_max = self.flow.remote_closed + self.config.max_streams;
                Frame::MaxStreams {
                    max: self.flow.remote_max,
                }
                .encode(&mut payload);
            }
            while payload.len() < CONTROL_RECORD_BYTES_MAX {
                let Some(id) = self.flow.credit_due.pop_front() else {
                    break;
                };
                let Some(stream) = self.streams.get_mut(&id) else {
                    continue;
                };
                stream.credit_due = false;
                if stream.recv.final_size.is_none() && !stream.recv.discard {
                    Frame::MaxStreamData {
                        id,
                        max: stream.recv.max,
                    }
                    .encode(&mut payload);
                }
            }
            if !payload.is_empty() {
                self.rekey_if_due(now);
                self.seal_frames(&payload);
            }
            let done = payload.is_empty();
            self.frames = payload;
            if done {
                return;
            }
        }
    }

    /// A draining transport whose records are all acknowledged says goodbye; one that both ends
    /// have said goodbye on is done.
    fn finish_draining(&mut self, handle: Handle) {
        let Some(transport) = self.transports.get_mut(&handle) else {
            return;
        };
        if !transport.draining || transport.phase != Phase::Up {
            return;
        }
        if !transport.close_sent {
            if !transport.is_idle() || self.retained.any_on(handle) {
                return;
            }
            transport.close_sent = true;
            self.send_unretained(
                handle,
                &Frame::TransportClose {
                    code: crate::wire::close_code::NO_ERROR,
                },
            );
            return;
        }
        if transport.close_received && transport.is_idle() && !transport.done_told {
            transport.done_told = true;
            self.events.push_back(Event::TransportDone(handle));
        }
    }
}
