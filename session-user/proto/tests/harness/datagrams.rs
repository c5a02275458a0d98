//! Two sessions with a flow over UDP, and somebody between them.

use std::collections::{BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use bytes::BytesMut;
use session_proto::Time;
use session_proto::session::{Config, FlowId, UdpPath};
use session_proto::wire::Target;

use super::pair::{NOW, Pair};

const CLIENT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 1001);
const SERVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 100)), 443);
const PATH: UdpPath = UdpPath(0);
/// Packets that the attacker remembers.
const KEPT: usize = 16;

pub struct Net {
    pair: Pair,
    flow: FlowId,
    sent: u32,
    /// By direction, and to whom they went.
    delivered: [BTreeSet<u32>; 2],
    kept: VecDeque<(Vec<u8>, bool)>,
    /// Packets are held back, so that what the attacker sends comes first.
    holding: bool,
    held: Vec<(BytesMut, bool)>,
    /// Bytes from and to addresses that are not the client's.
    foreign: (u64, u64),
}

impl Net {
    /// Datagrams go over UDP in both directions.
    pub fn established() -> Self {
        let config = Config {
            max_flows: 4,
            ..Config::default()
        };
        let mut pair = Pair::with_config(&config);
        pair.client.udp_path_added(NOW, PATH, &[SERVER], 1500);
        pair.server.udp_path_added(NOW, PATH, &[], 1500);
        pair.client.prefer_udp(NOW, PATH);
        let target = Target::Name("target".into(), 7);
        let flow = pair
            .client
            .open_flow(NOW, target)
            .expect("flows are allowed");
        let mut net = Self {
            pair,
            flow,
            sent: 0,
            delivered: Default::default(),
            kept: VecDeque::new(),
            holding: false,
            held: Vec::new(),
            foreign: (0, 0),
        };
        for _ in 0..4 {
            net.exchange();
        }
        let usable =
            |status: Option<_>| status.is_some_and(|s: session_proto::session::UdpStatus| s.usable);
        assert!(usable(net.pair.client.udp_status()));
        assert!(usable(net.pair.server.udp_status()));
        net
    }

    /// One datagram each way, and all that follows from it.
    pub fn exchange(&mut self) {
        for _ in 0..2 {
            self.sent += 1;
            let data = self.sent.to_be_bytes();
            let client = &mut self.pair.client;
            client
                .send_datagram(NOW, self.flow, &data)
                .expect("it is open");
            // Before its first datagram has come, the server has no such flow.
            let _ = self.pair.server.send_datagram(NOW, self.flow, &data);
            self.carry(NOW);
        }
    }

    fn carry(&mut self, now: Time) {
        loop {
            let (a, b) = self.pair.first_transport();
            let up = self.pair.client_bytes(a);
            self.pair
                .server_takes(b, &up, usize::MAX)
                .expect("honest bytes");
            let down = self.pair.server_bytes(b);
            self.pair
                .client_takes(a, &down, usize::MAX)
                .expect("honest bytes");
            let mut moved = !up.is_empty() || !down.is_empty();
            while let Some(transmit) = self.pair.client.poll_udp(now) {
                moved = true;
                self.keep(&transmit.packet, true);
                self.held.push((BytesMut::from(&transmit.packet[..]), true));
            }
            while let Some(transmit) = self.pair.server.poll_udp(now) {
                moved = true;
                self.keep(&transmit.packet, false);
                if transmit.to == CLIENT {
                    let packet = BytesMut::from(&transmit.packet[..]);
                    self.held.push((packet, false));
                } else {
                    self.foreign.1 += transmit.packet.len() as u64;
                }
            }
            if !self.holding {
                self.deliver(now);
            }
            self.take();
            if !moved {
                return;
            }
        }
    }

    fn deliver(&mut self, now: Time) {
        for (packet, by_client) in std::mem::take(&mut self.held) {
            let _ = if by_client {
                self.pair.server.handle_udp(now, PATH, CLIENT, packet)
            } else {
                self.pair.client.handle_udp(now, PATH, SERVER, packet)
            };
        }
    }

    /// From now on packets are held back.
    pub fn hold(&mut self) {
        self.holding = true;
    }

    /// What was held back arrives, and so does all else.
    pub fn release(&mut self) {
        self.holding = false;
        self.deliver(NOW);
        self.carry(NOW);
    }

    fn keep(&mut self, packet: &[u8], by_client: bool) {
        self.kept.push_back((packet.to_vec(), by_client));
        if self.kept.len() > KEPT {
            self.kept.pop_front();
        }
    }

    /// What applications get, each once and as it was sent.
    fn take(&mut self) {
        for (index, session) in [&mut self.pair.client, &mut self.pair.server]
            .into_iter()
            .enumerate()
        {
            while let Some((flow, data)) = session.poll_datagram() {
                let number = data[..].try_into().map(u32::from_be_bytes);
                let number = number.expect("a datagram that nobody sent");
                assert!(flow == self.flow && (1..=self.sent).contains(&number));
                let fresh = self.delivered[index].insert(number);
                assert!(fresh, "datagram {number} came twice");
            }
            while session.poll_flow_event().is_some() {}
        }
    }

    /// One of the latest packets.
    pub fn pick(&self, choice: u8) -> Vec<u8> {
        let at = usize::from(choice >> 1) % self.kept.len();
        self.kept[at].0.clone()
    }

    /// A packet comes to one of the ends, from the other's address or from elsewhere.
    pub fn inject(&mut self, choice: u8, packet: &[u8], from: u8) {
        let elsewhere = SocketAddr::from(([203, 0, 113, from], 6666));
        let packet = BytesMut::from(packet);
        if choice & 1 == 0 {
            let from = if from < 64 { SERVER } else { elsewhere };
            let _ = self.pair.client.handle_udp(NOW, PATH, from, packet);
        } else {
            let from = if from < 64 { CLIENT } else { elsewhere };
            if from != CLIENT {
                self.foreign.0 += packet.len() as u64;
            }
            let _ = self.pair.server.handle_udp(NOW, PATH, from, packet);
        }
        self.carry(NOW);
    }

    /// Nothing came of it.
    pub fn settle(&mut self) {
        let before = self.delivered.clone().map(|d| d.len());
        self.exchange();
        let after = self.delivered.clone().map(|d| d.len());
        assert_eq!(after, before.map(|n| n + 2));
        assert!(self.pair.client.is_open() && self.pair.server.is_open());
        let status = self.pair.server.udp_status().expect("UDP is in use");
        assert_eq!(status.remote, CLIENT);
        assert!(self.foreign.1 <= 3 * self.foreign.0);
        for session in [&self.pair.client, &self.pair.server] {
            assert!(session.flow_memory_bytes() < 64 * 1024);
        }
    }
}
