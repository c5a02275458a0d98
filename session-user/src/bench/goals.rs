//! The stall that a handover may cost: what the network itself takes, and little more; and what bonded
//! streams must get out of both links.
//!
//! R is the round-trip time. The news of a cut travels up for R/2 and the data comes down for R/2; what
//! goes up meets no delay, since what is past the link still arrives while the rest takes the other.

use super::app::Direction;
use super::report::{Key, Links, Row};

/// The goal of the 95th percentile of the stall, in milliseconds; none where nothing is promised.
pub fn goal_ms(key: &Key) -> Option<f64> {
    let mut known = Direction::ALL.into_iter().chain([Direction::UdpEcho]);
    let direction = known.find(|d| d.name() == key.direction)?;
    match key.mode.as_str() {
        "redundant" => redundant_ms(&key.scenario),
        "single" => single_ms(&key.scenario, direction, key),
        _ => None,
    }
}

/// Both links carry everything: nothing has to be noticed.
fn redundant_ms(scenario: &str) -> Option<f64> {
    matches!(
        scenario,
        "cut" | "blackhole" | "blackhole-down" | "blackhole-up"
    )
    .then_some(5.0)
}

fn single_ms(scenario: &str, direction: Direction, key: &Key) -> Option<f64> {
    let Links { rtt_us, .. } = key.links;
    let rtt = rtt_us as f64 / 1e3;
    let paced = key.pace != "bulk";
    match scenario {
        "soft" | "return" => Some(5.0),
        "cut" if paced && direction == Direction::Upload => Some(10.0),
        "cut" if paced => Some(rtt + 5.0),
        "cut-cold" => Some(2.0 * rtt + 10.0),
        "blackhole" | "blackhole-down" | "blackhole-up" => Some(2.0 * rtt + 30.0),
        "both-move" => Some(3.0 * rtt + 20.0),
        _ => None,
    }
}

/// The part of the links' rates that a bonded stream must get.
const BONDED_PART: f64 = 0.85;
/// Bytes that its receiver may have to hold beyond a gap.
const REORDER_BYTES_MAX: u64 = 4 << 20;

/// What a bonded stream must get out of both links together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Together {
    /// Delivered bytes over the runs, at least.
    pub goodput_mbit: f64,
    /// What its receiver may have to hold beyond a gap.
    pub reorder_bytes: u64,
}

impl Together {
    /// The goal of a row; none where nothing is promised.
    pub fn of(key: &Key) -> Option<Self> {
        let bonded = key.scenario == "steady" && key.mode == "bonded" && key.pace == "bulk";
        let rates = key.links.rates.filter(|_| bonded)?;
        Some(Self {
            goodput_mbit: BONDED_PART * rates.sum(),
            reorder_bytes: REORDER_BYTES_MAX,
        })
    }

    /// Whether `row` carries enough.
    pub fn is_carried(self, row: &Row) -> bool {
        row.goodput_mbit >= self.goodput_mbit
    }

    /// Whether `row` holds little enough, if that is known.
    pub fn is_held(self, row: &Row) -> Option<bool> {
        Some(row.reorder_bytes_max? <= self.reorder_bytes)
    }
}

/// The same in words, for a report.
pub const TOGETHER_IN_WORDS: &str = "A bonded stream is to get 85 % of the rates of both links together, \
headers included, over all runs, and its receiver to hold at most 4 MiB beyond a gap.";

/// The goals of the stall in words, for a report.
pub const IN_WORDS: &str = "R is the round-trip time. A cut with a warm standby may cost R + 5 ms for what \
flows to the cut unit and 10 ms for what it sends, one without a standby 2 R + 10 ms, a silent black hole \
2 R + 30 ms, both ends at once 3 R + 20 ms; a move while the old link works, and redundant streams, 5 ms.";

#[cfg(test)]
mod tests {
    use super::super::report::tests::{row, steady};
    use super::*;

    fn goal(scenario: &str, direction: &str, mode: &str) -> Option<f64> {
        let mut key = row("holdfast", scenario, direction).key();
        key.mode = mode.to_owned();
        goal_ms(&key)
    }

    #[test]
    fn goals_follow_the_round_trip() {
        assert_eq!(goal("cut", "download", "single"), Some(45.0));
        assert_eq!(goal("cut", "upload", "single"), Some(10.0));
        assert_eq!(goal("cut-cold", "upload", "single"), Some(90.0));
        assert_eq!(goal("soft", "echo", "single"), Some(5.0));
        assert_eq!(goal("blackhole-up", "download", "single"), Some(110.0));
        assert_eq!(goal("both-move", "echo", "single"), Some(140.0));
        assert_eq!(goal("blackhole", "echo", "redundant"), Some(5.0));
    }

    #[test]
    fn both_links_together_have_a_goal_where_streams_are_bonded() {
        let bonded = steady("holdfast", "bonded", &[42.0, 44.0]);
        let goal = Together::of(&bonded.key());
        assert_eq!(goal.map(|g| g.goodput_mbit), Some(42.5));
        assert_eq!(goal.map(|g| g.is_carried(&bonded)), Some(true));
        assert_eq!(goal.and_then(|g| g.is_held(&bonded)), Some(true));
        assert_eq!(
            Together::of(&steady("mptcp", "single", &[42.0]).key()),
            None
        );
        assert_eq!(
            Together::of(&row("holdfast", "cut", "download").key()),
            None
        );
    }

    #[test]
    fn there_is_none_for_what_is_not_promised() {
        assert_eq!(goal("flap", "download", "single"), None);
        assert_eq!(goal("cut", "download", "bonded"), None);
        let mut bulk = row("holdfast", "cut", "download").key();
        bulk.pace = "bulk".to_owned();
        assert_eq!(goal_ms(&bulk), None);
    }
}
