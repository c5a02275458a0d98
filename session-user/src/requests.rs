//! Streams that applications ask for, on their way to the driver of the session with their peer; and their datagrams.
//!
//! An application is either connected already, and its bytes go out with the stream's OPEN; or it waits in `connect()`,
//! or for a proxy's reply, until the target has answered. Then it is told ([`Answer`]), and its socket comes afterwards.

mod flow;
mod marked;
mod stream;

use std::collections::VecDeque;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use session_proto::wire::Target;
use tokio::sync::{Notify, oneshot};

#[cfg(test)]
pub use flow::Nobody;
pub use flow::{AppFlow, FlowEnd, FlowInput, FlowQueue};
pub use marked::Taken;
pub(crate) use marked::register;
pub use stream::{AppStream, PastTcp};

/// Most requests that wait for one peer. Beyond it the oldest waiters keep their place and new ones
/// are refused: an application that connects in a loop must not use up the agent's descriptors.
const WAITING_MAX: usize = 4096;

/// A stream that an application asks for.
#[derive(Debug)]
pub struct StreamRequest {
    /// Where it goes.
    pub target: Target,
    /// The application's end, for logs.
    pub app: AppEnd,
    /// Id of the application's cgroup, where it is known.
    pub cgroup: Option<u64>,
    /// The application's socket, or who waits for the answer.
    pub supply: Supply,
}

/// An application's end, for logs. It is put in words only where somebody reads it: most connections are logged by nobody.
#[derive(Clone, Debug)]
pub enum AppEnd {
    /// Its address.
    Addr(SocketAddr),
    /// What else it is known by.
    Named(String),
}

impl From<SocketAddr> for AppEnd {
    fn from(addr: SocketAddr) -> Self {
        Self::Addr(addr)
    }
}

impl From<String> for AppEnd {
    fn from(name: String) -> Self {
        Self::Named(name)
    }
}

impl fmt::Display for AppEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addr(addr) => addr.fmt(f),
            Self::Named(name) => name.fmt(f),
        }
    }
}

/// Where the stream's socket comes from.
#[derive(Debug)]
pub enum Supply {
    /// It is there.
    Connected(AppStream),
    /// It comes when the target is connected.
    Waiting(Asker),
}

/// Somebody who waits for the target's answer. Dropping it without one means that the session has ended.
#[derive(Debug)]
pub struct Asker(oneshot::Sender<Answer>);

/// What the target said.
#[derive(Debug)]
pub enum Answer {
    /// It is connected: the application's socket is to be given here. Dropping it instead ends the stream.
    Connected(oneshot::Sender<AppStream>),
    /// It is not, and this errno says why.
    Refused(i32),
}

impl Asker {
    /// Somebody who waits, and what is waited for. Dropping the latter tells that nobody waits any more.
    pub fn new() -> (Self, oneshot::Receiver<Answer>) {
        let (tell, heard) = oneshot::channel();
        (Self(tell), heard)
    }

    /// Whether nobody waits any more.
    pub fn has_gone(&self) -> bool {
        self.0.is_closed()
    }

    /// Returns when nobody waits any more. Cancel-safe.
    pub async fn gone(&mut self) {
        self.0.closed().await;
    }

    /// The target is connected: tells so, and returns the application's socket. `None` if there is none, since the
    /// application has given up.
    pub async fn connected(self) -> Option<AppStream> {
        let (seat, taken) = oneshot::channel();
        self.0.send(Answer::Connected(seat)).ok()?;
        taken.await.ok()
    }

    /// The target is not connected.
    pub fn refused(self, errno: i32) {
        // Whoever asked may have gone.
        let _ = self.0.send(Answer::Refused(errno));
    }
}

impl StreamRequest {
    /// Whether the application has given up.
    pub fn is_abandoned(&self) -> bool {
        matches!(&self.supply, Supply::Waiting(asker) if asker.has_gone())
    }
}

/// A bounded queue between those who take applications' connections and the driver of whatever session stands.
#[derive(Debug, Default)]
pub struct RequestQueue {
    /// Datagrams beside them.
    pub flows: Arc<FlowQueue>,
    waiting: Mutex<VecDeque<StreamRequest>>,
    arrived: Notify,
}

impl RequestQueue {
    /// Adds a request; gives it back if too many wait.
    pub fn push(&self, request: StreamRequest) -> Result<(), Box<StreamRequest>> {
        let mut waiting = self.lock();
        if waiting.len() >= WAITING_MAX {
            // Only looked for when it matters.
            waiting.retain(|r| !r.is_abandoned());
        }
        if waiting.len() >= WAITING_MAX {
            return Err(Box::new(request));
        }
        waiting.push_back(request);
        drop(waiting);
        self.arrived.notify_one();
        Ok(())
    }

    /// Puts back what [`Self::pop`] gave and could not be used.
    pub fn push_front(&self, request: StreamRequest) {
        self.lock().push_front(request);
    }

    /// The request that has waited longest, of those that are still wanted.
    pub fn pop(&self) -> Option<StreamRequest> {
        let mut waiting = self.lock();
        while let Some(request) = waiting.pop_front() {
            if !request.is_abandoned() {
                return Some(request);
            }
        }
        None
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.lock().iter().filter(|r| !r.is_abandoned()).count()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Returns when a request waits. Cancel-safe.
    pub async fn available(&self) {
        loop {
            let arrived = self.arrived.notified();
            if !self.is_empty() {
                return;
            }
            arrived.await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<StreamRequest>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> (StreamRequest, oneshot::Receiver<Answer>) {
        let (asker, answer) = Asker::new();
        let request = StreamRequest {
            target: Target::Name("printer.example".to_owned(), 631),
            app: "an application".to_owned().into(),
            cgroup: None,
            supply: Supply::Waiting(asker),
        };
        (request, answer)
    }

    #[test]
    fn those_who_gave_up_are_passed_over_and_make_room() {
        let queue = RequestQueue::default();
        let mut answers = Vec::new();
        for _ in 0..WAITING_MAX {
            let (request, answer) = request();
            queue.push(request).unwrap();
            answers.push(answer);
        }
        let (one_more, _answer) = request();
        let one_more = queue.push(one_more).unwrap_err();
        answers.remove(0);
        queue.push(*one_more).unwrap();
        assert_eq!(queue.len(), WAITING_MAX);
        answers.clear();
        assert_eq!(queue.len(), 1);
        assert!(queue.pop().is_some());
        assert!(queue.pop().is_none());
    }

    #[tokio::test]
    async fn a_socket_comes_after_the_answer_or_not_at_all() {
        let (request, answer) = request();
        let Supply::Waiting(asker) = request.supply else {
            panic!("it waits")
        };
        let connected = tokio::spawn(asker.connected());
        let Ok(Answer::Connected(seat)) = answer.await else {
            panic!("it is connected")
        };
        drop(seat);
        assert!(connected.await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_session_that_ends_is_no_answer() {
        let (request, answer) = request();
        drop(request);
        assert!(answer.await.is_err());
    }
}
