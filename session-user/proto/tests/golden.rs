//! Golden vectors: the bytes of version 1, which must never change. `docs/protocol.md` shows each
//! of them. The expected values were computed by a program apart from this code.

use bytes::BytesMut;
use ring::hmac;
use session_proto::limits::{PACKET_HEADER_BYTES, RECORD_HEADER_BYTES};
use session_proto::seal::{Aead, Direction, Epoch, OpenKeys, RecordKey, Secret, SessionSecret};
use session_proto::wire::{
    Ack, DatagramHeader, Dscp, Fragment, Frame, FrameType, Kind, PacketHeader, Params, Preamble,
    Reader, RecordHeader, Reply, Route, Service, Space, Status, StreamHeader, Target,
};

const SPECIFICATION: &str = include_str!("../../../docs/protocol.md");

/// Decodes a vector, after checking that the specification shows it.
#[track_caller]
fn golden(hex_bytes: &str) -> Vec<u8> {
    assert!(
        SPECIFICATION.contains(&format!("`{hex_bytes}`")),
        "docs/protocol.md does not show the vector {hex_bytes}"
    );
    hex::decode(hex_bytes).expect("vectors are hexadecimal")
}

#[track_caller]
fn check(bytes: &[u8], hex_bytes: &str) {
    golden(hex_bytes);
    assert_eq!(hex::encode(bytes), hex_bytes);
}

#[test]
fn preambles() {
    let token = session_names().resume_token(Direction::FromInitiator, 1);
    let routed = Preamble {
        routing: vec![0xde, 0xad, 0xbe, 0xef],
        ..Preamble::new(Kind::Full)
    };
    for (preamble, hex_bytes) in [
        (Preamble::new(Kind::Full), "4846535401010100"),
        (routed, "4846535401010104deadbeef"),
        (
            Preamble::new(Kind::Resume(token)),
            "4846535401010200b763b04df74996e45d6d8fb767d600fa",
        ),
    ] {
        let mut out = Vec::new();
        preamble.encode(&mut out);
        check(&out, hex_bytes);
        let parsed = Preamble::parse(&out).unwrap().unwrap();
        assert_eq!(parsed, (preamble, out.len()));
    }
}

#[test]
fn replies() {
    for (status, hex_bytes) in [
        (Status::Ok, "4846535401000000"),
        (Status::Version, "4846535401010000"),
        (Status::UnknownSession, "4846535401020000"),
        (Status::Busy, "4846535401030000"),
        (Status::Draining, "4846535401040000"),
    ] {
        let reply = Reply::new(status);
        check(&reply.encode(), hex_bytes);
        assert_eq!(Reply::parse(&reply.encode()).unwrap(), Some(reply));
    }
}

#[test]
fn record_headers() {
    let retained = RecordHeader {
        space: Space::Retained,
        payload_bytes: 65_574,
        epoch: 0x0001_0002,
        number: 0x01_0203_0405,
    };
    let unretained = RecordHeader {
        space: Space::Unretained,
        payload_bytes: 17,
        epoch: 0,
        number: 0,
    };
    for (header, hex_bytes) in [
        (retained, "80010026000100020000000102030405"),
        (unretained, "81000011000000000000000000000000"),
    ] {
        check(&header.encode(), hex_bytes);
        assert_eq!(RecordHeader::parse(&header.encode()).unwrap(), header);
    }
}

fn stream(offset: u64, fin: bool, data: &[u8]) -> Frame<'_> {
    let header = StreamHeader { id: 4, offset, fin };
    Frame::Stream { header, data }
}

fn ack(cumulative: u64, ranges: &[(u64, u64)]) -> Ack {
    Ack {
        cumulative,
        ranges: ranges.iter().map(|&(start, end)| start..end).collect(),
    }
}

const TOKEN: u64 = 0x0123_4567_89ab_cdef;

/// "hello" on flow 4, with what `change` adds.
fn datagram(change: impl FnOnce(&mut DatagramHeader)) -> Frame<'static> {
    let mut header = DatagramHeader {
        flow: 4,
        ..DatagramHeader::default()
    };
    change(&mut header);
    let data = b"hello";
    Frame::Datagram { header, data }
}

