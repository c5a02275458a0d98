//! The applications at both ends of flows, and what the driver does for them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use super::flow_plan::{FlowAct, FlowPlan, content, group, head, info};
use super::packets::Packet;
use super::rng::{Rng, mix};
use super::steady::Steady;
use super::world::{Happening, World};
use super::{Mutation, Side};
use crate::limits::{
    DATAGRAM_BYTES_WAITING_MAX, DATAGRAM_QUEUE_BYTES, PARTIAL_BYTES_MAX, RECORD_PAYLOAD_BYTES_MIN,
    UDP_QUEUE_BYTES,
};
use crate::session::{DatagramInfo, FlowEvent, FlowId, Session, UdpPath};
use crate::wire::Dscp;

/// A proof that datagrams arrive is tried so often once all is calm.
const PROOF_EVERY: Duration = Duration::from_millis(300);
/// By then they do, or never will. An initiator that has nothing to send finds out from the kernel's
/// keep-alive only that its transport is dead, so a responder has to wait for that.
const PROVEN_WITHIN: [Duration; 2] = [Duration::from_secs(60), Duration::from_secs(120)];

/// What a session may hold of datagrams, and for each transport.
const FLOW_BYTES_MAX: usize = DATAGRAM_BYTES_WAITING_MAX + PARTIAL_BYTES_MAX + UDP_QUEUE_BYTES;
const QUEUED_BYTES_MAX: usize = DATAGRAM_QUEUE_BYTES + RECORD_PAYLOAD_BYTES_MIN + 512;

/// What of a side's proof there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Proof {
    #[default]
    NotYet,
    /// On this flow.
    Tried(FlowId),
    Done,
}

/// A flow, as its two applications see it.
#[derive(Debug)]
pub(super) struct FlowApp {
    /// Datagrams that the opener still sends.
    left: u64,
    pause: Duration,
    /// Answers per thousand datagrams that came.
    echo: u64,
    /// Datagrams sent, by side.
    sent: [u32; 2],
    /// It is over for a side.
    over: [bool; 2],
    /// The far end found nobody at its target.
    refused: bool,
    proof: bool,
    /// Bytes of a datagram, at most.
    pub most: usize,
}

impl FlowApp {
    /// Whether no more is sent.
    pub fn is_ending(&self) -> bool {
        self.left == 0 || self.over != [false; 2]
    }
}

/// All that a run has of flows.
#[derive(Debug, Default)]
pub(super) struct Flows {
    pub plan: Option<FlowPlan>,
    pub rng: Option<Rng>,
    pub apps: BTreeMap<FlowId, FlowApp>,
    /// By the side that took them.
    delivered: [BTreeSet<(FlowId, u32)>; 2],
    proofs: [Proof; 2],
    pub steady: Option<Steady>,
    pub packets: BTreeMap<u64, Packet>,
    pub made: u64,
    /// The initiator's port on each link as the responder sees it, and how many sockets it had there.
    pub ports: Vec<u16>,
    pub sockets: Vec<u64>,
    pub preferred: Option<usize>,
    /// The driver prefers this one against its policy.
    pub wandered: Option<usize>,
    /// What an attacker has seen.
    pub seen: VecDeque<Packet>,
    /// The attacker does not see what the initiator sends now.
    pub blind: bool,
    /// Bytes that came to the responder from each address of an attacker, and that it sent there.
    pub strangers: BTreeMap<SocketAddr, (u64, u64)>,
}

