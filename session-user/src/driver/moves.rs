//! Which transport carries the session: the policy's answer is carried out here.

use std::time::{Duration, Instant};

use session_proto::session::{Handle, Stats, TransportFault};
use session_proto::wire::Status;

use super::carrier::{CarrierEnd, Path};
use super::handover::Move;
use super::{Driver, Side};
use crate::policy::{self, Action, Choice, choose};
use crate::trace::Trigger;

/// A silent transport without another beside it may only be slow: its own path is dialled again
/// after this time, or two round trips if that is more. The kernel's first retransmission comes
/// at about 200 ms.
const SAME_PATH_AFTER: Duration = Duration::from_millis(250);

const PEER: Trigger = Trigger::PeerMoved;

impl Driver {
    /// Asks the policy, and dials or moves as it says.
    pub(super) fn decide(&mut self) {
        let silent = self.session.active().filter(|h| self.session.is_silent(*h));
        let answering =
            |h: Handle| Some(h) != silent && self.session.is_up(h) && !self.session.is_silent(h);
        if silent.is_some() && self.session.transports().any(answering) {
            // Both are being tried: the first answer decides.
            return;
        }
        let own = self.current_path();
        let current = own.clone().filter(|_| silent.is_none());
        let links = self.side.links();
        let Side::Initiator(initiator) = &mut self.side else {
            return;
        };
        if initiator.rejoining.is_some() || self.session.is_ending() {
            return;
        }
        let now = Instant::now();
        let (policy, remotes) = (&initiator.config.policy, &initiator.config.remotes);
        let decision = choose(
            &links,
            policy,
            current.as_ref(),
            remotes,
            &initiator.history,
            now,
        );
        initiator.look_at = initiator.history.next_end(now);
        self.report.decided(&decision);
        match decision.action {
            Action::HardHandover { .. } => {
                let mut paths: Vec<policy::Path> =
                    decision.ordered.into_iter().map(|c| c.path).collect();
                if silent.is_some() {
                    paths.sort_by_key(|path| Some(path) == own.as_ref());
                }
                self.begin_round(paths, &decision.reason);
            }
            Action::Return { to } => {
                initiator.pending.clear();
                self.move_softly(to, &decision.reason);
                self.tend_standbys(&decision.ordered);
            }
            Action::Stay | Action::Hold => {
                initiator.pending.clear();
                initiator.retry_at = None;
                self.tend_standbys(&decision.ordered);
            }
        }
    }

    /// Nothing carries: every path is dialled in turn until one does.
    fn begin_round(&mut self, paths: Vec<policy::Path>, reason: &str) {
        let Side::Initiator(initiator) = &mut self.side else {
            return;
        };
        // After a round of failures nothing is tried before its time, unless the links change.
        if initiator.attempt.is_some() || initiator.retry_at.is_some() {
            return;
        }
        initiator.pending = paths.into();
        initiator.round_refused = true;
        if initiator.pending.is_empty() {
            return;
        }
        tracing::info!(reason, "dialling a transport");
        self.next_attempt();
    }

    /// The path in use works and `to` is better. It is moved to once a transport stands there.
    fn move_softly(&mut self, to: policy::Path, reason: &str) {
        let ready = self.carriers.iter().find(|(h, c)| {
            c.path.link == to.link
                && self.session.is_up(**h)
                && !self.session.is_silent(**h)
                && self.session.route(**h).is_some_and(|r| r.lane == 0)
        });
        match ready.map(|(&h, _)| h) {
            Some(handle) => self.carry_on(handle, reason),
            None => {
                if self.attempt_beside(to, 0, reason) {
                    self.report.dialling(true);
                }
            }
        }
    }

    /// New records go to `handle` from now on; the transport that carried until now still works.
    fn carry_on(&mut self, handle: Handle, reason: &str) {
        let before = self.session.stats();
        let active = self.session.active().and_then(|h| self.carriers.get(&h));
        let from = active.map(|c| c.path.clone());
        self.session.set_active(handle);
        if let (Some(from), Some(to)) = (from, self.active_link())
            && self.session.active() == Some(handle)
        {
            let trigger = self.soft_trigger(&to);
            self.report.begin(Move::soft(&from, trigger, reason));
            self.moved(&before);
        }
    }

    /// The session's active transport has just changed; `before` are the counters before that.
    pub(super) fn moved(&mut self, before: &Stats) {
        self.carrying = self.session.active();
        self.remember_windows();
        let Some(handle) = self.carrying else { return };
        self.adopt_rate(handle);
        if let Some(carrier) = self.carriers.get(&handle) {
            let after = self.session.stats();
            let warm = carrier.up_turn.is_some_and(|turn| turn < self.turns);
            self.report
                .moved(handle, &carrier.path, warm, before, &after);
        }
    }

