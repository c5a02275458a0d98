//! Attempts: one to find what carries, one for a standby.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use session_proto::session::Handle;
use tokio::net::TcpStream;

use super::carrier::{Carrier, Path};
use super::handover::Move;
use super::initiator::Attempt;
use super::opening::Opening;
use super::{Driver, Ended, Internal, Side};
use crate::policy;
use crate::transport::{DialSpec, TransportError, dial, tcp_info};

/// First and longest wait between attempts when every path has failed.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// The outcome of one TCP connection attempt.
pub(super) struct Dialled {
    number: u64,
    result: Result<TcpStream, TransportError>,
}

impl Driver {
    /// Dials the next path of the round; after the last, waits before the next round.
    pub(super) fn next_attempt(&mut self) {
        let own = self.current_path();
        let Side::Initiator(initiator) = &mut self.side else {
            return;
        };
        let Some(path) = initiator.pending.pop_front() else {
            return self.round_over();
        };
        // It is the path of a silent transport, which may only be slow.
        if own.as_ref() == Some(&path)
            && let Some(at) = initiator.same_path_at.filter(|at| Instant::now() < *at)
        {
            initiator.retry_at = Some(at);
            return;
        }
        // A standby that is being dialled there serves as well.
        let under_way = (initiator.standby_attempt).take_if(|a| a.path == path && a.lane == 0);
        let attempt = under_way.unwrap_or_else(|| self.start(path, 0));
        self.report.dialling(false);
        if let Side::Initiator(initiator) = &mut self.side {
            initiator.attempt = Some(attempt);
        }
    }

    /// Dials `to` beside what carries now, unless that is being done already. `lane` is 0 for a standby.
    /// True if it does.
    pub(super) fn attempt_beside(&mut self, to: policy::Path, lane: u64, reason: &str) -> bool {
        let there = |(h, c): (&Handle, &Carrier)| {
            let same = self.session.route(*h).is_some_and(|r| r.lane == lane);
            same && c.path.link == to.link && c.path.remote == to.remote
        };
        let Side::Initiator(initiator) = &self.side else {
            return false;
        };
        if initiator.standby_attempt.is_some()
            || initiator.attempt.is_some()
            || self.carriers.iter().any(|(h, c)| there((h, c)))
        {
            return false;
        }
        tracing::info!(path = %to, lane, reason, "dialling a transport beside the one in use");
        let attempt = self.start(to, lane);
        if let Side::Initiator(initiator) = &mut self.side {
            initiator.standby_attempt = Some(attempt);
        }
        true
    }

    fn start(&mut self, path: policy::Path, lane: u64) -> Attempt {
        self.judge_silent(&path);
        let internal = self.internal_tx.clone();
        self.attempts += 1;
        let number = self.attempts;
        let spec = DialSpec {
            device: Some(path.link.clone()),
            source: Some(path.source),
            remote: path.remote,
            timeout: self.side.dial_timeout(),
            segment: self.side.segment(&path.link, path.remote),
            // What goes in a SYN may come twice: RESUME's counter is taken once, and a record's number.
            // It is asked for a standby as well, which brings the cookie, and shows what the path does
            // with it while nobody waits.
            fast_open: self.side.fast_open(&path.link, path.remote),
        };
        let options = self.common.transport.clone();
        if let Some(window) = &self.common.window {
            let known = self.side.known_window(&path.link, path.remote.ip());
            window.before_dial(path.source, path.remote, known);
        }
        let dialled = spec.clone();
        let task = tokio::spawn(async move {
            let result = dial(&dialled, &options).await;
            // The driver may have ended meanwhile; then the socket ends here.
            let _ = internal.send(Box::new(Internal::Dialled(Dialled { number, result })));
        });
        Attempt {
            number,
            path,
            lane,
            spec,
            task: task.abort_handle(),
        }
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
        let Dialled { number, result } = dialled;
        let ours = |a: &mut Attempt| a.number == number;
        let carrying = initiator.attempt.take_if(ours);
        let standby = carrying.is_none();
        // An attempt that was abandoned may have finished just before.
        let Some(attempt) = carrying.or_else(|| initiator.standby_attempt.take_if(ours)) else {
            return;
        };
        match result {
            Ok(stream) => self.resume_on(attempt, stream),
            Err(error) => {
                let path = &attempt.path;
                tracing::info!(%path, %error, "a dial failed");
                if attempt.spec.fast_open {
                    // There was no cookie; the question for one may be what did not pass.
                    (initiator.history).record_unopened(&path.link, path.remote, Instant::now());
                } else {
                    initiator.history.record_dead(&path.link, path.remote);
                }
                self.path_failed(&path.link, path.remote, error.is_refused(), standby);
            }
        }
    }

    /// The socket is connected, or will be with its first bytes. If nothing carries, RESUME and all that is
    /// unacknowledged go out in the same turn; otherwise it becomes a standby.
    fn resume_on(&mut self, attempt: Attempt, stream: TcpStream) {
        let Attempt {
            path, lane, spec, ..
        } = attempt;
        let local = stream
            .local_addr()
            .unwrap_or_else(|_| SocketAddr::new(path.source, 0));
        let path = Path {
            link: path.link,
            local,
            remote: path.remote,
        };
        let opening = tcp_info(&stream).is_ok_and(|info| info.is_opening());
        let active = self.session.active();
        let works = |h| self.session.is_up(h) && !self.session.is_silent(h);
        let standby = active.is_some_and(works);
        let before = self.session.stats();
        if let Some(silent) = active.filter(|h| self.session.is_silent(*h))
            && let Some(carrier) = self.carriers.get(&silent)
        {
            let suspicion = self.report.suspected();
            self.report.begin(Move::silent(&carrier.path, &suspicion));
            self.doom(silent);
        }
        let Side::Initiator(initiator) = &mut self.side else {
            return;
        };
        let route = initiator.route(&path.link, path.remote, lane);
        match self.session.dial_over(route, standby) {
            Ok(handle) => {
                self.add_carrier(handle, stream, BytesMut::new(), path);
                if opening {
                    self.await_opening(handle, Opening { spec, standby });
                }
                if !standby {
                    self.moved(&before);
                }
            }
            Err(fault) => tracing::debug!(%fault, "a dialled transport is not needed any more"),
        }
    }

    pub(super) fn path_failed(
        &mut self,
        link: &str,
        remote: SocketAddr,
        refused: bool,
        standby: bool,
    ) {
        let Side::Initiator(initiator) = &mut self.side else {
            return;
        };
        initiator
            .history
            .record_failure(link, remote, Instant::now());
        if standby {
            return self.decide();
        }
        initiator.round_refused &= refused;
        if initiator.attempt.is_some() || initiator.rejoining.is_some() {
            return;
        }
        if self.carries() {
            // What failed was a standby, or something else took over meanwhile.
            self.decide();
        } else {
            self.next_attempt();
        }
    }

    /// Whether the active transport stands and answers.
    pub(super) fn carries(&self) -> bool {
        let works = |h| self.session.is_up(h) && !self.session.is_silent(h);
        self.session.active().is_some_and(works)
    }
}
