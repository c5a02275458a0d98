//! Capture: takes the TCP connections and the UDP datagrams of chosen cgroups and hands them to the agent.
//!
//! 1. [`Capture::load`] opens listeners on loopback, loads the eBPF programs and fills their maps. Processes in other
//!    network namespaces get listeners there, as soon as the agent knows of them.
//! 2. [`Capture::attach`] attaches the programs to a cgroup: from now on a `connect()` in it that matches a rule ends at
//!    one of the listeners.
//! 3. [`Capture::entrance`] is where such connections come in, with the destination that the application wanted.
//!    [`Capture::take_datagrams`] gives what hands datagrams on ([`udp`]).
//!
//! Nothing outside of the attached cgroups changes, and nothing remains: the programs live as long as the [`Capture`],
//! unless they are pinned and its process is killed. When the agent dies, new connections go direct, or are refused
//! where their rule says so and the programs are pinned.

mod arrivals;
mod bypass;
pub mod cgroup;
mod cgroup_id;
mod detach;
mod entrance;
mod error;
mod explain;
mod filter;
mod gate;
mod injector;
mod kernel;
mod kernel_types;
mod listeners;
mod log;
mod namespace;
mod namespaces;
mod netns;
mod openings;
mod pins;
mod policy;
mod privileges;
mod probe;
mod programs;
mod refusals;
mod rule;
mod scope;
mod survey;
mod syn;
mod tables;
#[cfg(test)]
mod tests;
mod udp;
mod witness;

use std::{
    collections::{BTreeMap, BTreeSet},
    future::poll_fn,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tracing::level_filters::LevelFilter;

pub use bypass::LocalBypass;
pub use entrance::Entrance;
pub use error::CaptureError;
pub use explain::{Explanation, Verdict};
pub use filter::{Destination, Filter, FilterError};
pub use gate::{Gate, GateEvent, Hop, Knock};
pub use kernel::Counters;
pub use netns::NamespaceError;
pub use openings::{Entered, Opened as Opening};
pub use policy::{RuleError, check, reserve};
pub use probe::{Check, probe};
pub use programs::names as program_names;
pub use rule::{Action, CaptureRule, Protocol, Protocols, Question};
pub use scope::Scope;
pub use session_ebpf_common::Newcomer;
pub use survey::{Survey, Surveyed};
pub use udp::{Datagrams, FlowWay, FlowWays};

pub use pins::{Orphans, can_pin};
pub use session_ebpf_common::{DNS_PEER, DNS_PORT, NAMED_PEER};

use crate::requests::AppStream;
use bypass::Tally;
use injector::Injector;
use kernel::Kernel;
use listeners::{Marker, Opened};
use namespace::{NamespaceSockets, Probes};
use namespaces::Namespaces;
use netns::Netns;
use pins::Pins;
use session_ebpf_common::Ports;

/// What to capture.
#[derive(Clone, Debug)]
pub struct CaptureConfig {
    /// Which destinations, and for which peer.
    pub rules: Vec<CaptureRule>,
    /// Least level of the messages that the eBPF programs write to the log. Levels that are off cost nothing.
    pub log: LevelFilter,
    /// Hold each connection's SYN until the agent has heard from the target: see [`Capture::take_gate`]. Where this
    /// process may not send raw packets (CAP_NET_RAW) connections succeed at once instead.
    pub gate: bool,
    /// Take TCP connections to port 53 of any address, loopback included, which are questions about names: to
    /// [`DNS_PEER`], or to the peer of the rule that captures that address.
    pub names: bool,
    /// Where a BPF file system is mounted, for rules that refuse: programs are pinned there, so that they refuse after
    /// this process was killed. Without it they end with it.
    pub pin_at: Option<PathBuf>,
    /// Whether what applications send comes past TCP.
    pub bypass: LocalBypass,
    /// The runtime of whoever takes the gate and accepts; the one that loads, unless said otherwise.
    pub accepted_in: Option<Handle>,
}

impl Default for CaptureConfig {
    fn default() -> Self {
        Self {
            rules: Vec::new(),
            log: LevelFilter::WARN,
            gate: false,
            names: false,
            pin_at: None,
            bypass: LocalBypass::Off,
            accepted_in: None,
        }
    }
}

/// What a connection over this host's default routes has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Native {
    /// Source address and MTU over IPv4.
    pub v4: Option<(Ipv4Addr, u32)>,
    /// The same over IPv6.
    pub v6: Option<(Ipv6Addr, u32)>,
    /// Names of all links, by their index.
    pub links: BTreeMap<u32, String>,
}

