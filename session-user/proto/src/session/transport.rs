//! One transport as the session sees it: a phase, a queue, and keys of space U.

use std::collections::{BTreeMap, VecDeque};
use std::io::IoSlice;
use std::ops::Bound;
use std::time::Duration;

use bytes::Bytes;

use super::buf::seal_copy;
use super::event::Handle;
use super::pool::Pool;
use super::pulse::{Pulse, Written};
use super::retained::Retained;
use super::term::Term;
use crate::Time;
use crate::limits::{
    DATAGRAM_QUEUE_BYTES, DATAGRAM_QUEUE_BYTES_MIN, DATAGRAM_QUEUE_TIME, PAIR_QUEUE_BYTES_MIN,
    QUEUE_TIME, RECORD_HEADER_BYTES, TAG_BYTES, TRANSPORT_QUEUE_BYTES, TRANSPORT_QUEUE_BYTES_MIN,
};
use crate::seal::{Epoch, RecordKey, SealKeys};
use crate::wire::{Route, Space};

/// How far a transport has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// We dialled; the peer's 8-byte reply has not come.
    AwaitReply,
    /// We dialled; the peer's RESUMED has not come.
    AwaitResumed,
    /// The peer dialled; nothing it sent has been authenticated.
    AwaitResume,
    /// Both ends are authenticated on it.
    Up,
}

/// Bytes staged for one vectored write, at most.
const STAGE_BYTES: usize = 512 * 1024;
/// At least as many while the rate is not known.
const STAGE_BYTES_UNKNOWN: usize = 64 * 1024;
const STAGE_BYTES_MIN: usize = 16 * 1024;
/// In between it is what goes out in this time.
const STAGE_TIME: Duration = Duration::from_millis(5);
/// Buffers staged for one vectored write, at most.
const STAGE_BUFFERS: usize = 64;

#[derive(Debug)]
pub(super) struct Transport {
    pub phase: Phase,
    /// Counter and dialler's role: what space U's keys hang on. Unique in the session.
    pub wire_id: u64,
    /// Whether this unit dialled it.
    pub dialled: bool,
    /// This unit dialled it to send on it, not as a standby.
    pub to_carry: bool,
    /// We sent TRANSPORT_CLOSE, or will when the queue is empty.
    pub draining: bool,
    pub close_sent: bool,
    pub close_received: bool,
    pub done_told: bool,
    /// Sealed records of space U and clear first bytes: they go before `queue`.
    urgent: VecDeque<Bytes>,
    /// Frames of datagrams: each becomes a record of space U when its turn comes, behind `urgent` and
    /// before `queue`. (Sealed earlier, its number would come after those of what overtakes it.)
    datagrams: VecDeque<Bytes>,
    datagram_bytes: usize,
    /// Retained records.
    queue: VecDeque<Queued>,
    /// What the next writes consist of; the front may be partly written. With the record's number,
    /// if it is a retained one.
    staged: VecDeque<(Bytes, Option<Queued>)>,
    front_written: usize,
    queued_bytes: usize,
    next_number: u64,
    seal_key: Option<(Epoch, RecordKey)>,
    pub open_key: Option<(Epoch, RecordKey)>,
    pub next_expected: u64,
    pub pulse: Pulse,
    pub term: Term,
    /// When the first byte was written to its socket.
    pub began: Option<Time>,
    /// Where it runs, as its dialler says.
    pub route: Route,
    /// Bytes that it may send at once, where the driver knows.
    pub window: Option<usize>,
}

/// The transports of a session. Boxed, because a node of a map has room for eleven, and most sessions have one or two.
#[derive(Debug, Default)]
pub(super) struct Transports(BTreeMap<Handle, Box<Transport>>);

impl Transports {
    pub fn get(&self, handle: &Handle) -> Option<&Transport> {
        self.0.get(handle).map(|t| &**t)
    }

    pub fn get_mut(&mut self, handle: &Handle) -> Option<&mut Transport> {
        self.0.get_mut(handle).map(|t| &mut **t)
    }

    pub fn insert(&mut self, handle: Handle, transport: Transport) {
        self.0.insert(handle, Box::new(transport));
    }

