//! The names of the UDP transport's paths, and challenges that nobody can guess.

use super::Epoch;
use super::keys::Secret;
use crate::wire::{ConnectionId, PacketHeader};

/// A connection id, and what hides epoch and number on the path that has it. In clear they would go on
/// from path to path, and tell whoever watches that it is the same session on both. The nonce is made
/// of the number itself, and the header is authenticated as it stands, so nothing can be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// In the header of every packet.
    pub id: ConnectionId,
    epoch: u32,
    number: u64,
}

impl Connection {
    pub(super) fn new(bytes: &[u8; 20]) -> Self {
        let mut out = Self {
            id: [0; 8],
            epoch: 0,
            number: 0,
        };
        out.id.copy_from_slice(&bytes[..8]);
        let (mut epoch, mut number) = ([0; 4], [0; 8]);
        epoch.copy_from_slice(&bytes[8..12]);
        number.copy_from_slice(&bytes[12..]);
        out.epoch = u32::from_be_bytes(epoch);
        out.number = u64::from_be_bytes(number);
        out
    }

    /// The header of packet `number`. Sums, not differences by bit: of those, the numbers of a long
    /// sequence would show.
    pub const fn hide(&self, epoch: Epoch, number: u64) -> PacketHeader {
        PacketHeader {
            id: self.id,
            epoch: epoch.0.wrapping_add(self.epoch),
            number: number.wrapping_add(self.number),
        }
    }

    /// Epoch and number of a packet with `header`.
    pub const fn reveal(&self, header: &PacketHeader) -> (Epoch, u64) {
        (
            Epoch(header.epoch.wrapping_sub(self.epoch)),
            header.number.wrapping_sub(self.number),
        )
    }
}

/// Draws challenges from a seed that only this end knows. The secrets of the session would not do: the
/// peer has them too, could answer what it never received, and so have traffic sent to somebody else.
#[derive(Clone, Debug)]
pub struct Challenges {
    seed: Secret,
    drawn: u64,
}

impl Challenges {
    /// From `seed`, which the driver draws at random for each session.
    pub const fn new(seed: Secret) -> Self {
        Self { seed, drawn: 0 }
    }

    /// The next one.
    pub fn draw(&mut self) -> [u8; 8] {
        self.drawn += 1;
        let context = self.drawn.to_be_bytes();
        self.seed.expand("challenge", &context)
    }
}
