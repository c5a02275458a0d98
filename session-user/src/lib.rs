//! The Holdfast agent and its command line.
//!
//! `ARCHITECTURE.md` in the repository has the map.

pub mod capture;
pub mod capture_queue;
pub mod dial;
pub mod driver;
pub mod glob;
pub mod handshake;
pub mod link;
pub mod policy;
pub mod transport;
