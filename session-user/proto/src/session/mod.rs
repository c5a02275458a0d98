//! The session: a long-lived secure association of two units that outlives every transport.
//!
//! The methods come in families. `handle_*` and the plain verbs say that something happened; the
//! driver then drains, in this order: [`Session::poll_event`] until `None`, [`Session::prepare`]
//! and [`Session::slices`] for each transport whose socket can be written, and
//! [`Session::poll_timeout`] for the next deadline. One that serves flows also drains
//! [`Session::poll_datagram`], [`Session::poll_flow_event`] and, last, [`Session::poll_udp`].
//!
//! What must never be: a byte leaves the send buffer without the peer's acknowledgement; a record
//! is sealed twice; a record number is used twice under one key; credit is granted beyond the
//! memory kept for it.

mod app;
mod beginning;
mod buf;
mod chooser;
mod config;
mod datagrams;
mod ease;
mod event;
mod flow;
mod frames;
mod hedge;
#[cfg(feature = "sim")]
mod inspect;
mod lanes;
mod memory;
mod packing;
mod pair;
mod pieces;
mod pool;
mod pulse;
mod rate;
mod receive;
mod rekey;
mod resume;
mod retained;
mod rivals;
mod schedule;
mod stream;
mod term;
mod transmit;
mod transport;
mod udp;
mod unpacking;
mod urgent;
mod window;

use std::collections::{BTreeMap, VecDeque};

pub use buf::SendBuf;
pub use config::{Compression, Config, Role, Stats};
pub use datagrams::{DatagramInfo, FlowError, FlowEvent, FlowId, FlowStats};
pub use event::{Event, Handle, StreamError, StreamId, TransportFault};
pub use lanes::{Lack, LaneChoice, Way, own_lane};
pub use memory::SharedMemory;
pub use packing::{PackedTotals, StreamPacking};
pub use udp::{PacketFault, UdpPath, UdpStatus, UdpTransmit};

use crate::Time;
use crate::limits::CLOSE_LINGER;
use crate::ranges::RangeSet;
use crate::seal::{Aead, Epoch, OpenKeys, SealKeys, SessionNames, SessionSecret};
use crate::wire::{Frame, Params};
use datagrams::Datagrams;
use ease::Easing;
use event::Violation;
use flow::Flow;
use hedge::Hedge;
use packing::Packings;
use pool::Pool;
use rekey::{Epochs, Reauth};
use retained::Retained;
use stream::Stream;
pub use term::Firsts;
use transmit::AckState;
use transport::{Phase, Transport, Transports};
use udp::Udp;

/// How far the session has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Initiator: HELLO is queued or sent.
    AwaitAccept,
    /// Responder: nothing has come.
    AwaitHello,
    /// Responder: the driver has not called [`Session::accept`].
    AwaitDecision,
    Open,
    /// CLOSE is queued or sent; `number` is its record's once it is sealed.
    Closing {
        until: Time,
        number: Option<u64>,
    },
    Closed,
}

/// One session of two units; see the module's text for how to drive it.
#[derive(Debug)]
pub struct Session {
    role: Role,
    config: Config,
    names: SessionNames,
    seal: SealKeys,
    open: OpenKeys,
    epochs: Epochs,
    reauth: Option<Reauth>,
    state: State,
    peer: Params,

    retained: Retained,
    /// Buffers of records.
    pool: Pool,
    /// Frames of the record that is being made; kept, so that it is allocated once.
    frames: Vec<u8>,
    received: RangeSet,
    /// Number and epoch of the record that is being handled.
    opened: (u64, Epoch),
    /// Buffers that pieces of `streams` came in and hold on to, and pieces that lie beyond gaps.
    loose_buffers: usize,
    pieces_ahead: usize,
    ack: AckState,

    transports: Transports,
    next_handle: u64,
    active: Option<Handle>,
    hedge: Option<Hedge>,
    easing: Option<Easing>,
    /// The latest time that the driver told.
    now: Time,
    pings: u64,
    status_sent: u64,
    /// Our latest request: on which transport, to use it, and whether it was a hard one.
    status_last: Option<(Handle, bool)>,
    status_seen: u64,
    dial_next: u64,
    accepted_highest: u64,

    streams: BTreeMap<StreamId, Stream>,
    /// Redundant ones among them.
    doubled_streams: usize,
    flow: Flow,
    packings: Packings,
    /// Encoded frames for space R that wait to be sealed, in order.
    control: VecDeque<Vec<u8>>,
    /// The driver found no capacity for want of memory, of a stream's credit, or of room in a queue,
    /// and is to be told when there is some. What one of them waits for is no news to the others.
    wants_room: bool,
    wants_credit: bool,
    wants_queue: bool,
    /// When a transport that takes nothing is waited for no more, of a pair or of an eased move.
    room_due: Option<Time>,

