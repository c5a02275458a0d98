//! The task that lets captured connections in: one that begins is held, a stream is asked for, and its socket goes there.
//!
//! It runs on the thread of the first session, which is the only one in most units: a connection is handed to and fro three
//! times between the two, and between two threads each of them costs a switch. What may take longer, such as attaching to a
//! cgroup, is the capture's task's: only where an application comes from a network namespace that nobody listens in yet is
//! that one waited for.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::sync::{Notify, mpsc, oneshot};

use super::held::{Answered, HeldConnections};
use super::routes::Routes;
use crate::capture::{Captured, Entrance, Gate, GateEvent, Newcomer};

/// Wait after `accept()` failed for want of descriptors or memory.
pub(super) const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// So much is done before the session of this thread has its turn.
const AT_ONCE: u32 = 16;

/// An application in a network namespace where nobody listens yet, and who waits until somebody does.
pub(super) type Stranger = (Newcomer, oneshot::Sender<()>);

/// What the task needs.
pub(super) struct Porter {
    pub gate: Option<Gate>,
    pub entrance: Arc<Entrance>,
    pub held: HeldConnections,
    pub routes: Routes,
    /// To the capture's task.
    pub strangers: mpsc::Sender<Stranger>,
    /// The capture's task has opened network namespaces, or closed some.
    pub changed: Arc<Notify>,
}

/// Who tells the task of something.
#[derive(Clone, Copy)]
enum Source {
    Gate,
    /// Targets.
    Answers,
    Entrance,
}

impl Porter {
    /// Runs until the capture has ended.
    pub async fn run(mut self) {
        let mut done = 0_u32;
        loop {
            let mut again = tokio::select! {
                () = self.strangers.closed() => return,
                // The gate and the entrance are asked anew.
                () = self.changed.notified() => continue,
                event = next(self.gate.as_mut()) => self.told(event).await,
                answered = self.held.answered(), if self.gate.is_some() => {
                    self.answered(answered);
                    Some(Source::Answers)
                }
                accepted = self.entrance.accept() => self.accepted(accepted).await,
            };
            // Connections come, and are answered, several at once: to ask the same one again takes less than to ask all.
            while let Some(source) = again {
                done += 1;
                if done.is_multiple_of(AT_ONCE) {
                    done = 0;
                    tokio::task::yield_now().await;
                    break;
                }
                again = self.again(source).await;
            }
        }
    }

    /// The same once more, if there is more of it already.
    async fn again(&mut self, source: Source) -> Option<Source> {
        match source {
            Source::Gate => {
                let event = next(self.gate.as_mut()).now_or_never()?;
                self.told(event).await
            }
            Source::Answers => {
                let answered = self.held.answered().now_or_never()?;
                self.answered(answered);
                Some(source)
            }
            Source::Entrance => {
                let accepted = self.entrance.accept().now_or_never()?;
                self.accepted(accepted).await
            }
        }
    }

    /// Acts on what the gate tells. `None`: it is not asked again at once.
    async fn told(&mut self, event: io::Result<GateEvent>) -> Option<Source> {
        match event {
            // Here and now: the SYN that waits for it comes next.
            Ok(GateEvent::Newcomer(newcomer)) => self.announce(newcomer).await?,
            Ok(event) => self.held.event(event, &self.routes, self.gate.as_mut()),
            Err(error) => {
                tracing::error!(%error, "held connections cannot be heard of");
                tokio::time::sleep(ACCEPT_RETRY).await;
                return None;
            }
        }
        Some(Source::Gate)
    }

    fn answered(&mut self, answered: Answered) {
        if let Some(gate) = &mut self.gate {
            self.held.answer(answered, gate);
        }
    }

    async fn accepted(&mut self, accepted: io::Result<Captured>) -> Option<Source> {
        match accepted {
            Ok(captured) => {
                if let Some(captured) = self.held.arrived(captured) {
                    self.routes.dispatch(captured);
                }
            }
            Err(error) => {
                tracing::error!(%error, "a captured connection could not be accepted");
                tokio::time::sleep(ACCEPT_RETRY).await;
                return None;
            }
        }
        Some(Source::Entrance)
    }

    /// Has the capture's task listen where the newcomer is. `None`: that one has ended.
    async fn announce(&mut self, newcomer: Newcomer) -> Option<()> {
        let (done, welcomed) = oneshot::channel();
        self.strangers.send((newcomer, done)).await.ok()?;
        welcomed.await.ok()
    }
}

/// What the gate tells; nothing for ever where there is none.
async fn next(gate: Option<&mut Gate>) -> io::Result<GateEvent> {
    match gate {
        Some(gate) => gate.next().await,
        None => std::future::pending().await,
    }
}
