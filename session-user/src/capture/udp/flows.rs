//! The flows that there are: one for each socket of an application and each destination.

use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::future::pending;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use session_ebpf_common::{CONNECTED, Destination, Original, id_address};
use session_proto::session::DatagramInfo;
use session_proto::wire::{Dscp, Target};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::super::gate::words;
use super::super::kernel::socket_addr;
use super::heard::{AppSocket, Ear, Rules, Stranger};
use super::ids::Collector;
use super::socket::Door;
use super::tables::Tables;
use super::unreachable::Unreachable;
use super::{Ids, Stats, ids};
use crate::requests::{AppFlow, FlowEnd, FlowQueue};

/// Flows at once. Beyond it those go that were not used for a moment; what then finds no room is dropped.
const FLOWS_MAX: usize = 16_384;
/// Where there are too many, a flow without a datagram for so long has ended.
const IDLE_CROWDED: Duration = Duration::from_secs(15);
/// How often room is looked for where there is none.
const CROWDED_EVERY: Duration = Duration::from_secs(1);

/// Where a flow goes.
pub struct FlowWay {
    /// Who takes its datagrams.
    pub queue: Arc<FlowQueue>,
    /// What they are for: its destination, or what that stands for.
    pub target: Target,
    /// What lives as long as the flow does.
    pub kept: Option<Box<dyn Any + Send + Sync>>,
}

/// Says where flows go.
pub trait FlowWays: Send + Sync {
    /// The way of a flow to `original` that was claimed for `peer`. An error is the errno that its application is told.
    fn find(&self, original: SocketAddr, peer: u32) -> Result<FlowWay, i32>;
}

/// A datagram's ends, as the socket saw them.
pub struct Arrival<'a> {
    /// The socket that it came in by.
    pub door: &'a Arc<Door>,
    /// The application's address and port.
    pub app: SocketAddr,
    /// The id of its destination.
    pub id: u32,
    /// The address that stands for it.
    pub to: IpAddr,
}

/// A flow's network namespace, its application, and by the id its destination.
type Key = (u64, SocketAddr, u32);

struct Entry {
    flow: Arc<AppFlow>,
    queue: Arc<FlowQueue>,
    used: Arc<LastUse>,
}

/// Milliseconds since the first flow could be.
#[derive(Debug)]
struct LastUse(AtomicU64);

/// All flows.
pub struct Flows {
    flows: HashMap<Key, Entry>,
    ways: Box<dyn FlowWays>,
    ids: Ids,
    /// Gives up ids that are idle.
    collection: Option<JoinHandle<(Collector, Vec<u32>)>>,
    /// Sockets that are not connected, by network namespace and address.
    sockets: HashMap<(u64, SocketAddr), Weak<AppSocket>>,
    rules: Arc<Rules>,
    strangers: mpsc::Sender<Stranger>,
    stats: Arc<Stats>,
    /// A flow without a datagram for so long has ended.
    idle: Duration,
    epoch: Instant,
    looked_for_room: Option<Instant>,
}

/// The application's end of a flow.
struct Answers {
    /// Gone when the agent has left the network namespace, which a socket would keep alive.
    door: Weak<Door>,
    app: SocketAddr,
    from: IpAddr,
    used: Arc<LastUse>,
    epoch: Instant,
    stats: Arc<Stats>,
    /// None for a socket that hears its target alone.
    ear: Option<Ear>,
    /// Lives as long as the flow.
    _kept: Option<Box<dyn Any + Send + Sync>>,
}

impl FlowEnd for Answers {
    fn deliver(&self, data: &[u8]) {
        self.deliver_with(data, &DatagramInfo::default());
    }

    fn deliver_with(&self, data: &[u8], info: &DatagramInfo) {
        if info.source.is_none() {
            // Strangers would keep a flow for as long as they like.
            self.used.touch(self.epoch);
        }
        let heard = match (info.source, &self.ear) {
            (None, _) => (self.door.upgrade())
                .is_some_and(|door| door.answer(self.from, self.app, data, info.dscp)),
            (Some(source), Some(ear)) => ear.hear(source, data, info.dscp),
            (Some(_), None) => false,
        };
        if !heard {
            self.stats.drop_one();
        }
    }

    fn failed(&self, errno: i32) {
        if let Some(why) = Unreachable::from_errno(errno)
            && let Some(door) = self.door.upgrade()
        {
            door.unreachable(self.from, self.app, why);
        }
    }
}

impl LastUse {
    fn touch(&self, epoch: Instant) {
        let now = epoch.elapsed().as_millis() as u64;
        self.0.store(now, Ordering::Relaxed);
    }

    fn is_idle(&self, epoch: Instant, idle: Duration) -> bool {
        let used = Duration::from_millis(self.0.load(Ordering::Relaxed));
        epoch.elapsed().saturating_sub(used) > idle
    }
}

