//! UDP through a door: a port that leads to one target, or whatever targets a client of SOCKS5 names.
//!
//! Each client and target are one flow. A client is known by its address alone, so a flow ends when nothing was said for
//! a while, and where many come the one that was silent for longest makes room. What a target's host says by ICMP is in
//! the log; a client's socket does not hear it.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use session_proto::wire::Target;
use tokio::net::UdpSocket;
use tokio::time::MissedTickBehavior;

use super::Door;
use crate::requests::{AppFlow, FlowEnd, RequestQueue};
use crate::transport::{Batch, PacketSocket, ReceiveRoom};

/// Conversations of one door at once.
const FLOWS_MAX: usize = 4096;
/// How often silent ones are looked for, at most, as a part of the time that they may be silent.
const LOOKS: u32 = 4;
/// Wait after receiving failed.
const RETRY: Duration = Duration::from_millis(100);

/// When a conversation was last heard of, as both its directions see it.
#[derive(Debug)]
pub(super) struct Heard {
    since: Instant,
    /// Milliseconds since then.
    at: AtomicU64,
}

impl Heard {
    pub fn now() -> Arc<Self> {
        Arc::new(Self {
            since: Instant::now(),
            at: AtomicU64::new(0),
        })
    }

    pub fn note(&self) {
        let at = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.at.store(at, Ordering::Relaxed);
    }

    fn last(&self) -> Instant {
        self.since + Duration::from_millis(self.at.load(Ordering::Relaxed))
    }
}

/// The conversations of one door, or of one client of SOCKS5, by what tells them apart.
#[derive(Debug)]
pub(super) struct Conversations<K> {
    open: HashMap<K, (Arc<AppFlow>, Arc<Heard>)>,
    most: usize,
    idle: Duration,
    requests: Arc<RequestQueue>,
}

impl<K: Clone + Eq + std::hash::Hash> Conversations<K> {
    pub fn new(most: usize, idle: Duration, requests: Arc<RequestQueue>) -> Self {
        Self {
            open: HashMap::new(),
            most,
            idle,
            requests,
        }
    }

    /// Sends `data` in the conversation `key`, which `begin` makes if there is none.
    pub fn send(&mut self, key: &K, data: Bytes, begin: impl FnOnce(&Arc<Heard>) -> AppFlow) {
        if let Some((flow, heard)) = self.open.get(key) {
            heard.note();
            return self.requests.flows.push(flow, data);
        }
        if self.open.len() >= self.most {
            self.make_room();
        }
        let heard = Heard::now();
        let flow = Arc::new(begin(&heard));
        self.requests.flows.push(&flow, data);
        self.open.insert(key.clone(), (flow, heard));
    }

