//! What an operator is told of a handover, by the command line, the log and the files.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use session_lab::{Direction, LinkName};
use session_tests::{Cutter, TestBed, begun, endless, eventually, holdfast_says, reader};

/// Nothing in these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);

fn handovers(control: &Path, arguments: &[&str]) -> anyhow::Result<Vec<Value>> {
    let words = [&["handovers", "--json"], arguments].concat();
    Ok(serde_json::from_str(&holdfast_says(control, &words)?)?)
}

/// Waits for a handover that `wanted` says.
fn await_handover(control: &Path, wanted: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
    let mut found = None;
    let result = eventually("the handover is told", LIMIT, || {
        let all = handovers(control, &[]).unwrap_or_default();
        found = all.into_iter().find(|h| wanted(h));
        found.is_some()
    });
    result.with_context(|| format!("{:#?}", handovers(control, &[])))?;
    found.context("it is gone again")
}

/// The events of the only file in `dir`; fails if the file is not as RFC 7464 has it.
fn events(dir: &Path) -> anyhow::Result<Vec<Value>> {
    let files: Vec<_> = fs::read_dir(dir)?.collect::<Result<_, _>>()?;
    ensure!(files.len() == 1, "{files:?}");
    let path = files[0].path();
    let mode = fs::metadata(&path)?.permissions().mode() & 0o777;
    ensure!(mode == 0o600, "{} has mode {mode:o}", path.display());
    let bytes = fs::read(&path)?;
    ensure!(bytes.first() == Some(&0x1e) && bytes.last() == Some(&b'\n'));
    let records = bytes[1..].split(|b| *b == 0x1e);
    let records: Vec<Value> = records
        .map(serde_json::from_slice)
        .collect::<Result<_, _>>()?;
    ensure!(records[0]["qlog_format"] == "JSON-SEQ", "{}", records[0]);
    Ok(records)
}

fn ms(handover: &Value, field: &str) -> anyhow::Result<f64> {
    handover[field]
        .as_f64()
        .with_context(|| format!("{field} is missing in {handover:#}"))
}

