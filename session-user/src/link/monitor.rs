//! The thread between the netlink socket and the table.
//!
//! 1. open the socket in the caller's network namespace, subscribe, read everything once;
//! 2. wait for news, for the end of somebody's debounce, or for the owner;
//! 3. give each message to the table, and publish at once if a usable link was lost;
//! 4. when the queue is empty publish the rest, if it differs;
//! 5. begin the dump that the table wants; its answers come back through step 3.
//!
//! A thread of its own, because the news of a lost link must not wait for a turn behind a busy
//! data path. It sleeps in `poll` and costs nothing while nothing happens.

use std::io::{self, Read as _};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::watch;

use super::message::{Ask, Message, News, messages};
use super::model::LinkSnapshot;
use super::netlink::{DATAGRAM_MAX, Read, RouteSocket};
use super::table::Table;
use super::{LinkError, MonitorConfig};

/// The first reading takes a millisecond; after this long the kernel does not answer.
const FIRST_READING_MAX: Duration = Duration::from_secs(10);
/// So many datagrams are read before what they changed is published, if nothing was lost.
const BATCH_MAX: usize = 256;

/// The kernel makes a dump while the request is sent and while it is read, so that an empty queue
/// in the middle of one means that its answer was lost (see `RouteSocket::ask`). The pause keeps
/// a fault from becoming a spin.
const STALL_PAUSE: Duration = Duration::from_millis(5);

pub(super) struct Watcher {
    socket: RouteSocket,
    table: Table,
    buffer: Vec<u8>,
    /// The dump in flight and its sequence number.
    asked: Option<(Ask, u32)>,
    seq: u32,
    /// The reading in flight has seen a fault and will be repeated.
    flawed: bool,
    read_at: Instant,
    overruns: Arc<AtomicU64>,
}

impl Watcher {
    /// Step 1; returns with the first snapshot.
    pub(super) fn open(config: &MonitorConfig) -> Result<(Watcher, LinkSnapshot), LinkError> {
        let socket = RouteSocket::open(config.receive_buffer_bytes).map_err(LinkError::Open)?;
        let mut watcher = Watcher {
            socket,
            table: Table::new(config.debounce),
            buffer: vec![0; DATAGRAM_MAX],
            asked: None,
            seq: 0,
            flawed: false,
            read_at: Instant::now(),
            overruns: Arc::default(),
        };
        let began = Instant::now();
        watcher.table.want_reading(began);
        loop {
            watcher.read_if_wanted();
            watcher.wait(None)?;
            let mut first = None;
            let rest = watcher.drain(|snapshot| first = Some(snapshot))?;
            if let Some(snapshot) = rest.or(first) {
                return Ok((watcher, snapshot));
            }
            if began.elapsed() > FIRST_READING_MAX {
                return Err(LinkError::Silent(FIRST_READING_MAX));
            }
        }
    }

    /// Counts how often notifications were lost.
    pub(super) fn overruns(&self) -> Arc<AtomicU64> {
        self.overruns.clone()
    }

    /// Steps 2 to 5, until the owner drops its end of `owner`.
    pub(super) fn run(
        mut self,
        owner: &UnixStream,
        published: &watch::Sender<Arc<LinkSnapshot>>,
    ) -> Result<(), LinkError> {
        let publish = |snapshot| {
            published.send_replace(Arc::new(snapshot));
        };
        loop {
            self.read_if_wanted();
            self.wait(Some(owner))?;
            match owner_says(owner) {
                Some(true) => self.table.want_reading(Instant::now()),
                Some(false) => {}
                None => return Ok(()),
            }
            if let Some(snapshot) = self.drain(publish)? {
                publish(snapshot);
            }
        }
    }

