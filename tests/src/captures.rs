//! What the client's agent counts of captured connections.

use anyhow::{Context, bail, ensure};
use session_user::control::{Client, Request, Response};

use crate::TestBed;

/// Counts since the agent started, or between two looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Captures {
    /// connect() calls that were captured.
    pub captured: u64,
    /// Streams that the agent opened to its peer.
    pub streams: u64,
    /// connect() calls of UDP sockets, and datagrams sent without it, that were captured.
    pub datagrams: u64,
}

impl Captures {
    /// The counts now; zeros where there is no agent.
    pub fn of(bed: &TestBed) -> anyhow::Result<Self> {
        if bed.bed.client_agent.is_none() {
            return Ok(Self::default());
        }
        let answer = Client::connect(&bed.bed.client_control())?.call(&Request::Status)?;
        let Response::Status(status) = answer else {
            bail!("the agent answers something else");
        };
        let capture = status.capture.context("the agent captures nothing")?;
        let session = bed.bed.session().context("there is no session")?;
        Ok(Self {
            captured: capture.captured4 + capture.captured6,
            streams: session.streams_total,
            datagrams: capture.udp4 + capture.udp6,
        })
    }

    /// What came since `before`.
    pub const fn since(self, before: Self) -> Self {
        Self {
            captured: self.captured - before.captured,
            streams: self.streams - before.streams,
            datagrams: self.datagrams - before.datagrams,
        }
    }

    /// Fails unless something was captured, and each captured connect() of TCP has become a stream.
    pub fn check(self, what: &str) -> anyhow::Result<()> {
        ensure!(
            self.captured + self.datagrams > 0,
            "{what}: nothing was captured"
        );
        ensure!(
            self.captured == self.streams,
            "{what}: {} connects were captured, but {} streams opened",
            self.captured,
            self.streams
        );
        Ok(())
    }
}
