//! Every parser of peers' bytes: what is encoded parses back, and nothing else panics, allocates
//! beyond its input, or changes keys.

mod strategies;

use proptest::collection::vec;
use proptest::prelude::*;
use session_proto::limits::{
    ACK_RANGES_MAX, DATAGRAM_BYTES_MAX, HOST_NAME_BYTES_MAX, PARAMS_BYTES_MAX, REASON_BYTES_MAX,
    REAUTH_CHUNK_BYTES_MAX, RECORD_HEADER_BYTES, RECORD_PAYLOAD_BYTES_MAX,
    RECORD_PAYLOAD_BYTES_MIN, RECORD_WINDOW_MIN, ROUTING_TOKEN_BYTES_MAX, TAG_BYTES,
};
use session_proto::wire::{
    Ack, DatagramHeader, Dscp, Fragment, Frame, FrameType, Kind, PacketHeader, Params, Preamble,
    Reader, RecordHeader, Reply, Service, Space, Status, StreamHeader, Target, VARINT_MAX,
    WireError, put_varint, varint_bytes,
};
use strategies::*;

fn encoded(frame: &Frame<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    frame.encode(&mut out);
    out
}

fn space_of(frame_type: FrameType) -> Space {
    let allowed = |space: &Space| frame_type.allowed_in(*space);
    SPACES.into_iter().find(allowed).unwrap()
}

const SPACES: [Space; 3] = [Space::Retained, Space::Unretained, Space::Datagram];

fn parse(bytes: &[u8], space: Space) -> Result<Option<Frame<'_>>, WireError> {
    Frame::parse(&mut Reader::new(bytes), space)
}

/// Type, length and `body`.
fn framed(code: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![code];
    put_varint(&mut out, body.len() as u64);
    out.extend_from_slice(body);
    out
}

/// The body within the bytes of one frame.
fn body_of(bytes: &[u8]) -> &[u8] {
    let mut reader = Reader::new(&bytes[1..]);
    let len = reader.varint("length").unwrap() as usize;
    &reader.rest()[..len]
}

/// What a parsed frame holds beyond borrowed input is bounded by that input.
fn assert_bounded(frame: &Frame<'_>, input: usize) {
    match frame {
        Frame::Ack { ack, .. } | Frame::Resume { ack, .. } | Frame::Resumed { ack } => {
            assert!(ack.ranges.capacity() <= ACK_RANGES_MAX);
            assert!(2 * ack.ranges.capacity() <= input);
        }
        Frame::Open {
            target: Target::Name(name, _),
            ..
        }
        | Frame::Datagram {
            header:
                DatagramHeader {
                    target: Some(Target::Name(name, _)),
                    ..
                },
            ..
        } => assert!(name.len() <= HOST_NAME_BYTES_MAX && name.capacity() <= 2 * input),
        _ => {}
    }
}

/// Parses all frames of a record until the first error.
fn parse_record(bytes: &[u8], space: Space) {
    let mut reader = Reader::new(bytes);
    while !reader.is_empty() {
        let left = reader.rest().len();
        match Frame::parse(&mut reader, space) {
            Ok(Some(frame)) => assert_bounded(&frame, left),
            Ok(None) => {}
            Err(_) => return,
        }
        assert!(reader.rest().len() < left, "a frame took no bytes");
    }
}

fn params() -> impl Strategy<Value = Params> {
    let limits = (number(), number(), number());
    let records = (
        RECORD_WINDOW_MIN..=VARINT_MAX,
        RECORD_PAYLOAD_BYTES_MIN as u64..=VARINT_MAX,
    );
    let continues = proptest::option::of((any::<[u8; 16]>(), number()));
    let rest = (continues, any::<Option<bool>>(), "[ -~]{0,64}");
    (any::<[u8; 16]>(), limits, records, rest).prop_map(|(instance, limits, records, rest)| {
        Params {
            instance,
            initial_max_data: limits.0,
            initial_max_stream_data: limits.1,
            initial_max_streams: limits.2,
            record_window: records.0,
            max_record: records.1,
            max_flows: limits.0,
            flow_features: limits.1,
            codecs: limits.1,
            packed_streams: if limits.1 > 0 { limits.2 } else { 0 },
            continues: rest.0,
            continued: rest.1,
            software: rest.2,
        }
    })
}

fn encoded_params(params: &Params) -> Vec<u8> {
    let mut out = Vec::new();
    params.encode(&mut out);
    out
}