    fn wait(&mut self, owner: Option<&UnixStream>) -> Result<(), LinkError> {
        let left = |at: Instant| at.saturating_duration_since(Instant::now());
        let due = self.table.poll_deadline().map(left);
        let stall = self.asked.map(|_| STALL_PAUSE);
        let timeout = match [due, stall].into_iter().flatten().min() {
            // Rounded up, lest the last millisecond is spent spinning.
            Some(left) => PollTimeout::from(left.as_micros().div_ceil(1000).min(60_000) as u16),
            None => PollTimeout::NONE,
        };
        let mut fds = vec![PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        fds.extend(owner.map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
        let ready = match poll(&mut fds, timeout) {
            Ok(ready) => ready,
            Err(Errno::EINTR) => return Ok(()),
            Err(errno) => return Err(LinkError::Read(errno)),
        };
        if ready == 0 && self.asked.is_some() {
            self.handle_stall();
        }
        Ok(())
    }

    fn handle_stall(&mut self) {
        tracing::debug!("the answer to a dump of links was lost (queue full); asking anew");
        self.asked = None;
        self.table.handle_read_end(false, Instant::now());
    }

    /// Reads until the queue is empty. Snapshots with a loss go to `at_once`; what is left over
    /// is returned.
    fn drain(
        &mut self,
        mut at_once: impl FnMut(LinkSnapshot),
    ) -> Result<Option<LinkSnapshot>, LinkError> {
        for _ in 0..BATCH_MAX {
            let mut buffer = std::mem::take(&mut self.buffer);
            let read = self.socket.read(&mut buffer);
            let now = Instant::now();
            match read {
                Ok(Read::Datagram(length)) => {
                    self.read_at = now;
                    for message in messages(&buffer[..length]) {
                        self.handle(message, now);
                    }
                }
                Ok(Read::Overrun) => {
                    self.overruns.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!("link notifications were lost (queue full); reading anew");
                    self.table.handle_gap(now);
                }
                Ok(Read::Unusable) => self.table.handle_gap(now),
                Ok(Read::Empty) | Err(_) => {}
            }
            self.buffer = buffer;
            if self.table.is_urgent() {
                self.table.poll_snapshot(now).map(&mut at_once);
            }
            if read.map_err(LinkError::Read)? == Read::Empty {
                break;
            }
        }
        self.table.handle_timeout(Instant::now());
        Ok(self.table.poll_snapshot(self.read_at))
    }

    fn handle(&mut self, message: Message, now: Instant) {
        let own = match self.asked {
            Some((ask, seq)) if message.seq == seq && message.port == self.socket.port() => {
                Some(ask)
            }
            _ => None,
        };
        self.flawed |= own.is_some() && message.interrupted;
        match (message.news, own) {
            (Some(News::Done | News::Refused(0)), Some(ask)) => self.handle_dump_end(ask, now),
            (Some(News::Refused(errno)), Some(ask)) => {
                // A kernel without IPv6 refuses to list its routes; that is no fault.
                tracing::debug!(?ask, errno, "the kernel refused a dump");
                self.flawed |= Errno::from_raw(errno) == Errno::EBUSY;
                self.handle_dump_end(ask, now);
            }
            (Some(news), _) => self.table.handle_news(news, now),
            // Repeating a dump would only meet the same entry again.
            (None, Some(_)) => tracing::warn!("an entry of a link dump cannot be read; skipped"),
            (None, None) => self.table.handle_gap(now),
        }
    }

    fn handle_dump_end(&mut self, ask: Ask, now: Instant) {
        match ask.next() {
            Some(next) => self.ask(next),
            None => {
                self.asked = None;
                self.table.handle_read_end(!self.flawed, now);
            }
        }
    }

    fn read_if_wanted(&mut self) {
        if self.table.poll_reading(Instant::now()) {
            self.flawed = false;
            self.ask(Ask::Links);
        }
    }

    fn ask(&mut self, what: Ask) {
        self.seq = self.seq.wrapping_add(1).max(1);
        self.asked = Some((what, self.seq));
        if let Err(errno) = self.socket.ask(what, self.seq) {
            tracing::warn!(?what, %errno, "cannot ask the kernel for a dump; trying again");
            self.asked = None;
            self.table.handle_read_end(false, Instant::now());
        }
    }
}

/// `Some(true)`: wants a reading; `Some(false)`: said nothing; `None`: is gone.
fn owner_says(mut owner: &UnixStream) -> Option<bool> {
    let mut bytes = [0; 64];
    match owner.read(&mut bytes) {
        Ok(0) => None,
        Ok(_) => Some(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Some(false),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Some(false),
        Err(_) => None,
    }
}
