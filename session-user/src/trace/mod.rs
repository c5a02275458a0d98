//! What became of each handover: kept in memory for commands, logged, and written to files in qlog's
//! form where the configuration asks for that.
//!
//! Nothing here waits for anything: a session must not notice that it is watched.

mod event;
mod qlog;
mod ring;
#[cfg(test)]
mod tests;
mod writer;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

pub use event::{Handover, PathChoice, PathInfo, Trigger};
use qlog::{About, Event};
use ring::Ring;
use writer::Writer;

/// Handovers that the agent remembers, of all its sessions together.
pub const HANDOVERS_KEPT: usize = 512;

/// The traces of all sessions of a unit.
#[derive(Debug)]
pub struct Trace {
    ring: Mutex<Ring>,
    writer: Option<Writer>,
}

impl Trace {
    /// A trace that writes a file for each session to the folder `qlog`, if there is one. The folder is
    /// made when it is needed.
    pub fn new(qlog: Option<PathBuf>) -> std::io::Result<Self> {
        Ok(Self {
            ring: Mutex::new(Ring::new(HANDOVERS_KEPT)),
            writer: qlog.map(Writer::start).transpose()?,
        })
    }

    /// The latest `count` handovers (with `peer`, if one is named), oldest first.
    pub fn handovers(&self, peer: Option<&str>, count: usize) -> Vec<Handover> {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        ring.latest(peer, count)
    }

    /// Waits until all that was told so far is in the files, at most for `limit`.
    pub fn flush(&self, limit: Duration) {
        if let Some(writer) = &self.writer {
            writer.flush(limit);
        }
    }

    fn keep(&self, handover: Handover) {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        ring.push(handover);
    }
}

/// What a path is like, as the kernel says.
#[derive(Clone, Copy, Debug)]
pub struct Metrics {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Its mean deviation.
    pub rtt_variance: Duration,
    /// Congestion window, in bytes.
    pub window: u64,
    /// Unacknowledged, in bytes.
    pub in_flight: u64,
}

/// The trace of one session.
#[derive(Debug)]
pub struct SessionTrace {
    trace: Arc<Trace>,
    about: Arc<About>,
    began: Instant,
}

impl SessionTrace {
    /// The session `id` with `peer` begins on a transport from `local` to `remote`.
    pub fn begin(
        trace: Arc<Trace>,
        id: [u8; 16],
        peer: &str,
        initiator: bool,
        (local, remote): (SocketAddr, SocketAddr),
    ) -> Self {
        let about = About {
            session: hex::encode(id),
            peer: peer.to_owned(),
            initiator,
            began: SystemTime::now(),
        };
        let this = Self {
            trace,
            about: Arc::new(about),
            began: Instant::now(),
        };
        this.write(|| qlog::started(local, remote));
        this
    }

    /// The session's name, in hexadecimal.
    pub fn session(&self) -> &str {
        &self.about.session
    }

    /// The peer's name.
    pub fn peer(&self) -> &str {
        &self.about.peer
    }

    /// Both ends are authenticated on a transport.
    pub fn path_up(&self, number: u64, path: &PathInfo) {
        self.write(|| qlog::path_up(number, path));
    }

    /// A transport has ended.
    pub fn path_ended(&self, number: u64, reason: &str) {
        self.write(|| qlog::path_ended(number, reason));
    }

    /// How a transport is doing.
    pub fn metrics(&self, number: u64, metrics: &Metrics) {
        self.write(|| qlog::metrics(number, metrics));
    }

    /// A handover is over, or will not be.
    pub fn handover(&self, handover: &Handover) {
        handover.log();
        self.trace.keep(handover.clone());
        self.write(|| qlog::handover(handover));
    }

    /// The session has ended.
    pub fn closed(&self, code: Option<u64>, reason: &str, by_peer: bool) {
        self.write(|| qlog::closed(code, reason, by_peer));
        if let Some(writer) = &self.trace.writer {
            writer.close(&self.about);
        }
    }

    fn write(&self, event: impl FnOnce() -> Event) {
        if let Some(writer) = &self.trace.writer {
            writer.write(&self.about, event().record(self.began.elapsed()));
        }
    }
}
