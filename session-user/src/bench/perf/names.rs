//! What each group measures, and of what, by name: groups make their figures of these names, and goals are set for them.

use super::measures::Group;
use super::systems::System;

/// One figure: its measure, and the unit.
pub type Name = (&'static str, &'static str);

/// One stream's goodput.
pub const GOODPUT: Name = ("goodput", "MB/s");
/// Application, both ends and server.
pub const CPU_ALL: Name = ("cpu_all_processes", "s/GB");
/// Both ends.
pub const CPU_ENDS: Name = ("cpu_both_ends", "s/GB");
/// The total of sixteen.
pub const STREAMS: Name = ("goodput_16_streams", "MB/s");
/// The slowest of the sixteen to their mean.
pub const SLOWEST: Name = ("slowest_of_16_to_mean", "1");
/// Median of the round trip.
pub const PING_P50: Name = ("ping_64_bytes_p50", "us");
/// Its 99th percentile.
pub const PING_P99: Name = ("ping_64_bytes_p99", "us");
/// Questions of 1 KiB on one connection.
pub const REQUESTS: Name = ("requests_1_kib", "1/s");
/// Connections, each with one question.
pub const CONNECTIONS: Name = ("connections", "1/s");

/// From connect() to the first byte of an answer.
pub const FIRST_BYTE: Name = ("first_byte_at_40_ms", "ms");

/// How often an agent runs while nothing happens.
pub const IDLE_WAKE_UPS: Name = ("idle_wake_ups", "1/s");
/// How long.
pub const IDLE_CPU: Name = ("idle_cpu", "% of a core");
/// Of an agent with one session.
pub const IDLE_STREAM: Name = ("memory_of_an_idle_stream", "KiB");

/// What a codec by itself makes of the log; Zstandard at level 1.
pub const OWN_RATIO: Name = ("log_own_ratio", "1");
/// What does not shrink, to the server over a narrow link.
pub const NOISE_UP: Name = ("noise_up_10_mbit", "MB/s");
/// The same from the server.
pub const NOISE_DOWN: Name = ("noise_down_10_mbit", "MB/s");
/// The log, to the server over a narrow link.
pub const LOG_UP: Name = ("log_up_10_mbit", "MB/s");
/// The same from the server.
pub const LOG_DOWN: Name = ("log_down_10_mbit", "MB/s");
/// What does not shrink where only the processors limit.
pub const NOISE_UNLIMITED: Name = ("noise_unlimited", "MB/s");
/// What both ends spend on it.
pub const NOISE_UNLIMITED_CPU: Name = ("noise_unlimited_cpu_ends", "s/GB");
/// The log where only the processors limit.
pub const LOG_UNLIMITED: Name = ("log_unlimited", "MB/s");
/// What both ends spend on it.
pub const LOG_UNLIMITED_CPU: Name = ("log_unlimited_cpu_ends", "s/GB");

/// Sessions that were to be made.
pub const SESSIONS_WANTED: Name = ("sessions_wanted", "1");
/// Of these, those that were.
pub const SESSIONS_MADE: Name = ("sessions_made", "1");
/// How fast.
pub const SESSIONS_RATE: Name = ("sessions_made_per_second", "1/s");
/// Streams that were to be opened.
pub const STREAMS_WANTED: Name = ("streams_wanted", "1");
/// Of these, those that were.
pub const STREAMS_OPENED: Name = ("streams_opened", "1");
/// How fast.
pub const STREAMS_RATE: Name = ("streams_opened_per_second", "1/s");
/// For how long they were held.
pub const HELD: Name = ("held", "s");
/// Sessions whose transport answers at the end, and goes on to stand.
pub const SESSIONS_ALIVE: Name = ("sessions_alive_then", "1");
/// Streams that were asked then.
pub const STREAMS_ASKED: Name = ("streams_asked_then", "1");
/// Of those that were to be asked, those that answered.
pub const STREAMS_ECHOED: Name = ("streams_that_echoed", "1");
/// Of a gateway with very many.
pub const IDLE_SESSION: Name = ("memory_of_an_idle_session", "KiB");
/// Of one of very many sessions that have a few each.
pub const SPREAD_STREAM: Name = ("memory_of_an_idle_stream_of_many_sessions", "KiB");
/// Of all that the gateway holds.
pub const GATEWAY_MEMORY: Name = ("memory_of_the_gateway", "MiB");
/// While it holds them.
pub const GATEWAY_CPU: Name = ("cpu_while_idle", "% of a core");

