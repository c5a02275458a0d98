//! What the control socket tells, from what the agent knows.

use std::net::IpAddr;
use std::time::Duration;

use session_proto::session::PackedTotals;
use session_proto::wire::Mode;

use super::commands::PeerHandle;
use super::peer::PeerState;
use crate::control::{
    DatagramReport, FlowReport, HandoverReport, LinkReport, PackedReport, PeerReport,
    SessionReport, StreamReport, TransportReport, UdpReport, UnitReport,
};
use crate::driver::{self, CarrierReport, SessionSnapshot};
use crate::handshake::PeerName;
use crate::link::{Link, LinkState};
use crate::policy;
use crate::trace::Handover;

pub(super) fn peer_report(peer: &PeerHandle, sessions: &[SessionSnapshot]) -> PeerReport {
    let session = sessions
        .iter()
        .rev()
        .find(|s| s.initiator && s.peer == peer.name);
    let link = session
        .and_then(|s| s.carriers.iter().find(|c| c.active && c.up))
        .map(|c| c.link.clone());
    let (state, reason) = match (&*peer.state.borrow(), session) {
        (PeerState::Up, Some(s)) if s.held_for.is_some() => ("holding", None),
        (PeerState::Up, _) => ("up", None),
        (PeerState::Connecting(reason), _) => ("connecting", reason.clone()),
    };
    PeerReport {
        name: peer.name.clone(),
        state: state.to_owned(),
        link,
        reason,
        waiting: peer.requests.len(),
    }
}

/// A unit that this one dials.
pub(super) fn dialled_unit(
    peer: &PeerHandle,
    domain: &str,
    sessions: &[SessionSnapshot],
) -> UnitReport {
    let certificate = PeerName::parse(&peer.name, domain).map(|name| name.uri());
    UnitReport {
        name: peer.name.clone(),
        certificate: certificate.unwrap_or_default(),
        role: "dialled".to_owned(),
        state: peer_report(peer, sessions).state,
        addresses: Vec::new(),
    }
}

/// A unit, by its SPIFFE ID, that this one accepts or has accepted.
pub(super) fn accepted_unit(
    id: String,
    addresses: Vec<IpAddr>,
    sessions: &[SessionSnapshot],
) -> UnitReport {
    let name = PeerName::parse(&id, "").map_or_else(|_| id.clone(), |name| name.to_string());
    let session = sessions.iter().find(|s| !s.initiator && s.peer == name);
    let state = match session.map(|s| s.held_for.is_some()) {
        Some(true) => "holding",
        Some(false) => "up",
        None => "away",
    };
    UnitReport {
        name,
        certificate: id,
        role: "accepted".to_owned(),
        state: state.to_owned(),
        addresses,
    }
}

pub(super) fn link_report(
    link: &Link,
    decision: &policy::Decision,
    (standby, standby_reason): (policy::Standby, &str),
    carrier: Option<&CarrierReport>,
    keepalive: Duration,
) -> LinkReport {
    let chosen = decision.ordered.iter().find(|c| c.path.link == link.name);
    let rejected = decision
        .rejected
        .iter()
        .find(|(name, _)| *name == link.name);
    let reason = chosen
        .map(|c| c.reason.clone())
        .or(rejected.map(|(_, why)| why.clone()));
    LinkReport {
        name: link.name.clone(),
        kind: link.kind.to_string(),
        state: match link.state {
            LinkState::Unusable => "unusable",
            LinkState::Settling { .. } => "settling",
            LinkState::Usable => "usable",
        }
        .to_owned(),
        usable: chosen.is_some(),
        reason: reason.unwrap_or_default(),
        addresses: link
            .addresses
            .iter()
            .map(|a| format!("{}/{}", a.ip, a.prefix))
            .collect(),
        mtu: link.mtu,
        in_use: carrier.is_some_and(|c| c.active),
        standby: standby.to_string(),
        ready: carrier.is_some_and(|c| c.up),
        standby_reason: standby_reason.to_owned(),
        keepalive_s: carrier.map(|_| keepalive.as_secs()),
        idle_packets_per_hour: carrier.map(|_| idle_packets(keepalive)),
        idle_bytes_per_hour: carrier.map(|c| idle_packets(keepalive) * packet_bytes(c)),
        rtt_ms: carrier.and_then(|c| c.rtt).map(millis),
    }
}

/// A probe and its answer for each interval, from either end: the kernel's clock is not set back by the
/// other end's probes. The peer's interval is taken to be the same, and each transport's own is an eighth less on
/// average.
fn idle_packets(keepalive: Duration) -> u64 {
    let eighths = keepalive.as_secs().max(1) * 8;
    4 * 3600 * 8 / (eighths - eighths / 8)
}

/// A TCP segment without data: 32 bytes with timestamps, and the header of IP.
fn packet_bytes(carrier: &CarrierReport) -> u64 {
    32 + if carrier.remote.is_ipv4() { 20 } else { 40 }
}

