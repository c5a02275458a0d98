//! Flows: what applications say by UDP, and the UDP transport that carries it.
//!
//! `sockets` says which UDP sockets there are and which is preferred, `packets` moves the session's packets, `near` is
//! the end of the applications that open flows, `far` that of the targets.

mod calls;
mod far;
mod groups;
mod lingering;
mod near;
mod packets;
mod silence;
mod sockets;
mod told;
mod waiting;
mod watch;

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use session_proto::session::{DatagramInfo, FlowError, FlowEvent, FlowId, UdpPath, UdpTransmit};
use tokio::sync::mpsc;

use super::ready::Source;
use super::{Driver, Name};
use crate::transport::{PacketSocket, ReceiveRoom};
use far::FarFlow;
use groups::Group;
use near::Near;
use sockets::{Local, Which};

pub(super) use groups::GroupKey;

/// Datagrams of applications, or batches of packets, that are taken in one turn before other sources get theirs.
const TAKEN_PER_TURN: usize = 64;
/// Their bytes, at most but for the last.
const BYTES_PER_TURN: usize = 256 * 1024;
/// Bytes of datagrams that the session has taken before they are written, though the turn goes on: what waits beyond
/// its queues is dropped (`UDP_QUEUE_BYTES`), and sockets take as much at once.
const UNWRITTEN_MAX: usize = 48 * 1024;
/// The same where TCP carries them, whose queue may be as short (`DATAGRAM_QUEUE_BYTES_MIN`).
const UNWRITTEN_TCP_MAX: usize = session_proto::limits::DATAGRAM_QUEUE_BYTES_MIN;
/// Largest datagram, and what one more byte would show, in bytes.
const DATAGRAM_ROOM: usize = 64 * 1024;

/// Packets that came to one of the unit's UDP sockets for one of its sessions, from one address to one other.
#[derive(Debug)]
pub struct Inbound {
    /// Which of [`Listening::sockets`].
    pub socket: usize,
    /// The address of ours that they were sent to.
    pub to: IpAddr,
    /// Their sender.
    pub from: SocketAddr,
    /// All of them.
    pub bytes: BytesMut,
    /// Bytes of each; the last may have fewer.
    pub stride: usize,
}

/// What a session of an acceptor needs for UDP.
pub struct Listening {
    /// The sockets, which all sessions share.
    pub sockets: Arc<[Arc<PacketSocket>]>,
    /// What came to them for this session.
    pub inbound: mpsc::Receiver<Inbound>,
}

/// A flow, as it is now.
#[derive(Clone, Debug)]
pub struct FlowReport {
    /// Its number.
    pub id: FlowId,
    /// Where it leads.
    pub target: String,
    /// The application, or our own address towards the target.
    pub local: String,
    /// Datagrams that came from the local end, and their bytes.
    pub tx: (u64, u64),
    /// The same towards it.
    pub rx: (u64, u64),
}

/// The path that datagrams go over, as it is now.
#[derive(Clone, Debug)]
pub struct UdpReport {
    /// Our link; empty if none holds our address.
    pub link: String,
    /// The peer's address.
    pub remote: SocketAddr,
    /// Whether it answers; otherwise datagrams go over TCP, or over both.
    pub usable: bool,
    /// Largest UDP payload that is known to pass, in bytes.
    pub mtu: usize,
    /// The smoothed round-trip time, once it is known.
    pub rtt: Option<Duration>,
}

/// What a driver has counted of datagrams beside the core.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DatagramCounters {
    /// Datagrams that an application's or a target's socket did not take, or that no flow was to be had for.
    pub dropped: u64,
    /// Packets that no socket took.
    pub packets_unsent: u64,
    /// Flows that ended by an error of their target.
    pub failed: u64,
    /// Datagrams for an application of the peer from somebody whom the rules do not let the peer speak to.
    pub unheard: u64,
}

/// All that a driver has for flows.
#[derive(Default)]
pub(super) struct Datagrams {
    listening: Option<Listening>,
    locals: BTreeMap<UdpPath, Local>,
    /// Sockets that there have been.
    made: u64,
    /// Links on which no socket could be bound; it is told once.
    unbound: Vec<String>,
    near: Near,
    far: BTreeMap<FlowId, FarFlow>,
    groups: BTreeMap<GroupKey, Group>,
    /// Of these, the ones that have no flow.
    lingering: lingering::Lingering,
    /// What waits in flows whose targets' names are being resolved.
    waiting: waiting::Room,
    /// Bytes of datagrams that were given to the session since it was last asked for packets.
    unwritten: usize,
    /// Packets that wait until their socket takes some.
    held: VecDeque<UdpTransmit>,
    /// Packets that go out in one write, apart and put together.
    group: Vec<UdpTransmit>,
    joined: Vec<u8>,
    room: Option<Box<ReceiveRoom>>,
    arena: BytesMut,
    /// A datagram from a target.
    scratch: Vec<u8>,
    events: Vec<FlowEvent>,
    told: told::Told,
    pub counters: DatagramCounters,
}

