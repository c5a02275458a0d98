//! Very many streams of one session.

use std::time::Duration;

use bytes::BytesMut;
use session_proto::limits::READ_BYTES_MAX;
use session_proto::session::{Config, Event, SendBuf, SharedMemory, StreamId};

use crate::pair::{Pair, config, drain, read, target, write};

/// Streams of which each reader is stuck.
const STUCK: usize = 1_000;
/// What the kernel of an application that never reads may take before its reader is stuck.
const KERNEL_BYTES: usize = 384 * 1024;

/// Opens `count` streams, which costs the two ends few turns.
fn streams(pair: &mut Pair, count: usize) -> Vec<StreamId> {
    let ids: Vec<_> = (0..count).map(|_| pair.a.open(target()).unwrap()).collect();
    pair.run();
    for &id in &ids {
        pair.b.connected(id);
    }
    pair.run();
    ids
}

/// Sends on all of `ids` until none has credit; each reader takes `first` bytes, into its kernel's buffers for instance, and
/// no more.
fn stick(pair: &mut Pair, ids: &[StreamId], first: usize) {
    let mut taken = vec![0; ids.len()];
    loop {
        let mut sent = 0;
        for (&id, taken) in ids.iter().zip(&mut taken) {
            let n = pair.a.capacity(id);
            if n > 0 {
                write(pair.now, &mut pair.a, id, &vec![7; n]);
                sent += n;
            }
            if *taken < first {
                *taken += read(&mut pair.b, id).0.len();
            }
        }
        pair.run();
        if sent == 0 {
            return;
        }
    }
}

#[test]
fn what_is_not_read_keeps_no_more_buffers_than_there_is_memory_for() {
    let config = Config {
        memory_bytes: 4 * READ_BYTES_MAX,
        ..config()
    };
    let mut pair = Pair::open(&config);
    let wire = pair.wires[0];
    let mut buffers: Vec<BytesMut> = (streams(&mut pair, 5).into_iter())
        .map(|id| {
            write(pair.now, &mut pair.a, id, &[7; 1000]);
            let mut input = BytesMut::with_capacity(READ_BYTES_MAX);
            input.extend_from_slice(&drain(pair.now, &mut pair.a, wire.0));
            (pair.b.handle_bytes(pair.now, wire.1, &mut input)).unwrap();
            assert_eq!(pair.b.readable(id).flatten().count(), 1000);
            input
        })
        .collect();
    buffers.retain_mut(|input| !input.try_reclaim(READ_BYTES_MAX));
    let kept = buffers.len();
    assert!((1..=2).contains(&kept), "{kept} buffers are kept");
}

#[test]
fn a_thousand_stuck_readers_leave_another_its_memory() {
    let config = Config::default();
    let mut pair = Pair::open(&config);
    let stuck = streams(&mut pair, STUCK);
    stick(&mut pair, &stuck, KERNEL_BYTES);
    let held = pair.b.memory_bytes();
    assert!(held < config.memory_bytes / 2 / 2, "{held} bytes are held");

    // Its window grows as it would without them.
    let most = moves_on(&mut pair);
    assert!(most >= 512 * 1024, "{most} bytes were taken at once");
}

/// Readers that took much have large windows, and stop then.
#[test]
fn whoever_stops_after_much_leaves_another_its_memory() {
    let config = Config::default();
    for count in [2, 4, 16, 64] {
        let mut pair = Pair::open(&config);
        let stuck: Vec<_> = (0..count).map(|_| pair.stream()).collect();
        stick(&mut pair, &stuck, (64 << 20) / count);
        let held = pair.b.memory_bytes();
        assert!(held < config.memory_bytes / 2, "{held} bytes are held");
        moves_on(&mut pair);
    }
}

/// As many as there may be, one after the other.
#[test]
fn as_many_stuck_readers_as_there_may_be_leave_another_its_memory() {
    let config = Config::default();
    let mut pair = Pair::open(&config);
    for _ in 1..config.max_streams {
        let id = pair.stream();
        stick(&mut pair, &[id], 0);
    }
    moves_on(&mut pair);
}

/// Sessions of one unit, which have `bytes` together.
fn sharing(bytes: usize) -> Config {
    Config {
        shared_memory: SharedMemory::new(bytes),
        ..Config::default()
    }
}

