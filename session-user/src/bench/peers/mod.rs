//! The systems that Holdfast is measured against: the same application, lab and disturbances, with
//! another system in between. One file for each system; `run.rs` measures any of them.

mod attempt;
mod follow;
mod mptcp;
mod openvpn;
mod quic;
mod quic_client;
mod quic_server;
mod run;
mod site;
mod tcp;
mod wireguard;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use super::keeper::Keeper;
use super::measure::{Mode, Plan};
use super::progress::Plans;
use super::rowfile::Kept;
use super::scenario::Scenario;
use crate::stdio::say;
pub use quic::SERVER_NAME;
pub use site::{Host, Site, Way, ask};

/// What the application can run through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Against {
    /// A plain TCP connection.
    Tcp,
    /// The kernel's multipath TCP, a subflow on each link, with the kernel's own path manager.
    Mptcp,
    /// The same with a path manager that removes the address of a link that is lost.
    MptcpPm,
    /// A tunnel over QUIC (quinn), whose client moves when a link is lost.
    Quic,
    /// The same, which also moves when nothing comes back for 30 ms.
    QuicProbe,
    /// A tunnel of wireguard-go, whose route follows the links.
    Wireguard,
    /// A tunnel of OpenVPN with `float`, whose route follows the links.
    Openvpn,
    /// Every one of them.
    All,
}

impl Against {
    const EACH: [Self; 7] = [
        Self::Tcp,
        Self::Mptcp,
        Self::MptcpPm,
        Self::Quic,
        Self::QuicProbe,
        Self::Wireguard,
        Self::Openvpn,
    ];

    /// The system; None for all of them.
    pub fn peer(self) -> Option<Box<dyn Peer>> {
        Some(match self {
            Self::Tcp => Box::new(tcp::Tcp),
            Self::Mptcp => Box::new(mptcp::Mptcp { manager: false }),
            Self::MptcpPm => Box::new(mptcp::Mptcp { manager: true }),
            Self::Quic => Box::new(quic::Quic { probe: false }),
            Self::QuicProbe => Box::new(quic::Quic { probe: true }),
            Self::Wireguard => Box::new(wireguard::Wireguard),
            Self::Openvpn => Box::new(openvpn::OpenVpn),
            Self::All => return None,
        })
    }
}

/// Options of `bench handover` about other systems.
#[derive(Clone, Debug, clap::Args)]
pub struct PeerArgs {
    /// Other systems to measure in the same way, after Holdfast; several with commas, or `all`. One
    /// that is not installed is skipped.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        value_name = "LIST",
        requires = "lab"
    )]
    against: Vec<Against>,
    /// How many cuts for each of them. A connection that nothing arrives on for 10 s has died.
    #[arg(long, default_value_t = 10, requires = "against", value_parser = clap::value_parser!(u16).range(1..=1000))]
    peer_runs: u16,
    /// Only them, not Holdfast.
    #[arg(long, requires = "against")]
    pub only_peers: bool,
}

impl PeerArgs {
    /// The wanted systems that this host has; the others are named on standard error.
    pub fn peers(&self) -> Peers {
        let wanted: Vec<Against> = Against::EACH
            .into_iter()
            .filter(|one| self.against.contains(one) || self.against.contains(&Against::All))
            .collect();
        let mut here = Vec::new();
        for peer in wanted.into_iter().filter_map(Against::peer) {
            match peer.missing() {
                None => here.push(peer),
                Some(what) => say(format_args!(
                    "holdfast: {} is skipped: {what} (`cargo xtask setup --peers` installs what peers need)",
                    peer.name()
                )),
            }
        }
        Peers {
            here,
            runs: usize::from(self.peer_runs),
        }
    }
}

/// The systems that are measured.
pub struct Peers {
    here: Vec<Box<dyn Peer>>,
    runs: usize,
}

impl Peers {
    /// How many cuts each plan of each system takes, `plans` being those of one scenario.
    pub fn runs<'a>(&'a self, plans: &'a [Plan]) -> impl Iterator<Item = usize> + 'a {
        let count = theirs(plans).count();
        let scenario = plans.first().map(|plan| plan.scenario);
        let here = (self.here.iter())
            .filter(move |peer| scenario.is_some_and(|s| peer.lacks(s).is_none()));
        here.flat_map(move |_| std::iter::repeat_n(self.runs, count))
    }

