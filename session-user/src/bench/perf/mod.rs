//! `holdfast bench perf`: what an application gets through Holdfast and through others, in turn, in one run.
//!
//! Every system stands in a lab of its own for the whole run, and each pass goes over all of them: what disturbs the
//! machine for a while disturbs all, and ratios are taken pass by pass.

mod asked;
mod compression;
mod connects;
mod corpus;
mod cpu;
mod crowd;
mod first;
mod goals;
mod idle;
mod load;
mod many;
mod measures;
mod memory;
mod names;
mod rows;
mod scale;
mod stand;
mod streams;
mod stuck;
mod systems;
mod turns;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};

use self::measures::{Group, Wanted};
use self::systems::System;
use super::host::Host;
use super::html;
use crate::stdio::{print_line, say};

pub use connects::{ConnectsArgs, run as app_connects};
pub use first::{FirstByteArgs, app as app_first_byte};
pub use goals::{IN_WORDS, compared_with, met_and_missed};
pub use idle::{HoldArgs, app as app_hold};
pub use load::{LoadArgs, app as app_load};
pub use rows::Row;
pub use streams::{StreamsArgs, run as app_streams};

/// Streams that are asked for an echo after `scale` has held them.
const SAMPLE: usize = 1_000;

/// Arguments of `bench perf`.
#[derive(Debug, clap::Args)]
pub struct PerfArgs {
    /// What is measured; several with commas. Unless said otherwise everything, but what is about numbers.
    #[arg(long, value_enum, value_delimiter = ',')]
    measure: Vec<Wanted>,
    /// Through what, beside the plain proxy that all are compared with; several with commas. Everything that is
    /// installed, unless said otherwise.
    #[arg(long, value_enum, value_delimiter = ',')]
    through: Vec<System>,
    /// Passes over all systems; the median of each figure counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    passes: u16,
    /// Seconds of each bulk transfer.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=600))]
    seconds: u16,
    /// Sessions that `scale` makes.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    sessions: u32,
    /// Streams that `scale` opens, of all sessions together.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    streams: u32,
    /// Streams of the session that `many` hands over.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    many: u32,
    /// Seconds for which `scale` holds them.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u16).range(0..=36_000))]
    hold: u16,
    /// As JSON: one array, a row for each measure and system.
    #[arg(long)]
    json: bool,
    /// Also as a page for a browser, with plots; it needs nothing from elsewhere.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

impl PerfArgs {
    fn groups(&self) -> Vec<Group> {
        if self.measure.is_empty() {
            return Group::usual();
        }
        let of = |wanted: &Wanted| match wanted {
            Wanted::All => Group::ALL.to_vec(),
            Wanted::One(group) => vec![*group],
        };
        let mut groups: Vec<Group> = self.measure.iter().flat_map(of).collect();
        groups.sort();
        groups.dedup();
        groups
    }

    /// Of each bulk transfer.
    fn millis(&self) -> u64 {
        u64::from(self.seconds) * 1000
    }

    fn held(&self) -> scale::Held {
        scale::Held {
            sessions: self.sessions as usize,
            streams: self.streams as usize,
            sample: SAMPLE,
            time: Duration::from_secs(self.hold.into()),
        }
    }

