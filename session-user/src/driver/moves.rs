//! The initiator's side: which link carries the session, and the dialling that follows from it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use session_proto::session::{Handle, TransportFault};
use session_proto::wire::Status;
use tokio::net::TcpStream;
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;

use super::carrier::{CarrierEnd, Path};
use super::establish::{self, EstablishError, Established};
use super::report::Move;
use super::{Driver, Ended, Internal, Side};
use crate::capture_queue::CaptureQueue;
use crate::link::{ChangeKind, LinkSnapshot, LinkState};
use crate::policy::{Choice, Current, PathHistory, PolicyConfig, choose};
use crate::transport::{DialSpec, TransportError, TransportOptions, dial};

/// First and longest wait between attempts when every path has failed.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// What a unit needs to dial a peer.
pub struct Initiator {
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
    pub(super) state: Dialling,
}

/// What the initiator is about.
#[derive(Default)]
pub(super) struct Dialling {
    seen_version: u64,
    attempt: Option<Attempt>,
    history: PathHistory,
    retry_at: Option<Instant>,
    backoff: Duration,
    /// Since when every attempt was refused.
    refused_since: Option<Instant>,
    rejoining: Option<AbortHandle>,
    /// The session could not open more streams.
    streams_full: bool,
}

struct Attempt {
    choice: Choice,
    task: AbortHandle,
}

/// The outcome of one TCP connection attempt.
pub(super) struct Dialled {
    choice: Choice,
    result: Result<TcpStream, TransportError>,
}

impl Initiator {
    /// An initiator that has not dialled yet.
    #[allow(clippy::too_many_arguments)] // Each is a different thing that the agent knows.
    pub fn new(
        captures: Arc<CaptureQueue>,
        links: watch::Receiver<Arc<LinkSnapshot>>,
        policy: PolicyConfig,
        remotes: Vec<SocketAddr>,
        peer_name: String,
        dial_timeout: Duration,
        transport: TransportOptions,
        peer_gone_after: Duration,
        session: session_proto::session::Config,
        handshake_timeout: Duration,
    ) -> Self {
        let state = Dialling::default();
        Self {
            captures,
            links,
            policy,
            remotes,
            peer_name,
            dial_timeout,
            transport,
            peer_gone_after,
            session,
            handshake_timeout,
            state,
        }
    }
}

impl Side {
    /// Something that the side waits for has happened.
    pub(super) async fn changed(&mut self) {
        let Self::Initiator(initiator) = self else { return std::future::pending().await };
        let open = !initiator.state.streams_full;
        tokio::select! {
            changed = initiator.links.changed() => {
                if changed.is_err() {
                    // The monitor has ended with the agent; the commands' end follows.
                    std::future::pending::<()>().await;
                }
            }
            () = initiator.captures.available(), if open => {}
        }
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        match self {
            Self::Initiator(initiator) => initiator.state.retry_at,
            Self::Responder(_) => None,
        }
    }

    pub(super) fn streams_available(&mut self) {
        if let Self::Initiator(initiator) = self {
            initiator.state.streams_full = false;
        }
    }

    pub(super) fn abort_tasks(&mut self) {
        match self {
            Self::Initiator(initiator) => {
                if let Some(attempt) = initiator.state.attempt.take() {
                    attempt.task.abort();
                }
                if let Some(task) = initiator.state.rejoining.take() {
                    task.abort();
                }
            }
            Self::Responder(responder) => responder.dials.abort_all(),
        }
    }
}

impl Driver {
    pub(super) fn side_changed(&mut self) {
        self.take_captures();
        self.links_changed();
    }

    fn take_captures(&mut self) {
        loop {
            let Side::Initiator(initiator) = &self.side else { return };
            let queue = Arc::clone(&initiator.captures);
            let Some(captured) = queue.pop() else { return };
            if let Err(captured) = self.open_captured(captured) {
                queue.push_front(captured);
                if let Side::Initiator(initiator) = &mut self.side {
                    initiator.state.streams_full = true;
                }
                return;
            }
        }
    }

