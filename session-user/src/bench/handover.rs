//! `holdfast bench handover`: an application runs while its link is cut again and again.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::ensure;

use super::app::{Direction, Pace};
use super::keeper::Keeper;
use super::measure::{HOLDFAST, Mode, Plan, measure};
use super::output::Output;
use super::peers::PeerArgs;
use super::progress::Plans;
use super::rates::Rates;
use super::rowfile::Kept;
use super::scenario::Scenario;

/// Bytes each millisecond and direction of the paced measurement.
const PACED_BYTES: usize = 1000;
/// Cuts of a bulk measurement, at most: each moves hundreds of megabytes.
const BULK_RUNS_MAX: usize = 10;
/// The links' rates of bulk measurements with a round-trip time.
const BULK_RATES: Rates = Rates::both(50);
/// The links' rates where both are used at once: they are not alike.
const STEADY_RATES: Rates = Rates::new([20, 30]);

/// Arguments of `bench handover`.
#[derive(Debug, clap::Args)]
pub struct HandoverArgs {
    /// In a lab of its own: two links in network namespaces, two agents. Needs root.
    #[arg(long)]
    lab: bool,
    /// What happens to the link; several with commas, or `all`.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Scenario::Cut])]
    scenario: Vec<Scenario>,
    /// How streams use the links; several with commas. With --lab. Unless said otherwise `single`, and
    /// `bonded` in `steady`.
    #[arg(long, value_enum, value_delimiter = ',', requires = "lab")]
    mode: Vec<Mode>,
    /// The links' round-trip time in milliseconds; with --lab.
    #[arg(long, default_value_t = 0, requires = "lab")]
    rtt: u16,
    /// The links' rate in Mbit/s, or that of wifi0 and that of lte0 with a comma; bulk measurements
    /// with --rtt have 50 unless said otherwise, and `steady` has 20,30.
    #[arg(long, requires = "lab", value_name = "RATE[,RATE]")]
    rate: Option<Rates>,
    /// Only this direction. `udp-echo`, datagrams, only if it is asked for; with --lab.
    #[arg(long, value_enum)]
    direction: Option<Direction>,
    /// How many cuts.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    runs: u16,
    /// Over IPv6.
    #[arg(long)]
    v6: bool,
    /// Only the paced measurement, not the bulk one.
    #[arg(long)]
    paced_only: bool,
    /// Only the bulk measurement.
    #[arg(long, conflicts_with = "paced_only")]
    bulk_only: bool,
    #[command(flatten)]
    peers: PeerArgs,
    /// Append each row to this file as soon as it is there, as one line of JSON.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Do not measure again what the file of --out has already.
    #[arg(long, requires_all = ["out", "lab"])]
    resume: bool,
    #[command(flatten)]
    output: Output,
    /// Without --lab: the application's server, `holdfast bench app-server` on a host that the
    /// peer reaches. The running agent must capture this command (use `holdfast run`).
    #[arg(long, conflicts_with = "lab")]
    target: Option<SocketAddr>,
    /// Without --lab: the link to cut. It is set down and up again.
    #[arg(long, requires = "target")]
    link: Option<String>,
}

/// Runs the measurement and prints it.
pub fn run(args: &HandoverArgs, control: &Path) -> anyhow::Result<ExitCode> {
    args.output.check()?;
    ensure!(
        args.lab || args.direction != Some(Direction::UdpEcho),
        "udp-echo is measured with --lab"
    );
    let mut keeper = Keeper::new(args.out.as_deref(), args.resume)?;
    let rows = match (args.lab, args.target) {
        (true, _) => in_lab(args, &mut keeper)?,
        (false, Some(target)) => keeper.keep(super::live::run(
            args.link.as_deref(),
            target,
            usize::from(args.runs),
            control,
        )?)?,
        (false, None) => {
            anyhow::bail!("give --lab, or --target and --link to measure the running agent")
        }
    };
    args.output.show(&rows)?;
    let good = rows
        .iter()
        .map(|kept| &kept.row)
        .filter(|r| r.system == HOLDFAST)
        .all(|r| r.survived && r.bytes_lost == 0 && r.app_errors == 0);
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn in_lab(args: &HandoverArgs, keeper: &mut Keeper) -> anyhow::Result<Vec<Kept>> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "--lab makes network namespaces: it needs root"
    );
    let plans = |s: Scenario| args.modes(s).flat_map(move |m| args.plans(s, m)).collect();
    let plans: Vec<Vec<Plan>> = args.scenarios().into_iter().map(plans).collect();
    let peers = args.peers.peers();
    let own = plans.iter().flatten().filter(|_| !args.peers.only_peers);
    let theirs = plans.iter().flat_map(|plans| peers.runs(plans));
    let mut progress = Plans::new(own.map(|plan| plan.runs).chain(theirs));
    let mut rows = Vec::new();
    for plans in &plans {
        if !args.peers.only_peers {
            for plan in plans {
                rows.extend(keeper.rows(HOLDFAST, plan, &mut progress, measure)?);
            }
        }
        // The others carry streams only in this application.
        if args.direction != Some(Direction::UdpEcho) {
            rows.extend(peers.measure(plans, keeper, &mut progress));
        }
    }
    Ok(rows)
}