/// A captured connection.
#[derive(Debug)]
pub struct Captured {
    /// The agent's end of the loopback hop to the application: no delay, and a reset unless it is closed in order.
    pub socket: AppStream,
    /// The application's end of the loopback hop, for logs.
    pub app: SocketAddr,
    /// Where the application wanted to go; v4-mapped destinations are shown as IPv4.
    pub original: SocketAddr,
    /// The peer index of the rule that claimed the connection.
    pub peer: u32,
    /// Id of the application's cgroup; [`cgroup::name_of`] tells its path.
    pub cgroup: u64,
    /// The loopback hop, by which a [`Knock`] finds its connection.
    pub hop: Hop,
    /// To be told of every byte that is read, if the connection has the local bypass.
    tally: Option<Tally>,
}

impl Captured {
    /// The socket, as the application's end of a stream.
    pub fn into_stream(self) -> AppStream {
        match self.tally {
            Some(tally) => self.socket.past_tcp(tally),
            None => self.socket,
        }
    }
}

/// Loaded programs, their listeners, and the cgroups they are attached to. Dropping it ends the capture of new
/// connections; connections already captured live on.
#[derive(Debug)]
pub struct Capture {
    kernel: Kernel,
    /// Behind the kernel: when the routes go, no program may send anything there.
    namespaces: Namespaces,
    gate: Option<Gate>,
    entrance: Arc<Entrance>,
    /// The agent lives while this is open.
    #[cfg_attr(not(test), expect(dead_code, reason = "held to be dropped"))]
    marker: Marker,
    _log: log::LogTask,
}

impl Capture {
    /// Opens the listeners in the current network namespace and loads the programs.
    ///
    /// Needs a tokio runtime, CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (or root), and Linux 5.15 or later. Nothing is
    /// captured before [`Capture::attach`].
    ///
    /// The agent's own connections are told by its process id: in a pid namespace of its own the agent must not capture
    /// the cgroup that it lives in.
    pub fn load(config: &CaptureConfig) -> Result<Self, CaptureError> {
        let current = Handle::try_current().map_err(|error| CaptureError::Runtime {
            what: "load capture outside of a tokio runtime",
            source: io::Error::other(error),
        })?;
        let accepted_in = config.accepted_in.clone().unwrap_or(current);
        let plan = udp::Plan::new(&config.rules)?;
        let (own, sockets) = own_sockets(config.gate, plan)?;
        let pins = config.pin_at.as_deref().map(Pins::open).transpose()?;
        let (usual, holds) = (sockets.ports(), sockets.injector.is_some());
        let may_enter = privileges::may_enter_namespaces();
        let elsewhere = if may_enter { usual } else { Ports::default() };
        let fields = config.bypass.decide();
        let mut kernel = Kernel::load(elsewhere, holds, config.log, pins, fields.as_ref())?;
        let udp = udp::Half::new(&mut kernel, plan, &config.rules)?;
        kernel.set_rules(&config.rules)?;
        kernel.set_names(config.names)?;
        let marker = Marker::open()?;
        kernel.show_life(&marker)?;
        let namespaces = Namespaces::begin(
            &mut kernel,
            accepted_in.clone(),
            own,
            sockets,
            elsewhere,
            udp,
        )?;
        kernel.set_own(namespaces.own_cookie(), plan.mark.0)?;
        let gate = config.gate.then(|| {
            let _driven_there = accepted_in.enter();
            Gate::open(&mut kernel, namespaces.injectors.clone())
        });
        let gate = gate.transpose()?;
        let entrance = Entrance::new(
            Arc::clone(&namespaces.arrivals),
            kernel.take_accepted()?,
            kernel.bypass.clone(),
        );
        let log = log::LogTask::start(&mut kernel)?;
        kernel.attach_agent(&cgroup::own()?)?;
        Ok(Self {
            kernel,
            namespaces,
            gate,
            entrance: Arc::new(entrance),
            marker,
            _log: log,
        })
    }

    /// The gate, once, if there is one. Whoever takes it must let every [`Knock`] through or refuse it: until then the
    /// application waits in connect(). It also tells of network namespaces: see [`Capture::welcome`].
    pub fn take_gate(&mut self) -> Option<Gate> {
        self.gate.take()
    }

    /// Where captured connections come in.
    pub fn entrance(&self) -> Arc<Entrance> {
        Arc::clone(&self.entrance)
    }