impl Datagrams {
    pub fn new(listening: Option<Listening>) -> Self {
        Self {
            listening,
            ..Self::default()
        }
    }

    /// When something is to be done without anything that comes.
    pub fn deadline(&self) -> Option<Instant> {
        let deadlines = [self.near.deadline(), self.lingering.deadline()];
        deadlines.into_iter().flatten().min()
    }

    pub fn source_of_path(&self, path: UdpPath) -> Option<&Source<Name>> {
        match &self.locals.get(&path)?.socket {
            Which::Own(_, source) => Some(source),
            Which::Shared(..) => None,
        }
    }

    pub fn source_of_flow(&self, id: FlowId) -> Option<&Source<Name>> {
        self.far.get(&id)?.source()
    }

    pub fn source_of_group(&self, key: GroupKey) -> Option<&Source<Name>> {
        Some(self.groups.get(&key)?.source())
    }

    /// Packets for this session. Never ready where the unit does not listen, nor once it ends, and the session with it.
    pub fn poll_arrived(&mut self, cx: &mut Context<'_>) -> Poll<Inbound> {
        let Some(listening) = &mut self.listening else {
            return Poll::Pending;
        };
        match ready!(listening.inbound.poll_recv(cx)) {
            Some(inbound) => Poll::Ready(inbound),
            None => Poll::Pending,
        }
    }
}

impl Driver {
    /// Acts on what the session has of flows, both what came and what became of them.
    pub(super) fn settle_flows(&mut self) {
        let mut events = std::mem::take(&mut self.datagrams.events);
        while let Some(event) = self.session.poll_flow_event() {
            match event {
                FlowEvent::FlowOpened { id, target, group } => {
                    self.flow_opened(id, target, group);
                }
                other => events.push(other),
            }
        }
        // Before the flow's end, which may have come with its last datagram.
        while let Some((id, data, info)) = self.session.poll_datagram_info() {
            if !self.deliver_near(id, &data, &info) {
                self.deliver_far(id, &data, info.dscp);
            }
        }
        for event in events.drain(..) {
            match event {
                FlowEvent::FlowFailed { id, errno } => self.flow_over(id, Some(errno)),
                FlowEvent::FlowClosed { id } => self.flow_over(id, None),
                FlowEvent::ConnectionIdsChanged => self.tell_connections(),
                FlowEvent::UdpUsable(path) => {
                    tracing::info!(link = self.link_of_path(path), "datagrams go over UDP");
                }
                FlowEvent::UdpBlocked(path) => {
                    tracing::info!(
                        link = self.link_of_path(path),
                        "UDP is not answered: datagrams go over TCP"
                    );
                }
                FlowEvent::FlowOpened { .. } => {}
            }
        }
        self.datagrams.events = events;
    }

    /// Gives a datagram to the session, and its transports what it has, if that is much.
    fn send_datagram(
        &mut self,
        id: FlowId,
        data: &[u8],
        info: &DatagramInfo,
    ) -> Result<(), FlowError> {
        let now = self.clock.now();
        self.session.send_datagram_with(now, id, data, info)?;
        self.datagrams.unwritten += data.len();
        let unwritten = self.datagrams.unwritten;
        let over_udp = || self.session.udp_status().is_some_and(|s| s.usable);
        if unwritten >= UNWRITTEN_MAX || (unwritten >= UNWRITTEN_TCP_MAX && !over_udp()) {
            self.flush_udp();
            self.flush();
        }
        Ok(())
    }

    fn flow_over(&mut self, id: FlowId, errno: Option<u64>) {
        self.near_over(id, errno);
        self.far_over(id);
    }

    /// Whether to log that a flow to `target` has come to an end by `why` (an errno); if so, how many such ends were not
    /// logged since the last time.
    fn tell_of_end(&mut self, target: &str, why: i32) -> Option<u64> {
        let what = format!("{why} {target}");
        self.datagrams.told.tell(Instant::now(), &what)
    }

    pub(super) fn flow_reports(&self) -> Vec<FlowReport> {
        let near = self.datagrams.near.reports();
        let groups = &self.datagrams.groups;
        let far = self.datagrams.far.iter();
        near.chain(far.map(|(&id, flow)| flow.report(id, groups)))
            .collect()
    }

    pub(super) fn udp_report(&self) -> Option<UdpReport> {
        let status = self.session.udp_status()?;
        Some(UdpReport {
            link: self.link_of_path(status.path).to_owned(),
            remote: status.remote,
            usable: status.usable,
            mtu: status.mtu,
            rtt: status.rtt,
        })
    }
}
