//! The agent: what a unit is while it runs.
//!
//! 1. Load the identity, take the control socket, watch the links.
//! 2. Listen for sessions, if `[accept]` says so.
//! 3. Keep a session with every `[[peer]]`.
//! 4. Load the capture and attach the configured cgroups, if there are `[[capture]]` rules.
//! 5. Serve commands until a signal: SIGHUP reads certificates and CRL anew, SIGTERM or SIGINT
//!    drains, a second one ends.

mod acceptor;
mod captures;
mod cgroup_watch;
mod commands;
mod compression;
mod entrance;
mod explain;
mod held;
mod native;
mod packets;
mod peer;
pub mod registry;
mod reports;
mod routes;
mod runs;
mod settings;
mod surveys;
mod wake;
mod workers;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use session_proto::wire::close_code;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::capture::{Action, Capture, CaptureConfig, CaptureError, CaptureRule, Filter, Orphans};
use crate::config::Config;
use crate::dial::{AllowList, AllowRule, PeerAddresses};
use crate::door::{Door, Doors};
use crate::driver::{Command, Common};
use crate::handshake::Identity;
use crate::link::{LinkMonitor, MonitorConfig};
use crate::names::Listening;
use crate::requests::RequestQueue;
use crate::trace::Trace;
use acceptor::Acceptor;
use captures::Captures;
use commands::Shared;
use peer::{Peer, PeerState};
use registry::Registry;
use routes::{Names, Routes};
pub use settings::identity_paths;
use settings::{
    initial_window, lanes, policy_config, service_rules, session_config, transport_options,
};
use workers::Places;
pub use workers::Workers;

/// Time for a dialled transport to authenticate.
const RESUME_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for a full handshake that this unit makes.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How often certificates and the CRL are read anew without being told.
const REREAD_EVERY: Duration = Duration::from_secs(3600);
/// How long a draining agent waits for CLOSE to be acknowledged.
const PART_TIMEOUT: Duration = Duration::from_secs(3);
/// How long an agent that ends waits for its traces to be written.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a draining agent looks whether the last stream is over.
const DRAIN_LOOK: Duration = Duration::from_millis(100);

/// Runs the agent until a signal ends it; `workers` drive its sessions.
pub async fn run(path: &Path, config: Config, workers: Workers) -> anyhow::Result<ExitCode> {
    let agent = Agent::start(path, config, workers).await?;
    tracing::info!(config = %path.display(), unit = %agent.shared.common.identity.name(), "the agent is ready");
    agent.serve().await
}

struct Agent {
    shared: Arc<Shared>,
    admit: Arc<Semaphore>,
    tasks: JoinSet<()>,
    doors: Doors,
    /// The port where questions about names are answered.
    answering: Listening,
    _links: LinkMonitor,
    /// The last to go: what runs there is told first.
    workers: Workers,
}

