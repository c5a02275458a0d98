//! A hard handover of a session with very many streams, next to the same with one.

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context;
use session_lab::{Lab, LinkName};

use super::super::app::now_ns;
use super::super::bed::{Bed, BedConfig, own_program};
use super::super::load::Stalls;
use super::super::programs::raise_descriptors;
use super::super::progress::bar;
use super::super::scratch::Scratch;
use super::asked::Asked;
use super::crowd::start_echo;
use super::names::{
    CAPTURED_RATE, MANY_STREAMS, Name, ONE_STREAM, STALL_ALL, STALL_MAX, STALL_MET, STREAMS_LOST,
};
use super::rows::{Figures, Row};
use crate::stdio::say;

/// Each connection asks so often.
const EVERY: Duration = Duration::from_secs(1);
/// One connection alone asks more often, so that every cut meets a question.
const EVERY_ALONE: Duration = Duration::from_millis(10);
/// In so long after a cut every connection has asked.
const WATCHED: Duration = Duration::from_millis(1500);
/// A link that came back is settled, and a standby stands there, within this time.
const READY: Duration = Duration::from_secs(20);
/// The server's ports: each has some 28,000 connections from one address.
const PORTS: std::ops::RangeInclusive<u16> = 7001..=7008;

/// Cuts the link under `streams` streams, `cuts` times, and under one as often.
pub fn rows(streams: usize, cuts: u16) -> anyhow::Result<Vec<Row>> {
    raise_descriptors()?;
    let dir = Scratch::new()?;
    let mut config = BedConfig::new(own_program()?);
    config.accept_extra = format!("max_streams = {}\n", (streams * 2).max(4096));
    let mut bed = Bed::new(dir.path(), config)?;
    let servers: Vec<SocketAddr> = PORTS
        .map(|port| SocketAddr::new(Lab::target(false), port))
        .collect();
    let _server = start_echo(bed.lab.server(), &servers, &[])?;
    let one = cut_under(&mut bed, &servers, 1, EVERY_ALONE, cuts)?;
    let many = cut_under(&mut bed, &servers, streams, EVERY, cuts)?;
    Ok(table(&one, &many))
}

/// What every cut cost, and how fast the connections were made.
struct Cuts {
    /// Each counts what was lost in it and before.
    stalls: Vec<Stalls>,
    opened_per_s: f64,
}

fn cut_under(
    bed: &mut Bed,
    servers: &[SocketAddr],
    streams: usize,
    every: Duration,
    cuts: u16,
) -> anyhow::Result<Cuts> {
    let texts: Vec<String> = servers.iter().map(ToString::to_string).collect();
    let mut command = Command::new(own_program()?);
    command.args(["bench", "app-many", "--server", &texts.join(",")]);
    command.args(["--streams", &streams.to_string()]);
    command.args(["--every-ms", &every.as_millis().to_string()]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let child = bed.spawn_captured(command)?;
    let (mut app, opened) = Asked::open(child, streams).with_context(|| bed.last_words())?;
    app.begin()?;
    let shown = bar(&format!("{streams} streams"), cuts.into(), "cuts");
    let mut stalls = Vec::new();
    for _ in 0..cuts {
        bed.await_link(LinkName::Wifi, READY)?;
        bed.await_standby(LinkName::Lte, READY)?;
        // Every connection has asked in between, and the last cut is over.
        std::thread::sleep(WATCHED);
        let from = now_ns();
        bed.lab.cut(LinkName::Wifi)?;
        // Every connection asks in this time: what it waits for is what is measured.
        std::thread::sleep(WATCHED);
        let before = stalls.last().map_or(0, |s: &Stalls| s.lost);
        let cut = app.stalls(from, now_ns())?;
        if cut.lost > before {
            say(format_args!(
                "holdfast: {} of {streams} streams were lost\n{}",
                cut.lost - before,
                bed.last_words()
            ));
        }
        stalls.push(cut);
        bed.lab.restore(LinkName::Wifi)?;
        shown.inc(1);
    }
    shown.finish_and_clear();
    Ok(Cuts {
        stalls,
        opened_per_s: opened.streams as f64 / opened.seconds,
    })
}

/// One figure of what a cut cost.
type Figure = fn(&Stalls) -> f64;

fn table(one: &Cuts, many: &Cuts) -> Vec<Row> {
    let of = |system, name, cuts: &Cuts, get: Figure| {
        Figures::of(name, system, cuts.stalls.iter().map(get).collect())
    };
    let mut rows = Vec::new();
    let measures: [(Name, Figure); 3] = [
        (STALL_MET, |s| s.met_ms.p95),
        (STALL_ALL, |s| s.streams_ms.p95),
        (STALL_MAX, |s| s.streams_ms.max),
    ];
    for (name, get) in measures {
        let alone = of(ONE_STREAM, name, one, get);
        let all = of(MANY_STREAMS, name, many, get);
        rows.push(all.row(Some((ONE_STREAM, &alone))));
        rows.push(alone.row(None));
    }
    for (system, cuts) in [(MANY_STREAMS, many), (ONE_STREAM, one)] {
        // Of all cuts together: a median would hide what one of them did.
        let lost = cuts.stalls.last().map_or(0, |s| s.lost);
        rows.push(Figures::of(STREAMS_LOST, system, vec![lost as f64]).row(None));
    }
    rows.push(Figures::of(CAPTURED_RATE, MANY_STREAMS, vec![many.opened_per_s]).row(None));
    rows
}

#[cfg(test)]
mod tests {
    use super::super::goals;
    use super::*;

    /// Two of three cuts lose nothing.
    #[test]
    fn what_one_cut_loses_is_a_figure_and_a_missed_goal() {
        let cuts = |lost: [usize; 3]| Cuts {
            stalls: lost
                .map(|lost| Stalls {
                    streams_ms: Default::default(),
                    met_ms: Default::default(),
                    met: 1,
                    lost,
                })
                .to_vec(),
            opened_per_s: 1.0,
        };
        let mut rows = table(&cuts([0; 3]), &cuts([0, 0, 4]));
        goals::judge(&mut rows);
        let lost = rows.iter().filter(|r| r.measure == STREAMS_LOST.0);
        let lost: Vec<_> = lost.map(|r| (r.system, r.value, r.met)).collect();
        assert_eq!(
            lost,
            [
                (MANY_STREAMS, 4.0, Some(false)),
                (ONE_STREAM, 0.0, Some(true))
            ]
        );
    }
}
