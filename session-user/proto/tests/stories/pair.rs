//! Two sessions and the bytes between them, moved by hand.

use std::io::IoSlice;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use session_proto::Time;
use session_proto::seal::{Aead, Secret, SessionSecret};
use session_proto::session::{Config, Event, Handle, SendBuf, Session, StreamId, TransportFault};
use session_proto::wire::{Kind, Preamble, RecordHeader, Route, Space, Target};

/// The initiator, the responder and their transports.
pub struct Pair {
    pub now: Time,
    pub a: Session,
    pub b: Session,
    /// Both ends' names of each transport that connects them.
    pub wires: Vec<(Handle, Handle)>,
    pub events_a: Vec<Event>,
    pub events_b: Vec<Event>,
}

/// The secret of every pair.
pub fn secret() -> SessionSecret {
    SessionSecret::new(Aead::Aes128Gcm, &Secret::new([7; 32]))
}

/// A target that nobody dials.
pub fn target() -> Target {
    Target::Name("host.example".to_owned(), 80)
}

/// Everything that `session` has for `handle`.
pub fn drain(now: Time, session: &mut Session, handle: Handle) -> Vec<u8> {
    let mut out = Vec::new();
    while session.prepare(now, handle) {
        let mut slices = [IoSlice::new(&[]); 64];
        let filled = session.slices(handle, &mut slices);
        let mut taken = 0;
        for slice in &slices[..filled] {
            out.extend_from_slice(slice);
            taken += slice.len();
        }
        session.transmitted(now, handle, taken);
    }
    out
}

/// Hands `bytes` to `session`, all at once.
pub fn feed(
    now: Time,
    session: &mut Session,
    handle: Handle,
    bytes: &[u8],
) -> Result<(), TransportFault> {
    session.handle_bytes(now, handle, &mut BytesMut::from(bytes))
}

impl Pair {
    /// Two ends whose full handshake is over and that have exchanged nothing.
    pub fn fresh(config: &Config) -> Self {
        let now = Time::from_nanos(1_000_000);
        let (a, on_a) = Session::initiate(now, config.clone(), secret(), None);
        let (b, on_b) = Session::respond(now, config.clone(), secret());
        Self {
            now,
            a,
            b,
            wires: vec![(on_a, on_b)],
            events_a: Vec::new(),
            events_b: Vec::new(),
        }
    }

    /// Two open ends, without events.
    pub fn open(config: &Config) -> Self {
        let mut pair = Self::fresh(config);
        pair.run();
        pair.b.accept(None);
        pair.run();
        assert!(pair.a.is_open() && pair.b.is_open());
        pair.events_a.clear();
        pair.events_b.clear();
        pair
    }

    /// Carries bytes both ways, and lets time pass, until nothing moves any more.
    pub fn run(&mut self) {
        for _ in 0..10_000 {
            let moved = self.carry();
            self.collect();
            if moved {
                continue;
            }
            let due = [self.a.poll_timeout(), self.b.poll_timeout()];
            let Some(next) = due.into_iter().flatten().min() else {
                return;
            };
            self.now = self.now.max(next);
            self.a.handle_timeout(self.now);
            self.b.handle_timeout(self.now);
        }
        panic!("the two ends do not come to rest");
    }

    fn carry(&mut self) -> bool {
        let mut moved = false;
        for (on_a, on_b) in self.wires.clone() {
            let there = drain(self.now, &mut self.a, on_a);
            let back = drain(self.now, &mut self.b, on_b);
            moved |= !there.is_empty() || !back.is_empty();
            for (session, handle, bytes) in [(&mut self.b, on_b, there), (&mut self.a, on_a, back)]
            {
                match feed(self.now, session, handle, &bytes) {
                    // The other end closes its socket when a transport is done or given up.
                    Ok(()) | Err(TransportFault::Unknown | TransportFault::Closed) => {}
                    Err(fault) => panic!("honest bytes are refused: {fault}"),
                }
            }
            self.collect();
        }
        moved
    }

    fn collect(&mut self) {
        for (session, events) in [
            (&mut self.a, &mut self.events_a),
            (&mut self.b, &mut self.events_b),
        ] {
            while let Some(event) = session.poll_event() {
                if let Event::TransportDone(handle) = event {
                    session.transport_lost(handle);
                }
                events.push(event);
            }
        }
    }