    /// Drops transports whose link or address is gone, then asks the policy. The loss of the link
    /// in use leads straight to the next dial: no timer is in between.
    fn links_changed(&mut self) {
        let Side::Initiator(initiator) = &mut self.side else { return };
        let snapshot = Arc::clone(&initiator.links.borrow_and_update());
        if snapshot.version == initiator.state.seen_version {
            return;
        }
        let since = initiator.state.seen_version;
        initiator.state.seen_version = snapshot.version;
        // A link that came back deserves an attempt now, not after a backoff from its bad days.
        if snapshot.changes_since(since).any(|c| c.kind == ChangeKind::Gained) {
            initiator.state.history.clear();
            initiator.state.backoff = Duration::ZERO;
        }
        let active = self.session.active();
        let gone: Vec<Handle> =
            self.carriers.iter().filter(|(_, c)| !stands(&snapshot, &c.path)).map(|(&h, _)| h).collect();
        for handle in gone {
            let Some(path) = self.carriers.get(&handle).map(|c| c.path.clone()) else { continue };
            tracing::info!(link = %path.link, "the link is lost");
            self.drop_carrier(handle);
            if active == Some(handle) {
                let noticed =
                    snapshot.changes_since(since).find(|c| c.link == path.link && c.kind == ChangeKind::Lost);
                let noticed = noticed.map_or(snapshot.read_at, |c| c.at);
                self.report.begin(Move::hard(&path.link, "the link was lost", noticed));
            }
        }
        self.abandon_attempt_on_lost_link(&snapshot);
        self.decide();
    }

    fn abandon_attempt_on_lost_link(&mut self, snapshot: &LinkSnapshot) {
        let Side::Initiator(initiator) = &mut self.side else { return };
        let lost = |a: &Attempt| !snapshot.link(&a.choice.link).is_some_and(|l| l.state != LinkState::Unusable);
        if initiator.state.attempt.as_ref().is_some_and(lost) {
            if let Some(attempt) = initiator.state.attempt.take() {
                attempt.task.abort();
            }
        }
    }

    /// Asks the policy and dials what it says, unless that is under way or stands already.
    fn decide(&mut self) {
        let current = self.session.active().and_then(|h| self.carriers.get(&h)).map(|c| c.path.clone());
        let Side::Initiator(initiator) = &mut self.side else { return };
        if initiator.state.attempt.is_some() || initiator.state.rejoining.is_some() || self.session.is_ending() {
            return;
        }
        let snapshot = Arc::clone(&initiator.links.borrow());
        let now = Instant::now();
        let current = current.map(|p| Current { link: p.link, remote: p.remote, source: p.local.ip() });
        let history = &initiator.state.history;
        let decision = choose(&snapshot, &initiator.policy, current.as_ref(), &initiator.remotes, history, now);
        initiator.state.retry_at = decision.retry_at;
        let Some(to) = decision.dial else { return };
        tracing::info!(link = %to.link, remote = %to.remote, reason = %decision.reason, "dialling a transport");
        if let Some(current) = &current {
            self.report.begin(Move::soft(&current.link, &decision.reason));
        }
        self.start_attempt(to);
    }

    fn start_attempt(&mut self, choice: Choice) {
        let Side::Initiator(initiator) = &mut self.side else { return };
        let spec = DialSpec {
            device: Some(choice.link.clone()),
            source: Some(choice.source),
            remote: choice.remote,
            timeout: initiator.dial_timeout,
        };
        let (options, internal, outcome) = (initiator.transport.clone(), self.internal_tx.clone(), choice.clone());
        let task = tokio::spawn(async move {
            let result = dial(&spec, &options).await;
            // The driver may have ended meanwhile; then the socket ends here.
            let _ = internal.send(Internal::Dialled(Dialled { choice: outcome, result }));
        });
        initiator.state.attempt = Some(Attempt { choice, task: task.abort_handle() });
    }

