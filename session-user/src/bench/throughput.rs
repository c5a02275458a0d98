//! `holdfast bench throughput`: one bulk stream and a ping-pong through a direct connection, a
//! plain two-hop proxy, and Holdfast, in turn, in one lab.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::Serialize;
use session_lab::{Lab, Netns};

use super::app::{Direction, Pace};
use super::bed::{Bed, BedConfig, Running, own_program};
use super::ping::Pinged;
use super::programs::{Client, Server};
use super::progress::progress;
use crate::stdio::print_line;

/// Port of the proxy in the server's namespace.
const FAR_PORT: u16 = 7001;
/// Port of the proxy in the client's namespace.
const NEAR_PORT: u16 = 7002;
/// Time for what is under way to arrive.
const FINISH_LIMIT: Duration = Duration::from_secs(30);
/// Kernel clock ticks in a second (USER_HZ), of all architectures that Linux has today.
const TICKS_PER_SECOND: f64 = 100.0;

/// Arguments of `bench throughput`.
#[derive(Debug, clap::Args)]
pub struct ThroughputArgs {
    /// Passes over all systems; the median of each figure counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    passes: u16,
    /// Seconds of bulk transfer in each pass.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=600))]
    seconds: u16,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// What the application's bytes go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum System {
    Direct,
    Proxy,
    Holdfast,
}

const SYSTEMS: [(System, &str); 3] = [
    (System::Direct, "direct"),
    (System::Proxy, "plain two-hop proxy"),
    (System::Holdfast, "holdfast"),
];

/// One pass of one system.
#[derive(Clone, Copy, Debug)]
struct Pass {
    mb_per_s: f64,
    near_s_per_gb: f64,
    far_s_per_gb: f64,
    p50_us: f64,
    p99_us: f64,
}

/// The figures of one system.
#[derive(Debug, Serialize)]
struct Row {
    system: String,
    passes: usize,
    mb_per_s: Spread,
    ratio_to_proxy: f64,
    near_cpu_s_per_gb: Spread,
    far_cpu_s_per_gb: Spread,
    ping_p50_us: Spread,
    ping_p99_us: Spread,
}

/// Median and range over the passes.
#[derive(Clone, Copy, Debug, Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    fn of(passes: &[Pass], get: fn(&Pass) -> f64) -> Self {
        let mut values: Vec<f64> = passes.iter().map(get).collect();
        values.sort_by(f64::total_cmp);
        let at = |i: usize| values.get(i).copied().unwrap_or(0.0);
        Self {
            median: at(values.len() / 2),
            min: at(0),
            max: at(values.len().saturating_sub(1)),
        }
    }
}

