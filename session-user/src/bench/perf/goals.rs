//! What Holdfast is to reach, for each measure.

use std::fmt;

use serde::Serialize;

use super::names::{self, Name};
use super::rows::Row;
use super::systems::System;

/// Passes from which on a goal is met or missed: of fewer the median is whatever disturbed one of them. A count is what it
/// is after one.
pub const PASSES_MIN: usize = 3;
/// What one session may hold by default.
const SESSION_MIB: f64 = 64.0;

/// How much.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
}

use Bound::{AtLeast, AtMost};

impl Bound {
    /// Whether `value` keeps to it.
    pub fn is_met(self, value: f64) -> bool {
        match self {
            AtLeast(least) => value >= least,
            AtMost(most) => value <= most,
        }
    }

    /// Its number.
    pub const fn number(self) -> f64 {
        match self {
            AtLeast(number) | AtMost(number) => number,
        }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AtLeast(least) => write!(f, "at least {least}"),
            AtMost(most) => write!(f, "at most {most}"),
        }
    }
}

/// What is bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Of {
    /// The value itself.
    Value,
    /// Its ratio to the plain proxy.
    Proxy,
    /// Its ratio to the best of the others that encrypt.
    Rival,
    /// Its ratio to the best of the others that relay connections over TCP, as we do, and encrypt.
    Relay,
    /// Its ratio to one stream's.
    OneStream,
    /// Its ratio to what is called so.
    Named(&'static str),
}

/// One line of the table.
#[derive(Debug)]
struct Line {
    measure: &'static str,
    /// Of ours: with a part behind a comma that one alone, otherwise all.
    system: &'static str,
    of: Of,
    bound: Bound,
    /// Judged after so many passes.
    passes: usize,
}

const fn line(name: Name, of: Of, bound: Bound) -> Line {
    Line {
        measure: name.0,
        system: names::HOLDFAST,
        of,
        bound,
        passes: PASSES_MIN,
    }
}

/// A goal for what is counted, which hardly depends on what disturbs a pass.
const fn count(name: Name, of: Of, bound: Bound) -> Line {
    Line {
        passes: 1,
        ..line(name, of, bound)
    }
}

/// All goals. A measure has at most one for each kind of comparison.
const GOALS: [Line; 39] = [
    line(names::GOODPUT, Of::Proxy, AtLeast(0.95)),
    line(names::GOODPUT, Of::Rival, AtLeast(1.15)),
    line(names::CPU_ALL, Of::Proxy, AtMost(1.15)),
    line(names::CPU_ENDS, Of::Proxy, AtMost(1.30)),
    line(names::STREAMS, Of::OneStream, AtLeast(0.95)),
    line(names::SLOWEST, Of::Value, AtLeast(0.7)),
    line(names::PING_P50, Of::Proxy, AtMost(1.15)),
    line(names::PING_P50, Of::Rival, AtMost(1.0)),
    line(names::PING_P99, Of::Proxy, AtMost(1.15)),
    line(names::PING_P99, Of::Rival, AtMost(1.0)),
    line(names::REQUESTS, Of::Relay, AtLeast(1.0)),
    line(names::CONNECTIONS, Of::Relay, AtLeast(1.0)),
    Line {
        system: names::EARLY,
        // The round-trip time, and 3 ms.
        ..line(names::FIRST_BYTE, Of::Value, AtMost(43.0))
    },
    count(names::IDLE_STREAM, Of::Value, AtMost(16.0)),
    count(names::SPREAD_STREAM, Of::Value, AtMost(16.0)),
    count(names::IDLE_SESSION, Of::Value, AtMost(64.0)),
    line(names::IDLE_WAKE_UPS, Of::Value, AtMost(1.0)),
    line(names::IDLE_CPU, Of::Value, AtMost(0.1)),
    packed(names::LOG_UP, names::LZ4),
    packed(names::LOG_DOWN, names::LZ4),
    packed(names::LOG_UP, names::AUTO),
    packed(names::LOG_DOWN, names::AUTO),
    carried(names::NOISE_UP),
    carried(names::NOISE_DOWN),
    no_worse(names::NOISE_UP),
    no_worse(names::NOISE_DOWN),
    no_worse(names::NOISE_UNLIMITED),
    Line {
        system: names::WITH_STUCK,
        ..line(names::BESIDE_STUCK, Of::Named(names::ALONE), AtLeast(0.8))
    },
    count(names::HELD_OF_STUCK, Of::Value, AtMost(SESSION_MIB)),
    hardly_stalled(names::STALL_MET),
    hardly_stalled(names::STALL_ALL),
    none_lost(names::MANY_STREAMS),
    none_lost(names::ONE_STREAM),
    line(names::BURST_RATE, Of::Value, AtLeast(5000.0)),
    count(names::BURST_ECHOED, Of::Value, AtLeast(5000.0)),
    all_of(names::SESSIONS_MADE),
    all_of(names::SESSIONS_ALIVE),
    all_of(names::STREAMS_OPENED),
    all_of(names::STREAMS_ECHOED),
];

