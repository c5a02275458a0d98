//! What a seed decides about flows and UDP, from a source of its own: runs without flows stay what they
//! were.

use std::net::SocketAddr;
use std::time::Duration;

use super::Side;
use super::plan::fill;
use super::rng::{Rng, mix};
use super::script::Script;
use crate::Time;
use crate::session::{DatagramInfo, FlowId};
use crate::wire::{Dscp, flow_feature};

/// Something that happens to flows or to UDP at a time set by the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum FlowAct {
    /// A side opens a flow.
    Open { side: Side },
    /// The initiator begins a conversation that goes on until all is calm.
    Converse,
    /// The NAT of a link gives the initiator another address.
    Rebind { link: usize },
    /// A link lets no UDP through.
    Block { link: usize, for_ms: u64 },
    /// It does again.
    Unblock { link: usize },
    /// The initiator's driver prefers another link for UDP than the one that it uses.
    Prefer { link: usize },
    /// The initiator's socket on a link is another one.
    NewSocket { link: usize },
}

/// What UDP finds on a link.
#[derive(Clone, Debug)]
pub(super) struct UdpLink {
    /// The MTU that the driver is told.
    pub told: usize,
    /// Larger payloads vanish.
    pub payload: usize,
    /// Per thousand packets.
    pub loss: u64,
    pub twice: u64,
    pub damaged: u64,
    pub blocked: bool,
}

/// The whole plan.
#[derive(Clone, Debug)]
pub(super) struct FlowPlan {
    pub links: Vec<UdpLink>,
    /// Ends that have UDP at all.
    pub udp: [bool; 2],
    /// Datagrams of one flow and direction, at most.
    pub datagrams_max: u64,
    /// Packets of which an attacker makes something, per thousand.
    pub attack: u64,
    /// Sides that open flows.
    pub opens: [bool; 2],
    pub acts: Vec<(Time, FlowAct)>,
    /// Between two datagrams of a conversation, if there is one.
    pub steady: Option<Duration>,
}

impl FlowPlan {
    /// The plan of a run with flows; most have none, since each costs as much as all the rest.
    pub fn draw(script: &mut Script) -> Option<Self> {
        let calm_ms = script.calm_at.as_nanos() / 1_000_000;
        let mut rng = Rng::new(mix(script.seed ^ 0xf10e_0000));
        let rng = &mut rng;
        if !rng.chance(400) {
            return None;
        }
        let flow_idle = rng.pick(&[180_000, 180_000, 180_000, 3_000, 500]);
        for config in &mut script.configs {
            config.max_flows = rng.range(2, 8);
            config.flow_idle = Duration::from_millis(flow_idle);
            config.udp_keep_alive = Duration::from_millis(rng.pick(&[0, 1_000, 20_000]));
            config.flow_features = features(script.seed);
            config.challenge_seed = super::host::secret(script.seed, 77 + config.max_flows);
        }
        let mut plan = Self {
            links: (0..script.links.len())
                .map(|_| UdpLink::draw(rng))
                .collect(),
            udp: [rng.chance(950), rng.chance(950)],
            datagrams_max: rng.log_range(2, 40),
            attack: rng.pick(&[0, 0, 20, 100, 300]),
            opens: [false; 2],
            acts: Vec::new(),
            steady: None,
        };
        for _ in 0..rng.range(1, 3) {
            let side = rng.pick(&[Side::Initiator, Side::Initiator, Side::Responder]);
            plan.opens[side as usize] = true;
            plan.at(rng, calm_ms, FlowAct::Open { side });
        }
        let troubles = match rng.below(4) {
            0 => 0,
            1 => 1,
            _ => rng.range(2, 6),
        };
        for _ in 0..troubles {
            let act = plan.draw_trouble(rng);
            plan.at(rng, calm_ms, act);
        }
        plan.draw_steady(script);
        Some(plan)
    }

    /// Where one link always works, the initiator has a conversation that no loss may interrupt for long.
    fn draw_steady(&mut self, script: &Script) {
        let mut rng = Rng::new(mix(script.seed ^ 0x57ea_d100));
        if script.safe.is_some() && rng.chance(300) {
            self.steady = Some(Duration::from_millis(rng.pick(&[2, 5, 10, 20, 20, 50])));
            self.acts.push((Time::ZERO, FlowAct::Converse));
        }
    }