#[test]
fn a_cut_is_told_by_command_log_and_file() -> anyhow::Result<()> {
    let files = tempfile::tempdir()?;
    let (ours, theirs) = (files.path().join("client"), files.path().join("gateway"));
    let mut bed = TestBed::with(|c| {
        c.client_extra = format!("[trace]\nqlog = \"{}\"\n", ours.display());
        c.gateway_extra = format!("[trace]\nqlog = \"{}\"\n", theirs.display());
    })?;
    let control = bed.bed.client_control();
    let mut child = reader(&bed, endless(&bed.bed.lab)?)?;
    begun(&mut child)?;
    bed.bed.await_standby(LinkName::Lte, LIMIT)?;
    Cutter::default().once(&mut bed.bed)?;

    let hard = await_handover(&control, |h| h["soft"] == false)?;
    ensure!(
        hard["trigger"] == "link-lost"
            && hard["from"]["link"] == "wifi0"
            && hard["to"]["link"] == "lte0"
            && hard["warm"] == true
            && hard["attempts"] == 0,
        "{hard:#}"
    );
    let decision = hard["decision"].as_str().unwrap_or_default();
    ensure!(decision.contains("standby on lte0"), "{hard:#}");
    ensure!(hard["choices"][0]["link"] == "lte0", "{hard:#}");
    ensure!(ms(&hard, "detection_ms")? < 1000.0, "{hard:#}");
    // A stream that gets 1 kB each 2 ms.
    ensure!(ms(&hard, "resumed_ms")? < 2000.0, "{hard:#}");
    ensure!(ms(&hard, "first_received_ms")? < 2000.0, "{hard:#}");
    let stall = ms(&hard, "stall_ms")?;
    ensure!((1.0..2500.0).contains(&stall), "{hard:#}");

    // The link comes back, and the session returns by itself; then an operator moves it.
    await_handover(&control, |h| h["trigger"] == "preferred-link")?;
    bed.bed.await_link(LinkName::Wifi, LIMIT)?;
    holdfast_says(&control, &["handover", "lte0"])?;
    let by_hand = await_handover(&control, |h| h["trigger"] == "by-hand")?;
    ensure!(
        by_hand["soft"] == true && by_hand["resent_records"] == 0,
        "{by_hand:#}"
    );

    let table = holdfast_says(&control, &["handovers", "-n", "50"])?;
    let row = table.lines().find(|l| l.contains("link-lost"));
    let row = row.with_context(|| table.clone())?;
    ensure!(
        row.contains("gateway") && row.contains("wifi0 -> lte0") && row.contains("hard, warm"),
        "{table}"
    );
    ensure!(handovers(&control, &["-n", "1"])?.len() == 1);
    ensure!(handovers(&control, &["--peer", "nobody"])?.is_empty());
    ensure!(!handovers(&control, &["--peer", "gateway"])?.is_empty());
    let log = bed.bed.log("client");
    let told = |l: &&str| l.contains("INFO") && l.contains("link-lost") && l.contains("handover");
    ensure!(log.lines().filter(told).count() == 1, "{log}");

    let number = |h: &Value| h["number"].as_u64();
    let mut file = Vec::new();
    eventually("the file tells it too", LIMIT, || {
        file = events(&ours).unwrap_or_default();
        let is_it =
            |e: &&Value| e["name"] == "holdfast:handover" && number(&e["data"]) == number(&hard);
        file.iter().find(is_it).map(|e| &e["data"]) == Some(&hard)
    })?;
    for name in ["connection_started", "path_assigned"] {
        let name = format!("connectivity:{name}");
        ensure!(file.iter().any(|e| e["name"] == name), "{name}: {file:#?}");
    }
    let lost = |e: &&Value| e["name"] == "holdfast:path_ended";
    ensure!(file.iter().find(lost).is_some(), "{file:#?}");

    // The gateway saw the same session move, and was not asked.
    let theirs_told = await_handover(&bed.path("gateway.sock"), |h| h["peer"] == "client")?;
    ensure!(
        theirs_told["trigger"] == "peer-moved" && theirs_told["session"] == hard["session"],
        "{theirs_told:#}"
    );
    // An agent that ends writes the end down.
    let _ = child.kill();
    let _ = child.wait();
    let pid = bed.bed.client_agent.as_ref().context("no agent")?.pid();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid)?);
    nix::sys::signal::kill(pid, nix::sys::signal::SIGTERM)?;
    eventually("both ends' files are complete", LIMIT, || {
        [&ours, &theirs].iter().all(|dir| {
            let last = events(dir).ok().and_then(|e| e.last().cloned());
            last.is_some_and(|e| e["name"] == "connectivity:connection_closed")
        })
    })
}

#[test]
fn silence_is_told_with_how_long_it_lasted() -> anyhow::Result<()> {
    let mut bed = TestBed::new()?;
    let control = bed.bed.client_control();
    let mut child = reader(&bed, endless(&bed.bed.lab)?)?;
    begun(&mut child)?;
    bed.bed.await_standby(LinkName::Lte, LIMIT)?;
    bed.bed.lab.blackhole(LinkName::Wifi, Direction::Both)?;
    let told = await_handover(&control, |h| h["soft"] == false)?;
    let trigger = told["trigger"].as_str().unwrap_or_default();
    // Either end may find out first.
    ensure!(["silent", "peer-moved"].contains(&trigger), "{told:#}");
    let gateway = bed.path("gateway.sock");
    let theirs = await_handover(&gateway, |h| h["peer"] == "client")?;
    let silent = [&told, &theirs]
        .into_iter()
        .find(|h| h["trigger"] == "silent");
    let silent = silent.with_context(|| format!("{told:#}\n{theirs:#}"))?;
    ensure!(ms(silent, "detection_ms")? > 0.0, "{silent:#}");
    ensure!(ms(silent, "first_sent_ms")? >= 0.0, "{silent:#}");
    ensure!(ms(&told, "stall_ms")? > 0.0, "{told:#}");
    let _ = child.kill();
    let _ = child.wait();
    Ok(())
}
