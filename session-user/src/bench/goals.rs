//! The stall that a handover may cost: what the network itself takes, and little more.
//!
//! For a session with a warm standby, and for an application that sends a little all the time; in
//! bulk the links' queues add what they like. R is the round-trip time.

use super::app::Direction;
use super::report::{Key, Links};

/// A transport is called silent so long after an answer was due.
const SILENCE_MS: f64 = 25.0;
/// The application's messages are 1 ms apart at both ends of the gap; the rest is for the agents'
/// work and a busy machine's scheduler.
const MACHINE_MS: f64 = 5.0;

/// Which way data must go anew.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lost {
    Down,
    Up,
    Both,
}

/// The goal of the 95th percentile of the stall, in milliseconds; none where nothing is promised.
pub fn goal_ms(key: &Key) -> Option<f64> {
    let direction = Direction::ALL
        .into_iter()
        .find(|d| d.name() == key.direction)?;
    if key.pace == "bulk" {
        return None;
    }
    network_ms(&key.scenario, direction, key.links).map(|ms| ms + MACHINE_MS)
}

fn network_ms(scenario: &str, direction: Direction, links: Links) -> Option<f64> {
    let rtt = links.rtt_us as f64 / 1e3;
    // The news of a cut travels up for R/2 and the data comes down for R/2; what goes up meets no
    // delay, as what is past the link still arrives while the rest takes the other.
    let told = if direction == Direction::Upload {
        0.0
    } else {
        rtt
    };
    match scenario {
        "cut" => Some(told),
        // Connecting comes first.
        "cut-cold" => Some(told + rtt),
        "soft" | "return" => Some(0.0),
        "blackhole-down" => Some(unanswered(Lost::Down, direction, rtt)),
        "blackhole-up" => Some(unanswered(Lost::Up, direction, rtt)),
        "blackhole" => Some(unanswered(Lost::Both, direction, rtt)),
        _ => None,
    }
}

/// The first lost record's answer is due after R; then silence must be told from delay.
fn unanswered(lost: Lost, direction: Direction, rtt: f64) -> f64 {
    let arrives = match direction {
        Direction::Download => lost == Lost::Up,
        Direction::Upload => lost == Lost::Down,
        Direction::Echo => false,
    };
    if arrives { 0.0 } else { rtt + SILENCE_MS }
}

/// The same in words, for a report.
pub const IN_WORDS: &str = "The goal is what the network itself costs a session with a warm standby: \
one round trip down after a cut, nothing up, one more where the other link must be dialled first, and a \
round trip and 25 ms where only silence tells; in each case 5 ms are added for the machine.";

#[cfg(test)]
mod tests {
    use super::super::report::tests::row;
    use super::*;

    fn goal(scenario: &str, direction: &str) -> Option<f64> {
        goal_ms(&row("holdfast", scenario, direction).key())
    }

    #[test]
    fn goals_follow_the_round_trip() {
        assert_eq!(goal("cut", "download"), Some(45.0));
        assert_eq!(goal("cut", "upload"), Some(5.0));
        assert_eq!(goal("cut-cold", "upload"), Some(45.0));
        assert_eq!(goal("soft", "echo"), Some(5.0));
        assert_eq!(goal("blackhole-up", "download"), Some(5.0));
        assert_eq!(goal("blackhole-up", "upload"), Some(70.0));
        assert_eq!(goal("blackhole", "echo"), Some(70.0));
    }

    #[test]
    fn there_is_none_for_bulk_and_for_what_is_not_promised() {
        assert_eq!(goal("flap", "download"), None);
        let mut bulk = row("holdfast", "cut", "download").key();
        bulk.pace = "bulk".to_owned();
        assert_eq!(goal_ms(&bulk), None);
    }
}