    fn at(&mut self, rng: &mut Rng, calm_ms: u64, act: FlowAct) {
        let at = Time::from_nanos(rng.below(calm_ms * 1_000_000));
        self.acts.push((at, act));
    }

    fn draw_trouble(&self, rng: &mut Rng) -> FlowAct {
        let link = rng.below(self.links.len() as u64) as usize;
        match rng.below(10) {
            0..3 => FlowAct::Rebind { link },
            3..5 => FlowAct::Block {
                link,
                for_ms: rng.log_range(50, 8_000),
            },
            5..8 => FlowAct::Prefer { link },
            _ => FlowAct::NewSocket { link },
        }
    }
}

impl UdpLink {
    fn draw(rng: &mut Rng) -> Self {
        let told = rng.pick(&[1_500, 1_500, 1_500, 1_280, 9_000, 576]);
        let honest = told - 28;
        Self {
            told,
            payload: match rng.below(4) {
                0 => honest.min(rng.range(560, 1_600) as usize),
                _ => honest,
            },
            loss: rng.pick(&[0, 0, 0, 20, 100, 300]),
            twice: rng.pick(&[0, 0, 50, 300]),
            damaged: rng.pick(&[0, 0, 20, 100]),
            blocked: rng.chance(150),
        }
    }
}

/// What both ends know of datagrams; in some runs they are of the first version.
fn features(seed: u64) -> u64 {
    match mix(seed ^ 0xf10e_fea7) % 8 {
        0 => 0,
        _ => flow_feature::ALL,
    }
}

/// The socket that a flow belongs to, if it belongs to one that is not connected.
pub(super) fn group(seed: u64, flow: FlowId) -> Option<u64> {
    let drawn = mix(seed ^ mix(flow) ^ 0x6e00);
    (!drawn.is_multiple_of(3)).then_some((drawn >> 32) & 3)
}

/// What belongs to datagram `seq` of `from` on `flow`.
pub(super) fn info(seed: u64, flow: FlowId, from: Side, seq: u32) -> DatagramInfo {
    let drawn = mix(seed ^ mix(flow * 2 + from as u64) ^ mix(u64::from(seq) ^ 0x1f0));
    let answers = Side::opener(flow) != from;
    let grouped = features(seed) & flow_feature::GROUPS != 0 && group(seed, flow).is_some();
    let stranger = answers && grouped && drawn.is_multiple_of(4);
    let sender = SocketAddr::from(([198, 51, 100, (drawn >> 8) as u8], (drawn >> 16) as u16));
    DatagramInfo {
        dscp: Dscp::of_tos((drawn >> 40) as u8),
        source: stranger.then_some(sender),
    }
}

/// Flow, sequence number, sender: what stands at the front of a datagram.
const HEAD_BYTES: usize = 13;

/// Datagram `seq` of `from` on `flow`: nothing is kept to compare with.
pub(super) fn content(seed: u64, flow: FlowId, from: Side, seq: u32) -> Vec<u8> {
    let drawn = mix(seed ^ mix(flow * 2 + from as u64) ^ mix(u64::from(seq)));
    let (class, rest) = (drawn % 100, drawn >> 32);
    let more = match class {
        0..75 => rest % 1_100,
        75..93 => rest % 3_000,
        93..99 => rest % 12_000,
        _ => rest % (65_507 - HEAD_BYTES as u64 + 1),
    };
    let mut out = vec![0; HEAD_BYTES + more as usize];
    out[..8].copy_from_slice(&flow.to_be_bytes());
    out[8..12].copy_from_slice(&seq.to_be_bytes());
    out[12] = from as u8;
    let offset = u64::from(seq) << 17;
    fill(seed, flow | 1 << 60, from, offset, &mut out[HEAD_BYTES..]);
    out
}

/// What the front of a datagram says.
pub(super) fn head(data: &[u8]) -> Option<(FlowId, Side, u32)> {
    let (flow, rest) = data.split_first_chunk()?;
    let (seq, rest) = rest.split_first_chunk()?;
    let side = match rest.first()? {
        0 => Side::Initiator,
        1 => Side::Responder,
        _ => return None,
    };
    Some((u64::from_be_bytes(*flow), side, u32::from_be_bytes(*seq)))
}
