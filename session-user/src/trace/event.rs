//! One handover, as commands, the log and the files tell it.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// What led to a handover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trigger {
    /// The kernel says that the link is gone.
    LinkLost,
    /// The link stands, without the address that the transport is bound to.
    AddressLost,
    /// What was sent was not answered in time.
    Silent,
    /// The connection broke, or the peer closed it.
    TransportFailed,
    /// The peer sends elsewhere, or gave the transport up.
    PeerMoved,
    /// A link that is preferred works again.
    PreferredLink,
    /// The operator chose the link.
    ByHand,
    /// The transport did not outlive a sleep of the host.
    Woke,
}

impl std::fmt::Display for Trigger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::LinkLost => "link-lost",
            Self::AddressLost => "address-lost",
            Self::Silent => "silent",
            Self::TransportFailed => "transport-failed",
            Self::PeerMoved => "peer-moved",
            Self::PreferredLink => "preferred-link",
            Self::ByHand => "by-hand",
            Self::Woke => "woke",
        })
    }
}

/// Where a transport runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathInfo {
    /// Our link; empty if none holds our address.
    pub link: String,
    /// Our address.
    pub local: SocketAddr,
    /// The peer's address.
    pub remote: SocketAddr,
}

/// A path that the policy had to choose from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathChoice {
    /// The link.
    pub link: String,
    /// The peer's address.
    pub remote: SocketAddr,
    /// Why it stands where it stands, in words.
    pub reason: String,
    /// Whether it was put last because it failed of late.
    pub demoted: bool,
    /// What the link is for while another carries: `warm`, `cold` or `never`.
    pub standby: String,
}

/// A handover. Times of what did not happen within two seconds after the session went on are `None`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Handover {
    /// The session, in hexadecimal; the same at both ends.
    pub session: String,
    /// The peer.
    pub peer: String,
    /// Counts the handovers of the session, from 1.
    pub number: u64,
    /// When it was noticed that it is needed, in seconds since 1970.
    pub when_s: f64,
    /// Whether the old path still worked.
    pub soft: bool,
    /// The path that was left.
    pub from: PathInfo,
    /// The path that carries now; none if the session ended first.
    pub to: Option<PathInfo>,
    /// What led to it.
    pub trigger: Trigger,
    /// The same in words.
    pub why: String,
    /// What was decided, in words.
    pub decision: Option<String>,
    /// What the policy had to choose from, best first; empty where the peer chooses.
    pub choices: Vec<PathChoice>,
    /// From the netlink message's being read to the decision; for silence, how long the oldest
    /// unanswered record had been under way. Milliseconds, as all that follow.
    pub detection_ms: Option<f64>,
    /// From notice to the peer's being heard on the new path.
    pub resumed_ms: Option<f64>,
    /// From notice until the new path's socket had taken a first record.
    pub first_sent_ms: Option<f64>,
    /// From notice until the peer had acknowledged that record.
    pub first_acknowledged_ms: Option<f64>,
    /// From notice until bytes of a stream came on the new path.
    pub first_received_ms: Option<f64>,
    /// Records sent again.
    pub resent_records: u64,
    /// Their sealed bytes.
    pub resent_bytes: u64,
    /// The longest gap in bytes handed to an application's socket of this unit, of streams that got
    /// some in the second before.
    pub stall_ms: Option<f64>,
    /// Whether the new transport stood already.
    pub warm: Option<bool>,
    /// Connections that were dialled for it.
    pub attempts: u64,
    /// CLOCK_MONOTONIC of the event that told of it, in nanoseconds.
    pub noticed_ns: u64,
    /// CLOCK_MONOTONIC when unacknowledged records were given to the new transport.
    pub resent_ns: Option<u64>,
    /// CLOCK_MONOTONIC when the peer was first heard on it.
    pub resumed_ns: Option<u64>,
}

impl Handover {
    /// Writes it to the log.
    pub(super) fn log(&self) {
        let to = self.to.as_ref();
        let choices = self.choices.iter().map(|c| c.link.as_str());
        tracing::info!(
            session = &self.session[..8.min(self.session.len())],
            peer = %self.peer,
            number = self.number,
            from = %self.from.link,
            to = to.map(|p| p.link.as_str()),
            kind = if self.soft { "soft" } else { "hard" },
            trigger = %self.trigger,
            why = %self.why,
            decision = self.decision.as_deref(),
            choices = choices.collect::<Vec<_>>().join(" "),
            warm = self.warm,
            attempts = self.attempts,
            detection_ms = self.detection_ms,
            resumed_ms = self.resumed_ms,
            first_sent_ms = self.first_sent_ms,
            first_acknowledged_ms = self.first_acknowledged_ms,
            first_received_ms = self.first_received_ms,
            stall_ms = self.stall_ms,
            resent_records = self.resent_records,
            resent_bytes = self.resent_bytes,
            "handover"
        );
    }
}
