//! Golden vectors of what packs streams, as in `golden.rs`. They were put together by hand, from the
//! specifications of LZ4's blocks and of Zstandard's frames.

use session_proto::codec::Unpacker;
use session_proto::wire::{
    Codec, Frame, Mode, PackedHeader, Packing, Params, Reader, Service, Space, Target,
};

const SPECIFICATION: &str = include_str!("../../../docs/protocol.md");

/// `bytes` are these, and the specification shows them.
#[track_caller]
fn check(bytes: &[u8], hex_bytes: &str) {
    assert_eq!(hex::encode(bytes), hex_bytes);
    let shown = SPECIFICATION.contains(&format!("`{hex_bytes}`"));
    assert!(shown, "docs/protocol.md does not show {hex_bytes}");
}

/// Forty times `a` each: a block of LZ4, one that refers to the first, and a frame of Zstandard.
const PACKED: [&[u8]; 3] = [
    b"\x1fa\x01\0\x0f\x50aaaaa",
    b"\x0f\x28\0\x10\x50aaaaa",
    b"\x28\xb5\x2f\xfd\0\x30\x42\x01\0a",
];

fn packed(offset: u64, codec: Codec, fresh: bool, data: &[u8]) -> Frame<'_> {
    let header = PackedHeader {
        id: 4,
        offset,
        codec,
        fresh,
        plain_bytes: 40,
    };
    Frame::Packed { header, data }
}

fn packed_frames() -> Vec<(Frame<'static>, &'static str)> {
    let [first, second, zstd] = PACKED;
    vec![
        (
            packed(1000, Codec::Lz4, true, first),
            "8b100443e809281f6101000f506161616161",
        ),
        (
            packed(1040, Codec::Lz4, false, second),
            "8b0f04441001280f280010506161616161",
        ),
        (
            packed(1080, Codec::Zstd, true, zstd),
            "8b0f0444380a2828b52ffd003042010061",
        ),
        (
            Frame::PackingOver {
                id: 4,
                offset: 1120,
            },
            "8c4003044460",
        ),
    ]
}

/// OPEN of streams whose opener says how they are to use the links, or to be packed.
#[test]
fn wishes() {
    let packed = |packing| Service {
        packing,
        ..Service::default()
    };
    let bonded = Service {
        mode: Mode::Bonded,
        own_lane: true,
        ..Service::default()
    };
    let open = |service| Frame::Open {
        id: 4,
        target: Target::Addr("192.0.2.1:443".parse().unwrap()),
        service,
    };
    for (service, last, shown) in [
        (bonded, "06", true),
        (packed(Packing::Off), "08", false),
        (packed(Packing::Auto), "10", false),
        (packed(Packing::Only(Codec::Lz4)), "18", true),
        (packed(Packing::Only(Codec::Zstd)), "20", false),
    ] {
        let mut out = Vec::new();
        open(service).encode(&mut out);
        let expected = format!("8840090404c000020101bb{last}");
        assert_eq!(hex::encode(&out), expected);
        if shown {
            check(&out, &expected);
        }
        let parsed = Frame::parse(&mut Reader::new(&out), Space::Retained);
        assert_eq!(parsed, Ok(Some(open(service))));
    }
    // What a later unit may say is as if it said nothing.
    let later = hex::decode("8840090404c000020101bb28").unwrap();
    let parsed = Frame::parse(&mut Reader::new(&later), Space::Retained);
    assert_eq!(parsed, Ok(Some(open(Service::default()))));
}

#[test]
fn packed_data() {
    let [first, second, zstd] = PACKED;
    let mut lz4 = Unpacker::new(Codec::Lz4).unwrap();
    assert_eq!(lz4.unpack(first, 40).unwrap(), [b'a'; 40]);
    assert_eq!(lz4.unpack(second, 40).unwrap(), [b'a'; 40]);
    let mut unpacker = Unpacker::new(Codec::Zstd).unwrap();
    assert_eq!(unpacker.unpack(zstd, 40).unwrap(), [b'a'; 40]);
}

#[test]
fn frames() {
    for (frame, hex_bytes) in packed_frames() {
        let mut out = Vec::new();
        frame.encode(&mut out);
        check(&out, hex_bytes);
        let mut reader = Reader::new(&out);
        let parsed = Frame::parse(&mut reader, Space::Retained);
        assert_eq!(parsed, Ok(Some(frame)));
        assert!(reader.is_empty());
    }
}

const CODECS: &str = "0110c0c1c2c3c4c5c6c7c8c9cacbcccdcecf020482000000030480008000040250000504800100000604800400000b0244000d0206200901010a0e686f6c64666173742f302e312e30";

#[test]
fn parameters() {
    let params = Params {
        instance: std::array::from_fn(|i| 0xc0 + i as u8),
        initial_max_data: 33_554_432,
        initial_max_stream_data: 32_768,
        initial_max_streams: 4096,
        record_window: 65_536,
        max_record: 262_144,
        max_flows: 1024,
        codecs: Codec::Lz4.bit() | Codec::Zstd.bit(),
        packed_streams: 32,
        continued: Some(true),
        software: "holdfast/0.1.0".into(),
        ..Params::default()
    };
    let mut body = Vec::new();
    params.encode(&mut body);
    check(&body, CODECS);
    assert_eq!(Params::parse(&body), Ok(params));
    let mut out = Vec::new();
    Frame::Accept { params: &body }.encode(&mut out);
    assert_eq!(hex::encode(out), format!("994049{CODECS}"));
}