    datagrams: Datagrams,
    udp: Udp,

    events: VecDeque<Event>,
    stats: Stats,
}

impl Session {
    /// The initiator's end of a session whose full handshake is complete, and the transport that
    /// the handshake ran on. `continues` names a session that this unit still holds and whose
    /// resume was refused.
    pub fn initiate(
        now: Time,
        config: Config,
        secret: SessionSecret,
        continues: Option<([u8; 16], u64)>,
    ) -> (Self, Handle) {
        let mut session = Self::new(now, Role::Initiator, config, &secret);
        let handle = session.first_transport();
        let params = Params {
            continues,
            ..session.our_params()
        };
        let mut body = Vec::new();
        params.encode(&mut body);
        session.send_unretained(handle, &Frame::Hello { params: &body });
        (session, handle)
    }

    /// The responder's end; [`Event::Hello`] follows when the initiator's first record arrives.
    pub fn respond(now: Time, config: Config, secret: SessionSecret) -> (Self, Handle) {
        let mut session = Self::new(now, Role::Responder, config, &secret);
        let handle = session.first_transport();
        (session, handle)
    }

    fn new(now: Time, role: Role, config: Config, secret: &SessionSecret) -> Self {
        let seal = secret.seal_keys(role.sends());
        let open = secret.open_keys(role.receives());
        let state = match role {
            Role::Initiator => State::AwaitAccept,
            Role::Responder => State::AwaitHello,
        };
        let flow = Flow::new(&config);
        let epochs = Epochs::new(seal.epoch(), now);
        let udp = Udp::new(config.challenge_seed.clone());
        let packings = Packings::new(config.unpacks());
        // Those of records that are retained may take as much.
        let pool = Pool::new(config.memory_bytes / 2);
        let retained = Retained::within(config.shared_memory.sending());
        Self {
            role,
            config,
            names: secret.names(),
            seal,
            open,
            epochs,
            reauth: None,
            state,
            peer: Params::default(),
            retained,
            pool,
            frames: Vec::new(),
            received: RangeSet::new(),
            opened: (0, Epoch::default()),
            loose_buffers: 0,
            pieces_ahead: 0,
            ack: AckState::default(),
            transports: Transports::default(),
            next_handle: 0,
            active: None,
            hedge: None,
            easing: None,
            now,
            pings: 0,
            status_sent: 0,
            status_last: None,
            status_seen: 0,
            dial_next: 1,
            accepted_highest: 0,
            streams: BTreeMap::new(),
            doubled_streams: 0,
            flow,
            packings,
            control: VecDeque::new(),
            wants_room: false,
            wants_credit: false,
            wants_queue: false,
            room_due: None,
            datagrams: Datagrams::default(),
            udp,
            events: VecDeque::new(),
            stats: Stats::default(),
        }
    }

    fn first_transport(&mut self) -> Handle {
        let initiated = self.role == Role::Initiator;
        let handle = self.add_transport(Transport::new(Phase::Up, 0, initiated));
        self.active = Some(handle);
        handle
    }

    /// Responder: answers [`Event::Hello`]. `continued` says whether the session that the
    /// initiator named is still held here.
    pub fn accept(&mut self, continued: Option<bool>) {
        if self.state != State::AwaitDecision {
            return;
        }
        self.state = State::Open;
        let params = Params {
            continued,
            ..self.our_params()
        };
        let mut body = Vec::new();
        params.encode(&mut body);
        if let Some(handle) = self.active {
            self.send_unretained(handle, &Frame::Accept { params: &body });
        }
        self.events.push_back(Event::TokensChanged);
    }

    fn our_params(&self) -> Params {
        Params {
            instance: self.config.instance,
            initial_max_data: self.flow.recv_max,
            initial_max_stream_data: self.flow.initial_window,
            initial_max_streams: self.config.max_streams,
            record_window: crate::limits::RECORD_WINDOW,
            max_record: crate::limits::RECORD_PAYLOAD_BYTES_MAX as u64,
            max_flows: self.config.max_flows,
            flow_features: self.config.flow_features,
            codecs: self.config.codecs(),
            packed_streams: self.config.unpacks() as u64,
            continues: None,
            continued: None,
            software: self.config.software.clone(),
        }
    }

    fn adopt_peer(&mut self, params: Params) {
        self.flow.send_max = params.initial_max_data;
        self.flow.local_max = params.initial_max_streams;
        self.peer = params;
    }

