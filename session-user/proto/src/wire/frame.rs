//! Frames: what is inside a record. One table holds all numbers.

use super::ack::Ack;
use super::datagram::DatagramHeader;
use super::packed::PackedHeader;
use super::service::{Route, Service};
use super::target::Target;
use super::varint::{put_varint, varint_bytes};
use crate::limits::REASON_BYTES_MAX;

/// The record spaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// *R*: retained until acknowledged, numbered across the session.
    Retained,
    /// *U*: never retained, numbered on each transport.
    Unretained,
    /// *D*: packets of the UDP transport, never retained, numbered across the session.
    Datagram,
}

/// Bit of a frame type that says: a receiver that does not know this frame must not go on.
pub(super) const CRITICAL: u8 = 0x80;

macro_rules! frame_table {
    ($($(#[$doc:meta])* $name:ident = $code:literal in $r:literal $u:literal $d:literal;)*) => {
        /// Every frame type of version 1.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum FrameType { $($(#[$doc])* $name = $code,)* }

        impl FrameType {
            pub(super) const fn from_code(code: u8) -> Option<Self> {
                match code { $($code => Some(Self::$name),)* _ => None }
            }

            /// Whether the frame may stand in `space`.
            pub const fn allowed_in(self, space: Space) -> bool {
                let (r, u, d) = match self { $(Self::$name => ($r == 'R', $u == 'U', $d == 'D'),)* };
                match space { Space::Retained => r, Space::Unretained => u, Space::Datagram => d }
            }

            /// All types, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];
        }
    };
}

frame_table! {
    /// Asks for a PONG on the same transport.
    Ping = 0x10 in '-' 'U' 'D';
    /// Answers a PING.
    Pong = 0x11 in '-' 'U' 'D';
    /// A datagram of a flow, or a part of one.
    Datagram = 0x12 in '-' 'U' 'D';
    /// The sender has the flow: its opener need not name the target any more.
    FlowOk = 0x13 in '-' 'U' 'D';
    /// A flow is over.
    FlowClosed = 0x14 in 'R' '-' '-';
    /// Asks whoever receives at an address to answer.
    PathChallenge = 0x15 in '-' '-' 'D';
    /// Answers a PATH_CHALLENGE.
    PathResponse = 0x16 in '-' '-' 'D';
    /// Makes a packet larger.
    Padding = 0x17 in '-' '-' 'D';
    /// A byte of a stream is urgent.
    Urgent = 0x18 in 'R' '-' '-';
    /// Application bytes of a stream.
    Stream = 0x81 in 'R' '-' '-';
    /// Record numbers held.
    Ack = 0x82 in '-' 'U' '-';
    /// Credit for all streams together; cumulative.
    MaxData = 0x83 in 'R' '-' '-';
    /// Credit for one stream; cumulative.
    MaxStreamData = 0x84 in 'R' '-' '-';
    /// Credit for opening streams; cumulative.
    MaxStreams = 0x85 in 'R' '-' '-';
    /// The sender aborts its direction of a stream.
    ResetStream = 0x86 in 'R' '-' '-';
    /// The sender will not read more of a stream.
    StopSending = 0x87 in 'R' '-' '-';
    /// Opens a stream to a target.
    Open = 0x88 in 'R' '-' '-';
    /// The target is connected.
    OpenOk = 0x89 in 'R' '-' '-';
    /// The target could not be connected.
    OpenFailed = 0x8a in 'R' '-' '-';
    /// Application bytes of a stream, packed.
    Packed = 0x8b in 'R' '-' '-';
    /// The sender has given up what packs a stream.
    PackingOver = 0x8c in 'R' '-' '-';
    /// First frame of the initiator in a new session.
    Hello = 0x98 in '-' 'U' '-';
    /// First frame of the responder in a new session.
    Accept = 0x99 in '-' 'U' '-';
    /// First frame of a dialler on a further transport.
    Resume = 0x9a in '-' 'U' '-';
    /// First frame of an acceptor on a further transport.
    Resumed = 0x9b in '-' 'U' '-';
    /// What the sender wants this transport to be.
    TransportStatus = 0x9c in '-' 'U' '-';
    /// The sender sends nothing more on this transport.
    TransportClose = 0x9d in '-' 'U' '-';
    /// The session ends.
    Close = 0x9e in 'R' '-' '-';
    /// A transport of the session is lost: what went over it comes again on another.
    TransportLost = 0x9f in '-' 'U' '-';
    /// The sender's next record has a new key epoch.
    Rekey = 0xa0 in 'R' '-' '-';
    /// Bytes of the in-band TLS handshake.
    Reauth = 0xa1 in 'R' '-' '-';
    /// The sender has finished the in-band handshake and accepts its outcome.
    ReauthDone = 0xa2 in 'R' '-' '-';
}

/// A frame. `docs/protocol.md` gives the bytes of each body.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The fields are those of the specification, under the same names.
pub enum Frame<'a> {
    Ping {
        token: u64,
    },
    Pong {
        token: u64,
    },
    Datagram {
        header: DatagramHeader,
        data: &'a [u8],
    },
    FlowOk {
        id: u64,
    },
    FlowClosed {
        id: u64,
        errno: u64,
    },
    PathChallenge {
        data: [u8; 8],
    },
    PathResponse {
        data: [u8; 8],
    },
    /// With so many bytes of body.
    Padding {
        bytes: usize,
    },
    Urgent {
        id: u64,
        offset: u64,
    },
    Stream {
        header: StreamHeader,
        data: &'a [u8],
    },
    Ack {
        ack: Ack,
        delay_us: u64,
    },
    MaxData {
        max: u64,
    },
    MaxStreamData {
        id: u64,
        max: u64,
    },
    MaxStreams {
        max: u64,
    },
    ResetStream {
        id: u64,
        code: u64,
        final_size: u64,
    },
    StopSending {
        id: u64,
        code: u64,
    },
    Open {
        id: u64,
        target: Target,
        service: Service,
    },
    OpenOk {
        id: u64,
    },
    OpenFailed {
        id: u64,
        errno: u64,
    },
    Packed {
        header: PackedHeader,
        data: &'a [u8],
    },
    PackingOver {
        id: u64,
        offset: u64,
    },
    Hello {
        params: &'a [u8],
    },
    Accept {
        params: &'a [u8],
    },
    Resume {
        counter: u64,
        hard: bool,
        standby: bool,
        ack: Ack,
        route: Route,
    },
    Resumed {
        ack: Ack,
    },
    TransportStatus {
        seq: u64,
        seen: u64,
        hard: bool,
        standby: bool,
    },
    TransportClose {
        code: u64,
    },
    TransportLost {
        id: u64,
    },
    Close {
        code: u64,
        reason: &'a [u8],
    },
    Rekey {
        epoch: u32,
        first: u64,
    },
    Reauth {
        generation: u64,
        offset: u64,
        data: &'a [u8],
    },
    ReauthDone {
        generation: u64,
    },
}

/// What precedes the data of a STREAM frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamHeader {
    /// The stream.
    pub id: u64,
    /// Offset of the first data byte.
    pub offset: u64,
    /// Whether the stream ends behind the data.
    pub fin: bool,
}

