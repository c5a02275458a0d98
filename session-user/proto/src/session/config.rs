//! What a session is told when it is made, and what it counts.

use std::time::Duration;

use super::memory::SharedMemory;
use crate::codec::UNPACKER_BYTES_MAX;
use crate::limits::{self, LOOSE_BUFFERS_MAX, PACKED_STREAMS_MAX, READ_BYTES_MAX};
use crate::seal::{Direction, Secret};
use crate::wire::{self, Codec, Packing};

/// Which end of the session this unit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The unit that dialled the full handshake.
    Initiator,
    /// The unit that accepted it.
    Responder,
}

impl Role {
    /// The direction that this end seals.
    pub const fn sends(self) -> Direction {
        match self {
            Self::Initiator => Direction::FromInitiator,
            Self::Responder => Direction::FromResponder,
        }
    }

    /// The direction that this end opens.
    pub const fn receives(self) -> Direction {
        match self {
            Self::Initiator => Direction::FromResponder,
            Self::Responder => Direction::FromInitiator,
        }
    }

    /// The other end.
    pub const fn other(self) -> Self {
        match self {
            Self::Initiator => Self::Responder,
            Self::Responder => Self::Initiator,
        }
    }

    /// Bit 0 of the ids of streams that this end opens, and of transports that it dials.
    pub const fn bit(self) -> u64 {
        match self {
            Self::Initiator => 0,
            Self::Responder => 1,
        }
    }
}

/// Which codecs a session may use, and when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compression {
    /// A set of [`Codec::bit`]: those that this end packs with, and unpacks. Both ends must have one.
    pub codecs: u64,
    /// Leaves alone streams that begin as HTTP or TLS do: what one sees of the length of packed requests and
    /// answers may tell secrets in them, and what is encrypted does not shrink.
    pub spares_web: bool,
    /// Packs whatever shrinks, also where that saves no time. No operator wants that; tests do.
    pub always: bool,
}

impl Compression {
    /// The better codec for the link, where one saves time.
    pub const AUTO: Self = Self {
        codecs: Codec::Lz4.bit() | Codec::Zstd.bit(),
        spares_web: true,
        always: false,
    };

    /// What becomes of a stream whose opener wants `packing`, where this is what is done with others.
    pub(super) const fn wanted(self, packing: Packing) -> Self {
        let (codecs, spares_web) = match packing {
            Packing::Unsaid => return self,
            Packing::Off => (0, false),
            Packing::Auto => (Self::AUTO.codecs, true),
            Packing::Only(codec) => (codec.bit(), false),
        };
        Self {
            codecs,
            spares_web,
            always: self.always,
        }
    }

    /// That codec and no other, where it saves time.
    pub const fn only(codec: Codec) -> Self {
        Self {
            codecs: codec.bit(),
            spares_web: false,
            always: false,
        }
    }
}

/// Limits and identity of one session.
#[derive(Clone, Debug)]
pub struct Config {
    /// Random at each start of the agent.
    pub instance: [u8; 16],
    /// Name and version, for the peer's operator.
    pub software: String,
    /// Budget for retained and for received bytes together; half of it for each.
    pub memory_bytes: usize,
    /// What this session shares with others of the unit, where their sum has a bound too.
    pub shared_memory: SharedMemory,
    /// Streams that the peer may have open at once.
    pub max_streams: u64,
    /// Largest credit granted to one stream, in bytes.
    pub stream_window_max: u64,
    /// Records of space R sealed in one key epoch, at most.
    pub rekey_records: u64,
    /// Age of a key epoch, at most (checked when something is sealed: an idle session does not wake).
    pub rekey_after: Duration,
    /// How streams are packed of which their opener says nothing; not at all, if nothing is said here either.
    pub compression: Compression,
    /// Further codecs that this end packs with, and unpacks, for streams whose opener wants them: a set of
    /// [`Codec::bit`].
    pub codecs_on_request: u64,
    /// Flows that the peer may have open at once. A driver that serves none leaves it at 0.
    pub max_flows: u64,
    /// What of [`wire::flow_feature`] the peer may send.
    pub flow_features: u64,
    /// A flow without datagrams for so long is over. RFC 4787 REQ-5 asks for two minutes at least.
    pub flow_idle: Duration,
    /// Longest time without a packet on the UDP path in use, so that NATs on it do not forget; zero:
    /// nothing is sent for that.
    pub udp_keep_alive: Duration,
    /// Whether that goes on while no flow is open.
    pub udp_keep_alive_idle: bool,
    /// Random, for this session and known to this end alone, if it has UDP paths: the peer must not be
    /// able to guess what an address is challenged with.
    pub challenge_seed: Secret,
}

impl Config {
    /// All codecs that this end has.
    pub(super) const fn codecs(&self) -> u64 {
        self.compression.codecs | self.codecs_on_request
    }

    /// Buffers that received pieces may hold on to.
    pub(super) fn loose_buffers(&self) -> usize {
        (self.memory_bytes / 2 / READ_BYTES_MAX).min(LOOSE_BUFFERS_MAX)
    }

    /// Streams that this end unpacks at once, at most: for what they keep, a third of what it may hold besides.
    pub(super) fn unpacks(&self) -> usize {
        let fits = self.memory_bytes / (3 * UNPACKER_BYTES_MAX);
        fits.clamp(1, PACKED_STREAMS_MAX)
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            instance: [0; 16],
            software: String::new(),
            memory_bytes: 64 << 20,
            shared_memory: SharedMemory::default(),
            max_streams: 4096,
            stream_window_max: 8 << 20,
            rekey_records: limits::REKEY_RECORDS,
            rekey_after: limits::REKEY_AFTER,
            compression: Compression::default(),
            codecs_on_request: 0,
            max_flows: 0,
            flow_features: wire::flow_feature::ALL,
            flow_idle: Duration::from_secs(180),
            udp_keep_alive: Duration::from_secs(20),
            udp_keep_alive_idle: false,
            challenge_seed: Secret::new([0; 32]),
        }
    }
}

/// What a session has counted since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Application bytes sealed.
    pub bytes_sent: u64,
    /// Application bytes taken in, each once.
    pub bytes_received: u64,
    /// Those of `bytes_sent` that were packed, and what became of them.
    pub plain_packed: u64,
    /// See `plain_packed`.
    pub bytes_packed: u64,
    /// Records of space R sealed.
    pub records_sent: u64,
    /// Records of space R opened, each once.
    pub records_received: u64,
    /// Records of space R scheduled again on another transport.
    pub records_resent: u64,
    /// Their sealed bytes.
    pub bytes_resent: u64,
    /// Records of space R that went out on two transports because their stream asked for it.
    pub records_doubled: u64,
    /// Bytes of one stream that waited beyond a gap, at most at once.
    pub reorder_bytes_max: usize,
    /// Records of space R that came more than once.
    pub duplicates: u64,
    /// Streams opened by either end.
    pub streams_opened: u64,
    /// Transports authenticated after the first.
    pub resumes: u64,
    /// Key epochs begun by this end.
    pub rekeys: u64,
}
