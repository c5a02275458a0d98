//! From cuts and arrivals to a row of the report.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use super::app::{Direction, Pace, Seen, Served};
use super::arrivals::Arrivals;
use super::datagrams::{Fate, Times};
use super::rates::Rates;
use super::report::{Row, RowError, longest_run};
use super::stats::{Lows, Summary};
use crate::control::HandoverReport;

/// Goodput is compared over this time around a soft handover, in nanoseconds.
const AROUND_NS: u64 = 1_000_000_000;

/// What is known of one cut.
pub struct Cut {
    /// The undisturbed time before it: CLOCK_MONOTONIC in nanoseconds, from and to.
    pub control: (u64, u64),
    /// The time in which its stall is looked for.
    pub window: (u64, u64),
    /// What the session did about it.
    pub handover: Option<HandoverReport>,
}

impl Cut {
    /// All the time in which it was watched.
    pub fn watched(&self) -> (u64, u64) {
        (self.control.0, self.window.1)
    }
}

/// Under which conditions the cuts were made.
pub struct Conditions {
    /// `holdfast`, or what it is compared with.
    pub system: String,
    /// What happened.
    pub scenario: String,
    /// How records use the links.
    pub mode: String,
    /// The links' round-trip time.
    pub rtt: Duration,
    /// The links' rates, if limited.
    pub rates: Option<Rates>,
    /// Over IPv6.
    pub v6: bool,
    /// Whether the old link works on, so that goodput before and around the move can be compared.
    pub soft: bool,
    /// Whether nothing happens, so that each run's goodput is what is looked at.
    pub steady: bool,
    /// What the application sent.
    pub pace: Pace,
    /// For how long.
    pub seconds: f64,
    /// When cuts were watched that do not count.
    pub uncounted: Vec<(u64, u64)>,
    /// Cuts that were repeated because the emulator was late.
    pub repeated: usize,
    /// How late it was in those that count, at worst (99th percentile of a cut's packets).
    pub lateness: Duration,
}

/// What was seen of one direction.
pub struct Ends<'a> {
    /// Which.
    pub direction: Direction,
    /// The client's arrivals; those of an upload are with `served`.
    pub arrivals: &'a Path,
    /// What the client saw.
    pub seen: &'a Seen,
    /// What the server saw.
    pub served: Option<&'a Served>,
    /// In which run, counted from 1, the client ended by itself.
    pub died_in: Option<usize>,
}

/// What one direction saw of the cuts.
pub fn row(conditions: &Conditions, cuts: &[Cut], ends: &Ends<'_>) -> anyhow::Result<Row> {
    let served = ends.served.and_then(|s| s.arrivals.as_deref());
    let file = served.unwrap_or(ends.arrivals);
    let arrivals =
        Arrivals::read(file).with_context(|| format!("{} cannot be read", file.display()))?;
    let gaps = |window: fn(&Cut) -> (u64, u64)| -> Vec<f64> {
        cuts.iter()
            .map(window)
            .map(|(from, to)| arrivals.longest_gap_ms(from, to))
            .collect()
    };
    let stalls = gaps(|c| c.window);
    let controls = gaps(|c| c.control);
    let since = |get: fn(&HandoverReport) -> Option<u64>| -> Vec<f64> {
        let one =
            |c: &Cut| Some(get(c.handover.as_ref()?)?.saturating_sub(c.window.0) as f64 / 1e6);
        cuts.iter().filter_map(one).collect()
    };
    let replayed: Vec<f64> = cuts
        .iter()
        .filter_map(|c| c.handover.as_ref())
        .map(|h| h.replayed_bytes as f64)
        .collect();
    let (mut sent, received, wrong) = balance(ends);
    let times = match ends.direction {
        Direction::UdpEcho => Some(Times::read(file).context("the datagrams' times")?),
        Direction::Download | Direction::Upload | Direction::Echo => None,
    };
    let fates: Option<Vec<Fate>> =
        (times.as_ref()).map(|times| cuts.iter().map(|cut| times.fate(cut)).collect());
    if let (Some(times), Pace::PerMillisecond(bytes)) = (&times, conditions.pace) {
        // What a cut costs is told apart.
        let watched = cuts
            .iter()
            .map(Cut::watched)
            .chain(conditions.uncounted.iter().copied());
        sent = received + times.lost_otherwise(watched) * bytes as u64;
    }
    let errors = ends
        .seen
        .errors
        .iter()
        .chain(ends.served.iter().flat_map(|s| &s.seen.errors));
    let errors: Vec<RowError> = errors
        .map(|text| RowError {
            run: ends.died_in,
            text: text.clone(),
        })
        .collect();
    let goodputs = if conditions.steady {
        goodputs(&arrivals, cuts)
    } else {
        Vec::new()
    };
    let goodput_mbit = if conditions.steady {
        goodputs.iter().sum::<f64>() / goodputs.len().max(1) as f64
    } else {
        received as f64 * 8.0 / 1e6 / conditions.seconds.max(1e-3)
    };
    let bulk = conditions.pace == Pace::Bulk;
    let rates = conditions.rates.map(Rates::fields);
    Ok(Row {
        system: conditions.system.clone(),
        scenario: conditions.scenario.clone(),
        direction: ends.direction.name().to_owned(),
        mode: conditions.mode.clone(),
        pace: conditions.pace.name(),
        rtt_ms: conditions.rtt.as_secs_f64() * 1e3,
        rate_mbit: rates.map(|(first, _)| first),
        rates_mbit: rates.and_then(|(_, each)| each),
        v6: conditions.v6,
        runs: cuts.len(),
        survived: errors.is_empty(),
        bytes_lost: sent.abs_diff(received) + wrong,
        app_errors: errors.len(),
        errors,
        stall_ms: Summary::of(&stalls),
        longest_stall_run: longest_run(&stalls),
        control_ms: Summary::of(&controls),
        detection_ms: Summary::of(&since(|h| Some(h.noticed_ns))),
        resume_ms: Summary::of(&since(|h| h.resumed_ns)),
        replayed_bytes: Summary::of(&replayed),
        goodput_mbit,
        goodput_run_mbit: conditions.steady.then(|| Lows::of(&goodputs)),
        goodputs,
        reorder_bytes_max: None,
        datagrams_lost: fates.as_ref().map(|f| of_fates(f, |f| f.lost)),
        datagrams_in_flight: fates.as_ref().map(|f| of_fates(f, |f| f.in_flight)),
        datagrams_beyond: fates
            .as_ref()
            .map(|f| f.iter().filter(|f| f.lost > f.in_flight).count()),
        goodput_around: (bulk && conditions.soft).then(|| around(&arrivals, cuts)),
        repeated: conditions.repeated,
        lateness_ms: conditions.lateness.as_secs_f64() * 1e3,
        stalls,
        controls,
        series: series(&arrivals, cuts),
    })
}

