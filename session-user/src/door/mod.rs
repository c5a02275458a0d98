//! The proxy door: listeners for applications that are not captured, because they ask for it themselves or because
//! this host has no eBPF for us. What comes through them goes into the same sessions.
//!
//! A door leads to one target, or it speaks SOCKS5 (RFC 1928) or HTTP CONNECT (RFC 9110, 9.3.6) and lets its clients
//! say where they want to go; a UDP port leads to one target, and SOCKS5 knows UDP as well. Whether they may is the gateway's to say, as for captured connections.

mod associate;
mod datagrams;
mod http;
mod listener;
mod places;
mod socks;

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use session_proto::wire::Target;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::JoinSet;

use crate::names::Book;
use crate::requests::{Answer, AppStream, Asker, RequestQueue, StreamRequest, Supply};
use listener::{Client, Listener};

/// Clients of one door that have not said where they want to go, at most. Beyond it they wait in the kernel's queue.
const NEGOTIATING_MAX: usize = 1024;
/// Time for a client to say where it wants to go.
const NEGOTIATION_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for its target to answer, the way to the peer included: what a connect() has on Linux (127 s).
const ANSWER_TIMEOUT: Duration = Duration::from_secs(127);
/// Wait after `accept()` failed for want of descriptors or memory.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Where a door is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum At {
    /// A TCP port.
    Tcp(std::net::SocketAddr),
    /// A UDP port.
    Udp(std::net::SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl std::fmt::Display for At {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(addr) => addr.fmt(f),
            Self::Udp(addr) => write!(f, "{addr} (UDP)"),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// What a door leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leads {
    /// Always there.
    To(Target),
    /// Where its clients say, by SOCKS5.
    Socks5,
    /// Where its clients say, by HTTP CONNECT.
    Http,
}

impl std::fmt::Display for Leads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::To(target) => target.fmt(f),
            Self::Socks5 => f.write_str("socks5"),
            Self::Http => f.write_str("http"),
        }
    }
}

/// One door.
#[derive(Clone, Debug)]
pub struct Door {
    /// Where it is.
    pub at: At,
    /// What it leads to.
    pub leads: Leads,
    /// Who may use it beside this host itself.
    pub from: Vec<IpNet>,
    /// Group whose members may use a Unix socket, beside its owner.
    pub group: Option<String>,
    /// A UDP conversation in which nothing was said for so long is over.
    pub flow_idle: Duration,
    /// Streams and flows for the peer that carries what comes through it.
    pub requests: Arc<RequestQueue>,
    /// Addresses that stand for names, for clients who resolve before they ask.
    pub names: Option<Arc<Book>>,
}

/// A door that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("[[listen]] at {at}: {source}")]
pub struct DoorError {
    /// Where it was to be.
    pub at: At,
    /// Why not.
    #[source]
    pub source: io::Error,
}

/// Why a client got no stream: its own fault, or that it has gone.
#[derive(Debug, thiserror::Error)]
enum Unmet {
    #[error("it did not say in time where it wants to go")]
    Timeout,
    #[error("{0}")]
    Protocol(String),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// All open doors. Dropping it closes them; the streams that came through live on.
#[derive(Debug, Default)]
pub struct Doors {
    tasks: JoinSet<()>,
}

impl Doors {
    /// Opens doors. Needs a tokio runtime.
    pub fn open(doors: impl IntoIterator<Item = Door>) -> Result<Self, DoorError> {
        let mut tasks = JoinSet::new();
        for door in doors {
            let failed = |source| DoorError {
                at: door.at.clone(),
                source,
            };
            if let (At::Udp(addr), Leads::To(target)) = (&door.at, &door.leads) {
                let socket = datagrams::open(*addr).map_err(failed)?;
                let target = target.clone();
                tracing::info!(at = %door.at, "a door is open");
                tasks.spawn(datagrams::keep(socket, Arc::new(door), target));
                continue;
            }
            let listener = Listener::open(&door).map_err(failed)?;
            tracing::info!(at = %door.at, "a door is open");
            tasks.spawn(keep(listener, Arc::new(door)));
        }
        Ok(Self { tasks })
    }

