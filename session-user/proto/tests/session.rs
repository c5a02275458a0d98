//! The plain stories of a session, one promise each.

mod pair;

use std::time::Duration;

use pair::{Pair, drain, feed, read, secret, target, write};
use session_proto::seal::{Aead, Direction, SealError, Secret};
use session_proto::session::{Config, Event, StreamError, TransportFault};
use session_proto::wire::{Frame, RecordHeader, Space, close_code};

const ECONNREFUSED: u64 = 111;
const ECONNRESET: u64 = 104;

fn config() -> Config {
    Config {
        memory_bytes: 4 << 20,
        max_streams: 8,
        stream_window_max: 256 * 1024,
        ..Config::default()
    }
}

/// The records in `bytes`, as header and all of its bytes.
fn records(mut bytes: &[u8]) -> Vec<(RecordHeader, &[u8])> {
    let mut out = Vec::new();
    while let Some(raw) = bytes.first_chunk() {
        let header = RecordHeader::parse(raw).unwrap();
        let (record, rest) = bytes.split_at(16 + header.payload_bytes);
        out.push((header, record));
        bytes = rest;
    }
    out
}

fn retained(bytes: &[u8]) -> Vec<&[u8]> {
    let all = records(bytes).into_iter();
    all.filter(|(h, _)| h.space == Space::Retained)
        .map(|(_, record)| record)
        .collect()
}

#[test]
fn a_handshake_opens_both_ends() {
    let mut pair = Pair::fresh(&config());
    assert_eq!(pair.a.open(target()), Err(StreamError::NotOpen));
    pair.run();
    assert!(matches!(&pair.events_b[..], [Event::Hello(p)] if p.initial_max_streams == 8));
    assert!(!pair.a.is_open() && !pair.b.is_open());
    pair.b.accept(Some(true));
    pair.run();
    assert!(matches!(&pair.events_a[0], Event::Accepted(p) if p.continued == Some(true)));
    assert!(pair.a.is_open() && pair.b.is_open());
    assert_eq!(pair.a.id(), pair.b.id());
}

#[test]
fn bytes_are_echoed_and_each_half_ends_alone() {
    let mut pair = Pair::open(&config());
    let id = pair.stream();
    assert!(pair.events_b.contains(&Event::StreamOpened {
        id,
        target: target()
    }));
    assert!(pair.events_a.contains(&Event::StreamConnected(id)));

    write(pair.now, &mut pair.a, id, b"to the peer");
    pair.a.finish(id).unwrap();
    pair.run();
    assert_eq!(read(&mut pair.b, id), (b"to the peer".to_vec(), true));
    // The other half goes on.
    write(pair.now, &mut pair.b, id, b"and back");
    pair.run();
    assert_eq!(read(&mut pair.a, id), (b"and back".to_vec(), false));
    pair.b.finish(id).unwrap();
    pair.run();
    assert_eq!(read(&mut pair.a, id), (Vec::new(), true));
    pair.run();
    assert_eq!(pair.a.streams().count() + pair.b.streams().count(), 0);
    assert_eq!(pair.a.retained_bytes() + pair.b.retained_bytes(), 0);
    assert!(
        !pair
            .events_a
            .iter()
            .chain(&pair.events_b)
            .any(|e| matches!(e, Event::StreamReset { .. }))
    );
}

#[test]
fn the_other_half_may_end_first() {
    let mut pair = Pair::open(&config());
    let id = pair.stream();
    pair.b.finish(id).unwrap();
    pair.run();
    assert_eq!(read(&mut pair.a, id), (Vec::new(), true));
    write(pair.now, &mut pair.a, id, b"late");
    pair.a.finish(id).unwrap();
    pair.run();
    assert_eq!(read(&mut pair.b, id), (b"late".to_vec(), true));
    assert_eq!(pair.a.streams().count() + pair.b.streams().count(), 0);
}

