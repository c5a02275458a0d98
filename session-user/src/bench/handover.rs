//! `holdfast bench handover`: an application runs while its link is cut again and again.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use session_lab::{Lab, LinkName};

use super::app::{Direction, Pace, Seen, Served, now_ns};
use super::bed::{Bed, BedConfig, own_program};
use super::cuts::{Cut, row};
use super::programs::{Client, Server, collect};
use super::progress::progress;
use super::report::{Row, print_rows};

/// Bytes each millisecond and direction of the paced measurement.
const PACED_BYTES: usize = 1000;
/// Cuts of a bulk measurement, at most: each moves hundreds of megabytes.
const BULK_RUNS_MAX: usize = 10;
/// Cuts of the comparison without Holdfast, at most: each waits for a connection to die.
const PLAIN_RUNS_MAX: usize = 5;
/// The undisturbed time that each cut is compared with.
const CONTROL_WINDOW: Duration = Duration::from_millis(300);
/// How long arrivals are watched after the session has moved.
const AFTER_MOVE: Duration = Duration::from_millis(250);
/// A session that has not moved by then has not survived.
const MOVE_LIMIT: Duration = Duration::from_secs(20);
/// `TCP_USER_TIMEOUT` of the plain connection, so that its death is seen.
const PLAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for everything under way to arrive once the application stops sending.
const FINISH_LIMIT: Duration = Duration::from_secs(60);

/// What is cut, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Scenario {
    /// The link in use is set down.
    Cut,
}

/// What the application runs through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Against {
    /// A plain TCP connection.
    Tcp,
}

/// Arguments of `bench handover`.
#[derive(Debug, clap::Args)]
pub struct HandoverArgs {
    /// In a lab of its own: two links in network namespaces, two agents. Needs root.
    #[arg(long)]
    lab: bool,
    /// What happens to the link.
    #[arg(long, value_enum, default_value_t = Scenario::Cut)]
    scenario: Scenario,
    /// How many cuts.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    runs: u16,
    /// Over IPv6.
    #[arg(long)]
    v6: bool,
    /// Only the paced measurement, not the bulk one.
    #[arg(long)]
    paced_only: bool,
    /// The same without Holdfast.
    #[arg(long, value_enum)]
    against: Option<Against>,
    /// As JSON: one array, a row for each direction and pace.
    #[arg(long)]
    json: bool,
    /// Without --lab: the application's server, `holdfast bench app-server` on a host that the
    /// peer reaches. The running agent must capture this command (use `holdfast run`).
    #[arg(long, conflicts_with = "lab")]
    target: Option<SocketAddr>,
    /// Without --lab: the link to cut. It is set down and up again.
    #[arg(long, requires = "target")]
    link: Option<String>,
}

/// Runs the measurement and prints it.
pub fn run(args: &HandoverArgs, control: &Path) -> anyhow::Result<ExitCode> {
    let rows = match (args.lab, args.target) {
        (true, _) => in_lab(args)?,
        (false, Some(target)) => super::live::run(
            args.link.as_deref(),
            target,
            usize::from(args.runs),
            control,
        )?,
        (false, None) => {
            anyhow::bail!("give --lab, or --target and --link to measure the running agent")
        }
    };
    print_rows(&rows, args.json)?;
    let good = args.against.is_some()
        || rows
            .iter()
            .all(|r| r.survived && r.bytes_lost == 0 && r.app_errors == 0);
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn in_lab(args: &HandoverArgs) -> anyhow::Result<Vec<Row>> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "--lab makes network namespaces: it needs root"
    );
    let runs = usize::from(args.runs);
    let paced = Pace::PerMillisecond(PACED_BYTES);
    if args.against == Some(Against::Tcp) {
        return plain(args, runs.min(PLAIN_RUNS_MAX), paced);
    }
    let mut rows = measure(args, &Direction::ALL, paced, runs)?;
    if !args.paced_only {
        for direction in [Direction::Download, Direction::Upload] {
            rows.extend(measure(
                args,
                &[direction],
                Pace::Bulk,
                runs.min(BULK_RUNS_MAX),
            )?);
        }
    }
    Ok(rows)
}

