//! Every way in which a link can fail, with an application on it that must not notice: `holdfast bench
//! handover`, five times each. Figures are for measurements on a quiet machine; here nothing may be lost.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use session_tests::{finish, program};

/// One scenario takes seconds; one in which a host sleeps takes minutes.
const LIMIT: Duration = Duration::from_secs(420);

/// Five cuts of `scenarios`; every row must be whole. Returns the rows.
fn five(scenarios: &str, more: &[&str]) -> anyhow::Result<Vec<serde_json::Value>> {
    let child = Command::new(program())
        .args(["bench", "handover", "--lab", "--rtt", "40", "--runs", "5"])
        .args(["--json", "--scenario", scenarios])
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let output = finish(child, LIMIT)?;
    let said = String::from_utf8_lossy(&output.stderr);
    let rows: Vec<serde_json::Value> =
        serde_json::from_slice(&output.stdout).with_context(|| format!("{scenarios}: {said}"))?;
    ensure!(!rows.is_empty(), "{scenarios}: no rows: {said}");
    for row in &rows {
        let whole = row["survived"] == true && row["bytes_lost"] == 0 && row["app_errors"] == 0;
        ensure!(whole && row["runs"] == 5, "{scenarios}: {row:#}");
    }
    Ok(rows)
}

#[test]
fn an_application_survives_what_is_noticed_at_once() -> anyhow::Result<()> {
    five(
        "cut,cut-cold,soft,return,both-move,address,flap,outage",
        &["--paced-only"],
    )
    .map(|_| ())
}

#[test]
fn an_application_survives_what_nobody_tells() -> anyhow::Result<()> {
    let silent = "blackhole-down,blackhole-up,blackhole,loss30,mtu,nat";
    five(silent, &["--paced-only"]).map(|_| ())
}

#[test]
fn an_application_survives_a_sleep_of_the_host() -> anyhow::Result<()> {
    five("wake", &["--paced-only", "--direction", "echo"]).map(|_| ())
}

#[test]
fn bulk_survives_too() -> anyhow::Result<()> {
    five("cut,soft,blackhole", &["--bulk-only"]).map(|_| ())
}

/// Not how near it comes to both rates: that is for a quiet machine.
#[test]
fn a_bonded_stream_gets_more_than_any_link_has() -> anyhow::Result<()> {
    let rows = five("steady", &[])?;
    ensure!(rows.len() == 2, "{rows:#?}");
    for row in &rows {
        let links = row["rates_mbit"].as_array().context("no rates")?;
        let rates = links.iter().filter_map(serde_json::Value::as_f64);
        let fastest = rates.fold(0.0, f64::max);
        let goodput = row["goodput_mbit"].as_f64().context("no goodput")?;
        ensure!(row["mode"] == "bonded" && goodput > fastest, "{row:#}");
        let held = row["reorder_bytes_max"].as_u64().context("no memory")?;
        ensure!(held > 0 && held <= 4 << 20, "{row:#}");
    }
    Ok(())
}

#[test]
fn streams_over_two_links_survive_the_loss_of_one() -> anyhow::Result<()> {
    let modes = ["--mode", "single,redundant,bonded", "--paced-only"];
    let rows = five("cut,blackhole", &modes)?;
    let stall = |mode: &str| {
        let one = |r: &&serde_json::Value| {
            r["mode"] == mode && r["scenario"] == "blackhole" && r["direction"] == "download"
        };
        let row = rows.iter().find(one).context("a row is missing")?;
        row["stall_ms"]["p50"].as_f64().context("no stall")
    };
    // Nobody has to notice anything for a redundant stream to go on.
    let (redundant, single) = (stall("redundant")?, stall("single")?);
    ensure!(
        redundant < single / 2.0,
        "a redundant stream waited {redundant} ms, a single one {single} ms"
    );
    Ok(())
}