/// Whatever those of other sessions do, who have the same memory.
#[test]
fn stuck_readers_of_some_sessions_leave_others_their_memory() {
    let config = sharing(32 << 20);
    let shared_memory = &config.shared_memory;
    let stuck: Vec<Pair> = (0..8)
        .map(|_| {
            let mut pair = Pair::open(&config);
            let ids: Vec<_> = (0..16).map(|_| pair.stream()).collect();
            stick(&mut pair, &ids, 4 << 20);
            pair
        })
        .collect();
    let held: usize = stuck.iter().map(|p| p.b.memory_bytes()).sum();
    let windows = shared_memory.receiving_bytes();
    // First windows are granted in any case.
    let most = (16 << 20) + 8 * 16 * 8 * 1024;
    assert!(held <= windows && windows <= most, "{held}, {windows}");
    assert!(held > 8 << 20, "{held} bytes are held");

    moves_on(&mut Pair::open(&config));
    drop(stuck);
    assert_eq!(shared_memory.receiving_bytes(), 0);
    assert_eq!(shared_memory.sending_bytes(), 0);
}

/// Sessions are served by threads of their own.
#[test]
fn what_a_stream_was_said_to_take_it_takes_whatever_others_do() {
    let config = Config {
        // Few, with large windows.
        max_streams: 64,
        ..sharing(2 << 20)
    };
    let (mut pair, mut other) = (Pair::open(&config), Pair::open(&config));
    let (ids, others) = (streams(&mut pair, 64), streams(&mut other, 64));
    // What is under way is not acknowledged.
    let send = |pair: &mut Pair, ids: &[StreamId], up_to| {
        for &id in ids.iter().cycle().take(10 * ids.len()) {
            let n = pair.a.capacity(id);
            if n > 0 && pair.a.retained_bytes() < up_to {
                write(pair.now, &mut pair.a, id, &vec![7; n]);
                drain(pair.now, &mut pair.a, pair.wires[0].0);
            }
        }
    };
    send(&mut pair, &ids[1..], 384 << 10);
    let said = pair.a.capacity(ids[0]);
    send(&mut other, &others, usize::MAX);
    let now = pair.a.capacity(ids[0]);
    let held = (pair.a.retained_bytes(), other.a.retained_bytes());
    assert!(said > 0 && now < said, "{said}, then {now}; {held:?}");
    let data = SendBuf::copy_of(&vec![7; said]);
    pair.a.write(pair.now, ids[0], data).unwrap();
}

/// A peer may be away for hours.
#[test]
fn a_session_that_nothing_carries_keeps_little_of_what_others_need() {
    let config = sharing(32 << 20);
    let shared_memory = &config.shared_memory;
    let mut pair = Pair::open(&config);
    let id = pair.stream();
    pair.a.transport_lost(pair.wires[0].0);
    while let n @ 1.. = pair.a.capacity(id) {
        write(pair.now, &mut pair.a, id, &vec![7; n]);
    }
    let held = shared_memory.sending_bytes();
    assert!((64 << 10..=256 << 10).contains(&held), "{held} bytes");
}

/// One that has ended needs no window, however long the other direction stays open.
#[test]
fn the_window_of_what_has_ended_is_free() {
    let config = sharing(64 << 20);
    let shared_memory = &config.shared_memory;
    let mut pair = Pair::open(&config);
    let id = pair.stream();
    let before = shared_memory.receiving_bytes();
    stick(&mut pair, &[id], 8 << 20);
    assert!(shared_memory.receiving_bytes() > before + (1 << 20));
    pair.a.finish(id).unwrap();
    pair.run();
    // What is not read is held, and no more can come.
    let held = pair.b.memory_bytes();
    let windows = shared_memory.receiving_bytes();
    assert!(windows <= held + before, "{windows} for {held}");
    read(&mut pair.b, id);
    assert!(shared_memory.receiving_bytes() < before);
}

/// A new stream moves much; returns the most that was taken at once.
fn moves_on(pair: &mut Pair) -> usize {
    let other = pair.stream();
    let (mut sent, mut most) = (0, 0);
    while sent < 16 << 20 {
        let mut flight = 0;
        loop {
            let n = pair.a.capacity(other);
            if n == 0 {
                break;
            }
            write(pair.now, &mut pair.a, other, &vec![9; n]);
            flight += n;
            if flight >= 4 << 20 {
                break;
            }
        }
        assert!(flight > 0, "after {sent} bytes nothing is taken any more");
        pair.run();
        assert_eq!(read(&mut pair.b, other).0.len(), flight);
        pair.run();
        sent += flight;
        most = most.max(flight);
    }
    most
}