    /// Time passes.
    pub fn wait(&mut self, duration: Duration) {
        self.now = self.now + duration;
    }

    /// The initiator opens a stream and the responder connects it.
    pub fn stream(&mut self) -> StreamId {
        let id = self.a.open(target()).unwrap();
        self.run();
        self.b.connected(id);
        self.run();
        id
    }

    /// The initiator dials; the responder accepts what goes out first, in one flight.
    pub fn dial(&mut self, standby: bool) -> (Handle, Handle) {
        self.dial_over(Route::default(), standby)
    }

    /// The same over another path.
    pub fn dial_over(&mut self, route: Route, standby: bool) -> (Handle, Handle) {
        let on_a = self.a.dial_over(route, standby).unwrap();
        let flight = drain(self.now, &mut self.a, on_a);
        let on_b = self.accept(&flight).unwrap();
        self.wires.push((on_a, on_b));
        (on_a, on_b)
    }

    /// The responder gets a socket on which `flight` comes.
    pub fn accept(&mut self, flight: &[u8]) -> Result<Handle, TransportFault> {
        let (counter, rest) = self.resumes(flight);
        let counter = counter.expect("the responder expects no such token");
        let handle = self.b.accept_transport(counter)?;
        feed(self.now, &mut self.b, handle, &rest)?;
        Ok(handle)
    }

    /// The counter whose token `flight` begins with, if the responder expects it, and what follows.
    pub fn resumes(&self, flight: &[u8]) -> (Option<u64>, Vec<u8>) {
        let (preamble, used) = Preamble::parse(flight).unwrap().unwrap();
        let Kind::Resume(token) = preamble.kind else {
            panic!("this is no resume");
        };
        let expected = self.b.expected_tokens();
        let counter = expected.iter().find(|(t, _)| *t == token);
        let mut rest = BytesMut::from(flight);
        rest.advance(used);
        (counter.map(|(_, c)| *c), rest.to_vec())
    }

    /// The first transport dies for both; what was on the way is lost.
    pub fn cut(&mut self) {
        for (on_a, on_b) in std::mem::take(&mut self.wires) {
            self.a.transport_lost(on_a);
            self.b.transport_lost(on_b);
        }
    }
}

/// Writes all of `data`, in pieces of what the session takes; fails if it does not take all.
pub fn write(now: Time, session: &mut Session, id: StreamId, data: &[u8]) {
    let mut rest = data;
    while !rest.is_empty() {
        let n = session.capacity(id).min(rest.len());
        assert!(n > 0, "no capacity for {} bytes", rest.len());
        session
            .write(now, id, SendBuf::copy_of(&rest[..n]))
            .unwrap();
        rest = &rest[n..];
    }
}

/// Takes all that can be read; with whether the end has come.
pub fn read(session: &mut Session, id: StreamId) -> (Vec<u8>, bool) {
    let mut out = Vec::new();
    while let Some(data) = session.peek(id) {
        out.extend_from_slice(&data);
        session.consume(id, data.len());
    }
    let ended = session.take_end(id);
    (out, ended)
}

/// Small limits, so that they are met.
pub fn config() -> Config {
    Config {
        memory_bytes: 8 << 20,
        max_streams: 8,
        stream_window_max: 256 * 1024,
        ..Config::default()
    }
}

/// With flows, and whatever `change` does.
pub fn config_of(change: impl FnOnce(&mut Config)) -> Config {
    let mut config = Config {
        max_flows: 4,
        challenge_seed: Secret::new([5; 32]),
        ..config()
    };
    change(&mut config);
    config
}

/// The records in `bytes`, as header and all of its bytes.
pub fn records(mut bytes: &[u8]) -> Vec<(RecordHeader, &[u8])> {
    let mut out = Vec::new();
    while let Some(raw) = bytes.first_chunk() {
        let header = RecordHeader::parse(raw).unwrap();
        let (record, rest) = bytes.split_at(16 + header.payload_bytes);
        out.push((header, record));
        bytes = rest;
    }
    out
}

/// Those of space R.
pub fn retained(bytes: &[u8]) -> Vec<&[u8]> {
    let all = records(bytes).into_iter();
    all.filter(|(h, _)| h.space == Space::Retained)
        .map(|(_, record)| record)
        .collect()
}
