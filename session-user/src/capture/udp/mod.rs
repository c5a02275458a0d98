//! The agent's half of captured UDP: datagrams of applications come in on one socket for each address family, find the
//! flow that they belong to, and go to the queue of its peer. What comes back goes out by the same socket.
//!
//! A task of its own runs it ([`Datagrams::run`]), so that bulk delays no connection.

mod batch;
mod flows;
mod half;
mod heard;
mod ids;
mod orphans;
mod route;
mod socket;
mod unreachable;

use std::future::pending;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};

#[cfg(test)]
pub(super) use route::AnyIp as Route;

pub(super) use half::Half;
pub(super) use ids::Ids;

use batch::Batch;
use flows::{Arrival, Flows};
pub use flows::{FlowWay, FlowWays};
use heard::Rules;
use route::{AnyIp, remove};
use socket::{Door, Mark, Sockets, arrival};

/// How often flows and ids are looked over while there are any.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// Wait after a socket could not be read for want of memory.
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
    v4: Arc<Door>,
    v6: Option<Arc<Door>>,
    pub(super) ids: Ids,
    rules: Arc<Rules>,
    stats: Arc<Stats>,
}

impl Datagrams {
    fn new(sockets: Sockets, ids: Ids, rules: Arc<Rules>, stats: Arc<Stats>) -> Self {
        Self {
            v4: Arc::new(sockets.v4),
            v6: sockets.v6.map(Arc::new),
            ids,
            rules,
            stats,
        }
    }

    /// Hands datagrams to whom `ways` says. Runs until it is dropped.
    pub async fn run(self, ways: impl FlowWays + 'static) {
        let mut batch = Batch::default();
        let (strangers, mut heard) = mpsc::channel(heard::WAITING_MAX);
        let mut flows = Flows::new(Box::new(ways), self.ids, self.rules, strangers, self.stats);
        let mut look_at: Option<Instant> = None;
        loop {
            tokio::select! {
                ready = self.v4.ready() => take(ready, &self.v4, &mut batch, &mut flows).await,
                ready = ready(self.v6.as_ref()) => {
                    if let Some(door) = &self.v6 {
                        take(ready, door, &mut batch, &mut flows).await;
                    }
                }
                Some(stranger) = heard.recv() => flows.heard(&stranger),
                () = at(look_at) => look_at = None,
            }
            // An idle host is not woken: the next datagram is.
            if look_at.is_none() && flows.look_over().await {
                look_at = Some(Instant::now() + LOOK_EVERY);
            }
        }
    }
}

async fn ready(door: Option<&Arc<Door>>) -> io::Result<()> {
    match door {
        Some(door) => door.ready().await,
        None => pending().await,
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => pending().await,
    }
}

/// Takes what a socket has, up to a batch.
async fn take(ready: io::Result<()>, door: &Arc<Door>, batch: &mut Batch, flows: &mut Flows) {
    match ready.and_then(|()| door.read(batch)) {
        Ok(()) => {
            for (meta, data) in batch.datagrams() {
                if let Some((app, id, to)) = arrival(meta) {
                    let arrival = Arrival { door, app, id, to };
                    flows.arrived(&arrival, data, meta.dscp);
                }
            }
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        Err(error) => {
            tracing::warn!(%error, "captured datagrams could not be read");
            sleep(RETRY).await;
        }
    }
}
