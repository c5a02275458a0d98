//! From a socket to a session: preamble, TLS 1.3, HELLO and ACCEPT.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use ring::rand::{SecureRandom as _, SystemRandom};
use session_proto::seal::{Secret, SessionSecret};
use session_proto::session::{Config, Event, Handle, Session, TransportFault};
use session_proto::wire::{Kind, Params, Preamble, Reply, Status, WireError, close_code};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::Clock;
use super::carrier::Path;
use crate::handshake::{self, HandshakeError, Identity, Outcome, PeerIdentity};
use crate::policy;
use crate::transport::{DialSpec, InitialWindow, TransportError, TransportOptions, dial};

/// Time to give a peer the CLOSE of a session that is not needed.
const DECLINE_TIMEOUT: Duration = Duration::from_secs(5);

/// What is needed to make a session with a peer.
#[derive(Clone)]
pub struct Request {
    /// Our keys and certificates.
    pub identity: Arc<Identity>,
    /// The name that the peer's certificate must carry.
    pub peer_name: String,
    /// The way to it.
    pub path: policy::Path,
    /// Time for the TCP connection.
    pub dial_timeout: Duration,
    /// Largest segment, in bytes, where the path is known to lose larger packets.
    pub segment: Option<u16>,
    /// Time for everything after it.
    pub handshake_timeout: Duration,
    /// Options of the socket.
    pub transport: TransportOptions,
    /// Sets how much it may send at once.
    pub window: Option<Arc<InitialWindow>>,
    /// Limits of the session.
    pub session: Config,
    /// A session that we still hold and whose resume was refused, with our next counter.
    pub continues: Option<([u8; 16], u64)>,
}

/// A session, ready to be driven.
#[derive(Debug)]
pub struct Established {
    /// The core.
    pub session: Session,
    /// Its first transport.
    pub handle: Handle,
    /// That transport's socket.
    pub stream: TcpStream,
    /// Bytes read from it that the core has not taken.
    pub input: BytesMut,
    /// Who the peer is.
    pub peer: PeerIdentity,
    /// The session's clock.
    pub clock: Clock,
    /// Where the transport runs.
    pub path: Path,
}

/// A peer that has authenticated and said HELLO.
pub struct Pending {
    /// Who the peer is.
    pub peer: PeerIdentity,
    /// What it said.
    pub hello: Params,
    established: Established,
}

