//! `when_agent_dead = "refuse"`: what must not go direct does not, however the agent ends.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use session_lab::Lab;
use session_tests::{Mounts, TestBed, begun, endless, eventually, finish, program, reader, said};

/// Nothing in these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);

fn signal(agent: u32, signal: nix::sys::signal::Signal) -> anyhow::Result<()> {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(i32::try_from(agent)?), signal)?;
    Ok(())
}

/// How a captured program's connection ends that is made now.
fn attempt(bed: &TestBed, to: SocketAddr) -> anyhow::Result<String> {
    let program = "import socket, sys\ntry:\n socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)\n print('connected')\nexcept OSError as e:\n print('errno', e.errno)\n";
    let (ip, port) = (to.ip().to_string(), to.port().to_string());
    let child = bed.start(&["python3", "-c", program, &ip, &port])?;
    let output = finish(child, LIMIT)?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[test]
fn a_killed_agent_still_refuses_until_the_next_takes_over() -> anyhow::Result<()> {
    let mounts = Mounts::new()?;
    let inside = mounts.inside(&program())?;
    let mut bed = TestBed::with(|c| {
        c.program = inside.clone();
        c.capture_extra = "when_agent_dead = \"refuse\"\n".to_owned();
    })?;
    let server = endless(&bed.bed.lab)?;
    let elsewhere = SocketAddr::new(Lab::gateway(false), 7843);
    ensure!(mounts.pinned() > 0, "nothing is pinned");
    for _ in 0..2 {
        let mut child = reader(&bed, server)?;
        begun(&mut child)?;
        let agent = bed.bed.client_agent.take().context("no agent")?;
        signal(agent.pid(), nix::sys::signal::Signal::SIGKILL)?;
        ensure!(said(child, LIMIT)?.starts_with("error 104"));
        // ECONNREFUSED inside; outside of the cgroup, and where no rule applies, all is as ever.
        ensure!(attempt(&bed, server)? == "errno 111", "it went direct");
        ensure!(attempt(&bed, elsewhere)? == "connected");
        let free = bed
            .bed
            .lab
            .client()
            .run(move || TcpStream::connect(server).is_ok());
        ensure!(free, "a program outside is refused");
        drop(agent);
        bed.bed.start_client()?;
        bed.bed.await_session()?;
        let mut child = reader(&bed, server)?;
        begun(&mut child)?;
        child.kill()?;
        child.wait()?;
    }
    // In order: nothing is left, and connections go direct.
    let agent = bed.bed.client_agent.take().context("no agent")?;
    signal(agent.pid(), nix::sys::signal::Signal::SIGTERM)?;
    eventually("nothing is pinned any more", LIMIT, || mounts.pinned() == 0)
        .with_context(|| bed.bed.log("client"))?;
    ensure!(attempt(&bed, server)? == "connected");
    Ok(())
}

/// A cgroup that was attached by hand is not forgotten either.
#[test]
fn what_was_attached_by_hand_is_taken_over_too() -> anyhow::Result<()> {
    let mounts = Mounts::new()?;
    let inside = mounts.inside(&program())?;
    let mut bed = TestBed::with(|c| {
        c.program = inside.clone();
        c.capture_extra = "when_agent_dead = \"refuse\"\n".to_owned();
    })?;
    let by_hand = session_lab::TestCgroup::new()?;
    let path = by_hand.path().display().to_string();
    let attach = |bed: &TestBed| {
        Command::new(program())
            .arg("--control")
            .arg(bed.bed.client_control())
            .args(["attach", &path])
            .output()
    };
    ensure!(attach(&bed)?.status.success());
    let agent = bed.bed.client_agent.take().context("no agent")?;
    signal(agent.pid(), nix::sys::signal::Signal::SIGKILL)?;
    drop(agent);
    bed.bed.start_client()?;
    bed.bed.await_session()?;
    ensure!(bed.bed.log("client").contains("captured again"));
    let again = attach(&bed)?;
    let words = String::from_utf8_lossy(&again.stderr).into_owned();
    ensure!(words.contains("already captured"), "{words}");
    Ok(())
}

/// Without a place to pin, the promise cannot be kept: better no agent than a false one.
#[test]
fn without_a_bpf_file_system_the_agent_says_so() -> anyhow::Result<()> {
    let bed = TestBed::with(|c| {
        c.holdfast = false;
        c.capture_extra = "when_agent_dead = \"refuse\"\n".to_owned();
    })?;
    bed.bed.make_identities()?;
    let config = bed.path("client.toml");
    let text = fs::read_to_string(&config)?.replace("[agent]\n", "[agent]\nbpffs = \"/tmp\"\n");
    fs::write(&config, text)?;
    let mut command = Command::new(program());
    command.arg("agent").arg("--config").arg(&config);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let output = finish(bed.bed.lab.client().spawn(command)?, LIMIT)?;
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.code() == Some(1) && words.contains("mount -t bpf"),
        "{words}"
    );
    Ok(())
}
