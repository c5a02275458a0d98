//! Streams: captured sockets become streams on one side, targets are dialled on the other.

use std::sync::Arc;
use std::time::Duration;

use session_proto::session::{StreamError, StreamId};
use session_proto::wire::{Service, Target};

use tokio::sync::watch;

use super::{Driver, Internal, Side};
use crate::capture::Captured;
use crate::dial::{AllowList, dial_target};
use crate::link::LinkSnapshot;

/// What a unit that accepts sessions needs to dial for others.
pub struct Responder {
    /// Who may go where.
    pub allow: Arc<AllowList>,
    /// Time for one target to answer.
    pub dial_timeout: Duration,
    /// The links: a transport ends with the one that holds its address.
    pub links: watch::Receiver<Arc<LinkSnapshot>>,
    pub(super) seen_version: u64,
    /// The dials under way end with the driver.
    pub(super) dials: tokio::task::JoinSet<()>,
}

impl Responder {
    /// A responder without dials under way.
    pub fn new(
        allow: Arc<AllowList>,
        dial_timeout: Duration,
        links: watch::Receiver<Arc<LinkSnapshot>>,
    ) -> Self {
        Self {
            allow,
            dial_timeout,
            links,
            seen_version: 0,
            dials: tokio::task::JoinSet::new(),
        }
    }
}

impl Driver {
    /// A captured socket becomes a stream. It gets back its socket if there is no room for it yet.
    pub(super) fn open_captured(&mut self, captured: Captured) -> Result<(), Captured> {
        let target = Target::Addr(captured.original);
        let service = match &self.side {
            Side::Initiator(initiator) => {
                let cgroup = || crate::capture::cgroup::name_of(captured.cgroup);
                initiator.config.services.choose(captured.original, cgroup)
            }
            Side::Responder(_) => Service::default(),
        };
        match self.session.open_with(target, service) {
            Ok(id) => {
                tracing::debug!(stream = id, app = %captured.app, target = %captured.original, "captured");
                self.report.opened += 1;
                self.add_app(id, captured.socket, captured.original.to_string(), false);
                self.tend_lanes();
                Ok(())
            }
            Err(StreamError::TooMany | StreamError::NotOpen) => Err(captured),
            Err(error) => {
                tracing::warn!(%error, target = %captured.original, "a captured connection is reset");
                Ok(())
            }
        }
    }

    /// The peer asks for a target.
    pub(super) fn stream_opened(&mut self, id: StreamId, target: Target) {
        let peer = self.peer.name.to_string();
        let Side::Responder(responder) = &mut self.side else {
            tracing::warn!(%peer, %target, "this unit dials for nobody: the peer's stream is refused");
            return self.session.refuse(id, libc::EACCES.unsigned_abs().into());
        };
        self.report.opened += 1;
        let (allow, timeout) = (Arc::clone(&responder.allow), responder.dial_timeout);
        let internal = self.internal_tx.clone();
        while responder.dials.try_join_next().is_some() {}
        responder.dials.spawn(async move {
            let result = dial_target(&peer, &target, &allow, timeout).await;
            // The driver may have ended meanwhile; then the socket ends here.
            let _ = internal.send(Internal::Target { id, result });
        });
    }

    pub(super) fn target_dialled(
        &mut self,
        id: StreamId,
        result: Result<tokio::net::TcpStream, crate::dial::DialError>,
    ) {
        match result {
            Ok(socket) if self.session.streams().any(|s| s == id) => {
                let target = socket
                    .peer_addr()
                    .map(|a| a.to_string())
                    .unwrap_or_default();
                self.session.connected(id);
                self.add_app(id, socket, target, true);
            }
            // The application gave up first.
            Ok(_) => {}
            Err(error) => {
                if matches!(error, crate::dial::DialError::Denied(_)) {
                    tracing::warn!(stream = id, "{error}");
                } else {
                    tracing::info!(peer = %self.peer.name, stream = id, %error, "a target could not be connected");
                }
                self.session.refuse(id, error.errno().unsigned_abs().into());
            }
        }
    }

    pub(super) fn stream_connected(&mut self, id: StreamId) {
        if let Some(app) = self.apps.get_mut(&id) {
            app.connected = true;
        }
    }

    pub(super) fn stream_refused(&mut self, id: StreamId, errno: u64) {
        if let Some(app) = self.apps.get(&id) {
            let error =
                std::io::Error::from_raw_os_error(i32::try_from(errno).unwrap_or(libc::ECONNRESET));
            tracing::info!(target = %app.target, %error, "the peer could not connect the target");
        }
        self.app_reset(id);
    }

    pub(super) fn stream_reset(&mut self, id: StreamId, code: u64) {
        tracing::debug!(stream = id, code, "the peer reset a stream");
        self.app_reset(id);
    }
}