impl Agent {
    async fn start(path: &Path, config: Config, workers: Workers) -> anyhow::Result<Self> {
        raise_descriptor_limit();
        let identity = Arc::new(Identity::load(&identity_paths(&config))?);
        let control =
            crate::control::listen(&config.agent.control, config.agent.control_group.as_deref())
                .with_context(|| {
                    format!(
                        "the control socket {} cannot be used",
                        config.agent.control.display()
                    )
                })?;
        let monitor = MonitorConfig {
            debounce: config.links.debounce,
            ..MonitorConfig::default()
        };
        let links = LinkMonitor::start(&monitor).context("the links cannot be watched")?;

        let registry = Registry::default();
        let trace = Trace::new(config.trace.qlog.clone()).context("[trace] qlog")?;
        let common = Common {
            identity,
            trace: Arc::new(trace),
            tokens: Arc::new(registry.clone()),
            transport: transport_options(&config),
            busy_poll: config.agent.busy_poll,
            window: initial_window(&config),
            hold: config.session.hold,
            resume_timeout: RESUME_TIMEOUT,
            reauth_after: config.session.reauth_after,
            expiry_grace: config.session.expiry_grace,
        };
        let session = session_config(&config)?;
        let memory = session.shared_memory.clone();
        let admit = Acceptor::admission();
        let places = workers.places();
        let mut tasks = JoinSet::new();
        let parts = Parts {
            common: &common,
            session: &session,
            registry: &registry,
            admit: &admit,
            links: &links,
            places: &places,
        };
        let addresses = accept_sessions(&config, &parts, &mut tasks)?;
        let peers = keep_sessions(&config, &parts, &mut tasks);
        let queues: Vec<_> = peers.iter().map(|p| Arc::clone(&p.requests)).collect();
        let names = Names::open(&config, &common.identity.name().to_string())?;
        let doors = open_doors(&config, &queues, names.as_ref())?;
        let answering = match &names {
            Some(names) => {
                tasks.spawn(Arc::clone(&names.book).keep());
                names.listen(&config)?
            }
            None => Listening::default(),
        };
        let routes = Routes::new(queues, names.clone());
        for answering in routes.answering() {
            tasks.spawn(answering);
        }
        let captures = start_capture(&config, routes, names.as_ref(), &parts, &mut tasks).await?;
        let shared = Arc::new(Shared {
            file: path.to_owned(),
            config,
            common,
            registry,
            links: links.subscribe(),
            peers,
            captures,
            names,
            addresses,
            started: Instant::now(),
            runs: runs::Runs::default(),
            memory,
        });
        tasks.spawn(crate::control::serve(control, Arc::clone(&shared)));
        tasks.spawn(wake::watch(shared.registry.clone()));
        Ok(Self {
            shared,
            admit,
            tasks,
            doors,
            answering,
            _links: links,
            workers,
        })
    }

    async fn serve(mut self) -> anyhow::Result<ExitCode> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let mut reread = tokio::time::interval(REREAD_EVERY);
        reread.tick().await;
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => self.shared.reread().await,
                _ = reread.tick() => self.shared.reread().await,
                () = self.workers.failed() => {
                    anyhow::bail!("a thread of the agent has failed: please report this");
                }
                Some(ended) = self.tasks.join_next() => {
                    // Without it the agent would look alive and do nothing: end, and be started anew.
                    ended.context("a task of the agent has failed: please report this")?;
                }
            }
        }
        self.drain(&mut terminate, &mut interrupt).await;
        self.part().await;
        Ok(ExitCode::SUCCESS)
    }

    /// New connections go direct and new sessions are refused; what runs may end by itself.
    async fn drain(&mut self, terminate: &mut Signal, interrupt: &mut Signal) {
        self.admit.close();
        self.doors.close();
        self.answering.close();
        if let Some(captures) = &self.shared.captures {
            // If the capture has ended already, nothing is captured any more.
            let _ = captures.detach_all().await;
        }
        let mut told = false;
        loop {
            let open: usize = self
                .shared
                .registry
                .snapshots()
                .await
                .iter()
                .map(|s| s.streams.len() + s.waiting)
                .sum();
            if open == 0 {
                return;
            }
            if !std::mem::replace(&mut told, true) {
                tracing::info!(
                    streams = open,
                    "draining: waiting for the streams to end; a second signal ends them"
                );
            }
            tokio::select! {
                () = tokio::time::sleep(DRAIN_LOOK) => {}
                _ = terminate.recv() => return,
                _ = interrupt.recv() => return,
            }
        }
    }

    /// Says goodbye to every peer.
    async fn part(mut self) {
        let close = || Command::Close {
            code: close_code::SHUTDOWN,
            reason: "the unit is shutting down".to_owned(),
        };
        self.shared.stop_peers();
        self.shared.registry.tell_all(close).await;
        let gone = async {
            while !self.shared.registry.all().is_empty() {
                // Sessions leave the registry one by one, and nobody tells of the last.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        if tokio::time::timeout(PART_TIMEOUT, gone).await.is_err() {
            tracing::warn!("not every peer has heard that this unit shuts down");
        }
        self.shared.runs.remove_all().await;
        if let Some(names) = &self.shared.names {
            names.book.save();
        }
        self.tasks.abort_all();
        self.shared.common.trace.flush(FLUSH_TIMEOUT);
        // Best effort: the next agent replaces a socket that nobody listens on.
        let _ = std::fs::remove_file(&self.shared.config.agent.control);
        tracing::info!("the agent has ended");
    }
}

