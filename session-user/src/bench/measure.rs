//! One scenario in the lab: an application runs, and something happens to its link again and again.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, ensure};
use session_lab::{Lab, Shape};

use super::app::{Direction, Pace, now_ns};
use super::bed::{Bed, BedConfig, own_program};
use super::cuts::{Conditions, Cut, Ends, row};
use super::programs::{Client, Server, collect};
use super::progress::progress;
use super::rates::Rates;
use super::report::{Key, Links, Row};
use super::scenario::Scenario;
use super::scratch::Scratch;

/// The undisturbed time that each cut is compared with.
pub const CONTROL_WINDOW: Duration = Duration::from_millis(300);
/// How long arrivals are watched after the session has moved, beside four round trips.
pub const AFTER_MOVE: Duration = Duration::from_millis(250);
/// Goodput is compared over this time before and around a soft handover.
const GOODPUT_WINDOW: Duration = Duration::from_secs(1);
/// Time for everything under way to arrive once the application stops sending.
const FINISH_LIMIT: Duration = Duration::from_secs(60);
/// A cut while the emulator was later than this is repeated.
pub const LATENESS_MAX: Duration = Duration::from_millis(1);
/// A standby is idle for this long before some of the cuts: TCP's window restarts after idleness.
const IDLE: Duration = Duration::from_secs(60);
/// Every so many cuts.
const IDLE_EVERY: usize = 25;

/// Holdfast's own name in rows.
pub const HOLDFAST: &str = "holdfast";

/// What is measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What happens.
    pub scenario: Scenario,
    /// How often.
    pub runs: usize,
    /// Over IPv6.
    pub v6: bool,
    /// The links' round-trip time.
    pub rtt: Duration,
    /// The links' rates, if limited.
    pub rates: Option<Rates>,
    /// What the application does, all at once.
    pub directions: Vec<Direction>,
    /// How much of it.
    pub pace: Pace,
    /// How the streams use the links.
    pub mode: Mode,
}

/// How the measured streams use the links.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// One at a time.
    #[default]
    Single,
    /// Two at once.
    Redundant,
    /// Spread over both.
    Bonded,
}

impl Mode {
    /// Its name, as on the command line and in a configuration.
    pub fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self)
            .map_or_else(String::new, |v| v.get_name().to_owned())
    }

    /// What the client's agent is configured with.
    fn bed(self, config: &mut BedConfig) {
        if self != Self::Single {
            let rule = format!("[[stream]]\nlinks = \"{}\"\n", self.name());
            config.client_extra.push_str(&rule);
        }
    }
}

impl Plan {
    /// What each of the plan's links does to packets.
    pub fn shapes(&self) -> [Shape; 2] {
        let rates = self.rates.map_or([None; 2], |r| r.each().map(Some));
        rates.map(|rate| Shape {
            delay: self.rtt / 2,
            rate_mbit: rate.map(f64::from),
            ..Shape::default()
        })
    }

    /// What its row of a system and direction is of.
    pub fn key(&self, system: &str, direction: Direction) -> Key {
        Key {
            system: system.to_owned(),
            scenario: self.scenario.name(),
            direction: direction.name().to_owned(),
            mode: self.mode.name(),
            pace: self.pace.name(),
            links: Links {
                rtt_us: self.rtt.as_micros() as u64,
                rates: self.rates,
                v6: self.v6,
            },
        }
    }

    /// In words, for people.
    pub fn label(&self) -> String {
        format!(
            "{} {} {}",
            self.scenario.name(),
            self.mode.name(),
            self.pace.name()
        )
    }
}

