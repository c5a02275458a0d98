//! Flows: captured UDP conversations, one application socket and one destination each.
//!
//! A datagram is sent once, and may be lost, late or out of order, as UDP has it; it comes at most once
//! and unchanged. `table` says which flows there are, `send` where a datagram goes, `receive` what
//! becomes of one that came, `partial` puts those together that were too large for a packet. The UDP
//! transport itself is in [`super::udp`]. (Flow *control* is another matter: `super::flow`.)

mod partial;
mod receive;
mod send;
mod table;

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;

use bytes::Bytes;

use super::udp::UdpPath;
use super::window::Window;
use crate::Time;
use crate::ranges::RangeSet;
use crate::wire::{Dscp, Target};
use partial::Partials;

/// A flow of one session. Bit 0 is 0 for those that the session's initiator opened.
pub type FlowId = u64;

/// What belongs to a datagram beside its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DatagramInfo {
    /// What it asks of the networks. Lost on the way to a peer that knows no such thing.
    pub dscp: Dscp,
    /// Who sent it, where that was not the flow's target: only towards the end that has opened the flow, and only if it
    /// belongs to a group.
    pub source: Option<SocketAddr>,
}

/// Something that concerns flows or the UDP transport. A driver without flows never has any: they are
/// apart from [`super::Event`] for that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FlowEvent {
    /// The peer opened a flow to a target; datagrams of it can be taken at once.
    FlowOpened {
        /// The flow.
        id: FlowId,
        /// Where it goes.
        target: Target,
        /// The socket of the peer that it belongs to, by the peer's number for it: all flows of one have one source
        /// towards their targets, and it hears from others too. None for a socket that hears its target alone.
        group: Option<u64>,
    },
    /// The peer's end of a flow met an error, such as a port that nobody listens at; the flow is over.
    FlowFailed {
        /// The flow.
        id: FlowId,
        /// The peer's errno, in Linux's generic numbering.
        errno: u64,
    },
    /// A flow is over: the peer closed it, or it was idle for too long.
    FlowClosed {
        /// The flow.
        id: FlowId,
    },
    /// The set of [`super::Session::connection_ids`] has changed.
    ConnectionIdsChanged,
    /// Datagrams go over the UDP transport on this path.
    UdpUsable(UdpPath),
    /// UDP is not answered on this path: datagrams go over TCP, and UDP is tried again later.
    UdpBlocked(UdpPath),
}

/// Why a call for a flow cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlowError {
    /// No such flow (any more).
    #[error("the flow is gone")]
    Gone,
    /// More than [`crate::limits::DATAGRAM_BYTES_MAX`]: EMSGSIZE for the application.
    #[error("the datagram is larger than any")]
    TooLarge,
    /// The peer's limit on flows is reached, or it knows none.
    #[error("the peer's limit on open flows is reached")]
    TooMany,
    /// The session is not (or no longer) open.
    #[error("the session is not open")]
    NotOpen,
}

/// What a session has counted of its flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowStats {
    /// Flows opened by either end.
    pub flows: u64,
    /// Datagrams that were given to [`super::Session::send_datagram`].
    pub sent: u64,
    /// Of these, how many went over the UDP transport, and how many over a TCP transport. Some go both
    /// ways.
    pub sent_udp: u64,
    /// See `sent_udp`.
    pub sent_tcp: u64,
    /// Packets that carried a part of one.
    pub fragments: u64,
    /// Datagrams that found no way, or whose queue was full.
    pub unsent: u64,
    /// Datagrams put in the receive queue.
    pub received: u64,
    /// Copies of datagrams that had come already.
    pub duplicates: u64,
    /// Datagrams of flows that are over or not allowed.
    pub stray: u64,
    /// Datagrams dropped because nobody took them in time.
    pub overflowed: u64,
    /// Datagrams of which a part never came.
    pub incomplete: u64,
    /// Packets sealed, and packets that were opened.
    pub packets_sent: u64,
    /// See `packets_sent`.
    pub packets_received: u64,
    /// Packets that were no packets of this session's, or not authentic.
    pub packets_refused: u64,
    /// Packets that came before.
    pub packets_repeated: u64,
    /// Packets that the driver took too long to take.
    pub packets_dropped: u64,
    /// Addresses of the peer that were validated and adopted.
    pub moves: u64,
}

/// One flow.
#[derive(Debug)]
struct FlowState {
    /// Where it goes.
    target: Target,
    /// The opener's socket.
    group: Option<u64>,
    /// The peer has it: the target need not be named any more.
    known: bool,
    /// When a datagram of it last went or came, but for those of others than its target.
    used: Time,
}

impl FlowState {
    /// A datagram goes or comes, which is use of the flow or is not.
    fn touch(&mut self, now: Time, in_use: bool) {
        if in_use {
            self.used = now;
        }
    }
}

/// All that a session keeps of its flows.
#[derive(Debug, Default)]
pub(super) struct Datagrams {
    flows: BTreeMap<FlowId, FlowState>,
    /// Flows that this end opened, ever, and those of either end that are open.
    opened: u64,
    open: [u64; 2],
    /// Flows of the peer that have been seen, by index.
    seen: RangeSet,
    /// FLOW_CLOSED that wait to be sealed, with how many of each end's flows.
    ends: VecDeque<(FlowId, u64)>,
    ends_of: [u64; 2],
    /// No flow is idle for too long before then.
    idle_at: Option<Time>,
    /// Counts numbered datagrams.
    numbered: u64,
    received: Window,
    partials: Partials,
    waiting: VecDeque<(FlowId, Bytes, DatagramInfo)>,
    waiting_bytes: usize,
    pub events: VecDeque<FlowEvent>,
    pub stats: FlowStats,
}

impl Datagrams {
    /// Whether any flow is open.
    pub fn in_use(&self) -> bool {
        !self.flows.is_empty()
    }

    /// Nothing is left of any flow.
    pub fn clear(&mut self) {
        let (stats, opened) = (self.stats, self.opened);
        *self = Self {
            opened,
            stats,
            ..Self::default()
        };
    }

    fn bytes(&self) -> usize {
        self.waiting_bytes + self.partials.bytes()
    }
}