#[test]
fn credit_of_one_stream_wakes_that_one_alone() {
    let mut pair = Pair::open(&Config::default());
    let ids = streams(&mut pair, 3);
    stick(&mut pair, &ids, KERNEL_BYTES);
    assert!(ids.iter().all(|&id| pair.a.lacks_own_credit(id)));
    pair.events_a.clear();
    read(&mut pair.b, ids[1]);
    pair.run();
    let woken: Vec<&Event> = (pair.events_a.iter())
        .filter(|e| matches!(e, Event::Writable | Event::StreamWritable(_)))
        .collect();
    assert_eq!(woken, [&Event::StreamWritable(ids[1])]);
    assert!(pair.a.capacity(ids[1]) > 0);
}

#[test]
fn few_streams_have_large_first_windows_and_many_small_ones() {
    let mut pair = Pair::open(&Config::default());
    let first_flight = |pair: &mut Pair, id| {
        let mut sent = 0;
        loop {
            let n = pair.a.capacity(id);
            if n == 0 {
                return sent;
            }
            write(pair.now, &mut pair.a, id, &vec![1; n]);
            sent += n;
            // Acknowledged, and not read.
            pair.run();
        }
    };
    let one = pair.stream();
    let alone = first_flight(&mut pair, one);
    assert_eq!(alone, 256 * 1024);
    let many = streams(&mut pair, 2_000);
    let among_many = first_flight(&mut pair, many[1_999]);
    assert!((4 * 1024..=16 * 1024).contains(&among_many), "{among_many}");
}

/// Sends on all of `ids` until none has credit, and has all of it read; returns how much that was of each.
fn flights(pair: &mut Pair, ids: &[StreamId]) -> Vec<usize> {
    let mut sent = vec![0; ids.len()];
    loop {
        let mut going = false;
        for (&id, sent) in ids.iter().zip(&mut sent) {
            let n = pair.a.capacity(id);
            if n > 0 {
                write(pair.now, &mut pair.a, id, &vec![9; n]);
                *sent += n;
                going = true;
            }
        }
        // Acknowledged, and not read.
        pair.run();
        if !going {
            break;
        }
    }
    for (&id, &sent) in ids.iter().zip(&sent) {
        assert_eq!(read(&mut pair.b, id).0.len(), sent);
    }
    pair.run();
    sent
}

/// Where all credit is used, a stream moves as much as its window lets it.
#[test]
fn streams_that_are_fast_at_once_come_to_have_the_same_credit() {
    let mut pair = Pair::open(&Config::default());
    let first = pair.stream();
    let alone = (0..20).map(|_| flights(&mut pair, &[first])[0]).max();
    assert!(alone.unwrap() >= 6 << 20, "{alone:?}");
    let mut ids = streams(&mut pair, 15);
    ids.push(first);
    let latest = (0..20).map(|_| flights(&mut pair, &ids)).last().unwrap();
    let (least, most) = (*latest.iter().min().unwrap(), *latest.iter().max().unwrap());
    assert!(most <= 2 * least && least >= 512 * 1024, "{latest:?}");
    // Once the others rest it has what is left beside their credit.
    pair.wait(Duration::from_secs(2));
    let again = (0..20).map(|_| flights(&mut pair, &[first])[0]).max();
    assert!(2 * again.unwrap() > 3 * most, "{again:?} after {most}");
}

/// Answers that are short, each on a stream of its own, are no rivals of a transfer, however many there are.
#[test]
fn many_short_streams_leave_a_long_one_its_credit() {
    let mut pair = Pair::open(&Config::default());
    let long = pair.stream();
    // Credit comes when half of it is used, so that one flight says little.
    let credit = |pair: &mut Pair, times| (0..times).map(|_| flights(pair, &[long])[0]).max();
    credit(&mut pair, 20);
    let alone = credit(&mut pair, 4);
    for _ in 0..10 {
        let short = streams(&mut pair, 40);
        for _ in 0..12 {
            for &id in &short {
                write(pair.now, &mut pair.a, id, &[5; 12_000]);
            }
            pair.run();
            for &id in &short {
                read(&mut pair.b, id);
            }
        }
        let beside = credit(&mut pair, 4);
        assert!(4 * beside.unwrap() >= 3 * alone.unwrap(), "{beside:?}");
        for id in short {
            pair.a.finish(id).unwrap();
            pair.b.finish(id).unwrap();
            pair.run();
            assert!(read(&mut pair.b, id).1 && read(&mut pair.a, id).1);
        }
    }
}
