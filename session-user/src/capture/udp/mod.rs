//! The agent's half of captured UDP: datagrams of applications come in on one socket for each address family and network
//! namespace, find the flow that they belong to, and go to the queue of its peer. What comes back goes out by the same
//! socket.
//!
//! A task of its own runs it ([`Datagrams::run`]), so that bulk delays no connection.

mod batch;
mod doors;
mod flows;
mod half;
mod heard;
mod held;
mod ids;
mod orphans;
mod route;
mod socket;
mod tables;
mod unreachable;

use std::future::{pending, poll_fn};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use session_ebpf_common::id_of;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};

#[cfg(test)]
pub(super) use route::AnyIp as Route;
#[cfg(test)]
pub(super) use tables::Tables as UdpTables;

pub(super) use half::{Ground, Half, Plan};
pub(super) use ids::{IdMaps, Ids};

use super::gate::words;
use batch::Batch;
use doors::{Change, Doors};
use flows::{Arrival, Flows};
pub use flows::{FlowWay, FlowWays};
use heard::Rules;
use held::{Datagram, Held};
use route::{AnyIp, Heir};
use socket::{Door, Mark, Sockets, arrival};
use tables::Tables;
use unreachable::Unreachable;

/// How often flows and ids are looked over while there are any, at least.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// And at most, however soon flows end.
const LOOK_EVERY_MIN: Duration = Duration::from_millis(100);
/// Wait after the ring of held datagrams could not be waited for, which the runtime's end alone brings about.
const RETRY: Duration = Duration::from_millis(100);

/// What the agent's half has counted.
#[derive(Debug, Default)]
pub(super) struct Stats {
    /// Flows that there are now.
    pub flows: AtomicU64,
    /// Datagrams that were dropped, since their destination is not known any more, there are too many flows, or an
    /// application's socket does not take more.
    pub dropped: AtomicU64,
}

impl Stats {
    fn drop_one(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }
}

/// Captured datagrams, from the sockets to the queues. Taken from a [`super::Capture`], and run until that ends.
#[derive(Debug)]
pub struct Datagrams {
    changes: mpsc::UnboundedReceiver<Change>,
    held: Held,
    pub(super) ids: Ids,
    rules: Arc<Rules>,
    stats: Arc<Stats>,
}

impl Datagrams {
    /// Hands datagrams to whom `ways` says, in flows that end without one for `idle`. Runs until it is dropped.
    pub async fn run(mut self, ways: impl FlowWays + 'static, idle: Duration) {
        let mut batch = Batch::default();
        let mut doors = Doors::default();
        let (strangers, mut heard) = mpsc::channel(heard::WAITING_MAX);
        let stats = Arc::clone(&self.stats);
        let ways = Box::new(ways);
        let mut flows = Flows::new(ways, idle, self.ids, self.rules, strangers, stats);
        let mut look_at: Option<Instant> = None;
        loop {
            tokio::select! {
                // None when the capture has ended: what is connected lives on.
                Some(change) = self.changes.recv() => match change {
                    Change::Opened(place) => {
                        let netns = place.netns;
                        doors.add(place);
                        for datagram in self.held.take(netns) {
                            meet(datagram, &doors, &mut flows, &mut self.held, &self.stats);
                        }
                    }
                    Change::Closed(netns) => {
                        doors.remove(netns);
                        flows.end_in(netns);
                    }
                },
                (door, ready) = poll_fn(|cx| doors.poll_ready(cx)) => {
                    if let Err(error) = take(ready, &door, &mut batch, &mut flows) {
                        doors.failed(&door, &error);
                    }
                }
                Some(stranger) = heard.recv() => flows.heard(&stranger),
                datagram = self.held.next() => match datagram {
                    Ok(datagram) => meet(datagram, &doors, &mut flows, &mut self.held, &self.stats),
                    Err(error) => {
                        tracing::warn!(%error, "held datagrams could not be read");
                        sleep(RETRY).await;
                    }
                },
                () = flows.collected() => {}
                () = at(look_at) => look_at = None,
            }
            // An idle host is not woken: the next datagram is.
            if look_at.is_none() && flows.look_over(|| doors.tables()) {
                look_at = Some(Instant::now() + idle.clamp(LOOK_EVERY_MIN, LOOK_EVERY));
            }
        }
    }
}

/// A datagram that was sent before the agent was in its network namespace: it arrives if the agent is there by now.
fn meet(datagram: Datagram, doors: &Doors, flows: &mut Flows, held: &mut Held, stats: &Stats) {
    let Some(door) = doors.of(datagram.netns, datagram.to) else {
        if !held.keep(datagram) {
            stats.drop_one();
        }
        return;
    };
    let (app, to) = (datagram.app, datagram.to);
    if door.local().port() != to.port() {
        // The usual port was somebody else's. A connected socket fails with ECONNREFUSED, and its application connects anew.
        door.unreachable_at(to, app, Unreachable::Port);
        stats.drop_one();
        return;
    }
    if let Some(id) = id_of(&words(to.ip())) {
        let to = to.ip();
        let arrival = Arrival { door, app, id, to };
        flows.arrived(&arrival, &datagram.data, datagram.dscp);
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => pending().await,
    }
}

/// Takes what a socket has, up to a batch. Waits for nothing: whoever can have one socket fail must not have the others
/// wait.
fn take(
    ready: io::Result<()>,
    door: &Arc<Door>,
    batch: &mut Batch,
    flows: &mut Flows,
) -> io::Result<()> {
    match ready.and_then(|()| door.read(batch)) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
        Err(error) => return Err(error),
    }
    for (meta, data) in batch.datagrams() {
        if let Some((app, id, to)) = arrival(meta) {
            let arrival = Arrival { door, app, id, to };
            flows.arrived(&arrival, data, meta.dscp);
        }
    }
    Ok(())
}
