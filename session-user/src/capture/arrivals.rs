//! Connections that arrive at the listeners of all network namespaces.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use futures_util::StreamExt as _;
use futures_util::future::AbortHandle;
use futures_util::stream::{Abortable, BoxStream, SelectAll, poll_fn};
use socket2::Socket;

use super::listeners::Listeners;

/// A connection, and the listeners where it arrived.
pub type Arrival = (Arc<Listeners>, io::Result<(Socket, SocketAddr)>);
/// One stream for each namespace, so that only those are looked at where something happens.
type Waiting = SelectAll<Abortable<BoxStream<'static, Arrival>>>;

/// All listeners that are waited at.
#[derive(Default)]
pub struct Arrivals(Mutex<Waiting>);

impl Arrivals {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits at these listeners too, from the next call of [`Arrivals::poll_next`] on: whoever waits already is not woken for
    /// that. Until the handle is used, and it has been called again.
    pub fn add(&self, listeners: Arc<Listeners>) -> AbortHandle {
        let (handle, registration) = AbortHandle::new_pair();
        let each = poll_fn(move |cx| {
            let accepted = ready!(listeners.poll_accept(cx));
            Poll::Ready(Some((Arc::clone(&listeners), accepted)))
        });
        let stream = Abortable::new(each.boxed(), registration);
        self.waiting().push(stream);
        handle
    }

    /// The next connection anywhere.
    pub fn poll_next(&self, cx: &mut Context<'_>) -> Poll<Arrival> {
        match ready!(self.waiting().poll_next_unpin(cx)) {
            Some(arrival) => Poll::Ready(arrival),
            // Nobody waits anywhere: the agent's own listeners are added first and go last.
            None => Poll::Pending,
        }
    }
}

impl std::fmt::Debug for Arrivals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arrivals").finish_non_exhaustive()
    }
}
