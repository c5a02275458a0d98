//! The sans-IO session core of Holdfast.
//!
//! A [`session::Session`] is a state machine: inputs are application bytes, transport bytes, link
//! events and `now`; outputs are bytes for a named transport, application bytes, events and the
//! next deadline. Nothing here reads a clock, opens a socket, touches a file or draws unseeded
//! randomness, so everything about loss, order, offsets, handover and rekeying is decided here and
//! proven here by simulation. A driver outside owns the sockets.
//!
//! Modules, in the order in which they may import each other: [`wire`] (bytes and frames), [`seal`]
//! (keys and records) and [`codec`] (what packs the bytes of streams), [`session`] (streams,
//! acknowledgement, resume). `docs/protocol.md` in the repository specifies the wire byte by byte.

pub mod codec;
pub mod limits;
pub mod ranges;
pub mod seal;
pub mod session;
#[cfg(feature = "sim")]
pub mod sim;
pub mod time;
pub mod wire;

pub use time::Time;
