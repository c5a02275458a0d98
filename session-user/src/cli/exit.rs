//! Exit codes and the last words of a command that failed.

use std::io::Write;
use std::process::ExitCode;

use crate::config::ConfigError;
use crate::control::{ClientError, ErrorCode};

/// Exit codes; they never change their meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// It was tried and did not work.
    Failed = 1,
    /// The agent is not running.
    NotRunning = 3,
    /// The caller may not.
    NotPermitted = 4,
    /// The configuration is wrong.
    Config = 5,
    /// A check of `doctor` failed.
    Check = 6,
}

/// An error with its exit code and what to do next.
#[derive(Debug)]
pub struct Failure {
    exit: Exit,
    message: String,
    advice: String,
}

impl Failure {
    /// A failure with advice, which may be empty.
    pub fn new(exit: Exit, message: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
            advice: advice.into(),
        }
    }

    /// Writes the message to standard error and gives the exit code.
    pub fn report(&self) -> ExitCode {
        let mut err = std::io::stderr().lock();
        // Whoever closed standard error does not want to know.
        let _ = writeln!(err, "holdfast: {}", self.message);
        if !self.advice.is_empty() {
            let _ = writeln!(err, "  {}", self.advice);
        }
        ExitCode::from(self.exit as u8)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        if let Some(io) = error.downcast_ref::<std::io::Error>()
            && io.kind() == std::io::ErrorKind::PermissionDenied
        {
            return Self::new(
                Exit::NotPermitted,
                format!("{error:#}"),
                "become root, or give the agent's user the capabilities that `holdfast doctor` names",
            );
        }
        Self::new(Exit::Failed, format!("{error:#}"), "")
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::new(
            Exit::Config,
            error.to_string(),
            "`holdfast config example` shows every key",
        )
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::NotRunning { error: ref io, .. }
                if io.kind() == std::io::ErrorKind::PermissionDenied =>
            {
                Self::new(
                    Exit::NotPermitted,
                    error.to_string(),
                    "become root, or have `control_group` set in [agent]",
                )
            }
            ClientError::NotRunning { .. } => Self::new(
                Exit::NotRunning,
                error.to_string(),
                "is the agent running? Start it with `holdfast agent`, or name its socket with --control",
            ),
            ClientError::Broken(_) => Self::new(
                Exit::Failed,
                error.to_string(),
                "the agent's log may say why",
            ),
            ClientError::Refused(refused) => {
                let exit = if refused.code == ErrorCode::NotPermitted {
                    Exit::NotPermitted
                } else {
                    Exit::Failed
                };
                Self::new(exit, refused.message, refused.advice)
            }
        }
    }
}
