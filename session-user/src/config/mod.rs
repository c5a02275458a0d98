//! The configuration: TOML, by default at `/etc/holdfast/holdfast.toml`.
//!
//! What was typed (`raw`) becomes ready objects here, one function for each section. An error
//! names the file, the line, the key and what was expected.

mod raw;
mod units;

use std::net::SocketAddr;
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use toml::Spanned;

pub use units::{duration, size};

/// Where the configuration is unless said otherwise.
pub const DEFAULT_PATH: &str = "/etc/holdfast/holdfast.toml";
/// Where the control socket is unless said otherwise.
pub const DEFAULT_CONTROL: &str = "/run/holdfast/control.sock";

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
    /// What to capture.
    pub captures: Vec<Capture>,
    /// Which link is preferred.
    pub links: Links,
    /// Whether and how this unit accepts sessions.
    pub accept: Option<Accept>,
    /// Limits of sessions.
    pub session: Session,
    /// Options of transports.
    pub transport: Transport,
}

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
}

/// A unit to reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its name in its certificate.
    pub name: String,
    /// Where it listens, in order of preference.
    pub addresses: Vec<SocketAddr>,
}

/// What to capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capture {
    /// Index of the peer in [`Config::peers`].
    pub peer: usize,
    /// Destinations.
    pub to: Vec<IpNet>,
    /// Destinations within `to` that are left alone.
    pub except: Vec<IpNet>,
    /// Ports.
    pub ports: Vec<RangeInclusive<u16>>,
    /// Whether connections are refused while the agent is dead; otherwise they go direct.
    pub fail_closed: bool,
}

/// Which link is preferred.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Links {
    /// Names or patterns, most preferred first.
    pub prefer: Vec<String>,
    /// Names or patterns that are never used.
    pub exclude: Vec<String>,
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
    /// Time for a preamble and a handshake.
    pub handshake_timeout: Duration,
    /// Time for a target to answer.
    pub dial_timeout: Duration,
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
    /// Records sealed in one key epoch.
    pub rekey_records: u64,
    /// Age of a key epoch.
    pub rekey_after: Duration,
    /// When keys and certificates are renewed in band, at the latest.
    pub reauth_after: Duration,
    /// How long a session outlives its certificates.
    pub expiry_grace: Duration,
}

/// Options of transports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transport {
    /// `TCP_USER_TIMEOUT`.
    pub user_timeout: Duration,
    /// `TCP_NOTSENT_LOWAT`, in bytes.
    pub notsent_lowat: u32,
    /// Time for a TCP connection to a peer.
    pub dial_timeout: Duration,
}

/// A file's text, to tell lines from offsets.
struct Source<'a> {
    file: &'a str,
    text: &'a str,
}

type Result<T> = std::result::Result<T, ConfigError>;

impl Source<'_> {
    fn error(&self, span: &Range<usize>, key: &str, message: impl Into<String>) -> ConfigError {
        let upto = self.text.get(..span.start).unwrap_or(self.text);
        let line = upto.bytes().filter(|b| *b == b'\n').count() + 1;
        ConfigError {
            file: self.file.to_owned(),
            line,
            key: key.to_owned(),
            message: message.into(),
        }
    }

    /// Converts a value that was typed, or takes the default.
    fn or<T>(
        &self,
        key: &str,
        typed: Option<&raw::Text>,
        default: T,
        parse: impl Fn(&str) -> std::result::Result<T, String>,
    ) -> Result<T> {
        typed.map_or(Ok(default), |text| self.one(key, text, parse))
    }

    fn one<T>(
        &self,
        key: &str,
        text: &raw::Text,
        parse: impl Fn(&str) -> std::result::Result<T, String>,
    ) -> Result<T> {
        parse(text.get_ref()).map_err(|message| self.error(&text.span(), key, message))
    }

    fn all<T>(
        &self,
        key: &str,
        texts: &[raw::Text],
        parse: impl Fn(&str) -> std::result::Result<T, String>,
    ) -> Result<Vec<T>> {
        texts
            .iter()
            .map(|text| self.one(key, text, &parse))
            .collect()
    }

    fn within(
        &self,
        key: &str,
        typed: Option<&Spanned<u64>>,
        default: u64,
        range: RangeInclusive<u64>,
    ) -> Result<u64> {
        let Some(value) = typed else {
            return Ok(default);
        };
        if range.contains(value.get_ref()) {
            return Ok(*value.get_ref());
        }
        let message = format!(
            "{} is out of range: expected {} to {}",
            value.get_ref(),
            range.start(),
            range.end()
        );
        Err(self.error(&value.span(), key, message))
    }
}

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
            },
            captures: captures(&source, &raw.capture, &peers)?,
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
            },
            accept: raw
                .accept
                .as_ref()
                .map(|a| accept(&source, a))
                .transpose()?,
            session: session(&source, &raw.session)?,
            transport: transport(&source, &raw.transport)?,
        })
    }
}

