//! How rows are shown, whether they were measured just now or come from files.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};

use super::rowfile::{self, Kept};
use super::{html, report, text};
use crate::stdio::print;

/// Arguments of whatever shows rows.
#[derive(Debug, clap::Args)]
pub struct Output {
    /// As JSON: one array, a row for each system, scenario, direction and pace.
    #[arg(long)]
    json: bool,
    /// With --json: each row's delivered bytes around the cut, too.
    #[arg(long, requires = "json")]
    series: bool,
    /// Detection, resume, replayed bytes and a histogram of the stalls behind the table.
    #[arg(long, conflicts_with = "json")]
    verbose: bool,
    /// Also as a page for a browser, with plots; it needs nothing from elsewhere.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

impl Output {
    /// Better told before hours of measurement than after.
    pub fn check(&self) -> anyhow::Result<()> {
        self.html.as_deref().map_or(Ok(()), html::check_folder)
    }

    /// Shows them.
    pub fn show(&self, kept: &[Kept]) -> anyhow::Result<()> {
        if let Some(path) = &self.html {
            let page = html::page(kept)?;
            std::fs::write(path, page)
                .with_context(|| format!("{} cannot be written", path.display()))?;
        }
        let rows = kept.iter().map(|k| &k.row);
        if self.json {
            return report::print_json(rows, self.series);
        }
        print(&text::render(rows, self.verbose));
        Ok(())
    }
}

/// Arguments of `bench report`.
#[derive(Debug, clap::Args)]
pub struct ReportArgs {
    /// Files that `bench handover --out` has written. Of rows for the same thing the last counts.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// Shows rows from files, without measuring.
pub fn run(args: &ReportArgs) -> anyhow::Result<ExitCode> {
    args.output.check()?;
    let mut kept = Vec::new();
    for file in &args.files {
        kept.extend(rowfile::read(file)?.kept);
    }
    ensure!(!kept.is_empty(), "there are no rows in these files");
    args.output.show(&newest(kept))?;
    Ok(ExitCode::SUCCESS)
}

/// Of rows with one key, the last.
fn newest(kept: Vec<Kept>) -> Vec<Kept> {
    let mut out: Vec<Kept> = Vec::new();
    for one in kept {
        let key = one.row.key();
        match out.iter_mut().find(|old| old.row.key() == key) {
            Some(old) => *old = one,
            None => out.push(one),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::host::Host;
    use super::super::report::tests::row;
    use super::*;

    #[test]
    fn the_newest_of_rows_for_one_thing_counts() {
        let kept = |system: &str, lost| {
            let mut row = row(system, "cut", "upload");
            row.bytes_lost = lost;
            Kept {
                row,
                host: Host::default(),
            }
        };
        let left = newest(vec![
            kept("holdfast", 1),
            kept("tcp", 2),
            kept("holdfast", 3),
        ]);
        let lost: Vec<u64> = left.iter().map(|k| k.row.bytes_lost).collect();
        assert_eq!(lost, [3, 2]);
    }
}
