//! A fleet for one gateway: units that are who they say, each with a TCP connection, a full handshake and a session of
//! its own. Beside it the servers that such a fleet speaks with, and an application with many connections.
//!
//! `app-sessions` obeys a word on each line of standard input, answers each with a line of JSON, and ends with its
//! input: `sessions` makes them, `streams` opens every unit's streams, `check` asks whether all live and some echo.

mod echo;
mod fleet;
mod many;
mod tally;
mod unit;

use std::io::{BufRead, BufReader};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::{bail, ensure};
use serde::{Deserialize, Serialize};

use crate::stdio::print_line;

pub use echo::{EchoArgs, app as app_echo};
pub use many::{ManyArgs, Opened, Stalls, app as app_many};

/// Arguments of the hidden `bench app-sessions`.
#[derive(Debug, Clone, clap::Args)]
pub struct FleetArgs {
    /// The gateway.
    #[arg(long)]
    gateway: SocketAddr,
    /// The gateway's name.
    #[arg(long)]
    name: String,
    /// Folder of the CA, with the certificate and key of a unit called `client`.
    #[arg(long)]
    pki: PathBuf,
    /// How many units.
    #[arg(long)]
    sessions: usize,
    /// Streams, of all units together.
    #[arg(long)]
    streams: usize,
    /// Servers that return every byte; streams lead to one after the other.
    #[arg(long, value_delimiter = ',', required = true)]
    targets: Vec<SocketAddr>,
    /// Local addresses; units have one after the other.
    #[arg(long, value_delimiter = ',', required = true)]
    from: Vec<IpAddr>,
    /// Streams that are asked by `check`.
    #[arg(long, default_value_t = 1000)]
    sample: usize,
}

/// What the fleet is told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// Every unit makes its session.
    Sessions,
    /// Every unit opens its streams.
    Streams,
    /// Every unit asks the gateway whether it lives; some of the streams are asked as well.
    Check,
}

impl Word {
    /// As it is typed.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sessions => "sessions",
            Self::Streams => "streams",
            Self::Check => "check",
        }
    }
}

impl FromStr for Word {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let all = [Self::Sessions, Self::Streams, Self::Check];
        match all.into_iter().find(|word| word.as_str() == text) {
            Some(word) => Ok(word),
            None => bail!("`{text}` is none of sessions, streams and check"),
        }
    }
}

/// What came of an order.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Done {
    /// Sessions or streams that were to be made, or sessions that were asked.
    pub wanted: usize,
    /// Of these, those that stand; of a check, those whose transport answers.
    pub good: usize,
    /// Streams that were asked.
    pub asked: usize,
    /// Of these, those that answered with what was sent to them.
    pub echoed: usize,
    /// How long it took.
    pub seconds: f64,
    /// The first thing that went wrong.
    pub trouble: Option<String>,
}

/// Obeys until standard input ends.
pub fn app_sessions(args: &FleetArgs) -> anyhow::Result<ExitCode> {
    super::programs::raise_descriptors()?;
    ensure!(args.sessions > 0, "a fleet has at least one unit");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let mut fleet = fleet::Fleet::new(args, runtime.handle().clone())?;
    for line in BufReader::new(std::io::stdin()).lines() {
        let done = runtime.block_on(fleet.obey(line?.trim().parse()?))?;
        print_line(serde_json::to_string(&done)?);
    }
    // Nobody waits for ten thousand goodbyes.
    runtime.shutdown_background();
    Ok(ExitCode::SUCCESS)
}
