//! What Holdfast costs while nothing happens: wake-ups, processor time, and the memory of streams that are open.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};

use super::super::app::Direction;
use super::super::programs::raise_descriptors;
use super::memory::resident;
use super::names::{IDLE_CPU, IDLE_STREAM, IDLE_WAKE_UPS, Name};
use super::rows::{Figures, Row};
use super::stand::Stand;
use super::systems::System;
use crate::stdio::print_line;

/// How long an idle agent is watched, at least.
const WATCHED: Duration = Duration::from_secs(20);
/// What has just happened is over by then: acknowledgements, the standby's first measurements.
const SETTLED: Duration = Duration::from_secs(5);
/// Streams that are open at once.
const STREAMS: usize = 2_000;
/// The part of [`STREAMS`] before which an agent has the memory that it takes for the first.
const FIRST: usize = 200;

/// Arguments of the hidden `bench app-hold`.
#[derive(Debug, clap::Args)]
pub struct HoldArgs {
    /// The application's server.
    #[arg(long)]
    server: SocketAddr,
    /// How many connections.
    #[arg(long)]
    connections: usize,
}

/// Opens connections, speaks once on each, says so, and holds them until standard input ends.
pub fn app(args: &HoldArgs) -> anyhow::Result<ExitCode> {
    raise_descriptors()?;
    let mut held = Vec::with_capacity(args.connections);
    for _ in 0..args.connections {
        let mut socket = TcpStream::connect(args.server)?;
        socket.write_all(&[Direction::Echo as u8, 0, 0, 0, 0, 7])?;
        socket.read_exact(&mut [0])?;
        held.push(socket);
    }
    print_line("\"open\"");
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    Ok(ExitCode::SUCCESS)
}

/// Measures both agents with one idle session, and then with many idle streams.
pub fn rows(passes: u16) -> anyhow::Result<Vec<Row>> {
    let stand = Stand::new(System::Holdfast)?;
    let agents = stand.agents();
    let mut wakes = ends(&agents, IDLE_WAKE_UPS);
    let mut cpu = ends(&agents, IDLE_CPU);
    // The session has just begun: what that leaves to do is not idleness.
    std::thread::sleep(SETTLED);
    for _ in 0..passes {
        let before: Vec<Spent> = spent(&agents)?;
        // The measurement itself.
        std::thread::sleep(WATCHED);
        for (index, after) in spent(&agents)?.iter().enumerate() {
            let used = between(&before[index], after);
            let seconds = WATCHED.as_secs_f64();
            wakes[index].values.push(used.switches as f64 / seconds);
            cpu[index]
                .values
                .push(used.ran_ns as f64 / 1e9 / seconds * 100.0);
        }
    }
    let memory = memory(&stand, &agents)?;
    let all = wakes.iter().chain(&cpu).chain(&memory);
    Ok(all.map(|figures| figures.row(None)).collect())
}

fn ends(agents: &[(&'static str, u32)], name: Name) -> Vec<Figures> {
    let figures = |(system, _): &(&'static str, u32)| Figures::new(name, system);
    agents.iter().map(figures).collect()
}

/// Memory outside of the kernel that one idle stream takes at each agent.
fn memory(stand: &Stand, agents: &[(&'static str, u32)]) -> anyhow::Result<Vec<Figures>> {
    let mut figures = ends(agents, IDLE_STREAM);
    let _first = hold(stand, FIRST)?;
    let before: Vec<f64> = resident_of(agents)?;
    let _rest = hold(stand, STREAMS)?;
    // What was needed only to open them is given back by then.
    std::thread::sleep(SETTLED);
    for (index, after) in resident_of(agents)?.into_iter().enumerate() {
        figures[index]
            .values
            .push((after - before[index]) / STREAMS as f64);
    }
    Ok(figures)
}

/// Connections that stand until this is dropped.
struct Held(std::process::Child);

impl Drop for Held {
    fn drop(&mut self) {
        // It ends when its input does; it may have ended by itself.
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

fn hold(stand: &Stand, connections: usize) -> anyhow::Result<Held> {
    let mut child = stand.spawn("app-hold", &["--connections", &connections.to_string()])?;
    let out = child
        .stdout
        .take()
        .context("the application has no output")?;
    let held = Held(child);
    let mut line = String::new();
    BufReader::new(out).read_line(&mut line)?;
    ensure!(
        line.contains("open"),
        "{connections} connections could not be opened"
    );
    Ok(held)
}

/// What the threads of a process have used so far, by their numbers.
type Spent = BTreeMap<String, Used>;

/// What a thread has used.
#[derive(Clone, Copy, Default)]
struct Used {
    /// Context switches: each is the end of having run, and so one wake-up.
    switches: u64,
    /// On a processor.
    ran_ns: u64,
}

fn spent(agents: &[(&'static str, u32)]) -> anyhow::Result<Vec<Spent>> {
    agents.iter().map(|(_, pid)| spent_by(*pid)).collect()
}

/// From proc(5): `status` and `schedstat` of each thread.
fn spent_by(pid: u32) -> anyhow::Result<Spent> {
    let mut spent = Spent::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?;
        // A thread may end while it is looked at: what it used is lost.
        if let Some(used) = used_by(&task.path()) {
            spent.insert(task.file_name().to_string_lossy().into_owned(), used);
        }
    }
    Ok(spent)
}

fn used_by(task: &Path) -> Option<Used> {
    let status = fs::read_to_string(task.join("status")).ok()?;
    let ran = fs::read_to_string(task.join("schedstat")).ok()?;
    let switches = |line: &str| {
        let (name, value) = line.split_once(':')?;
        let counts = name.ends_with("ctxt_switches");
        counts.then(|| value.trim().parse::<u64>().ok())?
    };
    Some(Used {
        switches: status.lines().filter_map(switches).sum(),
        ran_ns: ran.split_whitespace().next()?.parse().ok()?,
    })
}

/// What was used between two looks, by the threads that stand at the second.
fn between(before: &Spent, after: &Spent) -> Used {
    let mut sum = Used::default();
    for (thread, now) in after {
        let then = before.get(thread).copied().unwrap_or_default();
        sum.switches += now.switches - then.switches;
        sum.ran_ns += now.ran_ns - then.ran_ns;
    }
    sum
}

/// Memory of each agent, in KiB.
fn resident_of(agents: &[(&'static str, u32)]) -> anyhow::Result<Vec<f64>> {
    let of = |(_, pid): &(&'static str, u32)| Ok(resident(*pid)?.kib);
    agents.iter().map(of).collect()
}
