//! The configuration as it was typed: every value with its place in the file.

use std::path::PathBuf;

use serde::Deserialize;
use toml::Spanned;

pub(super) type Text = Spanned<String>;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Raw {
    pub identity: Identity,
    #[serde(default)]
    pub agent: Agent,
    #[serde(default)]
    pub peer: Vec<Peer>,
    #[serde(default)]
    pub capture: Vec<Spanned<Capture>>,
    #[serde(default)]
    pub dns: Dns,
    #[serde(default)]
    pub listen: Vec<Listen>,
    #[serde(default)]
    pub stream: Vec<Spanned<Stream>>,
    #[serde(default)]
    pub links: Links,
    pub accept: Option<Accept>,
    #[serde(default)]
    pub session: Session,
    #[serde(default)]
    pub transport: Transport,
    #[serde(default)]
    pub trace: Trace,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Identity {
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub ca: PathBuf,
    pub crl: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Agent {
    pub control: Option<PathBuf>,
    pub control_group: Option<String>,
    #[serde(default)]
    pub run_users: Vec<String>,
    pub log: Option<String>,
    #[serde(default)]
    pub capture_cgroups: Vec<PathBuf>,
    pub bpffs: Option<PathBuf>,
    pub local_bypass: Option<Text>,
    pub busy_poll: Option<Text>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Peer {
    pub name: Text,
    pub addresses: Spanned<Vec<Text>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Capture {
    pub action: Option<Text>,
    pub peer: Option<Text>,
    pub to: Option<Spanned<Vec<Text>>>,
    pub names: Option<Spanned<Vec<Text>>>,
    #[serde(default)]
    pub except: Vec<Text>,
    #[serde(default)]
    pub ports: Vec<Text>,
    pub protocol: Option<Text>,
    #[serde(default)]
    pub uids: Vec<Text>,
    pub when_agent_dead: Option<Text>,
    pub connect: Option<Text>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Dns {
    #[serde(default)]
    pub listen: Vec<Text>,
    #[serde(default)]
    pub from: Vec<Text>,
    #[serde(default)]
    pub upstream: Vec<Text>,
    pub range4: Option<Text>,
    pub range6: Option<Text>,
    pub ttl: Option<Text>,
    pub state: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Listen {
    pub at: Text,
    pub peer: Text,
    pub to: Option<Text>,
    pub serve: Option<Text>,
    pub protocol: Option<Text>,
    #[serde(default)]
    pub from: Vec<Text>,
    pub group: Option<Text>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Stream {
    #[serde(default)]
    pub to: Vec<Text>,
    #[serde(default)]
    pub ports: Vec<Text>,
    #[serde(default)]
    pub cgroups: Vec<String>,
    pub links: Option<Text>,
    pub lane: Option<Text>,
    pub compression: Option<Text>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Links {
    #[serde(default)]
    pub prefer: Vec<String>,
    #[serde(default)]
    pub exclude: Vec<String>,
    #[serde(default)]
    pub metered: Vec<String>,
    #[serde(default)]
    pub warm: Vec<String>,
    #[serde(default)]
    pub cold: Vec<String>,
    #[serde(default)]
    pub never: Vec<String>,
    pub debounce: Option<Text>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Accept {
    pub listen: Spanned<Vec<Text>>,
    pub max_sessions: Option<Spanned<u64>>,
    pub max_streams: Option<Spanned<u64>>,
    pub max_flows: Option<Spanned<u64>>,
    pub handshake_timeout: Option<Text>,
    pub dial_timeout: Option<Text>,
    pub state: Option<PathBuf>,
    pub peer_networks: Option<Vec<Text>>,
    #[serde(default)]
    pub proxy_protocol: Vec<Text>,
    #[serde(default)]
    pub allow: Vec<Allow>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Allow {
    pub peer: Text,
    pub to: Vec<Text>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Session {
    pub hold: Option<Text>,
    pub peer_gone_after: Option<Text>,
    pub memory: Option<Text>,
    pub memory_total: Option<Text>,
    pub rekey_records: Option<Spanned<u64>>,
    pub rekey_after: Option<Text>,
    pub reauth_after: Option<Text>,
    pub expiry_grace: Option<Text>,
    pub flow_idle: Option<Text>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Transport {
    pub user_timeout: Option<Text>,
    pub notsent_lowat: Option<Text>,
    pub keepalive: Option<Text>,
    pub congestion: Option<Text>,
    pub lanes: Option<Spanned<Lanes>>,
    pub fast_open: Option<bool>,
    pub udp: Option<bool>,
    pub compression: Option<Text>,
    pub dial_timeout: Option<Text>,
}

/// A number, or a word.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Lanes {
    Count(u64),
    Word(String),
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Trace {
    pub qlog: Option<PathBuf>,
}
