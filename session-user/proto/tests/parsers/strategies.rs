//! Frames of every kind, for the property tests.

use proptest::collection::vec;
use proptest::prelude::*;
use session_proto::limits::{
    ACK_RANGES_MAX, DATAGRAM_BYTES_MAX, PARAMS_BYTES_MAX, REASON_BYTES_MAX, REAUTH_CHUNK_BYTES_MAX,
};
use session_proto::wire::{
    Ack, Codec, DatagramHeader, Dscp, Fragment, Frame, Mode, PackedHeader, Packing, Route, Service,
    StreamHeader, Target, VARINT_MAX,
};

/// Where generated frames borrow their data from.
pub static DATA: [u8; 70_000] = {
    let mut data = [0; 70_000];
    let mut i = 0;
    while i < data.len() {
        data[i] = (i % 251) as u8;
        i += 1;
    }
    data
};

pub fn data(max: usize) -> impl Strategy<Value = &'static [u8]> {
    (0..=max).prop_map(|len| &DATA[..len])
}

/// Small, large and boundary values alike.
pub fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..=VARINT_MAX,
        0..300u64,
        Just(0x3f),
        Just(0x40),
        Just(0x3fff),
        Just(0x4000),
        Just(0x3fff_ffff),
        Just(0x4000_0000),
        Just(VARINT_MAX),
    ]
}

pub fn acks() -> impl Strategy<Value = Ack> {
    let gaps = vec((1..1u64 << 40, 1..1u64 << 40), 0..=ACK_RANGES_MAX);
    (0..1u64 << 60, gaps).prop_map(|(cumulative, gaps)| {
        let mut last = cumulative;
        let ranges = gaps.into_iter().map(|(gap, len)| {
            let start = last + gap;
            last = start + len;
            start..last
        });
        Ack {
            cumulative,
            ranges: ranges.collect(),
        }
    })
}

pub fn targets() -> impl Strategy<Value = Target> {
    prop_oneof![
        (any::<[u8; 4]>(), any::<u16>()).prop_map(|(ip, port)| Target::Addr((ip, port).into())),
        (any::<[u8; 16]>(), any::<u16>()).prop_map(|(ip, port)| Target::Addr((ip, port).into())),
        ("[A-Za-z0-9._-]{1,253}", any::<u16>()).prop_map(|(name, port)| Target::Name(name, port)),
    ]
}

pub fn stream_frames() -> impl Strategy<Value = Frame<'static>> {
    prop_oneof![
        (number(), number(), any::<bool>(), data(65_536)).prop_map(|(id, offset, fin, data)| {
            let header = StreamHeader { id, offset, fin };
            Frame::Stream { header, data }
        }),
        (number(), number()).prop_map(|(id, offset)| Frame::Urgent { id, offset }),
        packed_frames(),
        (number(), number()).prop_map(|(id, offset)| Frame::PackingOver { id, offset }),
        number().prop_map(|max| Frame::MaxData { max }),
        (number(), number()).prop_map(|(id, max)| Frame::MaxStreamData { id, max }),
        number().prop_map(|max| Frame::MaxStreams { max }),
        (number(), number(), number()).prop_map(|(id, code, final_size)| Frame::ResetStream {
            id,
            code,
            final_size
        }),
        (number(), number()).prop_map(|(id, code)| Frame::StopSending { id, code }),
        (number(), targets(), services()).prop_map(|(id, target, service)| Frame::Open {
            id,
            target,
            service
        }),
        number().prop_map(|id| Frame::OpenOk { id }),
        (number(), number()).prop_map(|(id, errno)| Frame::OpenFailed { id, errno }),
    ]
}

fn packed_frames() -> impl Strategy<Value = Frame<'static>> {
    let sizes = (1..65_536usize, 1..65_536usize);
    let codec = prop_oneof![Just(Codec::Lz4), Just(Codec::Zstd)];
    (number(), number(), codec, any::<bool>(), sizes).prop_map(
        |(id, offset, codec, fresh, (one, other))| {
            let header = PackedHeader {
                id,
                offset,
                codec,
                fresh,
                plain_bytes: one.max(other) + 1,
            };
            let data = &DATA[..one.min(other)];
            Frame::Packed { header, data }
        },
    )
}

pub const BONDED: Service = Service {
    mode: Mode::Bonded,
    own_lane: false,
    packing: Packing::Unsaid,
};

