//! The machinery of the conformance suite, with cases that are quick.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::ensure;
use session_tests::conformance::{self, Family, Second};
use session_tests::finish;

/// Of each group something, and nothing that waits long.
const CASES: [&str; 12] = [
    "connect",
    "connect_nonblocking",
    "connect_loopback",
    "bind_source_port",
    "peer_name",
    "socket_facts",
    "end_theirs_first",
    "reset_read",
    "epoll_level",
    "peek",
    "vectors",
    "duplicate",
];

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_conformance"))
}

#[test]
fn applications_cannot_tell() -> anyhow::Result<()> {
    let results = conformance::run(
        program(),
        Second::Captured,
        |case, _| CASES.contains(&case.name),
        |row| println!("{} {}: {}", row.case, row.family.name(), row.verdict()),
    )?;
    let runs = results.rows.len();
    ensure!(runs == CASES.len() * Family::ALL.len(), "{runs} runs");
    let faults = results.faults();
    ensure!(faults.is_empty(), "{}", faults.join("\n"));
    let captured: u64 = results.rows.iter().map(|r| r.guard.captured).sum();
    ensure!(captured >= 30, "only {captured} connects were captured");
    Ok(())
}

/// The suite finds a difference where there is one, says so, and fails.
#[test]
fn a_difference_is_found() -> anyhow::Result<()> {
    // A limit: it differs for as long as there is a gateway.
    let results = conformance::run(
        program(),
        Second::Captured,
        |case, _| case.name == "source_at_the_target",
        |_| {},
    )?;
    for row in &results.rows {
        ensure!(!row.same && row.listed, "{row:?}");
        ensure!(row.fault().is_none(), "a limit counts as a fault: {row:?}");
        let mut unlisted = row.clone();
        unlisted.listed = false;
        ensure!(unlisted.fault().is_some(), "{row:?}");
    }
    ensure!(results.rows.len() == 3);
    Ok(())
}

/// What nobody has captured proves nothing, though it is the same.
#[test]
fn the_guard_notices_that_nothing_was_captured() -> anyhow::Result<()> {
    let names = ["peek", "connect_loopback", "udp_connected"];
    let results = conformance::run(
        program(),
        Second::Native,
        |case, _| names.contains(&case.name),
        |_| {},
    )?;
    for row in &results.rows {
        ensure!(row.same, "the suite itself is not sound: {row:?}");
        let expected = match row.case.as_str() {
            "peek" => Some("of 1 connects 0 were captured"),
            "udp_connected" => Some("no datagram was captured"),
            // It connects to nothing that would be captured.
            _ => None,
        };
        let fault = row.fault();
        let said = expected.is_none_or(|words| fault.as_ref().is_some_and(|f| f.contains(words)));
        ensure!(said && fault.is_some() == expected.is_some(), "{row:?}");
    }
    ensure!(results.rows.len() == 9);
    Ok(())
}

/// What scripts rely on.
#[test]
fn json_is_one_array_of_rows() -> anyhow::Result<()> {
    let mut command = Command::new(program());
    command
        .args(["run", "--json", "--filter", "end_read_twice"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let output = finish(command.spawn()?, Duration::from_secs(60))?;
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{words}");
    let rows: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout)?;
    ensure!(rows.len() == 3);
    for row in &rows {
        ensure!(
            row["case"] == "end_read_twice" && row["same"] == true,
            "{row}"
        );
        ensure!(row["listed"] == false && row["captured"] == 1, "{row}");
        ensure!(
            row["native"].is_array() && row["native"] == row["holdfast"],
            "{row}"
        );
    }
    Ok(())
}

/// With the local bypass bytes arrive as ever, and so do ends and resets; what its kernel cannot do is listed.
#[test]
fn the_local_bypass_loses_nothing() -> anyhow::Result<()> {
    let mut command = Command::new(program());
    command
        .env("HOLDFAST_BENCH_LOCAL_BYPASS", "on")
        .args(["run", "--json", "--family", "v4"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let carried = ["large_write", "tiny_writes", "slow_reader"];
    let ended = [
        "end_after_data",
        "end_theirs_first",
        "end_both",
        "reset_read",
    ];
    for case in carried.iter().chain(&ended).chain(&["urgent_sent_mark"]) {
        command.args(["--filter", case]);
    }
    let output = finish(command.spawn()?, Duration::from_secs(180))?;
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{words}");
    let rows: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout)?;
    let is = |case: &str, what: &str| rows.iter().any(|r| r["case"] == case && r[what] == true);
    for case in carried.iter().chain(&ended) {
        ensure!(is(case, "same"), "{case}: {words}");
    }
    ensure!(is("urgent_sent_mark", "listed"), "{words}");
    Ok(())
}

#[test]
fn a_filter_that_matches_nothing_is_an_error() -> anyhow::Result<()> {
    let mut command = Command::new(program());
    command
        .args(["run", "--filter", "no such case"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let output = finish(command.spawn()?, Duration::from_secs(60))?;
    ensure!(!output.status.success());
    ensure!(String::from_utf8_lossy(&output.stderr).contains("no case has such a name"));
    Ok(())
}