impl Flows {
    /// None yet. One without a datagram for `idle` ends.
    pub fn new(
        ways: Box<dyn FlowWays>,
        idle: Duration,
        ids: Ids,
        rules: Arc<Rules>,
        strangers: mpsc::Sender<Stranger>,
        stats: Arc<Stats>,
    ) -> Self {
        Self {
            flows: HashMap::new(),
            ways,
            ids,
            collection: None,
            sockets: HashMap::new(),
            rules,
            strangers,
            stats,
            idle,
            epoch: Instant::now(),
            looked_for_room: None,
        }
    }

    /// An application sent something: it goes to the queue of its peer.
    pub fn arrived(&mut self, arrival: &Arrival<'_>, data: &[u8], dscp: Dscp) {
        let key = (arrival.door.netns(), arrival.app, arrival.id);
        if !self.flows.contains_key(&key) && !self.open(key, arrival) {
            self.stats.drop_one();
            return;
        }
        let Some(entry) = self.flows.get(&key) else {
            return;
        };
        entry.used.touch(self.epoch);
        let data = Bytes::copy_from_slice(data);
        entry.queue.push_with(&entry.flow, data, dscp);
    }

    /// A datagram of a flow that is not there: whether there is one now.
    fn open(&mut self, key: Key, arrival: &Arrival<'_>) -> bool {
        let found = self.ids.destination(arrival.id);
        // An id is one of its network namespace, and nobody else's.
        let netns = arrival.door.netns();
        let own = |found: Option<Destination>| found.filter(|found| found.netns_cookie == netns);
        let destination = match found.map(own) {
            Ok(Some(destination)) => destination,
            Ok(None) => {
                // A connected socket that outlived its id: it fails with ECONNREFUSED, and its application connects anew.
                let (door, app) = (arrival.door, arrival.app);
                door.unreachable(arrival.to, app, Unreachable::Port);
                return false;
            }
            Err(error) => {
                tracing::warn!(%error, "the destination of a datagram could not be read");
                return false;
            }
        };
        let original = socket_addr(&Original {
            addr: destination.addr,
            port: destination.port as u16,
            ..Original::default()
        });
        let way = match self.ways.find(original, destination.peer) {
            Ok(way) => way,
            Err(errno) => {
                if let Some(why) = Unreachable::from_errno(errno) {
                    arrival.door.unreachable(arrival.to, arrival.app, why);
                }
                return false;
            }
        };
        if self.flows.len() >= FLOWS_MAX && !self.make_room() {
            return false;
        }
        let entry = self.entry(&destination, way, arrival);
        self.flows.insert(key, entry);
        self.ids.spoken_to(arrival.id);
        self.count();
        true
    }

    fn entry(&mut self, destination: &Destination, way: FlowWay, arrival: &Arrival<'_>) -> Entry {
        let socket = (destination.port & CONNECTED == 0).then(|| self.socket(arrival));
        let group = socket.as_ref().map(|socket| socket.group);
        let ear = socket.map(|socket| Ear {
            socket,
            queue: Arc::clone(&way.queue),
            like: *destination,
            strangers: self.strangers.clone(),
        });
        let used = Arc::new(LastUse(AtomicU64::new(0)));
        let end = Answers {
            door: Arc::downgrade(arrival.door),
            app: arrival.app,
            from: arrival.to,
            used: Arc::clone(&used),
            epoch: self.epoch,
            stats: Arc::clone(&self.stats),
            ear,
            _kept: way.kept,
        };
        let flow = AppFlow::new(
            way.target,
            arrival.app.to_string(),
            Some(destination.cgroup),
            Box::new(end),
        )
        .of_group(group);
        Entry {
            flow: Arc::new(flow),
            queue: way.queue,
            used,
        }
    }

    /// The socket that is not connected and that sent something, known as long as it has flows.
    fn socket(&mut self, arrival: &Arrival<'_>) -> Arc<AppSocket> {
        static GROUPS: AtomicU64 = AtomicU64::new(0);
        let key = (arrival.door.netns(), arrival.app);
        if let Some(known) = self.sockets.get(&key).and_then(Weak::upgrade) {
            return known;
        }
        let socket = Arc::new(AppSocket {
            group: GROUPS.fetch_add(1, Ordering::Relaxed),
            door: Arc::downgrade(arrival.door),
            addr: arrival.app,
        });
        self.sockets.insert(key, Arc::downgrade(&socket));
        socket
    }

    /// Somebody has spoken to a socket whose application has not spoken to him.
    pub fn heard(&mut self, stranger: &Stranger) {
        if !self.pass_on(stranger) {
            self.stats.drop_one();
        }
    }