/// New streams of one session, at once.
pub const BURST_RATE: Name = ("burst_streams_opened_per_second", "1/s");
/// Of these, those that answered.
pub const BURST_ECHOED: Name = ("burst_streams_that_echoed", "1");

/// What waited for an echo when the link was cut.
pub const STALL_MET: Name = ("stall_p95_of_what_met_the_cut", "ms");
/// The longest wait of each stream.
pub const STALL_ALL: Name = ("stall_p95_of_all_streams", "ms");
/// The longest of all.
pub const STALL_MAX: Name = ("stall_max", "ms");
/// Streams that ended in any of the cuts.
pub const STREAMS_LOST: Name = ("streams_lost", "1");
/// Captured ones of one session.
pub const CAPTURED_RATE: Name = ("captured_streams_opened_per_second", "1/s");

/// One stream's goodput while others are stuck.
pub const BESIDE_STUCK: Name = ("goodput_beside_stuck_streams", "MB/s");
/// What an agent holds of those.
pub const HELD_OF_STUCK: Name = ("held_of_1000_stuck_streams", "MiB");

/// As many as were asked for.
pub const WANTED: &str = "wanted";
/// With the default configuration.
pub const HOLDFAST: &str = System::Holdfast.name();
/// With `connect = "early"`.
pub const EARLY: &str = System::Early.name();
/// The client's agent.
pub const CLIENT: &str = "holdfast, client";
/// The gateway's.
pub const GATEWAY: &str = "holdfast, gateway";
/// Where nothing else is measured.
pub const ALONE: &str = "holdfast, alone";
/// With a thousand streams whose readers are stuck.
pub const WITH_STUCK: &str = "holdfast, 1000 stuck";
/// A session with one stream; and what sixteen are compared with.
pub const ONE_STREAM: &str = "one stream";
/// A session with very many.
pub const MANY_STREAMS: &str = "many streams";
/// Nothing in between.
pub const DIRECT: &str = System::Direct.name();
/// `compression = "off"`.
pub const OFF: &str = "off";
/// `compression = "auto"`.
pub const AUTO: &str = "auto";
/// `compression = "lz4"`, and the codec.
pub const LZ4: &str = "lz4";
/// `compression = "zstd"`, and the codec.
pub const ZSTD: &str = "zstd";
/// What a codec by itself makes of the log, times what the link carries of a plain TCP connection that is not captured,
/// headers not counted.
pub const OWN_DIRECT: &str = "own ratio x direct";
/// The same, times what Holdfast gets there without compression, of what does not shrink.
pub const OWN_OFF: &str = "own ratio x off";

/// One measure of a group.
#[derive(Clone, Copy, Debug)]
pub struct Given {
    /// What is measured.
    pub measure: &'static str,
    /// Through what, or of what.
    pub systems: &'static [&'static str],
    /// What a row may be compared with beside these.
    pub beside: &'static [&'static str],
}

const fn given(name: Name, systems: &'static [&'static str]) -> Given {
    compared(name, systems, &[])
}

const fn compared(
    name: Name,
    systems: &'static [&'static str],
    beside: &'static [&'static str],
) -> Given {
    Given {
        measure: name.0,
        systems,
        beside,
    }
}

/// The names of all systems.
const ALL: [&str; System::ALL.len()] = names_of(Group::Requests);
/// Of those that every group is measured of.
const EVERY: [&str; System::ALL.len() - 1] = names_of(Group::Throughput);

const fn names_of<const N: usize>(group: Group) -> [&'static str; N] {
    let mut names = [""; N];
    let (mut at, mut from) = (0, 0);
    while from < System::ALL.len() {
        if group.is_of(System::ALL[from]) {
            names[at] = System::ALL[from].name();
            at += 1;
        }
        from += 1;
    }
    assert!(at == N);
    names
}

const ENDS: &[&str] = &[CLIENT, GATEWAY];
const PACKED: &[&str] = &[LZ4, ZSTD, AUTO];
const OWN: &[&str] = &[OWN_DIRECT, OWN_OFF];

