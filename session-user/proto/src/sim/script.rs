//! What a seed decides before anything runs: limits, links, streams, and what goes wrong when.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::Side;
use super::net::Link;
use super::plan::{Habits, StreamPlan, WORDY};
use super::rng::{Rng, mix};
use super::trouble::Trigger;
use crate::Time;
use crate::session::{Compression, Config, SharedMemory, StreamId};
use crate::wire::{Codec, Mode, Packing, Service, Target};

/// Something that happens at a time set by the script.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Action {
    /// A link goes down: every wire on it dies.
    Cut { link: usize, for_ms: u64 },
    /// All links go down.
    Outage { for_ms: u64 },
    /// One wire dies, its link does not.
    Kill,
    /// A link swallows what goes one way or both, then heals or (`dies`) ends its wires.
    Hole {
        link: usize,
        from_initiator: bool,
        from_responder: bool,
        for_ms: u64,
        dies: bool,
    },
    /// The initiator moves to another link while the old one works.
    Move,
    /// The initiator dials one more lane of the path that it sends on.
    Lane,
    /// A side dials although it has a transport.
    Dial { side: Side, standby: bool },
    /// A side sends on another of its transports from now on.
    Switch { side: Side },
    /// A side ceases to use one of its transports.
    Retire { side: Side },
    /// Counters are used up by dials that nobody hears.
    Burn { side: Side, dials: u64 },
    /// The initiator renews keys in band.
    Reauth,
    /// A side asks for a PONG on each of its transports.
    Ping { side: Side },
    /// A bit is flipped on a wire.
    Flip,
    /// An attacker dials with what a wire carried before, perhaps only a part or with a flipped bit.
    Replay,
    /// A side opens a stream.
    Open { side: Side },
    /// The responder is started anew: it knows no session.
    Forget,
    /// A side closes the session.
    Close { side: Side },
    /// A link loses packets.
    Loss {
        link: usize,
        per_mille: u64,
        for_ms: u64,
    },
    /// Segments above a size never arrive on a link; then they do, or (`dies`) its wires end.
    SmallMtu {
        link: usize,
        bytes: usize,
        for_ms: u64,
        dies: bool,
    },
    /// The wires of a link swallow everything for ever; new ones work.
    NatForgets { link: usize },
    /// The wires of a link end at one side, which knows; the other hears nothing.
    AddressGone { link: usize, side: Side },
    /// A side does nothing, not even with its clock. Meanwhile NATs may forget.
    Sleep { side: Side, for_ms: u64, nat: bool },
    /// Both sides lose all transports, know at once, and dial.
    BothLose,
    /// Both sides move to different transports within `gap_us`; `again`: the first goes on to a
    /// third before that is over. Bits of `deaths`: the old one of each, the new one of each dies.
    BothMove {
        gap_us: u64,
        again: bool,
        deaths: u8,
        tries: u8,
    },
    /// One side moves softly to the transport of another wire; part of the above.
    MoveTo { side: Side, wire: usize },
    /// A link goes down and up.
    Flap {
        link: usize,
        times: u8,
        every_ms: u64,
    },
    /// A side learns of losses only after this time; `backwards`: of the latest first.
    LateDriver {
        side: Side,
        for_ms: u64,
        backwards: bool,
    },
}

/// The whole plan of a run.
#[derive(Clone, Debug)]
pub(super) struct Script {
    pub seed: u64,
    pub configs: [Config; 2],
    pub links: Vec<Link>,
    /// In order of time.
    pub actions: Vec<(Time, Action)>,
    /// Nothing goes wrong after it.
    pub calm_at: Time,
    /// Copies of records inserted, per thousand records.
    pub copies_per_mille: u64,
    /// Bytes of one stream and direction, at most.
    pub stream_bytes_max: u64,
    /// The initiator keeps a standby whenever it can.
    pub warm: bool,
    /// Streams ask for redundant and bonded transport, and for lanes.
    pub modes: bool,
    /// Streams are packed, and much of what they carry shrinks.
    pub packs: bool,
    /// What follows soon upon something else.
    pub triggers: Vec<Trigger>,
    /// The initiator chooses among its links as the agent's driver does: these, best first.
    pub preference: Option<Vec<usize>>,
    /// A link that nothing but single wires' deaths ever happens to.
    pub safe: Option<usize>,
    /// Both ends move at once when all else is over, and must agree in the end.
    pub last_move: bool,
    /// Of a thousand writes, how many begin with an urgent byte.
    marks_per_mille: u64,
}

