//! Tests of [`super`].

use super::*;
use crate::session::buf::Sealed;
use crate::session::schedule::Place;
use bytes::Bytes;

const RTT: Duration = Duration::from_millis(40);

fn at(ms: u64) -> Time {
    Time::from_nanos(ms * 1_000_000)
}

/// Acknowledges all records before that one.
fn up_to(cumulative: u64) -> crate::wire::Ack {
    crate::wire::Ack {
        cumulative,
        ranges: Vec::new(),
    }
}

fn record(number: u64) -> Written {
    Written {
        number,
        len: 1,
        fresh: true,
        busy: true,
    }
}

fn known() -> Pulse {
    let mut pulse = Pulse::default();
    for _ in 0..20 {
        pulse.measured(RTT);
    }
    pulse
}

fn kept(records: u64) -> Retained {
    let mut retained = Retained::default();
    for _ in 0..records {
        let sealed = Sealed {
            bytes: Bytes::from_static(b"x"),
            buffer_bytes: 1,
        };
        retained.push(sealed, Place::default());
    }
    retained
}

#[test]
fn an_idle_transport_never_falls_silent() {
    let mut pulse = known();
    assert_eq!(pulse.deadline(), None);
    assert!(!pulse.falls_silent(at(1_000_000)));
}

#[test]
fn a_path_that_is_known_to_be_alive_is_given_time_while_answers_come() {
    let mut pulse = known();
    let mut retained = kept(2);
    pulse.written(record(0), at(100));
    pulse.written(record(1), at(102));
    let due = pulse.deadline().unwrap();
    pulse.vouch(due + Duration::from_millis(30));
    // Nothing has come: vouching counts for so long and no longer.
    let patience = pulse.patience();
    pulse.vouch(due + patience * 10);
    assert_eq!(pulse.deadline(), Some(at(100) + patience * 3));
    pulse.vouch(due + Duration::from_millis(30));
    let ack = up_to(1);
    retained.acknowledge(&ack).unwrap();
    pulse.acknowledged(&retained, true, Duration::ZERO, at(160));
    let second = pulse.deadline().unwrap();
    assert_eq!(second, due + Duration::from_millis(30));
    assert!(!pulse.falls_silent(due + Duration::from_millis(29)));
    assert!(pulse.falls_silent(second));
}

/// What a first window takes at once is under way for much longer than one answer is.
#[test]
fn a_path_that_answers_piece_by_piece_is_given_time() {
    let mut pulse = known();
    let mut retained = kept(20);
    (0..20).for_each(|number| pulse.written(record(number), at(100)));
    let patience = pulse.patience();
    let step = patience * 2;
    let mut now = at(100);
    for cumulative in 1..20 {
        now = now + step;
        pulse.vouch(now + step);
        assert!(!pulse.falls_silent(now), "{cumulative}");
        let ack = up_to(cumulative);
        retained.acknowledge(&ack).unwrap();
        pulse.acknowledged(&retained, true, Duration::ZERO, now);
    }
    let patience = pulse.patience();
    pulse.vouch(now + patience * 10);
    assert!(pulse.falls_silent(now + patience * 3));
}

/// The answer is queued behind what the peer sends.
#[test]
fn a_path_on_which_the_peer_sends_is_given_time() {
    let mut pulse = known();
    pulse.written(record(0), at(100));
    let patience = pulse.patience();
    let mut now = at(100);
    for _ in 0..10 {
        now = now + patience * 2;
        pulse.vouch(now + patience * 2);
        assert!(!pulse.falls_silent(now));
        pulse.came(now);
    }
    // Unless the driver knows that what is sent does not arrive.
    pulse.vouch(at(0));
    assert!(pulse.falls_silent(now));
}

#[test]
fn the_oldest_record_under_way_counts() {
    let mut pulse = known();
    let mut retained = kept(3);
    for (number, ms) in [(0, 100), (1, 110), (2, 120)] {
        pulse.written(record(number), at(ms));
    }
    let first = pulse.deadline().unwrap();
    assert!(first > at(140) && first < at(180), "{first:?}");
    let ack = up_to(1);
    retained.acknowledge(&ack).unwrap();
    pulse.acknowledged(&retained, true, Duration::ZERO, at(140));
    let second = pulse.deadline().unwrap();
    assert_eq!(second.since(first), Duration::from_millis(10));
    assert!(!pulse.falls_silent(Time::from_nanos(second.as_nanos() - 1)));
    assert!(pulse.falls_silent(second));
    assert_eq!(pulse.deadline(), None, "it is told once");
}

