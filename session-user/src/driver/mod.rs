//! One task that owns a session and all its sockets.
//!
//! The flow of every turn (`turn.rs`): (1) wait until something happened: a socket is ready, a command came,
//! a link changed, a deadline passed; (2) apply it to the session, synchronously; (3) act on the
//! session's events; (4) write what the session has for each transport; (5) set the next deadline.
//! Nothing else calls the session, so its order of events is the order of turns.

mod alarm;
mod app;
mod blocked;
mod busy;
mod carrier;
mod chores;
mod datagrams;
mod dialling;
pub mod establish;
mod handover;
mod initiator;
mod input;
mod lanes;
mod links;
mod manual;
mod moves;
mod narrow;
mod news;
mod opening;
mod pacing;
mod patience;
mod quiet;
pub mod ready;
mod reauth;
mod rejoin;
mod report;
mod side;
mod standby;
mod streams;
#[cfg(test)]
mod tests;
mod turn;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use session_proto::Time;
use session_proto::session::{Event, FlowId, Handle, Session, StreamId, UdpPath};
use session_proto::wire::{ConnectionId, ResumeToken, Target};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};

use app::App;
use blocked::Blocked;
use busy::BusyPoll;
use carrier::Carrier;
use chores::{ChoreId, Chores};
use datagrams::Datagrams;
pub use datagrams::{DatagramCounters, FlowReport, Inbound, Listening, UdpReport};
pub use establish::Established;
pub use initiator::{Initiator, InitiatorConfig};
use lanes::OwnLanes;
use news::News;
use ready::ReadySet;
use reauth::Reauthentication;
pub use report::{CarrierReport, SessionSnapshot, StreamReport};
use session_proto::session::SendBuf;
pub use streams::Responder;

use crate::handshake::{Identity, PeerIdentity};
use crate::requests::AppStream;
use crate::trace::{SessionTrace, Trace};
use crate::transport::{InitialWindow, TransportOptions};

/// Turns the session's monotonic time into the driver's and back.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    /// A clock whose origin is now.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// The session's time.
    pub fn now(&self) -> Time {
        Time::from_nanos(u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// The driver's time.
    pub fn instant(&self, time: Time) -> Instant {
        self.0 + Duration::from_nanos(time.as_nanos())
    }
}

/// What the rest of the agent tells a driver.
#[derive(Debug)]
pub enum Command {
    /// A socket whose preamble named one of this session's tokens.
    Accept {
        /// The token's counter.
        counter: u64,
        /// The socket.
        stream: TcpStream,
        /// What was read behind the preamble.
        input: BytesMut,
    },
    /// The peer proved in a full handshake that it holds this session and dials with this counter.
    Expect(u64),
    /// Move to a link by name; `auto`: back to what the policy says.
    Handover {
        /// The link.
        link: String,
        /// The outcome in words.
        reply: oneshot::Sender<Result<String, String>>,
    },
    /// What this session is doing.
    Report(oneshot::Sender<SessionSnapshot>),
    /// The host has slept.
    Woke,
    /// Certificates are to be judged again: the CRL was read anew, or an hour has passed.
    CheckIdentity,
    /// End the session.
    Close {
        /// One of [`close_code`].
        code: u64,
        /// For people, at both ends.
        reason: String,
    },
}

/// Who must know under which names a session can be resumed.
pub trait TokenBook: Send + Sync {
    /// The session's tokens are now these.
    fn set(&self, session: [u8; 16], tokens: Vec<(ResumeToken, u64)>);

    /// The session's packets come under these names now.
    fn set_connections(&self, session: [u8; 16], ids: Vec<ConnectionId>);
}

/// What is the same for every session of a unit.
#[derive(Clone)]
pub struct Common {
    /// This unit's keys and certificates.
    pub identity: Arc<Identity>,
    /// Where handovers are told.
    pub trace: Arc<Trace>,
    /// Where resumes are announced.
    pub tokens: Arc<dyn TokenBook>,
    /// How long a session lives without a transport.
    pub hold: Duration,
    /// Options of transport sockets.
    pub transport: TransportOptions,
    /// How long news is looked for before a driver sleeps; zero: it sleeps at once.
    pub busy_poll: Duration,
    /// Sets how much a new transport may send at once, where the kernel allows it.
    pub window: Option<Arc<InitialWindow>>,
    /// Time for a dialled transport to authenticate.
    pub resume_timeout: Duration,
    /// When keys and certificates are renewed in band at the latest.
    pub reauth_after: Duration,
    /// How long after its certificate's expiry a session may go on without renewal.
    pub expiry_grace: Duration,
}

/// What only one of the two roles does.
pub enum Side {
    /// Dials transports, opens streams for captured sockets.
    Initiator(Box<Initiator>),
    /// Accepts transports, dials targets.
    Responder(Box<Responder>),
}

/// How a session ended.
#[derive(Debug)]
pub enum Ended {
    /// By CLOSE of either end.
    Closed {
        /// One of [`close_code`].
        code: u64,
        /// For people.
        reason: String,
        /// Whether the peer closed it.
        by_peer: bool,
    },
    /// The peer proved by a full handshake that it no longer knows the session; the handshake has
    /// made a new one.
    Replaced(Box<Established>),
    /// Every path refused transports for the configured time.
    PeerGone,
}

/// What a source of the ready set is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    App(StreamId),
    Carrier(Handle),
    /// One of the session's own UDP sockets.
    Udp(UdpPath),
    /// The socket of a flow to its target.
    Flow(FlowId),
    /// One that flows share.
    Group(datagrams::GroupKey),
    /// What is under way for a stream.
    Chore(ChoreId),
    /// What is neither.
    News(news::Kind),
}

