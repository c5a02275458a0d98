//! Processes by which network namespaces are known to be lived in: their ends are noticed without looking.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use futures_util::StreamExt as _;
use futures_util::future::{AbortHandle, Abortable, BoxFuture};
use futures_util::stream::FuturesUnordered;
use tokio::io::{Interest, unix::AsyncFd};

type Ends = FuturesUnordered<Abortable<BoxFuture<'static, u64>>>;

/// At most one process for each namespace.
#[derive(Default)]
pub struct Witnesses {
    /// By the namespace's cookie.
    watched: BTreeMap<u64, AbortHandle>,
    ends: Mutex<Ends>,
}

impl Witnesses {
    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches the process of a thread in a namespace, unless one is watched there. One that cannot be watched is only
    /// missed at the next survey.
    pub fn add(&mut self, netns_cookie: u64, tid: u32) {
        if self.watched.contains_key(&netns_cookie) {
            return;
        }
        let Some(watch) = process_of(tid).and_then(|pid| pidfd(pid).ok()) else {
            return;
        };
        // SAFETY: an `OwnedFd` keeps its descriptor for its whole life, and the registration owns it.
        let registered = unsafe { AsyncFd::register_with_interest(watch, Interest::READABLE) };
        let Ok(watch) = registered else { return };
        let (handle, registration) = AbortHandle::new_pair();
        let ended: BoxFuture<'static, u64> = Box::pin(async move {
            // An error ends the watch as the process's end does: the survey that follows tells the truth.
            let _ = watch.readable().await;
            netns_cookie
        });
        self.ends().push(Abortable::new(ended, registration));
        self.watched.insert(netns_cookie, handle);
    }

    /// The namespace is closed.
    pub fn remove(&mut self, netns_cookie: u64) {
        if let Some(handle) = self.watched.remove(&netns_cookie) {
            handle.abort();
        }
    }

    /// The next namespace whose witness has ended; the caller then [`Witnesses::remove`]s it.
    pub fn poll_ended(&self, cx: &mut Context<'_>) -> Poll<u64> {
        loop {
            match ready!(self.ends().poll_next_unpin(cx)) {
                Some(Ok(netns_cookie)) => return Poll::Ready(netns_cookie),
                Some(Err(_removed)) => {}
                None => return Poll::Pending,
            }
        }
    }
}

/// The process that a thread belongs to: proc(5), /proc/PID/status.
fn process_of(tid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?;
    line.trim().parse().ok()
}

/// A descriptor that is readable when the process has ended: pidfd_open(2), Linux 5.3.
fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    let nonblocking = libc::O_NONBLOCK;
    // SAFETY: the call takes two integers and returns a descriptor or an error.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, nonblocking) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, close-on-exec, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}
