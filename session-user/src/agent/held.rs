//! Applications that wait in connect() until their target has answered.
//!
//! Each goes through the same steps: the gate tells of its SYN; a stream is asked for; the target's answer comes; the SYN
//! is let through, and the connection that it makes is accepted; its socket goes to the stream. At any of them the
//! application may give up.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::{AbortHandle, Abortable, Aborted, BoxFuture};
use futures_util::stream::FuturesUnordered;
use tokio::sync::oneshot;

use super::routes::Routes;
use crate::capture::{Captured, Gate, GateEvent, Hop, Knock, Protocol};
use crate::names::Lease;
use crate::requests::{Answer, AppStream, Asker, Supply};

/// An answer, or that the session has ended without one.
type Heard = Option<Answer>;
/// An answer and what it is for; nothing if the application gave up meanwhile.
pub(super) type Answered = Option<(Hop, Heard)>;

/// Longer than any connect() takes: with as many retransmissions as Linux makes unless told otherwise, 127 s (tcp(7),
/// `tcp_syn_retries`).
const LONGEST_CONNECT: Duration = Duration::from_secs(150);

/// How far one is.
enum Step {
    /// The target has not answered. Where the gate has let the SYN through by mistake, as when it is taken away, the
    /// connection is there already.
    Asked {
        forget: AbortHandle,
        arrived: Option<AppStream>,
    },
    /// The SYN was let through; the connection's socket belongs here.
    Admitted(oneshot::Sender<AppStream>),
}

struct Held {
    knock: Box<Knock>,
    step: Step,
    /// Keeps the address that stands for a name.
    lease: Option<Lease>,
}

/// All applications that wait.
#[derive(Default)]
pub(super) struct HeldConnections {
    waiting: Waiting,
    answers: FuturesUnordered<Abortable<BoxFuture<'static, (Hop, Heard)>>>,
}

/// Those who wait, as others may look at them. Cheap to clone; all clones are one.
#[derive(Clone, Default)]
pub(super) struct Waiting(Arc<Mutex<HashMap<Hop, Held>>>);

impl Waiting {
    fn held(&self) -> MutexGuard<'_, HashMap<Hop, Held>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert(&self, hop: Hop, held: Held) {
        self.held().insert(hop, held);
    }

    fn remove(&self, hop: Hop) -> Option<Held> {
        self.held().remove(&hop)
    }

    /// Cookies of the network namespaces in which somebody waits. Those who were let through and have not come for so long
    /// do not wait any more: when a cgroup is no longer captured, nobody tells.
    pub fn namespaces(&self) -> BTreeSet<u64> {
        let mut held = self.held();
        held.retain(|hop, held| {
            matches!(held.step, Step::Asked { .. }) || hop.age() < LONGEST_CONNECT
        });
        held.keys().map(Hop::netns).collect()
    }
}

impl HeldConnections {
    /// Those who wait.
    pub fn waiting(&self) -> Waiting {
        self.waiting.clone()
    }

    /// Acts on what the gate tells.
    pub fn event(&mut self, event: GateEvent, routes: &Routes, gate: Option<&mut Gate>) {
        match event {
            GateEvent::Knock(knock) => {
                if let Some(gate) = gate {
                    self.knocked(knock, routes, gate);
                }
            }
            GateEvent::Gone(hop) => self.forget(hop),
            // They concern the capture.
            GateEvent::Newcomer(_) | GateEvent::Postponed => {}
        }
    }

    fn knocked(&mut self, knock: Box<Knock>, routes: &Routes, gate: &mut Gate) {
        let hop = knock.hop;
        let (route, lease) = match routes.find(knock.original, knock.peer, Protocol::Tcp) {
            Ok(found) => found,
            Err(errno) => return refuse(&knock, errno, gate),
        };
        if route.early() {
            return let_through(&knock, gate);
        }
        let (asker, answer) = Asker::new();
        let app = knock.app.into();
        let cgroup = knock.cgroup;
        let (forget, aborted) = AbortHandle::new_pair();
        let answer: BoxFuture<'static, _> = Box::pin(async move { (hop, answer.await.ok()) });
        self.answers.push(Abortable::new(answer, aborted));
        let step = Step::Asked {
            forget,
            arrived: None,
        };
        self.waiting.insert(hop, Held { knock, step, lease });
        routes.ask(route, app, cgroup, Supply::Waiting(asker));
    }

    /// The application gave up: the stream is not wanted.
    fn forget(&mut self, hop: Hop) {
        if let Some(Step::Asked { forget, .. }) = self.waiting.remove(hop).map(|held| held.step) {
            forget.abort();
        }
    }

    /// The next answer. Cancel-safe.
    pub async fn answered(&mut self) -> Answered {
        match self.answers.next().await {
            Some(Ok(answered)) => Some(answered),
            Some(Err(Aborted)) => None,
            None => std::future::pending().await,
        }
    }

    /// Tells the application what its target said.
    pub fn answer(&mut self, answered: Answered, gate: &mut Gate) {
        let Some((hop, heard)) = answered else { return };
        // Kept meanwhile: whoever looks on must not find that nobody waits.
        let mut held = self.waiting.held();
        let Entry::Occupied(mut waits) = held.entry(hop) else {
            return;
        };
        let Held { knock, step, .. } = waits.get_mut();
        let Step::Asked { arrived, .. } = step else {
            return;
        };
        match heard {
            Some(Answer::Connected(seat)) => match arrived.take() {
                // If nobody takes it, the session has ended, and the socket is reset with it.
                Some(socket) => drop(seat.send(socket)),
                None if admitted(knock, gate) => {
                    *step = Step::Admitted(seat);
                    return;
                }
                // Dropping the seat ends the stream.
                None => {}
            },
            Some(Answer::Refused(errno)) => refuse(knock, errno, gate),
            // Nobody knows what the target would say; the session, or the room in it, is over.
            None => refuse(knock, libc::EHOSTUNREACH, gate),
        }
        waits.remove();
    }

    /// A connection was made: it belongs to one that waits, or is given back.
    pub fn arrived(&mut self, captured: Captured) -> Option<Captured> {
        let mut held = self.waiting.held();
        let Entry::Occupied(mut waits) = held.entry(captured.hop) else {
            return Some(captured);
        };
        let lease = waits.get().lease.clone();
        let socket = captured.into_stream().keeping(lease);
        if let Step::Asked { arrived, .. } = &mut waits.get_mut().step {
            *arrived = Some(socket);
        } else if let Step::Admitted(seat) = waits.remove().step {
            // If nobody takes it, the session has ended, and the socket is reset with it.
            drop(seat.send(socket));
        }
        None
    }
}

/// Lets a connection through. False if the application waits no more.
fn admitted(knock: &Knock, gate: &mut Gate) -> bool {
    gate.admit(knock).unwrap_or_else(|error| {
        tracing::warn!(%error, app = %knock.app, "a held connection could not be let through; it waits for its retransmission");
        true
    })
}

/// Lets a connection through that need not wait for its target. Its socket comes as if it had never been held.
fn let_through(knock: &Knock, gate: &mut Gate) {
    admitted(knock, gate);
}

fn refuse(knock: &Knock, errno: i32, gate: &Gate) {
    tracing::debug!(target = %knock.original, app = %knock.app, errno, "a connection is refused");
    if let Err(error) = gate.refuse(knock, errno) {
        tracing::warn!(%error, app = %knock.app, "an application could not be told what its target said; it will time out");
    }
}
