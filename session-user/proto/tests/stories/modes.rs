//! Streams that use more than one transport: redundant, bonded, in lanes; and a move under load.

use std::io::IoSlice;
use std::time::Duration;

use bytes::BytesMut;

use super::pair::{Pair, config, drain, feed, read, retained, write};
use session_proto::Time;
use session_proto::session::{Event, Handle, Session, StreamId, own_lane};
use session_proto::wire::{Mode, Route, Service};

const RTT: Duration = Duration::from_millis(40);
const OTHER_LINK: Route = Route { path: 256, lane: 0 };

fn open(pair: &mut Pair, mode: Mode, own_lane: bool) -> StreamId {
    let service = Service {
        mode,
        own_lane,
        ..Service::default()
    };
    let id = pair.a.open_with(super::pair::target(), service).unwrap();
    pair.run();
    assert_eq!(
        pair.b.service(id),
        Some(service),
        "the peer serves it alike"
    );
    pair.b.connected(id);
    pair.run();
    id
}

/// A pair with a standby over another link.
fn two_links() -> (Pair, (Handle, Handle), (Handle, Handle)) {
    let mut pair = Pair::open(&config());
    let standby = pair.dial_over(OTHER_LINK, true);
    pair.run();
    assert_eq!(pair.b.route(standby.1), Some(OTHER_LINK));
    let first = pair.wires[0];
    (pair, first, standby)
}

/// Both ends learn what a transport carries: `bytes` a round trip, with more behind them.
fn teach(pair: &mut Pair, on: (Handle, Handle), bytes: usize) {
    let id = pair.stream();
    pair.a.set_active(on.0);
    pair.run();
    // The other one does not help any more.
    pair.wait(Duration::from_secs(2));
    let mut input = BytesMut::new();
    for _ in 0..20 {
        // The socket takes no more than so much: something always waits behind it.
        while pair.a.queued_bytes(on.0) < 2 * bytes {
            let n = pair.a.capacity(id);
            if n == 0 {
                break;
            }
            write(pair.now, &mut pair.a, id, &vec![0; n]);
        }
        let there = drain_some(pair.now, &mut pair.a, on.0, bytes);
        pair.wait(RTT);
        input.extend_from_slice(&there);
        pair.b.handle_bytes(pair.now, on.1, &mut input).unwrap();
        let back = drain(pair.now, &mut pair.b, on.1);
        feed(pair.now, &mut pair.a, on.0, &back).unwrap();
        read(&mut pair.b, id);
        pair.wait(Duration::from_millis(6));
        let back = drain(pair.now, &mut pair.b, on.1);
        feed(pair.now, &mut pair.a, on.0, &back).unwrap();
    }
    input.extend_from_slice(&drain(pair.now, &mut pair.a, on.0));
    pair.wait(RTT * 3);
    pair.b.handle_bytes(pair.now, on.1, &mut input).unwrap();
    pair.run();
    read(&mut pair.b, id);
    pair.run();
}

/// What `session` has for `handle`, up to `limit` bytes.
fn drain_some(now: Time, session: &mut Session, handle: Handle, limit: usize) -> Vec<u8> {
    let mut out = Vec::new();
    while out.len() < limit && session.prepare(now, handle) {
        let mut slices = [IoSlice::new(&[]); 64];
        let filled = session.slices(handle, &mut slices);
        let before = out.len();
        for slice in &slices[..filled] {
            let part = slice.len().min(limit - out.len());
            out.extend_from_slice(&slice[..part]);
        }
        let taken = out.len() - before;
        session.transmitted(now, handle, taken);
    }
    out
}

#[test]
fn redundant_records_go_over_both_links_and_a_cut_loses_none() {
    let (mut pair, first, standby) = two_links();
    let id = open(&mut pair, Mode::Redundant, false);
    let before = pair.a.stats();
    let dropped = pair.b.stats().duplicates;
    write(pair.now, &mut pair.a, id, b"twice");
    let one = drain(pair.now, &mut pair.a, first.0);
    let other = drain(pair.now, &mut pair.a, standby.0);
    assert_eq!(retained(&one), retained(&other), "the same sealed bytes");
    assert_eq!(pair.a.stats().records_resent, before.records_resent);
    assert_eq!(pair.a.stats().records_doubled, before.records_doubled + 1);

    feed(pair.now, &mut pair.b, standby.1, &other).unwrap();
    assert_eq!(read(&mut pair.b, id).0, b"twice", "the first copy serves");
    feed(pair.now, &mut pair.b, first.1, &one).unwrap();
    assert_eq!(read(&mut pair.b, id).0, b"", "the second is dropped");
    assert_eq!(pair.b.stats().duplicates, dropped + 1);

    write(pair.now, &mut pair.a, id, b", cut");
    let _lost = drain(pair.now, &mut pair.a, first.0);
    let other = drain(pair.now, &mut pair.a, standby.0);
    pair.a.transport_lost(first.0);
    let after = drain(pair.now, &mut pair.a, standby.0);
    assert!(retained(&after).is_empty(), "nothing has to be sent again");
    feed(pair.now, &mut pair.b, standby.1, &other).unwrap();
    assert_eq!(read(&mut pair.b, id).0, b", cut");
}