/// The soft limit is for programs that use select(); a gateway holds a descriptor for each stream.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit on open files could not be raised");
    }
}

/// What sessions take from the agent.
struct Parts<'a> {
    common: &'a Common,
    session: &'a session_proto::session::Config,
    registry: &'a Registry,
    admit: &'a Arc<Semaphore>,
    links: &'a LinkMonitor,
    places: &'a Places,
}

fn accept_sessions(
    config: &Config,
    agent: &Parts<'_>,
    tasks: &mut JoinSet<()>,
) -> anyhow::Result<Option<Arc<PeerAddresses>>> {
    let Some(accept) = &config.accept else {
        return Ok(None);
    };
    let addresses = PeerAddresses::open(&accept.state, &accept.peer_networks)?;
    let addresses = Arc::new(addresses);
    let rules: Vec<AllowRule> = accept
        .allow
        .iter()
        .map(|(peer, to)| AllowRule {
            peer: peer.clone(),
            to: to.clone(),
        })
        .collect();
    let listeners = acceptor::listen(&accept.listen, config.transport.fast_open)
        .map_err(|(addr, error)| anyhow::anyhow!("[accept] cannot listen on {addr}: {error}"))?;
    let packets = if config.transport.udp {
        packets::listen(listeners.iter().flat_map(|l| l.local_addr()))
    } else {
        Arc::default()
    };
    let acceptor = Acceptor {
        packets: Arc::clone(&packets),
        registry: agent.registry.clone(),
        places: agent.places.clone(),
        common: agent.common.clone(),
        session: agent.session.clone(),
        links: agent.links.subscribe(),
        allow: Arc::new(AllowList::parse(&rules)?.with_proxy_headers(&accept.proxy_protocol)?),
        addresses: Arc::clone(&addresses),
        dial_timeout: accept.dial_timeout,
        handshake_timeout: accept.handshake_timeout,
        max_sessions: accept.max_sessions,
        strangers: Acceptor::strangers(),
        admit: Arc::clone(agent.admit),
    };
    for (index, socket) in packets.iter().enumerate() {
        let (registry, socket) = (agent.registry.clone(), Arc::clone(socket));
        tasks.spawn(packets::serve(registry, index, socket));
    }
    for listener in listeners {
        tasks.spawn(acceptor.clone().serve(listener));
    }
    Ok(Some(addresses))
}

fn keep_sessions(
    config: &Config,
    agent: &Parts<'_>,
    tasks: &mut JoinSet<()>,
) -> Vec<commands::PeerHandle> {
    let mut handles = Vec::new();
    for configured in &config.peers {
        let requests = Arc::new(RequestQueue::default());
        let (state, seen) = watch::channel(PeerState::Connecting(None));
        let peer = Peer {
            name: configured.name.clone(),
            remotes: configured.addresses.clone(),
            udp: config.transport.udp,
            requests: Arc::clone(&requests),
            links: agent.links.subscribe(),
            policy: policy_config(config),
            services: Arc::new(service_rules(config)),
            lanes: lanes(config.transport.lanes),
            registry: agent.registry.clone(),
            common: agent.common.clone(),
            session: session_proto::session::Config {
                codecs_on_request: compression::on_request(config),
                ..agent.session.clone()
            },
            dial_timeout: config.transport.dial_timeout,
            handshake_timeout: HANDSHAKE_TIMEOUT,
            peer_gone_after: config.session.peer_gone_after,
            state,
        };
        let (stop, stopped) = watch::channel(false);
        handles.push(commands::PeerHandle {
            name: configured.name.clone(),
            requests,
            state: seen,
            stop,
        });
        let place = agent.places.take();
        let runtime = place.runtime().clone();
        let running = async move {
            let _place = place;
            peer.run(stopped).await;
        };
        tasks.spawn_on(running, &runtime);
    }
    handles
}

