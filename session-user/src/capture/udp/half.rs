//! What capture keeps of UDP: what is to be done in each network namespace, the route there while it is needed, and the
//! sockets until somebody runs them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ipnet::IpNet;
use session_ebpf_common::Ports;
use tokio::sync::mpsc;

use super::super::injector::Injector;
use super::super::kernel::Kernel;
use super::super::rule::{Action, CaptureRule, Protocols};
use super::super::{CaptureError, policy};
use super::doors::{Change, Place};
use super::held::Held;
use super::{AnyIp, Datagrams, Heir, Mark, Rules, Sockets, Stats, Tables};

/// What is opened in a network namespace, and how.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// What marks the datagrams of captured applications.
    pub mark: Mark,
    /// Whether it is the agent's own.
    pub own: bool,
    /// Whether any rule captures UDP over IPv6.
    v6: bool,
}

impl Plan {
    /// That of the agent's own network namespace under these rules, with a new mark.
    pub fn new(rules: &[CaptureRule]) -> Result<Self, CaptureError> {
        Ok(Self {
            mark: Mark::draw()?,
            own: true,
            v6: rules.iter().any(takes_udp6),
        })
    }
}

/// What UDP needs of one network namespace.
#[derive(Debug)]
pub struct Ground {
    sockets: Sockets,
    tables: Arc<Tables>,
    route: Option<AnyIp>,
}

impl Ground {
    /// Opens it in the network namespace that this thread is in, at the ports that are usual elsewhere if they are free,
    /// and has the route there if it is needed, and only then.
    pub fn open(
        plan: Plan,
        usual: &Ports,
        injector: Option<Arc<Injector>>,
    ) -> Result<Self, CaptureError> {
        let injector = injector.or_else(|| Injector::open().ok().map(Arc::new));
        let sockets = Sockets::open(plan.mark, plan.own, usual, injector)?;
        let tables = Arc::new(Tables::open());
        let route = AnyIp::open(Arc::clone(&tables));
        let mut route = route
            .inspect_err(|error| tracing::warn!(%error, "UDP over IPv6 is not captured"))
            .ok();
        if let Some(route) = &mut route {
            if plan.v6 {
                add(route);
            } else if let Err(error) = route.remove() {
                tracing::debug!(%error, "a route of an agent that was killed may still be there");
            }
        }
        Ok(Self {
            sockets,
            tables,
            route,
        })
    }

    /// Ports of the sockets, for IPv4 and IPv6.
    pub fn ports(&self) -> (u16, u16) {
        self.sockets.ports()
    }
}

#[cfg(test)]
impl Ground {
    /// Has no runtime drive its sockets.
    pub fn spoil(&mut self) {
        self.sockets.spoil();
    }
}

/// A network namespace in which the agent is.
#[derive(Debug)]
struct Site {
    ports: (u16, u16),
    route: Option<AnyIp>,
}

impl Site {
    fn has_route(&self) -> bool {
        self.route.as_ref().is_some_and(AnyIp::is_there)
    }

    fn add_route(&mut self) {
        let here = !self.has_route();
        if let Some(route) = self.route.as_mut().filter(|_| here) {
            add(route);
        }
    }

    /// Another may have removed it.
    fn add_route_again(&mut self) {
        if let Some(route) = &mut self.route {
            add(route);
        }
    }

    fn remove_route(&mut self) {
        let there = self.has_route();
        if let Some(route) = self.route.as_mut().filter(|_| there)
            && let Err(error) = route.remove()
        {
            tracing::warn!(%error, "the route of captured IPv6 datagrams stays");
        }
    }
}

fn add(route: &mut AnyIp) {
    if let Err(error) = route.add() {
        tracing::warn!(%error, "UDP over IPv6 is not captured: the route for it could not be added");
    }
}

/// The UDP half of a capture.
#[derive(Debug)]
pub struct Half {
    plan: Plan,
    /// Where the agent is, by the cookies of the network namespaces.
    sites: BTreeMap<u64, Site>,
    /// Routes that are on their way out of network namespaces that were left, by cookie.
    leaving: BTreeMap<u64, Vec<Heir>>,
    changes: mpsc::UnboundedSender<Change>,
    datagrams: Option<Datagrams>,
    rules: Arc<Rules>,
    stats: Arc<Stats>,
}