    /// The next event, oldest first.
    #[must_use]
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`Self::handle_timeout`] must be called next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        if self.is_closed() {
            return None;
        }
        let ack = self.ack.deadline.filter(|_| self.ack_target().is_some());
        let close = match self.state {
            State::Closing { until, .. } => Some(until),
            _ => None,
        };
        let flows = [self.datagram_deadline(), self.udp_deadline()];
        let packing = self.packings.idle_at();
        let own = [ack, close, self.pulse_deadline(), self.room_due, packing];
        own.into_iter().chain(flows).flatten().min()
    }

    /// A deadline of [`Self::poll_timeout`] has passed: call [`Self::prepare`] for every transport
    /// afterwards, and [`Self::poll_udp`].
    pub fn handle_timeout(&mut self, now: Time) {
        self.now = now;
        if let State::Closing { until, .. } = self.state
            && now >= until
        {
            self.state = State::Closed;
        }
        self.check_pulses(now);
        self.check_room(now);
        self.check_packing(now);
        self.check_datagrams(now);
        self.check_udp(now);
    }

    /// When [`Self::rest`] is due. Nothing but memory hangs on it.
    #[must_use]
    pub fn rest_at(&self) -> Option<Time> {
        self.pool.rest_at()
    }

    /// Gives buffers back that were not needed of late; true if none was. What applications have not read holds on to none
    /// from here on.
    pub fn rest(&mut self, now: Time) -> bool {
        if self.rest_at().is_some_and(|at| now >= at) {
            self.settle_pieces();
        }
        self.pool.rest(now)
    }

    /// Ends the session: every stream is gone at once, and CLOSE is sent on the active transport.
    pub fn close(&mut self, now: Time, code: u64, reason: &str) {
        if self.is_ending() {
            return;
        }
        self.drop_streams();
        let mut frame = Vec::new();
        Frame::Close {
            code,
            reason: reason.as_bytes(),
        }
        .encode(&mut frame);
        self.control.push_back(frame);
        self.state = State::Closing {
            until: now + CLOSE_LINGER,
            number: None,
        };
        self.events.push_back(Event::Closed {
            code,
            reason: reason.to_owned(),
            by_peer: false,
        });
    }

    fn violated(&mut self, now: Time, violation: Violation) {
        self.close(now, violation.code, violation.what);
    }

    fn drop_streams(&mut self) {
        for stream in self.streams.values() {
            self.flow.forget(stream);
        }
        self.streams.clear();
        self.packings = Packings::new(self.config.unpacks());
        self.doubled_streams = 0;
        self.control.clear();
        self.flow.credit_due.clear();
        self.datagrams.clear();
    }

    /// Whether the session is closing or closed.
    pub fn is_ending(&self) -> bool {
        matches!(self.state, State::Closing { .. } | State::Closed)
    }

    /// Whether nothing more is to be sent or awaited.
    pub fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    /// Whether streams can be opened.
    pub fn is_open(&self) -> bool {
        self.state == State::Open
    }

    /// Which end this is.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The session's name for people; the same at both ends.
    pub fn id(&self) -> [u8; 16] {
        self.names.session_id()
    }

    /// What the peer said of itself; all zero before HELLO or ACCEPT.
    pub fn peer(&self) -> &Params {
        &self.peer
    }

    /// What records are sealed with.
    pub fn aead(&self) -> Aead {
        self.seal.aead()
    }

    /// The transport that new records go to.
    pub fn active(&self) -> Option<Handle> {
        self.active
    }

    /// All transports, oldest first.
    pub fn transports(&self) -> impl Iterator<Item = Handle> + '_ {
        self.transports.keys().copied()
    }

    /// Open streams.
    pub fn streams(&self) -> impl Iterator<Item = StreamId> + '_ {
        self.streams.keys().copied()
    }

    /// Whether the peer has aborted `id` and the application has not heard of it, since it has not taken all that came
    /// before. There is no capacity then.
    pub fn is_aborted(&self, id: StreamId) -> bool {
        self.streams
            .get(&id)
            .is_some_and(|s| s.recv.reset.is_some())
    }

    /// Whether a stream is open.
    pub fn has_stream(&self, id: StreamId) -> bool {
        self.streams.contains_key(&id)
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Bytes held for the peer and for applications: retained records, received data and frames
    /// that wait. Never above [`Config::memory_bytes`]; datagrams are apart, in
    /// [`Self::flow_memory_bytes`].
    pub fn memory_bytes(&self) -> usize {
        let received: usize = self.streams.values().map(|s| s.recv.buffered()).sum();
        let control: usize = self.control.iter().map(Vec::len).sum();
        self.retained.bytes() + received + control
    }

    /// Bytes that are sealed and not acknowledged.
    pub fn retained_bytes(&self) -> usize {
        self.retained.bytes()
    }

    fn add_transport(&mut self, transport: Transport) -> Handle {
        let handle = Handle(self.next_handle);
        self.next_handle += 1;
        self.transports.insert(handle, transport);
        handle
    }
}
