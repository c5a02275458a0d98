//! A gateway with very many sessions: a namespace of its own, one agent, servers, and a fleet.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use session_lab::Netns;

use super::super::bed::{Running, own_program};
use super::super::load::{Done, Word};
use super::super::programs::raise_descriptors;
use super::super::scratch::Scratch;
use super::memory::{Resident, resident};
use crate::pki;

/// Where the gateway listens.
const GATEWAY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 7843);
/// Addresses of servers.
const SERVERS: u8 = 8;
/// The port of each.
const SERVER_PORT: u16 = 7000;
/// Addresses of units: a gateway's port has some 28,000 peers' ports for each.
const UNITS_FROM: u8 = 4;
/// Descriptors that a process has beside one for each connection.
const DESCRIPTORS_BESIDE: u64 = 300;

/// How large a crowd is.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Units, each with a session.
    pub sessions: usize,
    /// Streams of all.
    pub streams: usize,
    /// Streams that are asked for an echo.
    pub sample: usize,
}

impl Size {
    /// As much of it as one process has descriptors for: the gateway has one for each session and each stream. What is
    /// left out is said.
    pub fn within(self, descriptors: u64) -> Self {
        let room = descriptors.saturating_sub(DESCRIPTORS_BESIDE) as usize;
        let sessions = self.sessions.min(room);
        let fits = Self {
            sessions,
            streams: self.streams.min(room - sessions),
            ..self
        };
        if (fits.sessions, fits.streams) != (self.sessions, self.streams) {
            crate::stdio::say(format_args!(
                "holdfast: a process may have {descriptors} descriptors here, so it is {} sessions and {} streams instead of {} and {}: raise the hard limit (ulimit -Hn), or give CAP_SYS_RESOURCE",
                fits.sessions, fits.streams, self.sessions, self.streams
            ));
        }
        fits
    }
}

/// The gateway, the servers and the fleet; they end with this value.
pub struct Crowd {
    fleet: Fleet,
    gateway: Running,
    _servers: Vec<Running>,
    _dir: Scratch,
    _netns: Netns,
}

/// The fleet's process.
struct Fleet {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Drop for Fleet {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Crowd {
    /// Starts all of it; the sessions have not been made.
    pub fn new(size: Size) -> anyhow::Result<Self> {
        let descriptors = raise_descriptors()?;
        let size = size.within(descriptors);
        let netns = Netns::new("crowd")?;
        let dir = Scratch::new()?;
        let pki = dir.path().join("pki");
        let (now, day) = (SystemTime::now(), Duration::from_secs(24 * 3600));
        pki::init(&pki, "bench.example", day, now, true)?;
        for unit in ["client", "gateway"] {
            pki::issue(&pki, unit, day, &pki, now, true)?;
        }
        let servers = servers(&netns, size.streams, descriptors)?;
        let gateway = gateway(&netns, &dir, size)?;
        let fleet = fleet(&netns, &dir, size)?;
        Ok(Self {
            fleet,
            gateway,
            _servers: servers,
            _dir: dir,
            _netns: netns,
        })
    }

    /// Has the fleet do something; an error if it has ended.
    pub fn order(&mut self, word: Word) -> anyhow::Result<Done> {
        self.gateway.check()?;
        writeln!(self.fleet.orders, "{}", word.as_str())?;
        let mut line = String::new();
        self.fleet.answers.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the fleet has ended");
        Ok(serde_json::from_str(&line)?)
    }

    /// The gateway's own memory.
    pub fn memory(&self) -> anyhow::Result<Resident> {
        resident(self.gateway.pid())
    }