proptest! {
    #[test]
    fn frames_come_back(frame in frames()) {
        let bytes = encoded(&frame);
        let space = space_of(frame.frame_type());
        let mut reader = Reader::new(&bytes);
        let parsed = Frame::parse(&mut reader, space).unwrap().unwrap();
        prop_assert!(reader.is_empty());
        assert_bounded(&parsed, bytes.len());
        prop_assert_eq!(parsed, frame);
    }

    #[test]
    fn a_header_written_before_its_data_is_the_same(id in number(), offset in number(), fin: bool, data in data(65_536)) {
        let header = StreamHeader { id, offset, fin };
        let mut room = [0xee; 100];
        let len = header.write_before(&mut room, data.len());
        prop_assert!(len <= StreamHeader::BYTES_MAX);
        let mut bytes = room[100 - len..].to_vec();
        bytes.extend_from_slice(data);
        prop_assert_eq!(bytes, encoded(&Frame::Stream { header, data }));
        prop_assert!(room[..100 - len].iter().all(|b| *b == 0xee));
    }

    #[test]
    fn a_cut_frame_is_truncated(frame in session_frames(), at: prop::sample::Index) {
        let bytes = encoded(&frame);
        let cut = &bytes[..at.index(bytes.len())];
        let got = parse(cut, space_of(frame.frame_type()));
        prop_assert!(matches!(got, Err(WireError::Truncated(_))), "{got:?}");
    }

    #[test]
    fn a_frame_in_the_wrong_space_is_refused(frame in frames()) {
        let bytes = encoded(&frame);
        let refused = Err(WireError::WrongSpace(frame.frame_type()));
        for space in SPACES {
            if !frame.frame_type().allowed_in(space) {
                prop_assert_eq!(parse(&bytes, space), refused.clone());
            }
        }
        let spaces = SPACES.map(|space| frame.frame_type().allowed_in(space));
        prop_assert!(spaces != [true; 3] && spaces != [false; 3]);
    }

    #[test]
    fn arbitrary_bytes_do_no_harm(bytes in vec(any::<u8>(), 0..600)) {
        for space in SPACES {
            parse_record(&bytes, space);
        }
        let _ = PacketHeader::parse(&bytes);
        let _ = Params::parse(&bytes);
        if let Ok(Some((preamble, used))) = Preamble::parse(&bytes) {
            prop_assert!(used <= bytes.len());
            prop_assert!(preamble.routing.capacity() <= ROUTING_TOKEN_BYTES_MAX);
        }
        let _ = Reply::parse(&bytes);
    }

    /// As above, behind a type that is known and a length that is right.
    #[test]
    fn arbitrary_bodies_do_no_harm(kind in prop::sample::select(FrameType::ALL), body in vec(any::<u8>(), 0..200)) {
        let bytes = framed(kind as u8, &body);
        if let Ok(Some(frame)) = parse(&bytes, space_of(kind)) {
            prop_assert_eq!(frame.frame_type(), kind);
            assert_bounded(&frame, body.len());
        }
    }

    #[test]
    fn changed_frames_do_no_harm(
        list in vec(prop_oneof![session_frames(), flow_frames()], 1..6),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes: Vec<u8> = list.iter().flat_map(encoded).collect();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        for space in SPACES {
            parse_record(&bytes, space);
        }
    }

    #[test]
    fn an_unknown_frame_is_skipped_or_stops(code: u8, body in vec(any::<u8>(), 0..50)) {
        prop_assume!(FrameType::ALL.iter().all(|t| *t as u8 != code));
        let mut bytes = framed(code, &body);
        let ping = encoded(&Frame::Ping { token: 1 });
        bytes.extend_from_slice(&ping);
        let mut reader = Reader::new(&bytes);
        let got = Frame::parse(&mut reader, Space::Unretained);
        if code & 0x80 == 0 {
            prop_assert_eq!(got, Ok(None));
            prop_assert_eq!(reader.rest(), &ping[..]);
        } else {
            prop_assert_eq!(got, Err(WireError::UnknownCritical(code)));
        }
    }

    #[test]
    fn parameters_come_back(params in params()) {
        prop_assert_eq!(Params::parse(&encoded_params(&params)).unwrap(), params);
    }

    #[test]
    fn parameters_with_one_left_out_or_cut_are_refused(params in params(), at: prop::sample::Index) {
        let bytes = encoded_params(&params);
        // The software's name is the last and the only one that may be left out.
        let name = params.software.len();
        let required = bytes.len() - 1 - varint_bytes(name as u64) - name;
        let cut = at.index(required);
        let got = Params::parse(&bytes[..cut]);
        let optional = params.continues.is_some()
            || params.continued.is_some()
            || params.max_flows > 0
            || params.flow_features > 0
            || params.codecs > 0;
        prop_assert!(got.is_err() || optional, "{got:?}");
    }

    #[test]
    fn record_headers_are_taken_or_refused_whole(raw: [u8; RECORD_HEADER_BYTES], space: bool, top in 0u8..8) {
        let mut raw = raw;
        raw[0] = 0x80 | u8::from(space);
        raw[1] = top;
        raw[8] &= 0x7f;
        match RecordHeader::parse(&raw) {
            Ok(header) => {
                prop_assert_eq!(header.encode(), raw);
                prop_assert!(header.payload_bytes > TAG_BYTES);
                prop_assert!(header.payload_bytes <= RECORD_PAYLOAD_BYTES_MAX);
                prop_assert!(header.number <= VARINT_MAX);
            }
            Err(_) => prop_assert!(top >= 4 || raw[8] >= 0x40 || raw[1..4] <= [0, 0, TAG_BYTES as u8][..]),
        }
    }

    #[test]
    fn preambles_come_back_and_wait_for_the_rest(
        min in 1u8..5, more in 0u8..5, routing in vec(any::<u8>(), 0..=ROUTING_TOKEN_BYTES_MAX),
        token: Option<[u8; 16]>, rest in vec(any::<u8>(), 0..20),
    ) {
        let preamble = Preamble {
            version_min: min,
            version_max: min + more,
            kind: token.map_or(Kind::Full, Kind::Resume),
            routing,
        };
        let mut bytes = Vec::new();
        preamble.encode(&mut bytes);
        let len = bytes.len();
        for cut in 0..len {
            prop_assert_eq!(Preamble::parse(&bytes[..cut]), Ok(None));
        }
        bytes.extend_from_slice(&rest);
        prop_assert_eq!(Preamble::parse(&bytes), Ok(Some((preamble.clone(), len))));
        prop_assert_eq!(preamble.speaks_our_version(), min == 1);
    }
}