    pub fn remove(&mut self, handle: &Handle) -> Option<Box<Transport>> {
        self.0.remove(handle)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Oldest first, as all that follow.
    pub fn keys(&self) -> impl Iterator<Item = &Handle> + Clone {
        self.0.keys()
    }

    /// The next one behind `last`; the first for none. For loops that change what they go over, with nothing set aside.
    pub fn after(&self, last: Option<Handle>) -> Option<Handle> {
        let start = last.map_or(Bound::Unbounded, Bound::Excluded);
        let mut behind = self.0.range((start, Bound::Unbounded));
        behind.next().map(|(handle, _)| *handle)
    }

    pub fn values(&self) -> impl Iterator<Item = &Transport> {
        self.0.values().map(|t| &**t)
    }

    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut Transport> {
        self.0.values_mut().map(|t| &mut **t)
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&Handle, &Transport)> {
        self.0.iter().map(|(handle, t)| (handle, &**t))
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&Handle, &mut Transport)> {
        self.0.iter_mut().map(|(handle, t)| (handle, &mut **t))
    }
}

/// A retained record in a transport's queue.
#[derive(Clone, Copy, Debug)]
struct Queued {
    number: u64,
    /// It was never on another transport, so its acknowledgement tells the round-trip time.
    fresh: bool,
    /// Its sealed bytes.
    len: usize,
}

/// What the frame of a datagram becomes on the wire.
fn record_bytes(frame: &Bytes) -> usize {
    RECORD_HEADER_BYTES + frame.len() + TAG_BYTES
}

impl Transport {
    pub fn new(phase: Phase, wire_id: u64, dialled: bool) -> Self {
        Self {
            phase,
            wire_id,
            dialled,
            to_carry: false,
            draining: false,
            close_sent: false,
            close_received: false,
            done_told: false,
            urgent: VecDeque::new(),
            datagrams: VecDeque::new(),
            datagram_bytes: 0,
            queue: VecDeque::new(),
            staged: VecDeque::new(),
            front_written: 0,
            queued_bytes: 0,
            next_number: 0,
            seal_key: None,
            open_key: None,
            next_expected: 0,
            pulse: Pulse::default(),
            term: Term::default(),
            began: None,
            route: Route::default(),
            window: None,
        }
    }

    /// Whether new records may be scheduled on it. A dialler sends behind its RESUME, before any
    /// answer; an acceptor sends nothing before the dialler is authentic.
    pub fn can_carry(&self) -> bool {
        self.phase != Phase::AwaitResume
            && !self.draining
            && !self.close_sent
            && !self.close_received
    }

    /// Bytes in the queue above which no new data is sealed for it: what it sends in
    /// [`QUEUE_TIME`](crate::limits::QUEUE_TIME), within bounds.
    pub fn queue_limit(&self) -> usize {
        if self.pulse.rate().is_none() {
            return TRANSPORT_QUEUE_BYTES;
        }
        (self.pulse.carries_in(QUEUE_TIME)).clamp(TRANSPORT_QUEUE_BYTES_MIN, TRANSPORT_QUEUE_BYTES)
    }

    /// Whether no new data is to be sealed for it.
    pub fn is_full(&self) -> bool {
        self.queued_bytes >= self.queue_limit()
    }

    /// The same for records that go over a second transport too, at the pace of the slower one.
    pub fn doubled_limit(&self) -> usize {
        (self.pulse.record_bytes() * 2).max(PAIR_QUEUE_BYTES_MIN)
    }

    /// Whether an answer can be expected on it. Records follow a dialler's RESUME at once, so they may
    /// be swallowed before RESUMED has come.
    pub fn can_fall_silent(&self) -> bool {
        self.phase != Phase::AwaitResume
    }

    /// Bytes that wait to be written.
    pub fn queued_bytes(&self) -> usize {
        self.queued_bytes
    }

    /// Records of space U and clear bytes that wait.
    pub fn urgent_len(&self) -> usize {
        self.urgent.len()
    }

    pub fn push_clear(&mut self, bytes: Bytes) {
        self.queued_bytes += bytes.len();
        self.urgent.push_back(bytes);
    }

    /// `fresh`: it was never on another transport.
    pub fn push_retained(&mut self, number: u64, len: usize, fresh: bool) {
        self.queued_bytes += len;
        self.queue.push_back(Queued { number, fresh, len });
    }

