//! The measurement against the configured peer, over the host's own links.
//!
//! The application's client is this process's child, so it is captured if this process is: start
//! it with `holdfast run -- holdfast bench handover --target ...`.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::app::{Direction, Pace, now_ns, read_arrivals};
use super::handover::progress;
use super::programs::Client;
use super::report::Row;
use super::stats::{Summary, longest_gap_ms};
use crate::control::{Client as Control, Request, Response, SessionReport};

/// Bytes each millisecond.
const PACED_BYTES: usize = 1000;
/// Time for the session to move, or to come back.
const MOVE_LIMIT: Duration = Duration::from_secs(60);
/// Undisturbed time before and after each cut.
const CALM: Duration = Duration::from_millis(500);

/// Sets the link up again whatever happens.
struct Restore<'a>(&'a str);

impl Drop for Restore<'_> {
    fn drop(&mut self) {
        if let Err(error) = set(self.0, "up") {
            eprintln!("holdfast: {} could not be set up again: {error:#}", self.0);
        }
    }
}

fn set(link: &str, state: &str) -> anyhow::Result<()> {
    let status = Command::new("ip")
        .args(["link", "set", link, state])
        .status()
        .context("`ip` cannot be started")?;
    ensure!(
        status.success(),
        "`ip link set {link} {state}` failed: {status}"
    );
    Ok(())
}

fn session(control: &Path) -> anyhow::Result<SessionReport> {
    match Control::connect(control)?.call(&Request::Sessions)? {
        Response::Sessions(sessions) => sessions
            .into_iter()
            .find(|s| s.role == "initiator")
            .context("the agent has no session with a peer"),
        _ => bail!("the agent's answer is not a list of sessions"),
    }
}

fn wait(control: &Path, good: impl Fn(&SessionReport) -> bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + MOVE_LIMIT;
    while !session(control).is_ok_and(|s| good(&s)) {
        ensure!(
            Instant::now() < deadline,
            "the session does not move within {MOVE_LIMIT:?}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn carried_by(session: &SessionReport) -> Option<&str> {
    session
        .transports
        .iter()
        .find(|t| t.active && t.up)
        .map(|t| t.link.as_str())
}

/// Cuts `link` (the one in use if none is named) `runs` times while an echo runs to `target`.
pub fn run(
    link: Option<&str>,
    target: SocketAddr,
    runs: usize,
    control: &Path,
) -> anyhow::Result<Vec<Row>> {
    let first = session(control)?;
    let used = carried_by(&first)
        .context("no link carries the session")?
        .to_owned();
    let link = link.unwrap_or(&used).to_owned();
    ensure!(
        link == used,
        "{link} is not in use ({used} is): `holdfast handover {link}` moves the session to it"
    );
    let dir = super::scratch()?;
    let arrivals = dir.path().join("echo");
    let pace = Pace::PerMillisecond(PACED_BYTES);
    let streams = first.streams_total;
    let client = Client::start(
        target,
        Direction::Echo,
        pace,
        Duration::ZERO,
        arrivals.clone(),
        |mut c| c.spawn(),
    )?;
    wait(control, |s| s.streams_total > streams)
        .context("the application is not captured: start this command with `holdfast run --`")?;
    let bar = progress(&link, runs);
    let began = now_ns();
    let mut cuts = Vec::new();
    for _ in 0..runs {
        wait(control, |s| carried_by(s) == Some(&link))?;
        let calm = now_ns();
        std::thread::sleep(CALM);
        let from = now_ns();
        let restore = Restore(&link);
        set(&link, "down")?;
        wait(control, |s| carried_by(s).is_some_and(|l| l != link))?;
        std::thread::sleep(CALM);
        cuts.push(((calm, from), (from, now_ns())));
        drop(restore);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let seconds = (now_ns() - began) as f64 / 1e9;
    let seen = client.finish(MOVE_LIMIT)?;
    let times = read_arrivals(&arrivals)?;
    let stalls: Vec<f64> = cuts
        .iter()
        .map(|(_, w)| longest_gap_ms(&times, w.0, w.1))
        .collect();
    let calm: Vec<f64> = cuts
        .iter()
        .map(|(c, _)| longest_gap_ms(&times, c.0, c.1))
        .collect();
    Ok(vec![Row {
        system: "holdfast".to_owned(),
        scenario: "cut".to_owned(),
        direction: Direction::Echo.name().to_owned(),
        mode: "single".to_owned(),
        pace: "1 kB/ms".to_owned(),
        runs: cuts.len(),
        survived: seen.errors.is_empty(),
        bytes_lost: seen.sent.abs_diff(seen.received) + seen.wrong,
        app_errors: seen.errors.len(),
        errors: seen.errors,
        stall_ms: Summary::of(&stalls),
        control_ms: Summary::of(&calm),
        detection_ms: Summary::default(),
        resume_ms: Summary::default(),
        replayed_bytes: Summary::default(),
        goodput_mbit: seen.received as f64 * 8.0 / 1e6 / seconds.max(1e-3),
        stalls,
    }])
}
