//! When the agent looks at which network namespaces captured processes are in.
//!
//! What happens tells of most: an attachment, a new cgroup, the end of a process. A process that leaves a namespace, or
//! a cgroup, is told of by nobody; so while there are other namespaces the agent also looks once a minute. While there
//! are none, no timer runs.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use crate::capture::{Capture, Surveyed};

/// Between two surveys, at least: one may look at thousands of threads.
const PAUSE: Duration = Duration::from_secs(1);
/// Between two surveys that nothing has called for.
const IDLE: Duration = Duration::from_secs(60);

#[derive(Default)]
pub(super) struct Surveys {
    running: Option<JoinHandle<Surveyed>>,
    wanted: bool,
    last: Option<Instant>,
}

impl Surveys {
    /// Something has happened that a survey would show.
    pub fn want(&mut self) {
        self.wanted = true;
    }

    /// What the next survey finds, for [`Capture::settle`]. Cancel-safe.
    pub async fn next(&mut self, capture: &Capture) -> Surveyed {
        loop {
            if let Some(running) = &mut self.running {
                let found = running.await;
                self.running = None;
                match found {
                    Ok(found) => return found,
                    Err(error) => tracing::error!(%error, "a survey of captured processes failed"),
                }
            }
            match self.due(capture.other_namespaces()) {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
            let survey = capture.survey();
            self.wanted = false;
            self.last = Some(Instant::now());
            self.running = Some(tokio::task::spawn_blocking(|| survey.look()));
        }
    }

    fn due(&self, others: usize) -> Option<Instant> {
        let after = |pause| self.last.map_or_else(Instant::now, |last| last + pause);
        match (self.wanted, others) {
            (true, _) => Some(after(PAUSE)),
            (false, 0) => None,
            (false, _) => Some(after(IDLE)),
        }
    }
}
