//! Many sessions and streams, in small: the same programs measure ten thousand of them (`holdfast bench perf --measure
//! scale,burst,many,stuck`).

use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use session_tests::measured;

/// Handshakes take a processor's time, and so does whatever else runs.
const LIMIT: Duration = Duration::from_secs(120);
/// Whose figures those of one gateway are.
const GATEWAY: &str = "holdfast, gateway";

/// The rows of one pass.
fn one_pass(arguments: &[&str]) -> anyhow::Result<Vec<Value>> {
    let words = [&["perf", "--passes", "1", "--measure"], arguments].concat();
    measured(&words, LIMIT)
}

fn row<'a>(rows: &'a [Value], measure: &str, system: &str) -> anyhow::Result<&'a Value> {
    let named = |row: &&Value| row["measure"] == measure && row["system"] == system;
    let row = rows.iter().find(named);
    row.with_context(|| format!("no {measure} of {system}: {rows:#?}"))
}

fn value(rows: &[Value], measure: &str, system: &str) -> anyhow::Result<f64> {
    let value = row(rows, measure, system)?["value"].as_f64();
    value.with_context(|| format!("{measure} has no value"))
}

/// Units with identities of their own, real connections and full handshakes: all live, and their streams echo.
#[test]
fn a_gateway_holds_many_sessions_and_their_streams() -> anyhow::Result<()> {
    let size = ["--sessions", "200", "--streams", "1000", "--hold", "2"];
    let rows = one_pass(&[&["scale"], &size[..]].concat())?;
    for (measure, expected) in [
        ("sessions_made", 200.0),
        ("streams_opened", 1000.0),
        ("sessions_alive_then", 200.0),
        ("streams_that_echoed", 1000.0),
    ] {
        let row = row(&rows, measure, GATEWAY)?;
        ensure!(row["value"] == expected && row["met"] == true, "{row:#}");
    }
    // An idle session's budget is 64 KiB, a stream's 16 KiB.
    for (measure, most) in [
        ("memory_of_an_idle_session", 64.0),
        ("memory_of_an_idle_stream_of_many_sessions", 16.0),
    ] {
        ensure!(value(&rows, measure, GATEWAY)? < most, "{rows:#?}");
    }
    Ok(())
}

/// One session opens very many streams at once, and every one echoes.
#[test]
fn a_burst_of_streams_of_one_session_is_served() -> anyhow::Result<()> {
    let rows = one_pass(&["burst"])?;
    let echoed = value(&rows, "burst_streams_that_echoed", GATEWAY)?;
    ensure!(echoed >= 5000.0, "{rows:#?}");
    Ok(())
}

/// A cut of the link loses no stream of many.
#[test]
fn a_handover_loses_no_stream_of_many() -> anyhow::Result<()> {
    let rows = one_pass(&["many", "--many", "500"])?;
    for system in ["many streams", "one stream"] {
        ensure!(
            value(&rows, "streams_lost", system)? == 0.0,
            "{system}: {rows:#?}"
        );
    }
    Ok(())
}
