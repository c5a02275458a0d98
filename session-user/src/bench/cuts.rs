//! From cuts and arrivals to a row of the report.

use std::path::Path;

use anyhow::Context;

use super::app::{Direction, Pace, Seen, Served, read_arrivals};
use super::report::Row;
use super::stats::{Summary, longest_gap_ms};
use crate::control::HandoverReport;

/// What is known of one cut.
pub struct Cut {
    /// The undisturbed time before it: CLOCK_MONOTONIC in nanoseconds, from and to.
    pub control: (u64, u64),
    /// The time in which its stall is looked for.
    pub window: (u64, u64),
    /// What the session did about it.
    pub handover: Option<HandoverReport>,
}

/// What one direction saw of the cuts.
#[allow(clippy::too_many_arguments)] // Each is a different thing that was measured.
pub fn row(
    system: &str,
    direction: Direction,
    pace: Pace,
    cuts: &[Cut],
    arrivals: &Path,
    seen: &Seen,
    served: Option<&Served>,
    seconds: f64,
) -> anyhow::Result<Row> {
    let file = served
        .and_then(|s| s.arrivals.as_deref())
        .unwrap_or(arrivals);
    let times =
        read_arrivals(file).with_context(|| format!("{} cannot be read", file.display()))?;
    let gaps = |window: fn(&Cut) -> (u64, u64)| -> Vec<f64> {
        cuts.iter()
            .map(window)
            .map(|(from, to)| longest_gap_ms(&times, from, to))
            .collect()
    };
    let stalls = gaps(|c| c.window);
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
    let (sent, received, wrong) = balance(direction, seen, served);
    let errors = seen
        .errors
        .iter()
        .chain(served.iter().flat_map(|s| &s.seen.errors));
    let errors: Vec<String> = errors.cloned().collect();
    Ok(Row {
        system: system.to_owned(),
        scenario: "cut".to_owned(),
        direction: direction.name().to_owned(),
        mode: "single".to_owned(),
        pace: if pace == Pace::Bulk {
            "bulk"
        } else {
            "1 kB/ms"
        }
        .to_owned(),
        runs: cuts.len(),
        survived: errors.is_empty(),
        bytes_lost: sent.abs_diff(received) + wrong,
        app_errors: errors.len(),
        errors,
        stall_ms: Summary::of(&stalls),
        control_ms: Summary::of(&gaps(|c| c.control)),
        detection_ms: Summary::of(&since(|h| Some(h.noticed_ns))),
        resume_ms: Summary::of(&since(|h| h.resumed_ns)),
        replayed_bytes: Summary::of(&replayed),
        goodput_mbit: received as f64 * 8.0 / 1e6 / seconds.max(1e-3),
        stalls,
    })
}

/// Sent, received and wrong bytes of a direction.
fn balance(direction: Direction, seen: &Seen, served: Option<&Served>) -> (u64, u64, u64) {
    match (direction, served) {
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
        (Direction::Echo, _) => (seen.sent, seen.received, seen.wrong),
    }
}