/// As many as were asked for, however many the host has room for.
const fn all_of(name: Name) -> Line {
    count(name, Of::Named(names::WANTED), AtLeast(1.0))
}

/// In milliseconds, with very many streams; three times one stream's would be enough where that is more.
const fn hardly_stalled(name: Name) -> Line {
    Line {
        system: names::MANY_STREAMS,
        ..line(name, Of::Value, AtMost(50.0))
    }
}

/// However often the link is cut.
const fn none_lost(system: &'static str) -> Line {
    Line {
        system,
        ..count(names::STREAMS_LOST, Of::Value, AtMost(0.0))
    }
}

/// What a codec gains on a narrow link.
const fn packed(name: Name, system: &'static str) -> Line {
    Line {
        system,
        ..line(name, Of::Named(names::OWN_DIRECT), AtLeast(0.93))
    }
}

/// What does not shrink, next to a TCP connection that is not captured: compression that costs nothing beside it says little
/// where it is itself slow.
const fn carried(name: Name) -> Line {
    Line {
        system: names::OFF,
        ..line(name, Of::Named(names::DIRECT), AtLeast(0.93))
    }
}

/// What does not shrink, with compression and without.
const fn no_worse(name: Name) -> Line {
    Line {
        system: names::AUTO,
        ..line(name, Of::Named(names::OFF), AtLeast(0.98))
    }
}

impl Line {
    fn is_for(&self, measure: &str, system: &str) -> bool {
        let ours = system.split(',').next() == Some(self.system);
        self.measure == measure && (ours || self.system == system)
    }

    /// Whether it speaks of a row that is compared with `other`. A value needs no comparison.
    fn compares(&self, other: Option<&str>) -> bool {
        let system = System::ALL.into_iter().find(|s| Some(s.name()) == other);
        match self.of {
            Of::Value => true,
            Of::Proxy => system == Some(System::Proxy),
            Of::Rival => system.is_some_and(System::is_rival),
            Of::Relay => system.is_some_and(System::is_relay),
            Of::OneStream => other == Some(names::ONE_STREAM),
            Of::Named(name) => other == Some(name),
        }
    }
}

/// A goal and how a row stands to it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Goal {
    /// Whether the row's ratio is bounded; its value otherwise.
    pub ratio: bool,
    /// How much it is to be.
    #[serde(flatten)]
    pub bound: Bound,
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.bound, if self.ratio { " x" } else { "" })
    }
}

/// Gives each row its goal, if it has one. Of several rows for one value the first gets it.
pub fn judge(rows: &mut [Row]) {
    let mut judged: Vec<(&'static str, &'static str)> = Vec::new();
    for row in rows {
        let name = (row.measure, row.system);
        let fits = |line: &&Line| {
            let open = line.of != Of::Value || !judged.contains(&name);
            open && line.is_for(row.measure, row.system) && line.compares(row.ratio_to)
        };
        let Some(line) = GOALS.iter().find(fits) else {
            continue;
        };
        let (ratio, bound) = (line.of != Of::Value, line.bound);
        row.goal = Some(Goal { ratio, bound });
        let value = if ratio { row.ratio } else { Some(row.value) };
        let value = value.filter(|_| row.runs >= line.passes);
        row.met = value.map(|value| bound.is_met(value));
        if !ratio {
            judged.push(name);
        }
    }
}

