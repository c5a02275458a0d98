//! The link monitor: what the kernel says of every interface of one network namespace, as a
//! snapshot that is always whole.
//!
//! An event is a hint. A loss is believed from the message itself and published at once, because
//! the stall that an application sees begins there; everything else is settled by reading the
//! kernel's tables again. Which links are *wanted* is not decided here but in [`crate::policy`].

mod kind;
mod message;
#[cfg(test)]
mod message_tests;
mod model;
mod monitor;
mod netlink;
mod table;
#[cfg(test)]
mod table_tests;
#[cfg(test)]
mod tests;

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use tokio::sync::watch;

pub use model::{
    Address, Change, ChangeKind, Link, LinkKind, LinkSnapshot, LinkState, Route, Scope,
    SourceAddress, Unusable,
};
use monitor::Watcher;

/// How the monitor behaves.
#[derive(Debug, Clone)]
pub struct MonitorConfig {
    /// For how long a link must be able to carry traffic before it counts as usable. 100 ms is
    /// longer than what an interface needs to flap through its states when it comes up, and short
    /// against the time that Wi-Fi takes to associate.
    pub debounce: Duration,
    /// Size of the socket's receive queue in bytes; the kernel doubles it. 4 MiB holds some
    /// thousands of notifications. When it overflows nothing is lost but time: all is read again.
    pub receive_buffer_bytes: usize,
}

impl Default for MonitorConfig {
    fn default() -> Self {
        MonitorConfig {
            debounce: Duration::from_millis(100),
            receive_buffer_bytes: 4 << 20,
        }
    }
}

/// Why links cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The socket could not be made.
    #[error(
        "cannot open a netlink routing socket: {0}; a sandbox (seccomp, RestrictAddressFamilies=) \
         may forbid AF_NETLINK: allow it for the agent"
    )]
    Open(Errno),
    /// The socket failed.
    #[error("reading link notifications from the kernel failed: {0}; restart the agent")]
    Read(Errno),
    /// No answer to the first dump.
    #[error("the kernel did not list its links within {0:?}; is the machine overloaded?")]
    Silent(Duration),
    /// No thread.
    #[error("cannot start the link monitor's thread: {0}; check the limit on tasks")]
    Thread(std::io::Error),
    /// The monitor has ended.
    #[error("the link monitor has ended; its last message in the log says why")]
    Ended,
}

/// Watches the links of one network namespace until it is dropped.
#[derive(Debug)]
pub struct LinkMonitor {
    published: watch::Receiver<Arc<LinkSnapshot>>,
    /// A byte wakes the thread for a reading; the end of the stream ends it.
    thread: UnixStream,
    overruns: Arc<AtomicU64>,
}

impl LinkMonitor {
    /// Starts to watch the namespace of the calling thread (it stays that one, wherever the
    /// thread goes later), and returns when the first snapshot is there: a few milliseconds. It
    /// needs no tokio runtime and no privilege.
    pub fn start(config: &MonitorConfig) -> Result<LinkMonitor, LinkError> {
        let (watcher, first) = Watcher::open(config)?;
        let (ours, theirs) = UnixStream::pair().map_err(LinkError::Thread)?;
        theirs.set_nonblocking(true).map_err(LinkError::Thread)?;
        ours.set_nonblocking(true).map_err(LinkError::Thread)?;
        let (sender, published) = watch::channel(Arc::new(first));
        let overruns = watcher.overruns();
        thread::Builder::new()
            .name("links".to_owned())
            .spawn(move || {
                if let Err(error) = watcher.run(&theirs, &sender) {
                    tracing::error!("{error}");
                }
            })
            .map_err(LinkError::Thread)?;
        Ok(LinkMonitor {
            published,
            thread: ours,
            overruns,
        })
    }

    /// The latest snapshot.
    pub fn snapshot(&self) -> Arc<LinkSnapshot> {
        self.published.borrow().clone()
    }

    /// Waits for a snapshot that this method has not returned yet (the first one counts as
    /// returned) and returns the latest. A slow reader misses snapshots, never a change: see
    /// [`LinkSnapshot::changes_since`]. Cancel-safe.
    pub async fn changed(&mut self) -> Result<Arc<LinkSnapshot>, LinkError> {
        let changed = self.published.changed().await;
        changed.map_err(|_| LinkError::Ended)?;
        Ok(self.published.borrow_and_update().clone())
    }

    /// A further reader of the snapshots.
    pub fn subscribe(&self) -> watch::Receiver<Arc<LinkSnapshot>> {
        self.published.clone()
    }

    /// How often the kernel dropped notifications because the receive queue was full. Each time
    /// everything was read again, so nothing is wrong; often means that the queue is too small.
    pub fn overruns(&self) -> u64 {
        self.overruns.load(Ordering::Relaxed)
    }

    /// Reads the kernel's tables again, as after a suspend. What differs is published.
    pub fn refresh(&self) {
        // A full pipe means that the thread is about to do it anyway.
        let _ = (&self.thread).write(&[0]);
    }
}
