//! One unit of the fleet: a session, its transport, and nothing else. It is as lean as it can be, so that what is
//! measured is the gateway.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::time::Instant;

use bytes::BytesMut;
use session_proto::session::{Event, SendBuf, StreamId};
use session_proto::wire::Target;
use tokio::io::Interest;
use tokio::sync::{mpsc, watch};

use super::Word;
use crate::driver::establish::Established;

/// Room for one read; what comes is small.
const READ_BYTES: usize = 4 * 1024;
/// Bytes of a question.
const QUESTION_BYTES: usize = 700;

/// What a unit has of the fleet's work.
#[derive(Clone, Debug)]
pub struct Share {
    /// Which unit it is.
    pub number: usize,
    /// How many streams it opens.
    pub streams: usize,
    /// Of how many it asks something.
    pub asked: usize,
    /// Where its streams lead, one after the other.
    pub targets: Vec<SocketAddr>,
}

/// What a unit tells.
#[derive(Clone, Debug)]
pub struct Told {
    /// Which unit.
    pub unit: usize,
    /// What.
    pub what: What,
}

/// What has become of it, or of an order.
#[derive(Clone, Debug)]
pub enum What {
    /// Its session stands.
    Stands,
    /// It could not be made.
    Failed(String),
    /// Its targets have answered.
    Opened {
        /// With yes.
        streams: usize,
        /// One of those that said no.
        refused: Option<i32>,
    },
    /// It asks so many streams for an echo.
    Asks(usize),
    /// One of these has answered what was said.
    Echoed,
    /// The gateway has answered over its transport.
    Lives,
    /// All that was asked has been answered.
    Checked,
    /// Its session has ended by itself.
    Ended(String),
}

/// A question under way.
#[derive(Debug)]
struct Asked {
    question: Vec<u8>,
    heard: Vec<u8>,
}

/// A unit whose session stands.
pub struct Unit {
    made: Box<Established>,
    share: Share,
    tell: mpsc::UnboundedSender<Told>,
    /// Streams, and whether their targets have answered.
    streams: BTreeMap<StreamId, bool>,
    refused: Option<i32>,
    /// What the order that is carried out waits for.
    opening: usize,
    checking: bool,
    ponged: bool,
    to_ask: VecDeque<StreamId>,
    asked: BTreeMap<StreamId, Asked>,
    rounds: u64,
    /// Its socket takes no more.
    stuck: bool,
    ended: Option<String>,
}

impl Unit {
    /// A unit with this session and work.
    pub fn new(made: Box<Established>, share: Share, tell: mpsc::UnboundedSender<Told>) -> Self {
        Self {
            made,
            share,
            tell,
            streams: BTreeMap::new(),
            refused: None,
            opening: 0,
            checking: false,
            ponged: false,
            to_ask: VecDeque::new(),
            asked: BTreeMap::new(),
            rounds: 0,
            stuck: false,
            ended: None,
        }
    }

    /// Lives until the session or the fleet ends.
    pub async fn run(mut self, mut orders: watch::Receiver<Option<Word>>) {
        // The order to make the session has been carried out.
        orders.mark_unchanged();
        let why = loop {
            if let Err(error) = self.settle() {
                break error.to_string();
            }
            if let Some(why) = self.ended.take() {
                break why;
            }
            let at = self.made.session.poll_timeout();
            let at = at.map(|at| self.made.clock.instant(at));
            let interest = if self.stuck {
                Interest::READABLE | Interest::WRITABLE
            } else {
                Interest::READABLE
            };
            let result = tokio::select! {
                changed = orders.changed() => match changed {
                    Ok(()) => self.obey(*orders.borrow_and_update()),
                    Err(_) => return,
                },
                ready = self.made.stream.ready(interest) => match ready {
                    Ok(_) => self.read(),
                    Err(error) => Err(error),
                },
                () = sleep_until(at) => {
                    self.made.session.handle_timeout(self.made.clock.now());
                    Ok(())
                }
            };
            if let Err(error) = result {
                break error.to_string();
            }
        };
        self.tell(What::Ended(why));
    }

    fn tell(&self, what: What) {
        let unit = self.share.number;
        // The fleet ends only with its runtime.
        let _ = self.tell.send(Told { unit, what });
    }

    fn obey(&mut self, word: Option<Word>) -> io::Result<()> {
        match word {
            Some(Word::Streams) => self.open(),
            Some(Word::Check) => self.check(),
            Some(Word::Sessions) | None => Ok(()),
        }
    }

    fn open(&mut self) -> io::Result<()> {
        for target in self.share.targets.iter().cycle().take(self.share.streams) {
            let opened = self.made.session.open(Target::Addr(*target));
            self.streams
                .insert(opened.map_err(io::Error::other)?, false);
        }
        self.opening = self.share.streams;
        self.tell_opened();
        Ok(())
    }

