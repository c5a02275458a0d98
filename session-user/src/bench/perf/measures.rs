//! What is measured of a system that stands, one pass of it.

use std::collections::BTreeMap;

use super::super::ping::Pinged;
use super::connects::Connected;
use super::stand::Stand;
use super::streams::Streamed;

/// A group of figures that one run of an application's program gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
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
}

impl Group {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Throughput,
        Self::Streams,
        Self::Latency,
        Self::Requests,
        Self::FirstByte,
        Self::Idle,
    ];

    /// Whether it is measured of every system in turn.
    pub const fn is_of_all(self) -> bool {
        !matches!(self, Self::FirstByte | Self::Idle)
    }
}

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
        Group::FirstByte | Group::Idle => Ok(BTreeMap::new()),
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
    let words = ["--bytes", "1024", "--millis", millis.as_str()];
    let asked: Pinged = stand.run("app-ping", &words)?;
    stand.await_served(1)?;
    let seen: Connected = stand.run("app-connects", &["--millis", &millis])?;
    stand.await_served(seen.connections)?;
    Ok(BTreeMap::from([
        (REQUESTS, asked.rounds_per_s),
        (CONNECTIONS, seen.connections as f64 / seen.seconds),
    ]))
}
