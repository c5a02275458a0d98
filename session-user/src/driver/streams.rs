//! Streams: captured sockets become streams on one side, targets are dialled on the other.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use session_proto::session::{StreamError, StreamId};
use session_proto::wire::{Service, Target};

use tokio::sync::{oneshot, watch};

use super::{ChoreId, Driver, Internal, Listening, Side};
use crate::dial::{AllowList, Caller, dial_target};
use crate::link::LinkSnapshot;
use crate::requests::{AppStream, Asker, StreamRequest, Supply};

/// A stream whose application waits for the target's answer.
pub(super) struct Awaiting {
    /// Takes what the target said to the task that waits for it on the application's behalf; none once it has.
    verdict: Option<oneshot::Sender<Result<(), i32>>>,
    /// What the stream leads to, for reports.
    pub target: Target,
}

/// What a unit that accepts sessions needs to dial for others.
pub struct Responder {
    /// The peer, as one for whom targets are dialled.
    pub caller: Arc<Caller>,
    /// Who may go where.
    pub allow: Arc<AllowList>,
    /// Time for one target to answer.
    pub dial_timeout: Duration,
    /// The links: a transport ends with the one that holds its address.
    pub links: watch::Receiver<Arc<LinkSnapshot>>,
    /// UDP, where the unit has it.
    pub listening: Option<Listening>,
    pub(super) seen_version: u64,
    /// The dials under way: a stream that is reset is not dialled for any more.
    pub(super) dialling: BTreeMap<StreamId, ChoreId>,
}

impl Responder {
    /// A responder without dials under way.
    pub fn new(
        caller: Caller,
        allow: Arc<AllowList>,
        dial_timeout: Duration,
        links: watch::Receiver<Arc<LinkSnapshot>>,
    ) -> Self {
        Self {
            caller: Arc::new(caller),
            allow,
            dial_timeout,
            links,
            listening: None,
            seen_version: 0,
            dialling: BTreeMap::new(),
        }
    }

    /// For whom targets are dialled, and which.
    pub(super) fn for_whom(&self) -> (Arc<Caller>, Arc<AllowList>) {
        (Arc::clone(&self.caller), Arc::clone(&self.allow))
    }
}

impl Driver {
    /// What an application asks for becomes a stream. It comes back if there is no room for it yet.
    pub(super) fn open_requested(
        &mut self,
        request: StreamRequest,
    ) -> Result<(), Box<StreamRequest>> {
        let service = match &self.side {
            Side::Initiator(initiator) => {
                let cgroup = || crate::capture::cgroup::name_of(request.cgroup?);
                initiator.config.services.choose(&request.target, cgroup)
            }
            Side::Responder(_) => Service::default(),
        };
        match self.session.open_with(request.target.clone(), service) {
            Ok(id) => {
                tracing::debug!(stream = id, app = %request.app, target = %request.target, "opened");
                self.report.opened += 1;
                match request.supply {
                    Supply::Connected(socket) => self.add_app(id, socket, request.target, false),
                    Supply::Waiting(asker) => self.await_target(id, asker, request.target),
                }
                self.tend_lanes();
                Ok(())
            }
            Err(StreamError::TooMany | StreamError::NotOpen) => Err(Box::new(request)),
            Err(error) => {
                tracing::warn!(%error, target = %request.target, "a connection is not carried");
                Ok(())
            }
        }
    }

    /// The application's socket comes when the target has answered.
    fn await_target(&mut self, id: StreamId, asker: Asker, target: Target) {
        let (verdict, heard) = oneshot::channel();
        let awaiting = Awaiting {
            verdict: Some(verdict),
            target,
        };
        self.awaiting.insert(id, awaiting);
        self.begin(seat(id, asker, heard));
    }

    /// The application's socket for a stream whose target is connected; none if it has given up.
    pub(super) fn seated(&mut self, id: StreamId, socket: Option<AppStream>) {
        let awaiting = self.awaiting.remove(&id);
        match (socket, awaiting) {
            (Some(socket), Some(awaiting)) if self.session.has_stream(id) => {
                self.add_app(id, socket, awaiting.target, true);
                // Only now does it count among those that want a lane.
                self.tend_lanes();
                self.app_write(id);
            }
            // The stream was reset meanwhile, and so is the socket.
            (Some(_), _) => {}
            (None, awaiting) => {
                let target = awaiting.map(|a| tracing::field::display(a.target));
                tracing::debug!(stream = id, target, "the application gave up");
                self.session
                    .abort(id, libc::ECONNRESET.unsigned_abs().into());
                self.lanes_may_go();
            }
        }
    }

