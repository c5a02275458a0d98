//! What commands on the control socket do.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{oneshot, watch};

use super::captures::{self, Captures};
use super::peer::PeerState;
use super::registry::Registry;
use super::runs::Runs;
use crate::capture_queue::CaptureQueue;
use crate::config::Config;
use crate::control::{
    CaptureReport, ControlError, ControlHandler, Credentials, ErrorCode, HandoverReport,
    LinkReport, PeerReport, Permissions, Request, Response, SessionReport, StatusReport,
    StreamReport, TransportReport,
};
use crate::driver::{self, Command, Common, SessionSnapshot};
use crate::link::{Link, LinkSnapshot, LinkState};
use crate::policy::{self, PathHistory, PolicyConfig};

/// How long a session may take to carry out a command.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// A configured peer, as commands see it.
pub(super) struct PeerHandle {
    pub name: String,
    pub captures: Arc<CaptureQueue>,
    pub state: watch::Receiver<PeerState>,
    pub stop: watch::Sender<bool>,
}

/// What the agent's tasks share.
pub(super) struct Shared {
    pub config: Config,
    pub common: Common,
    pub registry: Registry,
    pub links: watch::Receiver<Arc<LinkSnapshot>>,
    pub peers: Vec<PeerHandle>,
    pub captures: Option<Captures>,
    pub started: Instant,
    pub runs: Runs,
}

fn failed(message: impl Into<String>, advice: &str) -> ControlError {
    ControlError::new(ErrorCode::Failed, message, advice)
}

impl ControlHandler for Shared {
    fn permissions(&self) -> Permissions {
        Permissions {
            control_group: self.config.agent.control_group.clone(),
            run_users: self.config.agent.run_users.clone(),
        }
    }

    async fn handle(&self, request: Request, who: Credentials) -> Result<Response, ControlError> {
        match request {
            Request::Status => Ok(Response::Status(self.status().await)),
            Request::Links => Ok(Response::Links(self.link_reports().await)),
            Request::Sessions => Ok(Response::Sessions(
                self.registry
                    .snapshots()
                    .await
                    .iter()
                    .map(session_report)
                    .collect(),
            )),
            Request::Handover { link } => self.handover(&link).await,
            Request::Attach { cgroup } => {
                self.capture()?
                    .attach(&cgroup)
                    .await
                    .map_err(capture_failed)?;
                Ok(Response::Done(format!(
                    "{} is captured from now on",
                    cgroup.display()
                )))
            }
            Request::Detach { cgroup } => {
                self.capture()?
                    .detach(&cgroup)
                    .await
                    .map_err(capture_failed)?;
                Ok(Response::Done(format!(
                    "{} is no longer captured",
                    cgroup.display()
                )))
            }
            Request::Run => {
                let scope = self
                    .runs
                    .begin(self.capture()?, who.pid)
                    .await
                    .map_err(|e| failed(e, "`holdfast doctor` says what is missing"))?;
                Ok(Response::Done(scope.display().to_string()))
            }
            Request::Reload => {
                self.reread().await;
                Ok(Response::Done(
                    "certificates and CRL are read anew".to_owned(),
                ))
            }
        }
    }
}

fn capture_failed(error: captures::Error) -> ControlError {
    failed(error.to_string(), "`holdfast doctor` says what is missing")
}

impl Shared {
    fn capture(&self) -> Result<&Captures, ControlError> {
        let none = || {
            failed(
                "this unit captures nothing: there is no [[capture]] rule",
                "add one, and restart the agent",
            )
        };
        self.captures.as_ref().ok_or_else(none)
    }

    /// Reads certificates and the CRL anew, and has every session judge its peer again.
    pub async fn reread(&self) {
        match self.common.identity.reload() {
            Ok(()) => tracing::info!("certificates and CRL were read anew"),
            Err(error) => {
                tracing::error!(%error, "certificates and CRL could not be read anew: the old ones stay")
            }
        }
        self.registry.tell_all(|| Command::CheckIdentity).await;
    }

    /// Peers make no further sessions.
    pub fn stop_peers(&self) {
        for peer in &self.peers {
            peer.stop.send_replace(true);
        }
    }

    async fn status(&self) -> StatusReport {
        let sessions = self.registry.snapshots().await;
        let capture = match &self.captures {
            Some(captures) => captures.state().await.ok(),
            None => None,
        };
        let left = self
            .common
            .identity
            .not_after()
            .and_then(|t| t.duration_since(SystemTime::now()).ok());
        StatusReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs(),
            identity: self.common.identity.name().uri(),
            certificate_left_s: left.unwrap_or_default().as_secs(),
            peers: self
                .peers
                .iter()
                .map(|p| peer_report(p, &sessions))
                .collect(),
            accepted_sessions: sessions.iter().filter(|s| !s.initiator).count(),
            capture: capture.map(|state| CaptureReport {
                cgroups: state.attached,
                captured4: state.counters.captured4,
                captured6: state.counters.captured6,
                delivered: state.counters.delivered,
                agent_gone: state.counters.agent_gone,
                refused: state.counters.refused,
                in_flight: state.counters.in_flight,
            }),
        }
    }

    async fn link_reports(&self) -> Vec<LinkReport> {
        let mut rtt = BTreeMap::new();
        for session in self.registry.snapshots().await {
            for carrier in session.carriers.into_iter().filter(|c| !c.link.is_empty()) {
                rtt.insert(carrier.link, carrier.rtt);
            }
        }
        let snapshot = Arc::clone(&self.links.borrow());
        let remotes: Vec<_> = self
            .config
            .peers
            .iter()
            .flat_map(|p| p.addresses.iter().copied())
            .collect();
        let wanted = PolicyConfig {
            prefer: self.config.links.prefer.clone(),
            exclude: self.config.links.exclude.clone(),
            manual: None,
        };
        let history = PathHistory::default();
        let decision = policy::choose(&snapshot, &wanted, None, &remotes, &history, Instant::now());
        snapshot
            .links
            .iter()
            .map(|link| link_report(link, &decision, &rtt))
            .collect()
    }

    async fn handover(&self, link: &str) -> Result<Response, ControlError> {
        let advice = "`holdfast links` shows what can be used";
        let mut done = Vec::new();
        let mut errors = Vec::new();
        for (_, entry) in self.registry.all().into_iter().filter(|(_, e)| e.initiator) {
            let (reply, answer) = oneshot::channel();
            let command = Command::Handover {
                link: link.to_owned(),
                reply,
            };
            if entry.commands.send(command).await.is_err() {
                continue;
            }
            match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
                Ok(Ok(Ok(words))) => done.push(format!("{}: {words}", entry.peer)),
                Ok(Ok(Err(words))) => errors.push(format!("{}: {words}", entry.peer)),
                _ => errors.push(format!("{}: the session did not answer", entry.peer)),
            }
        }
        match (done.is_empty(), errors.is_empty()) {
            (_, false) => Err(failed(errors.join("\n"), advice)),
            (true, true) => Err(failed(
                "there is no session to move",
                "`holdfast status` says why",
            )),
            (false, true) => Ok(Response::Done(done.join("\n"))),
        }
    }
}

