//! What is measured of every system in turn, pass by pass, and how ours compares with the others.

use std::collections::BTreeMap;

use super::super::progress::bar;
use super::goals;
use super::measures::{self, Group};
use super::names::{self, Name};
use super::rows::{Figures, Row};
use super::stand::Stand;
use super::systems::System;
use crate::stdio::say;

/// The figures of each measure and system.
pub type Table = BTreeMap<(Name, System), Figures>;

/// Measures `groups` of every system, pass by pass. What has failed is not tried again: passes are compared one by one,
/// and what follows a gap would be compared with another's.
pub fn measure(
    systems: &[System],
    groups: &[Group],
    passes: u16,
    millis: u64,
) -> anyhow::Result<(Table, Vec<String>)> {
    let mut stands = stands(systems)?;
    let rounds = u64::from(passes) * (groups.len() * stands.len()) as u64;
    let bar = bar("perf", rounds, "measurements");
    let (mut figures, mut failed) = (Table::new(), BTreeMap::new());
    for _ in 0..passes {
        for &group in groups {
            for stand in &mut stands {
                bar.inc(1);
                let tried = (group, stand.system);
                if failed.contains_key(&tried) || !group.is_of(stand.system) {
                    continue;
                }
                match measures::measure(stand, group, millis) {
                    Ok(values) => note(&mut figures, stand.system, values),
                    Err(error) => drop(failed.insert(tried, error)),
                }
            }
        }
    }
    bar.finish_and_clear();
    let told = failed.into_iter().map(|((group, system), error)| {
        format!("{} through {}: {error:#}", group.name(), system.name())
    });
    Ok((figures, told.collect()))
}

/// One pass of one system.
fn note(figures: &mut Table, system: System, values: BTreeMap<Name, f64>) {
    for (name, value) in values {
        let entry = figures.entry((name, system));
        let mine = entry.or_insert_with(|| Figures::new(name, system.name()));
        mine.values.push(value);
    }
}

/// Sets the systems up. One of others that cannot be is named on standard error.
fn stands(systems: &[System]) -> anyhow::Result<Vec<Stand>> {
    let mut stands = Vec::new();
    for &system in systems {
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
pub fn rows(figures: &Table) -> Vec<Row> {
    let mut rows = Vec::new();
    for ((name, system), mine) in figures {
        let proxy = figures.get(&(*name, System::Proxy));
        rows.push(mine.row(proxy.map(|p| (System::Proxy.name(), p))));
        if !system.is_own() {
            continue;
        }
        let best = best(figures, *name, System::is_rival);
        if let Some(best) = best {
            rows.push(mine.row(Some((best.system, best))));
        }
        if goals::is_against_relays(name.0)
            && let Some(relay) = self::best(figures, *name, System::is_relay)
            && best.is_none_or(|best| best.system != relay.system)
        {
            rows.push(mine.row(Some((relay.system, relay))));
        }
        let one = figures.get(&(names::GOODPUT, *system));
        if let (&names::STREAMS, Some(one)) = (name, one) {
            rows.push(mine.row(Some((names::ONE_STREAM, one))));
        }
    }
    rows
}

/// The best of those that are `among`.
fn best(figures: &Table, name: Name, among: fn(System) -> bool) -> Option<&Figures> {
    let theirs = (figures.iter())
        .filter(|((n, system), _)| *n == name && among(*system))
        .map(|(_, figures)| figures);
    // Times and costs are better small, rates and ratios large.
    let by = |a: &&Figures, b: &&Figures| a.median().total_cmp(&b.median());
    match name.1 {
        "us" | "s/GB" => theirs.min_by(by),
        _ => theirs.max_by(by),
    }
}