impl HandoverArgs {
    fn scenarios(&self) -> Vec<Scenario> {
        if self.scenario.contains(&Scenario::All) {
            return Scenario::EACH.to_vec();
        }
        self.scenario.clone()
    }

    /// With `all` scenarios, the other modes run those in which they differ from the single one.
    fn modes(&self, scenario: Scenario) -> impl Iterator<Item = Mode> {
        let all = self.scenario.contains(&Scenario::All);
        let differs = scenario.differs_by_mode();
        let modes = match self.mode.as_slice() {
            [] if scenario.is_steady() => vec![Mode::Bonded],
            [] if all => vec![Mode::Single, Mode::Redundant, Mode::Bonded],
            [] => vec![Mode::Single],
            told => told.to_vec(),
        };
        let fits = move |m: &Mode| *m == Mode::Single || differs || scenario.is_steady() || !all;
        modes.into_iter().filter(fits)
    }

    /// What is measured of a scenario: paced in all directions at once, then bulk.
    fn plans(&self, scenario: Scenario, mode: Mode) -> Vec<Plan> {
        if scenario.is_steady() {
            return self.steady_plans(mode);
        }
        let runs = usize::from(self.runs);
        let rtt = Duration::from_millis(self.rtt.into());
        let wanted = |d: &Direction| self.direction.is_none_or(|only| only == *d);
        let paced = Plan {
            scenario,
            runs,
            v6: self.v6,
            rtt,
            rates: self.rate,
            directions: match self.direction {
                Some(only) => vec![only],
                None => Direction::ALL.to_vec(),
            },
            pace: Pace::PerMillisecond(PACED_BYTES),
            mode,
        };
        let mut plans = Vec::new();
        let each = [Direction::Download, Direction::Upload];
        // Without a limit each cut moves hundreds of megabytes, and two at once fight for the CPU.
        let limited = !rtt.is_zero() || self.rate.is_some();
        let bulk = Plan {
            runs: if limited {
                runs
            } else {
                runs.min(BULK_RUNS_MAX)
            },
            rates: if limited {
                self.rate.or(Some(BULK_RATES))
            } else {
                None
            },
            pace: Pace::Bulk,
            ..paced.clone()
        };
        if !self.bulk_only {
            plans.push(paced);
        }
        if !self.paced_only && self.direction != Some(Direction::UdpEcho) {
            let directions: Vec<Direction> = each.into_iter().filter(wanted).collect();
            if limited && !directions.is_empty() {
                plans.push(Plan { directions, ..bulk });
            } else {
                plans.extend(directions.into_iter().map(|direction| Plan {
                    directions: vec![direction],
                    ..bulk.clone()
                }));
            }
        }
        plans.retain(|plan| !plan.directions.is_empty());
        plans
    }

    /// What is measured while nothing happens: a bulk stream down, then one up.
    fn steady_plans(&self, mode: Mode) -> Vec<Plan> {
        let wanted = |d: &Direction| self.direction.is_none_or(|only| only == *d);
        let directions = [Direction::Download, Direction::Upload];
        let directions = directions.into_iter().filter(wanted);
        let plan = |direction| Plan {
            scenario: Scenario::Steady,
            runs: usize::from(self.runs),
            v6: self.v6,
            rtt: Duration::from_millis(self.rtt.into()),
            rates: self.rate.or(Some(STEADY_RATES)),
            directions: vec![direction],
            pace: Pace::Bulk,
            mode,
        };
        if self.paced_only {
            return Vec::new();
        }
        directions.map(plan).collect()
    }
}