#[test]
fn stream_frames_cut_at_every_byte() {
    let header = StreamHeader {
        id: 4,
        offset: 1 << 20,
        fin: true,
    };
    let data = &DATA[..300];
    let bytes = encoded(&Frame::Stream { header, data });
    for cut in 0..bytes.len() {
        let got = parse(&bytes[..cut], Space::Retained);
        assert!(
            matches!(got, Err(WireError::Truncated(_))),
            "{cut}: {got:?}"
        );
    }
}

/// A body that ends early behind a length that says so.
#[test]
fn bodies_cut_at_every_byte() {
    let fixed = [
        Frame::Ping { token: 7 },
        Frame::Ack {
            ack: Ack {
                cumulative: 1 << 20,
                ranges: vec![(2 << 20)..(3 << 20), (4 << 20)..(5 << 20)],
            },
            delay_us: 1 << 20,
        },
        Frame::ResetStream {
            id: 1 << 20,
            code: 104,
            final_size: 1 << 40,
        },
        Frame::Open {
            id: 1,
            target: Target::Addr("[2001:db8::1]:443".parse().unwrap()),
            service: BONDED,
        },
        Frame::Open {
            id: 1,
            target: Target::Name("db.internal".into(), 5432),
            service: BONDED,
        },
        Frame::Rekey {
            epoch: 1,
            first: 1 << 20,
        },
        Frame::FlowClosed {
            id: 1 << 20,
            errno: 111,
        },
        Frame::PathChallenge { data: [7; 8] },
        Frame::Urgent {
            id: 1 << 20,
            offset: 1 << 40,
        },
    ];
    for frame in fixed {
        let bytes = encoded(&frame);
        let body = body_of(&bytes);
        let code = frame.frame_type();
        for cut in 0..body.len() {
            let short = framed(code as u8, &body[..cut]);
            let got = parse(&short, space_of(code));
            // Earlier units end an OPEN here.
            let earlier = matches!(&got, Ok(Some(Frame::Open { service, .. })) if *service == Service::default());
            assert!(
                matches!(got, Err(WireError::Truncated(_))) || (earlier && cut + 1 == body.len()),
                "{frame:?} {cut}: {got:?}"
            );
        }
        let longer = framed(code as u8, &[body, b"later fields"].concat());
        assert_eq!(parse(&longer, space_of(code)), Ok(Some(frame)));
    }
}

