//! What becomes of a connection, as the agent tells it.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::types::PeerReport;
use crate::capture::{Protocol, Verdict};

/// Addresses that can be asked about at once.
pub const TARGETS_MAX: usize = 64;

/// What is asked about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// A name and a port: if the name is captured, its reserved addresses are asked about; else `targets` are, and there
    /// need not be any.
    #[serde(default)]
    pub name: Option<(String, u16)>,
    /// Where the connections want to go; at most [`TARGETS_MAX`].
    pub targets: Vec<SocketAddr>,
    /// Over what.
    pub protocol: Protocol,
    /// The cgroup of the process that makes them; that of the command that asks, if it is not given.
    pub cgroup: Option<PathBuf>,
    /// The real user id of that process; that of the command that asks, if it is not given.
    pub uid: Option<u32>,
}

/// What becomes of some connections of one process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExplainReport {
    /// Over what.
    pub protocol: Protocol,
    /// The user.
    pub uid: u32,
    /// The cgroup, below the root of the hierarchy.
    pub cgroup: String,
    /// The captured cgroup that it is, or is in; `None` if it is not captured.
    pub attachment: Option<PathBuf>,
    /// The filter of the command that the cgroup belongs to, as it was typed after `holdfast run`.
    pub filter: Option<String>,
    /// What else is to be known, in words.
    pub note: Option<String>,
    /// What becomes of the name that was asked about; `None` where no rule is for names.
    #[serde(default)]
    pub name: Option<NameReport>,
    /// One for each address, in the order in which they were asked about.
    pub targets: Vec<TargetReport>,
}

/// What becomes of a name when a captured application asks for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameReport {
    /// In lower case, without the dot at its end.
    pub name: String,
    /// `Capture`: it is answered with reserved addresses; `Refuse`: it is said not to exist; `Direct`: its question goes
    /// to the resolver that it is for.
    pub verdict: Verdict,
    /// The rule that decides; `None` if none matches.
    pub rule: Option<RuleReport>,
    /// The addresses that stand for it.
    pub addresses: Vec<IpAddr>,
}

/// What becomes of one connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TargetReport {
    /// Where it wants to go; v4-mapped addresses are shown as IPv4.
    pub address: SocketAddr,
    /// The name that its address stands for.
    #[serde(default)]
    pub name: Option<String>,
    /// What becomes of it now.
    pub verdict: Verdict,
    /// Why, in words.
    pub reason: String,
    /// What becomes of it if the agent is killed.
    pub agent_dead: Verdict,
    /// The rule that decides; `None` if none matches or none is asked.
    pub rule: Option<RuleReport>,
    /// The rules before it, or all, in their order, and why each does not match.
    pub passed: Vec<PassedReport>,
    /// Whether the filter of its command, if there is one, keeps it captured.
    pub filter_keeps: Option<bool>,
    /// The peer that the rule names, and how it is.
    pub peer: Option<PeerReport>,
    /// How its stream uses the links; for TCP that a rule captures.
    pub stream: Option<ServiceReport>,
}

/// A `[[capture]]` rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleReport {
    /// Its number, from 1.
    pub number: usize,
    /// The configuration's file.
    pub file: PathBuf,
    /// Its line there, from 1.
    pub line: usize,
    /// What it says.
    pub says: String,
}

/// A `[[capture]]` rule that does not match.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassedReport {
    /// Its number, from 1.
    pub number: usize,
    /// Its line in the configuration's file, from 1.
    pub line: usize,
    /// Why not, in words.
    pub why: String,
}

/// How a stream uses the links.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceReport {
    /// Number of the `[[stream]]` rule that says so, from 1; `None` if none matches.
    pub number: Option<usize>,
    /// Its line in the configuration's file, from 1.
    pub line: Option<usize>,
    /// `single`, `redundant` or `bonded`.
    pub links: String,
    /// Whether it has a lane to itself.
    pub own_lane: bool,
    /// `auto`, `lz4`, `zstd` or `off`.
    #[serde(default)]
    pub compression: String,
}