fn datagram_frames() -> Vec<(Frame<'static>, &'static str)> {
    let dns = || Some(Target::Addr("192.0.2.1:53".parse().unwrap()));
    let first = |h: &mut DatagramHeader| h.target = dns();
    let asking = |h: &mut DatagramHeader| h.dscp = Dscp::of_tos(0xb8);
    let part = |h: &mut DatagramHeader| {
        (h.target, h.number) = (dns(), Some(71));
        let (offset, total) = (1100, 1105);
        h.fragment = Some(Fragment { offset, total });
    };
    let grouped = |h: &mut DatagramHeader| (h.target, h.group) = (dns(), Some(3));
    let foreign = |h: &mut DatagramHeader| h.source = "192.0.2.1:1069".parse().ok();
    let data = TOKEN.to_be_bytes();
    vec![
        (datagram(|_| {}), "1207040068656c6c6f"),
        (datagram(first), "120e040104c0000201003568656c6c6f"),
        (datagram(|h| h.number = Some(70)), "12090402404668656c6c6f"),
        (
            datagram(part),
            "1214040704c000020100354047444c445168656c6c6f",
        ),
        (datagram(asking), "120804082e68656c6c6f"),
        (datagram(grouped), "120f041104c000020100350368656c6c6f"),
        (datagram(foreign), "120e042004c0000201042d68656c6c6f"),
        (Frame::FlowOk { id: 4 }, "13400104"),
        (Frame::FlowClosed { id: 4, errno: 111 }, "14400304406f"),
        (Frame::PathChallenge { data }, "1540080123456789abcdef"),
        (Frame::PathResponse { data }, "1640080123456789abcdef"),
        (Frame::Padding { bytes: 4 }, "170400000000"),
    ]
}

fn flow_frames() -> Vec<(Frame<'static>, &'static str)> {
    let v4 = Target::Addr("192.0.2.1:443".parse().unwrap());
    let v6 = Target::Addr("[2001:db8::1]:443".parse().unwrap());
    let name = Target::Name("db.internal".into(), 5432);
    vec![
        (stream(1000, false, b"hello"), "81090443e80068656c6c6f"),
        (stream(1005, true, b""), "81040443ed01"),
        (Frame::Urgent { id: 4, offset: 100 }, "184003044064"),
        (Frame::MaxData { max: 33_554_432 }, "83400482000000"),
        (
            Frame::MaxStreamData {
                id: 4,
                max: 262_144,
            },
            "8440050480040000",
        ),
        (Frame::MaxStreams { max: 4096 }, "8540025000"),
        (
            Frame::ResetStream {
                id: 4,
                code: 104,
                final_size: 1005,
            },
            "86400504406843ed",
        ),
        (Frame::StopSending { id: 4, code: 104 }, "874003044068"),
        (
            Frame::Open {
                id: 4,
                target: v4,
                service: Service::default(),
            },
            "8840080404c000020101bb",
        ),
        (
            Frame::Open {
                id: 6,
                target: v6,
                service: Service::default(),
            },
            "884014060620010db800000000000000000000000101bb",
        ),
        (
            Frame::Open {
                id: 8,
                target: name,
                service: Service::default(),
            },
            "88401008030b64622e696e7465726e616c1538",
        ),
        (Frame::OpenOk { id: 4 }, "89400104"),
        (Frame::OpenFailed { id: 4, errno: 111 }, "8a400304406f"),
    ]
}

fn session_frames() -> Vec<(Frame<'static>, &'static str)> {
    vec![
        (Frame::Ping { token: TOKEN }, "1040080123456789abcdef"),
        (Frame::Pong { token: TOKEN }, "1140080123456789abcdef"),
        (
            Frame::Ack {
                ack: ack(100, &[]),
                delay_us: 250,
            },
            "82400540fa406400",
        ),
        (
            Frame::Ack {
                ack: ack(100, &[(105, 110), (200, 201)]),
                delay_us: 20_000,
            },
            "82400c80004e204064020505405a01",
        ),
        (
            Frame::Resume {
                counter: 7,
                hard: true,
                standby: false,
                ack: ack(100, &[(105, 110)]),
                route: Route::default(),
            },
            "9a400707014064010505",
        ),
        (
            Frame::Resume {
                counter: 8,
                hard: false,
                standby: true,
                ack: ack(100, &[]),
                route: Route { path: 256, lane: 2 },
            },
            "9a40080802406400410002",
        ),
        (Frame::Resumed { ack: ack(64, &[]) }, "9b4003404000"),
        (
            Frame::TransportStatus {
                seq: 3,
                seen: 1,
                hard: false,
                standby: true,
            },
            "9c4003030102",
        ),
        (Frame::TransportClose { code: 0 }, "9d400100"),
        (Frame::TransportLost { id: 6 }, "9f400106"),
        (
            Frame::Close {
                code: 8,
                reason: b"shutting down",
            },
            "9e400e087368757474696e6720646f776e",
        ),
        (
            Frame::Rekey {
                epoch: 1,
                first: 4_194_305,
            },
            "a040080000000180400001",
        ),
        (
            Frame::Reauth {
                generation: 1,
                offset: 0,
                data: &[0x16, 3, 1, 0],
            },
            "a14006010016030100",
        ),
        (Frame::ReauthDone { generation: 1 }, "a2400101"),
    ]
}