    /// The peer asks for a target.
    pub(super) fn stream_opened(&mut self, id: StreamId, target: Target) {
        let Side::Responder(responder) = &mut self.side else {
            let peer = &self.peer.name;
            tracing::warn!(%peer, %target, "this unit dials for nobody: the peer's stream is refused");
            return self.session.refuse(id, libc::EACCES.unsigned_abs().into());
        };
        self.report.opened += 1;
        let (allow, timeout) = (Arc::clone(&responder.allow), responder.dial_timeout);
        let caller = Arc::clone(&responder.caller);
        let links = Arc::clone(&responder.links.borrow());
        let dial = self.begin(async move {
            let is_own = |ip| links.links.iter().any(|link| link.holds(ip));
            let result = dial_target(&caller, is_own, &target, &allow, timeout).await;
            Some(Internal::Target { id, target, result })
        });
        if let Side::Responder(responder) = &mut self.side {
            responder.dialling.insert(id, dial);
        }
    }

    pub(super) fn target_dialled(
        &mut self,
        id: StreamId,
        target: Target,
        result: Result<AppStream, crate::dial::DialError>,
    ) {
        if let Side::Responder(responder) = &mut self.side {
            responder.dialling.remove(&id);
        }
        match result {
            Ok(socket) if self.session.has_stream(id) => {
                // Which of its addresses it was.
                let target = socket.peer_addr().map_or(target, Target::Addr);
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
        if let Some(awaiting) = self.awaiting.get_mut(&id) {
            // Whoever asked may have gone, and then says so by itself.
            let _ = awaiting.verdict.take().map(|verdict| verdict.send(Ok(())));
        } else if let Some(app) = self.apps.get_mut(&id) {
            app.connected = true;
        }
    }

    pub(super) fn stream_refused(&mut self, id: StreamId, errno: u64) {
        if let Some(awaiting) = self.awaiting.remove(&id) {
            let errno = i32::try_from(errno).unwrap_or(libc::ECONNREFUSED);
            tracing::debug!(stream = id, errno, "the peer could not connect the target");
            // As above.
            let _ = awaiting.verdict.map(|verdict| verdict.send(Err(errno)));
            return self.lanes_may_go();
        }
        if let Some(app) = self.apps.get(&id) {
            let error =
                std::io::Error::from_raw_os_error(i32::try_from(errno).unwrap_or(libc::ECONNRESET));
            tracing::info!(target = %app.target, %error, "the peer could not connect the target");
        }
        self.app_reset(id);
    }

    pub(super) fn stream_reset(&mut self, id: StreamId, code: u64) {
        tracing::debug!(stream = id, code, "the peer reset a stream");
        if let Some(awaiting) = self.awaiting.remove(&id) {
            // As above. A peer that resets what it never connected has given up for reasons of its own.
            let unknown = Err(libc::EHOSTUNREACH);
            let _ = awaiting.verdict.map(|verdict| verdict.send(unknown));
            self.lanes_may_go();
        }
        if let Side::Responder(responder) = &mut self.side
            && let Some(dial) = responder.dialling.remove(&id)
        {
            self.chores.give_up(dial);
        }
        self.app_reset(id);
    }
}

/// Waits for what the target says and brings the application's socket, or that there will be none.
async fn seat(
    id: StreamId,
    mut asker: Asker,
    verdict: oneshot::Receiver<Result<(), i32>>,
) -> Option<Internal> {
    let verdict = tokio::select! {
        verdict = verdict => verdict,
        () = asker.gone() => Ok(Ok(())),
    };
    match verdict {
        Ok(Ok(())) => {
            let socket = asker.connected().await;
            return Some(Internal::Seated { id, socket });
        }
        Ok(Err(errno)) => asker.refused(errno),
        // The session has ended, which dropping the asker tells.
        Err(_) => {}
    }
    None
}
