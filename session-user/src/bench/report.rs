//! The rows of a measurement, for programs.

use serde::{Deserialize, Serialize};

use super::rates::Rates;
use super::stats::{Lows, Summary};
use crate::stdio::print_line;

/// One system, scenario, direction and pace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// `holdfast`, or what it is compared with.
    pub system: String,
    /// What happened to the link.
    pub scenario: String,
    /// `download`, `upload`, `echo` or `udp-echo`.
    pub direction: String,
    /// How records use the links.
    pub mode: String,
    /// `1 kB/ms`, or `bulk`.
    pub pace: String,
    /// The links' round-trip time.
    pub rtt_ms: f64,
    /// The links' rate, if limited; the first link's where they differ.
    pub rate_mbit: Option<u32>,
    /// The rate of each link, where they differ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rates_mbit: Option<[u32; 2]>,
    /// Over IPv6.
    #[serde(default)]
    pub v6: bool,
    /// Cuts.
    pub runs: usize,
    /// Whether the application got to its end without an error.
    pub survived: bool,
    /// Bytes that were sent and did not arrive, or arrived wrong. Of datagrams: that arrived wrong or twice,
    /// or were lost while nothing happened.
    pub bytes_lost: u64,
    /// Errors that the application saw.
    pub app_errors: usize,
    /// Those errors in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<RowError>,
    /// Longest gap in delivered bytes at each cut.
    pub stall_ms: Summary,
    /// In which run, counted from 1, the longest was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub longest_stall_run: Option<usize>,
    /// The same in an equal time without a cut.
    pub control_ms: Summary,
    /// From the cut to its being noticed.
    pub detection_ms: Summary,
    /// From the cut to the peer's being heard on the new transport.
    pub resume_ms: Summary,
    /// Sealed bytes sent again at each cut.
    pub replayed_bytes: Summary,
    /// Delivered bytes over the whole time; where nothing happens, over that of the runs.
    pub goodput_mbit: f64,
    /// Where nothing happens: the same of each run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub goodput_run_mbit: Option<Lows>,
    /// Every run's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub goodputs: Vec<f64>,
    /// Where nothing happens: bytes that the receiving end held beyond a gap, at most. Only an agent
    /// tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reorder_bytes_max: Option<u64>,
    /// Datagrams: those that never came back, at each cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datagrams_lost: Option<Summary>,
    /// Datagrams: those that were under way at each cut, there or back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datagrams_in_flight: Option<Summary>,
    /// Datagrams: cuts at which more were lost than had been under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datagrams_beyond: Option<usize>,
    /// Bulk: bytes delivered in the second around each cut, as a part of those of the second before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
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
    /// Long: `--json` has it only with `--series`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub series: Vec<u64>,
}

/// An error that the application saw.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "ErrorFields")]
pub struct RowError {
    /// In which run, counted from 1; none where that is not known, or after the last.
    pub run: Option<usize>,
    /// In words.
    pub text: String,
}

/// Rows of earlier versions have the words alone.
#[derive(Deserialize)]
#[serde(untagged)]
enum ErrorFields {
    Words(String),
    Told { run: Option<usize>, text: String },
}

impl From<ErrorFields> for RowError {
    fn from(fields: ErrorFields) -> Self {
        match fields {
            ErrorFields::Words(text) => Self { run: None, text },
            ErrorFields::Told { run, text } => Self { run, text },
        }
    }
}

impl std::fmt::Display for RowError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.run {
            Some(run) => write!(f, "run {run}: {}", self.text),
            None => f.write_str(&self.text),
        }
    }
}

/// In which run, counted from 1, the longest of `stalls` was.
pub fn longest_run(stalls: &[f64]) -> Option<usize> {
    let longest = (stalls.iter().enumerate()).max_by(|a, b| a.1.total_cmp(b.1));
    longest.map(|(index, _)| index + 1)
}

/// What a row is of: two rows with one key say the same thing, the newer one better.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// As in the row.
    pub system: String,
    /// As in the row.
    pub scenario: String,
    /// As in the row.
    pub direction: String,
    /// As in the row.
    pub mode: String,
    /// As in the row.
    pub pace: String,
    /// The links'.
    pub links: Links,
}

/// The links of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Links {
    /// Round-trip time in microseconds.
    pub rtt_us: u64,
    /// Their rates, if limited.
    pub rates: Option<Rates>,
    /// Over IPv6.
    pub v6: bool,
}

impl Links {
    /// For people, like `40 ms, 50 Mbit/s, IPv6`, or `40 ms, 20 + 30 Mbit/s`.
    pub fn label(self) -> String {
        let mut out = format!("{} ms", self.rtt_us as f64 / 1e3);
        if let Some(rates) = self.rates {
            out.push_str(&format!(", {rates} Mbit/s"));
        }
        if self.v6 {
            out.push_str(", IPv6");
        }
        out
    }
}

/// A count above this is not a count: the sender did not say what it sent.
const LOST_UNKNOWN: u64 = u64::MAX / 2;

impl Row {
    /// What it is of.
    pub fn key(&self) -> Key {
        Key {
            system: self.system.clone(),
            scenario: self.scenario.clone(),
            direction: self.direction.clone(),
            mode: self.mode.clone(),
            pace: self.pace.clone(),
            links: self.links(),
        }
    }