    pub(super) fn dialled(&mut self, dialled: Dialled) {
        let Side::Initiator(initiator) = &mut self.side else { return };
        let Dialled { choice, result } = dialled;
        // An attempt that was abandoned may have finished just before.
        if initiator.state.attempt.as_ref().is_none_or(|a| a.choice != choice) {
            return;
        }
        initiator.state.attempt = None;
        match result {
            Ok(stream) => self.resume_on(&choice, stream),
            Err(error) => {
                tracing::info!(link = %choice.link, remote = %choice.remote, %error, "a dial failed");
                let refused = error.is_refused();
                self.path_failed(&choice.link, choice.remote, refused);
                self.decide();
            }
        }
    }

    /// The socket is connected: RESUME and all that is unacknowledged go out in the same turn.
    fn resume_on(&mut self, choice: &Choice, stream: TcpStream) {
        let local = stream.local_addr().unwrap_or_else(|_| SocketAddr::new(choice.source, 0));
        let path = Path { link: choice.link.clone(), local, remote: choice.remote };
        let resent = self.session.stats();
        match self.session.dial(false) {
            Ok(handle) => {
                self.report.dialled(&path.link, &resent, &self.session.stats());
                self.add_carrier(handle, stream, BytesMut::new(), path);
            }
            Err(fault) => tracing::debug!(%fault, "a dialled transport is not needed any more"),
        }
    }

    fn path_failed(&mut self, link: &str, remote: SocketAddr, refused: bool) {
        let Side::Initiator(initiator) = &mut self.side else { return };
        let now = Instant::now();
        let state = &mut initiator.state;
        state.backoff = (state.backoff * 2).clamp(BACKOFF_FIRST, BACKOFF_MAX);
        state.history.failed(link, remote, now, state.backoff);
        if refused {
            state.refused_since.get_or_insert(now);
        } else {
            state.refused_since = None;
        }
        if state.refused_since.is_some_and(|since| now >= since + initiator.peer_gone_after) {
            tracing::error!(peer = %initiator.peer_name, "every path was refused: the peer is gone");
            self.ended.get_or_insert(Ended::PeerGone);
        }
    }

    /// A transport ended without its link's being lost.
    pub(super) fn after_loss(&mut self, path: &Path, was_active: bool, was_up: bool, end: &CarrierEnd) {
        if !matches!(self.side, Side::Initiator(_)) {
            return;
        }
        if was_active {
            self.report.begin(Move::hard(&path.link, &end.to_string(), Instant::now()));
        }
        match end {
            CarrierEnd::Fault(TransportFault::Refused(Status::UnknownSession)) => self.rejoin(path),
            // One that had stood says nothing against its path: dial again at once.
            _ if was_up => self.decide(),
            CarrierEnd::Fault(TransportFault::Refused(_)) => {
                self.path_failed(&path.link, path.remote, true);
                self.decide();
            }
            _ => {
                self.path_failed(&path.link, path.remote, false);
                self.decide();
            }
        }
    }

    pub(super) fn side_deadline(&mut self, now: Instant) {
        let Side::Initiator(initiator) = &mut self.side else { return };
        if initiator.state.retry_at.is_some_and(|t| now >= t) {
            initiator.state.retry_at = None;
            self.decide();
        }
    }

    pub(super) fn transport_up(&mut self, handle: Handle) {
        let Some(carrier) = self.carriers.get_mut(&handle) else { return };
        carrier.must_be_up_by = None;
        let link = carrier.path.link.clone();
        let Side::Initiator(initiator) = &mut self.side else { return };
        initiator.state.history.clear();
        initiator.state.backoff = Duration::ZERO;
        initiator.state.refused_since = None;
        self.report.up(&link);
        // The new one carries: the old ones say goodbye when their last record is acknowledged.
        let old: Vec<Handle> = self.session.transports().filter(|h| *h != handle).collect();
        if self.session.active() == Some(handle) {
            for other in old {
                self.session.retire(other);
            }
        }
        self.decide();
    }

