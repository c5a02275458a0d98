//! "Unknown session" is believed only after a full handshake: the initiator asks in its HELLO.

use std::io::IoSlice;

use bytes::Bytes;

use super::Side;
use super::host::secret;
use super::net::{Item, Purpose};
use super::world::World;
use crate::seal::{Aead, SessionSecret};
use crate::session::{Event, Handle, Session};
use crate::wire::close_code;

/// A second session whose handshake asks for the first.
pub(super) struct Rejoin {
    wire: usize,
    /// By side, once the wire is connected.
    ends: Option<[(Session, Handle); 2]>,
}

impl World<'_> {
    /// The initiator asks, unless it does already.
    pub fn rejoin_begin(&mut self) {
        let open = self.session(Side::Initiator).is_some_and(|s| s.is_open());
        if self.rejoin.is_some() || !open {
            return;
        }
        let up: Vec<usize> = (0..self.links.len())
            .filter(|&l| self.links[l].up)
            .collect();
        if up.is_empty() {
            return;
        }
        let link = self.rng.pick(&up);
        let wire = self.connect(Side::Initiator, link, Purpose::Rejoin);
        self.rejoin = Some(Rejoin { wire, ends: None });
        self.check.tally.rejoins += 1;
    }

    pub fn rejoin_connected(&mut self, wire: usize, reached: bool) {
        let Some(session) = &self.hosts[Side::Initiator as usize].session else {
            return;
        };
        let continues = Some((session.id(), session.next_counter()));
        if !reached {
            return self.rejoin_over(wire);
        }
        let keys = SessionSecret::new(
            Aead::Aes128Gcm,
            &secret(self.script.seed, 1 << 40 | wire as u64),
        );
        let [ours, theirs] = self.script.configs.clone();
        let ends = [
            Session::initiate(self.now, ours, keys.clone(), continues),
            Session::respond(self.now, theirs, keys),
        ];
        if let Some(rejoin) = &mut self.rejoin {
            rejoin.ends = Some(ends);
        }
        if let Some(found) = self.wires.get_mut(&wire) {
            for end in &mut found.ends {
                end.open = true;
            }
        }
        let late = super::world::Happening::Late {
            wire,
            side: Side::Initiator,
        };
        self.after(std::time::Duration::from_secs(5), late);
        self.rejoin_settle(wire, Side::Initiator);
    }

    pub fn rejoin_received(&mut self, wire: usize, side: Side) {
        let now = self.now;
        let Some(found) = self.wires.get_mut(&wire) else {
            return;
        };
        let Some(ends) = self
            .rejoin
            .as_mut()
            .filter(|r| r.wire == wire)
            .and_then(|r| r.ends.as_mut())
        else {
            return;
        };
        let (session, handle) = &mut ends[side as usize];
        let outcome = session.handle_bytes(now, *handle, &mut found.ends[side as usize].input);
        match outcome {
            Ok(()) => self.rejoin_settle(wire, side),
            Err(_) if found.tampered => self.rejoin_over(wire),
            Err(fault) => self.fail(format!("{side:?}: a full handshake failed: {fault}")),
        }
    }

    fn rejoin_settle(&mut self, wire: usize, side: Side) {
        loop {
            let Some(ends) = self.rejoin.as_mut().and_then(|r| r.ends.as_mut()) else {
                return;
            };
            match ends[side as usize].0.poll_event() {
                None => break,
                Some(Event::Hello(params)) => {
                    let known = params
                        .continues
                        .is_some_and(|(id, counter)| self.still_held(id, counter));
                    if let Some(ends) = self.rejoin.as_mut().and_then(|r| r.ends.as_mut()) {
                        ends[side as usize].0.accept(Some(known));
                    }
                }
                Some(Event::Accepted(params)) => {
                    self.rejoined(params.continued);
                    return self.rejoin_over(wire);
                }
                Some(_) => {}
            }
        }
        self.rejoin_flush(wire, side);
    }

    /// Whether the responder holds session `id`; then the initiator dials with `counter` next.
    fn still_held(&mut self, id: [u8; 16], counter: u64) -> bool {
        let Some(session) = self.session(Side::Responder) else {
            return false;
        };
        let held = session.id() == id && !session.is_ending();
        if held {
            session.expect_counter(counter);
        }
        held
    }

    fn rejoined(&mut self, continued: Option<bool>) {
        self.trace(|| format!("the responder still holds the session: {continued:?}"));
        if self.session(Side::Initiator).is_none_or(|s| s.is_ending()) {
            return;
        }
        match continued {
            Some(true) => {}
            Some(false) if self.hosts[Side::Responder as usize].may_end => {
                self.close(Side::Initiator, close_code::UNKNOWN_SESSION);
            }
            _ => self
                .fail("the responder disowns a session that it was never told to end".to_owned()),
        }
    }

    fn rejoin_flush(&mut self, wire: usize, side: Side) {
        let now = self.now;
        let Some(ends) = self.rejoin.as_mut().and_then(|r| r.ends.as_mut()) else {
            return;
        };
        let (session, handle) = &mut ends[side as usize];
        let mut all = Vec::new();
        while session.prepare(now, *handle) {
            let mut slices = [IoSlice::new(&[]); 16];
            let filled = session.slices(*handle, &mut slices);
            let n: usize = slices[..filled].iter().map(|s| s.len()).sum();
            for slice in &slices[..filled] {
                all.extend_from_slice(slice);
            }
            session.transmitted(now, *handle, n);
        }
        if !all.is_empty() {
            self.transmit(wire, side, Item::Data(Bytes::from(all)));
        }
    }

    /// The question was answered, or its wire is gone.
    pub fn rejoin_over(&mut self, wire: usize) {
        if self.rejoin.as_ref().is_some_and(|r| r.wire == wire) {
            self.rejoin = None;
        }
        for side in Side::BOTH {
            self.close_end(wire, side, true);
        }
    }
}
