//! Streams that are packed: what comes out is what went in, over whatever happens, and a peer that packs
//! what it must not ends its session and nothing else.

use std::time::Duration;

use session_proto::codec::{Codec, Packer};
use session_proto::limits::{ACK_DELAY, PACKED_STREAMS_MAX, PACKING_IDLE};
use session_proto::seal::Direction;
use session_proto::session::{Compression, Config, Event, Session, StreamId};
use session_proto::wire::{
    Frame, PackedHeader, Packing, RecordHeader, Route, Service, Space, StreamHeader, close_code,
};

use crate::pair::{Pair, config, drain, feed, read, retained, secret, target, write};

/// Whatever shrinks is packed by one of `codecs`.
fn packs(codecs: &[Codec]) -> Config {
    Config {
        compression: Compression {
            codecs: codecs.iter().map(|c| c.bit()).sum(),
            spares_web: false,
            always: true,
        },
        max_streams: 64,
        memory_bytes: 64 << 20,
        ..config()
    }
}

fn text(bytes: usize) -> Vec<u8> {
    let lines = (0..).map(|n: u32| {
        let id = n.wrapping_mul(2_654_435_761);
        format!("{{\"n\":{n},\"level\":\"info\",\"path\":\"/items/{id}\"}}\n")
    });
    lines.flat_map(String::into_bytes).take(bytes).collect()
}

fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let words = std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_be_bytes()
    });
    words.flatten().take(bytes).collect()
}

fn sends(session: &Session, id: StreamId) -> Option<Codec> {
    session.packing(id).unwrap().sent.codec
}

#[test]
fn text_becomes_shorter_and_comes_back() {
    for codec in Codec::ALL {
        let mut pair = Pair::open(&packs(&[codec]));
        let id = pair.stream();
        let sent = text(120_000);
        for piece in sent.chunks(40_000) {
            write(pair.now, &mut pair.a, id, piece);
            assert_eq!(sends(&pair.a, id), Some(codec));
        }
        pair.a.finish(id).unwrap();
        let (on_a, on_b) = pair.wires[0];
        let flight = drain(pair.now, &mut pair.a, on_a);
        assert!(flight.len() * 2 < sent.len(), "{codec:?}: {}", flight.len());
        feed(pair.now, &mut pair.b, on_b, &flight).unwrap();
        let packing = pair.b.packing(id).unwrap().received;
        assert_eq!(packing.plain_bytes, sent.len() as u64);
        assert_eq!(packing.codec, None, "nothing is kept behind the end");
        assert_eq!(read(&mut pair.b, id), (sent, true));
    }
}

#[test]
fn each_direction_is_packed_by_itself() {
    let mut pair = Pair::open(&packs(&Codec::ALL));
    let id = pair.stream();
    let (there, back) = (text(30_000), text(20_000));
    write(pair.now, &mut pair.a, id, &there);
    write(pair.now, &mut pair.b, id, &back);
    pair.run();
    assert_eq!(read(&mut pair.b, id).0, there);
    assert_eq!(read(&mut pair.a, id).0, back);
    for session in [&pair.a, &pair.b] {
        assert!(session.stats().bytes_packed * 2 < session.stats().plain_packed);
    }
}

#[test]
fn a_peer_that_knows_no_codec_gets_plain_bytes() {
    let mut pair = Pair::fresh(&packs(&[Codec::Lz4]));
    let on_a = pair.wires[0].0;
    let (older, on_b) = Session::respond(pair.now, config(), secret());
    pair.b = older;
    pair.wires = vec![(on_a, on_b)];
    pair.run();
    pair.b.accept(None);
    pair.run();
    let id = pair.stream();
    let sent = text(20_000);
    write(pair.now, &mut pair.a, id, &sent);
    pair.run();
    assert_eq!(read(&mut pair.b, id).0, sent);
    assert_eq!(pair.a.stats().plain_packed, 0);
}

