//! The two plots of a group's direction.

use super::super::report::Row;
use super::super::stats::{Summary, ecdf};
use super::axis::{Axis, number};
use super::groups::{Group, System, colour};
use super::plot::{Line, Plot, simplify};

/// A series begins so long before the link is struck, in milliseconds.
const BEFORE_MS: f64 = 100.0;
/// A series is shown for so long at least: what follows a short stall is seen, too.
const AFTER_MS: f64 = 250.0;
/// A distribution as wide as this is easier to read by orders of magnitude.
const LOG_FROM: f64 = 8.0;
/// Parts of a plot's height that the eye does not see.
const UNSEEN: f64 = 0.002;
/// Stalls below this stand at the edge of a logarithmic axis.
const STALL_MIN_MS: f64 = 0.5;

/// A plot, or why there is none, and what it leaves out.
pub struct Figure {
    /// What it shows.
    pub title: String,
    /// Under it.
    pub note: String,
    /// As SVG; none if nothing was recorded.
    pub svg: Option<String>,
}

/// The rows of one direction with their systems' numbers; Holdfast last, so that it is on top.
fn of_direction<'a>(
    group: &Group<'a>,
    direction: &str,
    systems: &[System],
) -> Vec<(usize, &'a Row)> {
    let number = |row: &Row| systems.iter().position(|s| s.has(row)).unwrap_or(0);
    let rows = group.rows.iter().filter(|r| r.direction == direction);
    rows.rev().map(|row| (number(row), *row)).collect()
}

fn line(systems: &[System], number: usize, points: Vec<(f64, f64)>) -> Line {
    Line {
        colour: colour(number),
        strong: systems.get(number).is_some_and(System::is_own),
        points,
    }
}

/// Delivered bytes around the cut with the median stall.
pub fn series(group: &Group<'_>, direction: &str, systems: &[System]) -> anyhow::Result<Figure> {
    let mut rows = of_direction(group, direction, systems);
    rows.retain(|(_, row)| row.series.iter().any(|bytes| *bytes > 0));
    let steps = shown_steps(&rows);
    let bytes = rows
        .iter()
        .flat_map(|(_, row)| row.series.iter().take(steps).copied());
    let most = bytes.max().unwrap_or(0) as f64;
    let (unit, label): (f64, fn(f64) -> String) = if most >= 1e9 {
        (1e9, |v| format!("{} GB", number(v)))
    } else if most >= 1e6 {
        (1e6, |v| format!("{} MB", number(v)))
    } else {
        (1e3, |v| format!("{} kB", number(v)))
    };
    let lines = rows.iter().map(|(number, row)| {
        let points = row.series.iter().take(steps).enumerate();
        let points: Vec<(f64, f64)> = points
            .map(|(ms, bytes)| (ms as f64 - BEFORE_MS, *bytes as f64 / unit))
            .collect();
        line(systems, *number, simplify(&points, most / unit * UNSEEN))
    });
    let plot = Plot {
        x: Axis::linear(-BEFORE_MS, steps as f64 - 1.0 - BEFORE_MS),
        y: Axis::linear(0.0, most / unit).labelled(label),
        x_title: "ms since the link was struck".to_owned(),
        marks: vec![0.0],
        lines: lines.collect(),
        title: format!("{} {direction}: bytes delivered over time", group.scenario),
    };
    Ok(Figure {
        title: "Bytes delivered, around the run with the median stall".to_owned(),
        note: String::new(),
        svg: (!rows.is_empty()).then(|| plot.svg()).transpose()?,
    })
}

/// How many steps of the series are shown: half of the systems are seen to go on, and one that stalls
/// for seconds does not make the others too small to tell apart.
fn shown_steps(rows: &[(usize, &Row)]) -> usize {
    let stalls: Vec<f64> = rows.iter().map(|(_, row)| row.stall_ms.p50).collect();
    let after = (2.0 * Summary::of(&stalls).p50).max(AFTER_MS);
    let longest = rows.iter().map(|(_, row)| row.series.len()).max();
    longest.unwrap_or(0).min((BEFORE_MS + after) as usize + 1)
}