    /// What `groups` are to be measured of, and is here; what is not here is named on standard error.
    fn systems(&self, groups: &[Group]) -> Vec<System> {
        let asked = |s: System| self.through.is_empty() || self.through.contains(&s);
        let wanted = |s: &System| match s {
            System::Proxy => true,
            System::Early => asked(System::Holdfast) && groups.iter().any(|g| g.is_of(*s)),
            _ => asked(*s),
        };
        let wanted = System::ALL.into_iter().filter(wanted);
        wanted
            .filter(|system| match system.peer().and_then(|p| p.missing()) {
                None => true,
                Some(what) => {
                    say(format_args!(
                        "holdfast: {} is skipped: {what}",
                        system.name()
                    ));
                    false
                }
            })
            .collect()
    }
}

/// Measures and prints.
pub fn run(args: &PerfArgs) -> anyhow::Result<ExitCode> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "it makes network namespaces: it needs root"
    );
    // Better told before the measurement than after.
    if let Some(path) = &args.html {
        html::check_folder(path)?;
    }
    let host = Host::here();
    let groups = args.groups();
    let (of_all, own): (Vec<Group>, Vec<Group>) = groups.iter().partition(|g| g.is_of_all());
    let mut outcome = Outcome::default();
    if !of_all.is_empty() {
        match turns::measure(&args.systems(&of_all), &of_all, args.passes, args.millis()) {
            Ok((figures, failed)) => {
                outcome.rows = turns::rows(&figures);
                outcome.failed = failed;
            }
            Err(error) => outcome
                .failed
                .push(format!("all systems in turn: {error:#}")),
        }
    }
    outcome.of_each(&own, |group| own_rows(args, group));
    outcome.check_names(&groups);
    goals::judge(&mut outcome.rows);
    // Rows first: they took long, and a page can fail to be written.
    print(&outcome.rows, args.json)?;
    if let Some(path) = &args.html {
        std::fs::write(path, html::perf_page(&outcome.rows, &host)?)
            .with_context(|| format!("{} cannot be written", path.display()))?;
    }
    Ok(outcome.end())
}

/// What has been measured, and what has not.
#[derive(Default)]
struct Outcome {
    rows: Vec<Row>,
    /// What went wrong, with the group that it went wrong in.
    failed: Vec<String>,
}

impl Outcome {
    /// Measures one group after the other: what goes wrong with one takes nothing from the others.
    fn of_each(&mut self, groups: &[Group], measure: impl Fn(Group) -> anyhow::Result<Vec<Row>>) {
        for &group in groups {
            match measure(group) {
                Ok(rows) => self.rows.extend(rows),
                Err(error) => self.failed.push(format!("{}: {error:#}", group.name())),
            }
        }
    }

    /// Goals are held against the names that groups say they give: a row of another name would escape them.
    fn check_names(&mut self, groups: &[Group]) {
        for row in &self.rows {
            let named = |group: &Group| group.names(row.measure, row.system, row.ratio_to);
            if !groups.iter().any(named) {
                let what = format!("no group names its row `{}` of {}", row.measure, row.system);
                self.failed.push(what);
            }
        }
    }

