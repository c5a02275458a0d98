//! Urgent bytes: they come as such, at their place, whatever happens to transports.

use super::pair::{Pair, config, drain, feed, target, write};
use super::session::forged;
use session_proto::session::{Event, Session, StreamId};
use session_proto::wire::{Frame, Service, StreamHeader, close_code};

fn write_urgent(pair: &mut Pair, id: StreamId, data: &[u8]) {
    assert!(pair.a.capacity(id) >= data.len());
    pair.a.write_urgent(pair.now, id, data).unwrap();
}

/// All that can be read, as far as it is shown at once; urgent bytes in brackets.
fn shown(session: &mut Session, id: StreamId) -> String {
    let mut out = String::new();
    loop {
        let bytes: Vec<u8> = session.readable(id).flatten().copied().collect();
        if bytes.is_empty() {
            return out;
        }
        let text = String::from_utf8_lossy(&bytes);
        out += &if session.is_urgent(id) {
            format!("[{text}]")
        } else {
            text.into_owned()
        };
        session.consume(id, bytes.len());
    }
}

#[test]
fn an_urgent_byte_comes_at_its_place() {
    let mut pair = Pair::open(&config());
    let id = pair.stream();
    write(pair.now, &mut pair.a, id, b"before");
    write_urgent(&mut pair, id, b"!after");
    pair.run();
    assert_eq!(shown(&mut pair.b, id), "before[!]after");
    write_urgent(&mut pair, id, b"?");
    pair.run();
    assert_eq!(shown(&mut pair.b, id), "[?]");
    assert_eq!(pair.a.retained_bytes(), 0);
}

#[test]
fn the_other_way_too_and_the_last_one_wins() {
    let mut pair = Pair::open(&config());
    let id = pair.stream();
    for data in [b"!one", b"!two"] {
        assert!(pair.b.capacity(id) > 0);
        pair.b.write_urgent(pair.now, id, data).unwrap();
    }
    pair.run();
    assert_eq!(shown(&mut pair.a, id), "!one[!]two");
}

#[test]
fn a_mark_survives_its_transport() {
    let mut pair = Pair::open(&config());
    let id = pair.stream();
    write(pair.now, &mut pair.a, id, b"before");
    write_urgent(&mut pair, id, b"!");
    write(pair.now, &mut pair.a, id, b"after");
    pair.cut();
    pair.dial(false);
    pair.run();
    assert_eq!(shown(&mut pair.b, id), "before[!]after");
}

#[test]
fn a_mark_that_overtakes_waits_for_its_place() {
    let mut pair = Pair::open(&config());
    let id = pair.stream();
    let (on_a, on_b) = pair.wires[0];
    write(pair.now, &mut pair.a, id, b"before");
    let slow = drain(pair.now, &mut pair.a, on_a);
    write_urgent(&mut pair, id, b"!after");
    let fast = drain(pair.now, &mut pair.a, on_a);
    feed(pair.now, &mut pair.b, on_b, &fast).unwrap();
    assert_eq!(shown(&mut pair.b, id), "");
    feed(pair.now, &mut pair.b, on_b, &slow).unwrap();
    assert_eq!(shown(&mut pair.b, id), "before[!]after");
}

#[test]
fn an_older_mark_and_one_of_another_stream_change_nothing() {
    let mut pair = Pair::open(&config());
    let mut frames = Vec::new();
    Frame::Open {
        id: 0,
        target: target(),
        service: Service::default(),
    }
    .encode(&mut frames);
    let header = StreamHeader {
        id: 0,
        offset: 0,
        fin: true,
    };
    let data = b"abc";
    Frame::Stream { header, data }.encode(&mut frames);
    // Of a stream that is not open yet.
    Frame::Urgent { id: 2, offset: 7 }.encode(&mut frames);
    Frame::Urgent { id: 0, offset: 1 }.encode(&mut frames);
    Frame::Urgent { id: 0, offset: 0 }.encode(&mut frames);
    let on_b = pair.wires[0].1;
    feed(pair.now, &mut pair.b, on_b, &forged(&frames)).unwrap();
    assert!(pair.b.is_open());
    assert_eq!(shown(&mut pair.b, 0), "a[b]c");
}

#[test]
fn a_mark_where_no_byte_may_be_ends_the_session() {
    let beyond_credit = (
        Frame::Urgent {
            id: 0,
            offset: 1 << 40,
        },
        close_code::FLOW_CONTROL,
    );
    let never_opened = (
        Frame::Urgent { id: 1, offset: 0 },
        close_code::PROTOCOL_VIOLATION,
    );
    for (frame, expected) in [beyond_credit, never_opened] {
        let mut pair = Pair::open(&config());
        let on_b = pair.wires[0].1;
        let mut frames = Vec::new();
        frame.encode(&mut frames);
        feed(pair.now, &mut pair.b, on_b, &forged(&frames)).unwrap();
        let mut events = std::iter::from_fn(|| pair.b.poll_event());
        let closed = |e: Event| matches!(e, Event::Closed { code, .. } if code == expected);
        assert!(events.any(closed), "{frame:?}");
    }
}
