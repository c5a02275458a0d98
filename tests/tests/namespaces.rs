//! Captured programs in network namespaces that have no connectivity of their own: only a loopback interface.

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, ChildStdin, ChildStdout, Output};
use std::time::Duration;

use anyhow::{Context, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use session_lab::{Lab, LinkName, Netns};
use session_tests::{
    Mounts, Nginx, TestBed, command, endless, eventually, finish, make_file, program, sha256,
};

/// Nothing in these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);
const BYTES: usize = 12_000_000;

/// What goes first in a shell that is to have nothing but a loopback interface.
const ALONE: [&str; 5] = [
    "unshare",
    "-n",
    "sh",
    "-c",
    "ip link set lo up && exec \"$@\"",
];

/// Connects to each port of the target that is written to it, and says what became of that.
const CALLER: &str = r#"
import errno, socket, sys
print("ready", flush=True)
for line in sys.stdin:
    s = socket.socket()
    s.settimeout(30)
    try:
        s.connect((sys.argv[1], int(line)))
        print("connected", flush=True)
    except OSError as e:
        print(errno.errorcode.get(e.errno, str(e)), flush=True)
    s.close()
"#;

fn url(v6: bool) -> String {
    let server = SocketAddr::new(Lab::target(v6), Nginx::PORT);
    format!("http://{server}/file")
}

/// Starts a captured program in a new namespace with a loopback interface and nothing else.
fn alone(bed: &TestBed, words: &[&str]) -> anyhow::Result<Child> {
    bed.start(&[&ALONE[..], &["sh"], words].concat())
}

fn good(bed: &TestBed, output: &Output) -> anyhow::Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{said}\n{}", bed.bed.log("client"));
    Ok(())
}

/// A program in a namespace of its own that connects when it is told to.
struct Caller {
    child: Child,
    ask: ChildStdin,
    said: BufReader<ChildStdout>,
}

impl Caller {
    fn start(bed: &TestBed) -> anyhow::Result<Self> {
        let target = Lab::target(false).to_string();
        let mut child = alone(bed, &["python3", "-u", "-c", CALLER, &target])?;
        let ask = child.stdin.take().context("no stdin")?;
        let said = BufReader::new(child.stdout.take().context("no stdout")?);
        let mut this = Self { child, ask, said };
        ensure!(this.line()? == "ready");
        Ok(this)
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.said.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    fn call(&mut self, port: u16) -> anyhow::Result<String> {
        writeln!(self.ask, "{port}")?;
        self.line()
    }

    fn end(mut self) -> anyhow::Result<()> {
        drop(self.ask);
        ensure!(self.child.wait()?.success());
        Ok(())
    }
}

/// The agent hears of the namespace by the connection itself; the download lives through a cut.
fn curl_downloads(v6: bool) -> anyhow::Result<()> {
    let mut bed = TestBed::new()?;
    let nginx = Nginx::start(&bed.bed.lab, &bed.path(""))?;
    let expected = make_file(&nginx.root.join("file"), BYTES)?;
    let out = bed.path("out").display().to_string();
    let curl = ["curl", "-sS", "-f", "--limit-rate", "4M", "-o", &out];
    let child = alone(&bed, &[&curl[..], &[&url(v6)]].concat())?;
    let received = |bed: &TestBed| -> u64 {
        let session = bed.bed.session();
        session.map_or(0, |s| s.streams.iter().map(|s| s.rx).sum())
    };
    eventually("the download has begun", LIMIT, || received(&bed) > 100_000)?;
    bed.bed.await_link(LinkName::Wifi, LIMIT)?;
    bed.bed.lab.cut(LinkName::Wifi)?;
    bed.bed.await_link(LinkName::Lte, LIMIT)?;
    good(&bed, &finish(child, LIMIT)?)?;
    ensure!(sha256(&bed.path("out"))? == expected);
    // Nothing keeps the namespace of a program that has ended.
    eventually("the agent leaves", LIMIT, || {
        bed.bed.log("client").contains("no longer listening in it")
    })
}

#[test]
fn curl_without_any_network_downloads_over_ipv4() -> anyhow::Result<()> {
    curl_downloads(false)
}

#[test]
fn curl_without_any_network_downloads_over_ipv6() -> anyhow::Result<()> {
    curl_downloads(true)
}

#[test]
fn run_in_a_namespace_is_ready_before_its_command() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let nginx = Nginx::start(&bed.bed.lab, &bed.path(""))?;
    let expected = make_file(&nginx.root.join("file"), BYTES)?;
    let control = bed.bed.client_control();
    let inside = Netns::new("box")?;
    // Nobody has connected yet: it is told that the agent listens there already.
    let (program, to) = (program(), format!("{}:{}", Lab::target(false), Nginx::PORT));
    let (program, path) = (program.display().to_string(), control.display().to_string());
    let explain = ["run", "--", &program, "--control", &path, "explain", &to];
    let said = inside.output(command(&control, &explain))?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    ensure!(said.contains("its rule captures it"), "{said}");
    ensure!(!said.contains("waits for the agent"), "{said}");
    for v6 in [false, true] {
        let out = bed.path("out").display().to_string();
        let url = url(v6);
        let run = ["run", "--", "curl", "-sS", "-f", "-o", &out, &url];
        good(&bed, &inside.output(command(&control, &run))?)?;
        ensure!(sha256(&bed.path("out"))? == expected);
    }
    let log = bed.bed.log("client");
    ensure!(
        log.contains("listening in another network namespace"),
        "{log}"
    );
    // Where nothing can be captured the command is not started.
    let dark = Netns::new("dark")?;
    dark.ip(&["link", "set", "lo", "down"])?;
    let refused = dark.output(command(&control, &["run", "--", "true"]))?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success(), "the command was started");
    ensure!(said.contains("ip link set lo up"), "{said}");
    Ok(())
}