fn address(text: &str) -> std::result::Result<SocketAddr, String> {
    text.parse().map_err(|_| format!("`{text}` is not an address with a port, such as \"192.0.2.1:7843\" or \"[2001:db8::1]:7843\""))
}

fn network(text: &str) -> std::result::Result<IpNet, String> {
    let host = || text.parse::<std::net::IpAddr>().map(IpNet::from);
    text.parse().or_else(|_| host()).map_err(|_| {
        format!("`{text}` is not a network, such as \"10.0.0.0/8\" or \"2001:db8::/32\"")
    })
}

fn ports(text: &str) -> std::result::Result<RangeInclusive<u16>, String> {
    let expected =
        || format!("`{text}` is not a port or a range of ports, such as \"443\" or \"8000-8999\"");
    let port = |t: &str| t.trim().parse::<u16>().ok().filter(|p| *p > 0);
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    let range = port(low).zip(port(high)).filter(|(low, high)| low <= high);
    range.map(|(low, high)| low..=high).ok_or_else(expected)
}

fn peers(source: &Source<'_>, raw: &[raw::Peer]) -> Result<Vec<Peer>> {
    let mut out: Vec<Peer> = Vec::new();
    for peer in raw {
        let name = peer.name.get_ref();
        if out.iter().any(|p| p.name == *name) {
            return Err(source.error(
                &peer.name.span(),
                "peer.name",
                format!("`{name}` is given twice"),
            ));
        }
        if name.is_empty() {
            return Err(source.error(
                &peer.name.span(),
                "peer.name",
                "expected the name in the peer's certificate",
            ));
        }
        let addresses = source.all("peer.addresses", peer.addresses.get_ref(), address)?;
        if addresses.is_empty() {
            return Err(source.error(
                &peer.addresses.span(),
                "peer.addresses",
                "expected at least one address",
            ));
        }
        out.push(Peer {
            name: name.clone(),
            addresses,
        });
    }
    Ok(out)
}

fn captures(source: &Source<'_>, raw: &[raw::Capture], peers: &[Peer]) -> Result<Vec<Capture>> {
    raw.iter()
        .map(|capture| one_capture(source, capture, peers))
        .collect()
}

fn one_capture(source: &Source<'_>, raw: &raw::Capture, peers: &[Peer]) -> Result<Capture> {
    let peer = source.one("capture.peer", &raw.peer, |name| {
        let known = || {
            peers
                .iter()
                .map(|p| p.name.as_str())
                .collect::<Vec<_>>()
                .join(", ")
        };
        peers
            .iter()
            .position(|p| p.name == name)
            .ok_or_else(|| format!("`{name}` is no [[peer]]; there is: {}", known()))
    })?;
    let to = source.all("capture.to", raw.to.get_ref(), network)?;
    if to.is_empty() {
        return Err(source.error(
            &raw.to.span(),
            "capture.to",
            "expected at least one network",
        ));
    }
    let mut ports = source.all("capture.ports", &raw.ports, ports)?;
    if ports.is_empty() {
        ports.push(1..=u16::MAX);
    }
    let fail_closed = source.or(
        "capture.when_agent_dead",
        raw.when_agent_dead.as_ref(),
        false,
        |text| match text {
            "direct" => Ok(false),
            "refuse" => Ok(true),
            other => Err(format!("`{other}` is neither \"direct\" nor \"refuse\"")),
        },
    )?;
    Ok(Capture {
        peer,
        to,
        except: source.all("capture.except", &raw.except, network)?,
        ports,
        fail_closed,
    })
}