#[test]
fn what_does_not_shrink_goes_as_it_is_and_text_behind_it_is_packed_again() {
    let mut pair = Pair::open(&packs(&Codec::ALL));
    let id = pair.stream();
    let mut sent = Vec::new();
    for (piece, packed) in [
        (text(16_000), true),
        (noise(16_000), false),
        (text(16_000), true),
        (b"few words".to_vec(), true),
        (noise(100), true),
        (text(16_000), true),
        (noise(16_000), false),
    ] {
        write(pair.now, &mut pair.a, id, &piece);
        assert_eq!(sends(&pair.a, id).is_some(), packed);
        sent.extend_from_slice(&piece);
    }
    pair.run();
    assert_eq!(read(&mut pair.b, id).0, sent);
    assert_eq!(pair.b.packing(id).unwrap().received.codec, None);
}

#[test]
fn what_begins_as_the_web_does_goes_as_it_is_in_both_directions() {
    let mut config = packs(&Codec::ALL);
    config.compression.spares_web = true;
    for (start, spared) in [
        (&b"POST /log HTTP/1.1\r\n\r\n"[..], true),
        (b"log: begin\r\n", false),
    ] {
        for piece in [1, 3, 1_000] {
            let mut pair = Pair::open(&config);
            let id = pair.stream();
            for part in start.chunks(piece) {
                write(pair.now, &mut pair.a, id, part);
            }
            let body = text(20_000);
            write(pair.now, &mut pair.a, id, &body);
            pair.run();
            assert_eq!(read(&mut pair.b, id).0, [start, &body].concat());
            // Whatever the answer looks like.
            write(pair.now, &mut pair.b, id, &body);
            assert_eq!(sends(&pair.b, id).is_none(), spared);
            pair.run();
            assert_eq!(read(&mut pair.a, id).0, body);
            assert_eq!(pair.a.stats().plain_packed == 0, spared);
        }
    }
}

/// By which codec each end of a stream packs text that begins as HTTP does.
fn packs_web(ends: [&Config; 2], packing: Packing) -> [Option<Codec>; 2] {
    let mut pair = Pair::fresh(ends[0]);
    let on_a = pair.wires[0].0;
    let (other, on_b) = Session::respond(pair.now, ends[1].clone(), secret());
    pair.b = other;
    pair.wires = vec![(on_a, on_b)];
    pair.run();
    pair.b.accept(None);
    pair.run();
    let service = Service {
        packing,
        ..Service::default()
    };
    let id = pair.a.open_with(target(), service).unwrap();
    pair.run();
    pair.b.connected(id);
    pair.run();
    let sent = [&b"GET / HTTP/1.1\r\n"[..], &text(16_000)].concat();
    let mut packed = [None, None];
    write(pair.now, &mut pair.a, id, &sent);
    packed[0] = sends(&pair.a, id);
    pair.run();
    assert_eq!(read(&mut pair.b, id).0, sent);
    write(pair.now, &mut pair.b, id, &sent);
    packed[1] = sends(&pair.b, id);
    pair.run();
    assert_eq!(read(&mut pair.a, id).0, sent);
    packed
}

#[test]
fn the_opener_of_a_stream_says_how_it_is_packed_where_both_ends_have_the_codec() {
    let none = Config {
        codecs_on_request: Codec::Lz4.bit(),
        ..packs(&[])
    };
    let mut auto = packs(&Codec::ALL);
    auto.compression.spares_web = true;
    let (lz4, zstd) = (Some(Codec::Lz4), Some(Codec::Zstd));
    for (ends, packing, expected) in [
        ([&auto, &auto], Packing::Unsaid, [None, None]),
        ([&auto, &auto], Packing::Auto, [None, None]),
        ([&auto, &auto], Packing::Off, [None, None]),
        ([&auto, &auto], Packing::Only(Codec::Lz4), [lz4, lz4]),
        ([&auto, &auto], Packing::Only(Codec::Zstd), [zstd, zstd]),
        // One that packs nothing unless it is said.
        ([&none, &auto], Packing::Only(Codec::Lz4), [lz4, lz4]),
        ([&none, &auto], Packing::Only(Codec::Zstd), [None, None]),
        ([&none, &auto], Packing::Off, [None, None]),
        // The other end allows nothing.
        ([&auto, &config()], Packing::Only(Codec::Lz4), [None, None]),
        (
            [&auto, &packs(&[Codec::Zstd])],
            Packing::Only(Codec::Lz4),
            [None, None],
        ),
    ] {
        assert_eq!(packs_web(ends, packing), expected, "{packing:?}");
    }
}

