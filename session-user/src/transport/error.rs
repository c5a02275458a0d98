//! Why a transport could not be dialled, and whose fault it is.

use std::io;
use std::time::Duration;

use super::DialSpec;

/// A dial that failed.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The link's fault: it is gone, or leads nowhere.
    #[error("{path}: the link cannot be used: {error}")]
    Link {
        /// The path in words.
        path: String,
        /// The system's error.
        error: io::Error,
    },
    /// The peer's host answered, and said no.
    #[error(
        "{path}: refused: nothing listens there (is the peer's agent running, and its [accept] address right?)"
    )]
    Refused {
        /// The path in words.
        path: String,
    },
    /// Nobody answered.
    #[error("{path}: no answer within {after:?}")]
    Timeout {
        /// The path in words.
        path: String,
        /// The limit.
        after: Duration,
    },
    /// The operator's: a privilege is missing.
    #[error("{path}: not permitted to bind to the link: the agent needs CAP_NET_RAW or root")]
    NotPermitted {
        /// The path in words.
        path: String,
    },
    /// Anything else, as the system says it.
    #[error("{path}: {error}")]
    Io {
        /// The path in words.
        path: String,
        /// The system's error.
        error: io::Error,
    },
}

fn describe(spec: &DialSpec) -> String {
    match &spec.device {
        Some(device) => format!("{} over {device}", spec.remote),
        None => spec.remote.to_string(),
    }
}

impl TransportError {
    pub(crate) fn of(spec: &DialSpec, error: io::Error) -> Self {
        let path = describe(spec);
        match error.raw_os_error() {
            Some(libc::ECONNREFUSED | libc::ECONNRESET) => Self::Refused { path },
            Some(libc::EPERM) => Self::NotPermitted { path },
            Some(libc::ETIMEDOUT) => Self::Timeout {
                path,
                after: spec.timeout,
            },
            Some(
                libc::ENETUNREACH
                | libc::EHOSTUNREACH
                | libc::ENODEV
                | libc::EADDRNOTAVAIL
                | libc::ENETDOWN,
            ) => Self::Link { path, error },
            _ => Self::Io { path, error },
        }
    }

    /// Nobody answered within `spec.timeout`.
    pub(crate) fn timeout(spec: &DialSpec) -> Self {
        Self::Timeout {
            path: describe(spec),
            after: spec.timeout,
        }
    }

    /// Whether the peer's host actively said no.
    pub fn is_refused(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}