    /// What hands captured datagrams on, once. Whoever takes it must run it: until then they wait, and then are dropped.
    pub fn take_datagrams(&mut self) -> Option<Datagrams> {
        self.namespaces.udp.take()
    }

    /// Captures the sockets that are made in `cgroup` and below it from now on. Sockets that exist already are not
    /// taken over, but their next `connect()` is.
    ///
    /// `cgroup` as for [`cgroup::resolve`]. Nested cgroups may both be attached. A cgroup that is removed and made again,
    /// as a service manager does when it restarts a service, is another cgroup: see [`Capture::reattach`], or attach to
    /// the slice around it.
    pub fn attach(&mut self, cgroup: &Path) -> Result<(), CaptureError> {
        self.attach_filtered(cgroup, &Filter::default())
    }

    /// As [`Capture::attach`]; of what the rules capture, only what `filter` keeps is captured in this cgroup and below
    /// it. The filter goes with the attachment.
    pub fn attach_filtered(&mut self, cgroup: &Path, filter: &Filter) -> Result<(), CaptureError> {
        self.kernel.attach(&cgroup::resolve(cgroup)?, filter)
    }

    /// Ends the capture of `cgroup`; connections already captured live on. Works for a cgroup that no longer exists.
    pub fn detach(&mut self, cgroup: &Path) -> Result<(), CaptureError> {
        self.kernel
            .detach(&cgroup::resolve(cgroup).or_else(|_| cgroup::named(cgroup))?)
    }

    /// Attaches again to cgroups that were removed and made again under their old path, and returns those paths. Sockets
    /// made in between are not captured until they connect again.
    pub fn reattach(&mut self) -> Vec<PathBuf> {
        self.kernel.reattach()
    }

    /// The attached cgroups, in order of their paths.
    pub fn attached(&self) -> Vec<PathBuf> {
        self.kernel.attached()
    }

    /// What the programs have counted since they were loaded.
    pub fn counters(&self) -> Counters {
        let (udp_flows, udp_dropped) = self.namespaces.udp.counts();
        Counters {
            udp_flows,
            udp_dropped,
            ..self.kernel.counters()
        }
    }

    /// What becomes of a connection that a process in `cgroup` (a folder of the hierarchy) makes now, and why: as the
    /// kernel's own tables say. `netns` is the number of the process's network namespace; without it, it is the agent's.
    pub fn explain(
        &self,
        cgroup: &Path,
        netns: Option<u64>,
        question: &Question,
    ) -> Result<Explanation, CaptureError> {
        let reach = self.namespaces.reach(netns);
        explain::explain(
            &self.kernel,
            (&reach, self.namespaces.is_own(netns)),
            cgroup,
            question,
        )
    }

    /// Replaces the rules. Each destination changes from its old policy to its new one at once; on an error of the rules
    /// the old ones stay.
    pub fn update_rules(&mut self, rules: &[CaptureRule]) -> Result<(), CaptureError> {
        self.kernel.set_rules(rules)?;
        self.namespaces.follow(&mut self.kernel, rules)
    }

    /// What a connection would have without capture: captured applications that ask for their address, their link or its
    /// MTU are told so from their next connect() on.
    pub fn set_native(&mut self, native: &Native) -> Result<(), CaptureError> {
        let told = session_ebpf_common::Native {
            source4: native.v4.map_or([0; 4], |(ip, _)| gate::words(ip.into())),
            source6: native.v6.map_or([0; 4], |(ip, _)| gate::words(ip.into())),
            mtu4: native.v4.map_or(0, |(_, mtu)| mtu),
            mtu6: native.v6.map_or(0, |(_, mtu)| mtu),
        };
        self.kernel.set_devices(&native.links)?;
        self.namespaces.set_native(&mut self.kernel, told)
    }

    /// Begins to listen in the network namespace where an application has called connect() while nobody did. Where SYNs are
    /// held that connection waits for it, and is captured; without a gate it went direct, or was refused, as its rule says.
    /// Returns whether a survey is due: what the thread does says nothing of the others there.
    ///
    /// Where it fails, the programs let connections there go direct, or refuse them, as if the agent were dead; that is
    /// logged once.
    pub fn welcome(&mut self, newcomer: &Newcomer) -> bool {
        let welcomed = self.namespaces.welcome(&mut self.kernel, newcomer);
        welcomed.unwrap_or_else(|error| {
            out_of_reach(newcomer.tid, &error);
            true
        })
    }

