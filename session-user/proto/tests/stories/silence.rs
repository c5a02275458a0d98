//! A transport that says nothing any more, and a standby beside it.

use std::time::Duration;

use super::pair::{Pair, config, drain, feed, read, retained, write};
use session_proto::session::{Event, Handle};

const RTT: Duration = Duration::from_millis(40);

/// A pair with a standby, whose ends know their round-trip time.
fn warm() -> (Pair, (Handle, Handle), (Handle, Handle)) {
    let mut pair = Pair::open(&config());
    let standby = pair.dial(true);
    pair.run();
    let first = pair.wires[0];
    let id = pair.stream();
    for _ in 0..20 {
        write(pair.now, &mut pair.a, id, b"-");
        let there = drain(pair.now, &mut pair.a, first.0);
        pair.wait(RTT / 2);
        feed(pair.now, &mut pair.b, first.1, &there).unwrap();
        pair.wait(Duration::from_millis(5));
        let back = drain(pair.now, &mut pair.b, first.1);
        pair.wait(RTT / 2);
        feed(pair.now, &mut pair.a, first.0, &back).unwrap();
    }
    read(&mut pair.b, id);
    pair.events_a.clear();
    pair.events_b.clear();
    (pair, first, standby)
}

/// Lets time pass at the initiator until its next deadline; fails if there is none.
fn next_deadline(pair: &mut Pair) -> Duration {
    let before = pair.now;
    let at = pair.a.poll_timeout().expect("no deadline");
    pair.now = at.max(pair.now);
    pair.a.handle_timeout(pair.now);
    pair.now.since(before)
}

#[test]
fn what_a_silent_transport_swallowed_goes_out_on_the_standby() {
    let (mut pair, first, standby) = warm();
    let id = pair.a.streams().next().unwrap();
    write(pair.now, &mut pair.a, id, b"swallowed");
    let lost = drain(pair.now, &mut pair.a, first.0);
    let waited = next_deadline(&mut pair);
    assert!(
        waited > RTT && waited < RTT + Duration::from_millis(50),
        "{waited:?}"
    );
    assert_eq!(pair.a.poll_event(), Some(Event::TransportSilent(first.0)));

    let again = drain(pair.now, &mut pair.a, standby.0);
    assert_eq!(retained(&again), retained(&lost), "the same sealed bytes");
    write(pair.now, &mut pair.a, id, b", and new");
    let new = drain(pair.now, &mut pair.a, standby.0);
    assert_eq!(
        retained(&new).len(),
        1,
        "new records do not wait for the outcome"
    );
    for bytes in [again, new] {
        feed(pair.now, &mut pair.b, standby.1, &bytes).unwrap();
    }
    assert_eq!(read(&mut pair.b, id).0, b"swallowed, and new");

    pair.wait(Duration::from_millis(10));
    let answer = drain(pair.now, &mut pair.b, standby.1);
    feed(pair.now, &mut pair.a, standby.0, &answer).unwrap();
    let moved = Event::HandedOver {
        from: first.0,
        to: standby.0,
    };
    assert_eq!(pair.a.poll_event(), Some(moved));
    assert_eq!(pair.a.active(), Some(standby.0));
    assert_eq!(pair.a.retained_bytes(), 0);
    let asked = drain(pair.now, &mut pair.a, standby.0);
    feed(pair.now, &mut pair.b, standby.1, &asked).unwrap();
    assert_eq!(pair.b.active(), Some(standby.1), "the peer follows");
}

#[test]
fn an_answer_that_was_only_late_keeps_the_session_where_it_is() {
    let (mut pair, first, standby) = warm();
    let id = pair.a.streams().next().unwrap();
    write(pair.now, &mut pair.a, id, b"slow");
    let there = drain(pair.now, &mut pair.a, first.0);
    next_deadline(&mut pair);
    feed(pair.now, &mut pair.b, first.1, &there).unwrap();
    pair.wait(Duration::from_millis(10));
    let back = drain(pair.now, &mut pair.b, first.1);
    feed(pair.now, &mut pair.a, first.0, &back).unwrap();
    assert_eq!(pair.a.active(), Some(first.0));
    // The copies that had not gone out are taken back.
    assert!(retained(&drain(pair.now, &mut pair.a, standby.0)).is_empty());
    write(pair.now, &mut pair.a, id, b" but there");
    assert_eq!(retained(&drain(pair.now, &mut pair.a, first.0)).len(), 1);
    assert!(retained(&drain(pair.now, &mut pair.a, standby.0)).is_empty());
}

