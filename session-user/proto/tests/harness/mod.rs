//! What fuzzing calls: one function for each kind of bytes from a peer. They take anything, and
//! panic if a promise is broken. The fuzz smoke test and the targets in `fuzz/` share them.

pub mod datagrams;
pub mod pair;

use bytes::BytesMut;
use session_proto::codec::{Codec, Packer, Unpacker};
use session_proto::limits::{
    PACKET_HEADER_BYTES, RECORD_PAYLOAD_BYTES_MAX, ROUTING_TOKEN_BYTES_MAX,
};
use session_proto::session::{Event, SendBuf, Session};
use session_proto::wire::{
    Frame, Kind, PacketHeader, Params, Preamble, Reader, RecordHeader, Reply, Space, Target,
    VARINT_MAX,
};

use pair::{NOW, Pair};

/// A dialler's first bytes.
pub fn preamble(input: &[u8]) {
    let Ok(Some((preamble, used))) = Preamble::parse(input) else {
        return;
    };
    assert!(preamble.routing.len() <= ROUTING_TOKEN_BYTES_MAX);
    let mut again = Vec::new();
    preamble.encode(&mut again);
    assert_eq!(again, input[..used]);
}

/// An acceptor's first bytes.
pub fn reply(input: &[u8]) {
    let Ok(Some(reply)) = Reply::parse(input) else {
        return;
    };
    assert_eq!(reply.encode()[..6], input[..6]);
}

/// The front of a record.
pub fn record_header(input: &[u8]) {
    let missing = Session::missing_bytes(&BytesMut::from(input));
    let Some(raw) = input.first_chunk() else {
        return;
    };
    let Ok(header) = RecordHeader::parse(raw) else {
        return;
    };
    assert_eq!(header.encode(), *raw);
    assert!(header.payload_bytes <= RECORD_PAYLOAD_BYTES_MAX && header.number <= VARINT_MAX);
    assert_eq!(
        missing,
        (raw.len() + header.payload_bytes).saturating_sub(input.len())
    );
}

/// The plaintext of a record: what parses comes back from its own encoding.
pub fn frames(input: &[u8]) {
    for space in [Space::Retained, Space::Unretained, Space::Datagram] {
        let mut reader = Reader::new(input);
        while !reader.is_empty() {
            let left = reader.rest().len();
            match Frame::parse(&mut reader, space) {
                Ok(Some(frame)) => frame_comes_back(&frame, space),
                Ok(None) => {}
                Err(_) => break,
            }
            assert!(reader.rest().len() < left, "a frame took no bytes");
        }
    }
}

fn frame_comes_back(frame: &Frame<'_>, space: Space) {
    // Of those whose length is written in two bytes, none is ever sent with a longer body.
    if matches!(frame, Frame::Hello { params } | Frame::Accept { params } if params.len() >= 0x4000)
    {
        return;
    }
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    let again = Frame::parse(&mut Reader::new(&bytes), space);
    assert_eq!(again, Ok(Some(frame.clone())));
}

/// The body of HELLO and ACCEPT.
pub fn params(input: &[u8]) {
    let Ok(params) = Params::parse(input) else {
        return;
    };
    assert!(params.software.chars().all(|c| !c.is_control()));
    let mut bytes = Vec::new();
    params.encode(&mut bytes);
    assert_eq!(Params::parse(&bytes), Ok(params));
}

/// Pieces of a stream that a peer claims to have packed. The first byte says by which codec; each piece begins
/// with its length and that of what should come out of it, two bytes each. Then all of it as what an application
/// sends.
pub fn codec(input: &[u8]) {
    let Some((&first, mut rest)) = input.split_first() else {
        return;
    };
    let codec = Codec::ALL[usize::from(first) % Codec::ALL.len()];
    let mut unpacker = Unpacker::new(codec).expect("there is memory");
    while let Some((sizes, data)) = rest.split_first_chunk::<4>() {
        let [packed_bytes, plain_bytes] = [[sizes[0], sizes[1]], [sizes[2], sizes[3]]]
            .map(|s| usize::from(u16::from_be_bytes(s)));
        let (packed, after) = data.split_at(packed_bytes.min(data.len()));
        rest = after;
        match unpacker.unpack(packed, plain_bytes) {
            Ok(plain) => assert_eq!(plain.len(), plain_bytes),
            Err(_) => unpacker.restart(),
        }
    }
    unpacker.restart();
    let mut packer = Packer::new(codec).expect("there is memory");
    for piece in input.chunks(usize::from(first) + 1) {
        match packer.pack(piece) {
            Some(packed) => assert_eq!(unpacker.unpack(packed, piece.len()).as_deref(), Ok(piece)),
            None => {
                packer.restart();
                unpacker.restart();
            }
        }
    }
}

