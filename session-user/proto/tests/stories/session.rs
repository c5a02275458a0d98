//! Opening, streams, limits, closing.

use super::pair::{Pair, config, feed, read, secret, target, write};
use session_proto::seal::Direction;
use session_proto::session::{Event, StreamError};
use session_proto::wire::{Frame, RecordHeader, Space, close_code};

const ECONNREFUSED: u64 = 111;
const ECONNRESET: u64 = 104;

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
    let reset = |e: &Event| matches!(e, Event::StreamReset { .. });
    assert!(!pair.events_b.iter().any(reset), "it comes behind the data");
    assert_eq!(read(&mut pair.b, id), (b"unread".to_vec(), false));
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
fn an_abort_behind_an_end_comes_behind_the_data_and_the_end() {
    let mut pair = Pair::open(&config());
    let id = pair.stream();
    write(pair.now, &mut pair.b, id, b"the whole answer");
    pair.b.finish(id).unwrap();
    pair.b.abort(id, ECONNRESET);
    pair.run();
    let reset = |e: &Event| matches!(e, Event::StreamReset { .. });
    assert!(!pair.events_a.iter().any(reset), "it comes behind the data");
    assert!(pair.a.is_aborted(id));
    assert_eq!(pair.a.capacity(id), 0);
    assert_eq!(read(&mut pair.a, id), (b"the whole answer".to_vec(), true));
    pair.run();
    assert!(pair.events_a.iter().any(reset));
    assert_eq!(pair.a.streams().count() + pair.b.streams().count(), 0);
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
        pair.events_a.contains(&Event::StreamWritable(stuck)),
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
pub fn forged(frames: &[u8]) -> Vec<u8> {
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
        service: session_proto::wire::Service::default(),
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
