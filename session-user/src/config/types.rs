//! What can be configured, as ready objects.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use session_proto::wire::{Codec, Packing, Service};

use crate::capture::{CaptureRule, LocalBypass};
use crate::door::{At, Leads};

/// Files of this unit's identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Certificate chain, PEM.
    pub certificate: PathBuf,
    /// Private key, PEM.
    pub key: PathBuf,
    /// Certificate of the CA, PEM.
    pub ca: PathBuf,
    /// The CA's CRL, PEM.
    pub crl: Option<PathBuf>,
}

/// The agent itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agent {
    /// The control socket.
    pub control: PathBuf,
    /// A group whose members may command the agent.
    pub control_group: Option<String>,
    /// Users who may use `holdfast run`.
    pub run_users: Vec<String>,
    /// A tracing filter.
    pub log: String,
    /// Cgroups that are captured from the start.
    pub capture_cgroups: Vec<PathBuf>,
    /// Where a BPF file system is mounted, for rules that refuse while the agent is dead.
    pub bpffs: PathBuf,
    /// Whether what captured applications send comes past TCP.
    pub local_bypass: LocalBypass,
    /// How long a session looks for news before it sleeps, where news comes that soon; zero: never.
    pub busy_poll: Duration,
}

/// A unit to reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its name in its certificate.
    pub name: String,
    /// Where it listens, in order of preference.
    pub addresses: Vec<SocketAddr>,
}

/// What to capture, and what not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capture {
    /// What it says. Its peer is the index in [`super::Config::peers`].
    pub rule: CaptureRule,
    /// Its line in the file, from 1.
    pub line: usize,
}

/// How the agent answers questions about names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dns {
    /// Where it answers whoever asks, over UDP and TCP, beside the questions of captured applications.
    pub listen: Vec<SocketAddr>,
    /// Who may ask there, beside this host.
    pub from: Vec<IpNet>,
    /// The resolvers for what is asked there and is not captured; empty means those of /etc/resolv.conf.
    pub upstream: Vec<SocketAddr>,
    /// IPv4 addresses that stand for names.
    pub range4: Ipv4Net,
    /// IPv6 addresses that stand for names; without it, some that are this unit's own.
    pub range6: Option<Ipv6Net>,
    /// How long an answer may be remembered.
    pub ttl: Duration,
    /// Folder in which it is remembered which address stands for which name.
    pub state: PathBuf,
}

/// A door for applications that are not captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// Where it is.
    pub at: At,
    /// Index of the peer in [`Config::peers`].
    pub peer: usize,
    /// What it leads to.
    pub leads: Leads,
    /// Who may use it beside this host.
    pub from: Vec<IpNet>,
    /// Group whose members may use a Unix socket.
    pub group: Option<String>,
}

/// Further transports on the link in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lanes {
    /// So many, for bulk streams.
    Bulk(u64),
    /// One for each stream, as far as there are enough.
    PerStream,
}

/// How some streams use the links.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    /// Destinations; empty means all.
    pub to: Vec<IpNet>,
    /// Ports; empty means all.
    pub ports: Vec<RangeInclusive<u16>>,
    /// Names or patterns of cgroups; empty means all.
    pub cgroups: Vec<String>,
    /// What they get; its packing is [`Packing::Unsaid`] where the rule does not say how they are compressed.
    pub service: Service,
    /// Its line in the file, from 1.
    pub line: usize,
}

/// Which link is preferred.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Links {
    /// Names or patterns, most preferred first.
    pub prefer: Vec<String>,
    /// Names or patterns that are never used.
    pub exclude: Vec<String>,
    /// Names or patterns of links that cost money by volume.
    pub metered: Vec<String>,
    /// Names or patterns of links on which a standby is kept.
    pub warm: Vec<String>,
    /// Names or patterns of links that are dialled when they are needed.
    pub cold: Vec<String>,
    /// Names or patterns of links that never stand in for another.
    pub never: Vec<String>,
    /// How long a link must be good before it is used (again).
    pub debounce: Duration,
}

/// How this unit accepts sessions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accept {
    /// Where to listen.
    pub listen: Vec<SocketAddr>,
    /// Sessions at once.
    pub max_sessions: usize,
    /// Open streams of one session.
    pub max_streams: u64,
    /// Open flows of one session.
    pub max_flows: u64,
    /// Time for a preamble and a handshake.
    pub handshake_timeout: Duration,
    /// Time for a target to answer.
    pub dial_timeout: Duration,
    /// Folder of what is remembered.
    pub state: PathBuf,
    /// Networks in each of which every peer has an address, by which targets know it.
    pub peer_networks: Vec<IpNet>,
    /// Targets that are told by the PROXY protocol for whom they are dialled, as written.
    pub proxy_protocol: Vec<String>,
    /// Who may go where: peer name or pattern, and targets as written.
    pub allow: Vec<(String, Vec<String>)>,
}

/// Limits of sessions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// How long a session lives without any link.
    pub hold: Duration,
    /// How long every path may refuse before the peer is taken to be gone.
    pub peer_gone_after: Duration,
    /// Memory of one session, in bytes.
    pub memory_bytes: usize,
    /// Memory of all sessions together, in bytes. `None`: a quarter of the host's.
    pub memory_total_bytes: Option<usize>,
    /// Records sealed in one key epoch.
    pub rekey_records: u64,
    /// Age of a key epoch.
    pub rekey_after: Duration,
    /// When keys and certificates are renewed in band, at the latest.
    pub reauth_after: Duration,
    /// How long a session outlives its certificates.
    pub expiry_grace: Duration,
    /// A flow without datagrams for so long is over.
    pub flow_idle: Duration,
}

/// How what streams carry is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// By the codec that saves most time, where one saves any; not streams that begin as HTTP or TLS do.
    Auto,
    /// By LZ4 alone, where that saves time.
    Lz4,
    /// By Zstandard alone, where that saves time.
    Zstd,
    /// Never, in neither direction.
    Off,
}

impl Compression {
    /// The same as the wish of a stream.
    pub const fn packing(self) -> Packing {
        match self {
            Self::Auto => Packing::Auto,
            Self::Lz4 => Packing::Only(Codec::Lz4),
            Self::Zstd => Packing::Only(Codec::Zstd),
            Self::Off => Packing::Off,
        }
    }
}

/// Options of transports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transport {
    /// `TCP_USER_TIMEOUT`.
    pub user_timeout: Duration,
    /// `TCP_NOTSENT_LOWAT`, in bytes.
    pub notsent_lowat: u32,
    /// Idle time before the kernel asks whether the peer's end stands, and a NAT on the way hears
    /// that the connection does.
    pub keepalive: Duration,
    /// `TCP_CONGESTION` by name, "auto" or "host".
    pub congestion: String,
    /// Whether transports are dialled and accepted with data in the SYN.
    pub fast_open: bool,
    /// Whether datagrams go over UDP; otherwise over TCP alone.
    pub udp: bool,
    /// How what streams carry is packed.
    pub compression: Compression,
    /// Further transports on the link in use.
    pub lanes: Lanes,
    /// Time for a TCP connection to a peer.
    pub dial_timeout: Duration,
}

/// What is written of sessions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// Folder of a qlog file for each session; none are written without it.
    pub qlog: Option<PathBuf>,
}