/// Measures Holdfast; a row for each direction.
pub fn measure(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let dir = Scratch::new()?;
    let mut config = BedConfig {
        v6: plan.v6,
        shapes: plan.shapes(),
        ..BedConfig::new(own_program()?)
    };
    plan.scenario.bed(&mut config);
    plan.mode.bed(&mut config);
    let mut bed = Bed::new(dir.path(), config)?;
    plan.scenario.prepare(&bed)?;
    plan.scenario.ready(&mut bed)?;
    if plan.scenario == Scenario::Return {
        plan.scenario.strike(&mut bed, 0)?;
    }
    let listen = SocketAddr::new(Lab::target(plan.v6), 0);
    let server = Server::start(listen, dir.path(), |c| bed.lab.server().spawn(c))?;
    let mut clients = Vec::new();
    for &direction in &plan.directions {
        let arrivals = dir.path().join(format!("client-{}", direction.name()));
        clients.push(Client::start(
            server.addr,
            direction,
            plan.pace,
            Duration::ZERO,
            arrivals,
            |command| bed.spawn_captured(command),
        )?);
    }
    // Not before the transfer has found out what the links carry.
    std::thread::sleep(plan.scenario.begins(plan.pace));
    let bar = progress(&plan.label(), plan.runs);
    let began = now_ns();
    let mut died_in = vec![None; clients.len()];
    let mut cuts = Vec::new();
    let mut repeated = 0;
    let mut uncounted = Vec::new();
    let mut watched: Option<(u64, u64)> = None;
    let mut lateness = Duration::ZERO;
    while cuts.len() < plan.runs {
        let run = cuts.len() + repeated;
        let (cut, late) = cut_once(&mut bed, plan, run).with_context(|| {
            format!(
                "{} {} of {}\n{}",
                plan.label(),
                cuts.len() + 1,
                plan.runs,
                bed.last_words()
            )
        })?;
        if plan.scenario.cuts_between()
            && let Some(last) = watched.replace(cut.watched())
        {
            uncounted.push((last.1, cut.control.0));
        }
        // A machine that is always late is measured all the same, and the figure says so.
        if late > LATENESS_MAX && repeated < plan.runs {
            repeated += 1;
            uncounted.push(cut.watched());
            continue;
        }
        lateness = lateness.max(late);
        cuts.push(cut);
        for (client, died_in) in clients.iter_mut().zip(&mut died_in) {
            if died_in.is_none() && client.ended() {
                *died_in = Some(cuts.len());
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let seconds = (now_ns() - began) as f64 / 1e9;
    let conditions = Conditions {
        system: HOLDFAST.to_owned(),
        scenario: plan.scenario.name(),
        mode: plan.mode.name(),
        rtt: plan.rtt,
        rates: plan.rates,
        v6: plan.v6,
        soft: plan.scenario.is_soft(),
        steady: plan.scenario.is_steady(),
        pace: plan.pace,
        seconds,
        uncounted,
        repeated,
        lateness,
    };
    let mut seen = Vec::new();
    for (client, died_in) in clients.into_iter().zip(died_in) {
        let (direction, arrivals) = (client.direction, client.arrivals.clone());
        seen.push((direction, arrivals, client.finish(FINISH_LIMIT)?, died_in));
    }
    // Of datagrams the server knows no end.
    let streams = plan.directions.iter().filter(|d| **d != Direction::UdpEcho);
    let served = collect(&server, streams.count(), FINISH_LIMIT);
    seen.iter()
        .map(|(direction, arrivals, seen, died_in)| {
            let ends = Ends {
                direction: *direction,
                arrivals,
                seen,
                served: served.get(direction.name()),
                died_in: *died_in,
            };
            let mut row = row(&conditions, &cuts, &ends)?;
            if plan.scenario.is_steady() {
                row.reorder_bytes_max = reorder_bytes(&bed, *direction);
            }
            Ok(row)
        })
        .collect()
}

/// What the end that receives had to hold beyond gaps, at most.
fn reorder_bytes(bed: &Bed, direction: Direction) -> Option<u64> {
    let session = match direction {
        Direction::Upload => bed.gateway_session()?,
        Direction::Download | Direction::Echo | Direction::UdpEcho => bed.session()?,
    };
    Some(session.reorder_bytes_max as u64)
}

/// Waits until all is ready, takes a control, strikes, waits for what must follow, heals. Returns how
/// late the emulator was, too.
fn cut_once(bed: &mut Bed, plan: &Plan, run: usize) -> anyhow::Result<(Cut, Duration)> {
    let scenario = plan.scenario;
    scenario.ready(bed)?;
    if scenario == Scenario::Cut && run % IDLE_EVERY == IDLE_EVERY - 1 {
        // Idleness is the condition: the kernel may shrink an idle window.
        std::thread::sleep(IDLE);
    }
    let soft_bulk = scenario.is_soft() && plan.pace == Pace::Bulk;
    let calm = if soft_bulk {
        GOODPUT_WINDOW
    } else {
        CONTROL_WINDOW
    };
    // The cut must not keep step with the application's clock or the agent's timers.
    let offset = Duration::from_micros(20_000 + (run as u64 * 7_919) % 50_000);
    std::thread::sleep(offset + plan.rtt * 4);
    bed.lab.lateness_p99();
    let control_from = now_ns();
    std::thread::sleep(calm);
    let control = (control_from, now_ns());
    let from = scenario.strike(bed, run)?;
    scenario.settle(bed)?;
    let after = if soft_bulk {
        GOODPUT_WINDOW
    } else {
        AFTER_MOVE
    };
    if !scenario.is_steady() {
        std::thread::sleep(after + plan.rtt * 4);
    }
    let window = (from, now_ns());
    let late = bed.lab.lateness_p99();
    let session = bed.session().context("the agent has no session any more")?;
    let handover = session
        .handovers
        .into_iter()
        .rfind(|h| h.soft == scenario.is_soft() && h.noticed_ns >= from);
    ensure!(window.1 > from, "the clock stands still");
    scenario.heal(bed)?;
    let cut = Cut {
        control,
        window,
        handover,
    };
    Ok((cut, late))
}