/// The row that `row` is compared with.
pub fn compared_with<'a>(row: &Row, all: &'a [Row]) -> Option<&'a Row> {
    let to = row.ratio_to?;
    let (measure, system) = if to == names::ONE_STREAM {
        (names::GOODPUT.0, row.system)
    } else {
        (row.measure, to)
    };
    all.iter()
        .find(|other| other.measure == measure && other.system == system)
}

/// How many goals are met, and how many are not.
pub fn met_and_missed(rows: &[Row]) -> (usize, usize) {
    let count = |met| rows.iter().filter(|r| r.met == Some(met)).count();
    (count(true), count(false))
}

/// Whether a goal compares `measure` with the best of those that relay.
pub fn is_against_relays(measure: &str) -> bool {
    GOALS
        .iter()
        .any(|l| l.of == Of::Relay && l.measure == measure)
}

/// The goals of comparisons in words, for a report.
pub const IN_WORDS: &str = "One stream is to get 95 % of the plain proxy's rate and 115 % of the best of the others that \
encrypt, at 1.15 times the processor time of the proxy's run, and 1.3 times that of its two ends; sixteen together as much as \
one, and the slowest 0.7 of the mean; a ping 1.15 times the proxy's, and less than any other's that encrypts; requests and \
connections are to be ahead of stunnel, HAProxy, shadowsocks and ssh. The first byte may come 3 ms after a round \
trip, an idle stream take 16 KiB, an idle session 64 KiB, and an idle agent wake once a second for a thousandth of a core. \
A log over 10 Mbit/s is to get 93 % of the codec's own ratio times what a TCP connection that is not captured gets there, \
and what does not shrink 98 % of what it gets without compression, which itself is to be 93 % of a TCP connection that is \
not captured. Beside 1000 streams whose readers are stuck one is to keep 80 % of its rate; no stream is to be lost in a \
move, and 5000 to be opened in a second. Of very many sessions and streams all that are asked for are to be made, to live \
and to answer.";

#[cfg(test)]
mod tests {
    use super::super::measures::Group;
    use super::super::names::Given;
    use super::super::rows::Figures;
    use super::*;

    fn row(measure: &'static str, system: &'static str, value: f64) -> Row {
        figures(measure, system, value).row(None)
    }

    fn figures(measure: &'static str, system: &'static str, value: f64) -> Figures {
        Figures {
            measure,
            system,
            unit: "1",
            values: vec![value; PASSES_MIN],
        }
    }

    fn against(measure: &'static str, value: f64, other: &'static str, theirs: f64) -> Row {
        let theirs = figures(measure, other, theirs);
        figures(measure, "holdfast", value).row(Some((other, &theirs)))
    }

    fn judged(row: Row) -> Option<(f64, bool)> {
        let mut rows = [row];
        judge(&mut rows);
        Some((rows[0].goal?.bound.number(), rows[0].met?))
    }

    #[test]
    fn each_comparison_has_its_own_goal() {
        let goodput = |other, theirs| judged(against("goodput", 100.0, other, theirs));
        assert_eq!(goodput("proxy", 101.0), Some((0.95, true)));
        assert_eq!(goodput("wireguard", 101.0), Some((1.15, false)));
        assert_eq!(goodput("direct", 101.0), None);
        let requests = |other| judged(against("requests_1_kib", 9.0, other, 8.0));
        for relay in ["stunnel", "haproxy", "shadowsocks", "ssh"] {
            assert_eq!(requests(relay), Some((1.0, true)), "{relay}");
        }
        assert_eq!((requests("wireguard"), requests("quic")), (None, None));
        assert_eq!(judged(row("goodput", "stunnel", 1.0)), None);
    }

    #[test]
    fn what_is_packed_is_judged_by_what_the_link_carries() {
        let log = |to| {
            let best = figures("log_up_10_mbit", to, 5.0);
            let row = figures("log_up_10_mbit", "auto", 4.8).row(Some((to, &best)));
            judged(row)
        };
        assert_eq!(log(names::OWN_DIRECT), Some((0.93, true)));
        assert_eq!(log(names::OWN_OFF), None);
    }