const HELLO: &str = "0110a0a1a2a3a4a5a6a7a8a9aaabacadaeaf020482000000030480008000040250000504800100000604800400000710b0b1b2b3b4b5b6b7b8b9babbbcbdbebf0801090a0e686f6c64666173742f302e312e30";
const FLOWS: &str = "0110c0c1c2c3c4c5c6c7c8c9cacbcccdcecf020482000000030480008000040250000504800100000604800400000b0244000901010a0e686f6c64666173742f302e312e30";
const FEATURES: &str = "0110c0c1c2c3c4c5c6c7c8c9cacbcccdcecf020482000000030480008000040250000504800100000604800400000b0244000c01010901010a0e686f6c64666173742f302e312e30";
const ACCEPT: &str = "0110c0c1c2c3c4c5c6c7c8c9cacbcccdcecf020482000000030480008000040250000504800100000604800400000901010a0e686f6c64666173742f302e312e30";

#[test]
fn frames() {
    let mut seen = vec![FrameType::Hello, FrameType::Accept];
    // In golden_packed.rs.
    seen.extend([FrameType::Packed, FrameType::PackingOver]);
    let all = [flow_frames(), session_frames(), datagram_frames()];
    for (frame, hex_bytes) in all.into_iter().flatten() {
        let mut out = Vec::new();
        frame.encode(&mut out);
        check(&out, hex_bytes);
        let spaces = [Space::Retained, Space::Unretained, Space::Datagram];
        let allowed = |space: &Space| frame.frame_type().allowed_in(*space);
        let space = spaces.into_iter().find(allowed).unwrap();
        let mut reader = Reader::new(&out);
        assert_eq!(Frame::parse(&mut reader, space), Ok(Some(frame.clone())));
        assert!(reader.is_empty());
        seen.push(frame.frame_type());
    }
    for frame_type in FrameType::ALL {
        assert!(seen.contains(frame_type), "no vector for {frame_type:?}");
    }
}

#[test]
fn parameters() {
    let numbered = |first: u8| std::array::from_fn(|i| first + i as u8);
    let hello = Params {
        instance: numbered(0xa0),
        initial_max_data: 33_554_432,
        initial_max_stream_data: 32_768,
        initial_max_streams: 4096,
        record_window: 65_536,
        max_record: 262_144,
        continues: Some((numbered(0xb0), 9)),
        software: "holdfast/0.1.0".into(),
        ..Params::default()
    };
    let accept = Params {
        instance: numbered(0xc0),
        continues: None,
        continued: Some(true),
        ..hello.clone()
    };
    let flows = Params {
        max_flows: 1024,
        ..accept.clone()
    };
    let features = Params {
        flow_features: 1,
        ..flows.clone()
    };
    for (params, hex_bytes, framed) in [
        (hello, HELLO, format!("984053{HELLO}")),
        (accept, ACCEPT, format!("994041{ACCEPT}")),
        (flows, FLOWS, format!("994045{FLOWS}")),
        (features, FEATURES, format!("994048{FEATURES}")),
    ] {
        let mut body = Vec::new();
        params.encode(&mut body);
        check(&body, hex_bytes);
        assert_eq!(Params::parse(&body).unwrap(), params);
        let frame = if params.continues.is_some() {
            Frame::Hello { params: &body }
        } else {
            Frame::Accept { params: &body }
        };
        let mut out = Vec::new();
        frame.encode(&mut out);
        assert_eq!(hex::encode(out), framed);
    }
}

const EXPORTER: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
const RENEWAL: &str = "202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f";

fn secret(hex_bytes: &str) -> Secret {
    Secret::new(golden(hex_bytes).try_into().expect("32 bytes"))
}

fn session_secret() -> SessionSecret {
    SessionSecret::new(Aead::Aes128Gcm, &secret(EXPORTER))
}

fn session_names() -> session_proto::seal::SessionNames {
    session_secret().names()
}

#[test]
fn names_of_a_session() {
    let names = session_names();
    check(&names.session_id(), "8a471d457ef538542068cd90dfb82259");
    check(
        &names.resume_token(Direction::FromInitiator, 1),
        "b763b04df74996e45d6d8fb767d600fa",
    );
    check(
        &names.resume_token(Direction::FromResponder, 7),
        "28dc5a801b2a1d5538d7df40d90c7681",
    );
}

