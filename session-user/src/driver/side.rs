//! What the two sides wait for.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use super::news::Waiting;
use super::{Driver, Listening, Side};
use crate::link::LinkSnapshot;

impl Side {
    /// Ends when the links have changed since they were last looked at.
    pub(super) fn links_change(&self) -> Waiting {
        let mut links = match self {
            Self::Initiator(initiator) => initiator.config.links.clone(),
            Self::Responder(responder) => responder.links.clone(),
        };
        Box::pin(async move {
            if links.changed().await.is_err() {
                // The monitor has ended with the agent; the commands' end follows.
                std::future::pending::<()>().await;
            }
        })
    }

    /// Ends when an application wants something that there is room for.
    pub(super) fn requests_come(&self) -> Option<Waiting> {
        let Self::Initiator(initiator) = self else {
            return None;
        };
        let (requests, open) = (
            Arc::clone(&initiator.config.requests),
            !initiator.streams_full,
        );
        Some(Box::pin(async move {
            tokio::select! {
                () = requests.available(), if open => {}
                () = requests.flows.available() => {}
            }
        }))
    }

    /// The latest snapshot of the links.
    pub(super) fn links(&self) -> Arc<LinkSnapshot> {
        match self {
            Self::Initiator(initiator) => Arc::clone(&initiator.config.links.borrow()),
            Self::Responder(responder) => Arc::clone(&responder.links.borrow()),
        }
    }

    /// The latest snapshot, if it has not been asked for before, and the version of the one before.
    pub(super) fn new_links(&mut self) -> Option<(Arc<LinkSnapshot>, u64)> {
        let (links, seen) = match self {
            Self::Initiator(i) => (&mut i.config.links, &mut i.seen_version),
            Self::Responder(r) => (&mut r.links, &mut r.seen_version),
        };
        let snapshot = Arc::clone(&links.borrow_and_update());
        let since = std::mem::replace(seen, snapshot.version);
        (snapshot.version != since).then_some((snapshot, since))
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        match self {
            Self::Initiator(initiator) => [initiator.retry_at, initiator.look_at]
                .into_iter()
                .flatten()
                .min(),
            Self::Responder(_) => None,
        }
    }

    /// Time for one TCP connection to the peer.
    pub(super) fn dial_timeout(&self) -> std::time::Duration {
        match self {
            Self::Initiator(initiator) => initiator.config.dial_timeout,
            Self::Responder(responder) => responder.dial_timeout,
        }
    }

    /// Segments that the path had under way when it was last left.
    pub(super) fn known_window(&self, link: &str, remote: IpAddr) -> Option<u32> {
        match self {
            Self::Initiator(initiator) => {
                initiator.windows.get(&(link.to_owned(), remote)).copied()
            }
            Self::Responder(_) => None,
        }
    }

    /// Largest segment on a path that is known to lose larger packets.
    pub(super) fn segment(&self, link: &str, remote: SocketAddr) -> Option<u16> {
        match self {
            Self::Initiator(initiator) => initiator.history.segment(link, remote, Instant::now()),
            Self::Responder(_) => None,
        }
    }

    /// Whether a dial over the path may put its first bytes in the SYN.
    pub(super) fn fast_open(&self, link: &str, remote: SocketAddr) -> bool {
        match self {
            Self::Initiator(initiator) => {
                (initiator.history).may_fast_open(link, remote, Instant::now())
            }
            Self::Responder(_) => false,
        }
    }

    /// What an acceptor's session needs for UDP; it is taken once.
    pub(super) fn take_listening(&mut self) -> Option<Listening> {
        match self {
            Self::Initiator(_) => None,
            Self::Responder(responder) => responder.listening.take(),
        }
    }

    pub(super) fn abort_tasks(&mut self) {
        if let Self::Initiator(initiator) = self {
            initiator.abandon_attempts();
            if let Some(task) = initiator.rejoining.take() {
                task.abort();
            }
        }
    }
}

impl Driver {
    /// There is room for more streams.
    pub(super) fn streams_available(&mut self) {
        if let Side::Initiator(initiator) = &mut self.side {
            initiator.streams_full = false;
            self.news.ask_for_requests_anew();
        }
    }

    pub(super) fn take_requests(&mut self) {
        loop {
            let Side::Initiator(initiator) = &self.side else {
                return;
            };
            let queue = Arc::clone(&initiator.config.requests);
            let Some(request) = queue.pop() else { return };
            if let Err(request) = self.open_requested(request) {
                queue.push_front(*request);
                if let Side::Initiator(initiator) = &mut self.side {
                    initiator.streams_full = true;
                }
                return;
            }
        }
    }

    pub(super) fn side_deadline(&mut self, now: Instant) {
        let Side::Initiator(initiator) = &mut self.side else {
            return;
        };
        let passed = |at: &mut Instant| now >= *at;
        let retry = initiator.retry_at.take_if(passed).is_some();
        let look = initiator.look_at.take_if(passed).is_some();
        if retry || look {
            self.decide();
        }
    }
}