    /// The active transport may have changed because the peer asked for it, or gave one up.
    pub(super) fn follow_peer(&mut self) {
        let active = self.session.active();
        let before = std::mem::replace(&mut self.report.settled, self.session.stats());
        if active == self.carrying {
            return;
        }
        let old = std::mem::replace(&mut self.carrying, active);
        let (Some(old), Some(_)) = (old, active) else {
            return;
        };
        let Some(path) = self.carriers.get(&old).map(|c| c.path.clone()) else {
            return self.moved(&before);
        };
        // On the side that dials, the policy would have asked for it: the peer found out first.
        self.report.begin(match self.side {
            Side::Initiator(_) => Move::hard(&path, PEER, "the peer moved", Instant::now()),
            Side::Responder(_) => Move::soft(&path, PEER, "the peer moved"),
        });
        self.moved(&before);
        // The peer may have fallen silent on it as seen from here as well, or only one direction has.
        self.session.doubt(self.clock.now(), old);
        if self.session.is_silent(old) {
            // That was told while it was in use, and is told once: nothing else would ever end it, and as
            // long as it stands its path is not dialled anew.
            self.doom(old);
        }
        if let Side::Initiator(initiator) = &mut self.side {
            initiator
                .history
                .record_silence(&path.link, path.remote, Instant::now());
            self.decide();
        }
    }

    /// What was sent on `handle` is not answered in time.
    pub(super) fn transport_silent(&mut self, handle: Handle) {
        self.note_unopened(handle);
        let rtt = self.session.rtt(handle).unwrap_or_default();
        let Some(carrier) = self.carriers.get_mut(&handle) else {
            return;
        };
        let kernel = carrier.look().unwrap_or_default();
        tracing::info!(
            link = %carrier.path.link,
            remote = %carrier.path.remote,
            ?rtt,
            kernel_rtt = ?kernel.rtt,
            unacked = kernel.unacked,
            notsent = kernel.notsent,
            retransmits = kernel.retransmits,
            quiet = ?carrier.acked_since.elapsed(),
            limit = ?carrier.pacing.limit(),
            "a transport does not answer in time"
        );
        self.note_silence(handle);
        if self.session.active() != Some(handle) {
            return self.doom(handle);
        }
        let now = self.clock.now();
        let oldest = self.session.unanswered_since(handle);
        self.report.suspect(oldest.map(|at| now.since(at)));
        let Side::Initiator(initiator) = &mut self.side else {
            return;
        };
        let wait = self.session.rtt(handle).unwrap_or_default() * 2;
        initiator.same_path_at = Some(Instant::now() + wait.max(SAME_PATH_AFTER));
        self.decide();
    }

    /// Another transport answered while `from` was silent.
    pub(super) fn handed_over(&mut self, from: Handle) {
        let Some(path) = self.carriers.get(&from).map(|c| c.path.clone()) else {
            return;
        };
        let suspicion = self.report.suspected();
        self.report.begin(Move::silent(&path, &suspicion));
        self.moved(&suspicion.before);
        self.report.up();
        self.doom(from);
        if let Side::Initiator(initiator) = &mut self.side {
            initiator
                .history
                .record_silence(&path.link, path.remote, Instant::now());
            self.decide();
        }
    }

    fn active_link(&self) -> Option<String> {
        let carrier = self.carriers.get(&self.session.active()?)?;
        Some(carrier.path.link.clone())
    }

    pub(super) fn current_path(&self) -> Option<policy::Path> {
        let carrier = self.carriers.get(&self.session.active()?)?;
        let path = &carrier.path;
        Some(policy::Path {
            link: path.link.clone(),
            source: path.local.ip(),
            remote: path.remote,
        })
    }

    /// A transport ended without its link's being lost.
    pub(super) fn after_loss(
        &mut self,
        path: &Path,
        was_active: bool,
        was_up: bool,
        end: &CarrierEnd,
        before: &Stats,
    ) {
        if was_active {
            let failed = Trigger::TransportFailed;
            self.report
                .begin(Move::hard(path, failed, &end.to_string(), Instant::now()));
            self.moved(before);
        }
        if !matches!(self.side, Side::Initiator(_)) {
            return;
        }
        match end {
            // A dial over a faster path overtook it, so that its token is no longer expected.
            CarrierEnd::Fault(TransportFault::Refused(Status::UnknownSession))
                if self.carries() =>
            {
                self.path_failed(&path.link, path.remote, false, true);
            }
            CarrierEnd::Fault(TransportFault::Refused(Status::UnknownSession)) => self.rejoin(path),
            // One that had stood says nothing against its path: dial again at once.
            _ if was_up => self.decide(),
            // What comes in clear, or breaks, proves nothing about the peer: anybody on the path can
            // do it. It costs an attempt, and never counts as the peer's refusal.
            _ => self.path_failed(&path.link, path.remote, false, false),
        }
    }

    pub(super) fn transport_up(&mut self, handle: Handle) {
        let Some(carrier) = self.carriers.get_mut(&handle) else {
            return;
        };
        carrier.must_be_up_by = None;
        carrier.swallow_at = None;
        let path = carrier.path.clone();
        self.stands(handle);
        if self.session.active() == Some(handle) {
            self.report.up();
        }
        let Side::Initiator(initiator) = &mut self.side else {
            return;
        };
        initiator.history.record_success(&path.link, path.remote);
        initiator.forgive();
        self.decide();
    }
}

/// What a standby is kept on: a usable link that is not the one in use and may cost that much.
pub(super) fn wants_standby(choice: &Choice) -> bool {
    choice.standby == policy::Standby::Warm && !choice.demoted
}
