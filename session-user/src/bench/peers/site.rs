//! Where a peer is set up: the lab's two hosts, and the programs that stand on them.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use session_lab::{Lab, LinkName, Netns};

use super::super::bed::{Running, own_program};

/// Time for a program to say that it is ready.
pub const READY_LIMIT: Duration = Duration::from_secs(20);
/// Between two looks at something that has no event to wait for.
pub const LOOK: Duration = Duration::from_millis(10);

/// Where a peer is set up.
pub struct Site<'a> {
    /// The lab.
    pub lab: &'a Lab,
    /// A folder for files of this set-up, empty.
    pub dir: &'a Path,
    /// Over IPv6.
    pub v6: bool,
    /// Where the application's server listens.
    pub server: SocketAddr,
}

/// A way for the application's connections, with all that must stand for it. Its end ends it.
pub struct Way {
    /// What the application's client connects to.
    pub dial: SocketAddr,
    /// Programs on the client's host.
    pub at_client: Vec<Running>,
    /// Programs on the server's host.
    pub at_server: Vec<Running>,
    /// Files outside of the site's folder, which the programs leave behind.
    pub litter: Vec<PathBuf>,
    /// What is to be undone in the namespaces: `ip` with these words, on the client and the server.
    pub undo: Vec<(Host, Vec<String>)>,
}

/// One of the lab's two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// The one with two links.
    Client,
    /// The one with the application's server.
    Server,
}

impl Host {
    /// Its namespace.
    pub fn netns(self, lab: &Lab) -> &Netns {
        match self {
            Self::Client => lab.client(),
            Self::Server => lab.server(),
        }
    }
}

impl Way {
    /// A way with nothing in it.
    pub fn to(dial: SocketAddr) -> Self {
        Self {
            dial,
            at_client: Vec::new(),
            at_server: Vec::new(),
            litter: Vec::new(),
            undo: Vec::new(),
        }
    }

    /// Fails if one of its programs has ended.
    pub fn check(&mut self) -> anyhow::Result<()> {
        self.at_client
            .iter_mut()
            .chain(&mut self.at_server)
            .try_for_each(Running::check)
    }

    /// Takes it down. What it changed in the namespaces is as before.
    pub fn end(mut self, lab: &Lab) {
        self.at_client.clear();
        self.at_server.clear();
        for (host, words) in &self.undo {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            // What ended with its program or its link is gone already.
            let _ = host.netns(lab).ip(&words);
        }
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        self.at_client.clear();
        self.at_server.clear();
        for file in &self.litter {
            // A program that ended in order has removed its own.
            let _ = std::fs::remove_file(file);
        }
    }
}

impl Site<'_> {
    /// The server's address on its network, where a tunnel ends.
    pub fn gateway(&self) -> IpAddr {
        Lab::gateway(self.v6)
    }

    /// The network prefix of one single address.
    pub fn host_prefix(&self) -> &'static str {
        if self.v6 { "128" } else { "32" }
    }

    /// The client's links, best first, as an option for our programs.
    pub fn links() -> String {
        LinkName::ALL.map(LinkName::name).join(",")
    }

    /// Starts a program; what it says on standard error goes to `name`.log in the site's folder, and
    /// what it says on standard output too unless the command takes it.
    pub fn start(
        &self,
        host: Host,
        name: &'static str,
        mut command: Command,
    ) -> anyhow::Result<Running> {
        let log = File::create(self.log(name))?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = host
            .netns(self.lab)
            .spawn(command)
            .with_context(|| format!("{name} cannot be started"))?;
        Ok(Running::new(child, name))
    }

    /// Starts one of our own programs and waits for its first line.
    pub fn start_own(
        &self,
        host: Host,
        name: &'static str,
        arguments: &[&str],
    ) -> anyhow::Result<(Running, String)> {
        let mut command = Command::new(own_program()?);
        command
            .args(["bench", "peer", name])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(self.log(name))?);
        let mut child = host
            .netns(self.lab)
            .spawn(command)
            .with_context(|| format!("{name} cannot be started"))?;
        let out = child.stdout.take().context("the program has no output")?;
        let running = Running::new(child, name);
        let (sender, line) = mpsc::channel();
        std::thread::spawn(move || {
            let first = BufReader::new(out).lines().next();
            // Whoever waits may have given up.
            let _ = sender.send(first.and_then(Result::ok));
        });
        let first = line.recv_timeout(READY_LIMIT).ok().flatten();
        let first = first
            .with_context(|| format!("{name} does not get ready: {}", self.last_words(name)))?;
        Ok((running, first))
    }

    /// Waits until `good`, at most [`READY_LIMIT`]; `name` is whose log tells why not.
    pub fn wait(
        &self,
        name: &str,
        mut good: impl FnMut() -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + READY_LIMIT;
        while !good()? {
            ensure!(
                Instant::now() < deadline,
                "{name} does not get ready: {}",
                self.last_words(name)
            );
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Waits until `name` listens there.
    pub fn await_listener(&self, host: Host, name: &str, addr: SocketAddr) -> anyhow::Result<()> {
        let netns = host.netns(self.lab);
        self.wait(name, || {
            Ok(netns.run(move || TcpStream::connect_timeout(&addr, LOOK * 100).is_ok()))
        })
    }

    /// What a program has said.
    pub fn said(&self, name: &str) -> String {
        std::fs::read_to_string(self.log(name)).unwrap_or_default()
    }

    fn last_words(&self, name: &str) -> String {
        let said = self.said(name);
        let lines: Vec<&str> = said.lines().rev().take(6).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join(" / ")
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }
}

/// Runs a program to its end with something on its standard input; returns what it prints.
pub fn ask(program: &str, arguments: &[&str], input: &str) -> anyhow::Result<String> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{program} cannot be started"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "{program} {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
