//! Requests and answers of the control socket, one JSON object a line.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::explain::{Asked, ExplainReport};
use crate::trace::Handover;

/// What a command asks of the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// What the agent is doing.
    Status,
    /// What the links are.
    Links,
    /// What the sessions are doing.
    Sessions,
    /// Which units this one knows, and how targets see them.
    Peers,
    /// What the latest handovers were like, of sessions that have ended as well.
    Handovers {
        /// With this peer alone.
        peer: Option<String>,
        /// How many, at most.
        count: usize,
    },
    /// Move sessions to a link, or with `auto` give the choice back to the policy.
    Handover {
        /// The link, or `auto`.
        link: String,
    },
    /// Capture a cgroup.
    Attach {
        /// Absolute, or relative to the root of cgroup2.
        cgroup: PathBuf,
    },
    /// End the capture of a cgroup.
    Detach {
        /// As in [`Request::Attach`].
        cgroup: PathBuf,
    },
    /// Put the calling process into a captured scope of its own.
    Run {
        /// Destinations, `NET[:PORTS]`, that alone stay captured; empty means all.
        #[serde(default)]
        only: Vec<String>,
        /// Destinations that go direct.
        #[serde(default)]
        except: Vec<String>,
        /// Number of the network namespace that it is in: the agent need not be allowed to look.
        #[serde(default)]
        netns: Option<u64>,
    },
    /// What becomes of a connection, and why.
    Explain(Asked),
    /// The host has slept: transports may be gone without a word.
    Woke,
    /// Read certificates and the CRL anew.
    Reload,
}

impl Request {
    /// Whether it only looks.
    pub fn only_looks(&self) -> bool {
        matches!(
            self,
            Self::Status
                | Self::Links
                | Self::Sessions
                | Self::Peers
                | Self::Handovers { .. }
                | Self::Explain(_)
        )
    }
}

/// The agent's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// To [`Request::Status`].
    Status(StatusReport),
    /// To [`Request::Links`].
    Links(Vec<LinkReport>),
    /// To [`Request::Sessions`].
    Sessions(Vec<SessionReport>),
    /// To [`Request::Peers`], by name.
    Peers(Vec<UnitReport>),
    /// To [`Request::Handovers`], oldest first.
    Handovers(Vec<Handover>),
    /// To [`Request::Explain`].
    Explained(ExplainReport),
    /// It is done; in words, what.
    Done(String),
    /// It is not done.
    Error(ControlError),
}

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ControlError {
    /// What kind of error it is.
    pub code: ErrorCode,
    /// What happened.
    pub message: String,
    /// What to do next; may be empty.
    pub advice: String,
}

/// Kinds of errors, for exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The caller may not.
    NotPermitted,
    /// The request makes no sense here.
    Invalid,
    /// It was tried and did not work.
    Failed,
}

impl ControlError {
    /// An error with advice.
    pub fn new(code: ErrorCode, message: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            advice: advice.into(),
        }
    }
}

/// The agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusReport {
    /// Version of the software.
    pub version: String,
    /// The agent's process.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// This unit's SPIFFE ID.
    pub identity: String,
    /// Seconds until this unit's certificate expires.
    pub certificate_left_s: u64,
    /// Units to reach.
    pub peers: Vec<PeerReport>,
    /// Sessions that peers made with this unit.
    pub accepted_sessions: usize,
    /// What all sessions together have of `memory_total`; none from an agent before that.
    #[serde(default)]
    pub memory: Option<MemoryReport>,
    /// The capture, if there are `[[capture]]` rules.
    pub capture: Option<CaptureReport>,
    /// Doors for applications that are not captured.
    #[serde(default)]
    pub doors: Vec<DoorReport>,
    /// Packets on the UDP ports of `[accept]` that named no session that is known: strangers, or late ones.
    #[serde(default)]
    pub packets_unknown: u64,
    /// Packets that came faster than their session took them.
    #[serde(default)]
    pub packets_overflowed: u64,
}

/// Memory of all sessions together. They may have half of it for what they send, and half for what they receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryReport {
    /// `memory_total` of `[session]`, in bytes.
    pub total_bytes: usize,
    /// Bytes that wait for acknowledgements.
    pub unacknowledged_bytes: usize,
    /// Windows of all streams, in bytes: at most so much is held for applications that do not read.
    pub window_bytes: usize,
}

/// A unit that this one knows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnitReport {
    /// Its name.
    pub name: String,
    /// What its certificate says, a SPIFFE ID.
    pub certificate: String,
    /// `dialled` by this unit, or `accepted`.
    pub role: String,
    /// `up`, `holding` (a session without a link), `connecting`, or `away` (accepted before, no session now).
    pub state: String,
    /// By which addresses targets know it.
    pub addresses: Vec<IpAddr>,
}

/// A door for applications that are not captured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DoorReport {
    /// An address with a port, or the path of a Unix socket.
    pub at: String,
    /// A target, `socks5` or `http`.
    pub leads: String,
    /// The peer that carries what comes through it.
    pub peer: String,
}