    /// Closes them.
    pub fn close(&mut self) {
        self.tasks.abort_all();
    }
}

/// Accepts clients until it is aborted, and with it those who have no stream yet.
async fn keep(listener: Listener, door: Arc<Door>) {
    let busy = Arc::new(Semaphore::new(NEGOTIATING_MAX));
    let mut clients = JoinSet::new();
    loop {
        let Ok(permit) = Arc::clone(&busy).acquire_owned().await else {
            return;
        };
        let client = match listener.accept().await {
            Ok(client) => client,
            Err(error) => {
                tracing::warn!(at = %door.at, %error, "a client could not be accepted");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        while clients.try_join_next().is_some() {}
        if !client.address().is_none_or(|ip| door.admits(ip)) {
            tracing::warn!(at = %door.at, client = %client.name(), "a client is turned away: [[listen]] `from` does not name it");
            continue;
        }
        let door = Arc::clone(&door);
        clients.spawn(async move {
            let name = client.name();
            if let Err(error) = door.meet(client, permit).await {
                tracing::debug!(at = %door.at, client = %name, %error, "a client got no stream");
            }
        });
    }
}

impl Door {
    fn admits(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        ip.is_loopback() || self.from.iter().any(|net| net.contains(&ip))
    }

    async fn meet(&self, client: Client, permit: OwnedSemaphorePermit) -> Result<(), Unmet> {
        let name = client.name();
        match (&self.leads, client) {
            (Leads::To(target), client) => self.forward(client, target),
            (Leads::Socks5, Client::Tcp(socket, from)) => {
                let ends = (socket.local_addr()?, from);
                socks::serve(self, name, socket, Some(ends), permit).await
            }
            (Leads::Socks5, Client::Unix(socket)) => {
                socks::serve(self, name, socket, None, permit).await
            }
            (Leads::Http, Client::Tcp(socket, _)) => http::serve(self, name, socket, permit).await,
            (Leads::Http, Client::Unix(socket)) => http::serve(self, name, socket, permit).await,
        }
    }

    /// The client is connected already, so what it says goes out with OPEN.
    fn forward(&self, client: Client, target: &Target) -> Result<(), Unmet> {
        let app = client.name();
        let request = StreamRequest {
            target: target.clone(),
            app: app.into(),
            cgroup: None,
            supply: Supply::Connected(client.into_stream()?),
        };
        self.push(request)
    }

    /// Asks for a stream on behalf of a client; its target's answer, or that there is none. The client makes room for
    /// others that have not said what they want: those that wait are bounded by the queue and by the session's streams.
    async fn ask(
        &self,
        app: String,
        target: Target,
        permit: OwnedSemaphorePermit,
    ) -> Option<Answer> {
        drop(permit);
        let target = match self.meant(target) {
            Ok(target) => target,
            Err(errno) => return Some(Answer::Refused(errno)),
        };
        let (asker, answer) = Asker::new();
        let request = StreamRequest {
            target,
            app: app.into(),
            cgroup: None,
            supply: Supply::Waiting(asker),
        };
        self.push(request).ok()?;
        match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
            Ok(answer) => answer.ok(),
            Err(_) => Some(Answer::Refused(libc::ETIMEDOUT)),
        }
    }

    /// What a client means by `target`; an error is an errno.
    fn meant(&self, target: Target) -> Result<Target, i32> {
        match &self.names {
            None => Ok(target),
            Some(names) => names.target_of(target),
        }
    }

    fn push(&self, request: StreamRequest) -> Result<(), Unmet> {
        self.requests.push(request).map_err(|request| {
            tracing::warn!(target = %request.target, "too many connections wait for the peer: one is refused");
            Unmet::Protocol("too many connections wait for the peer".to_owned())
        })
    }
}

/// Gives a client's socket to its stream. If nobody takes it, the session has ended, and the socket is reset with it.
fn seat(seat: oneshot::Sender<AppStream>, stream: AppStream) -> Result<(), Unmet> {
    stream.reset_on_close(true)?;
    drop(seat.send(stream));
    Ok(())
}
