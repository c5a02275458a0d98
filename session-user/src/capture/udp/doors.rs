//! The sockets of all network namespaces, of which it is waited for whichever has something.
//!
//! Whoever is root in a namespace can have a socket there fail (`SOCK_DESTROY`, sock_diag(7)), again and again. One that
//! does waits by itself, and no other with it.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_util::future::{AbortHandle, FutureExt as _};
use futures_util::stream::{Abortable, BoxStream, SelectAll, StreamExt as _, poll_fn};
use tokio::time::sleep;

use super::socket::Door;
use super::tables::Tables;

/// Errors of one socket after which it is read on at once, in each [`WHILE`].
const ERRORS_AT_ONCE: u32 = 8;
/// See [`ERRORS_AT_ONCE`].
const WHILE: Duration = Duration::from_secs(1);
/// Wait of a socket that has failed more often.
const RETRY: Duration = Duration::from_millis(100);
/// That a socket fails is told once in this time.
const TOLD_EVERY: Duration = Duration::from_secs(60);

/// A socket, and whether it can be read.
pub type Ready = (Arc<Door>, io::Result<()>);

/// What a network namespace has come to, or has lost.
#[derive(Debug)]
pub enum Change {
    /// The agent is there.
    Opened(Place),
    /// It is not any more in the one with this cookie.
    Closed(u64),
}

/// The sockets of one network namespace.
#[derive(Debug)]
pub struct Place {
    /// Its cookie.
    pub netns: u64,
    /// One for each family.
    pub doors: Vec<Arc<Door>>,
    /// All UDP sockets that there are in it.
    pub tables: Arc<Tables>,
}

/// All of them.
#[derive(Default)]
pub struct Doors {
    waiting: SelectAll<Abortable<BoxStream<'static, Ready>>>,
    places: BTreeMap<u64, (Place, Vec<Watched>)>,
}

/// A socket that is waited for.
struct Watched {
    door: Arc<Door>,
    handle: AbortHandle,
    trouble: Trouble,
}

/// How a socket has failed lately.
#[derive(Debug, Default)]
struct Trouble {
    /// When the first of so many errors was.
    since: Option<Instant>,
    errors: u32,
    told: Option<Instant>,
}

impl Trouble {
    /// There is another error: how long the socket is left alone for it, if it is, and whether to tell of it.
    fn note(&mut self, now: Instant) -> (Option<Duration>, bool) {
        let within = |at: Option<Instant>, time| at.is_some_and(|at| now.duration_since(at) < time);
        if !within(self.since, WHILE) {
            (self.since, self.errors) = (Some(now), 0);
        }
        self.errors += 1;
        let tell = !within(self.told, TOLD_EVERY);
        if tell {
            self.told = Some(now);
        }
        ((self.errors > ERRORS_AT_ONCE).then_some(RETRY), tell)
    }
}

impl Doors {
    /// Waits at these sockets too.
    pub fn add(&mut self, place: Place) {
        let watched = place.doors.iter().map(|door| Watched {
            door: Arc::clone(door),
            handle: watch(&mut self.waiting, Arc::clone(door), None),
            trouble: Trouble::default(),
        });
        let watched = watched.collect();
        self.places.insert(place.netns, (place, watched));
    }

    /// A socket could not be read: it is waited for again, after a while if that happens often.
    pub fn failed(&mut self, door: &Arc<Door>, error: &io::Error) {
        let place = self.places.get_mut(&door.netns());
        let watched =
            place.and_then(|(_, all)| all.iter_mut().find(|w| Arc::ptr_eq(&w.door, door)));
        // It may have been let go of.
        let Some(watched) = watched else { return };
        let (wait, tell) = watched.trouble.note(Instant::now());
        if tell {
            tracing::warn!(%error, netns = door.netns(), socket = %door.local(), "captured datagrams could not be read");
        }
        if wait.is_some() {
            watched.handle.abort();
            watched.handle = watch(&mut self.waiting, Arc::clone(door), wait);
        }
    }