fn measure(
    args: &HandoverArgs,
    directions: &[Direction],
    pace: Pace,
    runs: usize,
) -> anyhow::Result<Vec<Row>> {
    let dir = super::scratch()?;
    let mut bed = Bed::new(
        dir.path(),
        BedConfig {
            v6: args.v6,
            ..BedConfig::new(own_program()?)
        },
    )?;
    let listen = SocketAddr::new(Lab::target(args.v6), 0);
    let server = Server::start(listen, dir.path(), |c| bed.lab.server().spawn(c))?;
    let mut clients = Vec::new();
    for &direction in directions {
        let arrivals = dir.path().join(format!("client-{}", direction.name()));
        let client = Client::start(
            server.addr,
            direction,
            pace,
            Duration::ZERO,
            arrivals,
            |command| bed.spawn_captured(command),
        )?;
        clients.push(client);
    }
    let label = match (pace, directions) {
        (Pace::Bulk, [one]) => format!("bulk {}", one.name()),
        _ => "1 kB/ms each way".to_owned(),
    };
    let bar = progress(&label, runs);
    let began = now_ns();
    let mut cuts = Vec::new();
    for run in 0..runs {
        cuts.push(cut_once(&mut bed, run).with_context(|| format!("cut {} of {runs}", run + 1))?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let seconds = (now_ns() - began) as f64 / 1e9;
    let mut seen = Vec::new();
    for client in clients {
        let (direction, arrivals) = (client.direction, client.arrivals.clone());
        seen.push((direction, arrivals, client.finish(FINISH_LIMIT)?));
    }
    let served = collect(&server, seen.len(), FINISH_LIMIT);
    seen.iter()
        .map(|(direction, arrivals, seen)| {
            let served = served.get(direction.name());
            row(
                "holdfast", *direction, pace, &cuts, arrivals, seen, served, seconds,
            )
        })
        .collect()
}

/// Waits for the preferred link, takes a control, cuts, waits for the move, restores.
fn cut_once(bed: &mut Bed, run: usize) -> anyhow::Result<Cut> {
    bed.await_link(LinkName::Wifi, MOVE_LIMIT)?;
    bed.await_standby(LinkName::Lte, MOVE_LIMIT)?;
    // The cut must not keep step with the application's clock or the agent's timers.
    std::thread::sleep(Duration::from_micros(
        20_000 + (run as u64 * 7_919) % 50_000,
    ));
    let control_from = now_ns();
    std::thread::sleep(CONTROL_WINDOW);
    let control = (control_from, now_ns());
    let from = now_ns();
    bed.lab.cut(LinkName::Wifi)?;
    bed.wait(MOVE_LIMIT, |s| {
        s.transports
            .iter()
            .any(|t| t.active && t.up && t.link == LinkName::Lte.name())
    })
    .context("the session does not move")?;
    std::thread::sleep(AFTER_MOVE);
    let window = (from, now_ns());
    let handover = bed.session().and_then(|s| {
        s.handovers
            .into_iter()
            .rfind(|h| !h.soft && h.noticed_ns >= from)
    });
    bed.lab.restore(LinkName::Wifi)?;
    Ok(Cut {
        control,
        window,
        handover,
    })
}

/// The same application and the same cuts over a plain connection.
fn plain(args: &HandoverArgs, runs: usize, pace: Pace) -> anyhow::Result<Vec<Row>> {
    let dir = super::scratch()?;
    let bed = Bed::new(
        dir.path(),
        BedConfig {
            v6: args.v6,
            holdfast: false,
            ..BedConfig::new(own_program()?)
        },
    )?;
    let listen = SocketAddr::new(Lab::target(args.v6), 0);
    let server = Server::start(listen, dir.path(), |c| bed.lab.server().spawn(c))?;
    let bar = progress("plain TCP", runs);
    let mut rows: HashMap<&'static str, Row> = HashMap::new();
    for _ in 0..runs {
        for one in plain_once(&bed, &server, dir.path(), pace)? {
            let name = Direction::ALL
                .into_iter()
                .find(|d| d.name() == one.direction)
                .map_or("", Direction::name);
            rows.entry(name)
                .and_modify(|all| all.add(&one))
                .or_insert(one);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(Direction::ALL
        .into_iter()
        .filter_map(|d| rows.remove(d.name()))
        .collect())
}

fn plain_once(bed: &Bed, server: &Server, dir: &Path, pace: Pace) -> anyhow::Result<Vec<Row>> {
    let mut clients = Vec::new();
    for direction in Direction::ALL {
        let arrivals = dir.join(format!("plain-{}", direction.name()));
        clients.push(Client::start(
            server.addr,
            direction,
            pace,
            PLAIN_TIMEOUT,
            arrivals,
            |c| bed.lab.client().spawn(c),
        )?);
    }
    let control_from = now_ns() + 200_000_000;
    std::thread::sleep(Duration::from_millis(200) + CONTROL_WINDOW);
    let control = (control_from, now_ns());
    let from = now_ns();
    bed.lab.cut(LinkName::Wifi)?;
    let deadline = Instant::now() + PLAIN_TIMEOUT + Duration::from_secs(3);
    while Instant::now() < deadline && !clients.iter_mut().all(Client::ended) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let cuts = [Cut {
        control,
        window: (from, now_ns()),
        handover: None,
    }];
    let mut rows = Vec::new();
    for client in clients {
        let (direction, arrivals) = (client.direction, client.arrivals.clone());
        let seen = client.finish(PLAIN_TIMEOUT + Duration::from_secs(3))?;
        // The server's end may hang for minutes; what the client saw is enough.
        let served = Served {
            direction,
            seen: Seen {
                sent: seen.received,
                ..Seen::default()
            },
            arrivals: None,
        };
        let arrivals = if direction == Direction::Upload {
            dir.join("none")
        } else {
            arrivals
        };
        if direction == Direction::Upload {
            std::fs::write(&arrivals, [])?;
        }
        let seconds = (cuts[0].window.1 - from) as f64 / 1e9;
        rows.push(row(
            "tcp",
            direction,
            pace,
            &cuts,
            &arrivals,
            &seen,
            Some(&served),
            seconds,
        )?);
    }
    bed.lab.restore(LinkName::Wifi)?;
    Ok(rows)
}
