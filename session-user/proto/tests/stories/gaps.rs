//! How long a conversation over UDP is interrupted when its link swallows everything, without a word.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::BytesMut;
use session_proto::Time;
use session_proto::limits::UDP_SILENCE_MARGIN;
use session_proto::session::{Event, FlowId, Handle, Session, UdpPath};
use session_proto::wire::Route;

use crate::net::{A, B, SERVER};
use crate::pair::{Pair, config_of, drain, feed, target};

const WIFI: UdpPath = UdpPath(1);
const MOBILE: UdpPath = UdpPath(2);
const MS: Duration = Duration::from_millis(1);

/// What is on its way.
enum Flying {
    Tcp(Handle, Vec<u8>),
    Udp(UdpPath, SocketAddr, Vec<u8>),
}

/// Two sessions with two links of the same delay, each with a transport and a UDP path; an echo at the
/// responder.
struct World {
    pair: Pair,
    one_way: Duration,
    /// Both directions: from the initiator, and to it.
    flying: [VecDeque<(Time, Flying)>; 2],
    late: [VecDeque<(Time, Flying)>; 2],
    /// The first link swallows what goes that way.
    hole: [bool; 2],
    /// No packet passes on either link; TCP does.
    blocked: bool,
    /// Packets that are lost, per thousand; what is sent over TCP is late by `tcp_late`.
    loss: u64,
    tcp_late: Duration,
    chance: u64,
    silences: usize,
    flow: FlowId,
    /// When echoes came to the initiator.
    echoes: Vec<Time>,
    next_send: Time,
    pace: Duration,
    /// Every packet, and every byte over TCP.
    packets: u64,
    tcp_bytes: u64,
}

impl World {
    fn new(rtt: Duration, pace: Duration) -> Self {
        let mut pair = Pair::open(&config_of(|_| {}));
        let standby = Route {
            path: 1 << 8,
            lane: 0,
        };
        pair.dial_over(standby, true);
        pair.run();
        for (on_a, on_b) in pair.wires.clone() {
            pair.a.assume_rtt(on_a, rtt);
            pair.b.assume_rtt(on_b, rtt);
        }
        let now = pair.now;
        for path in [WIFI, MOBILE] {
            pair.a.udp_path_added(now, path, &[SERVER], 1500);
        }
        pair.b.udp_path_added(now, WIFI, &[], 1500);
        pair.a.prefer_udp(now, WIFI);
        let flow = pair.a.open_flow(now, target()).unwrap();
        Self {
            pair,
            one_way: rtt / 2,
            flying: Default::default(),
            late: Default::default(),
            hole: [false; 2],
            blocked: false,
            loss: 0,
            tcp_late: Duration::ZERO,
            chance: 1,
            silences: 0,
            flow,
            echoes: Vec::new(),
            next_send: now,
            pace,
            packets: 0,
            tcp_bytes: 0,
        }
    }

    fn is_lost(&mut self) -> bool {
        self.blocked || draw(&mut self.chance, 1000) < self.loss
    }

    /// Puts on its way what the sessions have to send; where the hole is, it is swallowed.
    fn collect(&mut self) {
        let now = self.pair.now;
        let arrives = now + self.one_way;
        for (index, wire) in self.pair.wires.clone().into_iter().enumerate() {
            let ends = [
                (&mut self.pair.a, wire.0, wire.1),
                (&mut self.pair.b, wire.1, wire.0),
            ];
            for (way, (session, from, to)) in ends.into_iter().enumerate() {
                let bytes = drain(now, session, from);
                self.tcp_bytes += bytes.len() as u64;
                let swallowed = index == 0 && self.hole[way];
                if !bytes.is_empty() && !swallowed {
                    let late = (arrives + self.tcp_late, Flying::Tcp(to, bytes));
                    self.late[way].push_back(late);
                }
            }
        }
        while let Some(sent) = self.pair.a.poll_udp(now) {
            self.packets += 1;
            let from = if sent.path == WIFI { A } else { B };
            if !(self.is_lost() || (from == A && self.hole[0])) {
                let packet = Flying::Udp(WIFI, from, sent.packet.to_vec());
                self.flying[0].push_back((arrives, packet));
            }
        }
        while let Some(sent) = self.pair.b.poll_udp(now) {
            self.packets += 1;
            let path = if sent.to == A { WIFI } else { MOBILE };
            if !(self.is_lost() || (path == WIFI && self.hole[1])) {
                let packet = Flying::Udp(path, SERVER, sent.packet.to_vec());
                self.flying[1].push_back((arrives, packet));
            }
        }
    }