#[test]
fn a_refusal_carries_its_errno() {
    let mut pair = Pair::open(&config());
    let id = pair.a.open(target()).unwrap();
    write(pair.now, &mut pair.a, id, b"early");
    pair.run();
    pair.b.refuse(id, ECONNREFUSED);
    pair.run();
    assert!(pair.events_a.contains(&Event::StreamRefused {
        id,
        errno: ECONNREFUSED
    }));
    assert_eq!(pair.a.streams().count() + pair.b.streams().count(), 0);
    assert_eq!(pair.a.retained_bytes() + pair.b.memory_bytes(), 0);
}

#[test]
fn an_abort_by_the_opener_resets_the_peer() {
    let mut pair = Pair::open(&config());
    let id = pair.stream();
    write(pair.now, &mut pair.a, id, b"unread");
    pair.run();
    pair.a.abort(id, ECONNRESET);
    pair.run();
    assert!(pair.events_b.contains(&Event::StreamReset {
        id,
        code: ECONNRESET
    }));
    assert_eq!(pair.a.streams().count() + pair.b.streams().count(), 0);
    assert_eq!(pair.a.memory_bytes() + pair.b.memory_bytes(), 0);
}

#[test]
fn an_abort_by_the_acceptor_resets_the_opener() {
    let mut pair = Pair::open(&config());
    let id = pair.stream();
    pair.b.abort(id, ECONNRESET);
    pair.run();
    assert!(pair.events_a.contains(&Event::StreamReset {
        id,
        code: ECONNRESET
    }));
    assert_eq!(
        pair.a
            .write(pair.now, id, session_proto::session::SendBuf::copy_of(b"x")),
        Err(StreamError::Gone)
    );
    assert_eq!(pair.a.streams().count() + pair.b.streams().count(), 0);
}

#[test]
fn a_writer_hears_of_an_abort_after_it_read_the_end() {
    let mut pair = Pair::open(&config());
    let id = pair.stream();
    pair.b.finish(id).unwrap();
    pair.run();
    assert!(read(&mut pair.a, id).1);
    pair.b.abort(id, ECONNRESET);
    pair.run();
    assert!(pair.events_a.contains(&Event::StreamReset {
        id,
        code: ECONNRESET
    }));
}

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

#[test]
fn a_reader_that_stops_costs_bounded_memory_and_slows_nobody() {
    let mut pair = Pair::open(&config());
    let stuck = pair.stream();
    let mut sent = 0;
    loop {
        let n = pair.a.capacity(stuck);
        if n == 0 {
            break;
        }
        write(pair.now, &mut pair.a, stuck, &vec![1; n]);
        sent += n;
        pair.run();
        assert!(sent < 1 << 20, "credit has no end");
    }
    assert!(pair.b.memory_bytes() <= sent && sent <= 256 * 1024);
    assert_eq!(
        pair.a.retained_bytes(),
        0,
        "held within credit is acknowledged"
    );

    let other = pair.stream();
    for _ in 0..20 {
        write(pair.now, &mut pair.a, other, &[2; 10_000]);
        pair.run();
        assert_eq!(read(&mut pair.b, other).0.len(), 10_000);
        pair.run();
    }
    pair.events_a.clear();
    assert_eq!(pair.a.capacity(stuck), 0);
    assert_eq!(read(&mut pair.b, stuck).0.len(), sent);
    pair.run();
    assert!(
        pair.events_a.contains(&Event::Writable),
        "credit comes back"
    );
    assert!(pair.a.capacity(stuck) > 0);
}

#[test]
fn streams_are_limited_and_come_back() {
    let mut pair = Pair::open(&config());
    let ids: Vec<_> = (0..8).map(|_| pair.stream()).collect();
    assert_eq!(pair.a.open(target()), Err(StreamError::TooMany));
    for id in ids {
        pair.a.abort(id, ECONNRESET);
    }
    pair.run();
    assert!(pair.events_a.contains(&Event::StreamsAvailable));
    pair.a.open(target()).unwrap();
}

