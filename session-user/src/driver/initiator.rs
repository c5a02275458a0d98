//! What the initiator's side knows: its configuration, and how its attempts went.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::capture_queue::CaptureQueue;
use crate::link::LinkSnapshot;
use crate::policy::{self, PathHistory, PolicyConfig};
use crate::transport::TransportOptions;

/// What a unit needs to dial a peer.
pub struct InitiatorConfig {
    /// Captured sockets for this peer.
    pub captures: Arc<CaptureQueue>,
    /// The links.
    pub links: watch::Receiver<Arc<LinkSnapshot>>,
    /// Which link is preferred.
    pub policy: PolicyConfig,
    /// The peer's addresses, in the configured order.
    pub remotes: Vec<SocketAddr>,
    /// The name that the peer's certificate must carry.
    pub peer_name: String,
    /// Time for one TCP connection.
    pub dial_timeout: Duration,
    /// Options of transport sockets.
    pub transport: TransportOptions,
    /// How long every path may refuse before the peer is taken to be gone.
    pub peer_gone_after: Duration,
    /// How to make a session, should the peer have forgotten this one.
    pub session: session_proto::session::Config,
    /// Time for a full handshake.
    pub handshake_timeout: Duration,
}

/// The initiator's side of a driver.
pub struct Initiator {
    pub(super) config: InitiatorConfig,
    pub(super) seen_version: u64,
    pub(super) attempt: Option<Attempt>,
    /// Paths still to be tried in this round, best first.
    pub(super) pending: VecDeque<policy::Path>,
    /// Whether every attempt of this round was refused.
    pub(super) round_refused: bool,
    pub(super) history: PathHistory,
    pub(super) retry_at: Option<Instant>,
    pub(super) backoff: Duration,
    /// Since when every round was refused.
    pub(super) refused_since: Option<Instant>,
    pub(super) rejoining: Option<AbortHandle>,
    /// The session could not open more streams.
    pub(super) streams_full: bool,
}

/// A TCP connection attempt under way.
pub(super) struct Attempt {
    pub(super) path: policy::Path,
    pub(super) task: AbortHandle,
}

impl Initiator {
    /// An initiator that has not dialled yet.
    pub fn new(config: InitiatorConfig) -> Self {
        Self {
            config,
            seen_version: 0,
            attempt: None,
            pending: VecDeque::new(),
            round_refused: true,
            history: PathHistory::default(),
            retry_at: None,
            backoff: Duration::ZERO,
            refused_since: None,
            rejoining: None,
            streams_full: false,
        }
    }

    /// Old failures say nothing any more.
    pub(super) fn forgive(&mut self) {
        self.history = PathHistory::default();
        self.backoff = Duration::ZERO;
        self.refused_since = None;
    }

    pub(super) fn abandon_attempt(&mut self) {
        if let Some(attempt) = self.attempt.take() {
            attempt.task.abort();
        }
    }
}