    fn check(&mut self) -> io::Result<()> {
        self.rounds += 1;
        self.checking = true;
        self.ponged = false;
        self.made.session.ping(self.made.handle, self.rounds);
        let count = self.streams.len();
        let asked = self.share.asked.min(count);
        self.tell(What::Asks(asked));
        let first = self.share.number % count.max(1);
        let chosen = self.streams.keys().cycle().skip(first).take(asked);
        self.to_ask = chosen.copied().collect();
        self.ask()
    }

    /// Asks as many of those that are to be asked as there is room for.
    fn ask(&mut self) -> io::Result<()> {
        let (session, clock) = (&mut self.made.session, &self.made.clock);
        while let Some(&id) = self.to_ask.front() {
            let question = question(self.share.number as u64, id, self.rounds);
            if session.has_stream(id) {
                if session.capacity(id) < question.len() {
                    // The session tells when there is room.
                    return Ok(());
                }
                session
                    .write(clock.now(), id, SendBuf::copy_of(&question))
                    .map_err(io::Error::other)?;
                let heard = Vec::new();
                self.asked.insert(id, Asked { question, heard });
            }
            self.to_ask.pop_front();
        }
        Ok(())
    }

    fn tell_opened(&mut self) {
        let answered = self.streams.values().filter(|up| **up).count();
        if self.opening == 0 {
            let (streams, refused) = (answered, self.refused);
            self.tell(What::Opened { streams, refused });
        }
    }

    fn tell_checked(&mut self) {
        if self.checking && self.ponged && self.to_ask.is_empty() && self.asked.is_empty() {
            self.checking = false;
            self.tell(What::Checked);
        }
    }

    /// Reads what has come; gives the room for it back when there is no more.
    fn read(&mut self) -> io::Result<()> {
        self.stuck = false;
        let made = &mut *self.made;
        loop {
            made.input.reserve(READ_BYTES);
            match made.stream.try_read_buf(&mut made.input) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => made
                    .session
                    .handle_bytes(made.clock.now(), made.handle, &mut made.input)
                    .map_err(io::Error::other)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        if made.input.is_empty() {
            made.input = BytesMut::new();
        }
        Ok(())
    }

    /// Acts on the session's events and writes what it has.
    fn settle(&mut self) -> io::Result<()> {
        loop {
            while let Some(event) = self.made.session.poll_event() {
                self.event(event)?;
            }
            self.write()?;
            match self.made.session.poll_event() {
                Some(event) => self.event(event)?,
                None => return Ok(()),
            }
        }
    }

    fn event(&mut self, event: Event) -> io::Result<()> {
        match event {
            Event::StreamConnected(id) => {
                self.streams.insert(id, true);
                self.opening -= 1;
                self.tell_opened();
            }
            Event::StreamRefused { id, errno } => {
                self.streams.remove(&id);
                self.refused = i32::try_from(errno).ok();
                self.opening -= 1;
                self.tell_opened();
            }
            Event::StreamReset { id, .. } => {
                self.streams.remove(&id);
                // What it was asked is not answered.
                self.asked.remove(&id);
                self.tell_checked();
            }
            Event::Readable(id) => self.readable(id),
            Event::Pong { token, .. } if token == self.rounds => {
                self.ponged = true;
                self.tell(What::Lives);
                self.tell_checked();
            }
            Event::Writable | Event::StreamWritable(_) => self.ask()?,
            Event::Closed { reason, .. } => self.ended = Some(reason),
            _ => {}
        }
        Ok(())
    }

    fn readable(&mut self, id: StreamId) {
        let session = &mut self.made.session;
        while let Some(bytes) = session.peek(id) {
            session.consume(id, bytes.len());
            if let Some(asked) = self.asked.get_mut(&id) {
                asked.heard.extend_from_slice(&bytes);
            }
        }
        session.take_end(id);
        let whole = |asked: &Asked| asked.heard.len() >= asked.question.len();
        if self.asked.get(&id).is_some_and(whole)
            && let Some(asked) = self.asked.remove(&id)
        {
            if asked.heard == asked.question {
                self.tell(What::Echoed);
            }
            self.tell_checked();
        }
    }

    fn write(&mut self) -> io::Result<()> {
        let made = &mut *self.made;
        while !self.stuck && made.session.prepare(made.clock.now(), made.handle) {
            let mut slices = [IoSlice::new(&[]); 16];
            let filled = made.session.slices(made.handle, &mut slices);
            match made.stream.try_write_vectored(&slices[..filled]) {
                Ok(n) => made.session.transmitted(made.clock.now(), made.handle, n),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.stuck = true,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// Bytes that no other stream is asked, nor this one in another round.
fn question(unit: u64, stream: StreamId, round: u64) -> Vec<u8> {
    let mut state = unit << 40 ^ stream << 8 ^ round ^ 0x9e37_79b9_7f4a_7c15;
    let mut next = || {
        // xorshift64 (Marsaglia, "Xorshift RNGs", 2003).
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    (0..QUESTION_BYTES).map(|_| next()).collect()
}