    /// Lets go of the sockets of a network namespace.
    pub fn remove(&mut self, netns: u64) {
        if let Some((_, all)) = self.places.remove(&netns) {
            for watched in all {
                watched.handle.abort();
            }
        }
    }

    /// The next that can be read, or that cannot and says why.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Ready> {
        match ready!(self.waiting.poll_next_unpin(cx)) {
            Some(ready) => Poll::Ready(ready),
            // There are none: whoever adds some polls again.
            None => Poll::Pending,
        }
    }

    /// The socket of a network namespace that is of the family of `addr`.
    pub fn of(&self, netns: u64, addr: SocketAddr) -> Option<&Arc<Door>> {
        let (place, _) = self.places.get(&netns)?;
        let same = |door: &&Arc<Door>| door.local().is_ipv4() == addr.is_ipv4();
        place.doors.iter().find(same)
    }

    /// What is known of all UDP sockets, of every network namespace.
    pub fn tables(&self) -> Vec<Arc<Tables>> {
        let places = self.places.values();
        places.map(|(place, _)| Arc::clone(&place.tables)).collect()
    }
}

/// Waits at a socket from now on, or after a while.
fn watch(
    waiting: &mut SelectAll<Abortable<BoxStream<'static, Ready>>>,
    door: Arc<Door>,
    after: Option<Duration>,
) -> AbortHandle {
    let (handle, registration) = AbortHandle::new_pair();
    let each = poll_fn(move |cx| {
        let ready = ready!(door.poll_ready(cx));
        Poll::Ready(Some((Arc::clone(&door), ready)))
    });
    let each = match after {
        Some(after) => async move {
            sleep(after).await;
            each
        }
        .flatten_stream()
        .boxed(),
        None => each.boxed(),
    };
    waiting.push(Abortable::new(each, registration));
    handle
}

#[cfg(test)]
mod tests {
    use super::super::batch::Batch;
    use super::super::socket::{Mark, Sockets};
    use super::*;
    use session_ebpf_common::Ports;

    #[test]
    fn a_socket_is_read_on_at_once_until_it_fails_too_often() {
        let (mut trouble, start) = (Trouble::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(trouble.note(at(0)), (None, true));
        for n in 1..ERRORS_AT_ONCE {
            assert_eq!(trouble.note(at(n.into())), (None, false));
        }
        for n in 100..110 {
            assert_eq!(trouble.note(at(n)), (Some(RETRY), false));
        }
        assert_eq!(trouble.note(at(1_000)), (None, false));
        assert_eq!(trouble.note(at(60_000)), (None, true));
    }

    /// A socket of the network namespace `netns`, or so it seems, which takes what has no mark.
    fn door(doors: &mut Doors, netns: u64) -> Arc<Door> {
        let sockets = Sockets::open(Mark(0), true, &Ports::default(), None).unwrap();
        let opened = sockets.register(netns).unwrap();
        let door = Arc::clone(&opened[0]);
        let tables = Arc::new(Tables::open());
        doors.add(Place {
            netns,
            doors: opened,
            tables,
        });
        door
    }

    #[tokio::test]
    async fn a_socket_that_fails_waits_by_itself() {
        let mut doors = Doors::default();
        let (bad, good) = (door(&mut doors, 1), door(&mut doors, 2));
        for _ in 0..=ERRORS_AT_ONCE {
            doors.failed(&bad, &io::Error::from_raw_os_error(libc::ECONNABORTED));
        }
        let begun = Instant::now();
        let app = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        for door in [&bad, &good] {
            let to = ("127.128.0.1", door.local().port());
            app.send_to(b"hello", to).unwrap();
        }
        let mut batch = Batch::default();
        let mut read = Vec::new();
        while read.len() < 2 {
            let next = std::future::poll_fn(|cx| doors.poll_ready(cx));
            let (door, ready) = next.await;
            if ready.and_then(|()| door.read(&mut batch)).is_ok() {
                read.push((door.netns(), begun.elapsed() >= RETRY));
            }
        }
        assert_eq!(read[0].0, 2);
        assert_eq!(read[1], (1, true));
    }
}