#[test]
fn either_end_closes_with_a_reason() {
    for by_initiator in [true, false] {
        let mut pair = Pair::open(&config());
        pair.stream();
        let now = pair.now;
        let closer = if by_initiator {
            &mut pair.a
        } else {
            &mut pair.b
        };
        closer.close(now, close_code::SHUTDOWN, "good night");
        pair.run();
        let closed = |by_peer| Event::Closed {
            code: close_code::SHUTDOWN,
            reason: "good night".to_owned(),
            by_peer,
        };
        assert!(pair.events_a.contains(&closed(!by_initiator)));
        assert!(pair.events_b.contains(&closed(by_initiator)));
        assert!(pair.a.is_closed() && pair.b.is_closed());
        assert_eq!(pair.a.poll_timeout(), None);
    }
}

#[test]
fn a_close_that_nobody_hears_ends_by_itself() {
    let mut pair = Pair::open(&config());
    pair.cut();
    pair.a.close(pair.now, close_code::NO_ERROR, "");
    assert!(pair.a.is_ending() && !pair.a.is_closed());
    pair.run();
    assert!(pair.a.is_closed());
}

#[test]
fn a_responder_may_say_no_to_hello() {
    let mut pair = Pair::fresh(&config());
    pair.run();
    pair.b
        .close(pair.now, close_code::LIMIT, "too many sessions");
    pair.run();
    assert!(pair.events_a.contains(&Event::Closed {
        code: close_code::LIMIT,
        reason: "too many sessions".to_owned(),
        by_peer: true,
    }));
}

/// The initiator's first record of space R, with `frames` in it.
fn forged(frames: &[u8]) -> Vec<u8> {
    let keys = secret().seal_keys(Direction::FromInitiator);
    let header = RecordHeader {
        space: Space::Retained,
        payload_bytes: frames.len() + 16,
        epoch: 0,
        number: 0,
    }
    .encode();
    let mut sealed = frames.to_vec();
    let tag = keys.retained().seal(&header, 0, &mut sealed);
    [&header[..], &sealed, &tag].concat()
}

#[test]
fn an_unknown_frame_is_skipped_unless_it_is_critical() {
    let mut pair = Pair::open(&config());
    let on_b = pair.wires[0].1;
    let mut frames = vec![0x21, 3, 1, 2, 3];
    Frame::MaxStreams { max: 50 }.encode(&mut frames);
    feed(pair.now, &mut pair.b, on_b, &forged(&frames)).unwrap();
    assert_eq!(
        pair.b.poll_event(),
        Some(Event::StreamsAvailable),
        "what follows is read"
    );
    assert!(pair.b.is_open());

    let mut pair = Pair::open(&config());
    let on_b = pair.wires[0].1;
    feed(pair.now, &mut pair.b, on_b, &forged(&[0xf1, 3, 1, 2, 3])).unwrap();
    let closed = pair.b.poll_event();
    assert!(matches!(
        closed,
        Some(Event::Closed {
            code: close_code::PROTOCOL_VIOLATION,
            by_peer: false,
            ..
        })
    ));
}

#[test]
fn data_beyond_credit_closes_the_session() {
    let mut pair = Pair::open(&config());
    let on_b = pair.wires[0].1;
    let mut frames = Vec::new();
    Frame::Open {
        id: 0,
        target: target(),
    }
    .encode(&mut frames);
    let header = session_proto::wire::StreamHeader {
        id: 0,
        offset: 1 << 40,
        fin: false,
    };
    Frame::Stream { header, data: b"x" }.encode(&mut frames);
    feed(pair.now, &mut pair.b, on_b, &forged(&frames)).unwrap();
    let events: Vec<Event> = std::iter::from_fn(|| pair.b.poll_event()).collect();
    assert!(events.iter().any(|e| matches!(
        e,
        Event::Closed {
            code: close_code::FLOW_CONTROL,
            ..
        }
    )));
}