    fn make_room(&mut self) {
        let oldest = self.open.iter().min_by_key(|(_, (_, heard))| heard.last());
        if let Some(key) = oldest.map(|(key, _)| key.clone())
            && let Some((flow, _)) = self.open.remove(&key)
        {
            self.requests.flows.close(&flow);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// How often [`Self::forget_silent`] is of use.
    pub fn look_every(&self) -> Duration {
        (self.idle / LOOKS).max(Duration::from_millis(100))
    }

    /// Ends those in which nothing was said for the configured time.
    pub fn forget_silent(&mut self) {
        let (now, idle, requests) = (Instant::now(), self.idle, &self.requests);
        self.open.retain(|_, (flow, heard)| {
            let lives = now.saturating_duration_since(heard.last()) < idle;
            if !lives {
                requests.flows.close(flow);
            }
            lives
        });
    }
}

impl<K> Drop for Conversations<K> {
    fn drop(&mut self) {
        for (flow, _) in self.open.values() {
            self.requests.flows.close(flow);
        }
    }
}

/// A client of a door that leads to one target.
struct Client {
    socket: Arc<PacketSocket>,
    client: SocketAddr,
    /// Which of our addresses it knows.
    ours: Option<IpAddr>,
    heard: Arc<Heard>,
}

impl FlowEnd for Client {
    fn deliver(&self, data: &[u8]) {
        self.heard.note();
        if let Err(error) = self.socket.try_send(self.client, self.ours, data, None) {
            tracing::debug!(client = %self.client, %error, "a datagram is dropped");
        }
    }

    fn failed(&self, _errno: i32) {
        // An unconnected socket sends no ICMP; the driver has told the log.
    }
}

/// Opens the UDP port of a door.
pub(super) fn open(addr: SocketAddr) -> io::Result<PacketSocket> {
    PacketSocket::listen(addr)?.fragmenting()
}

/// Takes what clients send to `target` until it is aborted.
pub(super) async fn keep(socket: PacketSocket, door: Arc<Door>, target: Target) {
    let socket = Arc::new(socket);
    let mut room = ReceiveRoom::default();
    let requests = Arc::clone(&door.requests);
    let mut open = Conversations::new(FLOWS_MAX, door.flow_idle, requests);
    let mut look = tokio::time::interval(open.look_every());
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = false;
    loop {
        tokio::select! {
            received = socket.recv(&mut room) => match received {
                Ok(count) => {
                    for batch in room.batches(count) {
                        if door.admits(batch.from.ip()) {
                            forward(&socket, &target, &batch, &mut open);
                        } else if !std::mem::replace(&mut told, true) {
                            tracing::warn!(at = %door.at, client = %batch.from, "a client is turned away: [[listen]] `from` does not name it");
                        }
                    }
                }
                Err(error) => {
                    tracing::debug!(at = %door.at, %error, "receiving datagrams");
                    tokio::time::sleep(RETRY).await;
                }
            },
            // Where nobody speaks, nothing wakes the host.
            _ = look.tick(), if !open.is_empty() => open.forget_silent(),
        }
    }
}

fn forward(
    socket: &Arc<PacketSocket>,
    target: &Target,
    batch: &Batch<'_>,
    open: &mut Conversations<(SocketAddr, Option<IpAddr>)>,
) {
    let (client, ours) = (batch.from, batch.to);
    let begin = |heard: &Arc<Heard>| {
        let end = Client {
            socket: Arc::clone(socket),
            client,
            ours,
            heard: Arc::clone(heard),
        };
        AppFlow::new(target.clone(), client.to_string(), None, Box::new(end))
    };
    if batch.bytes.is_empty() {
        return open.send(&(client, ours), Bytes::new(), begin);
    }
    for data in batch.packets() {
        open.send(&(client, ours), Bytes::copy_from_slice(data), begin);
    }
}

/// Sends without waiting, also where tokio has not heard from the socket yet.
pub(super) fn send_now(socket: &UdpSocket, to: SocketAddr, data: &[u8]) -> io::Result<()> {
    let sent = socket2::SockRef::from(socket).send_to(data, &to.into());
    sent.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::door::{At, Leads};
    use crate::requests::{FlowInput, Nobody};

    fn flow(_: &Arc<Heard>) -> AppFlow {
        let target = Target::Addr("192.0.2.1:9".parse().unwrap());
        AppFlow::new(target, "a client".to_owned(), None, Box::new(Nobody))
    }

    fn closed(requests: &RequestQueue) -> usize {
        let all = std::iter::from_fn(|| requests.flows.pop());
        all.filter(|input| matches!(input, FlowInput::Closed(_)))
            .count()
    }

    #[test]
    fn conversations_are_bounded_and_end_when_they_are_silent() {
        let requests = Arc::new(RequestQueue::default());
        let mut open = Conversations::new(2, Duration::ZERO, Arc::clone(&requests));
        for client in [1, 1, 2, 3] {
            open.send(&client, Bytes::from_static(b"?"), flow);
        }
        assert_eq!((open.open.len(), closed(&requests)), (2, 1));
        open.forget_silent();
        assert_eq!((open.open.len(), closed(&requests)), (0, 2));
        open.send(&4, Bytes::new(), flow);
        drop(open);
        assert_eq!(closed(&requests), 1);
    }

    #[tokio::test]
    async fn what_clients_send_has_a_flow_for_each_and_answers_find_them() {
        let target: Target = "192.0.2.1:53".parse().unwrap();
        let requests = Arc::new(RequestQueue::default());
        let socket = open("127.0.0.1:0".parse().unwrap()).unwrap();
        let at = socket.local_addr();
        let door = Door {
            at: At::Udp(at),
            leads: Leads::To(target.clone()),
            from: Vec::new(),
            group: None,
            flow_idle: Duration::from_secs(60),
            requests: Arc::clone(&requests),
            names: None,
        };
        let keeping = tokio::spawn(keep(socket, Arc::new(door), target.clone()));
        let clients = [
            UdpSocket::bind("127.0.0.1:0").await.unwrap(),
            UdpSocket::bind("127.0.0.1:0").await.unwrap(),
        ];
        let mut flows = Vec::new();
        for client in &clients {
            client.send_to(&[], at).await.unwrap();
            requests.flows.available().await;
            let Some(FlowInput::Datagram(flow, data, _)) = requests.flows.pop() else {
                panic!("no datagram came")
            };
            assert!(data.is_empty() && flow.target == target);
            flows.push(flow);
        }
        assert_ne!(flows[0].number(), flows[1].number());
        let large = vec![7; 65_507];
        let mut heard = vec![0; 70_000];
        flows[1].end().deliver(&large);
        let (n, from) = clients[1].recv_from(&mut heard).await.unwrap();
        assert_eq!((&heard[..n], from), (&large[..], at));
        keeping.abort();
    }
}