#[test]
fn a_wrong_guess_does_not_end_redundancy() {
    let (mut pair, first, standby) = two_links();
    teach(&mut pair, first, 1000);
    let id = open(&mut pair, Mode::Redundant, false);
    write(pair.now, &mut pair.a, id, b"slow");
    let there = drain(pair.now, &mut pair.a, first.0);
    let at = pair.a.poll_timeout().unwrap();
    pair.now = at;
    pair.a.handle_timeout(at);
    feed(pair.now, &mut pair.b, first.1, &there).unwrap();
    pair.wait(Duration::from_millis(6));
    let back = drain(pair.now, &mut pair.b, first.1);
    feed(pair.now, &mut pair.a, first.0, &back).unwrap();
    write(pair.now, &mut pair.a, id, b" but twice");
    assert_eq!(retained(&drain(pair.now, &mut pair.a, first.0)).len(), 1);
    assert!(!retained(&drain(pair.now, &mut pair.a, standby.0)).is_empty());
}

#[test]
fn each_link_of_a_redundant_stream_is_asked_whether_it_answers() {
    let (mut pair, first, standby) = two_links();
    teach(&mut pair, first, 1000);
    let id = open(&mut pair, Mode::Redundant, false);
    pair.events_a.clear();
    // The active link is dead and the other acknowledges everything.
    for _ in 0..200 {
        write(pair.now, &mut pair.a, id, b"-");
        drop(drain(pair.now, &mut pair.a, first.0));
        let other = drain(pair.now, &mut pair.a, standby.0);
        feed(pair.now, &mut pair.b, standby.1, &other).unwrap();
        pair.wait(Duration::from_millis(5));
        let back = drain(pair.now, &mut pair.b, standby.1);
        feed(pair.now, &mut pair.a, standby.0, &back).unwrap();
        if pair.a.poll_timeout().is_some_and(|at| at <= pair.now) {
            pair.a.handle_timeout(pair.now);
        }
        if pair.a.active() == Some(standby.0) {
            break;
        }
    }
    assert_eq!(pair.a.active(), Some(standby.0), "the dead one is left");
    let events: Vec<Event> = std::iter::from_fn(|| pair.a.poll_event()).collect();
    assert!(events.contains(&Event::TransportSilent(first.0)));
}

#[test]
fn bonded_records_are_spread_by_what_each_link_carries() {
    let (mut pair, first, standby) = two_links();
    teach(&mut pair, first, 30_000);
    teach(&mut pair, standby, 90_000);
    let id = open(&mut pair, Mode::Bonded, false);
    let data: Vec<u8> = (0..240_000u32).map(|i| (i % 251) as u8).collect();
    let (mut slow, mut fast) = (Vec::new(), Vec::new());
    for chunk in data.chunks(40_000) {
        write(pair.now, &mut pair.a, id, chunk);
        slow.extend(drain(pair.now, &mut pair.a, first.0));
        fast.extend(drain(pair.now, &mut pair.a, standby.0));
    }
    // What is under way on each fills its path: neither is left alone, and neither gets all.
    let part = slow.len() as f64 / (slow.len() + fast.len()) as f64;
    let rates = [first.0, standby.0].map(|h| pair.a.rate(h));
    assert!(
        (0.15..0.85).contains(&part),
        "{part:.2} went over one link ({rates:?})"
    );
    // The fast link's part comes first: it waits for the gaps to be filled.
    feed(pair.now, &mut pair.b, standby.1, &fast).unwrap();
    feed(pair.now, &mut pair.b, first.1, &slow).unwrap();
    assert_eq!(read(&mut pair.b, id).0, data);
    assert!(pair.b.stats().reorder_bytes_max > 0);
}

