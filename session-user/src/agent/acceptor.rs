//! Accepts transports: a full handshake makes a session, a resume token leads to one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use session_proto::wire::{Kind, Preamble, Reply, Status};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

use super::packets::PACKETS_WAITING_MAX;
use super::registry::{Entry, Registry};
use super::workers::{Place, Places};
use crate::dial::{AllowList, Caller, PeerAddresses};
use crate::driver::{Command, Common, Driver, Listening, Responder, Side, establish};
use crate::handshake::PeerIdentity;
use crate::link::LinkSnapshot;
use crate::transport::{PacketSocket, adopt, tune_accepted};

/// Handshakes that may run at once: each costs a fraction of a millisecond of CPU and a socket.
const HANDSHAKES_MAX: usize = 256;
/// Connections that may be without a preamble at once, so that strangers cannot use up the
/// descriptors of sessions that stand.
const STRANGERS_MAX: usize = 1024;
/// Bytes of a preamble, at most, with room for what follows it in the same segment.
const FIRST_READ_BYTES: usize = 4096;
/// Wait after `accept()` failed for want of descriptors or memory.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// What the acceptor needs of the agent.
#[derive(Clone)]
pub struct Acceptor {
    /// The sessions.
    pub registry: Registry,
    /// Where they are driven.
    pub places: Places,
    /// What is the same for every session.
    pub common: Common,
    /// Limits of a session.
    pub session: session_proto::session::Config,
    /// Who may go where.
    pub allow: Arc<AllowList>,
    /// How targets see the peers.
    pub addresses: Arc<PeerAddresses>,
    /// Time for one target to answer.
    pub dial_timeout: Duration,
    /// Time for a preamble and a handshake.
    pub handshake_timeout: Duration,
    /// Sessions accepted at once.
    pub max_sessions: usize,
    /// UDP sockets beside the listeners.
    pub packets: Arc<[Arc<PacketSocket>]>,
    /// The links.
    pub links: watch::Receiver<Arc<LinkSnapshot>>,
    /// Admission of connections that have not said what they want.
    pub strangers: Arc<Semaphore>,
    /// Closed once the unit drains: no new sessions then, but resumes of those that stand.
    pub admit: Arc<Semaphore>,
}

