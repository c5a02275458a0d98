//! Keys and the sealing of records: one AEAD key for each direction, space and epoch.
//!
//! A *generation* comes from a TLS exporter (the full handshake is generation 0, each REAUTH the
//! next); within it keys are ratcheted by *steps*. `docs/protocol.md` has the derivation.

mod connection;
mod keys;
mod schedule;

pub use connection::{Challenges, Connection};
pub use keys::{Aead, RecordKey, Secret};
pub use schedule::{Direction, Epoch, OpenKeys, SealKeys, SessionNames, SessionSecret};

/// Why a record could not be sealed or opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The tag does not fit: the bytes were changed, or sealed with other keys.
    #[error("a record is not authentic")]
    NotAuthentic,
    /// The epoch is one whose key has been wiped.
    #[error("a record's key epoch {0:?} has been retired")]
    Retired(Epoch),
    /// The epoch is further ahead than the specification allows.
    #[error("a record's key epoch {0:?} is not one that can follow")]
    Unexpected(Epoch),
}