#[test]
fn lanes_keep_streams_apart_and_fail_together() {
    let mut pair = Pair::open(&config());
    let first = pair.wires[0];
    let other = pair.dial_over(OTHER_LINK, true);
    pair.run();
    let id = open(&mut pair, Mode::Single, true);
    let lane = Route {
        path: 0,
        lane: own_lane(id),
    };
    let lane = pair.dial_over(lane, true);
    pair.run();
    write(pair.now, &mut pair.a, id, b"in its lane");
    assert!(retained(&drain(pair.now, &mut pair.a, first.0)).is_empty());
    let lost = drain(pair.now, &mut pair.a, lane.0);
    assert_eq!(retained(&lost).len(), 1);
    // The lane is silent: its path is in doubt, so the other link is tried.
    let at = pair.a.poll_timeout().unwrap();
    pair.now = at;
    pair.a.handle_timeout(at);
    assert_eq!(
        retained(&drain(pair.now, &mut pair.a, other.0)),
        retained(&lost)
    );
    assert!(
        !drain(pair.now, &mut pair.a, first.0).is_empty(),
        "and the path is asked"
    );
}

#[test]
fn a_stream_that_takes_all_it_gets_moves_to_a_lane() {
    let mut pair = Pair::open(&config());
    let first = pair.wires[0];
    let lane = pair.dial_over(Route { path: 0, lane: 1 }, true);
    pair.run();
    let bulk = pair.stream();
    let other = pair.stream();
    let mut queued = 0;
    while pair.a.capacity(bulk) > 0 && queued < 4 << 20 {
        let n = pair.a.capacity(bulk);
        write(pair.now, &mut pair.a, bulk, &vec![0; n]);
        queued += n;
        // The peer's credit does not end before the queue is full.
        pair.a.transmitted(pair.now, first.0, 0);
        if pair.a.capacity(bulk) == 0 {
            break;
        }
    }
    write(pair.now, &mut pair.a, other, b"small");
    let on_first = drain(pair.now, &mut pair.a, first.0);
    let on_lane = drain(pair.now, &mut pair.a, lane.0);
    assert!(!retained(&on_first).is_empty());
    assert!(queued > 0 && on_lane.len() < queued);
}

#[test]
fn a_soft_move_under_load_lets_the_old_link_help_until_the_new_one_carries() {
    let (mut pair, first, standby) = two_links();
    let id = open(&mut pair, Mode::Single, false);
    pair.a.set_active(standby.0);
    assert_eq!(pair.a.active(), Some(standby.0));
    // The new transport's socket takes nothing yet.
    let mut written = 0;
    while written < 100_000 {
        let n = pair.a.capacity(id).min(100_000 - written);
        assert!(n > 0, "no capacity after {written} bytes");
        write(pair.now, &mut pair.a, id, &vec![0; n]);
        written += n;
        let old = drain(pair.now, &mut pair.a, first.0);
        feed(pair.now, &mut pair.b, first.1, &old).unwrap();
    }
    let new = drain(pair.now, &mut pair.a, standby.0);
    assert!(!retained(&new).is_empty(), "the new link is used first");
    assert!(
        new.len() < 60_000,
        "{} bytes wait on the new link",
        new.len()
    );
    // A second later the old one is at rest.
    feed(pair.now, &mut pair.b, standby.1, &new).unwrap();
    pair.run();
    read(&mut pair.b, id);
    pair.run();
    pair.wait(Duration::from_secs(2));
    pair.a.handle_timeout(pair.now);
    write(pair.now, &mut pair.a, id, &[0; 10_000]);
    write(pair.now, &mut pair.a, id, &[0; 10_000]);
    assert!(retained(&drain(pair.now, &mut pair.a, first.0)).is_empty());
}

#[test]
fn redundant_records_wait_for_the_slower_transport_unless_it_is_stuck() {
    let (mut pair, first, standby) = two_links();
    let id = open(&mut pair, Mode::Redundant, false);
    write(pair.now, &mut pair.a, id, &vec![1; 32 * 1024]);
    // The first link's socket takes nothing for now, the other everything.
    assert!(pair.a.prepare(pair.now, first.0));
    drain(pair.now, &mut pair.a, standby.0);
    assert_eq!(pair.a.queued_bytes(standby.0), 0);
    assert_eq!(pair.a.capacity(id), 0, "the other one must not run ahead");
    while pair.a.poll_event().is_some() {}
    pair.wait(Duration::from_millis(13));
    assert!(pair.a.poll_timeout().is_some_and(|at| at <= pair.now));
    pair.a.handle_timeout(pair.now);
    let mut events = std::iter::from_fn(|| pair.a.poll_event());
    assert!(events.any(|event| event == Event::Writable));
    assert!(pair.a.capacity(id) > 0, "nothing may come of it any more");
    drain(pair.now, &mut pair.a, first.0);
    assert!(pair.a.capacity(id) > 0);
}