#[test]
fn records_go_out_again_as_they_were_packed() {
    let mut pair = Pair::open(&packs(&Codec::ALL));
    let id = pair.stream();
    let first = text(60_000);
    write(pair.now, &mut pair.a, id, &first);
    let lost = drain(pair.now, &mut pair.a, pair.wires[0].0);
    pair.cut();
    let on_a = pair.a.dial_over(Route::default(), false).unwrap();
    let flight = drain(pair.now, &mut pair.a, on_a);
    for record in retained(&lost) {
        assert!(flight.windows(record.len()).any(|w| w == record));
    }
    let on_b = pair.accept(&flight).unwrap();
    pair.wires.push((on_a, on_b));
    let second = text(90_000)[60_000..].to_vec();
    write(pair.now, &mut pair.a, id, &second);
    pair.run();
    assert_eq!(read(&mut pair.b, id).0, [first, second].concat());
}

#[test]
fn records_that_overtake_each_other_are_unpacked_in_order() {
    for codec in Codec::ALL {
        let mut pair = Pair::open(&packs(&[codec]));
        let id = pair.stream();
        let sent = [text(40_000), noise(8_000), text(30_000)].concat();
        for piece in sent.chunks(4_000) {
            write(pair.now, &mut pair.a, id, piece);
        }
        let (on_a, on_b) = pair.wires[0];
        let flight = drain(pair.now, &mut pair.a, on_a);
        let mut records = retained(&flight);
        records.reverse();
        let budget = packs(&[codec]).memory_bytes;
        for record in records {
            feed(pair.now, &mut pair.b, on_b, record).unwrap();
            assert!(pair.b.memory_bytes() < budget);
        }
        assert!(pair.b.is_open());
        assert_eq!(read(&mut pair.b, id).0, sent);
    }
}

#[test]
fn a_stream_that_idles_keeps_no_codec_at_either_end() {
    let mut pair = Pair::open(&packs(&Codec::ALL));
    let id = pair.stream();
    let sent = text(20_000);
    write(pair.now, &mut pair.a, id, &sent);
    let (on_a, on_b) = pair.wires[0];
    let flight = drain(pair.now, &mut pair.a, on_a);
    feed(pair.now, &mut pair.b, on_b, &flight).unwrap();
    assert!(pair.b.packing(id).unwrap().received.codec.is_some());
    let begun = pair.now;
    pair.run();
    assert!(pair.now.since(begun) <= PACKING_IDLE * 2 + Duration::from_secs(1));
    assert_eq!(sends(&pair.a, id), None);
    assert_eq!(pair.b.packing(id).unwrap().received.codec, None);
    assert_eq!(pair.a.poll_timeout(), None, "nothing more is to be done");
    write(pair.now, &mut pair.a, id, &sent);
    pair.run();
    assert_eq!(read(&mut pair.b, id).0, [&sent[..], &sent].concat());
}