    /// Over which links.
    pub fn links(&self) -> Links {
        Links {
            rtt_us: (self.rtt_ms * 1e3).round() as u64,
            rates: (self.rates_mbit.map(Rates::new)).or(self.rate_mbit.map(Rates::both)),
            v6: self.v6,
        }
    }

    /// Bytes lost, if that is known.
    pub fn known_lost(&self) -> Option<u64> {
        (self.bytes_lost <= LOST_UNKNOWN).then_some(self.bytes_lost)
    }

    /// Bytes lost, for people.
    pub fn lost(&self) -> String {
        self.known_lost()
            .map_or_else(|| "unknown".to_owned(), |lost| lost.to_string())
    }

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
        self.longest_stall_run = longest_run(&self.stalls);
        self.goodputs.extend(&other.goodputs);
        self.goodput_run_mbit = (self.goodput_run_mbit).map(|_| Lows::of(&self.goodputs));
        self.controls.extend(&other.controls);
        self.control_ms = Summary::of(&self.controls);
        self.repeated += other.repeated;
        self.lateness_ms = self.lateness_ms.max(other.lateness_ms);
    }
}

/// Prints the rows as one JSON array.
pub fn print_json<'a>(rows: impl Iterator<Item = &'a Row>, series: bool) -> anyhow::Result<()> {
    let shown: Vec<Row> = rows
        .cloned()
        .map(|mut row| {
            if !series {
                row.series.clear();
            }
            row
        })
        .collect();
    print_line(serde_json::to_string_pretty(&shown)?);
    Ok(())
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A row with something in every field.
    pub fn row(system: &str, scenario: &str, direction: &str) -> Row {
        let stalls = vec![41.5, 42.0, 40.25, 43.0, 60.5];
        Row {
            system: system.to_owned(),
            scenario: scenario.to_owned(),
            direction: direction.to_owned(),
            mode: "single".to_owned(),
            pace: "1 kB/ms".to_owned(),
            rtt_ms: 40.0,
            rate_mbit: None,
            rates_mbit: None,
            v6: false,
            runs: stalls.len(),
            survived: true,
            bytes_lost: 0,
            app_errors: 0,
            errors: Vec::new(),
            stall_ms: Summary::of(&stalls),
            longest_stall_run: longest_run(&stalls),
            control_ms: Summary::of(&[1.5]),
            detection_ms: Summary::of(&[0.25]),
            resume_ms: Summary::of(&[41.0]),
            replayed_bytes: Summary::of(&[40_000.0]),
            goodput_mbit: 8.0,
            goodput_run_mbit: None,
            goodputs: Vec::new(),
            datagrams_lost: Some(Summary::of(&stalls)),
            datagrams_in_flight: Some(Summary::of(&stalls)),
            datagrams_beyond: Some(1),
            reorder_bytes_max: None,
            goodput_around: None,
            repeated: 1,
            lateness_ms: 0.5,
            controls: Vec::new(),
            stalls,
            series: (0..=100)
                .chain(std::iter::repeat_n(100, 41))
                .chain(141..400)
                .map(|ms| ms * 1000)
                .collect(),
        }
    }

    #[test]
    fn the_documented_names_are_there() -> anyhow::Result<()> {
        let json = serde_json::to_value(row("holdfast", "cut", "upload"))?;
        for name in [
            "system",
            "scenario",
            "direction",
            "mode",
            "rtt_ms",
            "runs",
            "survived",
            "bytes_lost",
            "app_errors",
            "goodput_mbit",
        ] {
            assert!(!json[name].is_null(), "{name}");
        }
        for name in ["p50", "p95", "max"] {
            assert!(json["stall_ms"][name].is_f64(), "{name}");
        }
        Ok(())
    }

    /// A row of the scenario in which nothing happens.
    pub fn steady(system: &str, mode: &str, goodputs: &[f64]) -> Row {
        Row {
            mode: mode.to_owned(),
            pace: "bulk".to_owned(),
            rate_mbit: Some(20),
            rates_mbit: Some([20, 30]),
            goodput_mbit: goodputs.iter().sum::<f64>() / goodputs.len() as f64,
            goodput_run_mbit: Some(Lows::of(goodputs)),
            goodputs: goodputs.to_vec(),
            reorder_bytes_max: (mode == "bonded").then_some(700_000),
            ..row(system, "steady", "download")
        }
    }

    #[test]
    fn errors_of_earlier_versions_are_read() -> anyhow::Result<()> {
        let errors: Vec<RowError> =
            serde_json::from_str(r#"["timed out", {"run": 3, "text": "reset"}]"#)?;
        let shown: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["timed out", "run 3: reset"]);
        let again: Vec<RowError> = serde_json::from_str(&serde_json::to_string(&errors)?)?;
        assert_eq!(again, errors);
        Ok(())
    }

    #[test]
    fn further_runs_are_counted_on() {
        let mut row = row("tcp", "cut", "download");
        assert_eq!(row.longest_stall_run, Some(5));
        let mut more = row.clone();
        more.stalls = vec![1.0, 900.0];
        more.runs = 2;
        row.add(&more);
        assert_eq!((row.runs, row.longest_stall_run), (7, Some(7)));
    }

    #[test]
    fn a_count_that_is_not_known_is_not_shown() {
        let mut row = row("tcp", "cut", "download");
        assert_eq!(row.lost(), "0");
        row.bytes_lost = u64::MAX - 1_000_000;
        assert_eq!(row.lost(), "unknown");
    }
}
