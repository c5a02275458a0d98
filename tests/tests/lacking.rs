//! Hosts that lack something that capture needs: each is told what, and what to do.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::ensure;
use session_lab::cgroup2_root;
use session_tests::{TestBed, finish, program, without_syscall};

/// Nothing in these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// A second agent on the client's host, with another control socket.
fn another_agent(bed: &TestBed, program: &mut Command) -> anyhow::Result<Output> {
    let config =
        std::fs::read_to_string(bed.path("client.toml"))?.replace("client.sock", "other.sock");
    std::fs::write(bed.path("other.toml"), config)?;
    program
        .arg("agent")
        .arg("--config")
        .arg(bed.path("other.toml"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let command = std::mem::replace(program, Command::new("true"));
    finish(bed.bed.lab.client().spawn(command)?, LIMIT)
}

fn refused(output: &Output, words: &[&str]) -> anyhow::Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1),
        "it ended with {}: {said}",
        output.status
    );
    for word in words {
        ensure!(said.contains(word), "no `{word}` in: {said}");
    }
    ensure!(!said.contains("panicked"), "it panicked: {said}");
    Ok(())
}

#[test]
fn a_kernel_without_ebpf_is_named() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let mut command = Command::new(program());
    without_syscall(&mut command, libc::SYS_bpf, libc::ENOSYS);
    let output = another_agent(&bed, &mut command)?;
    refused(
        &output,
        &["this kernel cannot do it", "5.15", "CONFIG_CGROUP_BPF"],
    )
}

#[test]
fn a_filter_in_the_way_is_told_from_missing_privileges() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let mut command = Command::new(program());
    without_syscall(&mut command, libc::SYS_bpf, libc::EPERM);
    let output = another_agent(&bed, &mut command)?;
    refused(&output, &["permission denied", "seccomp"])
}

#[test]
fn doctor_finds_what_the_kernel_lacks() -> anyhow::Result<()> {
    let mut command = Command::new(program());
    command.args(["doctor", "--json"]);
    without_syscall(&mut command, libc::SYS_bpf, libc::ENOSYS);
    let output = command.stdin(Stdio::null()).output()?;
    ensure!(output.status.code() == Some(6), "{}", output.status);
    let checks: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let programs = checks
        .as_array()
        .into_iter()
        .flatten()
        .find(|c| c["name"] == "eBPF programs");
    ensure!(
        programs.is_some_and(|c| c["ok"] == false && c["advice"] != ""),
        "{checks}"
    );
    Ok(())
}

/// The command in a mount namespace in which no cgroup2 is mounted.
fn without_cgroup2(program: &Path) -> anyhow::Result<Command> {
    let script = format!(
        "umount --lazy '{}' && exec '{}' \"$@\"",
        cgroup2_root()?.display(),
        program.display()
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script, "sh"]);
    Ok(command)
}

#[test]
fn a_host_without_cgroup2_is_told_to_mount_it() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let output = another_agent(&bed, &mut without_cgroup2(&program())?)?;
    refused(&output, &["cgroup v2", "mount -t cgroup2"])?;
    let doctor = without_cgroup2(&program())?
        .arg("doctor")
        .stdin(Stdio::null())
        .output()?;
    let said = String::from_utf8_lossy(&doctor.stdout);
    ensure!(
        doctor.status.code() == Some(6)
            && said.contains("FAIL  cgroup v2")
            && said.contains("mount -t cgroup2"),
        "{said}"
    );
    Ok(())
}

#[test]
fn a_configured_cgroup_that_is_missing_is_named() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let mut command = Command::new(program());
    let text = std::fs::read_to_string(bed.path("client.toml"))?;
    ensure!(text.contains("capture_cgroups"), "{text}");
    let from = bed.bed.cgroup.path().display().to_string();
    let changed = text.replace(&from, "no-such.slice/app.service");
    ensure!(changed != text, "{text}");
    std::fs::write(bed.path("client.toml"), changed)?;
    let output = another_agent(&bed, &mut command)?;
    refused(
        &output,
        &[
            "capture_cgroups",
            "no-such.slice/app.service",
            "does not exist",
        ],
    )
}