    /// The first link swallows everything from now on, in these directions; `near`: right before the
    /// receiver, so that what is under way is lost as well.
    fn swallow(&mut self, ways: [bool; 2], near: bool) {
        self.hole = ways;
        let first = self.pair.wires[0];
        let on_first = |flying: &Flying| match *flying {
            Flying::Tcp(to, _) => to == first.0 || to == first.1,
            Flying::Udp(path, from, _) => from == A || (from == SERVER && path == WIFI),
        };
        for way in [0, 1].into_iter().filter(|way| ways[*way] && near) {
            for flying in [&mut self.flying[way], &mut self.late[way]] {
                flying.retain(|(_, what)| !on_first(what));
            }
        }
    }

    fn arrive(&mut self) {
        let now = self.pair.now;
        for way in 0..2 {
            let mut arrived = Vec::new();
            for queue in [&mut self.flying[way], &mut self.late[way]] {
                while queue.front().is_some_and(|(at, _)| *at <= now) {
                    arrived.extend(queue.pop_front().map(|(_, what)| what));
                }
            }
            for what in arrived {
                let session = match way {
                    0 => &mut self.pair.b,
                    _ => &mut self.pair.a,
                };
                match what {
                    Flying::Tcp(handle, bytes) => {
                        feed(now, session, handle, &bytes).expect("honest bytes");
                    }
                    Flying::Udp(path, from, packet) => {
                        let packet = BytesMut::from(&packet[..]);
                        let _ = session.handle_udp(now, path, from, packet);
                    }
                }
            }
        }
        while let Some((id, data)) = self.pair.b.poll_datagram() {
            self.pair.b.send_datagram(now, id, &data).unwrap();
        }
        while self.pair.a.poll_datagram().is_some() {
            self.echoes.push(now);
        }
        for session in [&mut self.pair.a, &mut self.pair.b] {
            while session.poll_flow_event().is_some() {}
            while let Some(event) = session.poll_event() {
                assert!(!matches!(event, Event::Closed { .. }), "{event:?}");
                self.silences += usize::from(matches!(event, Event::TransportSilent(_)));
            }
        }
        self.follow();
    }

    /// Datagrams prefer the path of the transport that answers, as the agent has it.
    fn follow(&mut self) {
        let (first, _) = self.pair.wires[0];
        let left = self.pair.a.active() != Some(first) || self.pair.a.is_silent(first);
        if left {
            self.pair.a.prefer_udp(self.pair.now, MOBILE);
        }
    }

    /// All that happens until `end`; `talks`: the application sends.
    fn run_until(&mut self, end: Time, talks: bool) {
        loop {
            self.collect();
            let sends = talks.then_some(self.next_send);
            let timers = [self.pair.a.poll_timeout(), self.pair.b.poll_timeout()];
            let queues = self.flying.iter().chain(&self.late);
            let arrivals = queues.filter_map(|q| q.front().map(|(at, _)| *at));
            let next = sends.into_iter().chain(timers.into_iter().flatten());
            let next = next.chain(arrivals).min();
            let Some(next) = next.filter(|at| *at < end) else {
                break;
            };
            let now = self.pair.now.max(next);
            self.pair.now = now;
            for session in [&mut self.pair.a, &mut self.pair.b] {
                if session.poll_timeout().is_some_and(|at| at <= now) {
                    session.handle_timeout(now);
                }
            }
            self.arrive();
            if talks && self.next_send <= now {
                self.next_send = now + self.pace;
                let sent = self.pair.a.send_datagram(now, self.flow, &[7; 100]);
                sent.expect("the flow is open");
            }
        }
        self.pair.now = end;
    }

    fn longest_gap(&self) -> Duration {
        let pairs = self.echoes.windows(2).map(|w| w[1].since(w[0]));
        pairs.max().unwrap_or(Duration::MAX)
    }
}

