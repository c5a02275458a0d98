//! The configuration: TOML, by default at `/etc/holdfast/holdfast.toml`.
//!
//! What was typed (`raw`) becomes ready objects (`types`), one function for each section. An error
//! names the file, the line, the key and what was expected.

mod captures;
mod dns;
mod listen;
mod raw;
mod sections;
mod source;
mod types;
mod units;

use std::path::Path;
use std::time::Duration;

use captures::{captures, local_bypass};
use dns::dns;
use listen::listens;
use sections::{accept, busy_poll, peers, session, streams, transport};
use source::Source;
pub use types::{
    Accept, Agent, Capture, Compression, Dns, Identity, Lanes, Links, Listen, Peer, Session,
    Stream, Trace, Transport,
};
use units::short_duration;
pub use units::{duration, size};

/// Where the configuration is unless said otherwise.
pub const DEFAULT_PATH: &str = "/etc/holdfast/holdfast.toml";
/// Where the control socket is unless said otherwise.
pub const DEFAULT_CONTROL: &str = "/run/holdfast/control.sock";

/// Where a gateway remembers things unless said otherwise.
pub const DEFAULT_STATE: &str = "/var/lib/holdfast";
/// Where the BPF file system is unless said otherwise.
pub const DEFAULT_BPFFS: &str = "/sys/fs/bpf";

/// A configuration error: where, and what was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}: {key}: {message}")]
pub struct ConfigError {
    /// The file.
    pub file: String,
    /// The line, from 1; 0 if the file could not be read.
    pub line: usize,
    /// The key.
    pub key: String,
    /// What is wrong, and what was expected.
    pub message: String,
}

/// Everything that can be configured.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// This unit's files.
    pub identity: Identity,
    /// The agent itself.
    pub agent: Agent,
    /// Units to reach.
    pub peers: Vec<Peer>,
    /// What to capture, and what not: the first that matches decides.
    pub captures: Vec<Capture>,
    /// How questions about names are answered.
    pub dns: Dns,
    /// Doors for applications that are not captured.
    pub listens: Vec<Listen>,
    /// How streams use the links.
    pub streams: Vec<Stream>,
    /// Which link is preferred.
    pub links: Links,
    /// Whether and how this unit accepts sessions.
    pub accept: Option<Accept>,
    /// Limits of sessions.
    pub session: Session,
    /// Options of transports.
    pub transport: Transport,
    /// What is written of sessions.
    pub trace: Trace,
}

type Result<T> = std::result::Result<T, ConfigError>;

impl Config {
    /// A configuration with every key and its default.
    pub const EXAMPLE: &str = include_str!("example.toml");

    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self> {
        let file = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|e| ConfigError {
            file: file.clone(),
            line: 0,
            key: "file".to_owned(),
            message: format!("{e}; `holdfast config example` prints one to start from"),
        })?;
        Self::parse(&text, &file)
    }

    /// Parses a text; `file` is named in errors.
    pub fn parse(text: &str, file: &str) -> Result<Self> {
        let source = Source { file, text };
        let raw: raw::Raw = toml::from_str(text).map_err(|error| {
            let span = error.span().unwrap_or(0..0);
            let line = text
                .get(span.clone())
                .unwrap_or_default()
                .lines()
                .next()
                .unwrap_or_default()
                .trim();
            let key = if line.is_empty() { "toml" } else { line };
            source.error(&span, key, error.message())
        })?;
        let peers = peers(&source, &raw.peer)?;
        let transport = transport(&source, &raw.transport)?;
        Ok(Self {
            identity: Identity {
                certificate: raw.identity.certificate,
                key: raw.identity.key,
                ca: raw.identity.ca,
                crl: raw.identity.crl,
            },
            agent: Agent {
                control: raw.agent.control.unwrap_or_else(|| DEFAULT_CONTROL.into()),
                control_group: raw.agent.control_group,
                run_users: raw.agent.run_users,
                log: raw.agent.log.unwrap_or_else(|| "info".to_owned()),
                capture_cgroups: raw.agent.capture_cgroups,
                bpffs: raw.agent.bpffs.unwrap_or_else(|| DEFAULT_BPFFS.into()),
                local_bypass: source.or(
                    "agent.local_bypass",
                    raw.agent.local_bypass.as_ref(),
                    crate::capture::LocalBypass::Off,
                    local_bypass,
                )?,
                busy_poll: source.or(
                    "agent.busy_poll",
                    raw.agent.busy_poll.as_ref(),
                    Duration::from_micros(100),
                    busy_poll,
                )?,
            },
            captures: captures(&source, &raw.capture, &peers)?,
            dns: dns(&source, &raw.dns)?,
            listens: listens(&source, &raw.listen, &peers)?,
            peers,
            links: Links {
                debounce: source.or(
                    "links.debounce",
                    raw.links.debounce.as_ref(),
                    Duration::from_millis(100),
                    duration,
                )?,
                prefer: raw.links.prefer,
                exclude: raw.links.exclude,
                metered: raw.links.metered,
                warm: raw.links.warm,
                cold: raw.links.cold,
                never: raw.links.never,
            },
            accept: raw
                .accept
                .as_ref()
                .map(|a| accept(&source, a))
                .transpose()?,
            session: session(&source, &raw.session)?,
            streams: streams(&source, &raw.stream, transport.lanes)?,
            transport,
            trace: Trace {
                qlog: raw.trace.qlog,
            },
        })
    }
}

#[cfg(test)]
mod tests;