/// The distribution of the stall. Where connections died it goes up to how long they were watched.
pub fn stalls(
    group: &Group<'_>,
    direction: &str,
    systems: &[System],
    goal: Option<f64>,
) -> anyhow::Result<Figure> {
    let mut rows = of_direction(group, direction, systems);
    rows.retain(|(_, row)| !row.stalls.is_empty());
    let died: Vec<String> = systems
        .iter()
        .filter(|s| rows.iter().any(|(_, row)| s.has(row) && !row.survived))
        .map(System::label)
        .collect();
    let all = rows.iter().flat_map(|(_, row)| row.stalls.iter().copied());
    let (low, high) = all.chain(goal).fold((f64::MAX, 0.0f64), |(low, high), v| {
        (low.min(v), high.max(v))
    });
    let x = stall_axis(low, high);
    let right = x.end();
    let lines = rows
        .iter()
        .map(|(number, row)| line(systems, *number, steps(&ecdf(&row.stalls), right)));
    let plot = Plot {
        x,
        y: Axis::linear(0.0, 1.0).labelled(|v| format!("{} %", number(v * 100.0))),
        x_title: "longest gap in delivered bytes, ms".to_owned(),
        marks: goal.into_iter().collect(),
        lines: lines.collect(),
        title: format!("{} {direction}: distribution of the stall", group.scenario),
    };
    let mut notes = Vec::new();
    if let Some(goal) = goal {
        notes.push(format!("Dotted: the goal, {} ms.", number(goal)));
    }
    if !died.is_empty() {
        notes.push(format!(
            "Connections died with {}: their last stalls are how long they were watched.",
            died.join(", ")
        ));
    }
    Ok(Figure {
        title: "Part of the runs with a stall no longer than this".to_owned(),
        note: notes.join(" "),
        svg: (!rows.is_empty()).then(|| plot.svg()).transpose()?,
    })
}

fn stall_axis(low: f64, high: f64) -> Axis {
    let low = low.min(high);
    if high / low.max(STALL_MIN_MS) >= LOG_FROM {
        return Axis::log(low.max(STALL_MIN_MS) * 0.8, high * 1.25);
    }
    let room = ((high - low) * 0.08).max(0.5);
    Axis::linear((low - room).max(0.0), high + room)
}

/// The distribution's points as stairs, from zero to the right edge.
fn steps(points: &[(f64, f64)], right: f64) -> Vec<(f64, f64)> {
    let mut out = Vec::new();
    let mut part = 0.0;
    for &(value, next) in points {
        out.extend([(value, part), (value, next)]);
        part = next;
    }
    out.push((right, part));
    out
}

#[cfg(test)]
mod tests {
    use super::super::super::report::tests::row;
    use super::super::groups::{groups, systems};
    use super::*;

    #[test]
    fn stairs_go_up_at_each_value() {
        assert_eq!(
            steps(&[(1.0, 0.5), (3.0, 1.0)], 4.0),
            [(1.0, 0.0), (1.0, 0.5), (3.0, 0.5), (3.0, 1.0), (4.0, 1.0)]
        );
    }

    #[test]
    fn what_died_is_named() -> anyhow::Result<()> {
        let own = row("holdfast", "cut", "download");
        let mut died = row("tcp", "cut", "download");
        died.survived = false;
        died.series.clear();
        let rows = [&own, &died];
        let systems = systems(&rows);
        let groups = groups(&rows, &systems);
        let stalls = stalls(&groups[0], "download", &systems, Some(45.0))?;
        assert!(stalls.note.contains("45 ms") && stalls.note.contains("died with tcp"));
        let svg = stalls.svg.unwrap_or_default();
        assert!(svg.contains("#0072B2") && svg.contains("#D55E00"), "{svg}");
        let series = series(&groups[0], "download", &systems)?;
        let svg = series.svg.unwrap_or_default();
        assert!(svg.contains("#0072B2") && !svg.contains("#D55E00"), "{svg}");
        Ok(())
    }

    #[test]
    fn a_series_is_shown_until_half_of_the_systems_go_on() {
        let mut rows = ["a", "b", "c"].map(|system| row(system, "cut", "download"));
        for row in &mut rows {
            row.series = (0..=1000).collect();
        }
        rows[2].stall_ms.p50 = 16_000.0;
        let numbered = |rows: &[Row; 3]| {
            let rows: Vec<(usize, &Row)> = rows.iter().map(|r| (0, r)).collect();
            shown_steps(&rows)
        };
        assert_eq!(numbered(&rows), 351);
        rows[1].stall_ms.p50 = 400.0;
        assert_eq!(numbered(&rows), 901);
        rows[0].stall_ms.p50 = 900.0;
        assert_eq!(numbered(&rows), 1001);
    }

    #[test]
    fn there_is_no_empty_plot() -> anyhow::Result<()> {
        let mut silent = row("tcp", "cut", "upload");
        silent.series = vec![0; 500];
        silent.stalls.clear();
        let rows = [&silent];
        let systems = systems(&rows);
        let groups = groups(&rows, &systems);
        assert!(series(&groups[0], "upload", &systems)?.svg.is_none());
        assert!(stalls(&groups[0], "upload", &systems, None)?.svg.is_none());
        Ok(())
    }
}
