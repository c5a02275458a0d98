//! The network namespaces in which the agent listens: its own, and those of captured processes.
//!
//! The agent's sockets keep a namespace alive. So one is closed when no captured process is left in it, and no more than
//! [`OTHERS_MAX`] are open at once, for any captured process may make namespaces.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::AbortHandle;
use nix::time::{ClockId, clock_gettime};
use session_ebpf_common::{NAMES_KNOWN, NAMESPACES_MAX, Namespace, Native, Newcomer, Ports};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::CaptureError;
use super::arrivals::Arrivals;
use super::injector::Injectors;
use super::kernel::Kernel;
#[cfg(test)]
use super::listeners::Listeners;
use super::namespace::{NamespaceSockets, Probes};
use super::netns::{NamespaceError, Netns};
use super::openings::{Entered, Opened, Openings, Wanted};
use super::refusals::{Refused, Troubles};
use super::rule::CaptureRule;
use super::survey::{Resident, Surveyed};
use super::udp;
use super::witness::Witnesses;

/// Network namespaces beside the agent's own in which it listens at once.
#[cfg(not(test))]
pub const OTHERS_MAX: usize = 256;
/// So few that a test can have them all.
#[cfg(test)]
pub const OTHERS_MAX: usize = 4;
/// Namespaces that are known to be out of reach, at once: what is left of the programs' table.
const REFUSED_MAX: usize = NAMESPACES_MAX as usize - OTHERS_MAX - 1;
/// Namespaces that are tried after one survey.
const ATTEMPTS_MAX: usize = 32;

/// A namespace in which the agent listens.
struct Open {
    /// Its number in proc.
    inode: u64,
    #[cfg(test)]
    listeners: Arc<Listeners>,
    /// Not asked in the agent's own, whose links are watched.
    probes: Arc<Probes>,
    /// What the programs know of it.
    entry: Namespace,
    accepting: AbortHandle,
    /// Whether the last survey has found nobody there.
    was_empty: bool,
}