fn millis(d: Duration) -> f64 {
    d.as_secs_f64() * 1000.0
}

pub(super) fn session_report(s: &SessionSnapshot) -> SessionReport {
    SessionReport {
        id: hex::encode(s.id),
        peer: s.peer.clone(),
        software: s.software.clone(),
        aead: s.aead.name().to_owned(),
        role: if s.initiator {
            "initiator"
        } else {
            "responder"
        }
        .to_owned(),
        state: if s.held_for.is_some() {
            "holding"
        } else {
            "up"
        }
        .to_owned(),
        age_s: s.since.elapsed().unwrap_or_default().as_secs(),
        held_s: s.held_for.map(|d| d.as_secs()),
        transports: s.carriers.iter().map(transport_report).collect(),
        streams: s.streams.iter().map(stream_report).collect(),
        streams_total: s.streams_total,
        flows: s.flows.iter().map(flow_report).collect(),
        udp: s.udp.as_ref().map(udp_report),
        datagrams: datagram_report(s),
        bytes_in: s.stats.bytes_received,
        bytes_out: s.stats.bytes_sent,
        resent_bytes: s.stats.bytes_resent,
        duplicates: s.stats.duplicates,
        rekeys: s.stats.rekeys,
        memory_bytes: s.memory_bytes,
        reorder_bytes_max: s.stats.reorder_bytes_max,
        handovers_total: s.handovers_total,
        handovers: s.handovers.iter().map(handover_report).collect(),
    }
}

fn transport_report(c: &driver::CarrierReport) -> TransportReport {
    TransportReport {
        link: c.link.clone(),
        local: c.local,
        remote: c.remote,
        active: c.active,
        up: c.up,
        lane: c.lane,
        rate_mbit: c.rate.map(|r| r as f64 * 8.0 / 1e6),
        age_s: c.age.as_secs(),
        bytes_in: c.bytes_in,
        bytes_out: c.bytes_out,
        queued_bytes: c.queued,
        rtt_ms: c.rtt.map(millis),
        congestion: c.congestion.clone(),
        window_segments: c.window,
    }
}

/// A mode as the configuration has it.
pub(super) fn mode_word(mode: Mode) -> &'static str {
    match mode {
        Mode::Single => "single",
        Mode::Redundant => "redundant",
        Mode::Bonded => "bonded",
    }
}

fn stream_report(s: &driver::StreamReport) -> StreamReport {
    StreamReport {
        id: s.id,
        target: s.target.clone(),
        local: s.local,
        state: if s.connected { "open" } else { "connecting" }.to_owned(),
        links: mode_word(s.service.mode).to_owned(),
        own_lane: s.service.own_lane,
        tx: s.tx,
        rx: s.rx,
        packed_out: packed_report(s.packing.sent),
        packed_in: packed_report(s.packing.received),
    }
}

fn packed_report(packed: PackedTotals) -> PackedReport {
    PackedReport {
        codec: packed.codec.map(|codec| codec.name().to_owned()),
        bytes: packed.plain_bytes,
        ratio: (packed.packed_bytes > 0)
            .then(|| packed.plain_bytes as f64 / packed.packed_bytes as f64),
    }
}

fn flow_report(f: &driver::FlowReport) -> FlowReport {
    FlowReport {
        id: f.id,
        target: f.target.clone(),
        local: f.local.clone(),
        tx: f.tx.0,
        tx_bytes: f.tx.1,
        rx: f.rx.0,
        rx_bytes: f.rx.1,
    }
}

fn udp_report(udp: &driver::UdpReport) -> UdpReport {
    UdpReport {
        link: udp.link.clone(),
        remote: udp.remote,
        usable: udp.usable,
        mtu: udp.mtu,
        rtt_ms: udp.rtt.map(millis),
    }
}

fn datagram_report(s: &SessionSnapshot) -> DatagramReport {
    let (core, driver) = (&s.flow_stats, &s.datagrams);
    DatagramReport {
        flows_total: core.flows,
        failed: driver.failed,
        sent: core.sent,
        sent_udp: core.sent_udp,
        sent_tcp: core.sent_tcp,
        received: core.received,
        duplicates: core.duplicates,
        dropped: driver.dropped + core.unsent + core.overflowed + core.stray,
        incomplete: core.incomplete,
        unheard: driver.unheard,
        packets_received: core.packets_received,
        packets_refused: core.packets_refused,
        packets_unsent: driver.packets_unsent + core.packets_dropped,
    }
}

fn handover_report(h: &Handover) -> HandoverReport {
    HandoverReport {
        when_s: h.when_s,
        from: h.from.link.clone(),
        to: h.to.as_ref().map(|to| to.link.clone()).unwrap_or_default(),
        trigger: h.why.clone(),
        soft: h.soft,
        noticed_ns: h.noticed_ns,
        resent_ns: h.resent_ns,
        resumed_ns: h.resumed_ns,
        replayed_records: h.resent_records,
        replayed_bytes: h.resent_bytes,
    }
}