/// Why a transport was not accepted.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("the connection failed: {0}")]
    Io(#[from] std::io::Error),
    #[error("it sent no preamble within {0:?}")]
    Silent(Duration),
    #[error("its first bytes are wrong: {0}")]
    Wire(#[from] session_proto::wire::WireError),
    #[error("it speaks protocol versions {0} to {1}, this unit speaks {v}", v = session_proto::limits::VERSION)]
    Version(u8, u8),
    #[error("it resumes a session that is not known here")]
    UnknownSession,
    #[error("{0}")]
    Limit(&'static str),
    #[error("{0}")]
    Handshake(#[from] establish::EstablishError),
}

impl Acceptor {
    /// The admission of handshakes.
    pub fn admission() -> Arc<Semaphore> {
        Arc::new(Semaphore::new(HANDSHAKES_MAX))
    }

    /// The admission of connections.
    pub fn strangers() -> Arc<Semaphore> {
        Arc::new(Semaphore::new(STRANGERS_MAX))
    }

    /// Accepts until the task is aborted.
    pub async fn serve(self, listener: TcpListener) {
        loop {
            match listener.accept().await {
                Ok((stream, remote)) => {
                    let this = self.clone();
                    tokio::spawn(async move {
                        if let Err(reason) = this.admit(stream).await {
                            tracing::warn!(%remote, %reason, "a transport was refused");
                        }
                    });
                }
                Err(error) => {
                    tracing::error!(%error, "accept failed; if descriptors ran out, raise LimitNOFILE");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }

    async fn admit(self, mut stream: TcpStream) -> Result<(), Refused> {
        let Ok(stranger) = Arc::clone(&self.strangers).try_acquire_owned() else {
            return Err(Refused::Limit("too many connections without a preamble"));
        };
        tune_accepted(&stream, &self.common.transport)?;
        let mut input = BytesMut::with_capacity(FIRST_READ_BYTES);
        let limit = self.handshake_timeout;
        let preamble = tokio::time::timeout(limit, read_preamble(&mut stream, &mut input))
            .await
            .map_err(|_| Refused::Silent(limit))??;
        drop(stranger);
        if !preamble.speaks_our_version() {
            reply(&mut stream, Status::Version).await;
            return Err(Refused::Version(preamble.version_min, preamble.version_max));
        }
        match preamble.kind {
            Kind::Resume(token) => {
                let Some((entry, counter)) = self.registry.by_token(&token) else {
                    reply(&mut stream, Status::UnknownSession).await;
                    return Err(Refused::UnknownSession);
                };
                // A driver that has just ended drops the socket, and the peer dials again.
                let _ = entry
                    .commands
                    .send(Command::Accept {
                        counter,
                        stream,
                        input,
                    })
                    .await;
                Ok(())
            }
            Kind::Full => self.admit_full(stream, input).await,
        }
    }

    async fn admit_full(self, mut stream: TcpStream, input: BytesMut) -> Result<(), Refused> {
        if self.admit.is_closed() {
            reply(&mut stream, Status::Draining).await;
            return Err(Refused::Limit("this unit is shutting down"));
        }
        let Ok(permit) = Arc::clone(&self.admit).try_acquire_owned() else {
            reply(&mut stream, Status::Busy).await;
            return Err(Refused::Limit("too many handshakes at once"));
        };
        if self.registry.accepted() >= self.max_sessions {
            reply(&mut stream, Status::Busy).await;
            return Err(Refused::Limit("max_sessions is reached"));
        }
        let place = self.places.take();
        let runtime = place.runtime().clone();
        let admitted = runtime.spawn(self.establish(stream, input, permit, place));
        // A panic was printed where it happened.
        admitted.await.unwrap_or(Ok(()))
    }

    /// In the runtime of `place`, where the session that begins stays.
    async fn establish(
        self,
        stream: TcpStream,
        input: BytesMut,
        permit: OwnedSemaphorePermit,
        place: Place,
    ) -> Result<(), Refused> {
        let mut stream = adopt(stream)?;
        stream.write_all(&Reply::new(Status::Ok).encode()).await?;
        let identity = Arc::clone(&self.common.identity);
        let pending = establish::respond(
            identity,
            stream,
            input,
            self.handshake_timeout,
            self.session.clone(),
        )
        .await?;
        drop(permit);
        self.begin(pending, place).await;
        Ok(())
    }

    /// The peer is who it says: its session begins.
    async fn begin(self, pending: establish::Pending, place: Place) {
        let peer = pending.peer.name.to_string();
        let continued = match pending.hello.continues {
            None => None,
            Some((session, counter)) => {
                let held = self.registry.of_peer(session, &peer);
                if let Some(entry) = &held {
                    // A driver that ends just now makes the answer below wrong; the resume that
                    // follows is then refused, and the peer asks again.
                    let _ = entry.commands.send(Command::Expect(counter)).await;
                }
                Some(held.is_some())
            }
        };
        let instance = pending.hello.instance;
        let established = pending.accept(continued);
        let id = established.session.id();
        let (commands, mut inbox) = mpsc::channel(64);
        let (packets, inbound) = mpsc::channel(PACKETS_WAITING_MAX);
        tracing::info!(%peer, remote = %established.path.remote, session = %hex::encode(id), "a session begins");
        self.registry.insert(
            id,
            Entry {
                peer: peer.clone(),
                instance,
                initiator: false,
                commands,
                packets: Some(packets),
            },
        );
        self.registry.supersede(id, &peer, instance).await;
        let mut responder = Responder::new(
            self.caller(&established.peer).await,
            Arc::clone(&self.allow),
            self.dial_timeout,
            self.links.clone(),
        );
        if !self.packets.is_empty() {
            let sockets = Arc::clone(&self.packets);
            responder.listening = Some(Listening { sockets, inbound });
        }
        let driver = Driver::new(
            established,
            self.common.clone(),
            Side::Responder(Box::new(responder)),
        );
        // A task of its own: this one has the room that a handshake takes, and a session lasts.
        let registry = self.registry;
        tokio::spawn(async move {
            let _place = place;
            let ended = driver.run(&mut inbox).await;
            registry.remove(id);
            tracing::info!(%peer, session = %hex::encode(id), ?ended, "a session has ended");
        });
    }

    /// The peer, as one for whom targets are dialled.
    async fn caller(&self, peer: &PeerIdentity) -> Caller {
        let id = peer.name.uri();
        let (addresses, unit) = (Arc::clone(&self.addresses), id.clone());
        let seen_as = tokio::task::spawn_blocking(move || addresses.of(&unit)).await;
        Caller {
            name: peer.name.to_string(),
            id,
            // The task fails only while the runtime shuts down.
            seen_as: seen_as.unwrap_or_default(),
        }
    }
}

async fn read_preamble(stream: &mut TcpStream, input: &mut BytesMut) -> Result<Preamble, Refused> {
    loop {
        if let Some((preamble, used)) = Preamble::parse(input)? {
            input.advance(used);
            return Ok(preamble);
        }
        if stream.read_buf(input).await? == 0 {
            return Err(Refused::Io(std::io::ErrorKind::UnexpectedEof.into()));
        }
    }
}

async fn reply(stream: &mut TcpStream, status: Status) {
    // The dialler may have gone; it is refused in any case.
    let _ = stream.write_all(&Reply::new(status).encode()).await;
}

/// Opens the listeners of `[accept]`; the error names the address.
pub fn listen(
    addresses: &[SocketAddr],
    fast_open: bool,
) -> Result<Vec<TcpListener>, (SocketAddr, std::io::Error)> {
    addresses
        .iter()
        .map(|&addr| crate::transport::listen(addr, fast_open).map_err(|e| (addr, e)))
        .collect()
}