#[test]
fn streams_in_bulk_leave_room_for_redundant_ones() {
    let (mut pair, first, _) = two_links();
    let redundant = open(&mut pair, Mode::Redundant, false);
    let single = pair.stream();
    let mut written = 0;
    while let Some(n @ 1..) = Some(pair.a.capacity(single)) {
        write(pair.now, &mut pair.a, single, &vec![1; n]);
        written += n;
    }
    assert!(written < 64 * 1024, "{written}");
    // Little has to go before there is room for the one that waits.
    let mut slices = [std::io::IoSlice::new(&[]); 64];
    assert!(pair.a.prepare(pair.now, first.0));
    let filled = pair.a.slices(first.0, &mut slices);
    let staged: usize = slices[..filled].iter().map(|s| s.len()).sum();
    pair.a.transmitted(pair.now, first.0, staged);
    assert!(pair.a.capacity(redundant) > 0);
}

#[test]
fn a_transport_whose_copies_need_not_be_sent_any_more_is_idle() {
    let (mut pair, first, standby) = two_links();
    let id = open(&mut pair, Mode::Redundant, false);
    // The first record brings a PING along, which is to be answered; the next one does not.
    write(pair.now, &mut pair.a, id, b"first");
    for (on_a, on_b) in [first, standby] {
        let there = drain(pair.now, &mut pair.a, on_a);
        feed(pair.now, &mut pair.b, on_b, &there).unwrap();
        let back = drain(pair.now, &mut pair.b, on_b);
        feed(pair.now, &mut pair.a, on_a, &back).unwrap();
    }
    write(pair.now, &mut pair.a, id, b"both");
    assert!(pair.a.prepare(pair.now, standby.0));
    // The standby's socket takes nothing, and the other link's answer comes.
    let wire = drain(pair.now, &mut pair.a, first.0);
    feed(pair.now, &mut pair.b, first.1, &wire).unwrap();
    pair.wait(Duration::from_millis(6));
    let back = drain(pair.now, &mut pair.b, first.1);
    feed(pair.now, &mut pair.a, first.0, &back).unwrap();
    assert_eq!(pair.a.queued_bytes(standby.0), 0);
    pair.wait(Duration::from_secs(5));
    pair.a.handle_timeout(pair.now);
    assert!(!pair.a.is_silent(standby.0));
}

#[test]
fn a_queue_that_need_not_be_sent_any_more_makes_room() {
    let (mut pair, first, standby) = two_links();
    let redundant = [(); 3].map(|()| open(&mut pair, Mode::Redundant, false));
    let single = pair.stream();
    // The first link's socket takes nothing: what it was to carry waits, and is waited for no more.
    let mut copies = Vec::new();
    write(pair.now, &mut pair.a, redundant[0], b"begin");
    assert!(pair.a.prepare(pair.now, first.0));
    copies.extend(drain(pair.now, &mut pair.a, standby.0));
    pair.wait(Duration::from_millis(13));
    copies.extend(drain(pair.now, &mut pair.a, standby.0));
    for id in redundant {
        write(pair.now, &mut pair.a, id, &vec![1; 200 * 1024]);
        copies.extend(drain(pair.now, &mut pair.a, standby.0));
    }
    assert_eq!(pair.a.capacity(single), 0);
    while pair.a.poll_event().is_some() {}
    feed(pair.now, &mut pair.b, standby.1, &copies).unwrap();
    assert_eq!(pair.a.capacity(single), 0, "the copies may not arrive");
    pair.wait(Duration::from_millis(6));
    let back = drain(pair.now, &mut pair.b, standby.1);
    feed(pair.now, &mut pair.a, standby.0, &back).unwrap();
    let mut events = std::iter::from_fn(|| pair.a.poll_event());
    assert!(events.any(|event| event == Event::Writable));
    assert!(pair.a.capacity(single) > 0);
    // But for a PING.
    assert!(pair.a.queued_bytes(first.0) < 64);
}