    /// "Unknown session" is a hint that anybody on the path could send. A full handshake tells.
    fn rejoin(&mut self, path: &Path) {
        let Side::Initiator(initiator) = &mut self.side else { return };
        if initiator.state.rejoining.is_some() {
            return;
        }
        tracing::warn!(peer = %initiator.peer_name, "the peer does not know the session: asking it in a full handshake");
        let request = establish::Request {
            identity: Arc::clone(&self.common.identity),
            peer_name: initiator.peer_name.clone(),
            choice: Choice {
                link: path.link.clone(),
                source: path.local.ip(),
                remote: path.remote,
                reason: String::new(),
            },
            dial_timeout: initiator.dial_timeout,
            handshake_timeout: initiator.handshake_timeout,
            transport: initiator.transport.clone(),
            session: initiator.session.clone(),
            continues: Some((self.session.id(), self.session.next_counter())),
        };
        let internal = self.internal_tx.clone();
        let task = tokio::spawn(async move {
            let result = establish::initiate(request).await.map(Box::new);
            // The driver may have ended meanwhile; then the new session ends here.
            let _ = internal.send(Internal::Rejoined(result));
        });
        initiator.state.rejoining = Some(task.abort_handle());
    }

    pub(super) fn rejoined(&mut self, result: Result<Box<Established>, EstablishError>) {
        let Side::Initiator(initiator) = &mut self.side else { return };
        initiator.state.rejoining = None;
        match result {
            Ok(new) if new.session.peer().continued == Some(true) => {
                tracing::info!("the peer still holds the session: resuming it");
                self.decide();
            }
            Ok(new) => {
                tracing::error!(peer = %initiator.peer_name, "the peer no longer knows the session: its streams are reset");
                self.ended.get_or_insert(Ended::Replaced(new));
            }
            Err(error) => {
                tracing::warn!(%error, "the full handshake failed");
                let refused = error.is_refused();
                let remote = initiator.remotes.first().copied();
                if let Some(remote) = remote {
                    self.path_failed("", remote, refused);
                }
                if let Side::Initiator(initiator) = &mut self.side {
                    initiator.state.retry_at = Some(Instant::now() + initiator.state.backoff);
                }
            }
        }
    }

    /// The operator names a link; an empty name gives the choice back to the policy.
    pub(super) fn manual_handover(&mut self, link: String, reply: oneshot::Sender<Result<String, String>>) {
        let answer = self.try_manual_handover(link);
        // Whoever asked may have gone; what was asked is done all the same.
        let _ = reply.send(answer);
    }

    fn try_manual_handover(&mut self, link: String) -> Result<String, String> {
        let Side::Initiator(initiator) = &mut self.side else {
            return Err("the peer chooses the link of this session: ask it there".to_owned());
        };
        if link.is_empty() {
            initiator.policy.manual = None;
            self.decide();
            return Ok("the policy chooses the link".to_owned());
        }
        let snapshot = Arc::clone(&initiator.links.borrow());
        let Some(found) = snapshot.link(&link) else { return Err(format!("there is no link {link}")) };
        let reasons: Vec<String> =
            initiator.remotes.iter().filter_map(|r| found.usable_for(r.ip()).err()).map(|e| e.to_string()).collect();
        if reasons.len() == initiator.remotes.len() {
            return Err(format!("{link} cannot be used: {}", reasons.join("; ")));
        }
        initiator.policy.manual = Some(link.clone());
        initiator.state.history.clear();
        self.decide();
        Ok(format!("moving to {link}; `holdfast handover auto` gives the choice back to the policy"))
    }
}

/// Whether a transport's link still has what the transport is bound to.
fn stands(snapshot: &LinkSnapshot, path: &Path) -> bool {
    if path.link.is_empty() {
        return true;
    }
    snapshot.link(&path.link).is_some_and(|link| link.state != LinkState::Unusable && link.holds(path.local.ip()))
}