pub(super) const FIN: u8 = 0x01;

impl StreamHeader {
    /// Most bytes of type, length and header: 1 + 4 + 8 + 8 + 1.
    pub const BYTES_MAX: usize = 22;

    /// Writes frame type, length and header for `data_bytes` of data so that they end at the end
    /// of `room` (at least [`Self::BYTES_MAX`]), and returns how many bytes they take. Thus data
    /// that was read from a socket into place is framed without being moved.
    pub fn write_before(&self, room: &mut [u8], data_bytes: usize) -> usize {
        let body = varint_bytes(self.id) + varint_bytes(self.offset) + 1 + data_bytes;
        let mut head = ArrayVec::default();
        head.push(FrameType::Stream as u8);
        head.varint(body as u64);
        head.varint(self.id);
        head.varint(self.offset);
        head.push(if self.fin { FIN } else { 0 });
        head.write_before(room)
    }
}

/// A stack buffer for [`StreamHeader::write_before`] and [`PackedHeader::write_before`].
#[derive(Default)]
pub(super) struct ArrayVec {
    bytes: [u8; 32],
    len: usize,
}

impl ArrayVec {
    pub fn push(&mut self, byte: u8) {
        self.bytes[self.len] = byte;
        self.len += 1;
    }

    pub fn varint(&mut self, value: u64) {
        let len = varint_bytes(value);
        let tagged = value | (u64::from(len.trailing_zeros()) << (len * 8 - 2));
        self.bytes[self.len..self.len + len].copy_from_slice(&tagged.to_be_bytes()[8 - len..]);
        self.len += len;
    }

    /// Copies what there is to the end of `room`; returns how many bytes that is.
    pub fn write_before(&self, room: &mut [u8]) -> usize {
        let start = room.len() - self.len;
        room[start..].copy_from_slice(&self.bytes[..self.len]);
        self.len
    }
}