/// What was delivered in each run, in Mbit/s. All runs are as long.
fn goodputs(arrivals: &Arrivals, cuts: &[Cut]) -> Vec<f64> {
    let one = |cut: &Cut| {
        let (from, to) = cut.window;
        let bytes = arrivals.total_at(to) - arrivals.total_at(from);
        bytes as f64 * 8e3 / to.saturating_sub(from).max(1) as f64
    };
    cuts.iter().map(one).collect()
}

/// Bytes delivered in the second around each cut, as a part of those of the second before it.
fn around(arrivals: &Arrivals, cuts: &[Cut]) -> Summary {
    let between = |from: u64, to: u64| (arrivals.total_at(to) - arrivals.total_at(from)) as f64;
    let one = |cut: &Cut| {
        let at = cut.window.0;
        let before = between(
            at.saturating_sub(AROUND_NS + AROUND_NS / 2),
            at - AROUND_NS / 2,
        );
        between(at - AROUND_NS / 2, at + AROUND_NS / 2) / before.max(1.0)
    };
    Summary::of(&cuts.iter().map(one).collect::<Vec<f64>>())
}

/// Delivered bytes around the cut whose stall is the median, from 100 ms before it on, in steps of
/// 1 ms.
fn series(arrivals: &Arrivals, cuts: &[Cut]) -> Vec<u64> {
    let stall = |c: &Cut| arrivals.longest_gap_ms(c.window.0, c.window.1);
    let mut order: Vec<&Cut> = cuts.iter().collect();
    order.sort_by(|a, b| stall(a).total_cmp(&stall(b)));
    let Some(cut) = order.get(order.len() / 2) else {
        return Vec::new();
    };
    let from = cut.window.0.saturating_sub(100_000_000);
    arrivals.series(from, cut.window.1.min(from + 1_000_000_000), 1_000_000)
}

fn of_fates(fates: &[Fate], get: fn(&Fate) -> u64) -> Summary {
    let counts: Vec<f64> = fates.iter().map(|fate| get(fate) as f64).collect();
    Summary::of(&counts)
}

/// Sent, received and wrong bytes of a direction.
fn balance(ends: &Ends<'_>) -> (u64, u64, u64) {
    let seen = ends.seen;
    match (ends.direction, ends.served) {
        (Direction::Download, Some(served)) => (served.seen.sent, seen.received, seen.wrong),
        // The server did not say what it sent.
        // An end in order says that all of it has come.
        (Direction::Download, None) if seen.errors.is_empty() => {
            (seen.received, seen.received, seen.wrong)
        }
        (Direction::Download, None) => (u64::MAX, seen.received, seen.wrong),
        (Direction::Upload, served) => {
            (seen.sent, seen.received, served.map_or(0, |s| s.seen.wrong))
        }
        (Direction::Echo | Direction::UdpEcho, _) => (seen.sent, seen.received, seen.wrong),
    }
}
