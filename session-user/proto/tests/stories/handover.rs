//! Transports that end and begin, and keys that turn over: one promise each.

use std::time::Duration;

use super::pair::{Pair, config, drain, feed, read, records, retained, write};
use session_proto::seal::{Aead, SealError, Secret};
use session_proto::session::{Config, Event, TransportFault};
use session_proto::wire::Space;

#[test]
fn records_without_an_answer_go_out_again_behind_the_resume() {
    let mut pair = Pair::open(&config());
    let id = pair.stream();
    for text in [b"one", b"two", b"six"] {
        write(pair.now, &mut pair.a, id, text);
    }
    let lost = drain(pair.now, &mut pair.a, pair.wires[0].0);
    assert_eq!(retained(&lost).len(), 3);
    pair.cut();
    write(pair.now, &mut pair.a, id, b"while away");

    // One flight, and nothing of it waits for the responder.
    let on_a = pair.a.dial(false).unwrap();
    let flight = drain(pair.now, &mut pair.a, on_a);
    let (counter, behind) = pair.resumes(&flight);
    assert_eq!(counter, Some(1));
    let sent = records(&behind);
    assert_eq!(sent[0].0.space, Space::Unretained, "RESUME comes first");
    assert_eq!(
        retained(&behind)[..3],
        retained(&lost)[..],
        "the same sealed bytes"
    );
    assert_eq!(retained(&behind).len(), 4);

    let on_b = pair.accept(&flight).unwrap();
    pair.wires.push((on_a, on_b));
    assert_eq!(read(&mut pair.b, id).0, b"onetwosixwhile away");
    pair.run();
    assert_eq!(pair.a.retained_bytes(), 0);
    assert_eq!(pair.a.stats().records_resent, 3);
    assert!(pair.events_a.contains(&Event::TransportUp(on_a)));
}

#[test]
fn what_arrived_before_the_cut_is_not_delivered_twice() {
    let mut pair = Pair::open(&config());
    let id = pair.stream();
    write(pair.now, &mut pair.a, id, b"arrived");
    let (on_a, on_b) = pair.wires[0];
    let bytes = drain(pair.now, &mut pair.a, on_a);
    feed(pair.now, &mut pair.b, on_b, &bytes).unwrap();
    pair.cut();
    pair.dial(false);
    pair.run();
    assert_eq!(read(&mut pair.b, id).0, b"arrived");
    assert_eq!(pair.b.stats().duplicates, 1);
    assert_eq!(pair.a.retained_bytes(), 0);
}

#[test]
fn a_resume_serves_once() {
    let mut pair = Pair::open(&config());
    pair.cut();
    let on_a = pair.a.dial(false).unwrap();
    let flight = drain(pair.now, &mut pair.a, on_a);
    let on_b = pair.accept(&flight).unwrap();
    pair.wires.push((on_a, on_b));
    pair.run();
    assert_eq!(
        pair.resumes(&flight).0,
        None,
        "the token is no longer expected"
    );
    let stale = TransportFault::StaleResume {
        counter: 1,
        highest: 1,
    };
    assert_eq!(pair.b.accept_transport(1), Err(stale));
    assert!(pair.b.is_up(on_b));
}

#[test]
fn an_older_resume_that_was_overtaken_is_refused() {
    let mut pair = Pair::open(&config());
    let first = pair.a.dial(true).unwrap();
    let slow = drain(pair.now, &mut pair.a, first);
    let (counter, rest) = pair.resumes(&slow);
    let waiting = pair.b.accept_transport(counter.unwrap()).unwrap();
    pair.dial(false);
    let fault = feed(pair.now, &mut pair.b, waiting, &rest);
    assert_eq!(
        fault,
        Err(TransportFault::StaleResume {
            counter: 1,
            highest: 2
        })
    );
    pair.b.transport_lost(waiting);
    pair.a.transport_lost(first);
    let id = pair.stream();
    write(pair.now, &mut pair.a, id, b"all is well");
    pair.run();
    assert_eq!(read(&mut pair.b, id).0, b"all is well");
}

#[test]
fn a_soft_move_retires_the_old_transport() {
    let mut pair = Pair::open(&config());
    let id = pair.stream();
    write(pair.now, &mut pair.a, id, b"old ");
    let old = pair.wires[0];
    let new = pair.dial(false);
    pair.a.retire(old.0);
    write(pair.now, &mut pair.a, id, b"new");
    pair.run();
    assert_eq!(read(&mut pair.b, id).0, b"old new");
    assert!(pair.events_a.contains(&Event::TransportDone(old.0)));
    assert!(pair.events_b.contains(&Event::TransportDone(old.1)));
    assert_eq!(pair.a.active(), Some(new.0));
    assert_eq!(pair.b.active(), Some(new.1));
    assert_eq!(
        pair.a.stats().records_resent,
        0,
        "a soft move loses nothing"
    );
}

#[test]
fn a_standby_carries_nothing_until_it_is_chosen() {
    let mut pair = Pair::open(&config());
    let id = pair.stream();
    let standby = pair.dial(true);
    pair.run();
    assert_ne!(pair.a.active(), Some(standby.0));
    assert_ne!(pair.b.active(), Some(standby.1));
    pair.a.set_active(standby.0);
    pair.run();
    assert_eq!(
        pair.b.active(),
        Some(standby.1),
        "the peer is asked to follow"
    );
    write(pair.now, &mut pair.b, id, b"over there");
    assert!(retained(&drain(pair.now, &mut pair.b, pair.wires[0].1)).is_empty());
    pair.run();
    assert_eq!(read(&mut pair.a, id).0, b"over there");
}