    #[test]
    fn what_does_not_shrink_is_judged_twice() {
        let noise = |system, value, to| {
            let other = figures(names::NOISE_DOWN.0, to, 1.0);
            judged(figures(names::NOISE_DOWN.0, system, value).row(Some((to, &other))))
        };
        assert_eq!(noise(names::AUTO, 0.97, names::OFF), Some((0.98, false)));
        assert_eq!(noise(names::OFF, 0.92, names::DIRECT), Some((0.93, false)));
        assert_eq!(noise(names::OFF, 0.94, names::DIRECT), Some((0.93, true)));
    }

    #[test]
    fn one_beside_the_stuck_is_judged_by_itself_alone() {
        let alone = figures(names::BESIDE_STUCK.0, names::ALONE, 100.0);
        let beside = figures(names::BESIDE_STUCK.0, names::WITH_STUCK, 79.0);
        assert_eq!(
            judged(beside.row(Some((alone.system, &alone)))),
            Some((0.8, false))
        );
        assert_eq!(
            judged(row("streams_lost", "many streams", 0.0)),
            Some((0.0, true))
        );
    }

    #[test]
    fn too_few_passes_are_no_verdict_but_of_a_count() {
        let judged = |name: Name, system, passes| {
            let mut rows = [Figures::of(name, system, vec![0.5; passes]).row(None)];
            judge(&mut rows);
            assert!(rows[0].goal.is_some());
            rows[0].met
        };
        let slowest = |passes| judged(names::SLOWEST, names::HOLDFAST, passes);
        assert_eq!((slowest(2), slowest(3)), (None, Some(false)));
        let session = judged(names::IDLE_SESSION, names::GATEWAY, 1);
        assert_eq!(session, Some(true));
        let lost = judged(names::STREAMS_LOST, names::MANY_STREAMS, 1);
        assert_eq!(lost, Some(false));
    }

    #[test]
    fn a_value_is_judged_once() {
        let slowest = "slowest_of_16_to_mean";
        let mut rows = [
            against(slowest, 0.8, "proxy", 0.9),
            against(slowest, 0.8, "ssh", 0.9),
        ];
        judge(&mut rows);
        assert_eq!(rows.map(|r| r.met), [Some(true), None]);
    }

    #[test]
    fn ends_are_judged_alike_and_ways_apart() {
        let at = |system, value| judged(row("idle_wake_ups", system, value));
        assert_eq!(at("holdfast, gateway", 2.0), Some((1.0, false)));
        assert_eq!(at("holdfast, client", 0.2), Some((1.0, true)));
        let first = |system| judged(row("first_byte_at_40_ms", system, 42.0));
        assert_eq!(first("holdfast, early"), Some((43.0, true)));
        assert_eq!(first("holdfast"), None);
    }

    /// A goal of which no row ever comes would be missed in silence.
    #[test]
    fn each_goal_is_for_a_row_that_a_group_gives() {
        let given: Vec<_> = Group::ALL.iter().flat_map(|g| g.gives()).collect();
        for line in &GOALS {
            let comparable = |given: &&&Given| {
                let others = given.systems.iter().chain(given.beside);
                given.systems.iter().any(|s| line.is_for(given.measure, s))
                    && others.into_iter().any(|other| line.compares(Some(other)))
            };
            assert!(given.iter().any(|g| comparable(&g)), "{line:?}");
        }
    }

    #[test]
    fn no_two_groups_give_the_same_row() {
        let mut seen = Vec::new();
        for given in Group::ALL.iter().flat_map(|group| group.gives()) {
            for system in given.systems {
                let name = (given.measure, *system);
                assert!(!seen.contains(&name), "{name:?}");
                seen.push(name);
            }
        }
    }

    #[test]
    fn a_goal_is_told_in_words_and_as_json() -> anyhow::Result<()> {
        let goal = Goal {
            ratio: true,
            bound: AtLeast(0.95),
        };
        assert_eq!(goal.to_string(), "at least 0.95 x");
        let json = serde_json::to_value(goal)?;
        assert_eq!(json, serde_json::json!({"ratio": true, "at_least": 0.95}));
        Ok(())
    }
}