/// All of a DATAGRAM but its data, which has no length of its own.
#[test]
fn datagram_headers_cut_at_every_byte() {
    let header = DatagramHeader {
        flow: 1 << 20,
        target: Some(Target::Name("ns.internal".into(), 53)),
        number: Some(1 << 20),
        fragment: Some(Fragment {
            offset: 20_000,
            total: 30_000,
        }),
        dscp: Dscp::of_tos(0xb8),
        group: Some(1 << 20),
        source: None,
    };
    let data = b"x";
    let bytes = encoded(&Frame::Datagram { header, data });
    let body = body_of(&bytes);
    for cut in 0..body.len() {
        let short = framed(0x12, &body[..cut]);
        let got = parse(&short, Space::Datagram);
        // Without any data the header is whole, and refused.
        let whole = cut + 1 == body.len();
        assert!(
            matches!(got, Err(WireError::Truncated(_)))
                || (whole && matches!(got, Err(WireError::Invalid(_)))),
            "{cut}: {got:?}"
        );
    }
}

#[test]
fn what_is_too_large_is_refused() {
    let too_long =
        |got: Result<Option<Frame<'_>>, WireError>| matches!(got, Err(WireError::TooLong { .. }));
    let oversize_close = framed(0x9e, &[&[0][..], &[b'x'; REASON_BYTES_MAX + 1]].concat());
    assert!(too_long(parse(&oversize_close, Space::Retained)));
    let oversize_reauth = framed(
        0xa1,
        &[&[1, 0][..], &DATA[..=REAUTH_CHUNK_BYTES_MAX]].concat(),
    );
    assert!(too_long(parse(&oversize_reauth, Space::Retained)));
    let ranges = [
        &[0, 0, ACK_RANGES_MAX as u8 + 1][..],
        &[1; 2 * (ACK_RANGES_MAX + 1)],
    ]
    .concat();
    assert!(too_long(parse(&framed(0x82, &ranges), Space::Unretained)));
    let datagram = [&[4, 0][..], &DATA[..=DATAGRAM_BYTES_MAX]].concat();
    assert!(too_long(parse(&framed(0x12, &datagram), Space::Datagram)));
    let total = [&[4, 6, 7, 0][..], &[0x80, 0, 0xff, 0xe4], b"x"].concat();
    assert!(too_long(parse(&framed(0x12, &total), Space::Datagram)));
    // A frame that claims more than there is, up to the largest varint.
    for len in [1, 0x3fff, 0x3fff_ffff, VARINT_MAX] {
        let mut bytes = vec![0x81];
        put_varint(&mut bytes, len);
        let got = parse(&bytes, Space::Retained);
        assert!(
            matches!(got, Err(WireError::Truncated(_))),
            "{len}: {got:?}"
        );
    }
    assert!(matches!(
        Params::parse(&[0; PARAMS_BYTES_MAX + 1]),
        Err(WireError::TooLong { .. })
    ));
    let mut preamble = b"HFST\x01\x01\x01".to_vec();
    preamble.push(ROUTING_TOKEN_BYTES_MAX as u8 + 1);
    assert!(matches!(
        Preamble::parse(&preamble),
        Err(WireError::TooLong { .. })
    ));
}