#[test]
fn no_more_streams_are_packed_at_once_than_the_peer_unpacks() {
    let mut pair = Pair::open(&packs(&[Codec::Lz4]));
    let ids: Vec<StreamId> = (0..PACKED_STREAMS_MAX + 8).map(|_| pair.stream()).collect();
    let piece = text(4_000);
    let packed = |pair: &Pair| {
        ids.iter()
            .filter(|id| sends(&pair.a, **id).is_some())
            .count()
    };
    for &id in &ids {
        write(pair.now, &mut pair.a, id, &piece);
    }
    assert_eq!(packed(&pair), PACKED_STREAMS_MAX);
    // The end of one frees its place once the peer has it.
    let (over, waits) = (ids[0], ids[ids.len() - 1]);
    pair.a.finish(over).unwrap();
    write(pair.now, &mut pair.a, waits, &piece);
    assert_eq!(sends(&pair.a, waits), None);
    let (on_a, on_b) = pair.wires[0];
    let flight = drain(pair.now, &mut pair.a, on_a);
    feed(pair.now, &mut pair.b, on_b, &flight).unwrap();
    pair.wait(ACK_DELAY);
    let acks = drain(pair.now, &mut pair.b, on_b);
    feed(pair.now, &mut pair.a, on_a, &acks).unwrap();
    write(pair.now, &mut pair.a, waits, &piece);
    assert!(sends(&pair.a, waits).is_some());
    assert_eq!(packed(&pair), PACKED_STREAMS_MAX);
    pair.run();
    for id in ids {
        let (got, ended) = read(&mut pair.b, id);
        let times = if id == waits { 3 } else { 1 };
        assert_eq!(got, piece.repeat(times));
        assert_eq!(ended, id == over);
    }
}

