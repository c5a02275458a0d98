//! The table in docs/conformance.md.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, ensure};

use super::report::summary;
use super::{Case, Family, Row, cases};

const BEGIN: &str =
    "<!-- conformance:begin (written by `cargo xtask conformance --write-docs`) -->";
const END: &str = "<!-- conformance:end -->";

/// Writes the table between the document's markers.
///
/// # Errors
///
/// If not every case was run, or the document has no markers.
pub fn write(document: &Path, rows: &[Row]) -> anyhow::Result<()> {
    let runs: usize = cases::all().map(|c| c.families.len()).sum();
    ensure!(
        rows.len() == runs,
        "the document shows all cases, so all must be run"
    );
    let text = std::fs::read_to_string(document).with_context(|| document.display().to_string())?;
    std::fs::write(document, replaced(&text, &section(rows)?)?)?;
    Ok(())
}

fn replaced(text: &str, section: &str) -> anyhow::Result<String> {
    let (head, rest) = text.split_once(BEGIN).context("no marker begins")?;
    let (_, tail) = rest.split_once(END).context("no marker ends")?;
    Ok(format!("{head}{BEGIN}\n\n{section}\n{END}{tail}"))
}

fn section(rows: &[Row]) -> anyhow::Result<String> {
    let by_name: BTreeMap<(&str, Family), &Row> = rows
        .iter()
        .map(|r| ((r.case.as_str(), r.family), r))
        .collect();
    let mut out = format!("{}.\n", summary(rows));
    for (group, cases) in cases::GROUPS {
        write!(out, "\n### {group}\n\n")?;
        out.push_str("| case | what the application does | v4 | v6 | mapped |\n");
        out.push_str("|---|---|---|---|---|\n");
        for case in *cases {
            writeln!(out, "{}", table_line(case, &by_name))?;
        }
    }
    out.push_str("\n### What differs\n\nThe first line of each case's notes that does:\n\n");
    for (line, families) in differences(rows) {
        writeln!(out, "- {line} ({})", families.join(", "))?;
    }
    Ok(out)
}

/// What differs, and in which families: most often it is the same in all.
fn differences(rows: &[Row]) -> Vec<(String, Vec<&'static str>)> {
    let mut out: Vec<(String, Vec<&'static str>)> = Vec::new();
    for row in rows.iter().filter(|r| !r.same) {
        let line = format!("`{}`: {}", row.case, row.difference());
        let family = row.family.name();
        match out.iter_mut().find(|(known, _)| *known == line) {
            Some((_, families)) => families.push(family),
            None => out.push((line, vec![family])),
        }
    }
    out
}

fn table_line(case: &Case, by_name: &BTreeMap<(&str, Family), &Row>) -> String {
    let mut line = format!("| `{}` | {} |", case.name, case.what);
    for family in Family::ALL {
        let verdict = by_name.get(&(case.name, family)).map(|r| r.verdict());
        let shown = match verdict {
            None => "–",
            Some("same") => "same",
            Some("limit") => "[limit](limits.md)",
            Some(_) => "**differs**",
        };
        line.push_str(&format!(" {shown} |"));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_markers_is_replaced() {
        let text = format!("a\n{BEGIN}\nold\n{END}\nb\n");
        let new = replaced(&text, "new\n").unwrap();
        assert_eq!(new, format!("a\n{BEGIN}\n\nnew\n\n{END}\nb\n"));
        assert!(replaced("nothing", "new").is_err());
        let document = include_str!("../../../docs/conformance.md");
        assert!(replaced(document, "").is_ok());
    }
}