#[test]
fn values_that_may_not_be_are_refused() {
    let invalid = |code: u8, body: &[u8], space| {
        let bytes = framed(code, body);
        let got = parse(&bytes, space);
        assert!(
            matches!(got, Err(WireError::Invalid(_))),
            "{code:02x} {body:02x?}: {got:?}"
        );
    };
    // Flags of STREAM that version 1 does not have.
    for flags in [0x02, 0x03, 0x80] {
        invalid(0x81, &[4, 0, flags, b'x'], Space::Retained);
    }
    // Ranges that touch, are empty, or run past the largest number.
    invalid(0x82, &[0, 5, 1, 0, 1], Space::Unretained);
    // Flags of DATAGRAM that version 1 does not have; a part without a number, without data, outside.
    for space in [Space::Unretained, Space::Datagram] {
        for flags in [0x08, 0x80] {
            invalid(0x12, &[4, flags, b'x'], space);
        }
        invalid(0x12, &[4, 0x04, 0, 1, b'x'], space);
        invalid(0x12, &[4, 0x06, 7, 0, 1], space);
        invalid(0x12, &[4, 0x06, 7, 0, 1, b'x', b'x'], space);
        invalid(0x12, &[4, 0x06, 7, 2, 1, b'x'], space);
    }
    invalid(0x82, &[0, 5, 1, 1, 0], Space::Unretained);
    let max = [0xff; 8];
    invalid(
        0x82,
        &[&[0][..], &max, &[1], &max, &max].concat(),
        Space::Unretained,
    );
    // Targets: an unknown kind, an empty name, bytes that a name cannot have.
    invalid(0x88, &[0, 5, 1, 2, 3, 4, 0, 80], Space::Retained);
    invalid(0x88, &[0, 3, 0, 0, 80], Space::Retained);
    for name in [*b"a b", *b"a\nb", *b"a/b", *b"a\0b", [b'a', 0xff, b'b']] {
        invalid(
            0x88,
            &[&[0, 3, 3][..], &name, &[0, 80]].concat(),
            Space::Retained,
        );
    }
    // Headers: another type, nothing but a tag, too long, a number that no ACK could carry.
    for raw in [
        "16000011000000000000000000000000",
        "82000011000000000000000000000000",
        "80000010000000000000000000000000",
        "80000011000000004000000000000000",
        "8100001100000000ffffffffffffffff",
    ] {
        let raw: [u8; 16] = hex::decode(raw).unwrap().try_into().unwrap();
        assert!(
            matches!(RecordHeader::parse(&raw), Err(WireError::Invalid(_))),
            "{raw:02x?}"
        );
    }
    let raw: [u8; 16] = hex::decode("80040001000000000000000000000000")
        .unwrap()
        .try_into()
        .unwrap();
    assert!(matches!(
        RecordHeader::parse(&raw),
        Err(WireError::TooLong { .. })
    ));
    // Preambles: no version, versions in the wrong order, another kind; and at the first wrong byte.
    for raw in [
        "48465354000101",
        "48465354020101",
        "48465354010103",
        "48465354010100",
    ] {
        let raw = hex::decode(raw).unwrap();
        assert!(
            matches!(Preamble::parse(&raw), Err(WireError::Invalid(_))),
            "{raw:02x?}"
        );
    }
    assert_eq!(Preamble::parse(b"HX"), Err(WireError::Magic));
    assert_eq!(Reply::parse(b"\x16\x03"), Err(WireError::Magic));
    let reply = Reply::new(Status::Busy).encode();
    for cut in 0..Reply::BYTES {
        assert_eq!(Reply::parse(&reply[..cut]), Ok(None));
    }
    assert!(matches!(
        Reply::parse(b"HFST\x01\x05\0\0"),
        Err(WireError::Invalid(_))
    ));
}

#[test]
fn parameters_that_would_stall_or_lie_are_refused() {
    let good = Params {
        record_window: RECORD_WINDOW_MIN,
        max_record: RECORD_PAYLOAD_BYTES_MIN as u64,
        ..Params::default()
    };
    assert!(Params::parse(&encoded_params(&good)).is_ok());
    for bad in [
        Params {
            record_window: RECORD_WINDOW_MIN - 1,
            ..good.clone()
        },
        Params {
            max_record: RECORD_PAYLOAD_BYTES_MIN as u64 - 1,
            ..good.clone()
        },
    ] {
        assert!(matches!(
            Params::parse(&encoded_params(&bad)),
            Err(WireError::Invalid(_))
        ));
    }
    let with = |more: &[u8]| [&encoded_params(&good)[..], more].concat();
    // Twice; a session to continue without a counter; a counter without a session.
    assert!(Params::parse(&with(&[2, 1, 0])).is_err());
    assert!(Params::parse(&with(&[&[7, 16][..], &[0; 16]].concat())).is_err());
    assert!(Params::parse(&with(&[8, 1, 0])).is_err());
    // Unknown ones are skipped, known and unknown alike in any order.
    assert_eq!(
        Params::parse(&with(&[0x3f, 2, 1, 2, 0x7f, 0xff, 0])),
        Ok(good.clone())
    );
    // Text from the peer is shown on terminals.
    let mut bytes = encoded_params(&good);
    bytes.truncate(bytes.len() - 2);
    bytes.extend_from_slice(b"\x0a\x06a\x1b[2J\xff");
    assert_eq!(Params::parse(&bytes).unwrap().software, "a?[2J?");
}
