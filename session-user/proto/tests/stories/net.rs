//! Two sessions with flows, TCP by [`Pair`], and UDP over two links to one server.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytes::BytesMut;
use session_proto::Time;
use session_proto::session::{Config, FlowId, UdpPath, UdpTransmit};

use crate::pair::{Pair, config_of, drain, feed, target};

/// The initiator's addresses on its two links, as the server sees them.
pub const A: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 1001);
pub const B: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2)), 1002);
const C: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 3)), 1003);
/// An address of the responder at which nobody is.
pub const NOWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 99)), 443);
/// The responder's.
pub const SERVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 100)), 443);

/// One way, over UDP.
const DELAY: Duration = Duration::from_millis(10);

pub struct FlowPair {
    pub pair: Pair,
    /// What is on its way: when it arrives, and whether the initiator sent it.
    flight: VecDeque<(Time, UdpTransmit, bool)>,
    /// What the server sees of each path.
    seen_as: BTreeMap<UdpPath, SocketAddr>,
    /// Everything that was sent over UDP.
    pub sent: Vec<(UdpTransmit, bool)>,
    pub packets: usize,
    pub tcp_bytes: usize,
    /// UDP gets nothing through.
    pub drop_all: bool,
    /// Nothing to or from these passes.
    pub dead: BTreeSet<SocketAddr>,
    /// Larger UDP payloads vanish.
    pub mtu: usize,
}

impl FlowPair {
    /// Both ends allow four flows, and have no UDP.
    pub fn over_tcp() -> Self {
        Self::with_config(config_of(|_| {}))
    }

    pub fn with_config(config: Config) -> Self {
        Self {
            pair: Pair::open(&config),
            flight: VecDeque::new(),
            seen_as: BTreeMap::from([(UdpPath(1), A), (UdpPath(2), B), (UdpPath(3), C)]),
            sent: Vec::new(),
            packets: 0,
            tcp_bytes: 0,
            drop_all: false,
            dead: BTreeSet::new(),
            mtu: 65_535,
        }
    }

    /// The same with UDP on both links; the first is preferred.
    pub fn with_udp() -> Self {
        let mut net = Self::over_tcp();
        net.add_udp();
        net
    }

    pub fn add_udp(&mut self) {
        let now = self.pair.now;
        for path in [UdpPath(1), UdpPath(2)] {
            self.pair.a.udp_path_added(now, path, &[SERVER], 1500);
        }
        self.pair.b.udp_path_added(now, UdpPath(1), &[], 1500);
        self.pair.a.prefer_udp(now, UdpPath(1));
    }

    /// A flow with datagrams in both directions over UDP.
    pub fn warm_up(&mut self) -> FlowId {
        let id = self.pair.a.open_flow(self.pair.now, target()).unwrap();
        for _ in 0..3 {
            self.pair
                .a
                .send_datagram(self.pair.now, id, b"warm")
                .unwrap();
            self.run();
            self.pair
                .b
                .send_datagram(self.pair.now, id, b"warm")
                .unwrap();
            self.run();
        }
        assert!(self.pair.a.udp_status().unwrap().usable);
        assert!(self.pair.b.udp_status().unwrap().usable);
        id
    }

    /// The NAT of one link has forgotten: from now on it has another address.
    pub fn rebind(&mut self, old: SocketAddr, new: SocketAddr) {
        self.dead.insert(old);
        for seen in self.seen_as.values_mut().filter(|s| **s == old) {
            *seen = new;
        }
    }

    /// A packet goes on its way.
    pub fn put(&mut self, transmit: UdpTransmit) {
        let by_a = transmit.to == SERVER;
        self.packets += 1;
        self.sent.push((transmit.clone(), by_a));
        if transmit.to != NOWHERE {
            self.flight
                .push_back((self.pair.now + DELAY, transmit, by_a));
        }
    }

    /// The packet that has been under way for the longest time arrives.
    pub fn deliver_one(&mut self) {
        let Some((at, transmit, by_a)) = self.flight.pop_front() else {
            return;
        };
        self.pair.now = self.pair.now.max(at);
        let now = self.pair.now;
        let client = if by_a {
            self.seen_as[&transmit.path]
        } else {
            transmit.to
        };
        let lost = self.drop_all || self.dead.contains(&client);
        if lost || transmit.packet.len() > self.mtu {
            return;
        }
        let packet = BytesMut::from(&transmit.packet[..]);
        if by_a {
            let _ = self.pair.b.handle_udp(now, UdpPath(1), client, packet);
            return;
        }
        let found = self.seen_as.iter().find(|(_, seen)| **seen == client);
        if let Some((&path, _)) = found {
            let _ = self.pair.a.handle_udp(now, path, SERVER, packet);
        }
    }

    fn carry(&mut self) -> bool {
        let mut moved = false;
        for (on_a, on_b) in self.pair.wires.clone() {
            let now = self.pair.now;
            let there = drain(now, &mut self.pair.a, on_a);
            let back = drain(now, &mut self.pair.b, on_b);
            moved |= !there.is_empty() || !back.is_empty();
            self.tcp_bytes += there.len();
            feed(now, &mut self.pair.b, on_b, &there).unwrap();
            feed(now, &mut self.pair.a, on_a, &back).unwrap();
        }
        for by_a in [true, false] {
            let now = self.pair.now;
            loop {
                let session = if by_a {
                    &mut self.pair.a
                } else {
                    &mut self.pair.b
                };
                let Some(transmit) = session.poll_udp(now) else {
                    break;
                };
                self.put(transmit);
                moved = true;
            }
        }
        moved
    }

    /// Until nothing is under way any more, for a second at the most.
    pub fn run(&mut self) {
        let end = self.pair.now + Duration::from_secs(1);
        loop {
            while self.carry() {}
            let next = self.flight.front().map(|(at, ..)| *at);
            let Some(next) = next.filter(|at| *at <= end) else {
                return;
            };
            self.step(next);
        }
    }

    fn step(&mut self, arrival: Time) {
        let due = [self.pair.a.poll_timeout(), self.pair.b.poll_timeout()];
        let timer = due.into_iter().flatten().min();
        if let Some(at) = timer.filter(|at| *at < arrival) {
            self.pair.now = self.pair.now.max(at);
            let now = self.pair.now;
            self.pair.a.handle_timeout(now);
            self.pair.b.handle_timeout(now);
        } else {
            self.deliver_one();
        }
    }

    /// Everything that happens until `end`.
    pub fn run_until(&mut self, end: Time) {
        loop {
            while self.carry() {}
            let due = [self.pair.a.poll_timeout(), self.pair.b.poll_timeout()];
            let timer = due.into_iter().flatten().min();
            let arrival = self.flight.front().map(|(at, ..)| *at);
            let next = [timer, arrival].into_iter().flatten().min();
            if next.is_none_or(|at| at > end) {
                break;
            }
            self.step(arrival.unwrap_or(Time::from_nanos(u64::MAX)));
        }
        self.pair.now = self.pair.now.max(end);
    }
}
