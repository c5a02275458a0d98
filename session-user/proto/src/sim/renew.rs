//! The in-band renewal of keys, with a stand-in for TLS: three flights of known bytes, and a secret
//! that both ends know at the end.

use super::Side;
use super::host::secret;
use super::plan::{differs, fill};
use super::rng::mix;
use super::trouble::Moment;
use super::world::World;
use crate::seal::Aead;

/// A handshake under way at one end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Renewal {
    generation: u16,
    /// Bytes that came from the peer.
    got: u64,
}

/// Stands for a stream id that no stream has.
fn flight_id(generation: u16) -> u64 {
    (1 << 50) + u64::from(generation)
}

impl World<'_> {
    /// Bytes of flight `flight` (0 to 2) of `generation`'s handshake.
    fn flight_bytes(&self, generation: u16, flight: u64) -> u64 {
        200 + mix(self.script.seed ^ (flight_id(generation) * 3 + flight)) % 5_000
    }

    fn send_flight(&mut self, side: Side, generation: u16, offset: u64, bytes: u64) {
        let mut data = vec![0; bytes as usize];
        fill(
            self.script.seed,
            flight_id(generation),
            side,
            offset,
            &mut data,
        );
        if let Some(session) = self.session(side) {
            session.reauth_send(&data);
        }
    }

    /// The initiator begins, unless another renewal runs.
    pub fn renewal_begin(&mut self) {
        let Some(generation) = self.session(Side::Initiator).and_then(|s| s.reauth_begin()) else {
            return;
        };
        self.trace(|| format!("the initiator renews keys: generation {generation}"));
        self.host(Side::Initiator).renewal = Some(Renewal { generation, got: 0 });
        let bytes = self.flight_bytes(generation, 0);
        self.send_flight(Side::Initiator, generation, 0, bytes);
        self.moment(Moment::Renewal);
    }

    /// Bytes of the peer's flights.
    pub fn renewal_data(&mut self, side: Side, generation: u16, data: &[u8]) {
        let fresh = Renewal { generation, got: 0 };
        let mut renewal = self
            .host(side)
            .renewal
            .filter(|r| r.generation == generation)
            .unwrap_or(fresh);
        if differs(
            self.script.seed,
            flight_id(generation),
            side.other(),
            renewal.got,
            data,
        )
        .is_some()
        {
            return self.fail(format!(
                "{side:?}: wrong bytes in the renewal of generation {generation}"
            ));
        }
        let before = renewal.got;
        renewal.got += data.len() as u64;
        self.host(side).renewal = Some(renewal);
        let [first, second, third] = [0, 1, 2].map(|f| self.flight_bytes(generation, f));
        let reached = |at: u64| before < at && renewal.got >= at;
        match side {
            Side::Responder => {
                if reached(first) {
                    self.send_flight(side, generation, 0, second);
                }
                if reached(first + third) {
                    self.renewal_complete(side, generation);
                }
            }
            Side::Initiator => {
                if reached(second) {
                    self.send_flight(side, generation, first, third);
                    self.renewal_complete(side, generation);
                }
            }
        }
    }

    fn renewal_complete(&mut self, side: Side, generation: u16) {
        let (now, attempt) = (self.now, u64::from(self.attempt));
        let exporter = secret(
            self.script.seed,
            attempt << 20 | u64::from(generation) << 4 | 1,
        );
        let aead = if generation.is_multiple_of(2) {
            Aead::Aes128Gcm
        } else {
            Aead::ChaCha20Poly1305
        };
        if let Some(session) = self.session(side) {
            session.reauth_complete(now, aead, exporter);
        }
    }

    /// `side` seals with the keys of `generation`.
    pub fn renewed(&mut self, side: Side, generation: u16) {
        let host = self.host(side);
        if generation != host.generation.wrapping_add(1) {
            return self.fail(format!(
                "{side:?}: generation {generation} follows {}",
                self.hosts[side as usize].generation
            ));
        }
        host.generation = generation;
        self.check.tally.renewals += 1;
    }
}
