//! The network namespaces in which the agent listens: its own, and those of captured processes.
//!
//! The agent's sockets keep a namespace alive. So one is closed when no captured process is left in it, and no more than
//! [`OTHERS_MAX`] are open at once, for any captured process may make namespaces.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::AbortHandle;
use nix::time::{ClockId, clock_gettime};
use session_ebpf_common::{NAMES_KNOWN, NAMESPACES_MAX, Namespace, Native, Newcomer, Ports};

use super::CaptureError;
use super::arrivals::Arrivals;
use super::injector::Injectors;
use super::kernel::Kernel;
#[cfg(test)]
use super::listeners::Listeners;
use super::namespace::{NamespaceSockets, Probes};
use super::netns::{NamespaceError, Netns};
use super::survey::{Resident, Surveyed};
use super::witness::Witnesses;

/// Network namespaces beside the agent's own in which it listens at once.
pub const OTHERS_MAX: usize = 256;
/// Namespaces that are known to be out of reach, at once: what is left of the programs' table.
const REFUSED_MAX: usize = NAMESPACES_MAX as usize - OTHERS_MAX - 1;
/// When the agent asks again what may soon be otherwise, such as an interface that is down.
const SOON: Duration = Duration::from_secs(1);
/// When it asks again what only the operator can change.
const LATER: Duration = Duration::from_secs(60);

/// A namespace in which the agent listens.
struct Open {
    /// Its number in proc.
    inode: u64,
    #[cfg(test)]
    listeners: Arc<Listeners>,
    /// None in the agent's own, whose links are watched.
    probes: Option<Probes>,
    /// What the programs know of it.
    entry: Namespace,
    accepting: AbortHandle,
}

/// How connections in a network namespace reach the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It listens there; `v6`: on IPv6 too.
    Open {
        /// Whether `::1` exists there.
        v6: bool,
    },
    /// Not yet; it tries to as soon as it is told of one.
    New {
        /// Whether that one waits for it.
        held: bool,
    },
    /// Not at all, and why.
    Never(String),
}

/// All of them.
pub struct Namespaces {
    open: BTreeMap<u64, Open>,
    /// Cookie of the agent's own.
    own: u64,
    /// Those out of reach that the programs know of, the oldest first.
    refused: VecDeque<u64>,
    /// Namespaces by number that could not be opened, and why.
    trouble: BTreeMap<u64, String>,
    pub(super) injectors: Injectors,
    pub(super) arrivals: Arrivals,
    pub(super) witnesses: Witnesses,
    /// The ports that are tried first; all 0 where this process may not enter other namespaces.
    usual: Ports,
    /// Whether SYNs are held.
    gate: bool,
}

impl std::fmt::Debug for Namespaces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Namespaces")
            .field("open", &self.open.keys())
            .finish_non_exhaustive()
    }
}

impl Namespaces {
    /// Begins with the agent's own: `sockets` were opened in it.
    pub fn begin(
        kernel: &mut Kernel,
        inode: u64,
        sockets: NamespaceSockets,
        usual: Ports,
    ) -> Result<Self, CaptureError> {
        let mut this = Self {
            open: BTreeMap::new(),
            own: 0,
            refused: VecDeque::new(),
            trouble: BTreeMap::new(),
            injectors: Injectors::default(),
            arrivals: Arrivals::default(),
            witnesses: Witnesses::default(),
            usual,
            gate: sockets.injector.is_some(),
        };
        this.own = this.add(kernel, inode, sockets, true)?;
        Ok(this)
    }

    /// How many there are beside the agent's own.
    pub fn others(&self) -> usize {
        self.open.len().saturating_sub(1)
    }

    /// Whether the programs know that a namespace is out of reach.
    pub fn is_refused(&self, netns_cookie: u64) -> bool {
        self.refused.contains(&netns_cookie)
    }

    /// Whether the namespace with this number, or none, is the agent's own.
    pub fn is_own(&self, inode: Option<u64>) -> bool {
        let own = self.open.get(&self.own);
        inode.is_none_or(|inode| own.is_some_and(|own| own.inode == inode))
    }

    /// How connections reach the agent in the namespace with this number, or in its own.
    pub fn reach(&self, inode: Option<u64>) -> Reach {
        let asked = |(cookie, open): &(&u64, &Open)| match inode {
            Some(inode) => open.inode == inode,
            None => **cookie == self.own,
        };
        match self.open.iter().find(asked) {
            Some((_, open)) => Reach::Open {
                v6: open.entry.ports.v6[0] != 0,
            },
            None => match inode.and_then(|inode| self.trouble.get(&inode)) {
                Some(why) => Reach::Never(why.clone()),
                None => Reach::New {
                    held: self.gate && self.usual.v4 != 0,
                },
            },
        }
    }

