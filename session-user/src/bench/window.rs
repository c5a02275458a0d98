//! `holdfast bench window`: whether the window that a standby begins with is still there when it is needed.
//!
//! A TCP connection begins with ten segments in flight, and the agents lift that (`transport/window.rs`). But
//! the kernel takes a window back when it sends after idleness (RFC 2861; `tcp_slow_start_after_idle`), and a
//! standby does nothing but idle. It depends on the congestion control whether it does.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::Serialize;
use session_lab::{Lab, LinkName, Shape};

use super::app::{Direction, Pace, now_ns};
use super::arrivals::Arrivals;
use super::bed::{Bed, BedConfig, own_program};
use super::programs::{Client, Server};
use super::progress::bar;
use super::scratch::Scratch;
use crate::control::TransportReport;
use crate::stdio::{print, print_line};
use crate::transport::Congestion;

/// Those that an agent chooses between by itself.
const CONTROLS: [&str; 2] = [Congestion::BULK, Congestion::IDLE];
/// Time for a link to carry the session.
const MOVE_LIMIT: Duration = Duration::from_secs(20);
/// Time for a burst to be over.
const FINISH_LIMIT: Duration = Duration::from_secs(30);
/// How long the application sends before it rests, so that its stream has the credit for a burst.
const BEFORE: Duration = Duration::from_secs(2);
/// The application's rest is so much longer than the standby's idleness: time for the session to move.
const MARGIN: Duration = Duration::from_secs(2);
/// How long the burst is. Its first round trip is what is looked at.
const BURST: Duration = Duration::from_secs(1);
/// What arrives in this part of the first round trip was sent before the first answer.
const FLIGHT: f64 = 0.9;

/// Arguments of `bench window`.
#[derive(Debug, clap::Args)]
pub struct WindowArgs {
    /// In a lab of its own: two links in network namespaces, two agents. Needs root.
    #[arg(long, required = true)]
    lab: bool,
    /// How long the standby idles, in seconds.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u16).range(1..=3600))]
    idle: u16,
    /// The links' round-trip time in milliseconds.
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u16).range(5..=1000))]
    rtt: u16,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// One congestion control.
#[derive(Debug, Serialize)]
struct Row {
    /// Its name.
    congestion: String,
    /// The links' round-trip time.
    rtt_ms: f64,
    /// How long the standby idled.
    idle_s: u16,
    /// The kernel's setting: whether it may take a window back.
    slow_start_after_idle: bool,
    /// The standby's window when it had just been made, in segments.
    established_segments: u32,
    /// The same after the idleness, before it sends anything.
    idle_segments: u32,
    /// The same when it has just begun to carry the session.
    carrying_segments: u32,
    /// Bytes of an application's burst that arrived in the first round trip.
    first_flight_bytes: u64,
}

