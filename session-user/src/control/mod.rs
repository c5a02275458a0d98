//! The control socket: a Unix socket on which commands and the agent exchange one JSON object a
//! line. The kernel says who is at the other end; nobody is asked.

mod client;
mod explain;
mod permit;
mod server;
#[cfg(test)]
mod tests;
mod types;

pub use client::{Client, ClientError};
pub use explain::{
    Asked, ExplainReport, NameReport, PassedReport, RuleReport, ServiceReport, TARGETS_MAX,
    TargetReport,
};
pub use permit::{Credentials, Permissions};
pub use server::{ControlHandler, listen, serve};
pub use types::*;

/// Longest line, in bytes: a report of ten thousand streams fits, a runaway peer does not.
const LINE_BYTES_MAX: usize = 16 << 20;
/// Longest request, in bytes.
const REQUEST_BYTES_MAX: usize = 16 << 10;