    /// Whether the agent listens in the namespace with this number.
    pub fn is_open(&self, inode: u64) -> bool {
        self.open.values().any(|open| open.inode == inode)
    }

    /// Numbers of all that are open.
    pub fn inodes(&self) -> Vec<u64> {
        self.open.values().map(|open| open.inode).collect()
    }

    /// What a connection in the agent's own namespace would have without capture.
    pub fn set_native(&mut self, kernel: &mut Kernel, native: Native) -> Result<(), CaptureError> {
        let Some(own) = self.open.get_mut(&self.own) else {
            return Ok(());
        };
        own.entry.native = native;
        kernel.set_namespace(self.own, &own.entry)
    }

    /// Listens in the namespace that a thread is in, unless that is done already. `inode`: its number, as the thread's own
    /// process says. One that lies is only where nobody listens before it connects.
    pub async fn enter(
        &mut self,
        kernel: &mut Kernel,
        tid: u32,
        inode: Option<u64>,
    ) -> Result<(), NamespaceError> {
        if inode.is_some_and(|inode| self.is_open(inode)) {
            return Ok(());
        }
        let netns = match Netns::of_thread(tid) {
            Err(error @ NamespaceError::Hidden { .. }) if inode.is_none() => {
                tracing::info!(%error, "a process is taken to be in the agent's network namespace");
                return Ok(());
            }
            found => found?,
        };
        if self.is_open(netns.inode()) {
            return Ok(());
        }
        self.open_in(kernel, netns).await?;
        Ok(())
    }

    /// Listens in the namespace where a connect() was called.
    pub async fn welcome(
        &mut self,
        kernel: &mut Kernel,
        newcomer: &Newcomer,
    ) -> Result<(), NamespaceError> {
        let cookie = newcomer.netns_cookie;
        if self.open.contains_key(&cookie) {
            return Ok(());
        }
        let tid = newcomer.tid;
        let opened = match Netns::of_thread(tid) {
            Ok(netns) if self.is_open(netns.inode()) => Err(NamespaceError::Elsewhere { tid }),
            Ok(netns) => {
                let inode = netns.inode();
                let opened = self.open_in(kernel, netns).await;
                if let Err(error) = &opened {
                    self.trouble.insert(inode, error.to_string());
                }
                opened
            }
            Err(error) => Err(error),
        };
        let opened = opened.and_then(|found| {
            let right = found == cookie;
            right.then_some(()).ok_or(NamespaceError::Elsewhere { tid })
        });
        match &opened {
            // Others may be in its namespace: the next that connects is asked about it.
            Ok(()) | Err(NamespaceError::Ended { .. }) => {}
            Err(error) => self.refuse(kernel, cookie, error),
        }
        opened
    }

    async fn open_in(&mut self, kernel: &mut Kernel, netns: Netns) -> Result<u64, NamespaceError> {
        if self.others() >= OTHERS_MAX {
            return Err(NamespaceError::TooMany { max: OTHERS_MAX });
        }
        let (inode, usual, gate) = (netns.inode(), self.usual, self.gate);
        let sockets = netns.run(move || NamespaceSockets::open(&usual, gate));
        let cookie = self.add(kernel, inode, sockets.await?, false)?;
        tracing::info!(netns = inode, "listening in another network namespace");
        Ok(cookie)
    }

    /// Takes sockets in, and tells the programs when all is ready for what they send.
    fn add(
        &mut self,
        kernel: &mut Kernel,
        inode: u64,
        sockets: NamespaceSockets,
        own: bool,
    ) -> Result<u64, CaptureError> {
        let listeners = Arc::new(sockets.listeners.register()?);
        let cookie = listeners.netns_cookie();
        let probes = (!own).then_some(sockets.probes);
        let entry = Namespace {
            ports: listeners.ports(),
            flags: if own { NAMES_KNOWN } else { 0 },
            native: probes.as_ref().map_or_else(Native::default, Probes::native),
            ..Namespace::default()
        };
        kernel.set_namespace(cookie, &entry)?;
        if let Some(injector) = sockets.injector {
            self.injectors.add(cookie, entry.ports, injector);
        }
        let accepting = self.arrivals.add(Arc::clone(&listeners));
        let open = Open {
            inode,
            #[cfg(test)]
            listeners,
            probes,
            entry,
            accepting,
        };
        self.refused.retain(|refused| *refused != cookie);
        self.trouble.remove(&inode);
        self.open.insert(cookie, open);
        Ok(cookie)
    }