/// The agent under the unit's bounds holds less than a command of root does, and may not look at it.
#[test]
fn run_works_within_the_bounds_of_the_unit() -> anyhow::Result<()> {
    const HELD: &str = "-all,+bpf,+perfmon,+net_admin,+net_raw,+sys_resource";
    let dir = tempfile::tempdir()?;
    let bounded = dir.path().join("holdfast-bounded");
    let script = format!(
        "#!/bin/sh\nexec setpriv --no-new-privs --bounding-set {HELD} {} \"$@\"\n",
        program().display()
    );
    fs::write(&bounded, script)?;
    fs::set_permissions(&bounded, Permissions::from_mode(0o755))?;
    let bed = TestBed::with(|c| c.program = bounded.clone())?;
    let unit = include_str!("../../dist/holdfast.service");
    let granted = HELD
        .split(",+")
        .skip(1)
        .map(|name| format!("CAP_{}", name.to_uppercase()));
    for name in granted {
        ensure!(unit.contains(&name), "the unit grants no {name}");
    }
    let nginx = Nginx::start(&bed.bed.lab, &bed.path(""))?;
    let expected = make_file(&nginx.root.join("file"), BYTES)?;
    let out = bed.path("out").display().to_string();
    let child = bed.start_run(&["curl", "-sS", "-f", "-o", &out, &url(false)])?;
    good(&bed, &finish(child, LIMIT)?)?;
    ensure!(sha256(&bed.path("out"))? == expected);
    // Elsewhere it cannot, and says what it lacks.
    let inside = Netns::new("box")?;
    let run = ["run", "--", "true"];
    let refused = inside.output(command(&bed.bed.client_control(), &run))?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success(), "the command was started");
    ensure!(said.contains("CAP_SYS_PTRACE"), "{said}");
    Ok(())
}

#[test]
fn a_target_says_the_same_in_a_namespace_and_the_next_agent_comes_too() -> anyhow::Result<()> {
    let mounts = Mounts::new()?;
    let inside = mounts.inside(&program())?;
    let mut bed = TestBed::with(|c| {
        c.program = inside.clone();
        c.capture_extra = "when_agent_dead = \"refuse\"\n".to_owned();
    })?;
    let server = endless(&bed.bed.lab)?.port();
    let mut caller = Caller::start(&bed)?;
    ensure!(
        caller.call(server)? == "connected",
        "{}",
        bed.bed.log("client")
    );
    ensure!(
        caller.call(9)? == "ECONNREFUSED",
        "the target has no such port"
    );
    let agent = bed.bed.client_agent.take().context("no agent")?;
    kill(Pid::from_raw(i32::try_from(agent.pid())?), Signal::SIGKILL)?;
    drop(agent);
    ensure!(caller.call(server)? == "ECONNREFUSED", "its rule is kept");
    bed.bed.start_client()?;
    bed.bed.await_session()?;
    // It may have a session before it captures anything.
    eventually("the next agent is ready", LIMIT, || {
        let ready = bed.bed.log("client").matches("the agent is ready").count();
        ready == 2
    })?;
    ensure!(
        caller.call(server)? == "connected",
        "{}",
        bed.bed.log("client")
    );
    caller.end()
}
