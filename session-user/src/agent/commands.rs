//! What commands on the control socket do.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use session_proto::session::SharedMemory;
use tokio::sync::{oneshot, watch};

use super::captures::{self, Captures};
use super::peer::PeerState;
use super::registry::Registry;
use super::reports::{accepted_unit, dialled_unit, link_report, peer_report, session_report};
use super::routes::Names;
use super::runs::Runs;
use crate::capture::{Destination, Filter};
use crate::config::{Config, Listen};
use crate::control::{
    CaptureReport, ControlError, ControlHandler, Credentials, DoorReport, ErrorCode, LinkReport,
    MemoryReport, Permissions, Request, Response, StatusReport, UnitReport,
};
use crate::dial::PeerAddresses;
use crate::driver::{CarrierReport, Command, Common};
use crate::link::LinkSnapshot;
use crate::policy::{self, PathHistory};
use crate::requests::RequestQueue;

/// How long a session may take to carry out a command.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// A configured peer, as commands see it.
pub(super) struct PeerHandle {
    pub name: String,
    pub requests: Arc<RequestQueue>,
    pub state: watch::Receiver<PeerState>,
    pub stop: watch::Sender<bool>,
}

/// What the agent's tasks share.
pub(super) struct Shared {
    /// Where the configuration was read from.
    pub file: PathBuf,
    pub config: Config,
    pub common: Common,
    pub registry: Registry,
    pub links: watch::Receiver<Arc<LinkSnapshot>>,
    pub peers: Vec<PeerHandle>,
    pub captures: Option<Captures>,
    /// What it knows of names, if any can be captured or asked for.
    pub names: Option<Names>,
    /// How targets see the peers that this unit dials for, if it does.
    pub addresses: Option<Arc<PeerAddresses>>,
    pub started: Instant,
    pub runs: Runs,
    /// What sessions have together.
    pub memory: SharedMemory,
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
            Request::Peers => Ok(Response::Peers(self.units().await)),
            Request::Handovers { peer, count } => {
                let trace = &self.common.trace;
                let handovers = trace.handovers(peer.as_deref(), count);
                Ok(Response::Handovers(handovers))
            }
            Request::Handover { link } => self.handover(&link).await,
            Request::Attach { cgroup } => {
                self.capture()?
                    .attach(&cgroup, &Filter::default())
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
            Request::Run {
                only,
                except,
                netns,
            } => {
                let filter = Filter {
                    only: destinations(&only)?,
                    except: destinations(&except)?,
                };
                let scope = self
                    .runs
                    .begin(self.capture()?, (who.pid, netns), &filter)
                    .await
                    .map_err(|e| failed(e, "`holdfast doctor` says what is missing"))?;
                Ok(Response::Done(scope.display().to_string()))
            }
            Request::Explain(asked) => Ok(Response::Explained(self.explain(&asked, who).await?)),
            Request::Woke => {
                self.registry.tell_all(|| Command::Woke).await;
                Ok(Response::Done(
                    "every transport is asked whether it still stands".to_owned(),
                ))
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

/// The command has read them before; another program may not have.
fn destinations(texts: &[String]) -> Result<Vec<Destination>, ControlError> {
    let read = texts.iter().map(|text| text.parse::<Destination>());
    let read = read.collect::<Result<_, _>>();
    read.map_err(|message| ControlError::new(ErrorCode::Invalid, message, ""))
}

pub(super) fn capture_failed(error: captures::Error) -> ControlError {
    failed(error.to_string(), "`holdfast doctor` says what is missing")
}

impl Shared {
    pub(super) fn capture(&self) -> Result<&Captures, ControlError> {
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
                agent_hung: state.counters.agent_hung,
                held: state.counters.held,
                held_again: state.counters.held_again,
                not_held: state.counters.not_held,
                captured4: state.counters.captured4,
                captured6: state.counters.captured6,
                delivered: state.counters.delivered,
                agent_gone: state.counters.agent_gone,
                refused: state.counters.refused,
                in_flight: state.counters.in_flight,
                udp4: state.counters.udp4,
                udp6: state.counters.udp6,
                udp_full: state.counters.udp_full,
                udp_stray: state.counters.udp_stray,
                udp_flows: state.counters.udp_flows,
                udp_dropped: state.counters.udp_dropped,
                bypassed: state.counters.bypassed,
                not_bypassed: state.counters.not_bypassed,
            }),
            memory: Some(MemoryReport {
                total_bytes: self.memory.total_bytes(),
                unacknowledged_bytes: self.memory.sending_bytes(),
                window_bytes: self.memory.receiving_bytes(),
            }),
            packets_unknown: super::packets::dropped().0,
            packets_overflowed: super::packets::dropped().1,
            doors: self.config.listens.iter().map(|l| self.door(l)).collect(),
        }
    }

    /// The units that this one dials, and those that it dials targets for.
    async fn units(&self) -> Vec<UnitReport> {
        let sessions = self.registry.snapshots().await;
        let domain = &self.common.identity.name().domain;
        let dialled = self
            .peers
            .iter()
            .map(|p| dialled_unit(p, domain, &sessions));
        let known = self.addresses.as_ref().map(|a| a.all());
        let known = known.unwrap_or_default();
        let accepted = known
            .into_iter()
            .map(|(id, addresses)| accepted_unit(id, addresses, &sessions));
        let mut units: Vec<UnitReport> = dialled.chain(accepted).collect();
        units.sort_by(|a, b| (&a.name, &a.role).cmp(&(&b.name, &b.role)));
        units
    }

    fn door(&self, listen: &Listen) -> DoorReport {
        DoorReport {
            at: listen.at.to_string(),
            leads: listen.leads.to_string(),
            peer: self.config.peers[listen.peer].name.clone(),
        }
    }

    async fn link_reports(&self) -> Vec<LinkReport> {
        let mut carriers: BTreeMap<String, CarrierReport> = BTreeMap::new();
        for session in self.registry.snapshots().await {
            for carrier in session.carriers.into_iter().filter(|c| !c.link.is_empty()) {
                let active = carrier.active;
                let shown = carriers
                    .entry(carrier.link.clone())
                    .or_insert_with(|| carrier.clone());
                if active {
                    *shown = carrier;
                }
            }
        }
        let snapshot = Arc::clone(&self.links.borrow());
        let remotes: Vec<_> = self
            .config
            .peers
            .iter()
            .flat_map(|p| p.addresses.iter().copied())
            .collect();
        let wanted = super::policy_config(&self.config);
        let history = PathHistory::default();
        let decision = policy::choose(&snapshot, &wanted, None, &remotes, &history, Instant::now());
        snapshot
            .links
            .iter()
            .map(|link| {
                let standby = wanted.standby_and_reason(link);
                let carrier = carriers.get(&link.name);
                link_report(
                    link,
                    &decision,
                    standby,
                    carrier,
                    self.config.transport.keepalive,
                )
            })
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