pub fn services() -> impl Strategy<Value = Service> {
    let modes = prop_oneof![
        Just(Mode::Single),
        Just(Mode::Redundant),
        Just(Mode::Bonded)
    ];
    let packings = prop_oneof![
        Just(Packing::Unsaid),
        Just(Packing::Off),
        Just(Packing::Auto),
        Just(Packing::Only(Codec::Lz4)),
        Just(Packing::Only(Codec::Zstd)),
    ];
    let all = (modes, any::<bool>(), packings);
    all.prop_map(|(mode, own_lane, packing)| Service {
        mode,
        own_lane,
        packing,
    })
}

pub fn routes() -> impl Strategy<Value = Route> {
    (number(), number()).prop_map(|(path, lane)| Route { path, lane })
}

pub fn session_frames() -> impl Strategy<Value = Frame<'static>> {
    prop_oneof![
        any::<u64>().prop_map(|token| Frame::Ping { token }),
        any::<u64>().prop_map(|token| Frame::Pong { token }),
        (acks(), number()).prop_map(|(ack, delay_us)| Frame::Ack { ack, delay_us }),
        data(PARAMS_BYTES_MAX).prop_map(|params| Frame::Hello { params }),
        data(PARAMS_BYTES_MAX).prop_map(|params| Frame::Accept { params }),
        (number(), any::<bool>(), any::<bool>(), acks(), routes()).prop_map(
            |(counter, hard, standby, ack, route)| Frame::Resume {
                counter,
                hard,
                standby,
                ack,
                route
            }
        ),
        acks().prop_map(|ack| Frame::Resumed { ack }),
        (number(), number(), any::<bool>(), any::<bool>()).prop_map(
            |(seq, seen, hard, standby)| Frame::TransportStatus {
                seq,
                seen,
                hard,
                standby
            }
        ),
        number().prop_map(|id| Frame::TransportLost { id }),
        number().prop_map(|code| Frame::TransportClose { code }),
        (number(), data(REASON_BYTES_MAX)).prop_map(|(code, reason)| Frame::Close { code, reason }),
        (any::<u32>(), number()).prop_map(|(epoch, first)| Frame::Rekey { epoch, first }),
        (number(), number(), data(REAUTH_CHUNK_BYTES_MAX)).prop_map(
            |(generation, offset, data)| Frame::Reauth {
                generation,
                offset,
                data
            }
        ),
        number().prop_map(|generation| Frame::ReauthDone { generation }),
    ]
}

pub fn datagrams() -> impl Strategy<Value = Frame<'static>> {
    let target = proptest::option::of(targets());
    let whole = (
        number(),
        target,
        proptest::option::of(number()),
        data(DATAGRAM_BYTES_MAX),
    );
    let whole = whole.prop_map(|(flow, target, number, data)| {
        let fragment = None;
        (flow, target, number, fragment, data)
    });
    let target = proptest::option::of(targets());
    let part = (
        number(),
        target,
        number(),
        data(DATAGRAM_BYTES_MAX - 1),
        0..100usize,
    );
    let part = part.prop_map(|(flow, target, number, rest, after)| {
        let data = &DATA[..=rest.len() / 2];
        let offset = rest.len() - data.len().min(rest.len());
        let total = (offset + data.len() + after).min(DATAGRAM_BYTES_MAX);
        (
            flow,
            target,
            Some(number),
            Some(Fragment { offset, total }),
            data,
        )
    });
    let socket = proptest::option::of(number());
    let sender = proptest::option::of(any::<std::net::SocketAddrV4>());
    let either = (prop_oneof![whole, part], any::<u8>(), socket, sender);
    either.prop_map(|(datagram, tos, group, source)| {
        let (flow, target, number, fragment, data) = datagram;
        let opens = target.is_some();
        let header = DatagramHeader {
            flow,
            target,
            number,
            fragment,
            dscp: Dscp::of_tos(tos),
            group: group.filter(|_| opens),
            source: source.map(Into::into).filter(|_| !opens),
        };
        Frame::Datagram { header, data }
    })
}

pub fn flow_frames() -> impl Strategy<Value = Frame<'static>> {
    prop_oneof![
        number().prop_map(|id| Frame::FlowOk { id }),
        (number(), number()).prop_map(|(id, errno)| Frame::FlowClosed { id, errno }),
        any::<[u8; 8]>().prop_map(|data| Frame::PathChallenge { data }),
        any::<[u8; 8]>().prop_map(|data| Frame::PathResponse { data }),
        (0..70_000usize).prop_map(|bytes| Frame::Padding { bytes }),
    ]
}

pub fn frames() -> impl Strategy<Value = Frame<'static>> {
    prop_oneof![
        stream_frames(),
        session_frames(),
        datagrams(),
        flow_frames()
    ]
}
