//! Datagrams of applications, on their way to the driver of the session with their peer and back.
//!
//! Whoever has the application's socket (capture, a door) makes an [`AppFlow`] for each conversation and pushes what the
//! application says. What comes back is handed to its [`FlowEnd`] by the driver's own task: nothing waits in between.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use session_proto::session::DatagramInfo;
use session_proto::wire::{Dscp, Target};
use tokio::sync::Notify;

/// Most bytes of datagrams that wait for one peer's driver, as a socket's receive buffer has a limit
/// (`net.core.rmem_default` is 208 KiB, of which each small datagram takes far more than its bytes). Beyond it the
/// newest is dropped.
const WAITING_BYTES_MAX: usize = 1 << 20;
/// What a waiting datagram takes beside its bytes.
const OVERHEAD: usize = 256;
/// A datagram that has waited so long, since no session stands, is dropped: whoever sent it has sent another.
const STALE_AFTER: Duration = Duration::from_secs(2);

/// The application's end of a flow.
///
/// Called by the driver's task, so it must not block: what cannot be taken now is dropped, as the kernel would.
pub trait FlowEnd: Send + Sync {
    /// A datagram came from the target.
    fn deliver(&self, data: &[u8]);
    /// The same, with what belongs to it, for those who can pass that on.
    fn deliver_with(&self, data: &[u8], _info: &DatagramInfo) {
        self.deliver(data);
    }
    /// The target is not to be reached, and this errno says why: `ECONNREFUSED` for an ICMP port unreachable.
    fn failed(&self, errno: i32);
}

/// One conversation of an application: one socket of its, one target.
pub struct AppFlow {
    number: u64,
    /// Where it goes.
    pub target: Target,
    /// The application's end, for logs.
    pub app: String,
    /// Id of the application's cgroup, where it is known.
    pub cgroup: Option<u64>,
    /// The application's socket, if it is not connected: it has one source towards all of its targets, and others than
    /// these may speak to it. None for one that hears its target alone.
    pub group: Option<u64>,
    end: Box<dyn FlowEnd>,
}

impl AppFlow {
    /// A conversation whose answers go to `end`.
    pub fn new(target: Target, app: String, cgroup: Option<u64>, end: Box<dyn FlowEnd>) -> Self {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        Self {
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            target,
            app,
            cgroup,
            group: None,
            end,
        }
    }

    /// The same as a conversation of a socket that is not connected, which `group` tells from all others of this process.
    pub fn of_group(mut self, group: Option<u64>) -> Self {
        self.group = group;
        self
    }

    /// Tells it from all others of this process.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The application's end.
    pub fn end(&self) -> &dyn FlowEnd {
        &*self.end
    }
}

impl fmt::Debug for AppFlow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AppFlow")
            .field("number", &self.number)
            .field("target", &self.target)
            .field("app", &self.app)
            .finish_non_exhaustive()
    }
}

/// What becomes of a flow.
#[derive(Debug)]
pub enum FlowInput {
    /// Its application sent this, which may be empty, and asks such a service for it.
    Datagram(Arc<AppFlow>, Bytes, Dscp),
    /// Its application has gone.
    Closed(Arc<AppFlow>),
}

/// A bounded queue between those who have applications' datagrams and the driver of whatever session stands.
#[derive(Debug, Default)]
pub struct FlowQueue {
    waiting: Mutex<Waiting>,
    arrived: Notify,
    dropped: AtomicU64,
}

#[derive(Debug, Default)]
struct Waiting {
    inputs: VecDeque<(Instant, FlowInput)>,
    bytes: usize,
}

fn cost(input: &FlowInput) -> usize {
    match input {
        FlowInput::Datagram(_, data, _) => data.len() + OVERHEAD,
        FlowInput::Closed(_) => OVERHEAD,
    }
}

impl FlowQueue {
    /// Adds what an application sent; drops it, and counts that, if too much waits.
    pub fn push(&self, flow: &Arc<AppFlow>, data: Bytes) {
        self.push_with(flow, data, Dscp::default());
    }

