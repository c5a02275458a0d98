//! Network namespaces: naming them, and doing something in one.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use thiserror::Error;
use tokio::sync::oneshot;

use super::CaptureError;

/// Why connections in a network namespace are not captured.
#[derive(Debug, Error)]
pub enum NamespaceError {
    /// The thread is not there any more.
    #[error("thread {tid} has ended")]
    Ended {
        /// The thread.
        tid: u32,
    },
    /// The agent may not see which namespace a thread is in.
    #[error(
        "the agent may not look at the network namespace of thread {tid} ({source}): grant it CAP_SYS_PTRACE and CAP_SYS_ADMIN, or run it as root"
    )]
    Hidden {
        /// The thread.
        tid: u32,
        /// The system's error.
        source: io::Error,
    },
    /// The agent may not enter.
    #[error(
        "the agent may not enter the network namespace ({source}): grant it CAP_SYS_ADMIN, or run it as root"
    )]
    Closed {
        /// The system's error.
        source: io::Error,
    },
    /// Nothing reaches 127.0.0.0/8 there.
    #[error(
        "the loopback interface is down in the network namespace, and captured connections go over it: run `ip link set lo up` in it"
    )]
    LoopbackDown,
    /// A thread called on a socket of another namespace than its own, which nothing leads to.
    #[error("thread {tid} uses a socket of a network namespace that it is not in")]
    Elsewhere {
        /// The thread.
        tid: u32,
    },
    /// The limit is reached.
    #[error("there are {max} other network namespaces with captured processes already")]
    TooMany {
        /// The most that there may be.
        max: usize,
    },
    /// What whoever made it has put in it, or the host's load, keeps the agent waiting.
    #[error("it has taken longer than {limit:?} to open sockets in the network namespace")]
    Slow {
        /// The longest that it may take.
        limit: Duration,
    },
    /// The sockets could not be opened.
    #[error(transparent)]
    Sockets(#[from] CaptureError),
    /// No thread could be had to go there.
    #[error("no thread could be had that enters the network namespace: {0}")]
    Thread(io::Error),
}

/// A network namespace, kept alive.
#[derive(Debug)]
pub struct Netns {
    file: File,
    inode: u64,
}

impl Netns {
    /// The one that this thread is in.
    pub fn own() -> io::Result<Self> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// The one that a thread is in now. Needs the right to trace it (CAP_SYS_PTRACE for those of other users).
    pub fn of_thread(tid: u32) -> Result<Self, NamespaceError> {
        Self::open(&link_of(tid)).map_err(|source| match source.raw_os_error() {
            Some(libc::ENOENT | libc::ESRCH) => NamespaceError::Ended { tid },
            _ => NamespaceError::Hidden { tid, source },
        })
    }

    fn open(link: &str) -> io::Result<Self> {
        let file = File::open(link)?;
        let inode = file.metadata()?.ino();
        Ok(Self { file, inode })
    }

    /// Its number: no other namespace has the same while this one lives (namespaces(7)).
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Does `job` inside, on a thread of its own that ends with it: no thread of the runtime ever changes its namespace.
    /// Needs CAP_SYS_ADMIN.
    pub async fn run<T: Send + 'static>(
        self,
        job: impl FnOnce() -> Result<T, NamespaceError> + Send + 'static,
    ) -> Result<T, NamespaceError> {
        let (done, result) = oneshot::channel();
        let inside = move || {
            let entered = setns(&self.file, CloneFlags::CLONE_NEWNET);
            let entered = entered.map_err(|errno| NamespaceError::Closed {
                source: errno.into(),
            });
            // Whoever asked may have gone, and with it the need for an answer.
            let _ = done.send(entered.and_then(|()| job()));
        };
        std::thread::Builder::new()
            .name("netns".to_owned())
            .spawn(inside)
            .map_err(NamespaceError::Thread)?;
        let lost = |_| NamespaceError::Thread(io::Error::other("it has panicked"));
        result.await.map_err(lost)?
    }
}

/// The link in proc that names a thread's network namespace.
pub fn link_of(tid: u32) -> String {
    format!("/proc/{tid}/ns/net")
}