impl Half {
    /// Begins without any network namespace; `rules` are those of `plan`.
    pub fn new(
        kernel: &mut Kernel,
        plan: Plan,
        rules: &[CaptureRule],
    ) -> Result<Self, CaptureError> {
        let stats = Arc::new(Stats::default());
        let known = Arc::new(Rules::default());
        known.set(rules);
        let (changes, inbox) = mpsc::unbounded_channel();
        let held = Held::open(kernel.take_held()?)?;
        Ok(Self {
            plan,
            sites: BTreeMap::new(),
            leaving: BTreeMap::new(),
            changes,
            datagrams: Some(Datagrams {
                changes: inbox,
                held,
                ids: kernel.take_ids()?,
                rules: Arc::clone(&known),
                stats: Arc::clone(&stats),
            }),
            rules: known,
            stats,
        })
    }

    /// How it is done in another network namespace than the agent's.
    pub fn plan_elsewhere(&self) -> Plan {
        Plan {
            own: false,
            ..self.plan
        }
    }

    /// Takes in what was opened in the network namespace with this cookie.
    pub fn add(&mut self, netns: u64, ground: Ground) -> Result<(), CaptureError> {
        let ports = ground.ports();
        let doors = ground.sockets.register(netns);
        let doors = doors.map_err(|source| CaptureError::Runtime {
            what: "register a socket for datagrams with the runtime",
            source,
        })?;
        let route = ground.route;
        let mut site = Site { ports, route };
        // The rules may have changed since it was begun.
        if self.plan.v6 {
            if self.keep_route(netns) {
                site.add_route_again();
            }
            site.add_route();
        } else {
            site.remove_route();
        }
        self.sites.insert(netns, site);
        let tables = ground.tables;
        // Where nobody takes them they are closed.
        let _ = self.changes.send(Change::Opened(Place {
            netns,
            doors,
            tables,
        }));
        Ok(())
    }

    /// Leaves the network namespace with this cookie.
    pub fn remove(&mut self, netns: u64) {
        let _ = self.changes.send(Change::Closed(netns));
        if let Some(site) = self.sites.remove(&netns) {
            if let Some(route) = &site.route {
                self.leaving.entry(netns).or_default().push(route.heir());
            }
            // Before the route goes, all UDP sockets there are looked at, and whoever is there may have very many.
            tokio::task::spawn_blocking(move || drop(site));
        }
    }

    /// Has the routes stay that are on their way out of a network namespace. Whether there are any: they may have gone
    /// already.
    fn keep_route(&mut self, netns: u64) -> bool {
        self.leaving.retain(|_, heirs| {
            heirs.retain(Heir::is_awaited);
            !heirs.is_empty()
        });
        let heirs = self.leaving.remove(&netns).unwrap_or_default();
        heirs.iter().for_each(Heir::take_over);
        !heirs.is_empty()
    }

    /// Ports for IPv4 and IPv6 destinations in the network namespace with this cookie, for the programs; 0 where
    /// nothing is captured.
    pub fn ports(&self, netns: u64) -> (u16, u16) {
        let Some(site) = self.sites.get(&netns) else {
            return (0, 0);
        };
        let (v4, v6) = site.ports;
        let leads = self.plan.v6 && site.has_route();
        (v4, if leads { v6 } else { 0 })
    }

    /// Makes ready for what `rules` capture, before the programs are told of other [`Half::ports`].
    pub fn follow(&mut self, rules: &[CaptureRule]) {
        self.rules.set(rules);
        self.plan.v6 = rules.iter().any(takes_udp6);
        if self.plan.v6 {
            for netns in self.sites.keys().copied().collect::<Vec<_>>() {
                self.keep_route(netns);
            }
            self.sites.values_mut().for_each(Site::add_route);
        }
    }

    /// Has the routes no longer that no program sends anything to, now that all know it.
    pub fn settle(&mut self) {
        if !self.plan.v6 {
            self.sites.values_mut().for_each(Site::remove_route);
        }
    }

    /// What runs the sockets, once.
    pub fn take(&mut self) -> Option<Datagrams> {
        self.datagrams.take()
    }

    /// Flows that there are now, and datagrams that the agent dropped.
    pub fn counts(&self) -> (u64, u64) {
        let get = |value: &std::sync::atomic::AtomicU64| value.load(Ordering::Relaxed);
        (get(&self.stats.flows), get(&self.stats.dropped))
    }
}

fn takes_udp6(rule: &CaptureRule) -> bool {
    let v6 = |net: &IpNet| matches!(policy::normal(*net), IpNet::V6(_));
    matches!(rule.action, Action::Capture { .. })
        && rule.protocols != Protocols::Tcp
        && rule.to.iter().any(v6)
}