/// A unit to reach.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerReport {
    /// Its name.
    pub name: String,
    /// `up`, `holding` (a session without a link) or `connecting`.
    pub state: String,
    /// The link that carries now.
    pub link: Option<String>,
    /// Why there is no session.
    pub reason: Option<String>,
    /// Captured connections that wait.
    pub waiting: usize,
}

/// What the eBPF programs do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CaptureReport {
    /// The captured cgroups.
    pub cgroups: Vec<PathBuf>,
    /// Matching connections that found an agent that did not answer for a second.
    #[serde(default)]
    pub agent_hung: u64,
    /// SYNs that were held until the target had answered.
    #[serde(default)]
    pub held: u64,
    /// Their retransmissions, which were held as well.
    #[serde(default)]
    pub held_again: u64,
    /// SYNs that could not be held, so that their connections succeeded at once.
    #[serde(default)]
    pub not_held: u64,
    /// Connections captured over IPv4.
    pub captured4: u64,
    /// Connections captured over IPv6.
    pub captured6: u64,
    /// Connections handed to the agent.
    pub delivered: u64,
    /// Connections that went direct or were refused because the agent did not listen.
    pub agent_gone: u64,
    /// Connections refused.
    pub refused: u64,
    /// Handshakes with the agent under way.
    pub in_flight: u64,
    /// `connect()`s of UDP sockets and datagrams sent without it that were captured over IPv4.
    #[serde(default)]
    pub udp4: u64,
    /// The same over IPv6.
    #[serde(default)]
    pub udp6: u64,
    /// Those that went direct or were refused since there were too many destinations.
    #[serde(default)]
    pub udp_full: u64,
    /// Captured datagrams that were dropped since they would have left the host by a link chosen for each of them.
    #[serde(default)]
    pub udp_stray: u64,
    /// UDP conversations now.
    #[serde(default)]
    pub udp_flows: u64,
    /// Captured datagrams, and answers to them, that the agent dropped.
    #[serde(default)]
    pub udp_dropped: u64,
    /// Messages that came past TCP (`local_bypass`).
    #[serde(default)]
    pub bypassed: u64,
    /// Messages of the same connections that came by TCP.
    #[serde(default)]
    pub not_bypassed: u64,
}

/// A link.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkReport {
    /// Its name.
    pub name: String,
    /// What sort it is.
    pub kind: String,
    /// `usable`, `settling` or `unusable`.
    pub state: String,
    /// Whether a peer can be reached over it.
    pub usable: bool,
    /// Why, or why not.
    pub reason: String,
    /// Its addresses with prefix.
    pub addresses: Vec<String>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it carries a session.
    pub in_use: bool,
    /// What it is for while another carries: `warm`, `cold` or `never`.
    pub standby: String,
    /// Why, in words.
    pub standby_reason: String,
    /// Whether a transport stands on it.
    pub ready: bool,
    /// Seconds after which the kernel probes an idle transport on it: all the traffic that a standby
    /// costs.
    pub keepalive_s: Option<u64>,
    /// What that comes to: packets in an hour, both ways, while nothing else is sent, and if the peer has
    /// the same interval.
    pub idle_packets_per_hour: Option<u64>,
    /// Their bytes, from the IP header on.
    pub idle_bytes_per_hour: Option<u64>,
    /// The kernel's round-trip time over it, in milliseconds.
    pub rtt_ms: Option<f64>,
}

/// A session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SessionReport {
    /// Its name, in hexadecimal; the same at both ends.
    pub id: String,
    /// The peer.
    pub peer: String,
    /// The peer's software.
    pub software: String,
    /// What its records are sealed with, as the RFCs call it.
    #[serde(default)]
    pub aead: String,
    /// `initiator` or `responder`.
    pub role: String,
    /// `up` or `holding`.
    pub state: String,
    /// Seconds since it was made.
    pub age_s: u64,
    /// Seconds without any transport.
    pub held_s: Option<u64>,
    /// Its transports.
    pub transports: Vec<TransportReport>,
    /// Its streams.
    pub streams: Vec<StreamReport>,
    /// Streams opened since it was made.
    pub streams_total: u64,
    /// Its flows: UDP conversations.
    #[serde(default)]
    pub flows: Vec<FlowReport>,
    /// The path that datagrams go over, once there is one.
    #[serde(default)]
    pub udp: Option<UdpReport>,
    /// What was counted of datagrams.
    #[serde(default)]
    pub datagrams: DatagramReport,
    /// Application bytes received.
    pub bytes_in: u64,
    /// Application bytes sent.
    pub bytes_out: u64,
    /// Sealed bytes sent again.
    pub resent_bytes: u64,
    /// Records that came more than once.
    pub duplicates: u64,
    /// Key epochs begun by this end.
    pub rekeys: u64,
    /// Bytes held in memory.
    pub memory_bytes: usize,
    /// Bytes of one stream that were held beyond a gap, at most, since it was made.
    pub reorder_bytes_max: usize,
    /// Handovers since it was made.
    pub handovers_total: u64,
    /// The latest handovers, oldest first.
    pub handovers: Vec<HandoverReport>,
}

