//! The Holdfast agent and its command line.
//!
//! `ARCHITECTURE.md` in the repository has the map.

// Commands end quietly when their reader goes away: see `stdio`.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

pub mod agent;
pub mod bench;
pub mod capture;
pub mod cli;
pub mod config;
pub mod control;
pub mod dial;
pub mod door;
pub mod driver;
pub mod glob;
pub mod handshake;
pub mod link;
pub mod names;
pub mod pki;
pub mod policy;
pub mod remembered;
pub mod requests;
pub mod stdio;
pub mod trace;
pub mod transport;