fn peer_report(peer: &PeerHandle, sessions: &[SessionSnapshot]) -> PeerReport {
    let session = sessions
        .iter()
        .rev()
        .find(|s| s.initiator && s.peer == peer.name);
    let link = session
        .and_then(|s| s.carriers.iter().find(|c| c.active && c.up))
        .map(|c| c.link.clone());
    let (state, reason) = match (&*peer.state.borrow(), session) {
        (PeerState::Up, Some(s)) if s.held_for.is_some() => ("holding", None),
        (PeerState::Up, _) => ("up", None),
        (PeerState::Connecting(reason), _) => ("connecting", reason.clone()),
    };
    PeerReport {
        name: peer.name.clone(),
        state: state.to_owned(),
        link,
        reason,
        waiting: peer.captures.len(),
    }
}

fn link_report(
    link: &Link,
    decision: &policy::Decision,
    rtt: &BTreeMap<String, Option<Duration>>,
) -> LinkReport {
    let chosen = decision.ordered.iter().find(|c| c.path.link == link.name);
    let rejected = decision
        .rejected
        .iter()
        .find(|(name, _)| *name == link.name);
    let reason = chosen
        .map(|c| c.reason.clone())
        .or(rejected.map(|(_, why)| why.clone()));
    LinkReport {
        name: link.name.clone(),
        kind: link.kind.to_string(),
        state: match link.state {
            LinkState::Unusable => "unusable",
            LinkState::Settling { .. } => "settling",
            LinkState::Usable => "usable",
        }
        .to_owned(),
        usable: chosen.is_some(),
        reason: reason.unwrap_or_default(),
        addresses: link
            .addresses
            .iter()
            .map(|a| format!("{}/{}", a.ip, a.prefix))
            .collect(),
        mtu: link.mtu,
        in_use: rtt.contains_key(&link.name),
        rtt_ms: rtt.get(&link.name).copied().flatten().map(millis),
    }
}

fn millis(d: Duration) -> f64 {
    d.as_secs_f64() * 1000.0
}

fn session_report(s: &SessionSnapshot) -> SessionReport {
    SessionReport {
        id: hex::encode(s.id),
        peer: s.peer.clone(),
        software: s.software.clone(),
        role: if s.initiator {
            "initiator"
        } else {
            "responder"
        }
        .to_owned(),
        state: if s.held_for.is_some() {
            "holding"
        } else {
            "up"
        }
        .to_owned(),
        age_s: s.since.elapsed().unwrap_or_default().as_secs(),
        held_s: s.held_for.map(|d| d.as_secs()),
        transports: s.carriers.iter().map(transport_report).collect(),
        streams: s.streams.iter().map(stream_report).collect(),
        streams_total: s.streams_total,
        bytes_in: s.stats.bytes_received,
        bytes_out: s.stats.bytes_sent,
        resent_bytes: s.stats.bytes_resent,
        duplicates: s.stats.duplicates,
        rekeys: s.stats.rekeys,
        memory_bytes: s.memory_bytes,
        handovers_total: s.handovers_total,
        handovers: s.handovers.iter().map(handover_report).collect(),
    }
}

fn transport_report(c: &driver::CarrierReport) -> TransportReport {
    TransportReport {
        link: c.link.clone(),
        local: c.local,
        remote: c.remote,
        active: c.active,
        up: c.up,
        age_s: c.age.as_secs(),
        bytes_in: c.bytes_in,
        bytes_out: c.bytes_out,
        queued_bytes: c.queued,
        rtt_ms: c.rtt.map(millis),
    }
}

fn stream_report(s: &driver::StreamReport) -> StreamReport {
    StreamReport {
        id: s.id,
        target: s.target.clone(),
        local: s.local,
        state: if s.connected { "open" } else { "connecting" }.to_owned(),
        tx: s.tx,
        rx: s.rx,
    }
}

fn handover_report(h: &driver::HandoverReport) -> HandoverReport {
    HandoverReport {
        when_s: h
            .when
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs_f64(),
        from: h.from.clone(),
        to: h.to.clone(),
        trigger: h.trigger.clone(),
        soft: h.soft,
        noticed_ns: h.noticed_ns,
        resent_ns: h.resent_ns,
        resumed_ns: h.resumed_ns,
        replayed_records: h.replayed_records,
        replayed_bytes: h.replayed_bytes,
    }
}