    /// Takes what has not been staged out of the queue, except what `keep` names.
    pub fn purge(&mut self, retained: &Retained, keep: impl Fn(u64) -> bool) {
        self.queue.retain(|queued| keep(queued.number));
        let staged: usize = self.staged.iter().map(|(bytes, _)| bytes.len()).sum();
        let urgent: usize = self.urgent.iter().map(Bytes::len).sum();
        let length = |queued: &Queued| retained.get(queued.number).map_or(0, Bytes::len);
        let queued: usize = self.queue.iter().map(length).sum();
        let datagrams: usize = self.datagrams.iter().map(record_bytes).sum();
        let all = staged + urgent + datagrams + queued;
        self.queued_bytes = all.saturating_sub(self.front_written);
    }

    fn datagram_limit(&self) -> usize {
        if self.pulse.rate().is_none() {
            return DATAGRAM_QUEUE_BYTES;
        }
        (self.pulse.carries_in(DATAGRAM_QUEUE_TIME))
            .clamp(DATAGRAM_QUEUE_BYTES_MIN, DATAGRAM_QUEUE_BYTES)
    }

    /// Whether a datagram need not wait behind too many others.
    pub fn has_datagram_room(&self) -> bool {
        self.datagram_bytes <= self.datagram_limit()
    }

    /// Bytes of datagrams that wait.
    pub fn datagram_bytes(&self) -> usize {
        self.datagram_bytes
    }

    /// Queues the frame of a datagram.
    pub fn push_datagram(&mut self, frame: Bytes) {
        self.queued_bytes += record_bytes(&frame);
        self.datagram_bytes += record_bytes(&frame);
        self.datagrams.push_back(frame);
    }

    /// The frames of datagrams that wait.
    pub fn take_datagrams(&mut self) -> VecDeque<Bytes> {
        self.queued_bytes -= self.datagram_bytes;
        self.datagram_bytes = 0;
        std::mem::take(&mut self.datagrams)
    }

    /// Seals the next datagram.
    fn seal_datagram(&mut self, now: Time, keys: &SealKeys, pool: &mut Pool) -> Option<Bytes> {
        let frame = self.datagrams.pop_front()?;
        self.datagram_bytes -= record_bytes(&frame);
        self.seal_unretained(now, keys, pool, &frame)
    }

    /// Seals `frames` as the next record of space U and queues it.
    pub fn push_unretained(&mut self, now: Time, keys: &SealKeys, pool: &mut Pool, frames: &[u8]) {
        if let Some(sealed) = self.seal_unretained(now, keys, pool, frames) {
            self.push_clear(sealed);
        }
    }

    /// The next record of space U. The room for the header is made here.
    fn seal_unretained(
        &mut self,
        now: Time,
        keys: &SealKeys,
        pool: &mut Pool,
        frames: &[u8],
    ) -> Option<Bytes> {
        let epoch = keys.epoch();
        if self.seal_key.as_ref().is_none_or(|(e, _)| *e != epoch) {
            self.seal_key = Some((epoch, keys.transport_key(self.wire_id)));
        }
        let (_, key) = self.seal_key.as_ref()?;
        let number = self.next_number;
        let space = Space::Unretained;
        let sealed = seal_copy(pool, now, frames, space, epoch.0, number, key);
        self.next_number += 1;
        Some(sealed.bytes)
    }

    /// Bytes to be written until the last record below `below` has been.
    #[cfg(feature = "sim")]
    pub fn bytes_ahead(&self, below: u64) -> usize {
        let staged = self.staged.iter().map(|(bytes, q)| (bytes.len(), *q));
        let urgent = self.urgent.iter().map(|bytes| (bytes.len(), None));
        let datagrams = self.datagrams.iter().map(|d| (record_bytes(d), None));
        let queued = self.queue.iter().map(|q| (q.len, Some(*q)));
        let (mut bytes, mut ahead) = (0, 0);
        for (len, queued) in staged.chain(urgent).chain(datagrams).chain(queued) {
            bytes += len;
            if queued.is_some_and(|q| q.number < below) {
                ahead = bytes;
            }
        }
        ahead
    }