impl Script {
    /// The plan of `seed`; `few`: without the faults that came later; `plain`: with streams that ask for
    /// nothing.
    pub fn new(seed: u64, few: bool, plain: bool) -> Self {
        let mut rng = Rng::new(mix(seed));
        let rng = &mut rng;
        let calm_ms = rng.log_range(300, 12_000);
        let mut script = Self {
            seed,
            configs: [config(rng, seed), config(rng, seed + 1)],
            links: (0..rng.range(1, 3)).map(|_| Link::draw(rng)).collect(),
            actions: Vec::new(),
            calm_at: Time::ZERO + Duration::from_millis(calm_ms),
            copies_per_mille: if rng.chance(300) {
                rng.range(5, 200)
            } else {
                0
            },
            stream_bytes_max: rng.log_range(512, 160 * 1024),
            warm: false,
            modes: !plain && rng.chance(500),
            packs: false,
            triggers: Vec::new(),
            preference: None,
            safe: None,
            last_move: false,
            marks_per_mille: 0,
        };
        script.draw_streams(rng, calm_ms);
        script.draw_faults(rng, calm_ms);
        if rng.chance(40) {
            script.at(rng, calm_ms, Action::Forget);
        }
        if rng.chance(60) {
            let side = rng.pick(&Side::BOTH);
            script.at(rng, calm_ms, Action::Close { side });
            if rng.chance(300) {
                let (at, _) = script.actions[script.actions.len() - 1];
                let near = at + rng.micros(1, 20_000);
                let side = side.other();
                script.actions.push((near, Action::Close { side }));
            }
        }
        script.warm = rng.chance(350);
        if script.warm {
            // What a standby is for: the link in use says nothing any more.
            for _ in 0..rng.range(1, 3) {
                let ways = rng.range(1, 3);
                let hole = Action::Hole {
                    link: rng.below(script.links.len() as u64) as usize,
                    from_initiator: ways & 1 != 0,
                    from_responder: ways & 2 != 0,
                    for_ms: rng.log_range(200, 8_000),
                    dies: rng.chance(300),
                };
                script.at(rng, calm_ms, hole);
            }
        }
        if !few {
            script.draw_trouble(calm_ms);
        }
        if script.modes {
            script.draw_lanes(calm_ms);
        }
        script.actions.sort();
        script
    }

    pub fn at(&mut self, rng: &mut Rng, end_ms: u64, action: Action) {
        let at = Time::from_nanos(rng.below(end_ms * 1_000_000));
        self.actions.push((at, action));
    }

    /// In some runs lanes are dialled, now and then.
    fn draw_lanes(&mut self, calm_ms: u64) {
        let mut rng = Rng::new(mix(self.seed ^ 0x1a9e_0000));
        let lanes = match rng.below(4) {
            0 => 0,
            1 => 1,
            _ => rng.range(2, 6),
        };
        for _ in 0..lanes {
            self.at(&mut rng, calm_ms, Action::Lane);
        }
    }

    /// In some runs bytes are urgent, few or many.
    pub fn draw_marks(&mut self) {
        let mut rng = Rng::new(mix(self.seed ^ 0x0b0b_0000));
        if rng.chance(300) {
            self.marks_per_mille = rng.log_range(10, 800);
        }
    }

    /// Whether a write of `from` on stream `id` begins with an urgent byte, if it begins at `offset`.
    pub fn is_urgent(&self, id: StreamId, from: Side, offset: u64) -> bool {
        let drawn = mix(self.seed ^ 0x0b0b_0001 ^ mix(id * 2 + from as u64) ^ mix(!offset));
        drawn % 1000 < self.marks_per_mille
    }

    /// In some runs streams are packed, by one codec or two, or by one end alone.
    pub fn draw_packing(&mut self) {
        let mut rng = Rng::new(mix(self.seed ^ 0x9ac4_0000));
        self.packs = rng.chance(350);
        if !self.packs {
            return;
        }
        let [lz4, zstd] = Codec::ALL.map(Codec::bit);
        for config in &mut self.configs {
            config.compression = Compression {
                codecs: rng.pick(&[lz4, zstd, lz4 | zstd, lz4 | zstd]),
                spares_web: false,
                always: rng.chance(800),
            };
            config.codecs_on_request = rng.pick(&[0, 0, lz4, zstd]);
        }
    }

    /// What the bytes of streams are drawn from.
    pub const fn pattern_seed(&self) -> u64 {
        if self.packs {
            self.seed | WORDY
        } else {
            self.seed
        }
    }

    fn draw_streams(&mut self, rng: &mut Rng, calm_ms: u64) {
        let streams = match rng.below(10) {
            0 => rng.range(20, 60),
            1..4 => 1,
            _ => rng.range(2, 10),
        };
        for _ in 0..streams {
            let side = rng.pick(&[Side::Initiator, Side::Initiator, Side::Responder]);
            // Many streams run while things go wrong: they begin early.
            let end = if rng.chance(600) {
                calm_ms / 4 + 1
            } else {
                calm_ms
            };
            self.at(rng, end, Action::Open { side });
        }
    }