/// The initiator's record of space R with this number, with `frames` in it.
fn forged(number: u64, frames: &[Frame<'_>]) -> Vec<u8> {
    let keys = secret().seal_keys(Direction::FromInitiator);
    let mut sealed = Vec::new();
    for frame in frames {
        frame.encode(&mut sealed);
    }
    let header = RecordHeader {
        space: Space::Retained,
        payload_bytes: sealed.len() + 16,
        epoch: 0,
        number,
    }
    .encode();
    let tag = keys.retained().seal(&header, number, &mut sealed);
    [&header[..], &sealed, &tag].concat()
}

const HEADER: PackedHeader = PackedHeader {
    id: 0,
    offset: 0,
    codec: Codec::Lz4,
    fresh: true,
    plain_bytes: 4_000,
};

/// What `b` closes the session with when these come; `None` if it stays open.
fn closes(config: &Config, frames: &[Frame<'_>]) -> Option<u64> {
    let mut pair = Pair::open(config);
    let on_b = pair.wires[0].1;
    feed(pair.now, &mut pair.b, on_b, &forged(0, frames)).unwrap();
    std::iter::from_fn(|| pair.b.poll_event()).find_map(|event| match event {
        Event::Closed { code, .. } => Some(code),
        _ => None,
    })
}

#[test]
fn a_peer_that_packs_what_it_must_not_ends_the_session() {
    let plain = text(4_000);
    let mut packer = Packer::new(Codec::Lz4).unwrap();
    let data = &packer.pack(&plain).unwrap().to_vec()[..];
    let header = HEADER;
    let frame = |header: PackedHeader| Frame::Packed { header, data };
    let both = packs(&Codec::ALL);
    assert_eq!(closes(&both, &[frame(header)]), None);
    assert_eq!(closes(&both, &[frame(header), frame(header)]), None);

    let violation = Some(close_code::PROTOCOL_VIOLATION);
    let zstd = PackedHeader {
        codec: Codec::Zstd,
        ..header
    };
    assert_eq!(closes(&config(), &[frame(header)]), violation);
    assert_eq!(closes(&packs(&[Codec::Lz4]), &[frame(zstd)]), violation);
    assert_eq!(closes(&both, &[frame(zstd)]), violation);
    let stale = PackedHeader {
        fresh: false,
        ..header
    };
    assert_eq!(closes(&both, &[frame(stale)]), violation);
    for plain_bytes in [3_999, 4_001] {
        let lies = PackedHeader {
            plain_bytes,
            ..header
        };
        assert_eq!(closes(&both, &[frame(lies)]), violation);
    }
    let overlaps = PackedHeader {
        offset: 2_000,
        ..header
    };
    assert_eq!(closes(&both, &[frame(header), frame(overlaps)]), violation);
    assert_eq!(
        closes(
            &both,
            &[
                frame(overlaps),
                frame(PackedHeader {
                    offset: 5_000,
                    ..header
                })
            ]
        ),
        violation
    );
    let over = Frame::PackingOver {
        id: 0,
        offset: 4_000,
    };
    let next = PackedHeader {
        offset: 4_000,
        ..stale
    };
    assert_eq!(
        closes(&both, &[frame(header), over, frame(next)]),
        violation
    );
    let far = PackedHeader {
        offset: 1 << 40,
        ..header
    };
    assert_eq!(closes(&both, &[frame(far)]), Some(close_code::FLOW_CONTROL));
    let many: Vec<Frame<'_>> = (0..=PACKED_STREAMS_MAX as u64)
        .map(|index| {
            frame(PackedHeader {
                id: index * 2,
                ..header
            })
        })
        .collect();
    assert_eq!(closes(&both, &many[1..]), None);
    assert_eq!(closes(&both, &many), violation);
}

fn by_zstd(offset: u64, fresh: bool, data: &[u8]) -> Frame<'_> {
    let codec = Codec::Zstd;
    let header = PackedHeader {
        offset,
        fresh,
        codec,
        ..HEADER
    };
    Frame::Packed { header, data }
}

#[test]
fn plain_bytes_between_packed_ones_leave_the_codec_alone() {
    let plain = text(8_000);
    let mut packer = Packer::new(Codec::Zstd).unwrap();
    let first = packer.pack(&plain[..4_000]).unwrap().to_vec();
    let second = packer.pack(&plain[4_000..]).unwrap().to_vec();
    let header = StreamHeader {
        id: 0,
        offset: 4_000,
        fin: false,
    };
    let between = Frame::Stream {
        header,
        data: b"between",
    };
    let open = Frame::Open {
        id: 0,
        target: target(),
        service: session_proto::wire::Service::default(),
    };
    let frames = [
        by_zstd(4_007, false, &second),
        between,
        open,
        by_zstd(0, true, &first),
    ];
    let mut pair = Pair::open(&packs(&Codec::ALL));
    let on_b = pair.wires[0].1;
    for (number, frame) in frames.into_iter().enumerate() {
        feed(
            pair.now,
            &mut pair.b,
            on_b,
            &forged(number as u64, &[frame]),
        )
        .unwrap();
    }
    let expected = [&plain[..4_000], &b"between"[..], &plain[4_000..]].concat();
    assert_eq!(read(&mut pair.b, 0).0, expected);
}

#[test]
fn an_urgent_byte_goes_past_what_packs_and_comes_at_its_place() {
    for codec in Codec::ALL {
        let mut pair = Pair::open(&packs(&[codec]));
        let id = pair.stream();
        let sent = text(8_000);
        let (first, second) = sent.split_at(4_000);
        write(pair.now, &mut pair.a, id, first);
        pair.a.write_urgent(pair.now, id, b"!").unwrap();
        write(pair.now, &mut pair.a, id, second);
        let totals = pair.a.packing(id).unwrap().sent;
        assert_eq!((totals.codec, totals.plain_bytes), (Some(codec), 8_000));
        pair.run();
        for (urgent, expected) in [(false, first), (true, &b"!"[..]), (false, second)] {
            assert_eq!(pair.b.is_urgent(id), urgent, "{codec:?}");
            let shown: Vec<u8> = pair.b.readable(id).flatten().copied().collect();
            assert_eq!(shown, expected, "{codec:?}");
            pair.b.consume(id, shown.len());
        }
    }
}
