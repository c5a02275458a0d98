//! Network namespaces that are being opened, each by a thread that enters it.
//!
//! Whoever made a namespace decides what is in it, and so how long that takes. Nobody waits for it but those whose
//! connections are there.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

use super::namespace::NamespaceSockets;
use super::netns::{NamespaceError, Netns};

/// Threads that are in other namespaces at once.
const THREADS_MAX: usize = 8;
/// The longest that one may take, until its turn comes included.
const LONGEST: Duration = Duration::from_secs(5);
/// Sockets' namespaces that one opening may be asked to be: a thread can have sockets of many.
const COOKIES_MAX: usize = 64;

/// What came of an opening.
#[derive(Debug)]
pub struct Opened {
    /// The namespace's number.
    pub(super) inode: u64,
    pub(super) sockets: Result<NamespaceSockets, NamespaceError>,
}

/// What whoever asked to enter a namespace is told.
pub type Entered = Result<(), Arc<NamespaceError>>;

/// Why a namespace is opened, and who is to know.
#[derive(Debug)]
pub struct Wanted {
    /// A thread that was found there.
    pub tid: u32,
    /// Cookies of sockets that a thread there has called connect() on.
    cookies: BTreeSet<u64>,
    /// Those who wait until it is open.
    pub waiters: Vec<oneshot::Sender<Entered>>,
}

impl Wanted {
    /// For a thread that was found there.
    pub fn by(tid: u32) -> Self {
        Self {
            tid,
            cookies: BTreeSet::new(),
            waiters: Vec::new(),
        }
    }

    /// Notes that it may be the namespace with this cookie; false if it may be too many already.
    pub fn note(&mut self, cookie: u64) -> bool {
        self.cookies.len() < COOKIES_MAX && {
            self.cookies.insert(cookie);
            true
        }
    }

    /// Whether it may be the namespace with this cookie.
    pub fn may_be(&self, cookie: u64) -> bool {
        self.cookies.contains(&cookie)
    }

    /// All that it may be.
    pub fn cookies(&self) -> impl Iterator<Item = u64> + '_ {
        self.cookies.iter().copied()
    }
}

/// All that run.
pub struct Openings {
    running: Mutex<FuturesUnordered<BoxFuture<'static, Opened>>>,
    turns: Arc<Semaphore>,
}

impl Default for Openings {
    fn default() -> Self {
        Self {
            running: Mutex::default(),
            turns: Arc::new(Semaphore::new(THREADS_MAX)),
        }
    }
}

impl Openings {
    fn running(&self) -> MutexGuard<'_, FuturesUnordered<BoxFuture<'static, Opened>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `job` in a namespace when its turn has come. It begins when [`Openings::poll_next`] is called again.
    pub fn begin(
        &self,
        netns: Netns,
        job: impl FnOnce() -> Result<NamespaceSockets, NamespaceError> + Send + 'static,
    ) {
        let (inode, turns) = (netns.inode(), Arc::clone(&self.turns));
        let run = async move {
            // Never closed. The thread gives it back, however long it takes.
            let turn = turns.acquire_owned().await.ok();
            let job = move || {
                let _turn = turn;
                job()
            };
            netns.run(job).await
        };
        let opened = async move {
            let sockets = timeout(LONGEST, run).await;
            Opened {
                inode,
                sockets: sockets.unwrap_or(Err(NamespaceError::Slow { limit: LONGEST })),
            }
        };
        self.running().push(Box::pin(opened));
    }

    /// The next that has come to an end.
    pub fn poll_next(&self, cx: &mut Context<'_>) -> Poll<Opened> {
        match ready!(self.running().poll_next_unpin(cx)) {
            Some(opened) => Poll::Ready(opened),
            None => Poll::Pending,
        }
    }
}