fn hmac_sha256(key: &[u8], data: &[u8]) -> Vec<u8> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    hmac::sign(&key, data).as_ref().to_vec()
}

/// HKDF-Expand of one block (RFC 5869 section 2.3) with the protocol's info.
fn expand(secret: &[u8], label: &str, context: &[u8], len: usize) -> Vec<u8> {
    let info = [b"holdfast1 ", label.as_bytes(), &[0], context, &[1]].concat();
    hmac_sha256(secret, &info)[..len].to_vec()
}

fn extract(salt: &[u8], secret: &[u8]) -> Vec<u8> {
    expand(&hmac_sha256(salt, secret), "prk", &[], 32)
}

/// The worked example of the specification, from HMAC alone.
#[test]
fn key_schedule_step_by_step() {
    let root = extract(b"holdfast1 generation 0", &golden(EXPORTER));
    let first = expand(&root, "direction", &[0], 32);
    let step = expand(&first, "rekey", &[], 32);
    let chain = expand(&root, "chain", &[], 32);
    let next = extract(&chain, &golden(RENEWAL));
    let renewed = expand(&next, "direction", &[0], 32);
    let transport = 2u64.to_be_bytes();
    for (value, hex_bytes) in [
        (
            root,
            "7e705f520b3a956e6f5ca598154e629a04336775e029f996e508912daf5b2a10",
        ),
        (
            first.clone(),
            "1e68330852fbe5fbba7724c539bedf0b59c22d9b863bfed6224e04c38705f669",
        ),
        (
            step,
            "bab21d4f91bd682b88c7507a5c6ad9782d5d64eeb6b8162e1df15f9f96d01ca3",
        ),
        (
            chain,
            "2dd3bc5e62837ce566d38608a766f5f96ef430d6b663d182ba5ba99ce1307030",
        ),
        (
            next,
            "b37da08246ea83741fdad773de13e2e724b9eee7afba000cba4319c065bde6f9",
        ),
        (
            renewed,
            "ee1b592e755c3c24a7c409c4d92739c165b6d9b919dcac7025f52e6ad276748d",
        ),
        (
            expand(&first, "r key", &[], 16),
            "7fdd54b85766ec3b84ecd5c7cc2c41c9",
        ),
        (expand(&first, "r iv", &[], 12), "78831ddd7a9b06196612113d"),
        (
            expand(&first, "u key", &transport, 16),
            "1773002075a661f6fcb9621e46adea32",
        ),
        (
            expand(&first, "u iv", &transport, 12),
            "f6b9eff99bf46a7ca2d1ebe5",
        ),
    ] {
        check(&value, hex_bytes);
    }
}

#[test]
fn names_of_paths() {
    const CONNECTION: &str = "24fe748a493ad93103f7f9a666439980f61a6737";
    let root = extract(b"holdfast1 generation 0", &golden(EXPORTER));
    let resume = expand(&root, "resume", &[], 32);
    let context = [0, 0, 0, 0, 0, 0, 0, 0, 1];
    check(&expand(&resume, "connection", &context, 20), CONNECTION);
    let name = session_names().connection(Direction::FromInitiator, 1);
    assert_eq!(hex::encode(name.id), CONNECTION[..16]);
    let header = name.hide(Epoch(0), 9);
    check(
        &header.encode(),
        "8224fe748a493ad93103f7f9a666439980f61a6740",
    );
    assert_eq!(name.reveal(&header), (Epoch(0), 9));
    let back = session_names().connection(Direction::FromResponder, 1);
    check(&back.id, "f3d38442bfb8025e");
}

