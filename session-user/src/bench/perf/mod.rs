//! `holdfast bench perf`: what an application gets through Holdfast and through others, in turn, in one run.
//!
//! Every system stands in a lab of its own for the whole run, and each pass goes over all of them: what disturbs the
//! machine for a while disturbs all, and ratios are taken pass by pass.

mod connects;
mod cpu;
mod first;
mod idle;
mod measures;
mod rows;
mod stand;
mod streams;
mod systems;

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::ensure;

use self::measures::{Group, Name};
use self::rows::{Figures, Row};
use self::stand::Stand;
use self::systems::System;
use super::progress::bar;
use crate::stdio::{print_line, say};

pub use connects::{ConnectsArgs, run as app_connects};
pub use first::{FirstByteArgs, app as app_first_byte};
pub use idle::{HoldArgs, app as app_hold};
pub use streams::{StreamsArgs, run as app_streams};

/// Arguments of `bench perf`.
#[derive(Debug, clap::Args)]
pub struct PerfArgs {
    /// What is measured; several with commas. Everything, unless said otherwise.
    #[arg(long, value_enum, value_delimiter = ',')]
    measure: Vec<Group>,
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
    /// As JSON: one array, a row for each measure and system.
    #[arg(long)]
    json: bool,
}

impl PerfArgs {
    fn groups(&self) -> Vec<Group> {
        let wanted = |g: &Group| self.measure.is_empty() || self.measure.contains(g);
        Group::ALL.into_iter().filter(wanted).collect()
    }

    /// What is wanted and here; what is not here is named on standard error.
    fn systems(&self) -> Vec<System> {
        let wanted =
            |s: &System| self.through.is_empty() || self.through.contains(s) || *s == System::Proxy;
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
    let (of_all, own): (Vec<Group>, Vec<Group>) =
        args.groups().into_iter().partition(|g| g.is_of_all());
    let mut all = Vec::new();
    if !of_all.is_empty() {
        all = rows(&in_turn(args, &of_all)?);
    }
    for group in own {
        all.extend(match group {
            Group::FirstByte => first::rows(args.passes)?,
            _ => idle::rows(args.passes)?,
        });
    }
    print(&all, args.json)?;
    Ok(ExitCode::SUCCESS)
}

/// Measures `groups` of every system, pass by pass.
fn in_turn(args: &PerfArgs, groups: &[Group]) -> anyhow::Result<BTreeMap<(Name, System), Figures>> {
    let mut stands = stands(args.systems())?;
    let millis = u64::from(args.seconds) * 1000;
    let rounds = u64::from(args.passes) * (groups.len() * stands.len()) as u64;
    let bar = bar("perf", rounds, "measurements");
    let mut figures: BTreeMap<(Name, System), Figures> = BTreeMap::new();
    for _ in 0..args.passes {
        for group in groups {
            for stand in &mut stands {
                for (name, value) in measures::measure(stand, *group, millis)? {
                    let entry = figures.entry((name, stand.system));
                    let figures = entry.or_insert_with(|| Figures {
                        measure: name.0,
                        system: stand.system.name(),
                        unit: name.1,
                        values: Vec::new(),
                    });
                    figures.values.push(value);
                }
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();
    Ok(figures)
}

/// Sets the systems up. One of others that cannot be is named on standard error.
fn stands(systems: Vec<System>) -> anyhow::Result<Vec<Stand>> {
    let mut stands = Vec::new();
    for system in systems {
        match Stand::new(system) {
            Ok(stand) => stands.push(stand),
            Err(error) if system.is_rival() => say(format_args!(
                "holdfast: {} is skipped: {error:#}",
                system.name()
            )),
            // What we measure, and compare with.
            Err(error) => return Err(error),
        }
    }
    Ok(stands)
}

/// One row for each figure, compared with the proxy; and for ours those that compare it with others.
fn rows(figures: &BTreeMap<(Name, System), Figures>) -> Vec<Row> {
    let mut rows = Vec::new();
    for ((name, system), mine) in figures {
        let proxy = figures.get(&(*name, System::Proxy));
        rows.push(mine.row(proxy.map(|p| (System::Proxy.name(), p))));
        if *system != System::Holdfast {
            continue;
        }
        if let Some(best) = best_rival(figures, *name) {
            rows.push(mine.row(Some((best.system, best))));
        }
        let one = figures.get(&(measures::GOODPUT, *system));
        if let (&measures::STREAMS, Some(one)) = (name, one) {
            rows.push(mine.row(Some(("one stream", one))));
        }
    }
    rows
}

/// The best of the others that encrypt.
fn best_rival(figures: &BTreeMap<(Name, System), Figures>, name: Name) -> Option<&Figures> {
    let theirs = (figures.iter())
        .filter(|((n, system), _)| *n == name && system.is_rival())
        .map(|(_, figures)| figures);
    // Times and costs are better small, rates and ratios large.
    let by = |a: &&Figures, b: &&Figures| a.median().total_cmp(&b.median());
    match name.1 {
        "us" | "s/GB" => theirs.min_by(by),
        _ => theirs.max_by(by),
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
        print_line(format_args!(
            "  {:<12} {:>10.2} ({:.2} to {:.2})  {compared}",
            row.system, row.value, row.min, row.max
        ));
    }
    Ok(())
}
