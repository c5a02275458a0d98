//! The rows of a measurement, for people at a terminal.

use super::report::Row;
use super::stats::histogram;

/// Columns of the table that hold words; the others hold figures and stand to the right.
const WORDS: usize = 6;
const HEAD: [&str; 14] = [
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
    "lost",
    "errors",
    "Mbit/s",
    "",
];

/// One line for each row; what is behind it with one row alone, or if `verbose`.
pub fn print<'a>(rows: impl Iterator<Item = &'a Row>, verbose: bool) {
    let rows: Vec<&Row> = rows.collect();
    if rows.is_empty() {
        return;
    }
    print!("{}", table(&rows));
    for row in &rows {
        for error in &row.errors {
            println!("{}: error: {error}", name(row));
        }
    }
    if verbose || rows.len() == 1 {
        for row in rows {
            println!("\n{}", name(row));
            print!("{}", details(row));
        }
    }
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
    use super::super::report::tests::row;
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
    fn details_show_what_the_table_does_not() {
        let text = details(&row("holdfast", "cut", "download"));
        for part in ["detection", "replayed", "emulator", "< "] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
