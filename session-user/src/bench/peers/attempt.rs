//! The application over a peer, from its start until it ends or dies: a server, the peer's programs,
//! and one client for each direction.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use session_lab::{Lab, LinkName};

use super::super::app::{Direction, now_ns};
use super::super::arrivals::Arrivals;
use super::super::bed::{Bed, Running};
use super::super::cuts::{Conditions, Cut, Ends, row};
use super::super::measure::Plan;
use super::super::programs::{Client, Server, collect};
use super::super::report::Row;
use super::Peer;
use super::site::{Site, Way};

/// Time for what is under way to arrive once the application stops sending.
const FINISH_LIMIT: Duration = Duration::from_secs(30);
/// The same where it has died: the programs are only to say what they saw.
const GIVE_UP_LIMIT: Duration = Duration::from_secs(3);
/// Bytes arrive steadily when no gap is longer than this, beside a round trip.
const STEADY_GAP: Duration = Duration::from_millis(100);

/// The end of an attempt's connections.
#[derive(Clone, Copy, Debug)]
pub struct Death {
    /// In words.
    pub why: &'static str,
    /// In which run of the row, counted from 1.
    pub run: usize,
}

/// The application over a peer.
pub struct Attempt {
    way: Way,
    clients: Vec<Client>,
    server: Server,
    dir: PathBuf,
}

impl Attempt {
    /// Starts all of it; `dir` is a folder for it alone.
    pub fn start(peer: &dyn Peer, bed: &Bed, plan: &Plan, dir: PathBuf) -> anyhow::Result<Self> {
        fs::create_dir(&dir)?;
        let options = |mut command: Command| {
            command.args(peer.app_options());
            command
        };
        let listen = SocketAddr::new(Lab::target(plan.v6), 0);
        let server = Server::start(listen, &dir, |command| {
            let mut command = options(command);
            command.arg("--until-eof").stdin(Stdio::piped());
            bed.lab.server().spawn(command)
        })?;
        let site = Site {
            lab: &bed.lab,
            dir: &dir,
            v6: plan.v6,
            server: server.addr,
        };
        let way = peer.start(&site)?;
        let start =
            |command| -> std::io::Result<Child> { bed.lab.client().spawn(options(command)) };
        let clients = plan.directions.iter().map(|&direction| {
            Client::start(
                way.dial,
                direction,
                plan.pace,
                peer.user_timeout(),
                dir.join(direction.name()),
                start,
            )
        });
        let clients = clients.collect::<anyhow::Result<_>>()?;
        Ok(Self {
            way,
            clients,
            server,
            dir,
        })
    }

    /// Fails if one of the peer's programs has ended.
    pub fn check(&mut self) -> anyhow::Result<()> {
        self.way.check()
    }

    /// Whether bytes arrive in every direction without long gaps, since `window` ago until now.
    pub fn is_steady(&self, window: Duration, rtt: Duration) -> bool {
        let now = now_ns();
        let from = now.saturating_sub(window.as_nanos() as u64);
        let allowed = (STEADY_GAP + rtt).as_secs_f64() * 1e3;
        self.clients.iter().all(|client| {
            let tail = Arrivals::read_tail(&self.file(client)).unwrap_or_default();
            tail.span()
                .is_some_and(|(first, _)| tail.longest_gap_ms(from.max(first), now) < allowed)
        })
    }

    /// Whether something has arrived in every direction since `from` (nanoseconds).
    pub fn has_arrivals_since(&self, from: u64) -> bool {
        self.clients.iter().all(|client| {
            let tail = Arrivals::read_tail(&self.file(client)).unwrap_or_default();
            tail.span().is_some_and(|(_, last)| last >= from)
        })
    }

    /// Whether every client has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        self.clients.iter_mut().all(Client::ended)
    }

    /// Whether one of them has.
    pub fn has_lost_one(&mut self) -> bool {
        self.clients.iter_mut().any(Client::ended)
    }

    /// Freezes the peer's programs on the client's host, or lets them go on.
    pub fn freeze(&self, frozen: bool) -> anyhow::Result<()> {
        let signal = if frozen {
            Signal::SIGSTOP
        } else {
            Signal::SIGCONT
        };
        for pid in self.way.at_client.iter().map(Running::pid) {
            kill(Pid::from_raw(pid.cast_signed()), signal)
                .context("the peer's program cannot be frozen")?;
        }
        Ok(())
    }

    /// Where a client's arrivals are; those of an upload are the server's, which has no others.
    fn file(&self, client: &Client) -> PathBuf {
        if client.direction != Direction::Upload {
            return client.arrivals.clone();
        }
        served(&self.dir).unwrap_or_else(|| client.arrivals.clone())
    }

    /// Ends the application, in order or as it is if it is `dead`; a row for each direction.
    pub fn finish(
        mut self,
        lab: &Lab,
        conditions: &Conditions,
        cuts: &[Cut],
        dead: Option<Death>,
    ) -> anyhow::Result<Vec<(Direction, Row)>> {
        if dead.is_none() {
            self.clients.iter_mut().for_each(Client::stop);
        }
        let mut ends = Vec::new();
        for mut client in std::mem::take(&mut self.clients) {
            let (direction, arrivals) = (client.direction, self.file(&client));
            let seen = match dead {
                Some(Death { why, .. }) if !client.ended() => {
                    let mut seen = client.give_up(GIVE_UP_LIMIT)?;
                    // What a socket says of being given up is no error of the system's.
                    seen.errors = vec![why.to_owned()];
                    seen
                }
                Some(_) => client.finish(GIVE_UP_LIMIT)?,
                None => client.finish(FINISH_LIMIT)?,
            };
            ends.push((direction, arrivals, seen));
        }
        if dead.is_some() {
            self.server.give_up();
        }
        let limit = if dead.is_some() {
            GIVE_UP_LIMIT
        } else {
            FINISH_LIMIT
        };
        let mut reports = collect(&self.server, ends.len(), limit);
        let mut rows = Vec::new();
        for (direction, arrivals, mut seen) in ends {
            let mut served = reports.remove(direction.name());
            if let (Some(_), Some(served)) = (dead, &mut served) {
                served.seen.errors.clear();
                if direction == Direction::Upload {
                    // The server's answer did not come any more; this is what it would have said.
                    seen.received = served.seen.received;
                }
            }
            if !arrivals.exists() {
                fs::write(&arrivals, [])?;
            }
            let ends = Ends {
                direction,
                arrivals: &arrivals,
                seen: &seen,
                served: served.as_ref(),
                died_in: dead.map(|death| death.run),
            };
            rows.push((direction, row(conditions, cuts, &ends)?));
        }
        self.way.end(lab);
        Ok(rows)
    }
}

/// The file of an upload's arrivals in the server's folder.
fn served(dir: &Path) -> Option<PathBuf> {
    let mut files = fs::read_dir(dir).ok()?.flatten();
    let file = files.find(|file| file.file_name().to_string_lossy().starts_with("served-"))?;
    Some(file.path())
}

/// Bytes that a link of the client's has carried in both directions (proc_net(5)).
pub fn carried(lab: &Lab, link: LinkName) -> anyhow::Result<u64> {
    let text = lab
        .client()
        .run(|| fs::read_to_string("/proc/thread-self/net/dev"))?;
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix(link.name())?.strip_prefix(':'))
        .with_context(|| format!("{} is not there", link.name()))?;
    let count = |column: usize| -> anyhow::Result<u64> {
        let word = line.split_whitespace().nth(column);
        Ok(word.context("a column is missing")?.parse()?)
    };
    // Eight columns of what was received, then of what was sent.
    Ok(count(0)? + count(8)?)
}