    /// Whether the application gets it.
    fn pass_on(&mut self, stranger: &Stranger) -> bool {
        let source = stranger.source;
        let Some(peer) = self.rules.peer_of(source) else {
            return false;
        };
        let way = self.ways.find(source, peer);
        if !way.is_ok_and(|way| Arc::ptr_eq(&way.queue, &stranger.queue)) {
            return false;
        }
        let destination = Destination {
            addr: words(source.ip()),
            port: source.port().into(),
            peer,
            ..stranger.like
        };
        // The agent may have left the network namespace.
        let Some(door) = stranger.socket.door.upgrade() else {
            return false;
        };
        match self.ids.id_for(&destination, stranger.socket.group) {
            Ok(Some(id)) => {
                let from = socket_addr(&Original {
                    addr: id_address(id, &destination.addr),
                    ..Original::default()
                });
                let app = stranger.socket.addr;
                door.answer(from.ip(), app, &stranger.data, stranger.dscp)
            }
            Ok(None) => false,
            Err(error) => {
                tracing::warn!(%error, "the source of a datagram can have no id");
                false
            }
        }
    }

    /// Ends flows that were not used for a moment; whether there is room then. Not more often than it helps: a program
    /// that tries all ports must not have all flows looked over for each.
    fn make_room(&mut self) -> bool {
        let now = Instant::now();
        let soon = |looked: Instant| now.duration_since(looked) < CROWDED_EVERY;
        if self.looked_for_room.is_some_and(soon) {
            return false;
        }
        self.looked_for_room = Some(now);
        self.end_idle(IDLE_CROWDED);
        self.flows.len() < FLOWS_MAX
    }

    fn end_idle(&mut self, idle: Duration) {
        let epoch = self.epoch;
        self.flows.retain(|_, entry| {
            if !entry.used.is_idle(epoch, idle) {
                return true;
            }
            entry.queue.close(&entry.flow);
            false
        });
        // A flow of which the driver still has something keeps its socket.
        self.sockets.retain(|_, socket| socket.strong_count() > 0);
        self.count();
    }

    /// Ends those of a network namespace that the agent leaves.
    pub fn end_in(&mut self, netns: u64) {
        self.flows.retain(|(there, ..), entry| {
            let stays = *there != netns;
            if !stays {
                entry.queue.close(&entry.flow);
            }
            stays
        });
        // Where it comes back it has another socket.
        self.sockets.retain(|(there, _), _| *there != netns);
        self.count();
    }

    fn count(&self) {
        let count = self.flows.len() as u64;
        self.stats.flows.store(count, Ordering::Relaxed);
    }

    /// Ends what is idle, and begins to give up ids where there are many, but for those that a socket in `tables` is
    /// connected to. Whether it must be looked again.
    pub fn look_over(&mut self, tables: impl FnOnce() -> Vec<Arc<Tables>>) -> bool {
        self.end_idle(self.idle);
        let crowded = self.ids.is_crowded();
        if crowded && let Some((collector, among)) = self.ids.collector() {
            self.collect(collector, among, tables());
        }
        crowded || !self.flows.is_empty()
    }

    /// Whoever has sockets decides how long it takes to look at them: nobody waits for it.
    fn collect(
        &mut self,
        mut collector: Collector,
        among: Option<Vec<u32>>,
        tables: Vec<Arc<Tables>>,
    ) {
        let busy: HashSet<u32> = self.flows.keys().map(|(.., id)| *id).collect();
        self.collection = Some(tokio::task::spawn_blocking(move || {
            let given_up = collector.collect(among, &busy, ids::IDLE, &tables);
            let given_up = given_up.unwrap_or_else(|error| {
                tracing::warn!(%error, "ids of idle destinations cannot be given up");
                Vec::new()
            });
            (collector, given_up)
        }));
    }

    /// Ids were given up. Never returns where none are. Cancel-safe.
    pub async fn collected(&mut self) {
        let Some(collection) = &mut self.collection else {
            return pending().await;
        };
        match collection.await {
            Ok((collector, given_up)) => {
                let count = given_up.len();
                tracing::debug!(count, "ids of idle destinations were given up");
                self.ids.collected(collector, &given_up);
            }
            // It panics only if we are wrong; then none are given up any more, which is said once.
            Err(error) => {
                tracing::error!(%error, "no ids of destinations can be given up any more")
            }
        }
        self.collection = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Duration = Duration::from_secs(300);

    #[test]
    fn what_strangers_send_is_no_use_of_a_flow() {
        let used = Arc::new(LastUse(AtomicU64::new(0)));
        let epoch = Instant::now().checked_sub(IDLE * 2).unwrap();
        let answers = Answers {
            door: Weak::new(),
            app: "127.0.0.1:5000".parse().unwrap(),
            from: "127.128.0.1".parse().unwrap(),
            used: Arc::clone(&used),
            epoch,
            stats: Arc::default(),
            ear: None,
            _kept: None,
        };
        let stranger = DatagramInfo {
            source: "192.0.2.9:9".parse().ok(),
            ..DatagramInfo::default()
        };
        answers.deliver_with(b"psst", &stranger);
        assert!(used.is_idle(epoch, IDLE));
        answers.deliver(b"here");
        assert!(!used.is_idle(epoch, IDLE));
    }
}