fn open_doors(
    config: &Config,
    queues: &[Arc<RequestQueue>],
    names: Option<&Names>,
) -> anyhow::Result<Doors> {
    let doors = config.listens.iter().map(|listen| Door {
        at: listen.at.clone(),
        leads: listen.leads.clone(),
        from: listen.from.clone(),
        group: listen.group.clone(),
        flow_idle: config.session.flow_idle,
        requests: Arc::clone(&queues[listen.peer]),
        names: names.map(|names| Arc::clone(&names.book)),
    });
    Ok(Doors::open(doors)?)
}

/// Where programs are pinned, if any rule should outlive an agent that is killed. What `when_agent_dead` promises must
/// be kept; `action = "refuse"` promises nothing of the kind, and is kept where it can be.
fn pin_at(rules: &[CaptureRule], bpffs: &Path) -> Option<PathBuf> {
    let must = rules.iter().any(CaptureRule::is_fail_closed);
    let may = rules.iter().any(|rule| rule.action == Action::Refuse);
    if may && !must && !crate::capture::can_pin(bpffs) {
        tracing::warn!(bpffs = %bpffs.display(), "no BPF file system is there: if this agent is killed, rules with action = \"refuse\" end with it");
        return None;
    }
    (must || may).then(|| bpffs.to_owned())
}

/// Whether the agent is of use without eBPF: its rules are for names alone, and it is asked for them at a port.
fn serves_without_capture(config: &Config) -> bool {
    let for_names = config.captures.iter().all(|c| !c.rule.names.is_empty());
    for_names && !config.dns.listen.is_empty() && config.agent.capture_cgroups.is_empty()
}

async fn start_capture(
    config: &Config,
    routes: Routes,
    names: Option<&Names>,
    agent: &Parts<'_>,
    tasks: &mut JoinSet<()>,
) -> anyhow::Result<Option<Captures>> {
    if config.captures.is_empty() {
        return Ok(None);
    }
    let mut rules: Vec<CaptureRule> = config.captures.iter().map(|c| c.rule.clone()).collect();
    let reserved = names.and_then(Names::reserved);
    if let Some(reserved) = reserved {
        rules = crate::capture::reserve(&rules, &reserved);
    }
    let log = tracing::level_filters::LevelFilter::current();
    runs::Runs::remove_stale();
    let orphans = Orphans::find(&config.agent.bpffs);
    let pin_at = pin_at(&rules, &config.agent.bpffs);
    let entrance = agent.places.first();
    let loaded = Capture::load(&CaptureConfig {
        rules,
        log,
        gate: true,
        names: reserved.is_some(),
        pin_at,
        bypass: config.agent.local_bypass,
        accepted_in: Some(entrance.clone()),
    });
    let capture = match loaded {
        Err(error) if serves_without_capture(config) => {
            tracing::warn!(%error, "nothing is captured: captured names can be reached through doors alone");
            return Ok(None);
        }
        loaded => loaded?,
    };
    let captures = Captures::start(
        capture,
        routes,
        agent.links.subscribe(),
        config.session.flow_idle,
        entrance,
        tasks,
    );
    for cgroup in &config.agent.capture_cgroups {
        captures
            .attach(cgroup, &Filter::default())
            .await
            .with_context(|| format!("[agent] capture_cgroups: {}", cgroup.display()))?;
    }
    // Taken over before they are let go, so that no connection slips through in between.
    for (cgroup, filter) in orphans.cgroups() {
        match captures.attach(&cgroup, &filter).await {
            Ok(()) => {
                tracing::warn!(cgroup = %cgroup.display(), "an agent was killed: its cgroup is captured again")
            }
            // It is in the configuration.
            Err(captures::Error::Capture(CaptureError::AlreadyAttached { .. })) => {}
            Err(error) => {
                tracing::warn!(cgroup = %cgroup.display(), %error, "a killed agent's cgroup is let go")
            }
        }
    }
    orphans.remove();
    Ok(Some(captures))
}