    fn draw_faults(&mut self, rng: &mut Rng, calm_ms: u64) {
        // Some runs are quiet, some have one fault, some are a storm.
        let faults = match rng.below(8) {
            0 => 0,
            1 => 1,
            2..6 => rng.range(2, 8),
            _ => rng.range(8, 30),
        };
        for _ in 0..faults {
            let action = self.draw_fault(rng);
            // Now and then in the middle of the handshake.
            let end = if rng.chance(80) {
                calm_ms / 20 + 1
            } else {
                calm_ms
            };
            self.at(rng, end, action);
        }
    }

    pub fn draw_fault(&self, rng: &mut Rng) -> Action {
        let link = rng.below(self.links.len() as u64) as usize;
        let side = rng.pick(&Side::BOTH);
        let for_ms = rng.log_range(1, 3_000);
        match rng.below(100) {
            0..14 => Action::Cut { link, for_ms },
            14..18 => Action::Outage { for_ms: for_ms * 4 },
            18..30 => Action::Kill,
            30..40 => {
                let ways = rng.range(1, 3);
                Action::Hole {
                    link,
                    from_initiator: ways & 1 != 0,
                    from_responder: ways & 2 != 0,
                    for_ms,
                    dies: rng.chance(600),
                }
            }
            40..54 => Action::Move,
            54..62 => Action::Dial {
                side: if rng.chance(700) {
                    Side::Initiator
                } else {
                    side
                },
                standby: rng.chance(600),
            },
            62..70 => Action::Switch { side },
            70..74 => Action::Retire { side },
            74..77 => Action::Burn {
                side: Side::Initiator,
                dials: rng.range(1, 60),
            },
            77..85 => Action::Reauth,
            85..88 => Action::Ping { side },
            88..94 => Action::Flip,
            _ => Action::Replay,
        }
    }

    /// The plan of stream `id`.
    pub fn stream(&self, id: StreamId) -> StreamPlan {
        let mut rng = Rng::new(mix(self.seed ^ 0x5712_0000) ^ mix(id));
        let rng = &mut rng;
        let early = rng.chance(500);
        let mut habits = [(); 2].map(|()| Habits::draw(rng, self.stream_bytes_max));
        // Were both to wait for the other's end, neither would ever send its own.
        habits[1].end_after_peer &= !habits[0].end_after_peer;
        StreamPlan {
            habits,
            refuse: rng.chance(70).then(|| rng.pick(&[111, 113, 101])),
            connect: rng.micros(10, 100_000),
            early,
            service: Service {
                packing: self.packing(id),
                ..self.service(rng)
            },
        }
    }

    /// In some runs every stream has one transport at a time, in others each has its own way.
    fn service(&self, rng: &mut Rng) -> Service {
        if !self.modes {
            return Service::default();
        }
        Service {
            mode: rng.pick(&[Mode::Single, Mode::Redundant, Mode::Bonded]),
            own_lane: rng.chance(300),
            packing: Packing::Unsaid,
        }
    }

    /// In runs with packing some openers say how.
    fn packing(&self, id: StreamId) -> Packing {
        if !self.packs {
            return Packing::Unsaid;
        }
        let mut rng = Rng::new(mix(self.seed ^ 0x9ac4_0001) ^ mix(id));
        rng.pick(&[
            Packing::Unsaid,
            Packing::Unsaid,
            Packing::Unsaid,
            Packing::Off,
            Packing::Auto,
            Packing::Only(Codec::Lz4),
            Packing::Only(Codec::Zstd),
        ])
    }

    /// The target of stream `id`.
    pub fn target(&self, id: StreamId) -> Target {
        let port = 1 + (id % 60_000) as u16;
        if mix(self.seed ^ id) & 1 == 0 {
            Target::Name(format!("host-{id}.example"), port)
        } else {
            let ip = Ipv4Addr::from(mix(id) as u32);
            Target::Addr(SocketAddr::from((ip, port)))
        }
    }
}

/// A unit in four has little for all its sessions. It is not drawn: each seed's story stays what it was.
fn shared_memory(seed: u64) -> SharedMemory {
    let drawn = mix(seed ^ 0x7368_6172_6564);
    if drawn.is_multiple_of(4) {
        SharedMemory::new((64 * 1024) << ((drawn >> 8) % 6))
    } else {
        SharedMemory::default()
    }
}

fn config(rng: &mut Rng, seed: u64) -> Config {
    let mut instance = [0; 16];
    instance[..8].copy_from_slice(&mix(seed).to_be_bytes());
    Config {
        instance,
        software: "sim".to_owned(),
        memory_bytes: rng.log_range(128 * 1024, 2 << 20) as usize,
        shared_memory: shared_memory(seed),
        max_streams: rng.log_range(2, 64),
        stream_window_max: rng.log_range(32 * 1024, 1 << 20),
        rekey_records: rng.pick(&[20, 50, 50, 200, 1 << 22]),
        rekey_after: rng.pick(&[200, 5_000, 3_600_000].map(Duration::from_millis)),
        ..Config::default()
    }
}
