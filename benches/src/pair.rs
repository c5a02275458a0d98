//! Two sessions in one process, with a pipe between them instead of sockets.

use std::io::IoSlice;

use bytes::{BufMut, BytesMut};
use session_proto::Time;
use session_proto::limits::RECORD_HEADER_BYTES;
use session_proto::seal::{Aead, Secret, SessionSecret};
use session_proto::session::{Config, Event, Handle, Session, StreamId};
use session_proto::wire::{RecordHeader, Target};

/// One end: a session, its transport, and what was read for it.
pub struct End {
    /// The session.
    pub session: Session,
    /// Its transport.
    pub handle: Handle,
    input: BytesMut,
}

/// Both ends and a stream that the client opened.
pub struct Pair {
    /// The initiator.
    pub client: End,
    /// The responder.
    pub server: End,
    /// The stream.
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

    /// The records that are ready, one by one.
    fn records(&mut self, now: Time) -> Vec<Vec<u8>> {
        let mut wire = BytesMut::new();
        while self.session.prepare(now, self.handle) {
            let mut slices = [IoSlice::new(&[]); 64];
            let filled = self.session.slices(self.handle, &mut slices);
            let before = wire.len();
            for slice in &slices[..filled] {
                wire.put_slice(slice);
            }
            self.session
                .transmitted(now, self.handle, wire.len() - before);
        }
        let mut records = Vec::new();
        while let Some(header) = wire.first_chunk() {
            let header = RecordHeader::parse(header).expect("honest bytes");
            let record = wire.split_to(RECORD_HEADER_BYTES + header.payload_bytes);
            records.push(record.to_vec());
        }
        records
    }

    /// Reads `bytes`.
    fn takes(&mut self, now: Time, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
        self.session
            .handle_bytes(now, self.handle, &mut self.input)
            .expect("honest bytes");
    }

    /// The application writes `data`, for which there is room.
    fn write(&mut self, now: Time, stream: StreamId, data: &[u8]) {
        let data = self.session.send_copy(data);
        self.session
            .write(now, stream, data)
            .expect("there is capacity");
    }

    /// The application takes all that is there; returns how much.
    fn take_all(&mut self, stream: StreamId) -> usize {
        while self.session.poll_event().is_some() {}
        let taken = self.session.readable(stream).map(<[u8]>::len).sum();
        self.session.consume(stream, taken);
        self.session.take_end(stream);
        taken
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
            self.client.write(at, self.stream, now);
            rest = later;
        }
        taken
    }

    /// The server's application takes all that is there; returns how much.
    pub fn read_all(&mut self) -> usize {
        self.server.take_all(self.stream)
    }

    /// The client's application asks, and the server's answers with as much.
    pub fn ask(&mut self, data: &[u8]) {
        let stream = self.stream;
        self.client.write(Time::from_nanos(self.now), stream, data);
        let now = self.time();
        self.client.send_to(&mut self.server, now);
        assert_eq!(self.server.take_all(stream), data.len());
        self.server.write(now, stream, data);
        self.server.send_to(&mut self.client, now);
        assert_eq!(self.client.take_all(stream), data.len());
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
        self.client.records(now)
    }

    /// The same of the server.
    pub fn server_records(&mut self) -> Vec<Vec<u8>> {
        // An acknowledgement that waits for company has waited for long enough.
        (0..10).for_each(|_| _ = self.time());
        let now = self.time();
        self.server.records(now)
    }

    /// The server reads `records`, whatever their order.
    pub fn server_takes(&mut self, records: &[Vec<u8>]) {
        let now = Time::from_nanos(self.now);
        for record in records {
            self.server.takes(now, record);
        }
    }

    /// The client reads `bytes`.
    pub fn client_takes(&mut self, bytes: &[u8]) {
        self.client.takes(Time::from_nanos(self.now), bytes);
    }
}
