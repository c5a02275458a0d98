//! What capture keeps of UDP: its sockets until somebody runs them, and the route while it is needed.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ipnet::IpNet;

use super::super::kernel::Kernel;
use super::super::rule::{Action, CaptureRule, Protocols};
use super::super::{CaptureError, policy};
use super::{AnyIp, Datagrams, Mark, Rules, Sockets, Stats, remove};

/// The UDP half of a capture.
#[derive(Debug)]
pub struct Half {
    datagrams: Option<Datagrams>,
    /// For IPv4 and IPv6.
    ports: (u16, u16),
    mark: Mark,
    netns_cookie: u64,
    route: Option<AnyIp>,
    rules: Arc<Rules>,
    stats: Arc<Stats>,
}

impl Half {
    /// Opens the sockets in the current network namespace. Nothing is captured before [`Half::follow`].
    pub fn open(kernel: &mut Kernel) -> Result<Self, CaptureError> {
        let mark = Mark::draw()?;
        let sockets = Sockets::open(mark)?;
        let (ports, netns_cookie) = (sockets.ports(), sockets.netns_cookie()?);
        let stats = Arc::new(Stats::default());
        let rules = Arc::new(Rules::default());
        let (ids, known) = (kernel.take_ids()?, Arc::clone(&rules));
        let datagrams = Datagrams::new(sockets, ids, known, Arc::clone(&stats));
        if let Err(error) = remove() {
            tracing::debug!(%error, "a route of an agent that was killed may still be there");
        }
        Ok(Self {
            datagrams: Some(datagrams),
            ports,
            mark,
            netns_cookie,
            route: None,
            rules,
            stats,
        })
    }

    /// Takes what `rules` capture: has the route while they capture UDP over IPv6, and only then.
    pub fn follow(
        &mut self,
        kernel: &mut Kernel,
        rules: &[CaptureRule],
    ) -> Result<(), CaptureError> {
        self.rules.set(rules);
        let (v4, v6) = self.ports;
        let wanted = v6 != 0 && rules.iter().any(takes_udp6);
        if wanted && self.route.is_none() {
            self.route = AnyIp::add()
                .inspect_err(|error| {
                    tracing::warn!(%error, "UDP over IPv6 is not captured: the route for it could not be added");
                })
                .ok();
        }
        let v6 = if wanted && self.route.is_some() {
            v6
        } else {
            0
        };
        kernel.tell_udp(self.netns_cookie, (v4, v6), self.mark.0)?;
        if !wanted {
            // Now that no program sends anything there.
            self.route = None;
        }
        Ok(())
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
