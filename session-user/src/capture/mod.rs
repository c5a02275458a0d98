//! Capture: takes the TCP connections of chosen cgroups and hands them to the agent.
//!
//! 1. [`Capture::load`] opens listeners on loopback, loads the eBPF programs and fills their maps.
//! 2. [`Capture::attach`] attaches the programs to a cgroup: from now on a `connect()` in it that matches a rule ends at
//!    one of the listeners.
//! 3. [`Capture::accept`] returns such a connection with the destination that the application wanted.
//!
//! Nothing outside of the attached cgroups changes, and nothing remains: the programs live as long as the [`Capture`],
//! unless they are pinned and its process is killed. When the agent dies, new connections go direct, or are refused
//! where their rule says so and the programs are pinned.

pub mod cgroup;
mod cgroup_id;
mod error;
mod explain;
mod filter;
mod gate;
mod kernel;
mod listeners;
mod log;
mod pins;
mod policy;
mod privileges;
mod probe;
mod programs;
mod rule;
mod scope;
mod syn;
mod tables;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    future::poll_fn,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
};

use tokio::net::TcpStream;
use tracing::level_filters::LevelFilter;

pub use error::CaptureError;
pub use explain::{Explanation, Verdict};
pub use filter::{Destination, Filter, FilterError};
pub use gate::{Gate, GateEvent, Hop, Knock};
pub use kernel::Counters;
pub use policy::{RuleError, check};
pub use probe::{Check, probe};
pub use programs::names as program_names;
pub use rule::{Action, CaptureRule, Protocol, Protocols, Question};
pub use scope::Scope;

pub use pins::{Orphans, can_pin};

use kernel::Kernel;
use listeners::Listeners;
use pins::Pins;

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
    /// Where a BPF file system is mounted, for rules that refuse: programs are pinned there, so that they refuse after
    /// this process was killed. Without it they end with it.
    pub pin_at: Option<PathBuf>,
}

impl Default for CaptureConfig {
    fn default() -> Self {
        Self {
            rules: Vec::new(),
            log: LevelFilter::WARN,
            gate: false,
            pin_at: None,
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
    pub socket: TcpStream,
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
}

/// Loaded programs, their listeners, and the cgroups they are attached to. Dropping it ends the capture of new
/// connections; connections already captured live on.
#[derive(Debug)]
pub struct Capture {
    kernel: Kernel,
    listeners: Listeners,
    gate: Option<Gate>,
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
        tokio::runtime::Handle::try_current().map_err(|error| CaptureError::Runtime {
            what: "load capture outside of a tokio runtime",
            source: io::Error::other(error),
        })?;
        let listeners = Listeners::open()?;
        let pins = config.pin_at.as_deref().map(Pins::open).transpose()?;
        let injector = if config.gate { injector() } else { None };
        let mut kernel = Kernel::load(&listeners.ports(), injector.is_some(), config.log, pins)?;
        kernel.set_rules(&config.rules)?;
        let gate = injector.map(|injector| Gate::open(&mut kernel, injector));
        let gate = gate.transpose()?;
        let log = log::LogTask::start(&mut kernel)?;
        kernel.attach_agent(&cgroup::own()?)?;
        Ok(Self {
            kernel,
            listeners,
            gate,
            _log: log,
        })
    }

    /// The gate, once, if there is one. Whoever takes it must let every [`Knock`] through or refuse it: until then the
    /// application waits in connect().
    pub fn take_gate(&mut self) -> Option<Gate> {
        self.gate.take()
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

    /// To be called whenever the [`Gate`] has told something: connections that are made more than a second after one
    /// that nobody looked at go direct, or are refused, as their rules say.
    pub fn note_answered(&mut self) {
        self.kernel.note_answered();
    }

    /// What the programs have counted since they were loaded.
    pub fn counters(&self) -> Counters {
        self.kernel.counters()
    }

    /// What becomes of a connection that a process in `cgroup` (a folder of the hierarchy) makes now, and why: as the
    /// kernel's own tables say.
    pub fn explain(&self, cgroup: &Path, question: &Question) -> Result<Explanation, CaptureError> {
        explain::explain(&self.kernel, cgroup, question)
    }

    /// Replaces the rules. Each destination changes from its old policy to its new one at once; on an error of the rules
    /// the old ones stay.
    pub fn update_rules(&mut self, rules: &[CaptureRule]) -> Result<(), CaptureError> {
        self.kernel.set_rules(rules)
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
        self.kernel.set_native(told, &native.links)
    }

    /// The next captured connection. Cancel-safe.
    ///
    /// Connections that somebody makes to the listeners by hand are reset and not returned. An error is the system's,
    /// such as EMFILE: the caller decides how long to wait before it asks again.
    pub async fn accept(&self) -> io::Result<Captured> {
        loop {
            let (socket, app) = poll_fn(|cx| self.listeners.poll_accept(cx)).await?;
            listeners::prepare(&socket)?;
            // Without a destination the socket is dropped here, and its zero linger makes that a reset.
            if let Some(original) = self.kernel.destination(&socket) {
                let hop = self.listeners.hop(&socket, app, original.called_at)?;
                return Ok(Captured {
                    socket,
                    app,
                    original: kernel::socket_addr(&original),
                    peer: original.peer,
                    cgroup: original.cgroup,
                    hop,
                });
            }
            tracing::debug!(%app, "reset a connection to a capture port that was not captured");
        }
    }
}

/// The means to send held packets on; none where this process may not.
fn injector() -> Option<gate::Injector> {
    match gate::Injector::open() {
        Ok(injector) => Some(injector),
        Err(error) => {
            tracing::warn!(%error, "captured connections succeed before their targets have answered; CAP_NET_RAW lets applications see what the target says");
            None
        }
    }
}