    /// Listens in the network namespace that a process (or a thread) is in, so that even its first connection finds
    /// somebody, and tells `reply` when it does. Nothing is done for one in a namespace that is open already, such as the
    /// agent's own.
    ///
    /// `netns` is the namespace's number, if the process has told it ([`own_netns`]). Where it has not and the agent may not
    /// look either, the process is taken to be where the agent is: if it is not, its first connection shows it.
    pub fn enter(&mut self, pid: u32, netns: Option<u64>, reply: oneshot::Sender<Entered>) {
        self.namespaces.enter(pid, netns, reply);
    }

    /// The next network namespace that has been opened, or could not be: for [`Capture::take_in`]. Cancel-safe.
    pub async fn opened(&self) -> Opening {
        poll_fn(|cx| self.namespaces.poll_opened(cx)).await
    }

    /// Listens in a network namespace that has been opened. One that could not be is logged once. A survey is due.
    pub fn take_in(&mut self, opened: Opening) {
        if let Some((tid, error)) = self.namespaces.take_in(&mut self.kernel, opened) {
            out_of_reach(tid, &error);
        }
    }

    /// What [`Survey::look`] looks for on a thread that may take its time, and [`Capture::settle`] then acts on.
    pub fn survey(&self) -> Survey {
        Survey {
            cgroups: self.attached(),
            open: self.namespaces.inodes(),
            probes: self.namespaces.probes(),
        }
    }

    /// Begins to listen in the network namespaces where captured processes were found, and listens no longer in those where
    /// two surveys have found none. `busy`: cookies of namespaces in which connections wait, which stay. What cannot be done
    /// is logged once. Returns whether another survey is due.
    pub fn settle(&mut self, found: &Surveyed, busy: &BTreeSet<u64>) -> bool {
        let (due, trouble) = self.namespaces.settle(&mut self.kernel, found, busy);
        for (resident, error) in trouble {
            out_of_reach(resident.tid, &error);
        }
        if let Some((resident, error)) = &found.hidden {
            tracing::debug!(cgroup = %resident.cgroup.display(), thread = resident.tid, %error, "a captured process may be in another network namespace");
        }
        due
    }

    /// Returns when a process has ended by which a network namespace was known to be lived in: a survey is due.
    /// Cancel-safe.
    pub async fn departed(&self) -> u64 {
        poll_fn(|cx| self.namespaces.witnesses.poll_ended(cx)).await
    }

    /// [`Capture::departed`] has told of it.
    pub fn forget_departed(&mut self, departed: u64) {
        self.namespaces.witnesses.remove(departed);
    }

    /// In how many network namespaces beside its own the agent listens.
    pub fn other_namespaces(&self) -> usize {
        self.namespaces.others()
    }
}

/// Says that a captured thread is where its connections cannot be captured.
fn out_of_reach(tid: u32, error: &NamespaceError) {
    let cgroup = cgroup::of_process(tid).unwrap_or_default();
    tracing::warn!(cgroup = %cgroup.display(), thread = tid, %error, "a captured process is in a network namespace where its connections cannot be captured");
}

/// The number of this thread's network namespace (namespaces(7)).
pub fn own_netns() -> io::Result<u64> {
    Ok(Netns::own()?.inode())
}

/// The number of this thread's network namespace, and the agent's sockets in it. Without an injector where this process may
/// not send raw packets.
fn own_sockets(gate: bool, plan: udp::Plan) -> Result<(u64, NamespaceSockets), CaptureError> {
    let own = Netns::own().map_err(|source| CaptureError::Runtime {
        what: "look at the network namespace of the agent",
        source,
    })?;
    let injector = if gate { injector() } else { None };
    let sockets = NamespaceSockets {
        listeners: Opened::open(&Ports::default())?,
        udp: Some(udp::Ground::open(
            plan,
            &Ports::default(),
            injector.clone(),
        )?),
        injector,
        probes: Probes::open(),
        native: session_ebpf_common::Native::default(),
    };
    Ok((own.inode(), sockets))
}

/// The means to send held packets on; none where this process may not.
fn injector() -> Option<Arc<Injector>> {
    match Injector::open() {
        Ok(injector) => Some(Arc::new(injector)),
        Err(error) => {
            tracing::warn!(%error, "captured connections succeed before their targets have answered; CAP_NET_RAW lets applications see what the target says");
            None
        }
    }
}

#[cfg(test)]
impl Capture {
    /// Stops accepting while the agent still seems to live.
    pub fn close_accepting(&self) {
        self.namespaces.own().close();
    }

    /// What the death of the agent does to its sockets.
    pub fn close(&self) {
        self.close_accepting();
        self.marker.close();
    }
}