/// Measures and prints.
pub fn run(args: &WindowArgs) -> anyhow::Result<ExitCode> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "--lab makes network namespaces: it needs root"
    );
    let mut rows = Vec::new();
    for congestion in CONTROLS {
        rows.push(measure(congestion, args).with_context(|| congestion.to_owned())?);
    }
    if args.json {
        print_line(serde_json::to_string_pretty(&rows)?);
    } else {
        print(&text(&rows));
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(congestion: &str, args: &WindowArgs) -> anyhow::Result<Row> {
    let dir = Scratch::new()?;
    let rtt = Duration::from_millis(args.rtt.into());
    let shape = Shape {
        delay: rtt / 2,
        ..Shape::default()
    };
    let extra = format!("[transport]\ncongestion = \"{congestion}\"\n");
    let config = BedConfig {
        shapes: [shape; 2],
        client_extra: extra.clone(),
        gateway_extra: extra,
        ..BedConfig::new(own_program()?)
    };
    let mut bed = Bed::new(dir.path(), config)?;
    bed.await_link(LinkName::Wifi, MOVE_LIMIT)?;
    bed.await_standby(LinkName::Lte, MOVE_LIMIT)?;
    let listen = SocketAddr::new(Lab::target(false), 0);
    let server = Server::start(listen, dir.path(), |c| bed.lab.server().spawn(c))?;
    let first = standby(&bed)?;
    let client = resting_client(&bed, server.addr, args.idle)?;
    let began = Instant::now();
    let used = first.congestion.as_deref().unwrap_or("unknown");
    ensure!(
        used == congestion,
        "the kernel does not have it: the standby uses {used}"
    );
    let idle_time = Duration::from_secs(args.idle.into());
    idle(congestion, BEFORE + idle_time);
    let idle = standby(&bed)?;
    bed.lab.cut(LinkName::Wifi)?;
    bed.await_link(LinkName::Lte, MOVE_LIMIT)?;
    let carrying = standby(&bed)?;
    let moved = now_ns();
    let burst = BEFORE + idle_time + MARGIN;
    ensure!(
        began.elapsed() < burst,
        "the session moved later than the burst began"
    );
    // Until it begins; and its length is arbitrary, but for a round trip.
    std::thread::sleep(burst.saturating_sub(began.elapsed()) + BURST);
    let seen = client.finish(FINISH_LIMIT)?;
    ensure!(
        seen.errors.is_empty(),
        "the burst failed: {}",
        seen.errors.join("; ")
    );
    let served = server.next_served(FINISH_LIMIT);
    let file = served.and_then(|served| served.arrivals);
    let arrivals = Arrivals::read(&file.context("the server did not see the burst end")?)?;
    Ok(Row {
        congestion: congestion.to_owned(),
        rtt_ms: rtt.as_secs_f64() * 1e3,
        idle_s: args.idle,
        slow_start_after_idle: slow_start_after_idle(&bed)?,
        established_segments: window(&first)?,
        idle_segments: window(&idle)?,
        carrying_segments: window(&carrying)?,
        first_flight_bytes: first_flight(&arrivals, moved, rtt)
            .context("nothing of the burst arrived")?,
    })
}

/// The client's transport on the other link, which may carry by now.
fn standby(bed: &Bed) -> anyhow::Result<TransportReport> {
    let session = bed.session().context("the agent has no session")?;
    let mut transports = session.transports.into_iter();
    let found = transports.find(|t| t.up && t.lane == 0 && t.link == LinkName::Lte.name());
    found.with_context(|| format!("no transport stands on {}", LinkName::Lte.name()))
}

fn window(transport: &TransportReport) -> anyhow::Result<u32> {
    transport
        .window_segments
        .context("the kernel does not tell the window")
}

/// An application that sends, rests while the standby idles and the session moves, and sends again.
fn resting_client(bed: &Bed, server: SocketAddr, idle: u16) -> anyhow::Result<Client> {
    let rest = Duration::from_secs(idle.into()) + MARGIN;
    Client::start(
        server,
        Direction::Upload,
        Pace::Bulk,
        Duration::ZERO,
        bed.dir().join("burst"),
        |mut command| {
            command.args(["--rest-after-ms", &BEFORE.as_millis().to_string()]);
            command.args(["--rest-ms", &rest.as_millis().to_string()]);
            bed.spawn_captured(command)
        },
    )
}

/// Waits, and shows for how long.
fn idle(congestion: &str, time: Duration) {
    let bar = bar(congestion, time.as_secs(), "s idle");
    for _ in 0..time.as_secs() {
        // Idleness is what is measured.
        std::thread::sleep(Duration::from_secs(1));
        bar.inc(1);
    }
    bar.finish_and_clear();
}

fn slow_start_after_idle(bed: &Bed) -> anyhow::Result<bool> {
    let path = "/proc/sys/net/ipv4/tcp_slow_start_after_idle";
    let text = (bed.lab.client())
        .run(move || std::fs::read_to_string(path))
        .context(path)?;
    Ok(text.trim() != "0")
}

/// What arrived after `moved` before anything could that waited for an answer.
fn first_flight(arrivals: &Arrivals, moved: u64, rtt: Duration) -> Option<u64> {
    let first = arrivals.first_after(moved)?;
    let end = first + rtt.mul_f64(FLIGHT).as_nanos() as u64;
    Some(arrivals.total_at(end) - arrivals.total_at(moved))
}

fn text(rows: &[Row]) -> String {
    let mut out = format!(
        "{:<12} {:>12} {:>12} {:>14} {:>18}\n",
        "", "established", "after idling", "when carrying", "first round trip"
    );
    for row in rows {
        out.push_str(&format!(
            "{:<12} {:>12} {:>12} {:>14} {:>16} B\n",
            row.congestion,
            row.established_segments,
            row.idle_segments,
            row.carrying_segments,
            row.first_flight_bytes
        ));
    }
    if let Some(row) = rows.first() {
        let may = if row.slow_start_after_idle {
            ""
        } else {
            "not "
        };
        out.push_str(&format!(
            "windows in segments; {} s idle, round-trip time {} ms; this kernel may {may}take a window back\n",
            row.idle_s, row.rtt_ms
        ));
    }
    out
}
