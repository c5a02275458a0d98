//! What a driver tells about its session.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use session_proto::session::{Handle, Stats};

use super::app::App;
use super::{Driver, Side};

/// Handovers that a session remembers.
const HANDOVERS_KEPT: usize = 64;

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
    /// Bytes read from the local socket.
    pub tx: u64,
    /// Bytes written to the local socket.
    pub rx: u64,
}

/// One move of the session from a link to another (or the same) one.
#[derive(Clone, Debug)]
pub struct HandoverReport {
    /// When it was decided, by the wall clock.
    pub when: SystemTime,
    /// The link that was left.
    pub from: String,
    /// The link that carries now; empty while none does.
    pub to: String,
    /// Why.
    pub trigger: String,
    /// Whether the old link still worked.
    pub soft: bool,
    /// CLOCK_MONOTONIC of the event that told of it (for a lost link: when its netlink message was
    /// read), in nanoseconds.
    pub noticed_ns: u64,
    /// CLOCK_MONOTONIC when the first records went to the new transport's socket, in nanoseconds.
    pub resent_ns: Option<u64>,
    /// CLOCK_MONOTONIC when the peer was first heard on the new transport, in nanoseconds.
    pub resumed_ns: Option<u64>,
    /// Records that went out again.
    pub replayed_records: u64,
    /// Their sealed bytes.
    pub replayed_bytes: u64,
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
    /// Captured sockets that wait for a stream.
    pub waiting: usize,
    /// The core's counters.
    pub stats: Stats,
    /// Bytes held in memory.
    pub memory_bytes: usize,
    /// Handovers since it was made.
    pub handovers_total: u64,
    /// The latest handovers, oldest first.
    pub handovers: Vec<HandoverReport>,
}

/// A handover that begins.
pub(super) struct Move {
    from: String,
    trigger: String,
    soft: bool,
    noticed: Instant,
}

impl Move {
    pub fn hard(from: &str, trigger: &str, noticed: Instant) -> Self {
        Self {
            from: from.to_owned(),
            trigger: trigger.to_owned(),
            soft: false,
            noticed,
        }
    }

    pub fn soft(from: &str, trigger: &str) -> Self {
        Self {
            from: from.to_owned(),
            trigger: trigger.to_owned(),
            soft: true,
            noticed: Instant::now(),
        }
    }
}

/// What the driver counts beside the core.
#[derive(Default)]
pub(super) struct Counters {
    pub opened: u64,
    pub closed: u64,
    handovers_total: u64,
    handovers: VecDeque<HandoverReport>,
    /// The core's counters when the last turn ended.
    pub settled: Stats,
    /// When the active transport fell silent, and the counters before anything was sent again.
    suspected: Option<(Instant, Stats)>,
    /// The new transport, until the peer is heard on it.
    awaited: Option<Handle>,
}

impl Counters {
    pub fn closed(&mut self, app: &App) {
        self.closed += 1;
        tracing::debug!(target = %app.target, tx = app.bytes_read, rx = app.bytes_written, "a stream is over");
    }

    /// A handover begins. One that never got to its end is replaced: the newer cause is the one
    /// that leads somewhere, but the first notice is what the application waits from.
    pub fn begin(&mut self, new: Move) {
        let noticed_ns = monotonic_ns(new.noticed);
        if let Some(open) = self.handovers.back_mut().filter(|h| h.resumed_ns.is_none()) {
            if open.soft && !new.soft {
                open.soft = false;
                open.trigger = new.trigger;
                open.noticed_ns = noticed_ns;
            }
            return;
        }
        if self.handovers.len() == HANDOVERS_KEPT {
            self.handovers.pop_front();
        }
        self.handovers_total += 1;
        self.handovers.push_back(HandoverReport {
            when: SystemTime::now(),
            from: new.from,
            to: String::new(),
            trigger: new.trigger,
            soft: new.soft,
            noticed_ns,
            resent_ns: None,
            resumed_ns: None,
            replayed_records: 0,
            replayed_bytes: 0,
        });
    }

    /// The active transport does not answer in time.
    pub fn suspect(&mut self) {
        self.suspected = Some((Instant::now(), self.settled));
    }

    /// When the active transport fell silent, and the counters then.
    pub fn suspected(&mut self) -> (Instant, Stats) {
        (self.suspected.take()).unwrap_or_else(|| (Instant::now(), self.settled))
    }

    /// Whether the handover ends when something comes on `handle`.
    pub fn awaits(&self, handle: Handle) -> bool {
        self.awaited == Some(handle)
    }

    /// New records go to `handle`: what went again to it is the difference of the counters.
    pub fn moved(&mut self, handle: Handle, link: &str, before: &Stats, after: &Stats) {
        self.awaited = Some(handle);
        if let Some(open) = self.handovers.back_mut().filter(|h| h.resumed_ns.is_none()) {
            link.clone_into(&mut open.to);
            open.resent_ns = Some(monotonic_ns(Instant::now()));
            open.replayed_records += after.records_resent - before.records_resent;
            open.replayed_bytes += after.bytes_resent - before.bytes_resent;
        }
    }

    /// The peer was heard on the new transport.
    pub fn up(&mut self, link: &str) {
        self.awaited = None;
        if let Some(open) = self.handovers.back_mut().filter(|h| h.resumed_ns.is_none()) {
            link.clone_into(&mut open.to);
            open.resumed_ns = Some(monotonic_ns(Instant::now()));
            tracing::info!(
                from = %open.from,
                to = %open.to,
                soft = open.soft,
                trigger = %open.trigger,
                took_us = (open.resumed_ns.unwrap_or(0).saturating_sub(open.noticed_ns)) / 1000,
                replayed = open.replayed_bytes,
                "handover"
            );
        }
    }
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
        let carriers = self
            .carriers
            .iter()
            .map(|(&handle, carrier)| CarrierReport {
                link: carrier.path.link.clone(),
                local: carrier.path.local,
                remote: carrier.path.remote,
                active: self.session.active() == Some(handle),
                up: self.session.is_up(handle),
                age: carrier.since.elapsed(),
                bytes_in: carrier.bytes_in,
                bytes_out: carrier.bytes_out,
                queued: self.session.queued_bytes(handle),
                rtt: crate::transport::tcp_info(&carrier.socket)
                    .ok()
                    .map(|info| info.rtt),
            });
        let streams = self.apps.iter().map(|(&id, app)| StreamReport {
            id,
            target: app.target.clone(),
            local: app.local,
            connected: app.connected,
            tx: app.bytes_read,
            rx: app.bytes_written,
        });
        let waiting = match &self.side {
            Side::Initiator(initiator) => initiator.config.captures.len(),
            Side::Responder(_) => 0,
        };
        SessionSnapshot {
            id: self.session.id(),
            peer: self.peer.name.to_string(),
            software: self.session.peer().software.clone(),
            initiator: matches!(self.side, Side::Initiator(_)),
            since: self.started_wall,
            held_for: self.adrift_since.map(|since| since.elapsed()),
            carriers: carriers.collect(),
            streams: streams.collect(),
            streams_total: self.report.opened,
            waiting,
            stats: self.session.stats(),
            memory_bytes: self.session.memory_bytes(),
            handovers_total: self.report.handovers_total,
            handovers: self.report.handovers.iter().cloned().collect(),
        }
    }
}
