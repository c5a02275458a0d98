//! The measurement against the configured peer, over the host's own links.
//!
//! The application's client is this process's child, so it is captured if this process is: start
//! it with `holdfast run -- holdfast bench handover --target ...`. An upload's arrivals are at the
//! server, where this process cannot look: the echo goes both ways instead.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::app::{Direction, Pace, now_ns};
use super::cuts::{Conditions, Cut, Ends, row};
use super::programs::Client;
use super::progress::progress;
use super::report::Row;
use super::scratch::Scratch;
use crate::control::{Client as Control, Request, Response, SessionReport, TransportReport};
use crate::stdio::say;

/// Bytes each millisecond.
const PACED_BYTES: usize = 1000;
/// Time for the session to move, or to come back.
const MOVE_LIMIT: Duration = Duration::from_secs(60);
/// Time for the application's connections to be captured.
const CAPTURE_LIMIT: Duration = Duration::from_secs(5);
/// Undisturbed time before and after each cut.
const CALM: Duration = Duration::from_millis(500);

/// Sets the link up again whatever happens.
struct Restore<'a>(&'a str);

impl Drop for Restore<'_> {
    fn drop(&mut self) {
        if let Err(error) = set(self.0, "up") {
            say(format_args!(
                "holdfast: {} could not be set up again: {error:#}",
                self.0
            ));
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

fn wait(
    control: &Path,
    limit: Duration,
    good: impl Fn(&SessionReport) -> bool,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    while !session(control).is_ok_and(|s| good(&s)) {
        ensure!(
            Instant::now() < deadline,
            "the session does not change as expected within {limit:?}"
        );
        // The control socket answers questions and tells nothing by itself.
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn carrier(session: &SessionReport) -> Option<&TransportReport> {
    session.transports.iter().find(|t| t.active && t.up)
}

fn carried_by(session: &SessionReport) -> Option<&str> {
    carrier(session).map(|t| t.link.as_str())
}

/// Of the link in use, in whole milliseconds: the kernel's figure is never twice the same.
fn round_trip(session: &SessionReport) -> Duration {
    let ms = carrier(session).and_then(|t| t.rtt_ms).unwrap_or(0.0);
    Duration::from_millis(ms.round() as u64)
}

/// Cuts `link` (the one in use if none is named) `runs` times while a download and an echo run
/// from and to `target`.
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
    let dir = Scratch::new()?;
    let pace = Pace::PerMillisecond(PACED_BYTES);
    let mut clients = Vec::new();
    for direction in [Direction::Download, Direction::Echo] {
        let arrivals = dir.path().join(direction.name());
        clients.push(Client::start(
            target,
            direction,
            pace,
            Duration::ZERO,
            arrivals,
            |mut c| c.spawn(),
        )?);
    }
    let all = first.streams_total + clients.len() as u64;
    wait(control, CAPTURE_LIMIT, |s| s.streams_total >= all)
        .context("the application is not captured: start this command with `holdfast run --`")?;
    let bar = progress(&link, runs);
    let began = now_ns();
    let mut cuts = Vec::new();
    for _ in 0..runs {
        cuts.push(cut_once(&link, control)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let seconds = (now_ns() - began) as f64 / 1e9;
    let conditions = Conditions {
        system: "holdfast".to_owned(),
        scenario: "cut".to_owned(),
        mode: "single".to_owned(),
        rtt: round_trip(&first),
        rates: None,
        v6: target.is_ipv6(),
        soft: false,
        steady: false,
        pace,
        seconds,
        uncounted: Vec::new(),
        repeated: 0,
        lateness: Duration::ZERO,
    };
    let finished = clients.into_iter().map(|client| {
        let (direction, arrivals) = (client.direction, client.arrivals.clone());
        let seen = client.finish(MOVE_LIMIT)?;
        let ends = Ends {
            direction,
            arrivals: &arrivals,
            seen: &seen,
            served: None,
            died_in: None,
        };
        row(&conditions, &cuts, &ends)
    });
    finished.collect()
}

fn cut_once(link: &str, control: &Path) -> anyhow::Result<Cut> {
    wait(control, MOVE_LIMIT, |s| carried_by(s) == Some(link))?;
    let calm = now_ns();
    // The undisturbed time that the cut is compared with.
    std::thread::sleep(CALM);
    let from = now_ns();
    let restore = Restore(link);
    set(link, "down")?;
    wait(control, MOVE_LIMIT, |s| {
        carried_by(s).is_some_and(|l| l != link)
    })?;
    // What was under way arrives; arrivals are watched meanwhile.
    std::thread::sleep(CALM);
    let window = (from, now_ns());
    let handovers = session(control)?.handovers;
    drop(restore);
    Ok(Cut {
        control: (calm, from),
        window,
        handover: handovers
            .into_iter()
            .rfind(|h| !h.soft && h.noticed_ns >= from),
    })
}
