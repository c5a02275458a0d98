//! What the system tests share: a bed with agents, real servers behind the gateway, and somebody
//! who cuts links.

mod both;
mod captures;
pub mod conformance;
mod cutter;
mod lacking;
mod measured;
mod mounts;
mod reader;
mod servers;
mod services;
pub mod suites;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
pub use both::{Both, Said};
pub use captures::Captures;
pub use cutter::Cutter;
pub use lacking::without_syscall;
pub use measured::{measured, rows};
pub use mounts::Mounts;
pub use reader::{begun, endless, reader, said};
pub use servers::{Dns, Iperf, Web};
pub use services::{Nginx, Postgres, Redis, Sshd};
use session_lab::{Lab, Netns};
use session_user::bench::bed::{Bed, BedConfig};
use tempfile::TempDir;

/// Hard cuts that every program must live through.
pub const CUTS: usize = 10;

/// The release binary, which `cargo xtask build` makes.
pub fn program() -> PathBuf {
    let target = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/release/holdfast");
    let program = std::env::var_os("HOLDFAST_BIN").map_or(target, PathBuf::from);
    assert!(
        program.is_file(),
        "{} is missing: run `cargo xtask build`",
        program.display()
    );
    program
}

/// A bed in a folder of its own.
pub struct TestBed {
    /// The bed; first, so that it ends before its folder.
    pub bed: Bed,
    dir: TempDir,
}

impl TestBed {
    /// The usual bed.
    pub fn new() -> anyhow::Result<Self> {
        Self::with(|_| {})
    }

    /// A bed with changes.
    pub fn with(change: impl FnOnce(&mut BedConfig)) -> anyhow::Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "system tests need root");
        let dir = tempfile::Builder::new()
            .prefix("holdfast-test-")
            .tempdir()?;
        let mut config = BedConfig::new(program());
        change(&mut config);
        Ok(Self {
            bed: Bed::new(dir.path(), config)?,
            dir,
        })
    }

    /// The folder, for files of the test.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A target in the lab that has accepted nothing yet.
    pub fn listen(&self) -> anyhow::Result<TcpListener> {
        let target = Lab::target(false);
        let bound = (self.bed.lab.server()).run(move || TcpListener::bind((target, 0)));
        Ok(bound?)
    }

    /// Starts a program captured; what it prints can be taken at its end.
    pub fn start(&self, words: &[&str]) -> anyhow::Result<Child> {
        let (program, arguments) = words.split_first().context("there is no program")?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        self.bed
            .spawn_captured(command)
            .with_context(|| format!("`{program}` cannot be started"))
    }

    /// Starts a program by `holdfast run`; what it prints can be taken at its end.
    pub fn start_run(&self, words: &[&str]) -> anyhow::Result<Child> {
        let mut command = command(&self.bed.client_control(), &["run", "--"]);
        command
            .args(words)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Ok(self.bed.lab.client().spawn(command)?)
    }

    /// Runs a program captured, to its end.
    pub fn run(&self, words: &[&str], limit: Duration) -> anyhow::Result<Output> {
        let mut child = self.start(words)?;
        drop(child.stdin.take());
        finish(child, limit).with_context(|| words.join(" "))
    }

    /// [`Self::run`], which must succeed; returns what it printed.
    pub fn succeed(&self, words: &[&str], limit: Duration) -> anyhow::Result<String> {
        let output = self.run(words, limit)?;
        ensure!(
            output.status.success(),
            "`{}` failed: {}\n{}{}\n{}",
            words.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            self.bed.last_words()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// A command of `holdfast` for the agent at `control`.
pub fn command(control: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(program());
    command
        .arg("--control")
        .arg(control)
        .args(arguments)
        .stdin(Stdio::null());
    command
}

/// Runs a command of `holdfast` to its end.
pub fn holdfast(control: &Path, arguments: &[&str]) -> anyhow::Result<Output> {
    Ok(command(control, arguments).output()?)
}

/// [`holdfast`], which must succeed; returns what it printed.
pub fn holdfast_says(control: &Path, arguments: &[&str]) -> anyhow::Result<String> {
    let output = holdfast(control, arguments)?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Waits for a program's end, and kills it after `limit`: a test never hangs.
pub fn finish(mut child: Child, limit: Duration) -> anyhow::Result<Output> {
    let (pid, deadline) = (child.id(), Instant::now() + limit);
    // What it prints must be read meanwhile, or it would wait for us.
    let out = child.stdout.take().map(read_all);
    let err = child.stderr.take().map(read_all);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            bail!("process {pid} did not end within {limit:?}");
        }
        // A child's end can be waited for, but not with a limit.
        std::thread::sleep(Duration::from_millis(5));
    };
    let take = |t: Option<std::thread::JoinHandle<Vec<u8>>>| {
        t.and_then(|t| t.join().ok()).unwrap_or_default()
    };
    Ok(Output {
        status,
        stdout: take(out),
        stderr: take(err),
    })
}

fn read_all(mut from: impl std::io::Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        // What was read up to an error is what there is.
        let _ = from.read_to_end(&mut all);
        all
    })
}

/// Waits until `good`, looking again and again.
pub fn eventually(
    what: &str,
    limit: Duration,
    mut good: impl FnMut() -> bool,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    while !good() {
        ensure!(Instant::now() < deadline, "not within {limit:?}: {what}");
        // What is waited for is anything, and tells nothing by itself.
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Waits until something listens on `addr` inside `netns`.
pub fn await_listener(netns: &Netns, addr: std::net::SocketAddr) -> anyhow::Result<()> {
    eventually(
        &format!("a server listens on {addr}"),
        Duration::from_secs(30),
        || {
            netns.run(move || {
                std::net::TcpStream::connect_timeout(&addr, Duration::from_secs(1)).is_ok()
            })
        },
    )
}

/// A random-looking file of `bytes` bytes; returns its SHA-256.
pub fn make_file(path: &Path, bytes: usize) -> anyhow::Result<String> {
    use sha2::{Digest, Sha256};
    use std::io::Write;
    let mut file = std::io::BufWriter::new(std::fs::File::create(path)?);
    let mut hash = Sha256::new();
    let mut block = [0u8; 4096];
    let mut state = 0x1234_5678_9abc_def0_u64;
    let mut left = bytes;
    while left > 0 {
        for chunk in block.chunks_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            chunk.copy_from_slice(&state.to_le_bytes());
        }
        let now = left.min(block.len());
        file.write_all(&block[..now])?;
        hash.update(&block[..now]);
        left -= now;
    }
    file.flush()?;
    Ok(hex::encode(hash.finalize()))
}

/// SHA-256 of a file.
pub fn sha256(path: &Path) -> anyhow::Result<String> {
    use sha2::{Digest, Sha256};
    let mut file = std::fs::File::open(path).with_context(|| path.display().to_string())?;
    let mut hash = Sha256::new();
    std::io::copy(&mut file, &mut hash)?;
    Ok(hex::encode(hash.finalize()))
}
