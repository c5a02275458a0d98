//! The rows of a measurement, for people at a terminal.

use super::goals::Together;
use super::report::Row;
use super::stats::histogram;

/// Columns of the table that hold words; the others hold figures and stand to the right.
const WORDS: usize = 6;
const HEAD: [&str; 15] = [
    "scenario",
    "system",
    "mode",
    "direction",
    "pace",
    "links",
    "runs",
    "stall p50",
    "p95",
    "max ms",
    "in run",
    "lost",
    "errors",
    "Mbit/s",
    "",
];

/// One line for each row; what is behind it with one row alone, or if `verbose`.
pub fn render<'a>(rows: impl Iterator<Item = &'a Row>, verbose: bool) -> String {
    let rows: Vec<&Row> = rows.collect();
    if rows.is_empty() {
        return String::new();
    }
    let mut out = table(&rows);
    for row in &rows {
        if let Some(together) = together(row) {
            out.push_str(&format!("{}: {together}\n", name(row)));
        }
        if let Some(datagrams) = datagrams(row) {
            out.push_str(&format!("{}: {datagrams}\n", name(row)));
        }
        for error in &row.errors {
            out.push_str(&format!("{}: error: {error}\n", name(row)));
        }
    }
    if verbose || rows.len() == 1 {
        for row in rows {
            out.push_str(&format!("\n{}\n", name(row)));
            out.push_str(&details(row));
        }
    }
    out
}

/// What cuts cost in datagrams.
fn datagrams(row: &Row) -> Option<String> {
    let (lost, in_flight) = (row.datagrams_lost?, row.datagrams_in_flight?);
    Some(format!(
        "datagrams lost p50 {}, p95 {}, max {}; under way at the cut p50 {}, max {}; more lost than that at {} cuts",
        lost.p50,
        lost.p95,
        lost.max,
        in_flight.p50,
        in_flight.max,
        row.datagrams_beyond.unwrap_or_default()
    ))
}

/// What both links carry together, where that is what was measured.
fn together(row: &Row) -> Option<String> {
    let runs = row.goodput_run_mbit?;
    let goal = Together::of(&row.key());
    let verdict = |met: bool| if met { "met" } else { "missed" };
    let mut out = format!(
        "{:.1} Mbit/s (runs: p50 {:.1}, p5 {:.1}, min {:.1})",
        row.goodput_mbit, runs.p50, runs.p5, runs.min
    );
    if let Some(goal) = goal {
        let met = verdict(goal.is_carried(row));
        out.push_str(&format!(", goal {:.1}: {met}", goal.goodput_mbit));
    }
    if let Some(held) = row.reorder_bytes_max {
        out.push_str(&format!("; {held} B held beyond gaps"));
    }
    if let Some((goal, met)) = goal.and_then(|g| Some((g, g.is_held(row)?))) {
        out.push_str(&format!(", goal {}: {}", goal.reorder_bytes, verdict(met)));
    }
    Some(out)
}

fn name(row: &Row) -> String {
    format!(
        "{} {} {} {} ({})",
        row.scenario, row.system, row.mode, row.direction, row.pace
    )
}

fn table(rows: &[&Row]) -> String {
    let mut lines = vec![HEAD.map(str::to_owned)];
    lines.extend(rows.iter().map(|row| {
        [
            row.scenario.clone(),
            row.system.clone(),
            row.mode.clone(),
            row.direction.clone(),
            row.pace.clone(),
            row.links().label(),
            row.runs.to_string(),
            format!("{:.1}", row.stall_ms.p50),
            format!("{:.1}", row.stall_ms.p95),
            format!("{:.1}", row.stall_ms.max),
            row.longest_stall_run
                .map_or(String::new(), |run| run.to_string()),
            row.lost(),
            row.app_errors.to_string(),
            format!("{:.1}", row.goodput_mbit),
            if row.survived { "" } else { "DIED" }.to_owned(),
        ]
    }));
    let width = |column: usize| {
        let widths = lines.iter().map(|line| line[column].chars().count());
        widths.max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
    let mut out = String::new();
    for line in &lines {
        let mut text = String::new();
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            if column < WORDS {
                text.push_str(&format!("{cell:<width$}  "));
            } else {
                text.push_str(&format!("{cell:>width$}  "));
            }
        }
        out.push_str(text.trim_end());
        out.push('\n');
    }
    out
}

fn details(row: &Row) -> String {
    let mut out = String::new();
    for (name, s) in [
        ("stall", &row.stall_ms),
        ("without a cut", &row.control_ms),
        ("detection", &row.detection_ms),
        ("resume", &row.resume_ms),
    ] {
        // Only an agent tells when it noticed and resumed.
        if s.max <= 0.0 {
            continue;
        }
        out.push_str(&format!(
            "  {name:14} p50 {:8.2} ms   p95 {:8.2} ms   max {:8.2} ms\n",
            s.p50, s.p95, s.max
        ));
    }
    let r = &row.replayed_bytes;
    if r.max > 0.0 {
        out.push_str(&format!(
            "  {:14} p50 {:8.0} B    p95 {:8.0} B    max {:8.0} B\n",
            "replayed", r.p50, r.p95, r.max
        ));
    }
    if let Some(around) = &row.goodput_around {
        out.push_str(&format!(
            "  {:14} p50 {:8.1} %    of the second before\n",
            "goodput around",
            around.p50 * 100.0
        ));
    }
    out.push_str(&format!(
        "  {:14} {:.2} ms late at worst, {} cuts repeated\n",
        "emulator", row.lateness_ms, row.repeated
    ));
    out.push_str(&histogram(&row.stalls));
    out
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::{row, steady};
    use super::*;

    #[test]
    fn a_row_is_a_line_and_columns_are_aligned() {
        let mut died = row("tcp", "blackhole-down", "upload");
        died.survived = false;
        died.v6 = true;
        let rows = [&row("holdfast", "cut", "download"), &died];
        let text = table(&rows);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[0].starts_with("scenario        system    mode"));
        assert!(lines[2].starts_with("blackhole-down  tcp       single"));
        assert!(lines[2].ends_with("DIED"), "{text}");
        let ends = |line: &str, of: &str| line.find(of).map(|at| at + of.len());
        assert_eq!(ends(lines[0], "p95"), ends(lines[1], "60.5"), "{text}");
    }

    #[test]
    fn what_both_links_carry_is_told_beside_its_goal() {
        let rows = [
            steady("holdfast", "bonded", &[41.0, 42.0]),
            steady("mptcp", "single", &[40.0]),
        ];
        let text = render(rows.iter(), false);
        assert!(text.contains("goal 42.5: missed; 700000 B held"), "{text}");
        assert!(text.contains("goal 4194304: met"), "{text}");
        assert!(
            text.contains(
                "mptcp single download (bulk): 40.0 Mbit/s (runs: p50 40.0, p5 40.0, min 40.0)\n"
            ),
            "{text}"
        );
        assert!(text.contains("40 ms, 20 + 30 Mbit/s"), "{text}");
    }

    #[test]
    fn details_show_what_the_table_does_not() {
        let text = details(&row("holdfast", "cut", "download"));
        for part in ["detection", "replayed", "emulator", "< "] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
