//! The sockets of all network namespaces, of which it is waited for whichever has something.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_util::StreamExt as _;
use futures_util::future::AbortHandle;
use futures_util::stream::{Abortable, BoxStream, SelectAll, poll_fn};

use super::socket::Door;
use super::tables::Tables;

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
    places: BTreeMap<u64, (Place, Vec<AbortHandle>)>,
}

impl Doors {
    /// Waits at these sockets too.
    pub fn add(&mut self, place: Place) {
        let handles = place.doors.iter().map(|door| {
            let (handle, registration) = AbortHandle::new_pair();
            let door = Arc::clone(door);
            let each = poll_fn(move |cx| {
                let ready = ready!(door.poll_ready(cx));
                Poll::Ready(Some((Arc::clone(&door), ready)))
            });
            (self.waiting).push(Abortable::new(each.boxed(), registration));
            handle
        });
        let handles = handles.collect();
        self.places.insert(place.netns, (place, handles));
    }

    /// Lets go of the sockets of a network namespace.
    pub fn remove(&mut self, netns: u64) {
        if let Some((_, handles)) = self.places.remove(&netns) {
            for handle in handles {
                handle.abort();
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