/// Measures and prints.
pub fn run(args: &ThroughputArgs) -> anyhow::Result<ExitCode> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "it makes network namespaces: it needs root"
    );
    let dir = super::scratch()?;
    let bed = Bed::new(dir.path(), BedConfig::new(own_program()?))?;
    let target = Server::start(SocketAddr::new(Lab::target(false), 0), dir.path(), |c| {
        bed.lab.server().spawn(c)
    })?;
    let far = proxy(
        bed.lab.server(),
        SocketAddr::new(Lab::gateway(false), FAR_PORT),
        target.addr,
    )?;
    let near_at = SocketAddr::from((Ipv4Addr::LOCALHOST, NEAR_PORT));
    let near = proxy(
        bed.lab.client(),
        near_at,
        SocketAddr::new(Lab::gateway(false), FAR_PORT),
    )?;
    let (agent_near, agent_far) = (
        pid(bed.client_agent.as_ref())?,
        pid(bed.gateway_agent.as_ref())?,
    );
    let bar = progress("throughput", usize::from(args.passes) * SYSTEMS.len());
    let mut passes: [Vec<Pass>; 3] = Default::default();
    for _ in 0..args.passes {
        for (index, (system, _)) in SYSTEMS.iter().enumerate() {
            let (server, ends) = match system {
                System::Direct => (target.addr, None),
                System::Proxy => (near_at, Some((near.pid(), far.pid()))),
                System::Holdfast => (target.addr, Some((agent_near, agent_far))),
            };
            let captured = *system == System::Holdfast;
            let seconds = Duration::from_secs(args.seconds.into());
            passes[index].push(one_pass(
                &bed,
                dir.path(),
                &target,
                server,
                captured,
                ends,
                seconds,
            )?);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let proxy_rate = Spread::of(&passes[1], |p| p.mb_per_s).median;
    let rows: Vec<Row> = SYSTEMS
        .iter()
        .zip(&passes)
        .map(|((_, name), p)| row(name, p, proxy_rate))
        .collect();
    print(&rows, args.json)?;
    Ok(ExitCode::SUCCESS)
}

fn pid(agent: Option<&Running>) -> anyhow::Result<u32> {
    agent.map(Running::pid).context("an agent is missing")
}

fn proxy(netns: &Netns, listen: SocketAddr, to: SocketAddr) -> anyhow::Result<Running> {
    let mut command = Command::new(own_program()?);
    command.args([
        "bench",
        "app-proxy",
        "--listen",
        &listen.to_string(),
        "--to",
        &to.to_string(),
    ]);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = netns.spawn(command)?;
    let out = child.stdout.take().context("the proxy has no output")?;
    let mut line = String::new();
    BufReader::new(out).read_line(&mut line)?;
    ensure!(!line.is_empty(), "the proxy does not listen on {listen}");
    Ok(Running::new(child, "proxy"))
}

/// Starts a client's command in the client's namespace, in the captured cgroup if it must be.
fn start(bed: &Bed, captured: bool, command: Command) -> std::io::Result<Child> {
    if captured {
        bed.spawn_captured(command)
    } else {
        bed.lab.client().spawn(command)
    }
}

#[allow(clippy::too_many_arguments)] // Each is a different thing that a pass needs.
fn one_pass(
    bed: &Bed,
    dir: &Path,
    target: &Server,
    server: SocketAddr,
    captured: bool,
    ends: Option<(u32, u32)>,
    seconds: Duration,
) -> anyhow::Result<Pass> {
    let cpu = |pid: fn((u32, u32)) -> u32| ends.map_or(Ok(0.0), |e| cpu_seconds(pid(e)));
    let before = (cpu(|e| e.0)?, cpu(|e| e.1)?);
    let began = Instant::now();
    let client = Client::start(
        server,
        Direction::Upload,
        Pace::Bulk,
        Duration::ZERO,
        dir.join("up"),
        |c| start(bed, captured, c),
    )?;
    std::thread::sleep(seconds);
    let seen = client.finish(FINISH_LIMIT)?;
    let took = began.elapsed().as_secs_f64();
    ensure!(
        seen.errors.is_empty(),
        "the transfer failed: {}",
        seen.errors.join("; ")
    );
    ensure!(
        seen.sent == seen.received,
        "{} bytes were sent and {} received",
        seen.sent,
        seen.received
    );
    let after = (cpu(|e| e.0)?, cpu(|e| e.1)?);
    // The server has told of this connection: take the line away.
    target
        .next_served(FINISH_LIMIT)
        .context("the server did not see the connection end")?;
    let gb = seen.received as f64 / 1e9;
    let mut ping = Command::new(own_program()?);
    ping.args([
        "bench",
        "app-ping",
        "--server",
        &server.to_string(),
        "--millis",
        "1500",
    ]);
    ping.stdin(Stdio::null()).stdout(Stdio::piped());
    let output = start(bed, captured, ping)?.wait_with_output()?;
    let pinged: Pinged =
        serde_json::from_slice(&output.stdout).context("the ping-pong printed nothing of use")?;
    target
        .next_served(FINISH_LIMIT)
        .context("the server did not see the ping-pong end")?;
    Ok(Pass {
        mb_per_s: seen.received as f64 / 1e6 / took,
        near_s_per_gb: (after.0 - before.0) / gb,
        far_s_per_gb: (after.1 - before.1) / gb,
        p50_us: pinged.p50_us,
        p99_us: pinged.p99_us,
    })
}

/// User and system time of a process (proc_pid_stat(5), fields 14 and 15).
fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = text
        .rsplit(')')
        .next()
        .unwrap_or("")
        .split_whitespace()
        .skip(11)
        .take(2);
    let ticks: f64 = fields.filter_map(|f| f.parse::<f64>().ok()).sum();
    Ok(ticks / TICKS_PER_SECOND)
}

fn row(name: &str, passes: &[Pass], proxy_rate: f64) -> Row {
    let rate = Spread::of(passes, |p| p.mb_per_s);
    Row {
        system: name.to_owned(),
        passes: passes.len(),
        mb_per_s: rate,
        ratio_to_proxy: rate.median / proxy_rate.max(1e-9),
        near_cpu_s_per_gb: Spread::of(passes, |p| p.near_s_per_gb),
        far_cpu_s_per_gb: Spread::of(passes, |p| p.far_s_per_gb),
        ping_p50_us: Spread::of(passes, |p| p.p50_us),
        ping_p99_us: Spread::of(passes, |p| p.p99_us),
    }
}

fn print(rows: &[Row], json: bool) -> anyhow::Result<()> {
    if json {
        print_line(serde_json::to_string_pretty(rows)?);
        return Ok(());
    }
    print_line(format_args!(
        "{:<20} {:>9} {:>9} {:>17} {:>17} {:>10} {:>10}",
        "", "MB/s", "to proxy", "near CPU s/GB", "far CPU s/GB", "ping p50", "ping p99"
    ));
    for r in rows {
        print_line(format_args!(
            "{:<20} {:>9.0} {:>9.2} {:>17.2} {:>17.2} {:>7.0} us {:>7.0} us",
            r.system,
            r.mb_per_s.median,
            r.ratio_to_proxy,
            r.near_cpu_s_per_gb.median,
            r.far_cpu_s_per_gb.median,
            r.ping_p50_us.median,
            r.ping_p99_us.median
        ));
    }
    Ok(())
}