#[test]
fn a_retired_transport_is_never_chosen() {
    let mut pair = Pair::open(&config());
    let old = pair.wires[0];
    let new = pair.dial(false);
    pair.run();
    pair.b.set_active(old.1);
    pair.a.retire(old.0);
    pair.run();
    assert_eq!(pair.a.active(), Some(new.0));
    let id = pair.stream();
    write(pair.now, &mut pair.a, id, b"goes on");
    pair.run();
    assert_eq!(read(&mut pair.b, id).0, b"goes on");
}

#[test]
fn a_lost_acknowledgement_is_repeated_on_another_transport() {
    let mut pair = Pair::open(&config());
    let id = pair.stream();
    let first = pair.wires[0];
    let second = pair.dial(true);
    pair.run();
    write(pair.now, &mut pair.a, id, b"held");
    let bytes = drain(pair.now, &mut pair.a, first.0);
    feed(pair.now, &mut pair.b, first.1, &bytes).unwrap();
    pair.wait(Duration::from_millis(10));
    assert!(
        !drain(pair.now, &mut pair.b, first.1).is_empty(),
        "the acknowledgement is lost"
    );
    pair.b.transport_lost(first.1);
    let again = drain(pair.now, &mut pair.b, second.1);
    feed(pair.now, &mut pair.a, second.0, &again).unwrap();
    assert_eq!(pair.a.retained_bytes(), 0);
}

#[test]
fn damaged_bytes_end_a_transport_and_no_more() {
    let mut pair = Pair::open(&config());
    let id = pair.stream();
    write(pair.now, &mut pair.a, id, b"precious");
    let (on_a, on_b) = pair.wires[0];
    let mut bytes = drain(pair.now, &mut pair.a, on_a);
    *bytes.last_mut().unwrap() ^= 1;
    let fault = feed(pair.now, &mut pair.b, on_b, &bytes);
    assert_eq!(fault, Err(TransportFault::Seal(SealError::NotAuthentic)));
    assert!(pair.b.is_open());
    pair.cut();
    pair.dial(false);
    pair.run();
    assert_eq!(read(&mut pair.b, id).0, b"precious");
}

#[test]
fn keys_turn_over_while_records_flow() {
    let config = Config {
        rekey_records: 10,
        ..config()
    };
    let mut pair = Pair::open(&config);
    let id = pair.stream();
    for n in 0..100u8 {
        write(pair.now, &mut pair.a, id, &[n]);
        if n % 5 == 0 {
            pair.run();
        }
    }
    pair.run();
    assert_eq!(read(&mut pair.b, id).0, (0..100).collect::<Vec<u8>>());
    assert!(pair.a.stats().rekeys >= 9, "{:?}", pair.a.stats());
    assert_eq!(pair.a.retained_bytes(), 0);
}

#[test]
fn an_outage_stops_at_four_epochs_and_then_goes_on() {
    let config = Config {
        rekey_records: 10,
        ..config()
    };
    let mut pair = Pair::open(&config);
    let id = pair.stream();
    pair.cut();
    let mut sent = 0u64;
    while pair.a.capacity(id) > 0 {
        write(pair.now, &mut pair.a, id, b"x");
        sent += 1;
        assert!(sent < 100, "more epochs than the peer may hold");
    }
    pair.dial(false);
    pair.run();
    assert_eq!(read(&mut pair.b, id).0.len() as u64, sent);
    assert!(pair.events_a.contains(&Event::Writable));
}

/// Renews keys on `pair` with a stand-in for TLS of one message each way.
fn renew(pair: &mut Pair, number: u8) -> Option<u16> {
    let generation = pair.a.reauth_begin()?;
    pair.a.reauth_send(b"hello from a");
    pair.run();
    pair.b.reauth_send(b"hello from b");
    pair.run();
    let exporter = Secret::new([number; 32]);
    pair.a
        .reauth_complete(pair.now, Aead::Aes256Gcm, exporter.clone());
    pair.b.reauth_complete(pair.now, Aead::Aes256Gcm, exporter);
    Some(generation)
}

#[test]
fn keys_are_renewed_in_band() {
    let mut pair = Pair::open(&config());
    let id = pair.stream();
    assert_eq!(renew(&mut pair, 1), Some(1));
    pair.run();
    assert!(pair.events_b.iter().any(
        |e| matches!(e, Event::ReauthData { generation: 1, data } if &data[..] == b"hello from a")
    ));
    for events in [&pair.events_a, &pair.events_b] {
        assert!(events.contains(&Event::Reauthenticated { generation: 1 }));
    }
    write(pair.now, &mut pair.a, id, b"renewed");
    let bytes = drain(pair.now, &mut pair.a, pair.wires[0].0);
    assert!(records(&bytes).iter().all(|(h, _)| h.epoch >> 16 == 1));
    feed(pair.now, &mut pair.b, pair.wires[0].1, &bytes).unwrap();
    assert_eq!(read(&mut pair.b, id).0, b"renewed");
    pair.run();
    assert_eq!(renew(&mut pair, 2), Some(2));
}

#[test]
fn a_renewal_waits_for_the_last_one_at_the_peer() {
    let mut pair = Pair::open(&config());
    renew(&mut pair, 1);
    // The responder's outcome reaches the initiator; the initiator's does not reach the responder.
    let (on_a, on_b) = pair.wires[0];
    let done = drain(pair.now, &mut pair.b, on_b);
    feed(pair.now, &mut pair.a, on_a, &done).unwrap();
    assert_eq!(
        pair.a.poll_event(),
        Some(Event::Reauthenticated { generation: 1 })
    );
    assert_eq!(pair.a.reauth_begin(), None);
    pair.run();
    let id = pair.stream();
    write(pair.now, &mut pair.b, id, b"with the new keys");
    pair.run();
    assert_eq!(pair.a.reauth_begin(), Some(2));
}