#[test]
fn a_transport_without_a_standby_is_told_to_be_silent() {
    let mut pair = Pair::open(&config());
    let id = pair.stream();
    let first = pair.wires[0];
    write(pair.now, &mut pair.a, id, b"swallowed");
    drain(pair.now, &mut pair.a, first.0);
    next_deadline(&mut pair);
    assert_eq!(pair.a.poll_event(), Some(Event::TransportSilent(first.0)));
    assert_eq!(pair.a.poll_timeout(), None, "it is told once");
    // What it swallowed goes along with the resume of the next.
    pair.dial(false);
    assert_eq!(read(&mut pair.b, id).0, b"swallowed");
    pair.run();
    assert_eq!(pair.a.retained_bytes(), 0);
}

#[test]
fn a_receiver_that_hears_nothing_more_asks() {
    let (mut pair, first, _) = warm();
    let id = pair.a.streams().next().unwrap();
    write(pair.now, &mut pair.b, id, b"the last that comes");
    let last = drain(pair.now, &mut pair.b, first.1);
    feed(pair.now, &mut pair.a, first.0, &last).unwrap();
    pair.wait(Duration::from_millis(10));
    drain(pair.now, &mut pair.a, first.0);
    next_deadline(&mut pair);
    let question = drain(pair.now, &mut pair.a, first.0);
    assert!(!question.is_empty());
    next_deadline(&mut pair);
    let events: Vec<Event> = std::iter::from_fn(|| pair.a.poll_event()).collect();
    assert!(
        events.contains(&Event::TransportSilent(first.0)),
        "{events:?}"
    );
}

#[test]
fn an_idle_pair_rests() {
    let (mut pair, ..) = warm();
    pair.run();
    assert_eq!(pair.a.poll_timeout(), None);
    assert_eq!(pair.b.poll_timeout(), None);
}

#[test]
fn a_lost_transport_is_told_to_the_peer() {
    let (mut pair, first, standby) = warm();
    let id = pair.a.streams().next().unwrap();
    write(pair.now, &mut pair.b, id, b"under way");
    drain(pair.now, &mut pair.b, first.1);
    pair.a.transport_lost(first.0);
    assert_eq!(pair.a.active(), Some(standby.0));
    let news = drain(pair.now, &mut pair.a, standby.0);
    feed(pair.now, &mut pair.b, standby.1, &news).unwrap();
    assert_eq!(pair.b.active(), Some(standby.1));
    let events: Vec<Event> = std::iter::from_fn(|| pair.b.poll_event()).collect();
    assert!(
        events.contains(&Event::TransportDone(first.1)),
        "{events:?}"
    );
    let again = drain(pair.now, &mut pair.b, standby.1);
    feed(pair.now, &mut pair.a, standby.0, &again).unwrap();
    assert_eq!(read(&mut pair.a, id).0, b"under way");
}

#[test]
fn of_two_soft_moves_that_cross_the_initiators_stands() {
    let (mut pair, _, second) = warm();
    let third = pair.dial(true);
    pair.run();
    pair.a.set_active(second.0);
    pair.b.set_active(third.1);
    pair.run();
    assert_eq!(pair.a.active(), Some(second.0));
    assert_eq!(pair.b.active(), Some(second.1));
}

#[test]
fn what_came_first_on_a_standby_counts_from_the_silence() {
    let (mut pair, first, standby) = warm();
    let id = pair.a.streams().next().unwrap();
    write(pair.now, &mut pair.a, id, b"swallowed");
    let written = pair.now;
    drain(pair.now, &mut pair.a, first.0);
    next_deadline(&mut pair);
    assert_eq!(pair.a.unanswered_since(first.0), Some(written));
    let noticed = pair.now;
    assert_eq!(pair.a.firsts(standby.0), Default::default());
    let again = drain(pair.now, &mut pair.a, standby.0);
    assert_eq!(pair.a.firsts(standby.0).sent, Some(noticed));
    pair.wait(RTT / 2);
    feed(pair.now, &mut pair.b, standby.1, &again).unwrap();
    pair.wait(Duration::from_millis(5));
    let back = drain(pair.now, &mut pair.b, standby.1);
    pair.wait(RTT / 2);
    feed(pair.now, &mut pair.a, standby.0, &back).unwrap();
    assert_eq!(pair.a.active(), Some(standby.0));
    let firsts = pair.a.firsts(standby.0);
    assert_eq!(firsts.sent, Some(noticed), "the move keeps what was first");
    assert_eq!(firsts.acknowledged, Some(pair.now));
    assert_eq!(firsts.received, None);
    let status = drain(pair.now, &mut pair.a, standby.0);
    feed(pair.now, &mut pair.b, standby.1, &status).unwrap();
    write(pair.now, &mut pair.b, id, b"back");
    let data = drain(pair.now, &mut pair.b, standby.1);
    pair.wait(RTT / 2);
    feed(pair.now, &mut pair.a, standby.0, &data).unwrap();
    assert_eq!(pair.a.firsts(standby.0).received, Some(pair.now));
    // A soft move begins another term.
    pair.a.set_active(first.0);
    pair.a.set_active(standby.0);
    assert_eq!(pair.a.firsts(standby.0), Default::default());
}