impl Name {
    /// What it is to whoever waits.
    fn heard(self) -> busy::Heard {
        match self {
            Self::App(_) => busy::Heard::Socket(busy::Speaker::Near),
            Self::Carrier(_) => busy::Heard::Socket(busy::Speaker::Far),
            Self::News(news::Kind::Alarm) => busy::Heard::Deadline,
            _ => busy::Heard::Others,
        }
    }
}

/// What the driver's own tasks bring back.
enum Internal {
    Dialled(dialling::Dialled),
    Rejoined {
        path: crate::policy::Path,
        result: Result<Box<Established>, establish::EstablishError>,
    },
    Target {
        id: StreamId,
        target: Target,
        result: Result<AppStream, crate::dial::DialError>,
    },
    Flow {
        id: FlowId,
        addresses: Result<Vec<SocketAddr>, crate::dial::DialError>,
    },
    Seated {
        id: StreamId,
        socket: Option<AppStream>,
    },
}

/// The driver of one session.
pub struct Driver {
    session: Session,
    clock: Clock,
    common: Common,
    peer: PeerIdentity,
    side: Side,
    ready: ReadySet<Name>,
    busy: BusyPoll,
    news: News,
    chores: Chores,
    apps: BTreeMap<StreamId, App>,
    /// The lanes that these ask for to themselves.
    own_lanes: OwnLanes,
    /// Streams whose application waits for the target's answer.
    awaiting: BTreeMap<StreamId, streams::Awaiting>,
    /// Boxed, as most sessions have one or two, and a node of the map has room for eleven.
    carriers: BTreeMap<Handle, Box<Carrier>>,
    datagrams: Datagrams,
    /// What each path delivered when its rate was last limited, in bytes a second, by our address and the
    /// peer's.
    rates: BTreeMap<(IpAddr, IpAddr), u64>,
    /// The same of the transport that carried last.
    session_rate: Option<u64>,
    /// The active transport, as of the last turn.
    carrying: Option<Handle>,
    /// The transports of redundant streams, as of the last turn.
    paired: Option<[Handle; 2]>,
    /// TCP connections attempted.
    attempts: u64,
    /// The carriers of one flush; kept, so that it allocates once.
    flushing: Vec<Handle>,
    /// Streams that had something to send and no capacity.
    blocked: Blocked,
    /// A read buffer that was not used up.
    spare: Option<SendBuf>,
    reauth: Option<Reauthentication>,
    keys_since: Instant,
    schedule: reauth::Schedule,
    internal_tx: mpsc::UnboundedSender<Box<Internal>>,
    internal_rx: mpsc::UnboundedReceiver<Box<Internal>>,
    /// Since when no transport stands.
    adrift_since: Option<Instant>,
    started_wall: std::time::SystemTime,
    /// Rounds of `settle`.
    turns: u64,
    report: handover::Counters,
    ended: Option<Ended>,
}

