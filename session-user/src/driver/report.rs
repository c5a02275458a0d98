//! What a driver tells about its session.

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use session_proto::seal::Aead;
use session_proto::session::{FlowStats, Stats, StreamPacking};
use session_proto::wire::Service;

use super::{DatagramCounters, Driver, FlowReport, Side, UdpReport};
use crate::trace::Handover;
use crate::transport::{congestion, tcp_info};

/// One transport, as it is now.
#[derive(Clone, Debug)]
pub struct CarrierReport {
    /// Our link; empty if none holds our address.
    pub link: String,
    /// Our address.
    pub local: SocketAddr,
    /// The peer's address.
    pub remote: SocketAddr,
    /// Whether new records go to it.
    pub active: bool,
    /// Whether both ends are authenticated on it.
    pub up: bool,
    /// 0 for the first transport of its path.
    pub lane: u64,
    /// What it carries in bytes a second, once it has been busy.
    pub rate: Option<u64>,
    /// How long it has stood.
    pub age: Duration,
    /// Bytes read from its socket.
    pub bytes_in: u64,
    /// Bytes written to its socket.
    pub bytes_out: u64,
    /// Sealed bytes that wait for its socket.
    pub queued: usize,
    /// The kernel's smoothed round-trip time.
    pub rtt: Option<Duration>,
    /// Its congestion control, by the kernel's name.
    pub congestion: Option<String>,
    /// Its congestion window, in segments.
    pub window: Option<u32>,
}

/// One stream, as it is now.
#[derive(Clone, Debug)]
pub struct StreamReport {
    /// Its number.
    pub id: u64,
    /// Where it leads.
    pub target: String,
    /// The application's address, or our own towards the target.
    pub local: Option<SocketAddr>,
    /// Whether the target is known to be connected.
    pub connected: bool,
    /// How its records use the links.
    pub service: Service,
    /// Bytes read from the local socket.
    pub tx: u64,
    /// Bytes written to the local socket.
    pub rx: u64,
    /// How it is packed.
    pub packing: StreamPacking,
}

/// A session, as it is now.
#[derive(Clone, Debug)]
pub struct SessionSnapshot {
    /// Its name.
    pub id: [u8; 16],
    /// The peer's name.
    pub peer: String,
    /// The peer's software.
    pub software: String,
    /// What records are sealed with.
    pub aead: Aead,
    /// Whether this unit made the session.
    pub initiator: bool,
    /// When it was made.
    pub since: SystemTime,
    /// How long no transport has stood.
    pub held_for: Option<Duration>,
    /// Its transports.
    pub carriers: Vec<CarrierReport>,
    /// Its streams.
    pub streams: Vec<StreamReport>,
    /// Streams opened since it was made.
    pub streams_total: u64,
    /// Its flows.
    pub flows: Vec<FlowReport>,
    /// The path that datagrams go over, if there is one.
    pub udp: Option<UdpReport>,
    /// What was counted of flows, by the core and by the driver.
    pub flow_stats: FlowStats,
    /// See `flow_stats`.
    pub datagrams: DatagramCounters,
    /// Captured sockets that wait for a stream.
    pub waiting: usize,
    /// The core's counters.
    pub stats: Stats,
    /// Bytes held in memory.
    pub memory_bytes: usize,
    /// Handovers since it was made.
    pub handovers_total: u64,
    /// The latest handovers, oldest first.
    pub handovers: Vec<Handover>,
}

/// `at` on CLOCK_MONOTONIC, which all processes of the host share.
pub fn monotonic_ns(at: Instant) -> u64 {
    let clock = nix::time::ClockId::CLOCK_MONOTONIC;
    let now = nix::time::clock_gettime(clock).map_or(Duration::ZERO, Duration::from);
    let past = Instant::now().saturating_duration_since(at);
    u64::try_from(now.saturating_sub(past).as_nanos()).unwrap_or(u64::MAX)
}

impl Driver {
    pub(super) fn snapshot(&self) -> SessionSnapshot {
        let carriers = self.carriers.iter().map(|(&handle, carrier)| {
            let info = tcp_info(&carrier.socket).ok();
            CarrierReport {
                link: carrier.path.link.clone(),
                local: carrier.path.local,
                remote: carrier.path.remote,
                active: self.session.active() == Some(handle),
                up: self.session.is_up(handle),
                lane: self.session.route(handle).unwrap_or_default().lane,
                rate: self.session.rate(handle),
                age: carrier.since.elapsed(),
                bytes_in: carrier.bytes_in,
                bytes_out: carrier.bytes_out,
                queued: self.session.queued_bytes(handle),
                rtt: info.map(|info| info.rtt),
                congestion: congestion(&carrier.socket),
                window: info.map(|info| info.snd_cwnd),
            }
        });
        let streams = self.apps.iter().map(|(&id, app)| StreamReport {
            id,
            target: app.target.to_string(),
            local: app.local,
            connected: app.connected,
            service: self.session.service(id).unwrap_or_default(),
            tx: app.bytes_read,
            rx: app.bytes_written,
            packing: self.session.packing(id).unwrap_or_default(),
        });
        let awaiting = self.awaiting.iter().map(|(&id, awaiting)| StreamReport {
            id,
            target: awaiting.target.to_string(),
            local: None,
            connected: false,
            service: self.session.service(id).unwrap_or_default(),
            tx: 0,
            rx: 0,
            packing: self.session.packing(id).unwrap_or_default(),
        });
        let waiting = match &self.side {
            Side::Initiator(initiator) => initiator.config.requests.len(),
            Side::Responder(_) => 0,
        };
        SessionSnapshot {
            id: self.session.id(),
            peer: self.peer.name.to_string(),
            software: self.session.peer().software.clone(),
            aead: self.session.aead(),
            initiator: matches!(self.side, Side::Initiator(_)),
            since: self.started_wall,
            held_for: self.adrift_since.map(|since| since.elapsed()),
            carriers: carriers.collect(),
            streams: streams.chain(awaiting).collect(),
            streams_total: self.report.opened,
            flows: self.flow_reports(),
            udp: self.udp_report(),
            flow_stats: self.session.flow_stats(),
            datagrams: self.datagrams.counters,
            waiting,
            stats: self.session.stats(),
            memory_bytes: self.session.memory_bytes(),
            handovers_total: self.report.handovers_total,
            handovers: self.report.handovers(),
        }
    }
}