/// A source of chance.
fn draw(state: &mut u64, below: u64) -> u64 {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % below
}

fn usable(session: &Session) -> bool {
    session.udp_status().is_some_and(|s| s.usable)
}

#[test]
fn a_silent_loss_interrupts_datagrams_for_two_round_trips_and_a_little() {
    let mut state = 1;
    for seed in 0..600 {
        let rtt = MS * [4, 20, 40, 100, 200][seed % 5];
        let hole = [[true, false], [false, true], [true, true]][seed % 3];
        let mut world = World::new(rtt, MS);
        let begins = world.pair.now + Duration::from_secs(1);
        let phase = Duration::from_micros(draw(&mut state, 120_000));
        world.run_until(begins + phase, true);
        assert!(usable(&world.pair.a) && usable(&world.pair.b));
        assert!(world.longest_gap() < MS * 3, "without a fault");
        world.swallow(hole, draw(&mut state, 2) == 0);
        world.run_until(begins + phase + Duration::from_secs(2), true);
        let gap = world.longest_gap();
        let ask_every = (rtt / 4).max(MS * 10);
        let most = rtt * 2 + ask_every + UDP_SILENCE_MARGIN + MS * 4;
        assert!(gap <= most, "seed {seed}: {gap:?} at {rtt:?} with {hole:?}");
        assert!(usable(&world.pair.a), "seed {seed}: not over UDP again");
        assert_eq!(world.pair.a.udp_status().unwrap().path, MOBILE);
    }
}

#[test]
fn questions_cost_little_and_an_idle_conversation_nothing() {
    for pace in [1, 5, 20, 100] {
        let mut world = World::new(MS * 40, MS * pace);
        let begun = world.pair.now;
        world.run_until(begun + Duration::from_secs(1), true);
        let (packets, tcp, echoes) = (world.packets, world.tcp_bytes, world.echoes.len() as u64);
        world.run_until(begun + Duration::from_secs(11), true);
        let echoes = world.echoes.len() as u64 - echoes;
        // Two packets for each echo; what is more are answers that go alone.
        let more = world.packets - packets - 2 * echoes;
        let most = echoes.min(2 * 1000) + 4;
        assert!(more <= most, "{more} packets beside {echoes} echoes");
        assert_eq!(world.tcp_bytes, tcp, "all goes over UDP");

        world.run_until(begun + Duration::from_secs(13), false);
        let packets = world.packets;
        world.run_until(begun + Duration::from_secs(25), false);
        assert_eq!(world.packets, packets, "nobody says anything");
        assert_eq!(world.tcp_bytes, tcp);
    }
}

#[test]
fn where_only_udp_is_swallowed_the_session_stays() {
    let mut world = World::new(MS * 40, MS);
    let begun = world.pair.now;
    world.run_until(begun + Duration::from_secs(1), true);
    world.blocked = true;
    world.run_until(begun + Duration::from_secs(3), true);
    let first = world.pair.wires[0].0;
    assert_eq!(world.pair.a.active(), Some(first));
    assert!(!world.pair.a.is_silent(first));
    assert!(world.longest_gap() < MS * 110, "{:?}", world.longest_gap());
    // The standby carries copies until the other transport has answered.
    let stats = world.pair.b.flow_stats();
    assert!(stats.duplicates < 100, "{stats:?}");
}

#[test]
fn lost_packets_are_no_black_hole() {
    for (rtt, pace) in [(40, 1), (40, 20), (100, 1), (100, 20), (200, 5), (200, 20)] {
        let mut world = World::new(MS * rtt, MS * pace);
        let begun = world.pair.now;
        world.run_until(begun + Duration::from_secs(1), true);
        // What TCP has to send again takes so long.
        (world.loss, world.tcp_late) = (10, MS * (rtt * 2));
        world.run_until(begun + Duration::from_secs(60), true);
        assert_eq!(world.silences, 0, "{rtt} ms, one each {pace} ms");
        let sent = world.pair.a.flow_stats();
        assert!(sent.sent_tcp * 20 <= sent.sent, "{sent:?}");
    }
}