/// How connections in a network namespace reach the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It listens there; `v6`: on IPv6 too.
    Open {
        /// Whether `::1` exists there.
        v6: bool,
        /// Whether datagrams to IPv4 destinations are captured, and those to IPv6 ones.
        udp: (bool, bool),
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
    /// Those that are being opened, by number.
    wanted: BTreeMap<u64, Wanted>,
    openings: Openings,
    refused: Refused,
    troubles: Troubles,
    pub(super) injectors: Injectors,
    pub(super) arrivals: Arc<Arrivals>,
    /// The runtime of whoever accepts.
    accepted_in: Handle,
    pub(super) witnesses: Witnesses,
    pub(super) udp: udp::Half,
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
    /// Begins with the agent's own: `sockets` were opened in it. Whoever accepts does so in the runtime `accepted_in`.
    pub fn begin(
        kernel: &mut Kernel,
        accepted_in: Handle,
        inode: u64,
        sockets: NamespaceSockets,
        usual: Ports,
        udp: udp::Half,
    ) -> Result<Self, CaptureError> {
        let mut this = Self {
            open: BTreeMap::new(),
            own: 0,
            wanted: BTreeMap::new(),
            openings: Openings::default(),
            refused: Refused::default(),
            troubles: Troubles::default(),
            injectors: Injectors::default(),
            arrivals: Arc::default(),
            accepted_in,
            witnesses: Witnesses::default(),
            udp,
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

    /// Cookie of the agent's own.
    pub fn own_cookie(&self) -> u64 {
        self.own
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
                udp: (open.entry.ports.udp4 != 0, open.entry.ports.udp6 != 0),
            },
            None => match inode.and_then(|inode| self.troubles.why(inode)) {
                Some(why) => Reach::Never(why.to_owned()),
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

    /// Captures the datagrams that `rules` are for, in all that are open.
    pub fn follow(
        &mut self,
        kernel: &mut Kernel,
        rules: &[CaptureRule],
    ) -> Result<(), CaptureError> {
        self.udp.follow(rules);
        for (cookie, open) in &mut self.open {
            let ports = &mut open.entry.ports;
            (ports.udp4, ports.udp6) = self.udp.ports(*cookie);
            kernel.set_namespace(*cookie, &open.entry)?;
        }
        self.udp.settle();
        Ok(())
    }

    /// Listens in the namespace that a thread is in, unless that is done already, and tells `reply` when it does. `inode`:
    /// the namespace's number, as the thread's own process says. One that lies is only where nobody listens before it
    /// connects.
    pub fn enter(&mut self, tid: u32, inode: Option<u64>, reply: oneshot::Sender<Entered>) {
        let wanted = self.want_for(tid, inode);
        let answer = match wanted {
            Ok(Some(wanted)) => return wanted.waiters.push(reply),
            Ok(None) => Ok(()),
            Err(error) => Err(Arc::new(error)),
        };
        // Whoever asked may have gone.
        let _ = reply.send(answer);
    }

    fn want_for(
        &mut self,
        tid: u32,
        inode: Option<u64>,
    ) -> Result<Option<&mut Wanted>, NamespaceError> {
        if inode.is_some_and(|inode| self.is_open(inode)) {
            return Ok(None);
        }
        let netns = match Netns::of_thread(tid) {
            Err(error @ NamespaceError::Hidden { .. }) if inode.is_none() => {
                tracing::info!(%error, "a process is taken to be in the agent's network namespace");
                return Ok(None);
            }
            found => found?,
        };
        if self.is_open(netns.inode()) {
            return Ok(None);
        }
        self.want(netns, tid).map(Some)
    }

    /// Begins to listen in the namespace where a connect() was called, unless that is done, is being done, or has just
    /// been found to be in vain. Returns whether it was looked at; an error is one that is to be told of.
    pub fn welcome(
        &mut self,
        kernel: &mut Kernel,
        newcomer: &Newcomer,
    ) -> Result<bool, NamespaceError> {
        let (cookie, tid) = (newcomer.netns_cookie, newcomer.tid);
        // One that is expected already may be so by a caller who is elsewhere.
        if self.open.contains_key(&cookie) || self.refused.is_early(cookie, now()) {
            return Ok(false);
        }
        let elsewhere = || NamespaceError::Elsewhere { tid };
        let found = match Netns::of_thread(tid) {
            // Its process is as likely to be there.
            Err(NamespaceError::Ended { .. }) => Netns::of_thread(newcomer.tgid),
            found => found,
        };
        let wanted = found.and_then(|netns| {
            if self.is_open(netns.inode()) {
                return Err(elsewhere());
            }
            self.want(netns, tid)
        });
        let noted =
            wanted.and_then(|wanted| wanted.note(cookie).then_some(()).ok_or_else(elsewhere));
        match noted {
            Ok(()) => self.injectors.expect(cookie),
            Err(error) => {
                let known = self.refused.contains(cookie);
                self.refuse(kernel, cookie, &error);
                if !known {
                    return Err(error);
                }
            }
        }
        Ok(true)
    }

    /// Begins to open a namespace, unless that is being done already.
    fn want(&mut self, netns: Netns, tid: u32) -> Result<&mut Wanted, NamespaceError> {
        let full = self.others() + self.wanted.len() >= OTHERS_MAX;
        match self.wanted.entry(netns.inode()) {
            Entry::Occupied(wanted) => Ok(wanted.into_mut()),
            Entry::Vacant(_) if full => Err(NamespaceError::TooMany { max: OTHERS_MAX }),
            Entry::Vacant(new) => {
                let (usual, gate) = (self.usual, self.gate);
                let plan = self.udp.plan_elsewhere();
                let open = move || NamespaceSockets::open(&usual, gate, plan);
                self.openings.begin(netns, open);
                Ok(new.insert(Wanted::by(tid)))
            }
        }
    }

    /// Takes in what came of an opening, and tells those who wait for it. Returns a failure that is to be told of, and the
    /// thread that was found there.
    pub fn take_in(
        &mut self,
        kernel: &mut Kernel,
        Opened { inode, sockets }: Opened,
    ) -> Option<(u32, Arc<NamespaceError>)> {
        let wanted = self.wanted.remove(&inode)?;
        let added = sockets.and_then(|sockets| Ok(self.add(kernel, inode, sockets, false)?));
        let added = added.map_err(Arc::new);
        if let Ok(found) = &added {
            self.injectors.forget_expected(*found);
        }
        let elsewhere = NamespaceError::Elsewhere { tid: wanted.tid };
        for cookie in wanted.cookies() {
            let open = self.open.contains_key(&cookie);
            // Another thread that has called there may be right.
            if !open && self.wanted.values().any(|other| other.may_be(cookie)) {
                continue;
            }
            self.injectors.forget_expected(cookie);
            match &added {
                _ if open => {}
                Ok(_) => self.refuse(kernel, cookie, &elsewhere),
                Err(error) => self.refuse(kernel, cookie, error),
            }
        }
        for waiter in wanted.waiters {
            let _ = waiter.send(added.clone().map(drop));
        }
        match added {
            Ok(_) => {
                self.watch(inode, wanted.tid);
                tracing::info!(netns = inode, "listening in another network namespace");
                None
            }
            Err(error) => {
                let first = self.troubles.note(inode, &error, now());
                first.then_some((wanted.tid, error))
            }
        }
    }

    /// What came of an opening, for [`Namespaces::take_in`].
    pub fn poll_opened(&self, cx: &mut Context<'_>) -> Poll<Opened> {
        self.openings.poll_next(cx)
    }

    /// Takes sockets in, and tells the programs when all is ready for what they send.
    fn add(
        &mut self,
        kernel: &mut Kernel,
        inode: u64,
        sockets: NamespaceSockets,
        own: bool,
    ) -> Result<u64, CaptureError> {
        let listeners = Arc::new(sockets.listeners.register(&self.accepted_in)?);
        let cookie = listeners.netns_cookie();
        match sockets.udp.map(|ground| self.udp.add(cookie, ground)) {
            // Nobody would know that what the rules say of datagrams does not hold.
            Some(Err(error)) if own => return Err(error),
            // Connections are captured all the same: without ports the programs send no datagram here.
            Some(Err(error)) => {
                tracing::warn!(%error, netns = inode, "UDP is not captured in a network namespace");
            }
            Some(Ok(())) | None => {}
        }
        let (udp4, udp6) = self.udp.ports(cookie);
        let entry = Namespace {
            ports: Ports {
                udp4,
                udp6,
                ..listeners.ports()
            },
            flags: if own { NAMES_KNOWN } else { 0 },
            native: sockets.native,
            ..Namespace::default()
        };
        if let Err(error) = kernel.set_namespace(cookie, &entry) {
            self.udp.remove(cookie);
            return Err(error);
        }
        if let Some(injector) = sockets.injector {
            self.injectors.add(cookie, entry.ports, injector);
        }
        let accepting = self.arrivals.add(Arc::clone(&listeners));
        let open = Open {
            inode,
            #[cfg(test)]
            listeners,
            probes: Arc::new(sockets.probes),
            entry,
            accepting,
            was_empty: false,
        };
        self.refused.remove(cookie);
        self.troubles.remove(inode);
        self.open.insert(cookie, open);
        Ok(cookie)
    }

    /// The programs are to send nothing from a namespace, and to ask for it again after a while.
    pub(super) fn refuse(&mut self, kernel: &mut Kernel, cookie: u64, error: &NamespaceError) {
        // First, for the table may be full.
        while let Some(oldest) = self.refused.make_room(cookie, REFUSED_MAX) {
            kernel.forget_namespace(oldest);
        }
        let retry_at = now() + error.retry_after();
        let entry = Namespace {
            retry_at: retry_at.as_nanos() as u64,
            ..Namespace::default()
        };
        self.refused.insert(cookie, retry_at);
        if let Err(error) = kernel.set_namespace(cookie, &entry) {
            tracing::warn!(%error, "the programs go on asking for a network namespace that is out of reach");
        }
    }

    /// Opens what a survey has found, closes where two have found nobody, and tells the programs anew what connections
    /// would have. `busy`: cookies of namespaces in which connections wait. Returns whether another survey is due, and the
    /// failures that are to be told of.
    pub fn settle(
        &mut self,
        kernel: &mut Kernel,
        found: &Surveyed,
        busy: &BTreeSet<u64>,
    ) -> (bool, Vec<(Resident, NamespaceError)>) {
        let doubtful = self.close(kernel, found, busy);
        self.troubles
            .retain(|inode| found.residents.contains_key(&inode));
        let now = now();
        let open: BTreeSet<u64> = self.inodes().into_iter().collect();
        let mut due = Vec::new();
        for (inode, resident) in &found.residents {
            if open.contains(inode) {
                self.watch(*inode, resident.tid);
            } else if !self.wanted.contains_key(inode)
                && let Some(tries) = self.troubles.due(*inode, now)
            {
                due.push((tries, *inode, resident));
            }
        }
        // Whatever fails over and over keeps no other waiting.
        due.sort_by_key(|(tries, inode, _)| (*tries, *inode));
        let left = due.len() > ATTEMPTS_MAX;
        let mut told = Vec::new();
        for (_, inode, resident) in due.into_iter().take(ATTEMPTS_MAX) {
            let netns = Netns::of_thread(resident.tid);
            let there = netns.map(|netns| Some(netns).filter(|netns| netns.inode() == inode));
            let wanted = there.and_then(|netns| match netns {
                Some(netns) => self.want(netns, resident.tid).map(drop),
                None => Ok(()),
            });
            match wanted {
                Ok(()) | Err(NamespaceError::Ended { .. }) => {}
                Err(error) => {
                    if self.troubles.note(inode, &error, now) {
                        told.push((resident.clone(), error));
                    }
                }
            }
        }
        self.refresh(kernel, &found.natives);
        (doubtful || left, told)
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

    /// Closes where two surveys one after the other have found nobody: one may miss a process that is moved, or is made,
    /// while it looks. Returns whether a second one is due.
    fn close(&mut self, kernel: &mut Kernel, found: &Surveyed, busy: &BTreeSet<u64>) -> bool {
        let (own, mut doubtful, mut gone) = (self.own, false, Vec::new());
        for (cookie, open) in &mut self.open {
            // What was not open when the survey began was not looked for.
            if *cookie == own || !found.open.contains(&open.inode) {
                continue;
            }
            let empty = !found.residents.contains_key(&open.inode) && !busy.contains(cookie);
            if empty && open.was_empty {
                gone.push(*cookie);
            } else {
                doubtful |= empty;
            }
            open.was_empty = empty;
        }
        for cookie in gone {
            kernel.forget_namespace(cookie);
            self.udp.remove(cookie);
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
        doubtful
    }

    /// Tells the programs what connections in other namespaces would have now.
    fn refresh(&mut self, kernel: &mut Kernel, natives: &[(u64, Native)]) {
        for (cookie, native) in natives {
            let Some(open) = self.open.get_mut(cookie) else {
                continue;
            };
            if *native == open.entry.native {
                continue;
            }
            open.entry.native = *native;
            if let Err(error) = kernel.set_namespace(*cookie, &open.entry) {
                tracing::warn!(%error, "captured applications in another network namespace may be told an old address as theirs");
            }
        }
    }

    /// What asks the other namespaces for their routes, by cookie.
    pub fn probes(&self) -> Vec<(u64, Arc<Probes>)> {
        let others = self.open.iter().filter(|(cookie, _)| **cookie != self.own);
        others
            .map(|(cookie, open)| (*cookie, Arc::clone(&open.probes)))
            .collect()
    }
}

/// CLOCK_MONOTONIC, as the programs have it.
fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
impl Namespaces {
    /// The agent's own listeners.
    pub fn own(&self) -> &Listeners {
        &self.open[&self.own].listeners
    }

    /// The programs' view of the agent's own.
    pub fn own_entry(&self) -> Namespace {
        self.open[&self.own].entry
    }

    /// The programs' view of all that are open but the agent's own.
    pub fn entries(&self) -> Vec<Namespace> {
        let others = self.open.iter().filter(|(cookie, _)| **cookie != self.own);
        others.map(|(_, open)| open.entry).collect()
    }
}
