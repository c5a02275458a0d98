//! Key epochs: ratchet steps by count and age, generations by an in-band TLS handshake.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;

use super::event::{Event, Violation};
use super::stream::RecvHalf;
use super::{Role, Session};
use crate::Time;
use crate::limits::{EPOCHS_LIVE_MAX, REAUTH_BYTES_MAX, REAUTH_CHUNK_BYTES_MAX};
use crate::seal::{Aead, Epoch, Secret};
use crate::wire::Frame;

/// The epochs of which the peer may still need the key, as the sender sees it.
#[derive(Debug)]
pub(super) struct Epochs {
    /// Epoch and its first number in space R, oldest first.
    live: VecDeque<(Epoch, u64)>,
    sealed: u64,
    since: Time,
}

impl Epochs {
    pub fn new(epoch: Epoch, now: Time) -> Self {
        Self {
            live: VecDeque::from([(epoch, 0)]),
            sealed: 0,
            since: now,
        }
    }

    /// One more record was sealed in the current epoch.
    pub fn sealed(&mut self) {
        self.sealed_more(1);
    }

    /// The same for several.
    pub fn sealed_more(&mut self, records: u64) {
        self.sealed += records;
    }

    fn due(&self, now: Time, records: u64, after: Duration) -> bool {
        self.sealed >= records || (self.sealed > 0 && now.since(self.since) >= after)
    }

    fn full(&self) -> bool {
        self.live.len() >= EPOCHS_LIVE_MAX
    }

    /// The current epoch is used up, and none can follow before the peer acknowledges, or at all
    /// before keys are renewed in band.
    pub fn exhausted(&self, records: u64) -> bool {
        let last = self.live.back().is_some_and(|(e, _)| e.step() == u16::MAX);
        (self.full() || last) && self.sealed >= records
    }

    fn begin(&mut self, epoch: Epoch, first: u64, now: Time) {
        self.live.push_back((epoch, first));
        self.sealed = 0;
        self.since = now;
    }

    /// Everything below `lowest` is acknowledged.
    pub fn acknowledged(&mut self, lowest: u64) {
        while self.live.get(1).is_some_and(|(_, first)| *first <= lowest) {
            self.live.pop_front();
        }
    }
}

/// An in-band TLS handshake under way.
#[derive(Debug)]
pub(super) struct Reauth {
    generation: u16,
    sent: u64,
    received: RecvHalf,
    /// The outcome at this end.
    outcome: Option<(Aead, Secret)>,
    peer_done: bool,
}

impl Reauth {
    fn new(generation: u16) -> Self {
        Self {
            generation,
            sent: 0,
            received: RecvHalf::new(REAUTH_BYTES_MAX),
            outcome: None,
            peer_done: false,
        }
    }
}

impl Session {
    /// Takes the next key step if the current one is used up. REKEY is the last record of its epoch.
    pub(super) fn rekey_if_due(&mut self, now: Time) {
        if !self
            .epochs
            .due(now, self.config.rekey_records, self.config.rekey_after)
            || self.epochs.full()
        {
            return;
        }
        let Some(next) = self.seal.next_step() else {
            return;
        };
        self.announce_epoch(now, next);
        self.seal.ratchet();
    }

    fn announce_epoch(&mut self, now: Time, next: Epoch) {
        let first = self.retained.next_number() + 1;
        let mut frame = Vec::with_capacity(16);
        Frame::Rekey {
            epoch: next.0,
            first,
        }
        .encode(&mut frame);
        self.seal_frames(&frame);
        self.epochs.begin(next, first, now);
        self.stats.rekeys += 1;
    }

    /// REKEY is the last record of its epoch, so it can only announce its own successor.
    pub(super) fn handle_rekey(&mut self, epoch: u32, first: u64) -> Result<(), Violation> {
        let (number, own) = self.opened;
        let next = Epoch(epoch);
        let step =
            next.generation() == own.generation() && Some(next.step()) == own.step().checked_add(1);
        let generation =
            next.step() == 0 && Some(next.generation()) == own.generation().checked_add(1);
        if first != number + 1 || !(step || generation) {
            return Err(Violation::protocol(
                "REKEY that does not follow its own record",
            ));
        }
        self.open.announce(next, first);
        Ok(())
    }

