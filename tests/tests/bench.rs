//! `holdfast bench handover` against a running agent, over links that somebody else configures, and
//! `holdfast bench window`.

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use session_lab::{Lab, LinkName};
use session_tests::{TestBed, await_listener, finish, measured, program, rows};

/// Three cuts take seconds.
const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn a_running_agent_is_measured_over_its_own_links() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let target = SocketAddr::new(Lab::target(false), 9000);
    let mut server = Command::new(program());
    server
        .args([
            "bench",
            "app-server",
            "--listen",
            &target.to_string(),
            "--dir",
        ])
        .arg(bed.path(""))
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let mut server = bed.bed.lab.server().spawn(server)?;
    await_listener(bed.bed.lab.server(), target)?;

    let mut command = Command::new(program());
    command
        .arg("--control")
        .arg(bed.bed.client_control())
        .args([
            "bench", "handover", "--link", "wifi0", "--runs", "3", "--json",
        ])
        .args(["--target", &target.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = bed.bed.spawn_captured(command)?;
    // What NetworkManager would do: whenever the link is up, it gets its routes.
    let over = AtomicBool::new(false);
    let output = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                // It fails while the link is down.
                let _ = bed.bed.lab.readdress(LinkName::Wifi);
                // As often as the measured program meets it.
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let output = finish(child, LIMIT);
        over.store(true, Ordering::Release);
        output
    })?;
    server.kill()?;
    server.wait()?;
    let rows = rows(&output).with_context(|| bed.bed.last_words())?;
    let directions: Vec<_> = rows.iter().map(|r| r["direction"].as_str()).collect();
    ensure!(
        directions == [Some("download"), Some("echo")],
        "{directions:?}"
    );
    for row in &rows {
        ensure!(
            row["runs"] == 3 && row["bytes_lost"] == 0 && row["app_errors"] == 0,
            "{row}"
        );
        let p50 = |key: &str| row[key]["p50"].as_f64().context("no figure");
        ensure!(p50("detection_ms")? > 0.0, "{row}");
        ensure!(p50("resume_ms")? > p50("detection_ms")?, "{row}");
        ensure!(
            p50("stall_ms")? > 0.0 && p50("stall_ms")? < 5_000.0,
            "{row}"
        );
    }
    Ok(())
}

/// A measurement that would say nothing about Holdfast is not made.
#[test]
fn what_is_not_captured_is_not_measured() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let target = SocketAddr::new(Lab::target(false), 9000);
    let listener = bed
        .bed
        .lab
        .server()
        .run(move || std::net::TcpListener::bind(target))?;
    let mut command = Command::new(program());
    command
        .arg("--control")
        .arg(bed.bed.client_control())
        .args(["bench", "handover", "--link", "wifi0", "--runs", "1"])
        .args(["--target", &target.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let output = finish(bed.bed.lab.client().spawn(command)?, LIMIT)?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1) && errors.contains("holdfast run --"),
        "{errors}"
    );
    drop(listener);
    Ok(())
}

/// What a handover sends goes out at once only if the standby's window outlives its idleness: an agent
/// gives standbys bbr for that.
#[test]
fn the_window_of_a_standby_survives_idleness_with_bbr() -> anyhow::Result<()> {
    // Some retransmission timeouts, after each of which cubic's would be half as large.
    let rows = measured(&["window", "--lab", "--idle", "3"], LIMIT)?;
    let figure = |congestion: &str, name: &str| {
        let row = rows.iter().find(|r| r["congestion"] == congestion);
        row.and_then(|r| r[name].as_u64()).context("no figure")
    };
    let lifted = figure("bbr", "established_segments")?;
    // Ten are the kernel's own.
    ensure!(lifted > 20, "{rows:#?}");
    let carrying = figure("bbr", "carrying_segments")?;
    ensure!(carrying * 10 >= lifted * 9, "{rows:#?}");
    let flight = |congestion: &str| figure(congestion, "first_flight_bytes");
    ensure!(flight("bbr")? > 2 * flight("cubic")?, "{rows:#?}");
    Ok(())
}
