//! The initiator's side: which link carries the session, and the dialling that follows from it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use session_proto::session::{Handle, TransportFault};
use session_proto::wire::Status;
use tokio::net::TcpStream;

use super::carrier::{CarrierEnd, Path};
use super::initiator::Attempt;
use super::report::Move;
use super::{Driver, Ended, Internal, Side};
use crate::link::{ChangeKind, LinkSnapshot, LinkState};
use crate::policy::{self, Action, choose};
use crate::transport::{DialSpec, TransportError, dial};

/// First and longest wait between attempts when every path has failed.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// The outcome of one TCP connection attempt.
pub(super) struct Dialled {
    path: policy::Path,
    result: Result<TcpStream, TransportError>,
}

impl Side {
    /// Something that the side waits for has happened.
    pub(super) async fn changed(&mut self) {
        let Self::Initiator(initiator) = self else {
            return std::future::pending().await;
        };
        let open = !initiator.streams_full;
        tokio::select! {
            changed = initiator.config.links.changed() => {
                if changed.is_err() {
                    // The monitor has ended with the agent; the commands' end follows.
                    std::future::pending::<()>().await;
                }
            }
            () = initiator.config.captures.available(), if open => {}
        }
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        match self {
            Self::Initiator(initiator) => initiator.retry_at,
            Self::Responder(_) => None,
        }
    }

    pub(super) fn streams_available(&mut self) {
        if let Self::Initiator(initiator) = self {
            initiator.streams_full = false;
        }
    }