impl Pending {
    /// Accepts the session; `continued` answers whether the session named in HELLO is held here.
    pub fn accept(mut self, continued: Option<bool>) -> Established {
        self.established.session.accept(continued);
        self.established
    }
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum EstablishError {
    /// The TCP connection failed.
    #[error("{0}")]
    Dial(#[from] TransportError),
    /// The connection broke during the handshake.
    #[error("the connection to {remote} broke during the handshake: {error}")]
    Io {
        /// The peer's address.
        remote: SocketAddr,
        /// What happened.
        error: io::Error,
    },
    /// The peer's acceptor said no.
    #[error("{remote} refused: {}", refusal(*.status))]
    Refused {
        /// The peer's address.
        remote: SocketAddr,
        /// Its answer.
        status: Status,
    },
    /// What listens there is not a Holdfast agent, or a broken one.
    #[error("{remote} does not answer as a Holdfast agent: {error}")]
    Wire {
        /// The address.
        remote: SocketAddr,
        /// What was wrong.
        error: WireError,
    },
    /// One of the two did not accept the other.
    #[error("{0}")]
    Handshake(#[from] HandshakeError),
    /// The session's first records were wrong.
    #[error("the first records from {remote} are wrong: {fault}")]
    Session {
        /// The peer's address.
        remote: SocketAddr,
        /// What was wrong.
        fault: TransportFault,
    },
    /// The peer closed the session at once.
    #[error("{remote} closed the session at once: {reason}")]
    Closed {
        /// The peer's address.
        remote: SocketAddr,
        /// Its reason.
        reason: String,
    },
    /// It took too long.
    #[error("{remote} did not complete the handshake within {after:?}")]
    Timeout {
        /// The peer's address.
        remote: SocketAddr,
        /// The limit.
        after: Duration,
    },
}

fn refusal(status: Status) -> &'static str {
    match status {
        Status::Ok => "nothing",
        Status::Version => {
            "it speaks no version of the protocol that this unit speaks: upgrade the older one"
        }
        Status::UnknownSession => "it does not know the session",
        Status::Busy => "it is at a limit (max_sessions or handshakes): try again later",
        Status::Draining => "it is shutting down",
    }
}

impl EstablishError {
    /// Whether the peer's host said that nothing listens there. A connection that was made and
    /// then broke says less: a captive portal does that to everybody.
    pub fn is_refused(&self) -> bool {
        matches!(self, Self::Dial(error) if error.is_refused())
    }
}

/// Dials a peer and makes a session with it.
pub async fn initiate(request: Request) -> Result<Established, EstablishError> {
    let spec = DialSpec {
        device: Some(request.path.link.clone()),
        source: Some(request.path.source),
        remote: request.path.remote,
        timeout: request.dial_timeout,
        segment: request.segment,
        // ClientHello is larger than a SYN, so that little would be gained; a replayed one would cost the
        // peer a handshake; and whoever waits for a first session is to hear at once that nobody answers.
        fast_open: false,
    };
    if let Some(window) = &request.window {
        window.before_dial(request.path.source, request.path.remote, None);
    }
    let stream = dial(&spec, &request.transport).await?;
    initiate_over(request, stream).await
}

/// Makes a session with the peer at the other end of `stream`.
pub async fn initiate_over(
    request: Request,
    stream: TcpStream,
) -> Result<Established, EstablishError> {
    let (remote, after) = (request.path.remote, request.handshake_timeout);
    let handshake = initiate_on(request, stream);
    tokio::time::timeout(after, handshake)
        .await
        .map_err(|_| EstablishError::Timeout { remote, after })?
}

async fn initiate_on(
    request: Request,
    mut stream: TcpStream,
) -> Result<Established, EstablishError> {
    let remote = request.path.remote;
    let broke = |error| EstablishError::Io { remote, error };
    let local = stream.local_addr().map_err(broke)?;
    let path = Path {
        link: request.path.link.clone(),
        local,
        remote,
    };

    let mut first = Vec::with_capacity(64);
    Preamble::new(Kind::Full).encode(&mut first);
    stream.write_all(&first).await.map_err(broke)?;
    let mut input = BytesMut::with_capacity(16 * 1024);
    read_reply(&mut stream, &mut input, remote).await?;

    let (outcome, mut tail) = handshake::connect(
        &mut stream,
        &mut input,
        &request.identity,
        &request.peer_name,
    )
    .await?;
    let clock = Clock::start();
    let secret = session_secret(&outcome);
    let config = seeded(request.session).map_err(broke)?;
    let (session, handle) = Session::initiate(clock.now(), config, secret, request.continues);
    let mut made = Established {
        session,
        handle,
        stream,
        input,
        peer: outcome.peer,
        clock,
        path,
    };
    loop {
        made.write().await.map_err(broke)?;
        // TLS alerts and our records never begin with the same byte, so each finds its reader.
        if tail.take_alerts(&mut made.input)? {
            made.read().await.map_err(broke)?;
            continue;
        }
        match made.take_event()? {
            Some(Event::Accepted(_)) => return Ok(made),
            Some(Event::Closed { reason, .. }) => {
                return Err(EstablishError::Closed { remote, reason });
            }
            Some(_) => {}
            None => made.read().await.map_err(broke)?,
        }
    }
}

/// Completes a full handshake with a peer that dialled; the preamble has been read and answered.
pub async fn respond(
    identity: Arc<Identity>,
    stream: TcpStream,
    input: BytesMut,
    after: Duration,
    config: Config,
) -> Result<Pending, EstablishError> {
    let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
    let remote = stream.peer_addr().unwrap_or(unknown);
    let handshake = respond_on(identity, stream, input, config);
    tokio::time::timeout(after, handshake)
        .await
        .map_err(|_| EstablishError::Timeout { remote, after })?
}

async fn respond_on(
    identity: Arc<Identity>,
    mut stream: TcpStream,
    mut input: BytesMut,
    config: Config,
) -> Result<Pending, EstablishError> {
    let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
    let remote = stream.peer_addr().unwrap_or(unknown);
    let broke = |error| EstablishError::Io { remote, error };
    let local = stream.local_addr().map_err(broke)?;
    let outcome = handshake::accept(&mut stream, &mut input, &identity).await?;
    let clock = Clock::start();
    let config = seeded(config).map_err(broke)?;
    let (session, handle) = Session::respond(clock.now(), config, session_secret(&outcome));
    let path = Path {
        link: String::new(),
        local,
        remote,
    };
    let peer = outcome.peer.clone();
    let mut made = Established {
        session,
        handle,
        stream,
        input,
        peer: outcome.peer,
        clock,
        path,
    };
    loop {
        match made.take_event()? {
            Some(Event::Hello(hello)) => {
                return Ok(Pending {
                    peer,
                    hello,
                    established: made,
                });
            }
            Some(Event::Closed { reason, .. }) => {
                return Err(EstablishError::Closed { remote, reason });
            }
            Some(_) => {}
            None => made.read().await.map_err(broke)?,
        }
    }
}

/// Each session challenges addresses with what no other does.
fn seeded(config: Config) -> io::Result<Config> {
    let mut seed = [0; 32];
    SystemRandom::new()
        .fill(&mut seed)
        .map_err(|_| io::Error::other("the kernel gives no random bytes"))?;
    Ok(Config {
        challenge_seed: Secret::new(seed),
        ..config
    })
}

fn session_secret(outcome: &Outcome) -> SessionSecret {
    SessionSecret::new(outcome.aead, &Secret::new(outcome.secret))
}

async fn read_reply(
    stream: &mut TcpStream,
    input: &mut BytesMut,
    remote: SocketAddr,
) -> Result<(), EstablishError> {
    loop {
        let reply = Reply::parse(input).map_err(|error| EstablishError::Wire { remote, error })?;
        if let Some(reply) = reply {
            if reply.status != Status::Ok {
                return Err(EstablishError::Refused {
                    remote,
                    status: reply.status,
                });
            }
            input.advance(Reply::BYTES);
            return Ok(());
        }
        let read = stream
            .read_buf(input)
            .await
            .map_err(|error| EstablishError::Io { remote, error })?;
        if read == 0 {
            let error = io::ErrorKind::UnexpectedEof.into();
            return Err(EstablishError::Io { remote, error });
        }
    }
}

impl Established {
    /// The next event, after the core has taken what was read.
    fn take_event(&mut self) -> Result<Option<Event>, EstablishError> {
        if let Some(event) = self.session.poll_event() {
            return Ok(Some(event));
        }
        let remote = self.path.remote;
        let now = self.clock.now();
        self.session
            .handle_bytes(now, self.handle, &mut self.input)
            .map_err(|fault| EstablishError::Session { remote, fault })?;
        Ok(self.session.poll_event())
    }

    /// Closes a session that is not needed after all, so that the peer does not hold it.
    pub async fn decline(mut self) {
        self.session
            .close(self.clock.now(), close_code::NO_ERROR, "it is not needed");
        // A peer that does not hear of it closes it when its hold time is over.
        let told = tokio::time::timeout(DECLINE_TIMEOUT, self.write()).await;
        if !matches!(told, Ok(Ok(()))) {
            tracing::debug!(remote = %self.path.remote, "a session that is not needed was left to its hold time");
        }
    }

    async fn read(&mut self) -> io::Result<()> {
        if self.stream.read_buf(&mut self.input).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    async fn write(&mut self) -> io::Result<()> {
        while self.session.prepare(self.clock.now(), self.handle) {
            let mut slices = [IoSlice::new(&[]); 8];
            let filled = self.session.slices(self.handle, &mut slices);
            let written = self.stream.write_vectored(&slices[..filled]).await?;
            self.session
                .transmitted(self.clock.now(), self.handle, written);
        }
        Ok(())
    }
}
