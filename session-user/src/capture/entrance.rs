//! Where captured connections come in.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;

use aya::maps::{MapData, SkStorage};
use session_ebpf_common::{DNS_PORT, Original};
use socket2::Socket;

use super::Captured;
use super::arrivals::Arrivals;
use super::bypass::Bypass;
use super::kernel::socket_addr;
use crate::requests::AppStream;

/// The listeners of a [`super::Capture`] in all network namespaces, for whoever accepts from them; that may be another task
/// than the one that owns the capture.
pub struct Entrance {
    arrivals: Arc<Arrivals>,
    /// What the programs stored with accepted sockets.
    accepted: SkStorage<MapData, Original>,
    bypass: Option<Bypass>,
}

impl std::fmt::Debug for Entrance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entrance").finish_non_exhaustive()
    }
}

impl Entrance {
    pub(super) fn new(
        arrivals: Arc<Arrivals>,
        accepted: SkStorage<MapData, Original>,
        bypass: Option<Bypass>,
    ) -> Self {
        Self {
            arrivals,
            accepted,
            bypass,
        }
    }

    /// The next captured connection. Cancel-safe; to be asked anew when [`super::Capture`] has opened a network namespace.
    ///
    /// Connections that somebody makes to the listeners by hand are reset and not returned. An error is the system's,
    /// such as EMFILE: the caller decides how long to wait before it asks again.
    pub async fn accept(&self) -> io::Result<Captured> {
        loop {
            let arrival = poll_fn(|cx| self.arrivals.poll_next(cx)).await;
            let (listeners, accepted) = arrival;
            let (socket, app) = accepted?;
            // Without a destination the socket is dropped here, and its zero linger makes that a reset.
            if let Some(original) = self.destination(&socket) {
                let hop = listeners.hop(&socket, app, original.called_at)?;
                // The programs leave questions about names out.
                let bypass = self.bypass.as_ref();
                let bypass = bypass.filter(|_| original.port != DNS_PORT);
                return Ok(Captured {
                    tally: bypass.and_then(|bypass| bypass.join(&socket, hop.key())),
                    socket: AppStream::accepted(socket, app),
                    app,
                    original: socket_addr(&original),
                    peer: original.peer,
                    cgroup: original.cgroup,
                    hop,
                });
            }
            tracing::debug!(%app, "reset a connection to a capture port that was not captured");
        }
    }

    /// What the programs stored with an accepted socket, if they did.
    fn destination(&self, socket: &Socket) -> Option<Original> {
        self.accepted.get(socket, 0).ok()
    }
}