    /// Measures all of them as `plans` say, which are of one scenario. One that fails is named on
    /// standard error and has no row.
    pub fn measure(&self, plans: &[Plan], keeper: &mut Keeper, progress: &mut Plans) -> Vec<Kept> {
        let mut rows = Vec::new();
        let Some(scenario) = plans.first().map(|plan| plan.scenario) else {
            return rows;
        };
        for peer in &self.here {
            if let Some(why) = peer.lacks(scenario) {
                say(format_args!(
                    "holdfast: {} is skipped in {}: {why}",
                    peer.name(),
                    scenario.name()
                ));
                continue;
            }
            for plan in theirs(plans) {
                let plan = Plan {
                    runs: self.runs,
                    ..plan
                };
                let measure = |plan: &Plan| run::measure(peer.as_ref(), plan);
                match keeper.rows(peer.name(), &plan, progress, measure) {
                    Ok(more) => rows.extend(more),
                    Err(error) => say(format_args!(
                        "holdfast: {} could not be measured in {}: {error:#}",
                        peer.name(),
                        plan.label()
                    )),
                }
            }
        }
        rows
    }
}

/// They have no modes: each runs as it is, once for what Holdfast may do in several.
fn theirs(plans: &[Plan]) -> impl Iterator<Item = Plan> {
    let steady = plans.first().filter(|plan| plan.scenario.is_steady());
    let wanted = steady.map_or(Mode::Single, |plan| plan.mode);
    let plans = plans.iter().filter(move |plan| plan.mode == wanted);
    plans.cloned().map(|plan| Plan {
        mode: Mode::Single,
        ..plan
    })
}

/// A system that carries the application's connections across the lab.
pub trait Peer {
    /// As on the command line and in reports.
    fn name(&self) -> &'static str;

    /// What it needs and this host does not have.
    fn missing(&self) -> Option<String> {
        None
    }

    /// Why a scenario means nothing for it.
    fn lacks(&self, scenario: Scenario) -> Option<&'static str> {
        match scenario {
            Scenario::Soft => Some("nobody can tell it to move while its link works"),
            _ => None,
        }
    }

    /// Whether its connections move to the other link when theirs is lost.
    fn survives_a_cut(&self) -> bool {
        true
    }

    /// Whether it sends over both links while nothing happens.
    fn uses_both_links(&self) -> bool {
        false
    }

    /// Options of the application's programs, at both ends.
    fn app_options(&self) -> &'static [&'static str] {
        &[]
    }

    /// `TCP_USER_TIMEOUT` of the application's client; zero: the kernel's default.
    fn user_timeout(&self) -> Duration {
        Duration::ZERO
    }

    /// Starts it between client and server. It is ready to carry connections on return.
    fn start(&self, site: &Site<'_>) -> anyhow::Result<Way>;
}

/// Where a program is installed.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Users' PATH often lacks the folder of system programs.
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin")])
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}

/// The same, or the bare name, so that a failure to start it names it.
pub fn path_of(program: &str) -> PathBuf {
    find(program).unwrap_or_else(|| PathBuf::from(program))
}

/// Which of `programs` are not installed, in words.
pub fn not_installed(programs: &[&str]) -> Option<String> {
    let missing: Vec<&str> = programs
        .iter()
        .copied()
        .filter(|p| find(p).is_none())
        .collect();
    (!missing.is_empty()).then(|| format!("{} is not installed", missing.join(" and ")))
}

/// Programs of ours that stand beside or in a peer.
#[derive(Debug, clap::Subcommand)]
pub enum PeerProgram {
    /// The tunnel's end at the server.
    QuicServer(quic_server::ServerArgs),
    /// The tunnel's end at the client.
    QuicClient(quic_client::ClientArgs),
    /// Keeps the route to an address on the best link.
    FollowRoute(follow::FollowArgs),
    /// Keeps the kernel's MPTCP endpoints those of the links that work.
    FollowEndpoints(follow::FollowArgs),
}

/// Runs one of them until it is killed.
pub fn run_program(program: &PeerProgram) -> anyhow::Result<ExitCode> {
    match program {
        PeerProgram::QuicServer(args) => quic_server::run(args)?,
        PeerProgram::QuicClient(args) => quic_client::run(args)?,
        PeerProgram::FollowRoute(args) => follow::route(args)?,
        PeerProgram::FollowEndpoints(args) => follow::endpoints(args)?,
    }
    Ok(ExitCode::SUCCESS)
}
