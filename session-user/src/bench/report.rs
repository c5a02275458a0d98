//! The rows of a measurement, for programs and for people.

use serde::Serialize;

use super::stats::{Summary, histogram};

/// One system, scenario, direction and pace.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// `holdfast`, or what it is compared with.
    pub system: String,
    /// What happened to the link.
    pub scenario: String,
    /// `download`, `upload` or `echo`.
    pub direction: String,
    /// How records use the links.
    pub mode: String,
    /// `1 kB/ms`, or `bulk`.
    pub pace: String,
    /// The links' round-trip time.
    pub rtt_ms: f64,
    /// The links' rate, if limited.
    pub rate_mbit: Option<u32>,
    /// Cuts.
    pub runs: usize,
    /// Whether the application got to its end without an error.
    pub survived: bool,
    /// Bytes that were sent and did not arrive, or arrived wrong.
    pub bytes_lost: u64,
    /// Errors that the application saw.
    pub app_errors: usize,
    /// Those errors in words.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<String>,
    /// Longest gap in delivered bytes at each cut.
    pub stall_ms: Summary,
    /// The same in an equal time without a cut.
    pub control_ms: Summary,
    /// From the cut to its being noticed.
    pub detection_ms: Summary,
    /// From the cut to the peer's being heard on the new transport.
    pub resume_ms: Summary,
    /// Sealed bytes sent again at each cut (no unit of time, in spite of the type's name).
    pub replayed_bytes: Summary,
    /// Delivered bytes over the whole time.
    pub goodput_mbit: f64,
    /// Bulk: bytes delivered in the second around each cut, as a part of those of the second before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub goodput_around: Option<Summary>,
    /// Cuts repeated because the emulator was late by more than 1 ms.
    pub repeated: usize,
    /// How late it was in the cuts that count, at worst (99th percentile of a cut's packets).
    pub lateness_ms: f64,
    /// Every stall.
    pub stalls: Vec<f64>,
    /// Every longest gap without a cut.
    #[serde(skip)]
    pub controls: Vec<f64>,
    /// Delivered bytes around the cut with the median stall, each millisecond from 100 ms before it.
    pub series: Vec<u64>,
}

impl Row {
    /// Takes in further runs of the same row.
    pub fn add(&mut self, other: &Self) {
        let (old, new) = (self.runs as f64, other.runs as f64);
        self.goodput_mbit =
            (self.goodput_mbit * old + other.goodput_mbit * new) / (old + new).max(1.0);
        self.runs += other.runs;
        self.survived &= other.survived;
        self.bytes_lost += other.bytes_lost;
        self.app_errors += other.app_errors;
        self.errors.extend(other.errors.iter().cloned());
        self.stalls.extend(&other.stalls);
        self.stall_ms = Summary::of(&self.stalls);
        self.controls.extend(&other.controls);
        self.control_ms = Summary::of(&self.controls);
        self.repeated += other.repeated;
        self.lateness_ms = self.lateness_ms.max(other.lateness_ms);
    }
}

/// Prints the rows as one JSON array, or as text with a histogram.
pub fn print_rows(rows: &[Row], json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(rows)?);
        return Ok(());
    }
    for row in rows {
        let fate = if row.survived { "survived" } else { "DIED" };
        println!(
            "{} {} {} ({}): {fate} {} cuts, {} bytes lost, {} errors, {:.1} Mbit/s",
            row.system,
            row.scenario,
            row.direction,
            row.pace,
            row.runs,
            row.bytes_lost,
            row.app_errors,
            row.goodput_mbit
        );
        for (name, s) in [
            ("stall", &row.stall_ms),
            ("without a cut", &row.control_ms),
            ("detection", &row.detection_ms),
            ("resume", &row.resume_ms),
        ] {
            println!(
                "  {name:14} p50 {:8.2} ms   p95 {:8.2} ms   max {:8.2} ms",
                s.p50, s.p95, s.max
            );
        }
        if let Some(around) = &row.goodput_around {
            println!(
                "  {:14} p50 {:7.1} %   of the second before",
                "goodput around",
                around.p50 * 100.0
            );
        }
        let r = &row.replayed_bytes;
        println!(
            "  {:14} p50 {:8.0} B    p95 {:8.0} B    max {:8.0} B",
            "replayed", r.p50, r.p95, r.max
        );
        for error in &row.errors {
            println!("  error: {error}");
        }
        print!("{}", histogram(&row.stalls));
    }
    Ok(())
}