/// A transport.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TransportReport {
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
    /// 0 for the first transport of its path; others keep the queues of streams apart.
    pub lane: u64,
    /// What it carries in Mbit/s, once it has been busy.
    pub rate_mbit: Option<f64>,
    /// Seconds since it was made.
    pub age_s: u64,
    /// Bytes read from its socket.
    pub bytes_in: u64,
    /// Bytes written to its socket.
    pub bytes_out: u64,
    /// Sealed bytes that wait for its socket.
    pub queued_bytes: usize,
    /// The kernel's smoothed round-trip time, in milliseconds.
    pub rtt_ms: Option<f64>,
    /// Its congestion control, by the kernel's name.
    pub congestion: Option<String>,
    /// The congestion window, in segments: what it may have under way.
    pub window_segments: Option<u32>,
}

/// A stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StreamReport {
    /// Its number.
    pub id: u64,
    /// Where it leads.
    pub target: String,
    /// The application's address, or our own towards the target.
    pub local: Option<SocketAddr>,
    /// `open` or `connecting`.
    pub state: String,
    /// How it uses the links: `single`, `redundant` or `bonded`.
    pub links: String,
    /// Whether it has a lane to itself.
    pub own_lane: bool,
    /// Bytes read from the local socket.
    pub tx: u64,
    /// Bytes written to the local socket.
    pub rx: u64,
    /// How what it sends to the peer is packed.
    #[serde(default)]
    pub packed_out: PackedReport,
    /// How what comes from the peer is packed.
    #[serde(default)]
    pub packed_in: PackedReport,
}

/// How one direction of a stream is packed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PackedReport {
    /// `lz4` or `zstd`; none: it goes as it is now.
    pub codec: Option<String>,
    /// Bytes of the stream that were packed, since it was opened.
    pub bytes: u64,
    /// How many of them became one byte; none while none were packed.
    pub ratio: Option<f64>,
}

/// A flow: one UDP conversation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FlowReport {
    /// Its number.
    pub id: u64,
    /// Where it leads.
    pub target: String,
    /// The application, or our own address towards the target.
    pub local: String,
    /// Datagrams that came from the local end.
    pub tx: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Datagrams that went to the local end.
    pub rx: u64,
    /// Their bytes.
    pub rx_bytes: u64,
}

/// The path that datagrams go over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UdpReport {
    /// Our link; empty if none holds our address.
    pub link: String,
    /// The peer's address.
    pub remote: SocketAddr,
    /// Whether it answers; otherwise datagrams go over TCP, or over both.
    pub usable: bool,
    /// Largest UDP payload that is known to pass, in bytes.
    pub mtu: usize,
    /// The smoothed round-trip time, in milliseconds.
    pub rtt_ms: Option<f64>,
}

/// What a session has counted of datagrams since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatagramReport {
    /// Flows opened by either end.
    pub flows_total: u64,
    /// Flows that ended by an error of their target.
    pub failed: u64,
    /// Datagrams sent to the peer.
    pub sent: u64,
    /// How many of them went over UDP, and how many over TCP; some go both ways.
    pub sent_udp: u64,
    /// See `sent_udp`.
    pub sent_tcp: u64,
    /// Datagrams that came from the peer.
    pub received: u64,
    /// Copies of datagrams that had come already.
    pub duplicates: u64,
    /// Datagrams that were dropped at this end.
    pub dropped: u64,
    /// Datagrams of which a part never came.
    pub incomplete: u64,
    /// Datagrams for an application of the peer from somebody whom the rules do not let the peer speak to.
    #[serde(default)]
    pub unheard: u64,
    /// Packets that were opened.
    pub packets_received: u64,
    /// Packets that were not this session's, or not authentic.
    pub packets_refused: u64,
    /// Packets that this end could not send.
    pub packets_unsent: u64,
}

/// A handover.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HandoverReport {
    /// Seconds since 1970.
    pub when_s: f64,
    /// The link that was left.
    pub from: String,
    /// The link that carries now.
    pub to: String,
    /// Why.
    pub trigger: String,
    /// Whether the old link still worked.
    pub soft: bool,
    /// CLOCK_MONOTONIC of the event that told of it, in nanoseconds.
    pub noticed_ns: u64,
    /// CLOCK_MONOTONIC when the unacknowledged records were given to the new transport.
    pub resent_ns: Option<u64>,
    /// CLOCK_MONOTONIC when the peer was first heard on the new transport.
    pub resumed_ns: Option<u64>,
    /// Records sent again.
    pub replayed_records: u64,
    /// Their sealed bytes.
    pub replayed_bytes: u64,
}