impl Driver {
    /// A driver for a session that has just been established.
    pub fn new(established: Established, common: Common, mut side: Side) -> Box<Self> {
        let Established {
            session,
            handle,
            stream,
            input,
            peer,
            clock,
            path,
        } = established;
        let (internal_tx, internal_rx) = mpsc::unbounded_channel();
        let ready = ReadySet::new();
        let listening = side.take_listening();
        let trace = SessionTrace::begin(
            Arc::clone(&common.trace),
            session.id(),
            &peer.name.to_string(),
            matches!(side, Side::Initiator(_)),
            (path.local, path.remote),
        );
        let mut driver = Box::new(Self {
            session,
            clock,
            busy: BusyPoll::new(common.busy_poll),
            common,
            peer,
            side,
            news: News::new(&ready),
            ready,
            chores: Chores::default(),
            apps: BTreeMap::new(),
            own_lanes: OwnLanes::default(),
            awaiting: BTreeMap::new(),
            carriers: BTreeMap::new(),
            datagrams: Datagrams::new(listening),
            rates: BTreeMap::new(),
            session_rate: None,
            carrying: None,
            paired: None,
            attempts: 0,
            flushing: Vec::new(),
            blocked: Blocked::default(),
            spare: None,
            reauth: None,
            keys_since: Instant::now(),
            schedule: reauth::Schedule::new(Instant::now()),
            internal_tx,
            internal_rx,
            adrift_since: None,
            started_wall: std::time::SystemTime::now(),
            turns: 0,
            report: handover::Counters::new(trace),
            ended: None,
        });
        if let Side::Initiator(initiator) = &mut driver.side {
            // What the session begins with is path 0.
            initiator.route(&path.link, path.remote, 0);
        }
        driver.add_carrier(handle, stream, input, path);
        driver.stands(handle);
        driver.carrying = driver.session.active();
        driver.tend_udp();
        driver.plan_renewal();
        driver.check_identity();
        driver
    }

    fn handle_command(&mut self, command: Command) {
        match command {
            Command::Accept {
                counter,
                stream,
                input,
            } => self.accept_carrier(counter, stream, input),
            Command::Expect(counter) => self.session.expect_counter(counter),
            Command::Handover { link, reply } => self.manual_handover(&link, reply),
            Command::Report(reply) => {
                // Whoever asked may have gone; there is nobody else to tell.
                let _ = reply.send(self.snapshot());
            }
            Command::Woke => self.woke(),
            Command::CheckIdentity => self.check_identity(),
            Command::Close { code, reason } => self.session.close(self.clock.now(), code, &reason),
        }
    }

    fn handle_internal(&mut self, internal: Internal) {
        match internal {
            Internal::Dialled(dialled) => self.dialled(dialled),
            Internal::Rejoined { path, result } => self.rejoined(&path, result),
            Internal::Target { id, target, result } => self.target_dialled(id, target, result),
            Internal::Flow { id, addresses } => self.far_resolved(id, addresses),
            Internal::Seated { id, socket } => self.seated(id, socket),
        }
    }

    fn handle_event(&mut self, event: Event) {
        match event {
            Event::StreamOpened { id, target } => self.stream_opened(id, target),
            Event::StreamConnected(id) => self.stream_connected(id),
            Event::StreamRefused { id, errno } => self.stream_refused(id, errno),
            Event::StreamReset { id, code } => self.stream_reset(id, code),
            Event::Readable(id) => self.app_write(id),
            Event::Writable => self.blocked.room_came(),
            Event::StreamWritable(id) => self.unblock_one(id),
            Event::StreamsAvailable => self.streams_available(),
            Event::TransportUp(handle) => self.transport_up(handle),
            Event::TransportDone(handle) => {
                self.transport_done(handle);
                // The peer may have lost it; what carries then is for the policy to say.
                self.decide();
            }
            Event::TransportSilent(handle) => self.transport_silent(handle),
            Event::HandedOver { from, .. } => self.handed_over(from),
            Event::Pong { handle, token } => tracing::trace!(?handle, token, "pong"),
            Event::TokensChanged => self
                .common
                .tokens
                .set(self.session.id(), self.session.expected_tokens()),
            Event::ReauthData { data, .. } => self.reauth_data(&data),
            Event::Reauthenticated { generation } => self.reauthenticated(generation),
            Event::Closed {
                code,
                reason,
                by_peer,
            } => {
                self.reset_all_apps();
                self.ended.get_or_insert(Ended::Closed {
                    code,
                    reason,
                    by_peer,
                });
            }
            // Both belong to the establishing of a session, which is over.
            Event::Hello(_) | Event::Accepted(_) => {}
        }
    }

    fn note_adrift(&mut self) {
        let stands = self.session.transports().any(|h| self.session.is_up(h));
        match (stands, self.adrift_since) {
            (true, Some(_)) => self.adrift_since = None,
            (false, None) => self.adrift_since = Some(Instant::now()),
            _ => {}
        }
    }

    /// Leaves nothing behind: names, sockets, tasks.
    async fn part(&mut self, ended: &Ended) {
        self.tell_end(ended);
        self.common.tokens.set(self.session.id(), Vec::new());
        self.common
            .tokens
            .set_connections(self.session.id(), Vec::new());
        self.reset_all_apps();
        self.side.abort_tasks();
        let carriers = std::mem::take(&mut self.carriers);
        for (_, carrier) in carriers {
            carrier.finish();
        }
        tokio::task::yield_now().await;
    }
}
