//! The commands' end.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::LINE_BYTES_MAX;
use super::types::{ControlError, Request, Response};

/// Time for the agent to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Why the agent could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no agent answers at {}: {error}", path.display())]
    NotRunning {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        error: io::Error,
    },
    /// The conversation broke.
    #[error("the agent's answer did not arrive: {0}")]
    Broken(String),
    /// The agent said no.
    #[error("{0}")]
    Refused(#[from] ControlError),
}

/// A connection to the agent.
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the agent's socket.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let not_running = |error| ClientError::NotRunning {
            path: path.to_owned(),
            error,
        };
        let stream = UnixStream::connect(path).map_err(not_running)?;
        stream
            .set_read_timeout(Some(ANSWER_TIMEOUT))
            .map_err(not_running)?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// Asks, and waits for the answer.
    pub fn call(&mut self, request: &Request) -> Result<Response, ClientError> {
        let broken = |e: &dyn std::fmt::Display| ClientError::Broken(e.to_string());
        let mut line = serde_json::to_vec(request).map_err(|e| broken(&e))?;
        line.push(b'\n');
        self.stream
            .get_mut()
            .write_all(&line)
            .map_err(|e| broken(&e))?;
        let mut answer = Vec::new();
        (&mut self.stream)
            .take(LINE_BYTES_MAX as u64)
            .read_until(b'\n', &mut answer)
            .map_err(|e| broken(&e))?;
        match serde_json::from_slice(&answer).map_err(|e| broken(&e))? {
            Response::Error(error) => Err(error.into()),
            response => Ok(response),
        }
    }
}