#[test]
fn the_last_of_some_that_came_over_another_transport_does_not_hide_the_first() {
    let mut pulse = known();
    let mut retained = kept(3);
    for number in 0..3 {
        pulse.written(record(number), at(100));
    }
    let due = pulse.deadline();
    let mut ack = crate::wire::Ack {
        cumulative: 0,
        ranges: std::iter::once(1..3).collect(),
    };
    retained.acknowledge(&ack).unwrap();
    pulse.acknowledged(&retained, true, Duration::ZERO, at(140));
    assert_eq!(pulse.deadline(), due);
    ack.cumulative = 3;
    retained.acknowledge(&ack).unwrap();
    pulse.acknowledged(&retained, true, Duration::ZERO, at(150));
    assert_eq!(pulse.deadline(), None);
}

#[test]
fn what_is_written_when_there_are_marks_enough_is_waited_for() {
    let mut pulse = known();
    let all = MARKS_MAX as u64 + 50;
    let mut retained = kept(all);
    for number in 0..all {
        pulse.written(record(number), at(number * 2));
    }
    assert_eq!(pulse.marks.len(), MARKS_MAX);
    let ack = up_to(all - 1);
    retained.acknowledge(&ack).unwrap();
    pulse.acknowledged(&retained, true, Duration::ZERO, at(all * 2));
    assert_eq!(pulse.oldest(), Some(at((all - 1) * 2)));
}

#[test]
fn a_silent_transport_that_answers_gets_its_time_again() {
    let mut pulse = known();
    pulse.written(record(0), at(0));
    assert!(pulse.falls_silent(at(500)));
    pulse.lives(at(600));
    assert!(pulse.deadline().unwrap() > at(640));
}

#[test]
fn an_answer_that_a_sleep_held_up_does_not_deafen() {
    let mut pulse = known();
    pulse.measured(Duration::from_secs(3600));
    assert!(pulse.patience() < Duration::from_secs(1));
    let mut fresh = Pulse::default();
    fresh.measured(Duration::from_secs(3600));
    assert!(fresh.patience() < Duration::from_secs(2));
}

#[test]
fn a_socket_that_takes_nothing_is_silent() {
    let mut pulse = known();
    pulse.waits(at(10));
    pulse.taken(false, at(20));
    let due = pulse.deadline().unwrap();
    assert!(due > at(60), "it took something at 20 ms");
    pulse.taken(true, at(30));
    assert_eq!(pulse.deadline(), None);
    pulse.waits(at(40));
    assert!(pulse.falls_silent(at(200)));
}

/// One that is always ready for more, because the processor is the limit, never shows what its path takes at most.
#[test]
fn records_grow_with_what_was_carried_though_nothing_ever_waited() {
    let mut pulse = known();
    let mut retained = kept(2);
    let mut carry = |number, len| {
        let (fresh, busy) = (true, false);
        let written = Written {
            number,
            len,
            fresh,
            busy,
        };
        pulse.written(written, at(number * 10));
        let ack = up_to(number + 1);
        retained.acknowledge(&ack).unwrap();
        pulse.acknowledged(&retained, true, Duration::ZERO, at(number * 10 + 2));
        assert_eq!(pulse.rate(), None);
        pulse.record_bytes()
    };
    assert_eq!(carry(0, 100), RECORD_DATA_BYTES_UNKNOWN);
    assert_eq!(carry(1, 80_000), 40_000);
    assert_eq!(pulse.record_bytes_from(1_000), 40_000);
}

#[test]
fn a_quiet_receiver_asks_once() {
    let mut pulse = known();
    pulse.heard(at(10));
    let ask = pulse.deadline().unwrap();
    assert!(!pulse.falls_silent(ask), "asking comes first");
    assert!(pulse.must_ask(ask));
    pulse.asked(7, ask);
    assert!(!pulse.must_ask(ask + RTT));
    assert!(!pulse.answered(8, ask + RTT));
    assert!(pulse.answered(7, ask + RTT));
    assert_eq!(pulse.deadline(), None);
}