impl Group {
    /// Every measure that it may have a row of.
    pub const fn gives(self) -> &'static [Given] {
        match self {
            Self::Throughput => {
                const {
                    &[
                        given(GOODPUT, &EVERY),
                        given(CPU_ALL, &EVERY),
                        given(CPU_ENDS, &EVERY),
                    ]
                }
            }
            Self::Streams => {
                const {
                    &[
                        compared(STREAMS, &EVERY, &[ONE_STREAM]),
                        given(SLOWEST, &EVERY),
                    ]
                }
            }
            Self::Latency => const { &[given(PING_P50, &EVERY), given(PING_P99, &EVERY)] },
            Self::Requests => const { &[given(REQUESTS, &EVERY), given(CONNECTIONS, &ALL)] },
            Self::FirstByte => const { &[given(FIRST_BYTE, &[DIRECT, HOLDFAST, EARLY])] },
            Self::Idle => {
                const {
                    &[
                        given(IDLE_WAKE_UPS, ENDS),
                        given(IDLE_CPU, ENDS),
                        given(IDLE_STREAM, ENDS),
                    ]
                }
            }
            Self::Compression => {
                const {
                    &[
                        given(OWN_RATIO, &[LZ4, ZSTD]),
                        given(NOISE_UP, &[DIRECT, OFF, AUTO]),
                        given(NOISE_DOWN, &[DIRECT, OFF, AUTO]),
                        compared(LOG_UP, PACKED, OWN),
                        compared(LOG_DOWN, PACKED, OWN),
                        given(NOISE_UNLIMITED, &[OFF, AUTO]),
                        given(NOISE_UNLIMITED_CPU, &[OFF, AUTO]),
                        given(LOG_UNLIMITED, &[OFF, AUTO]),
                        given(LOG_UNLIMITED_CPU, &[OFF, AUTO]),
                    ]
                }
            }
            Self::Scale => {
                const {
                    &[
                        given(SESSIONS_WANTED, &[GATEWAY]),
                        compared(SESSIONS_MADE, &[GATEWAY], &[WANTED]),
                        given(SESSIONS_RATE, &[GATEWAY]),
                        given(STREAMS_WANTED, &[GATEWAY]),
                        compared(STREAMS_OPENED, &[GATEWAY], &[WANTED]),
                        given(STREAMS_RATE, &[GATEWAY]),
                        given(HELD, &[GATEWAY]),
                        compared(SESSIONS_ALIVE, &[GATEWAY], &[WANTED]),
                        compared(STREAMS_ASKED, &[GATEWAY], &[WANTED]),
                        compared(STREAMS_ECHOED, &[GATEWAY], &[WANTED]),
                        given(IDLE_SESSION, &[GATEWAY]),
                        given(SPREAD_STREAM, &[GATEWAY]),
                        given(GATEWAY_MEMORY, &[GATEWAY]),
                        given(GATEWAY_CPU, &[GATEWAY]),
                    ]
                }
            }
            Self::Burst => {
                const {
                    &[
                        given(BURST_RATE, &[GATEWAY]),
                        given(BURST_ECHOED, &[GATEWAY]),
                    ]
                }
            }
            Self::Many => {
                const {
                    &[
                        given(STALL_MET, &[ONE_STREAM, MANY_STREAMS]),
                        given(STALL_ALL, &[ONE_STREAM, MANY_STREAMS]),
                        given(STALL_MAX, &[ONE_STREAM, MANY_STREAMS]),
                        given(STREAMS_LOST, &[ONE_STREAM, MANY_STREAMS]),
                        given(CAPTURED_RATE, &[MANY_STREAMS]),
                    ]
                }
            }
            Self::Stuck => {
                const {
                    &[
                        given(BESIDE_STUCK, &[ALONE, WITH_STUCK]),
                        given(HELD_OF_STUCK, ENDS),
                    ]
                }
            }
        }
    }

    /// Whether it may have a row of `measure` and `system`, compared with `to`.
    pub fn names(self, measure: &str, system: &str, to: Option<&str>) -> bool {
        let mut of_measure = self.gives().iter().filter(|g| g.measure == measure);
        of_measure.any(|given| {
            let compares = |to| given.systems.contains(&to) || given.beside.contains(&to);
            given.systems.contains(&system) && to.is_none_or(compares)
        })
    }
}