/// One change to bytes on their way: kind, where (16 bits), length, value.
fn change(bytes: &mut Vec<u8>, plan: [u8; 5]) {
    let [kind, high, low, len, value] = plan;
    if bytes.is_empty() {
        return;
    }
    let at = usize::from(u16::from_be_bytes([high, low])) % bytes.len();
    let end = (at + usize::from(len)).min(bytes.len());
    match kind % 6 {
        0 => bytes[at] ^= value.max(1),
        1 => bytes.insert(at, value),
        2 => drop(bytes.drain(at..end)),
        3 => bytes.truncate(at),
        4 => {
            let again = bytes[at..end].to_vec();
            bytes.splice(end..end, again);
        }
        _ => bytes[at..end].fill(value),
    }
}

/// An attacker on the path of an established session. The first byte of `plan` picks a flight, the
/// second the size of the receiver's reads; the rest is what happens to the flight's bytes.
///
/// Whatever that is: both sessions live, at most the transport is at fault, and over the next
/// transport the application gets every byte, once and in order.
pub fn session(plan: &[u8]) {
    let [flight, reads, changes @ ..] = plan else {
        return;
    };
    let mut pair = Pair::established();
    let id = pair
        .client
        .open(Target::Name("target".into(), 7))
        .expect("streams are allowed");
    let (mut client_wire, mut server_wire) = pair.first_transport();
    let mut sent = Vec::new();
    write(&mut pair.client, id, &mut sent, 1);
    match flight % 4 {
        0 | 1 => {}
        // The first transport is lost with all that was on it; a resume is attacked.
        _ => {
            pair.lose(client_wire, server_wire);
            (client_wire, server_wire) = pair.dial();
        }
    }
    let to_server = pair.client_bytes(client_wire);
    let hit = if flight % 2 == 0 {
        attack(to_server, changes)
    } else {
        to_server
    };
    let mut fault = pair
        .server_takes(server_wire, &hit, usize::from(*reads) + 1)
        .is_err();
    if flight % 2 == 1 {
        fault = false;
        write(&mut pair.server, id, &mut Vec::new(), 2);
        let hit = attack(pair.server_bytes(server_wire), changes);
        fault |= pair
            .client_takes(client_wire, &hit, usize::from(*reads) + 1)
            .is_err();
    }
    assert!(
        !pair.client.is_ending() && !pair.server.is_ending(),
        "the session ended, fault: {fault}"
    );
    assert!(pair.server.memory_bytes() < 1 << 20 && pair.client.memory_bytes() < 1 << 20);

    pair.lose(client_wire, server_wire);
    let (client_wire, server_wire) = pair.dial();
    write(&mut pair.client, id, &mut sent, 3);
    pair.settle(client_wire, server_wire);
    assert_eq!(received(&mut pair.server, id), sent);
    assert!(pair.client.is_open() && pair.server.is_open());
    assert_eq!(
        pair.client.retained_bytes(),
        0,
        "something was never acknowledged"
    );
}

/// The front of a packet.
pub fn packet_header(input: &[u8]) {
    let Ok(header) = PacketHeader::parse(input) else {
        return;
    };
    assert_eq!(header.encode()[..], input[..PACKET_HEADER_BYTES]);
}

/// An attacker on the path of the UDP transport. Each 7 bytes of `plan` are one packet's fate: which of
/// the latest ones and whether it comes before the packets of the ends, how it is changed (5 bytes), and
/// from where it comes.
///
/// Whatever that is: both sessions live, every datagram comes at most once, unchanged and on its flow,
/// the peer's address stays, and at the end datagrams go both ways.
pub fn packets(plan: &[u8]) {
    let mut net = datagrams::Net::established();
    for step in plan.chunks_exact(7).take(24) {
        if step[0] & 0x40 != 0 {
            net.hold();
        }
        net.exchange();
        let mut hit = net.pick(step[0]);
        change(&mut hit, [step[1], step[2], step[3], step[4], step[5]]);
        net.inject(step[0], &hit, step[6]);
        net.release();
    }
    net.settle();
}

fn attack(mut bytes: Vec<u8>, changes: &[u8]) -> Vec<u8> {
    for plan in changes.chunks_exact(5).take(16) {
        change(&mut bytes, [plan[0], plan[1], plan[2], plan[3], plan[4]]);
    }
    bytes
}

fn write(from: &mut Session, id: u64, sent: &mut Vec<u8>, seed: u8) {
    for i in 0..3u8 {
        let data = vec![seed.wrapping_mul(17).wrapping_add(i); 90];
        from.write(NOW, id, SendBuf::copy_of(&data))
            .expect("there is credit");
        sent.extend_from_slice(&data);
    }
}

fn received(at: &mut Session, id: u64) -> Vec<u8> {
    let opened = std::iter::from_fn(|| at.poll_event())
        .filter(|e| matches!(e, Event::StreamOpened { .. }))
        .count();
    assert_eq!(opened, 1, "the stream opened {opened} times");
    let bytes: Vec<u8> = at.readable(id).flat_map(|b| b.to_vec()).collect();
    at.consume(id, bytes.len());
    bytes
}

/// The kind of a preamble, for tests that follow a token.
pub fn token_of(preamble: &Preamble) -> Option<[u8; 16]> {
    match preamble.kind {
        Kind::Full => None,
        Kind::Resume(token) => Some(token),
    }
}
