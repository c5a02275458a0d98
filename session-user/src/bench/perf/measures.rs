//! What is measured of a system that stands, one pass of it.

use std::collections::BTreeMap;

use clap::ValueEnum;
use clap::builder::PossibleValue;

use super::super::ping::Pinged;
use super::connects::Connected;
use super::names::{
    CONNECTIONS, CPU_ALL, CPU_ENDS, GOODPUT, Name, PING_P50, PING_P99, REQUESTS, SLOWEST, STREAMS,
};
use super::stand::Stand;
use super::streams::Streamed;
use super::systems::System;

/// A group of figures that one run of an application's program gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Group {
    /// One stream as fast as it goes, and the processor time that it costs.
    Throughput,
    /// Sixteen of them at once.
    Streams,
    /// 64 bytes and their echo, again and again.
    Latency,
    /// The same with 1 KiB, by the second; and connections by the second.
    Requests,
    /// From connect() to the first byte of an answer, at a round-trip time of 40 ms. Directly and through Holdfast.
    FirstByte,
    /// What Holdfast costs while nothing happens, and the memory of idle streams.
    Idle,
    /// A log over a link of 10 Mbit/s, by codec, to what the codecs by themselves make of it; and what does not shrink.
    Compression,
    /// One gateway with very many sessions and streams: what it holds, and what each costs. Takes minutes.
    Scale,
    /// Very many new streams of one session at once.
    Burst,
    /// A cut of the link under a session with very many streams, as often as there are passes, next to one stream.
    Many,
    /// One stream's goodput beside very many whose readers are stuck.
    Stuck,
}

/// What is asked for on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Every group.
    All,
    /// One.
    One(Group),
}

impl ValueEnum for Wanted {
    fn value_variants<'a>() -> &'a [Self] {
        const ALL: [Wanted; Group::ALL.len() + 1] = {
            let mut all = [Wanted::All; Group::ALL.len() + 1];
            let mut at = 0;
            while at < Group::ALL.len() {
                all[at + 1] = Wanted::One(Group::ALL[at]);
                at += 1;
            }
            all
        };
        &ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        match self {
            Self::All => Some(PossibleValue::new("all").help("Everything. Takes half an hour")),
            Self::One(group) => group.to_possible_value(),
        }
    }
}

impl Group {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Throughput,
        Self::Streams,
        Self::Latency,
        Self::Requests,
        Self::FirstByte,
        Self::Idle,
        Self::Compression,
        Self::Scale,
        Self::Burst,
        Self::Many,
        Self::Stuck,
    ];

    /// All of them, but those that are about numbers.
    pub fn usual() -> Vec<Self> {
        let about_numbers =
            |group: &Self| matches!(group, Self::Scale | Self::Burst | Self::Many | Self::Stuck);
        Self::ALL
            .into_iter()
            .filter(|g| !about_numbers(g))
            .collect()
    }

    /// As on the command line.
    pub fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Whether it is measured of every system in turn.
    pub const fn is_of_all(self) -> bool {
        matches!(
            self,
            Self::Throughput | Self::Streams | Self::Latency | Self::Requests
        )
    }

    /// Whether it is measured of `system`, if it is of every system in turn: how a connection is made tells only where
    /// connections are.
    pub const fn is_of(self, system: System) -> bool {
        matches!(self, Self::Requests) || !matches!(system, System::Early)
    }
}

/// Streams of [`Group::Streams`].
const MANY: usize = 16;
/// Latencies need less time than rates.
const SHORT: u64 = 2;

/// Measures one group; `millis` is how long a bulk transfer takes.
pub fn measure(
    stand: &mut Stand,
    group: Group,
    millis: u64,
) -> anyhow::Result<BTreeMap<Name, f64>> {
    match group {
        Group::Throughput => throughput(stand, millis),
        Group::Streams => streams(stand, millis),
        Group::Latency => latency(stand, millis / SHORT),
        Group::Requests => requests(stand, millis / SHORT),
        // These have set-ups of their own.
        _ => Ok(BTreeMap::new()),
    }
}

fn throughput(stand: &mut Stand, millis: u64) -> anyhow::Result<BTreeMap<Name, f64>> {
    let before = stand.cpu()?;
    let seen: Streamed = stand.run("app-streams", &["--millis", &millis.to_string()])?;
    let after = stand.cpu()?;
    stand.await_served(1)?;
    let bytes = seen.bytes.iter().sum::<u64>() as f64;
    let (gb, ends) = (bytes / 1e9, after.ends - before.ends);
    let all = ends + (after.server - before.server) + seen.cpu_s;
    Ok(BTreeMap::from([
        (GOODPUT, bytes / 1e6 / seen.seconds),
        (CPU_ALL, all / gb),
        (CPU_ENDS, ends / gb),
    ]))
}

fn streams(stand: &mut Stand, millis: u64) -> anyhow::Result<BTreeMap<Name, f64>> {
    let (count, millis) = (MANY.to_string(), millis.to_string());
    let words = ["--streams", count.as_str(), "--millis", millis.as_str()];
    let seen: Streamed = stand.run("app-streams", &words)?;
    stand.await_served(MANY)?;
    let bytes = seen.bytes.iter().sum::<u64>() as f64;
    let slowest = seen.bytes.iter().min().copied().unwrap_or(0) as f64;
    Ok(BTreeMap::from([
        (STREAMS, bytes / 1e6 / seen.seconds),
        (SLOWEST, slowest / (bytes / MANY as f64)),
    ]))
}

fn latency(stand: &mut Stand, millis: u64) -> anyhow::Result<BTreeMap<Name, f64>> {
    let seen: Pinged = stand.run("app-ping", &["--millis", &millis.to_string()])?;
    stand.await_served(1)?;
    Ok(BTreeMap::from([
        (PING_P50, seen.p50_us),
        (PING_P99, seen.p99_us),
    ]))
}

fn requests(stand: &mut Stand, millis: u64) -> anyhow::Result<BTreeMap<Name, f64>> {
    let millis = millis.to_string();
    let mut values = BTreeMap::new();
    // On a connection that stands nothing is left of how it was made.
    if stand.system != System::Early {
        let words = ["--bytes", "1024", "--millis", millis.as_str()];
        let asked: Pinged = stand.run("app-ping", &words)?;
        stand.await_served(1)?;
        values.insert(REQUESTS, asked.rounds_per_s);
    }
    let seen: Connected = stand.run("app-connects", &["--millis", &millis])?;
    stand.await_served(seen.connections)?;
    values.insert(CONNECTIONS, seen.connections as f64 / seen.seconds);
    Ok(values)
}
