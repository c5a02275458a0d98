//! Two sessions in one process, with a pipe between them instead of sockets.

#![allow(dead_code)] // Each bench uses a part of it.

use std::io::IoSlice;

use bytes::{BufMut, BytesMut};
use session_proto::Time;
use session_proto::limits::RECORD_HEADER_BYTES;
use session_proto::seal::{Aead, Secret, SessionSecret};
use session_proto::session::{Config, Event, Handle, SendBuf, Session, StreamId};
use session_proto::wire::{RecordHeader, Target};

/// One end: a session, its transport, and what was read for it.
pub struct End {
    pub session: Session,
    pub handle: Handle,
    input: BytesMut,
}

/// Both ends and a stream that the client opened.
pub struct Pair {
    pub client: End,
    pub server: End,
    pub stream: StreamId,
    now: u64,
}

fn config() -> Config {
    Config {
        // Few streams, so that the first window of each is the largest: 256 KiB.
        max_streams: 16,
        ..Config::default()
    }
}

impl End {
    fn new((session, handle): (Session, Handle)) -> Self {
        Self {
            session,
            handle,
            input: BytesMut::with_capacity(1 << 20),
        }
    }

    /// What a socket would do: one copy into the peer's read buffer. Returns the bytes carried.
    fn send_to(&mut self, peer: &mut End, now: Time) -> usize {
        let mut carried = 0;
        while self.session.prepare(now, self.handle) {
            let mut slices = [IoSlice::new(&[]); 64];
            let filled = self.session.slices(self.handle, &mut slices);
            let mut written = 0;
            for slice in &slices[..filled] {
                peer.input.reserve(slice.len());
                peer.input.put_slice(slice);
                written += slice.len();
            }
            self.session.transmitted(now, self.handle, written);
            carried += written;
        }
        if carried > 0 {
            peer.session
                .handle_bytes(now, peer.handle, &mut peer.input)
                .expect("honest bytes");
        }
        carried
    }
}

impl Pair {
    /// An open session with one stream, whose windows have room for a bench's batch.
    pub fn new(aead: Aead) -> Self {
        let secret = || SessionSecret::new(aead, &Secret::new([5; 32]));
        let mut pair = Self {
            client: End::new(Session::initiate(Time::ZERO, config(), secret(), None)),
            server: End::new(Session::respond(Time::ZERO, config(), secret())),
            stream: 0,
            now: 0,
        };
        pair.settle();
        while let Some(event) = pair.server.session.poll_event() {
            if matches!(event, Event::Hello(_)) {
                pair.server.session.accept(None);
            }
        }
        pair.settle();
        let target = Target::Name("bench".into(), 9);
        pair.stream = pair
            .client
            .session
            .open(target)
            .expect("the session is open");
        pair.settle();
        pair
    }

    fn time(&mut self) -> Time {
        // A millisecond a turn: acknowledgements become due as they would under load.
        self.now += 1_000_000;
        Time::from_nanos(self.now)
    }

    /// One turn in both directions; returns the bytes carried.
    pub fn turn(&mut self) -> usize {
        let now = self.time();
        self.client.send_to(&mut self.server, now) + self.server.send_to(&mut self.client, now)
    }

    /// Turns until nothing is left to carry or to acknowledge.
    pub fn settle(&mut self) {
        let mut idle = 0;
        // An acknowledgement waits 5 ms for company: six turns without a byte mean the end.
        while idle < 6 {
            idle = if self.turn() == 0 { idle + 1 } else { 0 };
        }
    }

    /// The client's application writes `data` in records of the size that the session asks for, after
    /// waiting for room if it must; returns how many bytes the server's application took meanwhile.
    pub fn write(&mut self, data: &[u8]) -> usize {
        let mut taken = 0;
        let mut rest = data;
        while !rest.is_empty() {
            let room = self.client.session.capacity(self.stream).min(rest.len());
            if room == 0 {
                self.turn();
                taken += self.read_all();
                continue;
            }
            let (now, later) = rest.split_at(room);
            let at = Time::from_nanos(self.now);
            self.client
                .session
                .write(at, self.stream, SendBuf::copy_of(now))
                .expect("there is capacity");
            rest = later;
        }
        taken
    }

    /// The server's application takes all that is there; returns how much.
    pub fn read_all(&mut self) -> usize {
        let session = &mut self.server.session;
        while session.poll_event().is_some() {}
        let taken = session.readable(self.stream).map(|b| b.len()).sum();
        session.consume(self.stream, taken);
        session.take_end(self.stream);
        taken
    }

    /// Delivers `bytes` in writes of `data`: seal, pipe, open, put in order, acknowledge.
    pub fn deliver(&mut self, bytes: usize, data: &[u8]) {
        let mut taken = 0;
        for _ in 0..bytes / data.len() {
            taken += self.write(data);
            if self.client.session.queued_bytes(self.client.handle) >= 256 * 1024 {
                self.turn();
                taken += self.read_all();
            }
        }
        while taken < bytes {
            self.turn();
            taken += self.read_all();
        }
        assert_eq!(taken, bytes, "more came than was sent");
    }

    /// The records that the client has ready, one by one.
    pub fn client_records(&mut self) -> Vec<Vec<u8>> {
        let now = self.time();
        let end = &mut self.client;
        let mut wire = BytesMut::new();
        while end.session.prepare(now, end.handle) {
            let mut slices = [IoSlice::new(&[]); 64];
            let filled = end.session.slices(end.handle, &mut slices);
            let before = wire.len();
            for slice in &slices[..filled] {
                wire.put_slice(slice);
            }
            end.session
                .transmitted(now, end.handle, wire.len() - before);
        }
        let mut records = Vec::new();
        while let Some(header) = wire.first_chunk() {
            let header = RecordHeader::parse(header).expect("honest bytes");
            let record = wire.split_to(RECORD_HEADER_BYTES + header.payload_bytes);
            records.push(record.to_vec());
        }
        records
    }

    /// The server reads `records`, whatever their order.
    pub fn server_takes(&mut self, records: &[Vec<u8>]) {
        let now = Time::from_nanos(self.now);
        let end = &mut self.server;
        for record in records {
            end.input.extend_from_slice(record);
            end.session
                .handle_bytes(now, end.handle, &mut end.input)
                .expect("honest bytes");
        }
    }
}