    /// Initiator: begins the in-band handshake for the next generation of keys; returns its
    /// number. `None` while another runs at either end, or if the session is not open.
    pub fn reauth_begin(&mut self) -> Option<u16> {
        if self.role != Role::Initiator || !self.is_open() || self.reauth.is_some() {
            return None;
        }
        // Until a record of this generation has come back, the peer may still be busy with it.
        if self.open.newest().generation() != self.seal.epoch().generation() {
            return None;
        }
        let generation = self.seal.next_generation().generation();
        self.reauth = Some(Reauth::new(generation));
        Some(generation)
    }

    /// Sends TLS bytes of the in-band handshake.
    pub fn reauth_send(&mut self, data: &[u8]) {
        let Some(reauth) = &mut self.reauth else {
            return;
        };
        let mut frames = Vec::new();
        for chunk in data.chunks(REAUTH_CHUNK_BYTES_MAX.min(3 * 1024)) {
            let mut frame = Vec::with_capacity(chunk.len() + 16);
            Frame::Reauth {
                generation: u64::from(reauth.generation),
                offset: reauth.sent,
                data: chunk,
            }
            .encode(&mut frame);
            reauth.sent += chunk.len() as u64;
            frames.push(frame);
        }
        self.control.extend(frames);
    }

    /// The in-band handshake is complete at this end and the peer's certificate is accepted.
    pub fn reauth_complete(&mut self, now: Time, aead: Aead, exporter: Secret) {
        let Some(reauth) = &mut self.reauth else {
            return;
        };
        self.open.install_generation(aead, &exporter);
        reauth.outcome = Some((aead, exporter));
        let generation = u64::from(reauth.generation);
        self.push_control(&Frame::ReauthDone { generation });
        self.finish_reauth(now);
    }

    pub(super) fn handle_reauth(
        &mut self,
        generation: u64,
        offset: u64,
        data: Bytes,
    ) -> Result<(), Violation> {
        if self.reauth.is_none() {
            let expected = self.seal.next_generation().generation();
            if self.role == Role::Initiator || generation != u64::from(expected) {
                return Err(Violation::protocol("REAUTH that nobody began"));
            }
            self.reauth = Some(Reauth::new(expected));
        }
        let Some(reauth) = self
            .reauth
            .as_mut()
            .filter(|r| u64::from(r.generation) == generation)
        else {
            return Err(Violation::protocol("REAUTH of another generation"));
        };
        reauth.received.insert(offset, false, data)?;
        while let Some(data) = reauth.received.peek().cloned() {
            reauth.received.consume(self.now, data.len());
            self.events.push_back(Event::ReauthData {
                generation: reauth.generation,
                data,
            });
        }
        Ok(())
    }

    pub(super) fn handle_reauth_done(
        &mut self,
        now: Time,
        generation: u64,
    ) -> Result<(), Violation> {
        let Some(reauth) = self
            .reauth
            .as_mut()
            .filter(|r| u64::from(r.generation) == generation)
        else {
            return Err(Violation::protocol("REAUTH_DONE that nobody waits for"));
        };
        reauth.peer_done = true;
        self.finish_reauth(now);
        Ok(())
    }

    /// Both ends hold the new secret: this end seals with it from its next record on. Each end can
    /// open it already, so no record waits for the other's switch.
    fn finish_reauth(&mut self, now: Time) {
        let Some(reauth) = &self.reauth else { return };
        if !reauth.peer_done || reauth.outcome.is_none() || self.epochs.full() {
            return;
        }
        // Frames queued before (REAUTH_DONE among them) belong to the old keys.
        self.flush_frames(now);
        if self.epochs.full() {
            // Sealing them took a step; the peer's next acknowledgement makes room.
            return;
        }
        let Some(Reauth {
            generation,
            outcome: Some((aead, exporter)),
            ..
        }) = self.reauth.take()
        else {
            return;
        };
        let next = self.seal.next_generation();
        self.announce_epoch(now, next);
        self.seal.advance_generation(aead, &exporter);
        self.events.push_back(Event::Reauthenticated { generation });
    }

    /// Tries again what a full set of live epochs had put off.
    pub(super) fn retry_reauth(&mut self, now: Time) {
        if self
            .reauth
            .as_ref()
            .is_some_and(|r| r.peer_done && r.outcome.is_some())
        {
            self.finish_reauth(now);
        }
    }
}