    /// The same for one for which its application asks for a service.
    pub fn push_with(&self, flow: &Arc<AppFlow>, data: Bytes, dscp: Dscp) {
        self.add(FlowInput::Datagram(Arc::clone(flow), data, dscp));
    }

    /// The application's end has gone. If too much waits, nobody is told: the flow ends when it has been idle.
    pub fn close(&self, flow: &Arc<AppFlow>) {
        self.add(FlowInput::Closed(Arc::clone(flow)));
    }

    fn add(&self, input: FlowInput) {
        let cost = cost(&input);
        let mut waiting = self.lock();
        let now = Instant::now();
        if waiting.bytes + cost > WAITING_BYTES_MAX {
            waiting.forget_stale(now, &self.dropped);
        }
        if waiting.bytes + cost > WAITING_BYTES_MAX {
            drop(waiting);
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        waiting.bytes += cost;
        waiting.inputs.push_back((now, input));
        drop(waiting);
        self.arrived.notify_one();
    }

    /// What has waited longest.
    pub fn pop(&self) -> Option<FlowInput> {
        let mut waiting = self.lock();
        waiting.forget_stale(Instant::now(), &self.dropped);
        let (_, input) = waiting.inputs.pop_front()?;
        waiting.bytes -= cost(&input);
        Some(input)
    }

    /// Datagrams that were dropped here, since too much waited or no session stood.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Returns when something waits. Cancel-safe.
    pub async fn available(&self) {
        loop {
            let arrived = self.arrived.notified();
            if !self.lock().inputs.is_empty() {
                return;
            }
            arrived.await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn forget_stale(&mut self, now: Instant, dropped: &AtomicU64) {
        while let Some((since, input)) = self.inputs.front() {
            if now.duration_since(*since) < STALE_AFTER {
                return;
            }
            self.bytes -= cost(input);
            self.inputs.pop_front();
            dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// An end that nobody listens at.
#[cfg(test)]
pub struct Nobody;

#[cfg(test)]
impl FlowEnd for Nobody {
    fn deliver(&self, _data: &[u8]) {}
    fn failed(&self, _errno: i32) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow() -> Arc<AppFlow> {
        let target = Target::Name("clock.example".to_owned(), 123);
        let app = "an application".to_owned();
        Arc::new(AppFlow::new(target, app, None, Box::new(Nobody)))
    }

    #[test]
    fn what_waits_is_bounded_and_the_newest_is_dropped() {
        let queue = FlowQueue::default();
        let flow = flow();
        let large = 60_000;
        let fit = WAITING_BYTES_MAX / (large + OVERHEAD);
        for n in 0..fit + 3 {
            queue.push(&flow, Bytes::from(vec![n as u8; large]));
        }
        assert_eq!(queue.dropped(), 3);
        for n in 0..fit {
            let Some(FlowInput::Datagram(_, data, _)) = queue.pop() else {
                panic!("datagram {n} is missing")
            };
            assert_eq!(data[0], n as u8);
        }
        assert!(queue.pop().is_none());
    }

    #[test]
    fn an_empty_datagram_is_one_and_an_end_comes_behind_it() {
        let queue = FlowQueue::default();
        let flow = flow();
        queue.push(&flow, Bytes::new());
        queue.close(&flow);
        assert!(matches!(queue.pop(), Some(FlowInput::Datagram(_, data, _)) if data.is_empty()));
        assert!(
            matches!(queue.pop(), Some(FlowInput::Closed(closed)) if closed.number() == flow.number())
        );
    }

    #[test]
    fn what_is_stale_is_dropped_and_makes_room() {
        let dropped = AtomicU64::new(0);
        let mut waiting = Waiting::default();
        let input = FlowInput::Datagram(flow(), Bytes::from_static(b"old"), Dscp::default());
        waiting.bytes = cost(&input);
        let since = Instant::now();
        waiting.inputs.push_back((since, input));
        waiting.forget_stale(since + STALE_AFTER / 2, &dropped);
        assert_eq!(waiting.inputs.len(), 1);
        waiting.forget_stale(since + STALE_AFTER, &dropped);
        assert!(waiting.inputs.is_empty());
        assert_eq!((waiting.bytes, dropped.load(Ordering::Relaxed)), (0, 1));
    }
}
