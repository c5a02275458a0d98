//! What a transport's socket is read into.

use std::time::{Duration, Instant};

use bytes::BytesMut;
use session_proto::limits::READ_BYTES_MAX;
use session_proto::session::Session;

/// Room for one read, at least. It follows what comes, for most sessions of a gateway say little for most of the time.
const READ_BYTES_MIN: usize = 4 * 1024;
/// A transport keeps as large a buffer while it is idle: one for 16 KiB, with what the core adds to that. A larger one is
/// given back when nothing has come for so long.
const KEPT_BYTES: usize = 17 * 1024;
const IDLE_AFTER: Duration = Duration::from_secs(1);

/// Bytes that were read and that the session has not taken, with room for more.
pub(super) struct Input {
    /// These bytes.
    pub bytes: BytesMut,
    /// How much room the next read has.
    chunk: usize,
    /// Of the buffer that `bytes` is the last part of and keeps alive, however little is left of it.
    buffer_bytes: usize,
    /// When the buffer is given back unless more comes.
    idle_at: Option<Instant>,
}

impl Input {
    /// What was read before there was a driver.
    pub fn new(bytes: BytesMut) -> Self {
        Self {
            chunk: READ_BYTES_MIN,
            buffer_bytes: bytes.capacity(),
            idle_at: None,
            bytes,
        }
    }

    /// Makes room for the next read; returns how much there is.
    pub fn make_room(&mut self, session: &mut Session) -> usize {
        let another = session.make_room(&mut self.bytes, self.chunk);
        let capacity = self.bytes.capacity();
        self.buffer_bytes = if another {
            capacity
        } else {
            capacity.max(self.buffer_bytes)
        };
        capacity - self.bytes.len()
    }

    /// A read has filled `read` bytes of `room`. Room grows while reads fill it, and shrinks while they come nowhere near.
    pub fn filled(&mut self, read: usize, room: usize) {
        if read == room {
            self.chunk = (self.chunk * 4).min(READ_BYTES_MAX);
        } else if read * 8 < self.chunk {
            self.chunk = (self.chunk / 2).max(READ_BYTES_MIN);
        }
    }

    /// There is nothing to read now.
    pub fn rests(&mut self, now: impl FnOnce() -> Instant) {
        self.idle_at = (self.buffer_bytes > KEPT_BYTES).then(|| now() + IDLE_AFTER);
    }

    /// When [`Self::give_back`] is due.
    pub fn idle_at(&self) -> Option<Instant> {
        self.idle_at
    }

    /// Keeps what belongs to a record that has not come whole, and nothing else, if it is time; true if it was.
    pub fn give_back(&mut self, now: Instant) -> bool {
        if self.idle_at.take_if(|at| now >= *at).is_none() {
            return false;
        }
        *self = Self::new(BytesMut::from(&self.bytes[..]));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use session_proto::Time;
    use session_proto::seal::{Aead, Secret, SessionSecret};
    use session_proto::session::Config;

    fn session() -> Session {
        let secret = SessionSecret::new(Aead::Aes128Gcm, &Secret::new([7; 32]));
        Session::respond(Time::ZERO, Config::default(), secret).0
    }

    /// Reads `bytes`, of which the session takes all but `left`.
    fn read(input: &mut Input, session: &mut Session, bytes: usize, left: usize) {
        let room = input.make_room(session);
        let len = input.bytes.len() + bytes.min(room);
        input.bytes.resize(len, 7);
        input.filled(bytes.min(room), room);
        let taken = input.bytes.len() - left;
        drop(input.bytes.split_to(taken));
    }

    #[test]
    fn an_idle_transport_keeps_no_large_buffer_however_little_is_left_of_it() {
        let (mut session, now) = (session(), Instant::now());
        let mut input = Input::new(BytesMut::new());
        while input.chunk < READ_BYTES_MAX {
            read(&mut input, &mut session, usize::MAX, 0);
        }
        assert!(input.make_room(&mut session) >= READ_BYTES_MAX);
        // Few bytes at a time, until much less than the buffer is left.
        while input.chunk > READ_BYTES_MIN {
            read(&mut input, &mut session, 20, 20);
        }
        while input.bytes.capacity() >= KEPT_BYTES {
            read(&mut input, &mut session, READ_BYTES_MIN / 8, 20);
        }
        input.rests(|| now);
        let at = input.idle_at().expect("it is large");
        assert!(!input.give_back(now) && input.idle_at().is_some());
        assert!(input.give_back(at));
        assert_eq!(
            (&input.bytes[..], input.chunk),
            (&[7; 20][..], READ_BYTES_MIN)
        );
        input.make_room(&mut session);
        input.rests(|| at);
        assert_eq!(input.idle_at(), None);
    }
}
