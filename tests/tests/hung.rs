//! An agent that hangs is noticed by a connection that it does not look at.

use std::net::SocketAddr;
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use session_tests::{Mounts, TestBed, eventually, finish, holdfast, program};

/// Nothing in these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(30);

/// Connects and says what came of it.
const CONNECT: &str = r"
import socket, sys
s = socket.socket()
s.settimeout(20)
print(s.connect_ex((sys.argv[1], int(sys.argv[2]))), flush=True)
";

/// Sets the client's agent going again, whatever happens.
struct Stopped(Pid);

impl Stopped {
    fn new(bed: &TestBed) -> anyhow::Result<Self> {
        let agent = bed.bed.client_agent.as_ref().context("no agent")?;
        let pid = Pid::from_raw(i32::try_from(agent.pid())?);
        kill(pid, Signal::SIGSTOP)?;
        Ok(Self(pid))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // It may be gone.
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

fn connecting(bed: &TestBed, to: SocketAddr) -> anyhow::Result<Child> {
    let (ip, port) = (to.ip().to_string(), to.port().to_string());
    bed.start(&["python3", "-c", CONNECT, &ip, &port])
}

fn outcome(child: Child) -> anyhow::Result<String> {
    let output = finish(child, LIMIT)?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Tries until a connection ends as expected: the agent is taken to hang a second after the first.
fn eventually_ends(bed: &TestBed, to: SocketAddr, expected: &str) -> anyhow::Result<()> {
    let mut last = String::new();
    let ended = eventually(&format!("a connection ends with {expected}"), LIMIT, || {
        let said = connecting(bed, to).and_then(|mut child| {
            // Whatever is answered is answered at once; what is not is held, since the agent is not yet taken to hang.
            std::thread::sleep(Duration::from_millis(300));
            if child.try_wait()?.is_none() {
                child.kill()?;
            }
            outcome(child)
        });
        last = said.unwrap_or_else(|error| error.to_string());
        last == expected
    });
    ended.with_context(|| format!("the last one said {last}"))
}

#[test]
fn new_connections_are_refused_where_the_rule_says_so_and_go_on_afterwards() -> anyhow::Result<()> {
    let mounts = Mounts::new()?;
    let inside = mounts.inside(&program())?;
    let bed = TestBed::with(|c| {
        c.program = inside.clone();
        c.capture_extra = String::from("when_agent_dead = \"refuse\"\n");
    })?;
    let listener = bed.listen()?;
    let to = listener.local_addr()?;
    let stopped = Stopped::new(&bed)?;
    let waiting = connecting(&bed, to)?;
    eventually_ends(&bed, to, &libc::ECONNREFUSED.to_string())?;
    drop(stopped);
    ensure!(
        outcome(waiting)? == "0",
        "the one that waited is not connected"
    );
    ensure!(
        outcome(connecting(&bed, to)?)? == "0",
        "the agent is still taken to hang"
    );
    let status = holdfast(&bed.bed.client_control(), &["status", "--json"])?;
    let status: serde_json::Value = serde_json::from_slice(&status.stdout)?;
    ensure!(
        status["capture"]["agent_hung"]
            .as_u64()
            .is_some_and(|n| n > 0),
        "{status}"
    );
    Ok(())
}

#[test]
fn new_connections_go_direct_otherwise() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let listener = bed.listen()?;
    let to = listener.local_addr()?;
    let stopped = Stopped::new(&bed)?;
    let waiting = connecting(&bed, to)?;
    eventually_ends(&bed, to, "0")?;
    let (_, from) = listener.accept()?;
    ensure!(
        !from.ip().is_loopback(),
        "it came through the agent: {from}"
    );
    drop(stopped);
    ensure!(
        outcome(waiting)? == "0",
        "the one that waited is not connected"
    );
    Ok(())
}