    pub(super) fn abort_tasks(&mut self) {
        match self {
            Self::Initiator(initiator) => {
                initiator.abandon_attempt();
                if let Some(task) = initiator.rejoining.take() {
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
            let Side::Initiator(initiator) = &self.side else {
                return;
            };
            let queue = Arc::clone(&initiator.config.captures);
            let Some(captured) = queue.pop() else { return };
            if let Err(captured) = self.open_captured(captured) {
                queue.push_front(captured);
                if let Side::Initiator(initiator) = &mut self.side {
                    initiator.streams_full = true;
                }
                return;
            }
        }
    }

    /// Drops transports whose link or address is gone, then asks the policy. The loss of the link
    /// in use leads straight to the next dial: no timer is in between.
    fn links_changed(&mut self) {
        let Side::Initiator(initiator) = &mut self.side else {
            return;
        };
        let snapshot = Arc::clone(&initiator.config.links.borrow_and_update());
        if snapshot.version == initiator.seen_version {
            return;
        }
        let since = initiator.seen_version;
        initiator.seen_version = snapshot.version;
        // A link that came back deserves an attempt now, not after a backoff from its bad days.
        if snapshot
            .changes_since(since)
            .any(|c| c.kind == ChangeKind::Gained)
        {
            initiator.forgive();
            initiator.retry_at = None;
        }
        let lost_attempt = initiator
            .attempt
            .as_ref()
            .is_some_and(|a| !link_stands(&snapshot, &a.path.link));
        if lost_attempt {
            initiator.abandon_attempt();
        }
        self.drop_lost(&snapshot, since);
        self.decide();
    }

    fn drop_lost(&mut self, snapshot: &LinkSnapshot, since: u64) {
        let active = self.session.active();
        let gone: Vec<(Handle, Path)> = self
            .carriers
            .iter()
            .filter(|(_, c)| !stands(snapshot, &c.path))
            .map(|(&h, c)| (h, c.path.clone()))
            .collect();
        for (handle, path) in gone {
            tracing::info!(link = %path.link, "the link is lost");
            self.drop_carrier(handle);
            if active == Some(handle) {
                let lost = snapshot
                    .changes_since(since)
                    .find(|c| c.link == path.link && c.kind == ChangeKind::Lost);
                let noticed = lost.map_or(snapshot.read_at, |c| c.at);
                self.report
                    .begin(Move::hard(&path.link, "the link was lost", noticed));
            }
        }
    }

    /// Asks the policy and dials what it says, unless a dial is under way or none is needed.
    pub(super) fn decide(&mut self) {
        let current = self.current_path();
        let Side::Initiator(initiator) = &mut self.side else {
            return;
        };
        if initiator.attempt.is_some() || initiator.rejoining.is_some() || self.session.is_ending()
        {
            return;
        }
        // After a round of failures nothing is tried before its time, unless the links change.
        if initiator.retry_at.is_some() {
            return;
        }
        let snapshot = Arc::clone(&initiator.config.links.borrow());
        let (policy, remotes) = (&initiator.config.policy, &initiator.config.remotes);
        let decision = choose(
            &snapshot,
            policy,
            current.as_ref(),
            remotes,
            &initiator.history,
            Instant::now(),
        );
        initiator.pending.clear();
        initiator.round_refused = true;
        match decision.action {
            Action::Stay | Action::Hold => return,
            Action::HardHandover { to } => {
                let others = decision
                    .ordered
                    .into_iter()
                    .map(|c| c.path)
                    .filter(|p| *p != to);
                initiator
                    .pending
                    .extend(std::iter::once(to.clone()).chain(others));
            }
            Action::Return { to } => {
                initiator.pending.push_back(to);
                if let Some(current) = &current {
                    self.report
                        .begin(Move::soft(&current.link, &decision.reason));
                }
            }
        }
        tracing::info!(reason = %decision.reason, "dialling a transport");
        self.next_attempt();
    }

    fn current_path(&self) -> Option<policy::Path> {
        let carrier = self.carriers.get(&self.session.active()?)?;
        let path = &carrier.path;
        Some(policy::Path {
            link: path.link.clone(),
            source: path.local.ip(),
            remote: path.remote,
        })
    }

    /// Dials the next path of the round; after the last, waits before the next round.
    fn next_attempt(&mut self) {
        let internal = self.internal_tx.clone();
        let Side::Initiator(initiator) = &mut self.side else {
            return;
        };
        let Some(path) = initiator.pending.pop_front() else {
            return self.round_over();
        };
        let config = &initiator.config;
        let spec = DialSpec {
            device: Some(path.link.clone()),
            source: Some(path.source),
            remote: path.remote,
            timeout: config.dial_timeout,
        };
        let (options, outcome) = (config.transport.clone(), path.clone());
        let task = tokio::spawn(async move {
            let result = dial(&spec, &options).await;
            // The driver may have ended meanwhile; then the socket ends here.
            let _ = internal.send(Internal::Dialled(Dialled {
                path: outcome,
                result,
            }));
        });
        initiator.attempt = Some(Attempt {
            path,
            task: task.abort_handle(),
        });
    }

    /// No path of the round worked.
    fn round_over(&mut self) {
        let Side::Initiator(initiator) = &mut self.side else {
            return;
        };
        let now = Instant::now();
        initiator.backoff = (initiator.backoff * 2).clamp(BACKOFF_FIRST, BACKOFF_MAX);
        initiator.retry_at = Some(now + initiator.backoff);
        let alone = self.session.active().is_none();
        if !(alone && initiator.round_refused) {
            initiator.refused_since = None;
            return;
        }
        let since = *initiator.refused_since.get_or_insert(now);
        if now >= since + initiator.config.peer_gone_after {
            tracing::error!(peer = %initiator.config.peer_name, "every path was refused: the peer is gone");
            self.ended.get_or_insert(Ended::PeerGone);
        }
    }

    pub(super) fn dialled(&mut self, dialled: Dialled) {
        let Side::Initiator(initiator) = &mut self.side else {
            return;
        };
        let Dialled { path, result } = dialled;
        // An attempt that was abandoned may have finished just before.
        if initiator.attempt.as_ref().is_none_or(|a| a.path != path) {
            return;
        }
        initiator.attempt = None;
        match result {
            Ok(stream) => self.resume_on(&path, stream),
            Err(error) => {
                tracing::info!(%path, %error, "a dial failed");
                self.path_failed(&path.link, path.remote, error.is_refused());
            }
        }
    }

    /// The socket is connected: RESUME and all that is unacknowledged go out in the same turn.
    fn resume_on(&mut self, path: &policy::Path, stream: TcpStream) {
        let local = stream
            .local_addr()
            .unwrap_or_else(|_| SocketAddr::new(path.source, 0));
        let path = Path {
            link: path.link.clone(),
            local,
            remote: path.remote,
        };
        let before = self.session.stats();
        match self.session.dial(false) {
            Ok(handle) => {
                self.report
                    .dialled(&path.link, &before, &self.session.stats());
                self.add_carrier(handle, stream, BytesMut::new(), path);
            }
            Err(fault) => tracing::debug!(%fault, "a dialled transport is not needed any more"),
        }
    }

    pub(super) fn path_failed(&mut self, link: &str, remote: SocketAddr, refused: bool) {
        let Side::Initiator(initiator) = &mut self.side else {
            return;
        };
        initiator
            .history
            .record_failure(link, remote, Instant::now());
        initiator.round_refused &= refused;
        if initiator.attempt.is_none() && initiator.rejoining.is_none() {
            self.next_attempt();
        }
    }

    /// A transport ended without its link's being lost.
    pub(super) fn after_loss(
        &mut self,
        path: &Path,
        was_active: bool,
        was_up: bool,
        end: &CarrierEnd,
    ) {
        if !matches!(self.side, Side::Initiator(_)) {
            return;
        }
        if was_active {
            self.report
                .begin(Move::hard(&path.link, &end.to_string(), Instant::now()));
        }
        match end {
            CarrierEnd::Fault(TransportFault::Refused(Status::UnknownSession)) => self.rejoin(path),
            // One that had stood says nothing against its path: dial again at once.
            _ if was_up => self.decide(),
            // What comes in clear, or breaks, proves nothing about the peer: anybody on the path can
            // do it. It costs an attempt, and never counts as the peer's refusal.
            _ => self.path_failed(&path.link, path.remote, false),
        }
    }

    pub(super) fn side_deadline(&mut self, now: Instant) {
        let Side::Initiator(initiator) = &mut self.side else {
            return;
        };
        if initiator.retry_at.is_some_and(|t| now >= t) {
            initiator.retry_at = None;
            self.decide();
        }
    }

    pub(super) fn transport_up(&mut self, handle: Handle) {
        let Some(carrier) = self.carriers.get_mut(&handle) else {
            return;
        };
        carrier.must_be_up_by = None;
        let link = carrier.path.link.clone();
        let Side::Initiator(initiator) = &mut self.side else {
            return;
        };
        initiator.forgive();
        self.report.up(&link);
        // The new one carries: the old ones say goodbye when their last record is acknowledged.
        if self.session.active() == Some(handle) {
            let old: Vec<Handle> = self.session.transports().filter(|h| *h != handle).collect();
            for other in old {
                self.session.retire(other);
            }
        }
        self.decide();
    }
}

fn link_stands(snapshot: &LinkSnapshot, name: &str) -> bool {
    snapshot
        .link(name)
        .is_some_and(|link| link.state != LinkState::Unusable)
}

/// Whether a transport's link still has what the transport is bound to.
fn stands(snapshot: &LinkSnapshot, path: &Path) -> bool {
    path.link.is_empty()
        || (link_stands(snapshot, &path.link)
            && snapshot
                .link(&path.link)
                .is_some_and(|link| link.holds(path.local.ip())))
}
