//! One gateway with very many sessions and streams, and many new streams at once.

use std::time::Duration;

use anyhow::ensure;

use super::super::load::{Done, Word};
use super::super::progress::bar;
use super::crowd::{Crowd, Size};
use super::names::{self, GATEWAY, Name};
use super::rows::{Figures, Row};
use crate::stdio::say;

/// What was needed only to make sessions or streams is given back by then.
const SETTLED: Duration = Duration::from_secs(5);
/// New streams of one session.
const BURST: usize = 5_000;

/// What the gateway is asked to hold, and for how long: what it can hold is judged by that.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// Sessions.
    pub sessions: usize,
    /// Streams of all of them.
    pub streams: usize,
    /// Streams that are to be asked at the end.
    pub sample: usize,
    /// How long.
    pub time: Duration,
}

/// Makes the sessions, opens their streams, holds them, and asks who lives.
pub fn rows(held: &Held) -> anyhow::Result<Vec<Row>> {
    let mut crowd = Crowd::new(Size {
        sessions: held.sessions,
        streams: held.streams,
        sample: held.sample,
    })?;
    let empty = crowd.memory()?;
    let sessions = tell(crowd.order(Word::Sessions)?);
    std::thread::sleep(SETTLED);
    let with_sessions = crowd.memory()?;
    let streams = tell(crowd.order(Word::Streams)?);
    std::thread::sleep(SETTLED);
    let with_streams = crowd.memory()?;
    let cpu = crowd.cpu()?;
    hold(&mut crowd, held.time)?;
    let cpu = (crowd.cpu()? - cpu) / held.time.as_secs_f64().max(1.0) * 100.0;
    let after = crowd.memory()?;
    let check = tell(crowd.order(Word::Check)?);
    let each = |more: f64, of: usize| more / of.max(1) as f64;
    let mut rows = counts(held, [&sessions, &streams, &check]);
    rows.extend([
        row(names::SESSIONS_RATE, rate(&sessions)),
        row(names::STREAMS_RATE, rate(&streams)),
        row(names::HELD, held.time.as_secs_f64()),
        row(
            names::IDLE_SESSION,
            each(with_sessions.kib - empty.kib, sessions.good),
        ),
        row(
            names::SPREAD_STREAM,
            each(with_streams.kib - with_sessions.kib, streams.good),
        ),
        row(names::GATEWAY_MEMORY, after.kib / 1024.0),
        row(names::GATEWAY_CPU, cpu),
    ]);
    Ok(rows)
}

/// How many there were, next to how many were asked for; where not all had room that is less.
fn counts(held: &Held, [sessions, streams, check]: [&Done; 3]) -> Vec<Row> {
    let sample = held.sample.min(held.streams);
    let of = |name, count: usize, wanted: usize| {
        let [mine, all] = [count, wanted].map(|n| Figures::of(name, GATEWAY, vec![n as f64]));
        mine.row(Some((names::WANTED, &all)))
    };
    vec![
        row(names::SESSIONS_WANTED, held.sessions as f64),
        of(names::SESSIONS_MADE, sessions.good, held.sessions),
        of(names::SESSIONS_ALIVE, check.good, held.sessions),
        row(names::STREAMS_WANTED, held.streams as f64),
        of(names::STREAMS_OPENED, streams.good, held.streams),
        of(names::STREAMS_ASKED, check.asked, sample),
        of(names::STREAMS_ECHOED, check.echoed, sample),
    ]
}

/// Opens [`BURST`] streams of one session at once, and asks every one.
pub fn burst(passes: u16) -> anyhow::Result<Vec<Row>> {
    let (mut opened, mut echoed) = (Vec::new(), Vec::new());
    for _ in 0..passes {
        let mut crowd = Crowd::new(Size {
            sessions: 1,
            streams: BURST,
            sample: BURST,
        })?;
        let made = tell(crowd.order(Word::Sessions)?);
        ensure!(made.good == 1, "no session stands");
        opened.push(rate(&tell(crowd.order(Word::Streams)?)));
        echoed.push(tell(crowd.order(Word::Check)?).echoed as f64);
    }
    Ok(vec![
        Figures::of(names::BURST_RATE, GATEWAY, opened).row(None),
        Figures::of(names::BURST_ECHOED, GATEWAY, echoed).row(None),
    ])
}

/// What went wrong is told at once: the rows have only counts.
fn tell(done: Done) -> Done {
    if let Some(trouble) = &done.trouble {
        say(format_args!("holdfast: {trouble}"));
    }
    done
}

fn rate(done: &Done) -> f64 {
    done.good as f64 / done.seconds
}

/// Waits, and looks whether the gateway lives.
fn hold(crowd: &mut Crowd, time: Duration) -> anyhow::Result<()> {
    let shown = bar("held", time.as_secs(), "seconds");
    for _ in 0..time.as_secs() {
        // The measurement itself.
        std::thread::sleep(Duration::from_secs(1));
        crowd.memory()?;
        shown.inc(1);
    }
    shown.finish_and_clear();
    Ok(())
}

fn row(name: Name, value: f64) -> Row {
    Figures::of(name, GATEWAY, vec![value]).row(None)
}

#[cfg(test)]
mod tests {
    use super::super::goals;
    use super::*;

    /// All that is left may be well, and is little.
    #[test]
    fn what_is_left_is_judged_by_what_was_asked_for() {
        let held = Held {
            sessions: 10_000,
            streams: 100_000,
            sample: 1_000,
            time: Duration::ZERO,
        };
        let done = |good, asked| Done {
            good,
            asked,
            echoed: asked,
            ..Done::default()
        };
        let judged = |sessions, streams, alive, asked| {
            let [sessions, streams] = [sessions, streams].map(|good| done(good, 0));
            let mut rows = counts(&held, [&sessions, &streams, &done(alive, asked)]);
            goals::judge(&mut rows);
            let met = |name: Name| rows.iter().find(|r| r.measure == name.0)?.met;
            [
                met(names::SESSIONS_MADE),
                met(names::STREAMS_OPENED),
                met(names::SESSIONS_ALIVE),
                met(names::STREAMS_ECHOED),
            ]
        };
        let all = judged(10_000, 100_000, 10_000, 1_000);
        assert_eq!(all, [Some(true); 4]);
        let few = judged(10_000, 9_700, 617, 33);
        assert_eq!(few, [Some(true), Some(false), Some(false), Some(false)]);
    }
}
