//! What the session tells its driver, and what can go wrong.

use bytes::Bytes;

use crate::seal::SealError;
use crate::wire::{Params, Status, Target, WireError};

/// A transport of one session, as driver and session call it. Never reused within a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Handle(pub(super) u64);

impl Handle {
    /// A number for logs.
    pub const fn as_u64(self) -> u64 {
        self.0
    }
}

/// A stream of one session. Bit 0 is 0 for those that the session's initiator opened.
pub type StreamId = u64;

/// Something that the driver must act on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Responder only: the initiator's HELLO arrived. Answer with [`super::Session::accept`].
    Hello(Params),
    /// Initiator only: the responder's ACCEPT arrived; streams may be opened.
    Accepted(Params),
    /// The peer opens a stream to a target.
    StreamOpened {
        /// The stream.
        id: StreamId,
        /// Where it goes.
        target: Target,
    },
    /// The peer has connected the target of a stream that we opened.
    StreamConnected(StreamId),
    /// The peer could not connect the target; the stream is gone.
    StreamRefused {
        /// The stream.
        id: StreamId,
        /// The peer's errno, in Linux's generic numbering.
        errno: u64,
    },
    /// Bytes, or the end, of a stream can be read.
    Readable(StreamId),
    /// The stream was aborted by the peer and is gone.
    StreamReset {
        /// The stream.
        id: StreamId,
        /// An errno in Linux's generic numbering.
        code: u64,
    },
    /// Credit for all streams, memory or queue room came back: streams that could not write may try again.
    Writable,
    /// Credit of this stream alone came in, which had none, or the stream takes no more.
    StreamWritable(StreamId),
    /// More streams may be opened.
    StreamsAvailable,
    /// The peer has authenticated a transport that either side dialled.
    TransportUp(Handle),
    /// A transport is finished in both directions or was given up by the peer: close its socket.
    TransportDone(Handle),
    /// What was sent on a transport is not answered in time. It goes out on another transport too,
    /// if one stands; if none does, dial.
    TransportSilent(Handle),
    /// The other transport answered while `from` was silent: all goes there now, and `from` is of no
    /// use until something comes from it.
    HandedOver {
        /// The silent transport.
        from: Handle,
        /// The one that answered.
        to: Handle,
    },
    /// A PONG came back.
    Pong {
        /// On which transport.
        handle: Handle,
        /// The token of the PING.
        token: u64,
    },
    /// The set of [`super::Session::expected_tokens`] has changed.
    TokensChanged,
    /// In-band TLS bytes from the peer, in order.
    ReauthData {
        /// Which handshake.
        generation: u16,
        /// The bytes.
        data: Bytes,
    },
    /// Both ends seal with the keys of a new generation.
    Reauthenticated {
        /// Which handshake.
        generation: u16,
    },
    /// The session has ended; every stream of it is gone.
    Closed {
        /// One of [`crate::wire::close_code`].
        code: u64,
        /// For people.
        reason: String,
        /// Whether the peer ended it.
        by_peer: bool,
    },
}

/// Why a transport must be closed. The session lives on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportFault {
    /// Bytes that no Holdfast peer sends.
    #[error("wrong bytes: {0}")]
    Wire(#[from] WireError),
    /// A record that cannot be opened.
    #[error("wrong record: {0}")]
    Seal(#[from] SealError),
    /// The acceptor said no.
    #[error("the peer refused the transport: {0:?}")]
    Refused(Status),
    /// A RESUME whose counter is not above the highest accepted: replayed, or overtaken.
    #[error("the resume was used before (counter {counter}, highest accepted {highest})")]
    StaleResume {
        /// The counter it carried.
        counter: u64,
        /// The highest accepted so far.
        highest: u64,
    },
    /// A record came before the one that must be first.
    #[error("the first record is not the one that must be first")]
    Unauthenticated,
    /// The session does not know this transport (any more).
    #[error("the transport is not one of this session")]
    Unknown,
    /// The session has ended.
    #[error("the session has ended")]
    Closed,
}

/// Why a call of the application side cannot be served now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// No such stream (any more).
    #[error("the stream is gone")]
    Gone,
    /// The stream's sending direction has ended.
    #[error("the stream's sending direction has ended")]
    Finished,
    /// More than [`super::Session::capacity`].
    #[error("more bytes than the stream's capacity")]
    NoCapacity,
    /// The peer's limit on streams is reached: wait for [`Event::StreamsAvailable`].
    #[error("the peer's limit on open streams is reached")]
    TooMany,
    /// The session is not (or no longer) open.
    #[error("the session is not open")]
    NotOpen,
}

/// Something authentic that the specification forbids: the peer's fault, and the session's end,
/// since the same sealed bytes would come again on every transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Violation {
    pub code: u64,
    pub what: &'static str,
}

impl Violation {
    pub(super) const fn protocol(what: &'static str) -> Self {
        Self {
            code: crate::wire::close_code::PROTOCOL_VIOLATION,
            what,
        }
    }

    pub(super) const fn flow(what: &'static str) -> Self {
        Self {
            code: crate::wire::close_code::FLOW_CONTROL,
            what,
        }
    }
}
