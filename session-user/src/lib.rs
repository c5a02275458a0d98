//! The Holdfast agent and its command line.
//!
//! `ARCHITECTURE.md` in the repository has the map.

pub mod agent;
pub mod bench;
pub mod capture;
pub mod capture_queue;
pub mod cli;
pub mod config;
pub mod control;
pub mod dial;
pub mod driver;
pub mod glob;
pub mod handshake;
pub mod link;
pub mod pki;
pub mod policy;
pub mod trace;
pub mod transport;
