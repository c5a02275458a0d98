//! The socket conformance suite: what an application sees of its sockets must not depend on whether
//! Holdfast carries them.
//!
//! A *case* is a small function that uses sockets and notes what it sees: results and errno of calls,
//! bytes, events, names. A runner starts each case twice in the two-link lab, once as it is and once
//! captured, and compares the notes. The other end is the peer program behind the gateway, which does what
//! a script says; the script goes over a connection of its own that is never captured. Each case is a
//! process of its own with a limit of time, so that one that hangs is a difference and nothing more.

pub mod cases;
mod client;
mod docs;
mod limits;
mod peer;
mod peer_steps;
mod peer_udp;
mod report;
mod runner;
mod seen;
mod stream;
mod sys;
mod wire;
mod world;

use serde::{Deserialize, Serialize};

pub use client::{ClientArgs, Outcome, client};
pub use docs::write as write_docs;
pub use limits::{LIMITS, Limit};
pub use peer::serve as peer;
pub use report::{Row, print_json, print_table};
pub use runner::{Results, Second, run};
pub use seen::Seen;

use client::Peer;

/// How an application reaches the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// An AF_INET socket.
    V4,
    /// An AF_INET6 socket and an IPv6 address.
    V6,
    /// An AF_INET6 socket and `::ffff:a.b.c.d`.
    Mapped,
}

impl Family {
    /// All three.
    pub const ALL: [Self; 3] = [Self::V4, Self::V6, Self::Mapped];

    /// Its name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
            Self::Mapped => "mapped",
        }
    }

    /// Finds one by its name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.name() == name)
    }
}

/// A case as a function: it uses sockets and notes what it sees. An error ends the case and is noted.
pub type Act = fn(&Peer, &mut Seen) -> anyhow::Result<()>;

/// One case.
#[derive(Clone, Copy)]
pub struct Case {
    /// Its name, unique.
    pub name: &'static str,
    /// What an application does in it, for documents.
    pub what: &'static str,
    /// The families for which it makes sense.
    pub families: &'static [Family],
    /// Whether it is long or loads the machine: it then runs alone and has more time.
    pub heavy: bool,
    /// What it does.
    pub act: Act,
}

const EVERY: &[Family] = &Family::ALL;
const PURE: &[Family] = &[Family::V4, Family::V6];

impl Case {
    /// A case for all families.
    const fn new(name: &'static str, what: &'static str, act: Act) -> Self {
        Self {
            name,
            what,
            families: EVERY,
            heavy: false,
            act,
        }
    }

    /// For these families only.
    const fn only(mut self, families: &'static [Family]) -> Self {
        self.families = families;
        self
    }

    /// Whether it is about UDP, and something of it is to be captured: all but a socket that sends nothing, and a
    /// server that answers.
    pub fn has_captured_datagrams(&self) -> bool {
        self.name.starts_with("udp_") && !matches!(self.name, "udp_not_connected" | "udp_server")
    }

    /// Alone, and with more time.
    const fn heavy(mut self) -> Self {
        self.heavy = true;
        self
    }
}
