//! Captured sockets that wait for a session to their peer.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

use crate::capture::Captured;

/// Most sockets that wait for one peer. Beyond it the oldest waiters keep their place and new ones
/// are reset: an application that connects in a loop must not use up the agent's descriptors.
const WAITING_MAX: usize = 4096;

/// A bounded queue between the capture and the driver of whatever session stands.
#[derive(Debug, Default)]
pub struct CaptureQueue {
    waiting: Mutex<VecDeque<Captured>>,
    arrived: Notify,
}

impl CaptureQueue {
    /// Adds a socket; gives it back if too many wait.
    pub fn push(&self, captured: Captured) -> Result<(), Captured> {
        let mut waiting = self.lock();
        if waiting.len() >= WAITING_MAX {
            return Err(captured);
        }
        waiting.push_back(captured);
        drop(waiting);
        self.arrived.notify_one();
        Ok(())
    }

    /// Puts back what [`Self::pop`] gave and could not be used.
    pub fn push_front(&self, captured: Captured) {
        self.lock().push_front(captured);
    }

    /// The socket that has waited longest.
    pub fn pop(&self) -> Option<Captured> {
        self.lock().pop_front()
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns when a socket waits. Cancel-safe.
    pub async fn available(&self) {
        loop {
            let arrived = self.arrived.notified();
            if !self.is_empty() {
                return;
            }
            arrived.await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Captured>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
