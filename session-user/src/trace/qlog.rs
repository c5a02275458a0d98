//! Events as qlog has them: draft-ietf-quic-qlog-main-schema, as a JSON text sequence (RFC 7464).
//!
//! The events that QUIC's schema has keep their names (draft-ietf-quic-qlog-quic-events), with a session
//! for a connection and a transport for a path. What is ours alone begins with `holdfast:`.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::{Handover, Metrics, PathInfo};

/// The version of the schema whose event names and times these are.
const VERSION: &str = "0.3";
/// What a record begins with (RFC 7464 section 2.2).
const RECORD_SEPARATOR: u8 = 0x1e;

/// The session that a file tells of.
#[derive(Debug)]
pub(super) struct About {
    pub session: String,
    pub peer: String,
    pub initiator: bool,
    pub began: SystemTime,
}

impl About {
    /// Whether this unit made the session.
    pub fn side(&self) -> &'static str {
        if self.initiator { "client" } else { "server" }
    }

    /// The first record of a file.
    pub fn header(&self) -> Vec<u8> {
        let began = self.began.duration_since(SystemTime::UNIX_EPOCH);
        let software = format!("holdfast {}", env!("CARGO_PKG_VERSION"));
        sequence(&json!({
            "qlog_version": VERSION,
            "qlog_format": "JSON-SEQ",
            "file_schema": "urn:ietf:params:qlog:file:sequential",
            "serialization_format": "application/qlog+json-seq",
            "title": format!("session {} with {}", self.session, self.peer),
            "trace": {
                "vantage_point": { "name": software, "type": self.side() },
                "common_fields": {
                    "protocol_type": ["HOLDFAST"],
                    "group_id": self.session,
                    "time_format": "relative",
                    "reference_time": millis(began.unwrap_or_default()),
                },
            },
        }))
    }
}

/// An event without its time.
pub(super) struct Event {
    name: &'static str,
    data: Value,
}

impl Event {
    /// The event as it stands in a file, `at` after the session's begin.
    pub fn record(self, at: Duration) -> Vec<u8> {
        sequence(&json!({ "time": millis(at), "name": self.name, "data": self.data }))
    }
}

/// One record of a JSON text sequence. JSON escapes control characters, so that neither the separator
/// nor a line's end can be inside.
fn sequence(value: &Value) -> Vec<u8> {
    let mut out = vec![RECORD_SEPARATOR];
    out.extend_from_slice(value.to_string().as_bytes());
    out.push(b'\n');
    out
}

fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

fn endpoint(addr: SocketAddr) -> Value {
    match addr {
        SocketAddr::V4(v4) => json!({ "ip_v4": v4.ip(), "port_v4": v4.port() }),
        SocketAddr::V6(v6) => json!({ "ip_v6": v6.ip(), "port_v6": v6.port() }),
    }
}

pub(super) fn started(local: SocketAddr, remote: SocketAddr) -> Event {
    Event {
        name: "connectivity:connection_started",
        data: json!({
            "ip_version": if local.is_ipv4() { "v4" } else { "v6" },
            "src_ip": local.ip(),
            "src_port": local.port(),
            "dst_ip": remote.ip(),
            "dst_port": remote.port(),
            "protocol": "TCP",
        }),
    }
}

pub(super) fn path_up(number: u64, path: &PathInfo) -> Event {
    Event {
        name: "connectivity:path_assigned",
        data: json!({
            "path_id": number.to_string(),
            "path_local": endpoint(path.local),
            "path_remote": endpoint(path.remote),
            "link": path.link,
        }),
    }
}

pub(super) fn path_ended(number: u64, reason: &str) -> Event {
    Event {
        name: "holdfast:path_ended",
        data: json!({ "path_id": number.to_string(), "reason": reason }),
    }
}

pub(super) fn metrics(number: u64, metrics: &Metrics) -> Event {
    Event {
        name: "recovery:metrics_updated",
        data: json!({
            "path_id": number.to_string(),
            "smoothed_rtt": millis(metrics.rtt),
            "rtt_variance": millis(metrics.rtt_variance),
            "congestion_window": metrics.window,
            "bytes_in_flight": metrics.in_flight,
        }),
    }
}

pub(super) fn handover(handover: &Handover) -> Event {
    Event {
        name: "holdfast:handover",
        data: json!(handover),
    }
}

pub(super) fn closed(code: Option<u64>, reason: &str, by_peer: bool) -> Event {
    Event {
        name: "connectivity:connection_closed",
        data: json!({
            "owner": if by_peer { "remote" } else { "local" },
            "application_code": code,
            "reason": reason,
        }),
    }
}

/// Records were not written because the disk was too slow.
pub(super) fn dropped(records: u64) -> Event {
    Event {
        name: "generic:warning",
        data: json!({ "message": format!("{records} records of this unit's sessions were left out: the disk was too slow") }),
    }
}
