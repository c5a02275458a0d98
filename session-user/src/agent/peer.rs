//! Keeps a session with one configured peer: makes it, drives it, makes it anew.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use super::registry::{Entry, Registry};
use crate::driver::establish::EstablishError;
use crate::driver::{
    Common, Driver, Ended, Established, Initiator, InitiatorConfig, Side, establish,
};
use crate::link::LinkSnapshot;
use crate::policy::{self, Action, Lanes, Path, PathHistory, PolicyConfig, ServiceRules};
use crate::requests::RequestQueue;

/// First and longest wait between attempts to make a session.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// Everything that is needed to reach one peer.
#[derive(Clone)]
pub struct Peer {
    /// Its configured name, which its certificate must carry.
    pub name: String,
    /// Its addresses, in the configured order.
    pub remotes: Vec<std::net::SocketAddr>,
    /// Whether datagrams go over UDP.
    pub udp: bool,
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
    /// The sessions of this unit.
    pub registry: Registry,
    /// What is the same for every session.
    pub common: Common,
    /// Limits of a session.
    pub session: session_proto::session::Config,
    /// Time for one TCP connection.
    pub dial_timeout: Duration,
    /// Time for a full handshake.
    pub handshake_timeout: Duration,
    /// How long every path may refuse before the peer is taken to be gone.
    pub peer_gone_after: Duration,
    /// What is being done, for reports.
    pub state: watch::Sender<PeerState>,
}

/// What an agent is about with one peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerState {
    /// Making a session; with the latest failure, if there was one.
    Connecting(Option<String>),
    /// A session stands.
    Up,
}

impl Peer {
    /// Runs until `stop` says so; a session that stands then is left to be closed by command.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut next = None;
        let mut history = PathHistory::default();
        let mut pause = Duration::ZERO;
        while !*stop.borrow() {
            let established = match next.take() {
                Some(established) => established,
                None => tokio::select! {
                    established = self.establish(&mut history) => established,
                    _ = stop.wait_for(|s| *s) => return,
                },
            };
            let began = Instant::now();
            let ended = self.drive(established, history.clone()).await;
            pause = if began.elapsed() > BACKOFF_MAX {
                Duration::ZERO
            } else {
                (pause * 2).clamp(BACKOFF_FIRST, BACKOFF_MAX)
            };
            match ended {
                Ended::Replaced(new) => next = Some(*new),
                Ended::Closed {
                    code,
                    reason,
                    by_peer,
                } => {
                    tracing::warn!(peer = %self.name, code, %reason, by_peer, "the session has ended");
                }
                Ended::PeerGone => {
                    tracing::warn!(peer = %self.name, "the session has ended: the peer is gone")
                }
            }
            // A peer that ends every session at once is not asked as fast as it can answer.
            if next.is_none() {
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    _ = stop.wait_for(|s| *s) => return,
                }
            }
        }
    }

    async fn drive(&self, established: Established, history: PathHistory) -> Ended {
        let id = established.session.id();
        let (commands, mut inbox) = mpsc::channel(64);
        let instance = established.session.peer().instance;
        tracing::info!(peer = %self.name, link = %established.path.link, session = %hex::encode(id), "a session begins");
        let entry = Entry {
            peer: self.name.clone(),
            instance,
            initiator: true,
            commands,
            packets: None,
        };
        self.registry.insert(id, entry);
        self.state.send_replace(PeerState::Up);
        let config = InitiatorConfig {
            requests: Arc::clone(&self.requests),
            links: self.links.clone(),
            policy: self.policy.clone(),
            services: Arc::clone(&self.services),
            lanes: self.lanes,
            remotes: self.remotes.clone(),
            udp: self.udp,
            peer_name: self.name.clone(),
            dial_timeout: self.dial_timeout,
            peer_gone_after: self.peer_gone_after,
            session: self.session.clone(),
            handshake_timeout: self.handshake_timeout,
        };
        let initiator = Initiator::new(config, history);
        let driver = Driver::new(
            established,
            self.common.clone(),
            Side::Initiator(Box::new(initiator)),
        );
        let ended = driver.run(&mut inbox).await;
        self.registry.remove(id);
        self.state.send_replace(PeerState::Connecting(None));
        ended
    }

    /// Tries path after path until a session stands.
    async fn establish(&mut self, history: &mut PathHistory) -> Established {
        let mut backoff = BACKOFF_FIRST;
        *history = PathHistory::default();
        loop {
            for path in self.paths(history) {
                let segment = history.segment(&path.link, path.remote, Instant::now());
                match establish::initiate(self.request(&path, segment)).await {
                    Ok(established) => return established,
                    Err(error) => {
                        tracing::warn!(peer = %self.name, %path, %error, "no session");
                        self.learn(history, &path, &error);
                        self.state
                            .send_replace(PeerState::Connecting(Some(error.to_string())));
                    }
                }
            }
            // A link that comes up is a reason to try at once.
            let changed = tokio::time::timeout(backoff, self.links.changed()).await;
            backoff = if changed.is_ok() {
                BACKOFF_FIRST
            } else {
                (backoff * 2).min(BACKOFF_MAX)
            };
            if matches!(changed, Ok(Err(_))) {
                std::future::pending::<()>().await;
            }
        }
    }

    fn paths(&mut self, history: &PathHistory) -> Vec<Path> {
        let snapshot = Arc::clone(&self.links.borrow_and_update());
        let decision = policy::choose(
            &snapshot,
            &self.policy,
            None,
            &self.remotes,
            history,
            Instant::now(),
        );
        if decision.action == Action::Hold {
            let reason = decision.reason.clone();
            self.state.send_replace(PeerState::Connecting(Some(reason)));
        }
        decision
            .ordered
            .into_iter()
            .map(|choice| choice.path)
            .collect()
    }

    /// A handshake whose answers never came may have been too large for the path.
    fn learn(&self, history: &mut PathHistory, path: &Path, error: &EstablishError) {
        let now = Instant::now();
        history.record_failure(&path.link, path.remote, now);
        if matches!(error, EstablishError::Timeout { .. }) {
            let mtu = self.links.borrow().link(&path.link).map_or(0, |l| l.mtu);
            history.record_swallowed(&path.link, path.remote, mtu, now);
        }
    }

    fn request(&self, path: &Path, segment: Option<u16>) -> establish::Request {
        establish::Request {
            identity: Arc::clone(&self.common.identity),
            peer_name: self.name.clone(),
            path: path.clone(),
            dial_timeout: self.dial_timeout,
            segment,
            handshake_timeout: self.handshake_timeout,
            transport: self.common.transport.clone(),
            window: self.common.window.clone(),
            session: self.session.clone(),
            continues: None,
        }
    }
}
