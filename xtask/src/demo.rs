//! The demo: the same application, the same cuts, with and without Holdfast.

use std::path::Path;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::{build, setup, sh};

/// Cuts with Holdfast, and without: there the first one ends the connection.
const RUNS: &str = "10";
const PLAIN_RUNS: &str = "1";
/// The bench's name of a plain TCP connection.
const PLAIN: &str = "tcp";

/// Sets up, builds, measures both, shows them side by side.
pub fn run(root: &Path, yes: bool, as_json: bool) -> anyhow::Result<()> {
    setup::run(yes)?;
    let binary = build::run(root)?;
    let binary = binary
        .to_str()
        .context("the path of the workspace is not UTF-8")?;
    let mut command = if sh::is_root() {
        sh::command(root, binary, &[])
    } else {
        sh::command(root, "sudo", &[binary])
    };
    command
        .args(["bench", "handover", "--lab", "--scenario", "cut", "--json"])
        .args(["--runs", RUNS, "--paced-only"])
        .args(["--against", PLAIN, "--peer-runs", PLAIN_RUNS]);
    eprintln!(
        "an application talks to a server while its link is cut {RUNS} times, through Holdfast, then without"
    );
    let (_, text) = sh::output(&mut command)?;
    let all: Vec<Value> = serde_json::from_str(&text).context("the bench printed no rows")?;
    let (plain, rows): (Vec<_>, Vec<_>) = all.into_iter().partition(|r| r["system"] == PLAIN);
    ensure!(!rows.is_empty(), "the bench has no row of Holdfast's");
    let summary = summary(&rows, &plain);
    if as_json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        show(&rows, &plain);
    }
    ensure!(
        summary["bytes_lost"] == 0 && summary["app_errors"] == 0,
        "the application noticed"
    );
    Ok(())
}

fn summary(rows: &[Value], plain: &[Value]) -> Value {
    let sum = |rows: &[Value], key: &str| rows.iter().filter_map(|r| r[key].as_u64()).sum::<u64>();
    let worst = |rows: &[Value], key: &str| {
        rows.iter()
            .filter_map(|r| r["stall_ms"][key].as_f64())
            .fold(0.0, f64::max)
    };
    let survived = |rows: &[Value]| rows.iter().all(|r| r["survived"] == true);
    json!({
        "bytes_lost": sum(rows, "bytes_lost"),
        "app_errors": sum(rows, "app_errors"),
        "stall_ms": { "p50": worst(rows, "p50"), "p95": worst(rows, "p95"), "max": worst(rows, "max") },
        "runs": rows.first().map_or(0, |r| r["runs"].as_u64().unwrap_or(0)),
        "survived": survived(rows),
        "rows": rows,
        "plain": {
            "survived": survived(plain),
            "app_errors": sum(plain, "app_errors"),
            "stall_ms": { "max": worst(plain, "max") },
            "runs": plain.first().map_or(0, |r| r["runs"].as_u64().unwrap_or(0)),
        },
    })
}

fn show(rows: &[Value], plain: &[Value]) {
    println!(
        "{:<10} {:<10} {:>5} {:>11} {:>7} {:>12} {:>12}  fate",
        "", "direction", "cuts", "bytes lost", "errors", "stall p95", "stall max"
    );
    for (name, rows) in [("holdfast", rows), ("plain TCP", plain)] {
        for row in rows {
            let number = |v: &Value| v.as_f64().unwrap_or(0.0);
            let fate = if row["survived"] == true {
                "the application noticed nothing"
            } else {
                "the connection died"
            };
            println!(
                "{name:<10} {:<10} {:>5} {:>11} {:>7} {:>9.1} ms {:>9.1} ms  {fate}",
                row["direction"].as_str().unwrap_or(""),
                row["runs"],
                row["bytes_lost"],
                row["app_errors"],
                number(&row["stall_ms"]["p95"]),
                number(&row["stall_ms"]["max"]),
            );
        }
    }
}