    /// Leaves out the next records of the queue that were acknowledged over another transport. True if
    /// there were any.
    pub fn skip_acknowledged(&mut self, retained: &Retained) -> bool {
        let before = self.queue.len();
        while let Some(queued) = self.queue.front()
            && retained.get(queued.number).is_none()
        {
            self.queued_bytes -= queued.len;
            self.queue.pop_front();
        }
        let unstaged = self.unstage_acknowledged(retained);
        if self.is_idle() {
            self.pulse.nothing_waits();
        }
        self.queue.len() < before || unstaged
    }

    /// The same for what is staged, but for a record that the socket has a part of.
    fn unstage_acknowledged(&mut self, retained: &Retained) -> bool {
        let gone = |queued: &Queued| !queued.fresh && retained.get(queued.number).is_none();
        let begun = usize::from(self.front_written > 0);
        let (mut index, mut bytes) = (0, 0);
        self.staged.retain(|(record, queued)| {
            index += 1;
            let out = index > begun && queued.as_ref().is_some_and(gone);
            bytes += if out { record.len() } else { 0 };
            !out
        });
        self.queued_bytes -= bytes;
        bytes > 0
    }

    /// Bytes to stage: what goes out in [`STAGE_TIME`]. Acknowledgements wait behind them.
    fn stage_limit(&self) -> usize {
        let rate = self.pulse.rate();
        let least = rate.map_or(STAGE_BYTES_UNKNOWN, |_| STAGE_BYTES_MIN);
        self.pulse.carries_in(STAGE_TIME).clamp(least, STAGE_BYTES)
    }

    /// Moves queued items into the stage. Records acknowledged meanwhile (over another transport)
    /// are left out. Returns how many were sealed now.
    pub fn stage(
        &mut self,
        now: Time,
        retained: &Retained,
        keys: &SealKeys,
        pool: &mut Pool,
    ) -> u64 {
        let mut sealed = 0;
        let mut bytes: usize = self.staged.iter().map(|(bytes, _)| bytes.len()).sum();
        let most = self.stage_limit();
        while self.staged.len() < STAGE_BUFFERS && bytes < most {
            let next = if let Some(urgent) = self.urgent.pop_front() {
                (urgent, None)
            } else if let Some(datagram) = self.seal_datagram(now, keys, pool) {
                sealed += 1;
                (datagram, None)
            } else if let Some(queued) = self.queue.pop_front() {
                let Some(record) = retained.get(queued.number) else {
                    self.queued_bytes -= queued.len;
                    continue;
                };
                (record.clone(), Some(queued))
            } else {
                break;
            };
            bytes += next.0.len();
            self.staged.push_back(next);
        }
        sealed
    }

    pub fn has_staged(&self) -> bool {
        !self.staged.is_empty()
    }

    pub fn is_idle(&self) -> bool {
        self.staged.is_empty()
            && self.urgent.is_empty()
            && self.datagrams.is_empty()
            && self.queue.is_empty()
    }

    /// Fills `slices` with what is staged; returns how many were filled.
    pub fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut filled = 0;
        for (slot, (bytes, _)) in slices.iter_mut().zip(&self.staged) {
            let skip = if filled == 0 { self.front_written } else { 0 };
            *slot = IoSlice::new(&bytes[skip..]);
            filled += 1;
        }
        filled
    }

    /// The socket took `written` bytes. A record that was acknowledged over another transport meanwhile is
    /// not waited for.
    pub fn advance(&mut self, retained: &Retained, now: Time, mut written: usize) {
        self.began.get_or_insert(now);
        let some = written > 0;
        self.queued_bytes = self.queued_bytes.saturating_sub(written);
        while let Some((front, queued)) = self.staged.front() {
            let left = front.len() - self.front_written;
            if written < left {
                self.front_written += written;
                if some {
                    self.pulse.taken(false, now);
                }
                return;
            }
            written -= left;
            if let Some(Queued { number, fresh, len }) = *queued {
                self.term.written(number, now);
                // What follows at once keeps the path busy; otherwise the application sets the pace.
                let busy = self.staged.len() > 1 || !self.queue.is_empty();
                let written = Written {
                    number,
                    len,
                    fresh,
                    busy,
                };
                // What was acknowledged over another transport meanwhile is never answered here.
                if retained.get(number).is_some() {
                    self.pulse.written(written, now);
                }
            }
            self.front_written = 0;
            self.staged.pop_front();
        }
        debug_assert_eq!(written, 0, "the socket took more than it was given");
        self.pulse.taken(self.staged.is_empty(), now);
    }
}