    /// The programs are to send nothing from a namespace, and to ask for it again after a while.
    fn refuse(&mut self, kernel: &mut Kernel, cookie: u64, error: &NamespaceError) {
        let after = match error {
            NamespaceError::Hidden { .. }
            | NamespaceError::Closed { .. }
            | NamespaceError::TooMany { .. } => LATER,
            _ => SOON,
        };
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
        let entry = Namespace {
            retry_at: (now + after).as_nanos() as u64,
            ..Namespace::default()
        };
        if let Err(error) = kernel.set_namespace(cookie, &entry) {
            tracing::warn!(%error, "the programs go on asking for a network namespace that is out of reach");
            return;
        }
        if !self.refused.contains(&cookie) {
            self.refused.push_back(cookie);
        }
        while self.refused.len() > REFUSED_MAX {
            if let Some(oldest) = self.refused.pop_front() {
                kernel.forget_namespace(oldest);
            }
        }
    }

    /// Opens what a survey has found, closes where it has found nobody, and learns anew what connections would have.
    /// Returns the namespaces that stay closed though somebody is there, with the reason, those not told of before.
    pub async fn settle(
        &mut self,
        kernel: &mut Kernel,
        found: &Surveyed,
    ) -> Vec<(Resident, NamespaceError)> {
        self.close(kernel, |inode| {
            found.open.contains(&inode) && !found.residents.contains_key(&inode)
        });
        let mut trouble = Vec::new();
        for (inode, resident) in &found.residents {
            match self.enter(kernel, resident.tid, Some(*inode)).await {
                Ok(()) => self.watch(*inode, resident.tid),
                Err(NamespaceError::Ended { .. }) => {}
                Err(error) => trouble.push((resident.clone(), *inode, error)),
            }
        }
        // What is no more need not be remembered, and what was told of not be told again.
        let before = std::mem::take(&mut self.trouble);
        for (_, inode, error) in &trouble {
            self.trouble.insert(*inode, error.to_string());
        }
        trouble.retain(|(_, inode, _)| !before.contains_key(inode));
        self.refresh(kernel);
        let told = trouble.into_iter();
        told.map(|(resident, _, error)| (resident, error)).collect()
    }

    /// Notices the end of a process by which a namespace is known to be lived in.
    fn watch(&mut self, inode: u64, tid: u32) {
        let other = self.open.iter().find(|(_, open)| open.inode == inode);
        if let Some((cookie, _)) = other
            && *cookie != self.own
        {
            self.witnesses.add(*cookie, tid);
        }
    }

    fn close(&mut self, kernel: &mut Kernel, empty: impl Fn(u64) -> bool) {
        let own = self.own;
        let gone = |(cookie, open): (&u64, &Open)| {
            (*cookie != own && empty(open.inode)).then_some(*cookie)
        };
        let gone: Vec<u64> = self.open.iter().filter_map(gone).collect();
        for cookie in gone {
            kernel.forget_namespace(cookie);
            self.injectors.remove(cookie);
            self.witnesses.remove(cookie);
            if let Some(open) = self.open.remove(&cookie) {
                open.accepting.abort();
                tracing::info!(
                    netns = open.inode,
                    "no captured process is left in a network namespace: no longer listening in it"
                );
            }
        }
    }

    /// Tells the programs what connections in other namespaces would have now.
    fn refresh(&mut self, kernel: &mut Kernel) {
        for (cookie, open) in &mut self.open {
            let Some(probes) = &open.probes else { continue };
            let native = probes.native();
            if native == open.entry.native {
                continue;
            }
            open.entry.native = native;
            if let Err(error) = kernel.set_namespace(*cookie, &open.entry) {
                tracing::warn!(%error, "captured applications in another network namespace may be told an old address as theirs");
            }
        }
    }
}

#[cfg(test)]
impl Namespaces {
    /// The agent's own listeners.
    pub fn own(&self) -> &Listeners {
        &self.open[&self.own].listeners
    }

    /// The programs' view of all that are open but the agent's own.
    pub fn entries(&self) -> Vec<Namespace> {
        let others = self.open.iter().filter(|(cookie, _)| **cookie != self.own);
        others.map(|(_, open)| open.entry).collect()
    }
}
