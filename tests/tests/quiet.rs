//! What a command does whose reader goes away: `holdfast ... | head`.

use std::fs::File;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};
use session_tests::{TestBed, command, finish};

/// Nothing in these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(120);

/// A pipe that nobody reads from any more.
fn closed() -> anyhow::Result<Stdio> {
    let (reader, writer) = std::io::pipe()?;
    drop(reader);
    Ok(writer.into())
}

/// A short measurement in a lab of its own.
fn measure<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let words = ["bench", "handover", "--lab", "--runs", "1", "--paced-only"];
    [&words, more].concat()
}

#[test]
fn a_reader_that_goes_away_is_no_error() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let control = bed.bed.client_control();
    let rows = bed.path("rows.jsonl").display().to_string();
    let measure = measure(&["--out", &rows]);
    let commands: [&[&str]; 11] = [
        // Makes a lab, and must take it down.
        &measure,
        &["bench", "report", &rows],
        &["bench", "report", &rows, "--json", "--series"],
        &["status"],
        &["links", "--json"],
        &["sessions"],
        &["handovers"],
        &["handover", "auto"],
        &["config", "example"],
        &["--help"],
        &["--version"],
    ];
    for words in commands {
        let mut told = command(&control, words);
        told.stdout(closed()?).stderr(Stdio::piped());
        let output = finish(told.spawn()?, LIMIT)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success() && said.is_empty(),
            "{words:?}: {}: {said}",
            output.status
        );
    }
    Ok(())
}

/// With standard error closed as well, what is measured is kept all the same.
#[test]
fn a_measurement_that_nobody_watches_is_finished() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let rows = folder.path().join("rows.jsonl");
    let file = rows.display().to_string();
    let words = measure(&["--scenario", "cut,soft", "--out", &file]);
    let mut told = command(Path::new("/nowhere"), &words);
    told.stdout(closed()?).stderr(closed()?);
    let output = finish(told.spawn()?, LIMIT)?;
    ensure!(output.status.success(), "{}", output.status);
    let kept = std::fs::read_to_string(&rows)?;
    ensure!(kept.lines().count() == 6, "{kept}");
    Ok(())
}

#[test]
fn what_cannot_be_written_is_an_error() -> anyhow::Result<()> {
    let mut told = command(Path::new("/nowhere"), &["config", "example"]);
    let full = File::options().write(true).open("/dev/full");
    told.stdout(full.context("/dev/full")?)
        .stderr(Stdio::piped());
    let output = finish(told.spawn()?, LIMIT)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1) && said.contains("standard output"),
        "{}: {said}",
        output.status
    );
    Ok(())
}
