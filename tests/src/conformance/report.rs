//! What the suite prints.

use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::{Family, Seen};

/// One case in one family.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The case's name.
    pub case: String,
    /// How it reached the target.
    pub family: Family,
    /// What it saw natively.
    pub native: Seen,
    /// What it saw through Holdfast.
    pub holdfast: Seen,
    /// Whether that is the same.
    pub same: bool,
    /// Whether a difference is a limit that docs/limits.md gives the reason for.
    pub listed: bool,
    /// Whether it was captured at all.
    #[serde(flatten)]
    pub guard: Guard,
    /// Whether it did not even end in order natively: then it proves nothing.
    #[serde(skip)]
    pub broken: bool,
    /// How long both took.
    #[serde(skip)]
    pub took: Duration,
}

/// Counts of captured connects: without them, "the same" could be the work of nobody.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Guard {
    /// TCP connects that the case made to captured destinations; none if it hung.
    #[serde(rename = "connects")]
    pub expected: Option<u64>,
    /// How many the agent's programs captured meanwhile.
    pub captured: u64,
    /// Whether nothing of UDP was captured, though it should have been.
    #[serde(skip)]
    pub no_datagrams: bool,
}

impl Guard {
    /// Whether all that should be captured was, and nothing else.
    pub fn holds(self) -> bool {
        !self.no_datagrams && self.expected.is_none_or(|n| n == self.captured)
    }
}

impl Row {
    /// What must not be, in words.
    pub fn fault(&self) -> Option<String> {
        let name = format!("{} {}", self.case, self.family.name());
        if self.broken {
            return Some(format!("{name}: natively `{:?}`", self.native.lines()));
        }
        if self.guard.no_datagrams {
            return Some(format!(
                "{name}: no datagram was captured: it says nothing about Holdfast"
            ));
        }
        if !self.guard.holds() {
            return Some(format!(
                "{name}: of {} connects {} were captured: it says nothing about Holdfast",
                self.guard.expected.unwrap_or(0),
                self.guard.captured
            ));
        }
        // A limit explains a difference in what was seen, not a case that did not come to its end.
        let explained = self.listed && self.guard.expected.is_some();
        if !self.same && !explained {
            return Some(format!("{name}: {}", self.difference()));
        }
        None
    }

    /// In a word.
    pub fn verdict(&self) -> &'static str {
        if self.broken {
            return "BROKEN";
        }
        match (self.guard.holds(), self.same, self.listed) {
            (false, ..) => "NOT CAPTURED",
            (true, true, _) => "same",
            (true, false, true) => "limit",
            (true, false, false) => "DIFFERS",
        }
    }

    /// The first line that differs.
    pub fn difference(&self) -> String {
        let (native, holdfast) = (self.native.lines(), self.holdfast.lines());
        let first = (0..native.len().max(holdfast.len()))
            .find(|&i| native.get(i) != holdfast.get(i))
            .unwrap_or(0);
        let line = |lines: &[String]| lines.get(first).map_or("nothing", |l| l).to_owned();
        format!("native `{}`, Holdfast `{}`", line(native), line(holdfast))
    }
}

/// One line.
pub fn print_row(row: &Row) -> String {
    let mut line = format!("{:40} {:7} {}", row.case, row.family.name(), row.verdict());
    if !row.same {
        line.push_str(&format!("  {}", row.difference()));
    }
    line
}

/// A table with a summary.
pub fn print_table(rows: &[Row]) -> Result<String> {
    use std::fmt::Write;
    let mut out = String::new();
    for row in rows {
        writeln!(out, "{}", print_row(row))?;
    }
    writeln!(out, "{}", summary(rows))?;
    Ok(out)
}

/// How many of what.
pub fn summary(rows: &[Row]) -> String {
    let mut names: Vec<&str> = rows.iter().map(|r| r.case.as_str()).collect();
    names.dedup();
    let count = |what: fn(&Row) -> bool| rows.iter().filter(|r| what(r)).count();
    format!(
        "{} cases in {} runs: {} same, {} listed as limits, {} differ, {} prove nothing; {} captured connects",
        names.len(),
        rows.len(),
        count(|r| r.verdict() == "same"),
        count(|r| r.verdict() == "limit"),
        count(|r| r.verdict() == "DIFFERS"),
        count(|r| matches!(r.verdict(), "NOT CAPTURED" | "BROKEN")),
        rows.iter().map(|r| r.guard.captured).sum::<u64>()
    )
}

/// One array.
pub fn print_json(rows: &[Row]) -> Result<String> {
    let mut text = serde_json::to_string_pretty(rows)?;
    text.push('\n');
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(native: &str, holdfast: &str, listed: bool, captured: u64) -> Row {
        let seen = |text: &str| {
            let mut seen = Seen::default();
            seen.note("recv", text);
            seen
        };
        let (native, holdfast) = (seen(native), seen(holdfast));
        Row {
            case: "a".to_owned(),
            family: Family::V4,
            same: native == holdfast,
            native,
            holdfast,
            listed,
            guard: Guard {
                expected: Some(1),
                captured,
                no_datagrams: false,
            },
            broken: false,
            took: Duration::ZERO,
        }
    }

    #[test]
    fn a_difference_is_a_fault_unless_it_is_listed() {
        assert_eq!(row("1", "1", false, 1).fault(), None);
        assert_eq!(row("1", "2", true, 1).fault(), None);
        let fault = row("1", "2", false, 1).fault().unwrap();
        assert_eq!(fault, "a v4: native `recv: 1`, Holdfast `recv: 2`");
    }

    #[test]
    fn what_fails_natively_is_a_fault_even_if_it_is_the_same() {
        let mut row = row("1", "1", false, 1);
        row.broken = true;
        assert!(row.fault().is_some());
        assert_eq!(row.verdict(), "BROKEN");
    }

    #[test]
    fn what_was_not_captured_is_a_fault_even_if_it_is_the_same() {
        assert!(
            row("1", "1", false, 0)
                .fault()
                .unwrap()
                .contains("captured")
        );
        assert!(row("1", "1", false, 2).fault().is_some());
    }
}