#[test]
fn sealed_packets() {
    const EPOCH_0: &str = "8224fe748a493ad93103f7f9a666439980f61a67401affb4b0dac1fc91bd25c0b831c37abdbbaec5a2a23140fd597146";
    const STEP_1: &str = "82337827337a1f82847533eed786f7ca58ced428326cc7a023fec36a9b098f46c2f05e5556390575ad61da9a755e2ce7cffccfe0a103";
    let first = expand(
        &extract(b"holdfast1 generation 0", &golden(EXPORTER)),
        "direction",
        &[0],
        32,
    );
    check(
        &expand(&first, "d key", &[], 16),
        "83f5e587972fbffdeb60d9ee6e8fbbaf",
    );
    check(&expand(&first, "d iv", &[], 12), "ee913f0a13557b515cd52bf2");
    let mut keys = session_secret().seal_keys(Direction::FromInitiator);
    let mut opener = session_secret().open_keys(Direction::FromInitiator);
    let ping = Frame::Ping { token: TOKEN };
    let padding = Frame::Padding { bytes: 4 };
    for (counter, number, frames, hex_bytes) in [
        (1, 9, vec![&ping], EPOCH_0),
        (2, 10, vec![&ping, &padding], STEP_1),
    ] {
        let name = session_names().connection(Direction::FromInitiator, counter);
        let header = name.hide(keys.epoch(), number).encode();
        let mut plain = Vec::new();
        for frame in frames {
            frame.encode(&mut plain);
        }
        let clear = plain.clone();
        let tag = keys.datagram_key().seal(&header, number, &mut plain);
        let packet = [&header[..], &plain, &tag].concat();
        check(&packet, hex_bytes);

        let parsed = PacketHeader::parse(&packet).unwrap();
        let (epoch, number) = name.reveal(&parsed);
        let mut sealed = packet[PACKET_HEADER_BYTES..].to_vec();
        let len = opener
            .open_datagram(epoch, &header, number, &mut sealed)
            .unwrap();
        assert_eq!(sealed[..len], clear);
        keys.ratchet();
    }
}

fn seal(key: &RecordKey, space: Space, epoch: Epoch, number: u64, frame: &Frame<'_>) -> Vec<u8> {
    let mut plain = Vec::new();
    frame.encode(&mut plain);
    let header = RecordHeader {
        space,
        payload_bytes: plain.len() + 16,
        epoch: epoch.0,
        number,
    }
    .encode();
    let tag = key.seal(&header, number, &mut plain);
    [&header[..], &plain, &tag].concat()
}

fn open(keys: &mut OpenKeys, transport: Option<u64>, record: &[u8]) -> Vec<u8> {
    let mut record = BytesMut::from(record);
    let raw: [u8; RECORD_HEADER_BYTES] = record[..RECORD_HEADER_BYTES].try_into().unwrap();
    let header = RecordHeader::parse(&raw).unwrap();
    let sealed = &mut record[RECORD_HEADER_BYTES..];
    let epoch = Epoch(header.epoch);
    let len = keys
        .open(epoch, transport, &raw, header.number, sealed)
        .unwrap();
    sealed[..len].to_vec()
}

#[test]
fn sealed_records() {
    const R_EPOCH_0: &str =
        "8000001b000000000000000000000005a08699c971cd21a388a787c281d87195abebd486df01d8da48eefc";
    const U_EPOCH_0: &str =
        "8100001b000000000000000000000000edca964ca5bcd8d29d25ac185fee47520c4554d427eb15dcc54301";
    const R_STEP_1: &str =
        "8000001b00000001000000000000000650e60b293b830fc85ec6c3c2e064aec007e87a908aab2de0e48ff0";
    const R_GENERATION_1: &str =
        "8000001b000100000000000000000007bcbc94094d986ea096ef43bbfb1000eab42e1d70fd80257627207c";

    let data = stream(1000, false, b"hello");
    let ping = Frame::Ping { token: TOKEN };
    let mut keys = session_secret().seal_keys(Direction::FromInitiator);
    let in_r = |keys: &session_proto::seal::SealKeys, number| {
        seal(
            keys.retained(),
            Space::Retained,
            keys.epoch(),
            number,
            &data,
        )
    };
    check(&in_r(&keys, 5), R_EPOCH_0);
    let in_u = seal(
        &keys.transport_key(2),
        Space::Unretained,
        keys.epoch(),
        0,
        &ping,
    );
    check(&in_u, U_EPOCH_0);
    keys.ratchet();
    check(&in_r(&keys, 6), R_STEP_1);
    keys.advance_generation(Aead::Aes128Gcm, &secret(RENEWAL));
    check(&in_r(&keys, 7), R_GENERATION_1);

    let mut opener = session_secret().open_keys(Direction::FromInitiator);
    opener.install_generation(Aead::Aes128Gcm, &secret(RENEWAL));
    let (mut plain_data, mut plain_ping) = (Vec::new(), Vec::new());
    data.encode(&mut plain_data);
    ping.encode(&mut plain_ping);
    assert_eq!(open(&mut opener, None, &golden(R_EPOCH_0)), plain_data);
    assert_eq!(open(&mut opener, Some(2), &golden(U_EPOCH_0)), plain_ping);
    assert_eq!(open(&mut opener, None, &golden(R_STEP_1)), plain_data);
    assert_eq!(open(&mut opener, None, &golden(R_GENERATION_1)), plain_data);
}
