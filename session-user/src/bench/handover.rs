//! `holdfast bench handover`: an application runs while its link is cut again and again.

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::ensure;

use super::app::{Direction, Pace};
use super::measure::{HOLDFAST, Plan, measure};
use super::peers::PeerArgs;
use super::report::{Row, print_rows};
use super::scenario::Scenario;

/// Bytes each millisecond and direction of the paced measurement.
const PACED_BYTES: usize = 1000;
/// Cuts of a bulk measurement, at most: each moves hundreds of megabytes.
const BULK_RUNS_MAX: usize = 10;
/// The links' rate of bulk measurements with a round-trip time, in Mbit/s.
const BULK_MBIT: u32 = 50;

/// Arguments of `bench handover`.
#[derive(Debug, clap::Args)]
pub struct HandoverArgs {
    /// In a lab of its own: two links in network namespaces, two agents. Needs root.
    #[arg(long)]
    lab: bool,
    /// What happens to the link; several with commas, or `all`.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Scenario::Cut])]
    scenario: Vec<Scenario>,
    /// The links' round-trip time in milliseconds; with --lab.
    #[arg(long, default_value_t = 0, requires = "lab")]
    rtt: u16,
    /// The links' rate in Mbit/s; bulk measurements with --rtt have 50 unless said otherwise.
    #[arg(long, requires = "lab")]
    rate: Option<u32>,
    /// Only this direction.
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
    /// As JSON: one array, a row for each direction and pace.
    #[arg(long)]
    json: bool,
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
    let rows = match (args.lab, args.target) {
        (true, _) => in_lab(args)?,
        (false, Some(target)) => super::live::run(
            args.link.as_deref(),
            target,
            usize::from(args.runs),
            control,
        )?,
        (false, None) => {
            anyhow::bail!("give --lab, or --target and --link to measure the running agent")
        }
    };
    print_rows(&rows, args.json)?;
    let good = rows
        .iter()
        .filter(|r| r.system == HOLDFAST)
        .all(|r| r.survived && r.bytes_lost == 0 && r.app_errors == 0);
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn in_lab(args: &HandoverArgs) -> anyhow::Result<Vec<Row>> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "--lab makes network namespaces: it needs root"
    );
    let mut rows = Vec::new();
    let peers = args.peers.peers();
    for scenario in args.scenarios() {
        let plans = args.plans(scenario);
        if !args.peers.only_peers {
            for plan in &plans {
                rows.extend(measure(plan)?);
            }
        }
        rows.extend(peers.measure(&plans));
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

    /// What is measured of a scenario: paced in all directions at once, then bulk.
    fn plans(&self, scenario: Scenario) -> Vec<Plan> {
        let runs = usize::from(self.runs);
        let rtt = Duration::from_millis(self.rtt.into());
        let wanted = |d: &Direction| self.direction.is_none_or(|only| only == *d);
        let paced = Plan {
            scenario,
            runs,
            v6: self.v6,
            rtt,
            rate: self.rate,
            directions: Direction::ALL.into_iter().filter(wanted).collect(),
            pace: Pace::PerMillisecond(PACED_BYTES),
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
            rate: if limited {
                self.rate.or(Some(BULK_MBIT))
            } else {
                None
            },
            pace: Pace::Bulk,
            ..paced.clone()
        };
        if !self.bulk_only {
            plans.push(paced);
        }
        if !self.paced_only {
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
}