    /// Processor time of the gateway so far, in seconds.
    pub fn cpu(&self) -> anyhow::Result<f64> {
        super::cpu::tree_seconds(self.gateway.pid())
    }
}

fn server_addresses() -> Vec<SocketAddr> {
    let address = |n| SocketAddr::from(([127, 0, 2, n], SERVER_PORT));
    (1..=SERVERS).map(address).collect()
}

fn joined(addresses: impl IntoIterator<Item = impl ToString>) -> String {
    let texts: Vec<String> = addresses.into_iter().map(|a| a.to_string()).collect();
    texts.join(",")
}

/// As many servers as the connections need descriptors.
fn servers(netns: &Netns, streams: usize, descriptors: u64) -> anyhow::Result<Vec<Running>> {
    let each = descriptors.saturating_sub(DESCRIPTORS_BESIDE).max(1) as usize;
    let processes = streams.div_ceil(each).clamp(1, usize::from(SERVERS));
    let addresses = server_addresses();
    let share = addresses.len().div_ceil(processes);
    let start = |part: &[SocketAddr]| start_echo(netns, part, &[]);
    addresses.chunks(share).map(start).collect()
}

/// A server of very many connections, that listens.
pub fn start_echo(
    netns: &Netns,
    listen: &[SocketAddr],
    mute: &[SocketAddr],
) -> anyhow::Result<Running> {
    let mut command = Command::new(own_program()?);
    command.args(["bench", "app-echo"]);
    for (option, addresses) in [("--listen", listen), ("--mute", mute)] {
        if !addresses.is_empty() {
            command.args([option, &joined(addresses)]);
        }
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = netns.spawn(command)?;
    let out = child.stdout.take().context("the server has no output")?;
    let server = Running::new(child, "server");
    let mut line = String::new();
    BufReader::new(out).read_line(&mut line)?;
    ensure!(line.trim() == "listens", "a server does not listen");
    Ok(server)
}

fn gateway(netns: &Netns, dir: &Scratch, size: Size) -> anyhow::Result<Running> {
    let path = dir.path().display();
    // A stream that has just ended may still count as one.
    let each = size.streams.div_ceil(size.sessions.max(1)) * 2;
    let targets: Vec<String> = server_addresses()
        .iter()
        .map(|at| format!("\"{at}\""))
        .collect();
    let config = format!(
        "[identity]\ncertificate = \"{path}/pki/gateway.crt\"\nkey = \"{path}/pki/gateway.key\"\nca = \"{path}/pki/ca.crt\"\ncrl = \"{path}/pki/crl.pem\"\n\
         [agent]\ncontrol = \"{path}/gateway.sock\"\nlog = \"warn\"\n\
         [accept]\nlisten = [\"{GATEWAY}\"]\nstate = \"{path}/state\"\nmax_sessions = {}\nmax_streams = {}\n\
         [[accept.allow]]\npeer = \"*\"\nto = [{}]\n",
        size.sessions * 2,
        each.max(4096),
        targets.join(", ")
    );
    let file = dir.path().join("gateway.toml");
    fs::write(&file, config)?;
    let mut command = Command::new(own_program()?);
    command.arg("agent").arg("--config").arg(&file);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(fs::File::create(dir.path().join("gateway.log"))?);
    let mut gateway = Running::new(netns.spawn(command)?, "gateway");
    await_listener(netns, &mut gateway)
        .with_context(|| fs::read_to_string(dir.path().join("gateway.log")).unwrap_or_default())?;
    Ok(gateway)
}

/// The gateway answers a connection when it listens.
fn await_listener(netns: &Netns, gateway: &mut Running) -> anyhow::Result<()> {
    const ATTEMPTS: u32 = 2000;
    for _ in 0..ATTEMPTS {
        gateway.check()?;
        if netns.run(|| std::net::TcpStream::connect(GATEWAY)).is_ok() {
            return Ok(());
        }
        // Nothing tells that a socket has begun to listen.
        std::thread::sleep(Duration::from_millis(5));
    }
    anyhow::bail!("the gateway does not listen")
}

fn fleet(netns: &Netns, dir: &Scratch, size: Size) -> anyhow::Result<Fleet> {
    let from = (1..=UNITS_FROM).map(|n| Ipv4Addr::new(127, 0, 1, n));
    let mut command = Command::new(own_program()?);
    command.args(["bench", "app-sessions", "--name", "gateway"]);
    command.args(["--gateway", &GATEWAY.to_string()]);
    command.arg("--pki").arg(dir.path().join("pki"));
    for (option, value) in [
        ("--sessions", size.sessions.to_string()),
        ("--streams", size.streams.to_string()),
        ("--sample", size.sample.to_string()),
        ("--targets", joined(server_addresses())),
        ("--from", joined(from)),
    ] {
        command.args([option, &value]);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = netns.spawn(command)?;
    let (orders, answers) = (child.stdin.take(), child.stdout.take());
    let (orders, answers) = orders.zip(answers).context("the fleet has no pipes")?;
    Ok(Fleet {
        child,
        orders,
        answers: BufReader::new(answers),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crowd_fits_into_the_descriptors_of_one_process() {
        let wanted = Size {
            sessions: 10_000,
            streams: 100_000,
            sample: 1_000,
        };
        let large = wanted.within(1 << 20);
        assert_eq!((large.sessions, large.streams), (10_000, 100_000));
        let small = wanted.within(20_000);
        assert_eq!((small.sessions, small.streams), (10_000, 9_700));
        let tiny = wanted.within(1_000);
        assert_eq!((tiny.sessions, tiny.streams), (700, 0));
    }
}