impl World<'_> {
    /// What the flows' own source of chance says.
    pub fn flow_rng(&mut self) -> &mut Rng {
        let seed = self.script.seed;
        let fresh = || Rng::new(mix(seed ^ 0xf10e_f10e));
        self.flows.rng.get_or_insert_with(fresh)
    }

    /// New sessions have neither flows nor paths.
    pub fn flows_anew(&mut self) {
        if self.flows.plan.is_none() {
            return;
        }
        self.flows.apps.clear();
        self.flows.delivered = Default::default();
        self.flows.packets.clear();
        self.flows.seen.clear();
        self.flows.proofs = Default::default();
        self.flows.steady = None;
        let links = self.links.len();
        self.flows.ports.resize(links, 4000);
        self.flows.sockets.resize(links, 0);
        self.flows.preferred = None;
        for link in 0..links {
            self.new_socket(link);
        }
        let now = self.now;
        let has_udp = |plan: &FlowPlan| plan.udp[Side::Responder as usize];
        if self.flows.plan.as_ref().is_some_and(has_udp)
            && let Some(session) = self.session(Side::Responder)
        {
            session.udp_path_added(now, UdpPath(0), &[], 9_000);
        }
    }

    /// The plan's acts are put in the queue.
    pub fn flows_begin(&mut self) {
        let acts = self.flows.plan.iter().flat_map(|p| p.acts.clone());
        for (at, act) in acts.collect::<Vec<_>>() {
            self.at(at, Happening::Flow(act));
        }
    }

    pub fn flow_act(&mut self, act: FlowAct) {
        self.trace(|| format!("flows: {act:?}"));
        match act {
            FlowAct::Open { side } => self.open_flow(side),
            FlowAct::Converse => self.converse(),
            FlowAct::Rebind { link } => self.rebind(link),
            FlowAct::Block { link, for_ms } => {
                self.block(link, true);
                let ends = Happening::Flow(FlowAct::Unblock { link });
                self.after(Duration::from_millis(for_ms), ends);
            }
            FlowAct::Unblock { link } => self.block(link, false),
            FlowAct::Prefer { link } => self.flows.wandered = Some(link),
            FlowAct::NewSocket { link } => self.new_socket(link),
        }
    }

    fn open_flow(&mut self, side: Side) {
        let open = self.session(side).is_some_and(|s| s.is_open());
        if !open && !self.calm {
            let again = Happening::Flow(FlowAct::Open { side });
            return self.after(Duration::from_millis(100), again);
        }
        let most = self.flows.plan.as_ref().map_or(0, |p| p.datagrams_max);
        let rng = self.flow_rng();
        let (left, pause) = (rng.range(1, most.max(1)), rng.micros(50, 200_000));
        let echo = rng.pick(&[0, 500, 1000]);
        let _ = self.begin_flow(side, left, pause, echo, false);
    }

    /// Opens a flow and lets its application send.
    pub fn begin_flow(
        &mut self,
        side: Side,
        left: u64,
        pause: Duration,
        echo: u64,
        proof: bool,
    ) -> Option<FlowId> {
        let now = self.now;
        // The id is not known before, and the target depends on it.
        let next = self
            .flows
            .apps
            .keys()
            .filter(|id| Side::opener(**id) == side);
        let next = next.max().map_or(side as u64, |id| id + 2);
        let target = self.script.target(next);
        let group = group(self.script.seed, next);
        let id = (self.session(side)?.open_flow_of(now, target, group)).ok()?;
        if id != next {
            self.fail(format!("{side:?}: flow {id} where {next} is next"));
            return None;
        }
        let app = FlowApp {
            left,
            pause,
            echo,
            sent: [0; 2],
            over: [false; 2],
            refused: false,
            proof,
            most: usize::MAX,
        };
        self.flows.apps.insert(id, app);
        self.check.tally.flows += 1;
        self.after(Duration::ZERO, Happening::FlowTick { side, id });
        Some(id)
    }

    /// The opener's application sends its next datagram, or closes its socket.
    pub fn flow_tick(&mut self, side: Side, id: FlowId) {
        let Some(app) = self.flows.apps.get_mut(&id) else {
            return;
        };
        if app.over[side as usize] {
            return;
        }
        let pause = app.pause;
        if app.left == 0 {
            app.over[side as usize] = true;
            if let Some(session) = self.session(side) {
                session.close_flow(id);
            }
            return;
        }
        app.left -= 1;
        self.send_datagram(side, id);
        self.after(pause, Happening::FlowTick { side, id });
    }

    fn send_datagram(&mut self, side: Side, id: FlowId) {
        let (seed, now) = (self.script.seed, self.now);
        let Some(app) = self.flows.apps.get_mut(&id) else {
            return;
        };
        let seq = app.sent[side as usize];
        app.sent[side as usize] += 1;
        let mut data = content(seed, id, side, seq);
        data.truncate(app.most);
        let info = info(seed, id, side, seq);
        let gone = self
            .session(side)
            .is_none_or(|s| s.send_datagram_with(now, id, &data, &info).is_err());
        if gone {
            if let Some(app) = self.flows.apps.get_mut(&id) {
                app.over[side as usize] = true;
            }
            return;
        }
        self.check.tally.datagrams += 1;
    }

    /// Takes what the session has for applications and for UDP; true if there was anything.
    pub fn settle_flows(&mut self, side: Side) -> bool {
        if self.flows.plan.is_none() {
            return false;
        }
        let mut some = false;
        while let Some((id, data, info)) = self.session(side).and_then(Session::poll_datagram_info)
        {
            some = true;
            self.datagram_came(side, id, &data, info);
        }
        while let Some(event) = self.session(side).and_then(Session::poll_flow_event) {
            some = true;
            self.flow_event(side, event);
        }
        if side == Side::Initiator {
            self.prefer_path();
        }
        let now = self.now;
        while let Some(packet) = self.session(side).and_then(|s| s.poll_udp(now)) {
            some = true;
            self.packet_leaves(side, packet);
        }
        some
    }

    fn flow_event(&mut self, side: Side, event: FlowEvent) {
        self.trace(|| format!("{side:?} {event:?}"));
        match event {
            FlowEvent::FlowOpened {
                id,
                target,
                group: told,
            } => {
                let expected = self.script.target(id);
                let known = Side::opener(id) != side && self.flows.apps.contains_key(&id);
                let features = self.script.configs[side as usize].flow_features;
                let socket = group(self.script.seed, id).filter(|_| features > 0);
                if !known || target != expected || told != socket {
                    return self.fail(format!("{side:?}: flow {id} to {target} nobody opened"));
                }
                let proof = self.flows.apps.get(&id).is_some_and(|a| a.proof);
                if !proof && self.flow_rng().chance(50) {
                    if let Some(app) = self.flows.apps.get_mut(&id) {
                        app.refused = true;
                        app.over[side as usize] = true;
                    }
                    if let Some(session) = self.session(side) {
                        session.flow_error(id, 111);
                    }
                }
            }
            FlowEvent::FlowFailed { id, errno } => {
                let refused = self.flows.apps.get(&id).is_some_and(|a| a.refused);
                if !refused || errno != 111 {
                    self.fail(format!("{side:?}: flow {id} failed with {errno}"));
                }
                self.flow_over(side, id);
            }
            FlowEvent::FlowClosed { id } => self.flow_over(side, id),
            FlowEvent::UdpBlocked(_) => self.check.tally.blocked += 1,
            FlowEvent::UdpUsable(_) | FlowEvent::ConnectionIdsChanged => {}
        }
    }

    fn flow_over(&mut self, side: Side, id: FlowId) {
        if let Some(app) = self.flows.apps.get_mut(&id) {
            app.over[side as usize] = true;
        }
    }

    /// A datagram was delivered to `side`: it is what was sent, and comes for the first time.
    fn datagram_came(&mut self, side: Side, id: FlowId, data: &[u8], came: DatagramInfo) {
        if self.mutation == Some(Mutation::DeafFlows) && self.calm {
            return;
        }
        let from = side.other();
        let Some((flow, sender, mut seq)) = head(data) else {
            return self.fail(format!("{side:?}: a datagram on {id} is not what was sent"));
        };
        if self.mutation == Some(Mutation::InventedDatagram) {
            seq += 1_000_000;
        }
        let app = self.flows.apps.get(&flow);
        let (sent, most) = app.map_or((0, 0), |a| (a.sent[from as usize], a.most));
        if flow != id || sender != from || seq >= sent {
            let what = format!("{side:?}: datagram {seq} of {sender:?} on {flow} came on {id}");
            return self.fail(format!("{what}, which nobody sent"));
        }
        let mut info = info(self.script.seed, id, from, seq);
        if self.script.configs[side as usize].flow_features == 0 {
            info.dscp = Dscp::default();
        }
        if self.mutation == Some(Mutation::WrongSource) {
            info.source = Some(SocketAddr::from(([203, 0, 113, 1], 1)));
        }
        if came != info {
            let what = format!("{side:?}: datagram {seq} on {id} came as {came:?}");
            return self.fail(what);
        }
        let mut expected = content(self.script.seed, id, from, seq);
        expected.truncate(most);
        if self.mutation == Some(Mutation::WrongDatagram) {
            expected[0] ^= 1;
        }
        if data != expected {
            return self.fail(format!(
                "{side:?}: datagram {seq} on {id} is not what was sent"
            ));
        }
        let fresh = self.flows.delivered[side as usize].insert((id, seq));
        if !fresh || (self.mutation == Some(Mutation::TwiceDelivered) && seq > 0) {
            return self.fail(format!("{side:?}: datagram {seq} on {id} came twice"));
        }
        self.check.tally.arrived += 1;
        self.answer(side, id);
    }

    fn answer(&mut self, side: Side, id: FlowId) {
        let Some(app) = self.flows.apps.get(&id) else {
            return;
        };
        let (echo, proof) = (app.echo, app.proof);
        if Side::opener(id) == side {
            let proven = self.flows.proofs[side as usize] == Proof::Tried(id);
            self.heard_steady(id);
            if proven && self.udp_is_back() {
                self.prove(side, id);
            }
        } else if proof || self.flow_rng().chance(echo) {
            self.send_datagram(side, id);
        }
    }

    fn prove(&mut self, side: Side, id: FlowId) {
        self.flows.proofs[side as usize] = Proof::Done;
        self.check.tally.proofs += 1;
        if let Some(app) = self.flows.apps.get_mut(&id) {
            app.left = 0;
        }
    }

    /// All is calm: each side that has had flows opens one more, and what it sends must be answered.
    pub fn flows_calm(&mut self) {
        self.packets_calm();
        let opens = self.flows.plan.as_ref().map_or([false; 2], |p| p.opens);
        for side in Side::BOTH {
            if opens[side as usize] {
                self.after(PROOF_EVERY, Happening::Proof { side });
            }
        }
    }

    pub fn proof(&mut self, side: Side) {
        let open = self.session(side).is_some_and(|s| s.is_open());
        if self.flows.proofs[side as usize] == Proof::Done || self.parting {
            return;
        }
        let over = |world: &Self, id| {
            let app = world.flows.apps.get(&id);
            app.is_none_or(|a| a.over[side as usize])
        };
        match self.flows.proofs[side as usize] {
            Proof::Tried(id) if !over(self, id) => {}
            _ if open => {
                // It sends until it is answered.
                let flow = self.begin_flow(side, u64::MAX, PROOF_EVERY, 1000, true);
                self.flows.proofs[side as usize] = flow.map_or(Proof::NotYet, Proof::Tried);
            }
            _ => {}
        }
        let ended = |h: &super::host::Host| h.is_over() || h.ended.is_some() || h.may_end;
        let ending = self.hosts.iter().any(ended);
        if !ending && self.now > self.script.calm_at + PROVEN_WITHIN[side as usize] {
            let status =
                [0, 1].map(|i| self.hosts[i].session.as_ref().and_then(Session::udp_status));
            return self.fail(format!(
                "{side:?}: no datagram arrives, or UDP is not used: {status:?}, {}",
                self.describe()
            ));
        }
        self.after(PROOF_EVERY, Happening::Proof { side });
    }

    /// Whether nothing is left to be done for flows.
    pub fn flows_rest(&self) -> bool {
        let Some(plan) = &self.flows.plan else {
            return true;
        };
        let proven = |side: Side| {
            !plan.opens[side as usize] || self.flows.proofs[side as usize] == Proof::Done
        };
        let apps = &self.flows.apps;
        let sessions = self.hosts.iter().flat_map(|h| &h.session);
        Side::BOTH.into_iter().all(proven)
            && (apps.iter()).all(|(id, a)| a.over[Side::opener(*id) as usize])
            && sessions.into_iter().all(|s| s.flows().next().is_none())
    }

    /// What must hold of flows after every step.
    pub fn check_flows(&mut self) {
        if self.flows.plan.is_none() {
            return;
        }
        for side in Side::BOTH {
            let Some(session) = &self.hosts[side as usize].session else {
                continue;
            };
            let (held, transports) = (session.flow_memory_bytes(), session.transports().count());
            let mut most = FLOW_BYTES_MAX + transports * QUEUED_BYTES_MAX;
            if self.mutation == Some(Mutation::HoardedDatagrams) {
                most = 0;
            }
            if held > most {
                self.fail(format!("{side:?} holds {held} bytes of datagrams"));
            }
        }
        self.check_address();
        self.check_steady();
    }

    /// The counters of both sessions.
    pub fn tally_flows(&mut self) {
        for stats in (self.hosts.iter().flat_map(|h| &h.session)).map(Session::flow_stats) {
            self.check.tally.parts += stats.fragments;
            self.check.tally.adopted += stats.moves;
            self.check.tally.incomplete += stats.incomplete;
            self.check.tally.repeated += stats.duplicates;
        }
    }
}