impl Frame<'_> {
    /// The frame's type.
    pub const fn frame_type(&self) -> FrameType {
        match self {
            Self::Ping { .. } => FrameType::Ping,
            Self::Pong { .. } => FrameType::Pong,
            Self::Datagram { .. } => FrameType::Datagram,
            Self::FlowOk { .. } => FrameType::FlowOk,
            Self::FlowClosed { .. } => FrameType::FlowClosed,
            Self::PathChallenge { .. } => FrameType::PathChallenge,
            Self::PathResponse { .. } => FrameType::PathResponse,
            Self::Padding { .. } => FrameType::Padding,
            Self::Urgent { .. } => FrameType::Urgent,
            Self::Stream { .. } => FrameType::Stream,
            Self::Ack { .. } => FrameType::Ack,
            Self::MaxData { .. } => FrameType::MaxData,
            Self::MaxStreamData { .. } => FrameType::MaxStreamData,
            Self::MaxStreams { .. } => FrameType::MaxStreams,
            Self::ResetStream { .. } => FrameType::ResetStream,
            Self::StopSending { .. } => FrameType::StopSending,
            Self::Open { .. } => FrameType::Open,
            Self::OpenOk { .. } => FrameType::OpenOk,
            Self::OpenFailed { .. } => FrameType::OpenFailed,
            Self::Packed { .. } => FrameType::Packed,
            Self::PackingOver { .. } => FrameType::PackingOver,
            Self::Hello { .. } => FrameType::Hello,
            Self::Accept { .. } => FrameType::Accept,
            Self::Resume { .. } => FrameType::Resume,
            Self::Resumed { .. } => FrameType::Resumed,
            Self::TransportStatus { .. } => FrameType::TransportStatus,
            Self::TransportClose { .. } => FrameType::TransportClose,
            Self::TransportLost { .. } => FrameType::TransportLost,
            Self::Close { .. } => FrameType::Close,
            Self::Rekey { .. } => FrameType::Rekey,
            Self::Reauth { .. } => FrameType::Reauth,
            Self::ReauthDone { .. } => FrameType::ReauthDone,
        }
    }

    /// Appends type, length and body. Bodies are below 16 KiB but for DATAGRAM, PADDING, STREAM and PACKED;
    /// the data of the last two goes through their headers' `write_before` when there is much of it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Datagram { header, data } => return header.encode_frame(data, out),
            Self::Packed { header, data } => return header.encode_frame(data, out),
            Self::Padding { bytes } => {
                out.push(FrameType::Padding as u8);
                put_varint(out, *bytes as u64);
                return out.resize(out.len() + bytes, 0);
            }
            _ => {}
        }
        if let Self::Stream { header, data } = self {
            let mut room = [0; StreamHeader::BYTES_MAX];
            let len = header.write_before(&mut room, data.len());
            out.extend_from_slice(&room[room.len() - len..]);
            out.extend_from_slice(data);
            return;
        }
        out.push(self.frame_type() as u8);
        let at = out.len();
        out.extend_from_slice(&[0, 0]);
        self.encode_body(out);
        let len = out.len() - at - 2;
        debug_assert!(len < 0x4000);
        out[at..at + 2].copy_from_slice(&(0x4000 | len as u16).to_be_bytes());
    }

    fn encode_body(&self, out: &mut Vec<u8>) {
        match self {
            Self::Ping { token } | Self::Pong { token } => {
                out.extend_from_slice(&token.to_be_bytes())
            }
            Self::FlowOk { id } => put_varint(out, *id),
            Self::FlowClosed { id, errno } => put_all(out, &[*id, *errno]),
            Self::PathChallenge { data } | Self::PathResponse { data } => {
                out.extend_from_slice(data);
            }
            Self::Urgent { id, offset } => put_all(out, &[*id, *offset]),
            Self::Stream { .. }
            | Self::Datagram { .. }
            | Self::Packed { .. }
            | Self::Padding { .. } => {}
            Self::Ack { ack, delay_us } => {
                put_varint(out, *delay_us);
                ack.encode(out);
            }
            Self::MaxData { max } | Self::MaxStreams { max } => put_varint(out, *max),
            Self::MaxStreamData { id, max } => put_all(out, &[*id, *max]),
            Self::ResetStream {
                id,
                code,
                final_size,
            } => put_all(out, &[*id, *code, *final_size]),
            Self::StopSending { id, code } => put_all(out, &[*id, *code]),
            Self::Open {
                id,
                target,
                service,
            } => {
                put_varint(out, *id);
                target.encode(out);
                service.encode(out);
            }
            Self::OpenOk { id } => put_varint(out, *id),
            Self::OpenFailed { id, errno } => put_all(out, &[*id, *errno]),
            Self::PackingOver { id, offset } => put_all(out, &[*id, *offset]),
            Self::Hello { params } | Self::Accept { params } => out.extend_from_slice(params),
            Self::Resume {
                counter,
                hard,
                standby,
                ack,
                route,
            } => {
                put_varint(out, *counter);
                out.push(u8::from(*hard) | u8::from(*standby) << 1);
                ack.encode(out);
                route.encode(out);
            }
            Self::Resumed { ack } => ack.encode(out),
            Self::TransportStatus {
                seq,
                seen,
                hard,
                standby,
            } => {
                put_varint(out, *seq);
                put_varint(out, *seen);
                out.push(u8::from(*hard) | u8::from(*standby) << 1);
            }
            Self::TransportClose { code } => put_varint(out, *code),
            Self::TransportLost { id } => put_varint(out, *id),
            Self::Close { code, reason } => {
                put_varint(out, *code);
                out.extend_from_slice(&reason[..reason.len().min(REASON_BYTES_MAX)]);
            }
            Self::Rekey { epoch, first } => {
                out.extend_from_slice(&epoch.to_be_bytes());
                put_varint(out, *first);
            }
            Self::Reauth {
                generation,
                offset,
                data,
            } => {
                put_all(out, &[*generation, *offset]);
                out.extend_from_slice(data);
            }
            Self::ReauthDone { generation } => put_varint(out, *generation),
        }
    }
}

fn put_all(out: &mut Vec<u8>, values: &[u64]) {
    for &value in values {
        put_varint(out, value);
    }
}