fn accept(source: &Source<'_>, raw: &raw::Accept) -> Result<Accept> {
    let listen = source.all("accept.listen", raw.listen.get_ref(), address)?;
    if listen.is_empty() {
        return Err(source.error(
            &raw.listen.span(),
            "accept.listen",
            "expected at least one address",
        ));
    }
    let mut allow = Vec::new();
    for rule in &raw.allow {
        let to = source.all("accept.allow.to", &rule.to, |text| {
            let parsed = crate::dial::AllowList::parse(&[crate::dial::AllowRule {
                peer: rule.peer.get_ref().clone(),
                to: vec![text.to_owned()],
            }]);
            parsed.map(|_| text.to_owned()).map_err(|e| e.to_string())
        })?;
        allow.push((rule.peer.get_ref().clone(), to));
    }
    let ten = Duration::from_secs(10);
    Ok(Accept {
        listen,
        max_sessions: source.within(
            "accept.max_sessions",
            raw.max_sessions.as_ref(),
            1024,
            1..=1 << 20,
        )? as usize,
        max_streams: source.within(
            "accept.max_streams",
            raw.max_streams.as_ref(),
            4096,
            1..=1 << 20,
        )?,
        handshake_timeout: source.or(
            "accept.handshake_timeout",
            raw.handshake_timeout.as_ref(),
            ten,
            duration,
        )?,
        dial_timeout: source.or(
            "accept.dial_timeout",
            raw.dial_timeout.as_ref(),
            ten,
            duration,
        )?,
        allow,
    })
}

fn session(source: &Source<'_>, raw: &raw::Session) -> Result<Session> {
    let hours = |n: u64| Duration::from_secs(n * 3600);
    // Less would not hold a round trip's worth of data on any link worth having.
    let memory = |text: &str| match size(text)? {
        bytes if bytes < 1 << 20 => Err(format!("`{text}` is too little: expected at least 1MiB")),
        bytes => Ok(bytes),
    };
    Ok(Session {
        hold: source.or("session.hold", raw.hold.as_ref(), hours(24), duration)?,
        peer_gone_after: source.or(
            "session.peer_gone_after",
            raw.peer_gone_after.as_ref(),
            Duration::from_secs(30),
            duration,
        )?,
        memory_bytes: source.or("session.memory", raw.memory.as_ref(), 64 << 20, memory)?,
        rekey_records: source.within(
            "session.rekey_records",
            raw.rekey_records.as_ref(),
            1 << 22,
            1 << 10..=1 << 22,
        )?,
        rekey_after: source.or(
            "session.rekey_after",
            raw.rekey_after.as_ref(),
            hours(1),
            duration,
        )?,
        reauth_after: source.or(
            "session.reauth_after",
            raw.reauth_after.as_ref(),
            hours(24),
            duration,
        )?,
        expiry_grace: source.or(
            "session.expiry_grace",
            raw.expiry_grace.as_ref(),
            Duration::from_secs(300),
            duration,
        )?,
    })
}

fn transport(source: &Source<'_>, raw: &raw::Transport) -> Result<Transport> {
    let lowat = |text: &str| {
        size(text).and_then(|n| u32::try_from(n).map_err(|_| format!("`{text}` is too much")))
    };
    Ok(Transport {
        user_timeout: source.or(
            "transport.user_timeout",
            raw.user_timeout.as_ref(),
            Duration::from_secs(20),
            duration,
        )?,
        notsent_lowat: source.or(
            "transport.notsent_lowat",
            raw.notsent_lowat.as_ref(),
            128 << 10,
            lowat,
        )?,
        dial_timeout: source.or(
            "transport.dial_timeout",
            raw.dial_timeout.as_ref(),
            Duration::from_secs(3),
            duration,
        )?,
    })
}

#[cfg(test)]
mod tests;