    /// Says what went wrong, which makes the command fail.
    fn end(&self) -> ExitCode {
        for why in &self.failed {
            say(format_args!("holdfast: not measured: {why}"));
        }
        if self.failed.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

/// Measures a group that has a set-up of its own.
fn own_rows(args: &PerfArgs, group: Group) -> anyhow::Result<Vec<Row>> {
    let (passes, millis) = (args.passes, args.millis());
    match group {
        Group::FirstByte => first::rows(passes),
        Group::Idle => idle::rows(passes),
        Group::Compression => compression::rows(passes, millis),
        Group::Scale => scale::rows(&args.held()),
        Group::Burst => scale::burst(passes),
        Group::Many => many::rows(args.many as usize, passes),
        Group::Stuck => stuck::rows(passes, millis),
        // Measured of every system in turn.
        Group::Throughput | Group::Streams | Group::Latency | Group::Requests => Ok(Vec::new()),
    }
}

fn print(rows: &[Row], json: bool) -> anyhow::Result<()> {
    if json {
        print_line(serde_json::to_string_pretty(rows)?);
        return Ok(());
    }
    let mut measure = "";
    for row in rows {
        if row.measure != measure {
            measure = row.measure;
            print_line(format_args!("{measure}, {}", row.unit));
        }
        let compared = match (row.ratio, row.ratio_to) {
            (Some(ratio), Some(to)) => format!("{ratio:.2} x {to}"),
            _ => String::new(),
        };
        let goal = match (row.goal, row.met) {
            (Some(goal), Some(true)) => format!("goal {goal}: met"),
            (Some(goal), Some(false)) => format!("goal {goal}: MISSED"),
            (Some(goal), None) => format!("goal {goal}: no verdict"),
            _ => String::new(),
        };
        let range = format!("({:.2} to {:.2})", row.min, row.max);
        let line = format!(
            "  {:<17} {:>10.2} {range:<22} {compared:<20} {goal}",
            row.system, row.value
        );
        print_line(line.trim_end());
    }
    let (met, missed) = met_and_missed(rows);
    let open = rows.iter().filter(|r| r.goal.is_some() && r.met.is_none());
    let open = open.count();
    if met + missed > 0 {
        print_line(format_args!("{met} goals met, {missed} missed"));
    }
    if open > 0 {
        print_line(format_args!(
            "{open} goals without a verdict, which takes {} passes",
            goals::PASSES_MIN
        ));
    }
    Ok(())
}

#[cfg(test)]
pub mod tests {
    //! Rows as a measurement has them.

    use clap::Parser;

    use super::names::Name;
    use super::rows::Figures;
    use super::*;

    #[derive(clap::Parser)]
    struct Typed {
        #[command(flatten)]
        args: PerfArgs,
    }

    fn typed(words: &[&str]) -> Result<PerfArgs, clap::Error> {
        let words = ["perf"].iter().chain(words);
        Typed::try_parse_from(words).map(|typed| typed.args)
    }

    #[test]
    fn both_ways_to_connect_are_measured_where_connections_are() {
        let ours = |words: &[&str]| {
            let args = typed(words).unwrap();
            let systems = args.systems(&args.groups());
            let ours = systems.into_iter().filter(|s| s.is_own());
            ours.collect::<Vec<_>>()
        };
        let both = [System::Holdfast, System::Early];
        assert_eq!(ours(&["--through", "holdfast"]), both);
        let throughput = ["--through", "holdfast", "--measure", "throughput"];
        assert_eq!(ours(&throughput), [System::Holdfast]);
        assert_eq!(ours(&["--through", "direct"]), []);
        assert!(typed(&["--through", "early"]).is_err());
    }

    #[test]
    fn all_is_every_group_once() {
        let groups = |words: &[&str]| typed(words).unwrap().groups();
        assert_eq!(groups(&["--measure", "burst,all,burst"]), Group::ALL);
        assert_eq!(
            groups(&["--measure", "stuck,idle"]),
            [Group::Idle, Group::Stuck]
        );
        let usual = groups(&[]);
        assert!(usual.contains(&Group::Throughput) && !usual.contains(&Group::Scale));
    }

    #[test]
    fn one_that_fails_takes_nothing_from_the_others() {
        let mut outcome = Outcome::default();
        let groups = [Group::Burst, Group::Many, Group::Stuck];
        outcome.of_each(&groups, |group| {
            anyhow::ensure!(group != Group::Many, "the link is gone");
            let [given, ..] = group.gives() else {
                anyhow::bail!("it gives nothing")
            };
            let name = (given.measure, "1");
            Ok(vec![
                Figures::of(name, given.systems[0], vec![1.0]).row(None),
            ])
        });
        assert_eq!(outcome.rows.len(), 2);
        assert_eq!(outcome.failed, ["many: the link is gone"]);
        outcome.check_names(&groups);
        assert_eq!(outcome.failed.len(), 1);
        // What no group that was asked for gives.
        outcome.check_names(&[Group::Burst]);
        assert_eq!(outcome.failed.len(), 2);
        assert_eq!(outcome.end(), ExitCode::FAILURE);
        assert_eq!(Outcome::default().end(), ExitCode::SUCCESS);
    }

    /// Holdfast and the proxy, with one goal that is met and one that is not.
    pub fn rows() -> Vec<Row> {
        let figures = |name: Name, system: System, values: &[f64]| {
            Figures::of(name, system.name(), values.to_vec())
        };
        let proxy = figures(names::GOODPUT, System::Proxy, &[90.0, 100.0, 110.0]);
        let ours = figures(names::GOODPUT, System::Holdfast, &[88.0, 97.0, 106.0]);
        let slowest = figures(names::SLOWEST, System::Holdfast, &[0.6; 3]);
        let mut rows = vec![
            ours.row(Some((proxy.system, &proxy))),
            proxy.row(Some((proxy.system, &proxy))),
            slowest.row(None),
        ];
        goals::judge(&mut rows);
        rows
    }
}
