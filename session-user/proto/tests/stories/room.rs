//! What streams wait for that can send nothing, and who waits for the same.

use std::time::Duration;

use bytes::BufMut as _;

use super::pair::{Pair, config, drain, read, target, write};
use session_proto::session::{Config, Handle, Lack, LaneChoice, Session, StreamId, Way, own_lane};
use session_proto::wire::{Mode, Route, Service};

/// A stream of `pair` that asks for a lane to itself, and that lane.
fn in_own_lane(pair: &mut Pair) -> (StreamId, Handle) {
    let service = Service {
        own_lane: true,
        ..Service::default()
    };
    let id = pair.a.open_with(target(), service).unwrap();
    let lane = own_lane(id);
    let (handle, _) = pair.dial_over(Route { path: 0, lane }, true);
    pair.run();
    (id, handle)
}

/// Writes on `id` until there is no room; returns how much that was.
fn fill(pair: &mut Pair, id: StreamId) -> usize {
    let mut written = 0;
    while let n @ 1.. = pair.a.capacity(id) {
        write(pair.now, &mut pair.a, id, &vec![1; n]);
        written += n;
    }
    written
}

/// The peer's application reads on `id`, so that credit is not what it lacks first.
fn prove(pair: &mut Pair, id: StreamId) {
    for _ in 0..20 {
        fill(pair, id);
        pair.run();
        read(&mut pair.b, id);
        pair.run();
    }
    // What it was before is forgotten.
    pair.wait(Duration::from_secs(2));
    pair.a.handle_timeout(pair.now);
    pair.run();
}

#[test]
fn a_record_is_charged_for_all_of_the_buffer_that_it_keeps() {
    let mut pair = Pair::open(&config());
    let id = pair.stream();
    let with = |session: &mut Session, bytes: usize| {
        let mut buf = session.send_buf(20_000);
        buf.unfilled(bytes).put_bytes(1, bytes);
        buf
    };
    // There are buffers of 16 KiB and of 32.
    assert!(with(&mut pair.a, 16_000).is_mostly_empty());
    let buf = with(&mut pair.a, 17_000);
    assert!(!buf.is_mostly_empty());
    pair.a.write(pair.now, id, buf).unwrap();
    assert!(pair.a.retained_bytes() > 32 * 1024);
    pair.run();
    assert_eq!(pair.a.retained_bytes(), 0);
}

const fn alone(lane: u64) -> Lack {
    Lack::Queue(Way {
        mode: Mode::Single,
        lane: LaneChoice::Own(lane),
    })
}

#[test]
fn streams_in_lanes_of_their_own_wait_for_those() {
    let mut pair = Pair::open(&Config::default());
    let (one, lane) = in_own_lane(&mut pair);
    let (two, _) = in_own_lane(&mut pair);
    prove(&mut pair, one);
    prove(&mut pair, two);
    assert!(fill(&mut pair, one) > 0);
    assert_eq!(pair.a.lack(one), alone(own_lane(one)));
    assert!(fill(&mut pair, two) > 0, "the other lane has room");
    assert_eq!(pair.a.lack(two), alone(own_lane(two)));
    drain(pair.now, &mut pair.a, lane);
    assert!(pair.a.capacity(one) > 0);
    assert_eq!(pair.a.capacity(two), 0);
}

#[test]
fn a_stream_that_has_to_wait_for_the_first_time_takes_a_lane_at_once() {
    let mut pair = Pair::open(&Config::default());
    let first = pair.wires[0].0;
    let (lane, _) = pair.dial_over(Route { path: 0, lane: 1 }, true);
    pair.run();
    let id = pair.stream();
    prove(&mut pair, id);
    fill(&mut pair, id);
    let queued = [first, lane].map(|h| pair.a.queued_bytes(h));
    assert!(queued.iter().all(|bytes| *bytes > 64 * 1024), "{queued:?}");
    let way = Way {
        mode: Mode::Single,
        lane: LaneChoice::Nth { nth: 0, of: 1 },
    };
    assert_eq!(pair.a.lack(id), Lack::Queue(way));
}

#[test]
fn what_is_no_queue_s_is_told_apart() {
    let mut pair = Pair::open(&config());
    let first = pair.wires[0].0;
    let id = pair.stream();
    // The peer's application reads nothing.
    while fill(&mut pair, id) > 0 {
        drain(pair.now, &mut pair.a, first);
    }
    assert_eq!(pair.a.lack(id), Lack::OwnCredit);
    pair.a.finish(id).unwrap();
    assert_eq!((pair.a.capacity(id), pair.a.lack(id)), (0, Lack::Ended));
    // Nothing is acknowledged any more, until no further key may be taken.
    let mut pair = Pair::open(&Config {
        rekey_records: 10,
        ..config()
    });
    let id = pair.stream();
    pair.cut();
    while pair.a.capacity(id) > 0 {
        write(pair.now, &mut pair.a, id, b"x");
    }
    assert_eq!(pair.a.lack(id), Lack::Common);
}
