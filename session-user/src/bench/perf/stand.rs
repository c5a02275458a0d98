//! One system, set up in a lab of its own, with the application's server behind it.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use serde::de::DeserializeOwned;
use session_lab::{Lab, Netns};

use super::super::bed::{Bed, BedConfig, Running, own_program};
use super::super::peers::{Site, Way};
use super::super::programs::Server;
use super::super::scratch::Scratch;
use super::cpu::tree_seconds;
use super::names::{CLIENT, GATEWAY};
use super::systems::System;

/// Time for the server to say what it saw of a connection that has ended.
const SERVED_LIMIT: Duration = Duration::from_secs(30);

/// Thousands of connections a second leave more ports in TIME-WAIT than there are, or than the kernel keeps in a namespace: passes that
/// follow each other would be slower for that alone. So ports are used again after a second, whoever connects (ip-sysctl.rst).
const MANY_CONNECTIONS: [(&str, &str); 2] = [
    ("net/ipv4/tcp_tw_reuse", "1"),
    ("net/ipv4/tcp_max_tw_buckets", "131072"),
];

/// A system that stands; its end ends it.
pub struct Stand {
    /// Which.
    pub system: System,
    way: Option<Way>,
    server: Server,
    bed: Bed,
    _dir: Scratch,
}

/// Processor time so far, in seconds.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    /// Of the two ends of the system.
    pub ends: f64,
    /// Of the application's server.
    pub server: f64,
}

impl Stand {
    /// Sets `system` up.
    pub fn new(system: System) -> anyhow::Result<Self> {
        Self::with(system, |_| {})
    }

    /// The same in a bed that is changed first.
    pub fn with(system: System, change: impl FnOnce(&mut BedConfig)) -> anyhow::Result<Self> {
        let dir = Scratch::new()?;
        let mut config = BedConfig::new(own_program()?);
        config.holdfast = system.is_own();
        if system == System::Early {
            config.capture_extra.push_str("connect = \"early\"\n");
        }
        change(&mut config);
        let bed = Bed::new(dir.path(), config)?;
        for host in [bed.lab.client(), bed.lab.server()] {
            for (key, value) in MANY_CONNECTIONS {
                host.sysctl(key, value)?;
            }
        }
        let server = Server::start(SocketAddr::new(Lab::target(false), 0), dir.path(), |c| {
            bed.lab.server().spawn(c)
        })?;
        let way = match system.peer() {
            None => None,
            Some(peer) => Some(peer.start(&Site {
                lab: &bed.lab,
                dir: dir.path(),
                v6: false,
                server: server.addr,
            })?),
        };
        Ok(Self {
            system,
            way,
            server,
            bed,
            _dir: dir,
        })
    }

    /// What the system's ends and the server have used.
    pub fn cpu(&self) -> anyhow::Result<Cpu> {
        let agents = [&self.bed.client_agent, &self.bed.gateway_agent];
        let ours = agents.into_iter().flatten();
        let theirs = self
            .way
            .iter()
            .flat_map(|w| w.at_client.iter().chain(&w.at_server));
        let mut ends = 0.0;
        for program in ours.chain(theirs) {
            ends += tree_seconds(program.pid())?;
        }
        let server = tree_seconds(self.server.pid())?;
        Ok(Cpu { ends, server })
    }

    /// Runs one of the application's programs to its end; returns what it printed.
    pub fn run<T: DeserializeOwned>(
        &mut self,
        program: &str,
        arguments: &[&str],
    ) -> anyhow::Result<T> {
        if let Some(way) = &mut self.way {
            way.check()?;
        }
        for agent in [&mut self.bed.client_agent, &mut self.bed.gateway_agent] {
            agent.iter_mut().try_for_each(Running::check)?;
        }
        let child = self.spawn(program, arguments)?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let agents = (self.system.is_own()).then(|| self.bed.last_words());
            bail!(
                "{program} through {}: {}{}",
                self.system.name(),
                said.trim(),
                agents.map_or_else(String::new, |words| format!("\n{words}"))
            );
        }
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("{program} printed nothing of use"))
    }

    /// Starts one of the application's programs, with pipes.
    pub fn spawn(&self, program: &str, arguments: &[&str]) -> anyhow::Result<Child> {
        let dial = self.way.as_ref().map_or(self.server.addr, |way| way.dial);
        let mut command = Command::new(own_program()?);
        command.args(["bench", program, "--server", &dial.to_string()]);
        command.args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(Stdio::piped());
        let child = if self.system.is_own() {
            self.bed.spawn_captured(command)?
        } else {
            self.bed.lab.client().spawn(command)?
        };
        Ok(child)
    }

    /// Starts any program where applications are captured.
    pub fn spawn_captured(&self, command: Command) -> anyhow::Result<Child> {
        Ok(self.bed.spawn_captured(command)?)
    }

    /// Where the application's server is.
    pub fn server_netns(&self) -> &Netns {
        self.bed.lab.server()
    }

    /// Our agents and their processes; none for another system.
    pub fn agents(&self) -> Vec<(&'static str, u32)> {
        let named = |name, agent: &Option<Running>| Some((name, agent.as_ref()?.pid()));
        let client = named(CLIENT, &self.bed.client_agent);
        let gateway = named(GATEWAY, &self.bed.gateway_agent);
        client.into_iter().chain(gateway).collect()
    }

    /// What the client's session and the gateway's hold for the peer and for applications, in bytes.
    pub fn held_bytes(&self) -> anyhow::Result<[usize; 2]> {
        let sessions = [self.bed.session(), self.bed.gateway_session()];
        let held = sessions.map(|s| s.map(|s| s.memory_bytes));
        match held {
            [Some(client), Some(gateway)] => Ok([client, gateway]),
            _ => anyhow::bail!("no session stands"),
        }
    }

    /// Waits until the server has seen so many connections end.
    pub fn await_served(&self, connections: usize) -> anyhow::Result<()> {
        for _ in 0..connections {
            self.server
                .next_served(SERVED_LIMIT)
                .context("the server did not see a connection end")?;
        }
        Ok(())
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        if let Some(way) = self.way.take() {
            way.end(&self.bed.lab);
        }
    }
}
