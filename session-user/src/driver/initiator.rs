//! What the initiator's side knows: its configuration, and how its attempts went.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use session_proto::wire::Route;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::link::LinkSnapshot;
use crate::policy::{self, Lanes, PathHistory, PolicyConfig, ServiceRules};
use crate::requests::RequestQueue;
use crate::transport::DialSpec;

/// What a unit needs to dial a peer.
pub struct InitiatorConfig {
    /// Streams that applications ask for.
    pub requests: Arc<RequestQueue>,
    /// The links.
    pub links: watch::Receiver<Arc<LinkSnapshot>>,
    /// Which link is preferred.
    pub policy: PolicyConfig,
    /// How streams use the links.
    pub services: Arc<ServiceRules>,
    /// Further transports on the link in use.
    pub lanes: Lanes,
    /// The peer's addresses, in the configured order.
    pub remotes: Vec<SocketAddr>,
    /// Whether datagrams go over UDP; otherwise over TCP alone.
    pub udp: bool,
    /// The name that the peer's certificate must carry.
    pub peer_name: String,
    /// Time for one TCP connection.
    pub dial_timeout: Duration,
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
    /// The dial for what is to carry the session.
    pub(super) attempt: Option<Attempt>,
    /// The dial for a transport beside the one that carries.
    pub(super) standby_attempt: Option<Attempt>,
    /// Paths still to be tried in this round, best first.
    pub(super) pending: VecDeque<policy::Path>,
    /// Whether every attempt of this round was refused.
    pub(super) round_refused: bool,
    pub(super) history: PathHistory,
    pub(super) retry_at: Option<Instant>,
    /// When the policy may answer otherwise, though nothing happened: a demotion ends.
    pub(super) look_at: Option<Instant>,
    /// Segments that each path had under way when it was last left, by link and peer's address.
    pub(super) windows: BTreeMap<(String, IpAddr), u32>,
    /// Links in the order in which they were first used: their numbers in routes.
    pub(super) numbered: Vec<String>,
    /// The peer's address that the session began with.
    pub(super) first_remote: Option<SocketAddr>,
    /// Small packets vanished as well, so size is no explanation before then.
    pub(super) size_cleared_until: Option<Instant>,
    /// When the path of a silent transport may be dialled again.
    pub(super) same_path_at: Option<Instant>,
    pub(super) backoff: Duration,
    /// Since when every round was refused.
    pub(super) refused_since: Option<Instant>,
    pub(super) rejoining: Option<AbortHandle>,
    /// The session could not open more streams.
    pub(super) streams_full: bool,
}

/// A TCP connection attempt under way.
pub(super) struct Attempt {
    /// Unique in the driver.
    pub(super) number: u64,
    pub(super) path: policy::Path,
    /// 0 for the first transport of the path.
    pub(super) lane: u64,
    pub(super) spec: DialSpec,
    pub(super) task: AbortHandle,
}

impl Initiator {
    /// An initiator whose session has just been made; `history`: what its paths are known for.
    pub fn new(config: InitiatorConfig, history: PathHistory) -> Self {
        Self {
            config,
            seen_version: 0,
            attempt: None,
            standby_attempt: None,
            pending: VecDeque::new(),
            round_refused: true,
            history,
            retry_at: None,
            look_at: None,
            size_cleared_until: None,
            same_path_at: None,
            windows: BTreeMap::new(),
            numbered: Vec::new(),
            first_remote: None,
            backoff: Duration::ZERO,
            refused_since: None,
            rejoining: None,
            streams_full: false,
        }
    }

    /// The route of a transport over `link` to `remote`. What the session began with is path 0.
    pub(super) fn route(&mut self, link: &str, remote: SocketAddr, lane: u64) -> Route {
        let known = self.numbered.iter().position(|name| name == link);
        let number = known.unwrap_or_else(|| {
            self.numbered.push(link.to_owned());
            self.numbered.len() - 1
        });
        let first = *self.first_remote.get_or_insert(remote);
        let remotes = &self.config.remotes;
        let place = |addr: SocketAddr| remotes.iter().position(|r| *r == addr).unwrap_or_default();
        let count = remotes.len().max(1);
        let address = (place(remote) + count - place(first)) % count;
        Route {
            path: (number as u64) << 8 | (address as u64 & 0xff),
            lane,
        }
    }

    /// Earlier rounds of failures say nothing any more.
    pub(super) fn forgive(&mut self) {
        self.backoff = Duration::ZERO;
        self.refused_since = None;
        self.size_cleared_until = None;
    }

    pub(super) fn abandon_attempts(&mut self) {
        self.abandon_attempts_if(|_| true);
    }

    /// Gives up the dials on paths that `hopeless` names.
    pub(super) fn abandon_attempts_if(&mut self, hopeless: impl Fn(&policy::Path) -> bool) {
        for slot in [&mut self.attempt, &mut self.standby_attempt] {
            if let Some(attempt) = slot.take_if(|a| hopeless(&a.path)) {
                attempt.task.abort();
            }
        }
    }
}
