//! Packing what streams send: the codecs of a session, and what is done for each record.
//!
//! Offsets and credit count plain bytes; a record is packed once, when it is sealed, and goes out again as it
//! is. So nothing here knows of transports or handovers. Each stream and direction has a packer of its own, or
//! none: it is had when [`Chooser`] wants one, and given back when the stream ends or idles, when it does not
//! pay, and for another codec. The peer is told, so that it gives back what it unpacks with.

use std::collections::VecDeque;
use std::time::Duration;

use super::Session;
use super::beginning::Beginning;
use super::buf::{DataHeader, SendBuf};
use super::chooser::{Chooser, Question, Speeds};
use super::event::StreamId;
use super::schedule::Place;
use super::unpacking::Slots;
use crate::Time;
use crate::codec::{Method, Packer};
use crate::limits::{PACKED_BYTES_MIN, PACKING_IDLE, STREAM_DATA_BYTES_MAX};
use crate::wire::{Codec, Frame, PackedHeader, StreamHeader};

/// Packed, a record may be so many times as large as others on its transport: it is one whose stream waits for
/// the link anyway, and the smaller the records, the more of them is headers.
const RECORD_TIMES: usize = 2;

/// What packs one direction of a stream.
#[derive(Debug, Default)]
pub(super) struct Sending {
    packer: Option<Box<Packer>>,
    used_at: Time,
    chooser: Chooser,
    begins: Beginning,
    sent: PackedTotals,
}

/// Bytes of a stream that went through a codec.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackedTotals {
    /// The codec in use.
    pub codec: Option<Codec>,
    /// Bytes of the stream that were packed, since it was opened.
    pub plain_bytes: u64,
    /// What became of them.
    pub packed_bytes: u64,
}

/// How the two directions of a stream are packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamPacking {
    /// What this end sends.
    pub sent: PackedTotals,
    /// What came from the peer.
    pub received: PackedTotals,
}

impl Sending {
    fn method(&self) -> Option<Method> {
        self.packer.as_ref().map(|p| p.method())
    }

    /// There was no room for the stream in a queue.
    pub fn waits(&mut self, now: Time) {
        self.chooser.waits(now);
    }

    /// `data` goes out at `offset` of the stream: how that begins says whether it is to be packed.
    pub fn sends(&mut self, offset: u64, data: &[u8]) {
        self.begins.add(offset, data);
    }

    /// The best size of a record on a transport where `bytes` are the best on their way, and `most` the limit.
    pub fn plain_bytes(&self, bytes: usize, most: usize) -> usize {
        let Some(method) = self.method() else {
            return bytes.min(most);
        };
        let packed = (bytes * RECORD_TIMES).min(most);
        let shrinks_by = self.chooser.shrinks_by(method) as usize;
        (packed.min(STREAM_DATA_BYTES_MAX) * shrinks_by / 1_000).min(STREAM_DATA_BYTES_MAX)
    }
}

/// The codecs of a session.
#[derive(Debug)]
pub(super) struct Packings {
    /// Packers that streams have.
    open: usize,
    /// Those given up of which the peer is told by frames that wait to be sealed.
    untold: usize,
    /// Those of which it is told by records below these numbers: it unpacks with as many until then.
    told: VecDeque<(u64, usize)>,
    /// Those that wait for a stream, by [`Method::index`].
    spare: [Option<Box<Packer>>; Method::ALL.len()],
    speeds: Speeds,
    /// When to look for streams that idle.
    idle_at: Option<Time>,
    /// What was packed by the latest write.
    latest: Option<(Method, usize)>,
    /// The buffer of plain bytes that it left.
    buffer: Option<SendBuf>,
    slots: Slots,
}

impl Packings {
    /// For an end that unpacks so many streams at once.
    pub fn new(unpacks: usize) -> Self {
        Self {
            open: 0,
            untold: 0,
            told: VecDeque::new(),
            spare: Default::default(),
            speeds: Speeds::default(),
            idle_at: None,
            latest: None,
            buffer: None,
            slots: Slots::new(unpacks),
        }
    }

    /// For what the peer sends packed.
    pub fn slots(&self) -> Slots {
        self.slots.clone()
    }

    pub fn idle_at(&self) -> Option<Time> {
        self.idle_at
    }

    /// Whether the peer unpacks one more, of `most` as it says, and this end packs one more: no more than it would unpack,
    /// whatever the peer says. It has `acknowledged` all records below that number.
    fn has_room(&mut self, acknowledged: u64, most: u64) -> bool {
        let most = most.min(self.slots.most() as u64);
        while self
            .told
            .front()
            .is_some_and(|(number, _)| *number <= acknowledged)
        {
            self.told.pop_front();
        }
        let ending: usize = self.told.iter().map(|(_, count)| count).sum();
        ((self.open + self.untold + ending) as u64) < most
    }

    /// Every frame has been sealed, in records below `next`.
    pub fn told(&mut self, next: u64) {
        if self.untold > 0 {
            self.told
                .push_back((next, std::mem::take(&mut self.untold)));
        }
    }

    fn take(&mut self, method: Method) -> Option<Box<Packer>> {
        match self.spare[method.index()].take() {
            Some(mut packer) => {
                packer.restart();
                Some(packer)
            }
            // Without memory for a codec, streams go as they are.
            None => Packer::new(method).ok().map(Box::new),
        }
    }

    fn keep(&mut self, packer: Box<Packer>) {
        let index = packer.method().index();
        self.spare[index] = Some(packer);
    }

    /// Takes back what packs a stream; true if there was something. A frame is to tell the peer of it.
    pub fn release(&mut self, sending: &mut Sending) -> bool {
        let Some(packer) = sending.packer.take() else {
            return false;
        };
        self.keep(packer);
        self.open -= 1;
        self.untold += 1;
        true
    }
}

impl Session {
    /// Seals `data`, which `header` stands for, packed or as it is.
    pub(super) fn send_data(
        &mut self,
        now: Time,
        header: &StreamHeader,
        data: SendBuf,
        place: Place,
    ) {
        let packed = self.pack(now, header, &data, place);
        self.flush_frames(now);
        match packed {
            Some((header, packed)) => {
                self.packings.buffer = Some(data.cleared());
                self.seal_data(now, &DataHeader::Packed(header), packed, place);
            }
            None => self.seal_plain(now, header, data, place),
        }
    }

    /// Seals `data` as it is: in pieces, if there is so much of it since a packed stream's was asked for.
    fn seal_plain(&mut self, now: Time, header: &StreamHeader, data: SendBuf, place: Place) {
        let size = self.plain_record_bytes(place);
        if data.len() <= 2 * size {
            return self.seal_data(now, &DataHeader::Plain(*header), data, place);
        }
        self.seal_pieces(now, header, data.data(), place);
        self.packings.buffer = Some(data.cleared());
    }

    /// Seals a copy of `data` in records of the size that is best where they go.
    pub(super) fn seal_pieces(
        &mut self,
        now: Time,
        header: &StreamHeader,
        data: &[u8],
        place: Place,
    ) {
        let mut header = *header;
        for piece in data.chunks(self.plain_record_bytes(place)) {
            let record = self.send_copy(piece);
            self.seal_data(now, &DataHeader::Plain(header), record, place);
            header.offset += piece.len() as u64;
        }
    }

    fn pack(
        &mut self,
        now: Time,
        header: &StreamHeader,
        data: &SendBuf,
        place: Place,
    ) -> Option<(PackedHeader, SendBuf)> {
        let common = self.config.codecs() & self.peer.codecs;
        if common == 0 {
            return None;
        }
        let (id, offset, len) = (header.id, header.offset, data.len());
        let wanted = self.streams.get(&id)?.service.packing;
        let wish = self.config.compression.wanted(wanted);
        let codecs = wish.codecs & common;
        if codecs == 0 {
            return None;
        }
        let rates = place.handles().map(|h| self.rate(h));
        let rate = rates.min().flatten();
        let stream = self.streams.get_mut(&id)?;
        let sending = &mut stream.packing;
        sending.sends(offset, data.data());
        let is_web = sending.begins.is_web() || stream.recv.begins.is_web();
        let open = sending.method();
        let method = sending.chooser.choose(&Question {
            now,
            open,
            codecs,
            wish,
            is_web,
            rate,
            speeds: self.packings.speeds.believed(now),
            offset,
            len,
        });
        if open.is_some() && method != open {
            self.give_up_packing(id, offset);
        }
        let method = method?;
        // What little an application says in between goes past an open codec as it is.
        if len < PACKED_BYTES_MIN || !self.begin_packing(id, method) {
            return None;
        }
        let fresh = open != Some(method);
        let sending = &mut self.streams.get_mut(&id)?.packing;
        let packed = sending.packer.as_mut()?.pack(data.data());
        // The first one is a probe.
        let pays = packed.filter(|p| !fresh || p.len() * 8 <= len * 7);
        let Some(packed) = pays else {
            sending.chooser.failed(offset);
            self.stop_packing(id, offset, fresh);
            return None;
        };
        let header = PackedHeader {
            id,
            offset,
            codec: method.codec(),
            fresh,
            plain_bytes: len,
        };
        let record = SendBuf::copy_in(&mut self.pool, now, packed);
        sending.used_at = now;
        sending.sent.plain_bytes += len as u64;
        sending.sent.packed_bytes += record.len() as u64;
        let packed_bytes = record.len();
        sending
            .chooser
            .packed(method, offset, fresh, len, packed_bytes);
        self.stats.plain_packed += len as u64;
        self.stats.bytes_packed += packed_bytes as u64;
        self.packings.latest = Some((method, len));
        self.packings.idle_at.get_or_insert(now + PACKING_IDLE);
        Some((header, record))
    }

    /// Gets stream `id` what packs by `method`, if it has none; false if there is none to be had.
    fn begin_packing(&mut self, id: StreamId, method: Method) -> bool {
        let lowest = self.retained.lowest();
        let Some(stream) = self.streams.get_mut(&id) else {
            return false;
        };
        if stream.packing.packer.is_some() {
            return true;
        }
        if !self.packings.has_room(lowest, self.peer.packed_streams) {
            return false;
        }
        stream.packing.packer = self.packings.take(method);
        let begun = stream.packing.packer.is_some();
        self.packings.open += usize::from(begun);
        begun
    }

    /// Stream `id` is packed no more from `offset` on. `untold`: the peer knows of no packer yet.
    fn stop_packing(&mut self, id: StreamId, offset: u64, untold: bool) {
        if !untold {
            return self.give_up_packing(id, offset);
        }
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        if let Some(packer) = stream.packing.packer.take() {
            self.packings.keep(packer);
            self.packings.open -= 1;
        }
    }

    /// Takes back what packs stream `id`, and tells the peer: nothing is packed from `offset` on.
    fn give_up_packing(&mut self, id: StreamId, offset: u64) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        if self.packings.release(&mut stream.packing) {
            self.push_control(&Frame::PackingOver { id, offset });
        }
    }

    /// Streams that idle give back what packs them.
    pub(super) fn check_packing(&mut self, now: Time) {
        if self.packings.idle_at.is_none_or(|at| now < at) {
            return;
        }
        let idle: Vec<(StreamId, u64)> = (self.streams.iter())
            .filter(|(_, s)| s.packing.packer.is_some())
            .filter(|(_, s)| now.since(s.packing.used_at) >= PACKING_IDLE)
            .map(|(&id, s)| (id, s.send.offset))
            .collect();
        for (id, offset) in idle {
            self.give_up_packing(id, offset);
        }
        self.packings.idle_at = (self.packings.open > 0).then(|| now + PACKING_IDLE);
        if self.packings.open == 0 {
            self.packings.spare = Default::default();
            self.packings.buffer = None;
        }
    }

    /// The buffer that the latest [`Session::write`] did not keep, without data: what it held went out packed.
    pub fn reuse_buffer(&mut self) -> Option<SendBuf> {
        self.packings.buffer.take()
    }

    /// How long the latest [`Session::write`] took on this host's clock. Where it packed, that tells how fast the host
    /// packs, and is asked for; a session that is never told assumes a usual one.
    pub fn write_took(&mut self, took: impl FnOnce() -> Duration) {
        // A small piece says more of what is done once than of the codec.
        let latest = self.packings.latest.take();
        if let Some((method, bytes)) = latest.filter(|(_, bytes)| *bytes >= PACKED_BYTES_MIN * 16) {
            self.packings
                .speeds
                .measured(self.now, method, bytes, took());
        }
    }

    /// How stream `id` is packed.
    pub fn packing(&self, id: StreamId) -> Option<StreamPacking> {
        let stream = self.streams.get(&id)?;
        let unpacking = &stream.recv.unpacking;
        Some(StreamPacking {
            sent: PackedTotals {
                codec: stream.packing.method().map(Method::codec),
                ..stream.packing.sent
            },
            received: PackedTotals {
                codec: unpacking.codec(),
                plain_bytes: unpacking.plain_bytes,
                packed_bytes: unpacking.packed_bytes,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_unpacks_any_number_has_no_more_packed_than_this_end_would_unpack() {
        let mut packings = Packings::new(2);
        for open in 0..4 {
            packings.open = open;
            assert_eq!(packings.has_room(0, 1 << 40), open < 2, "{open}");
            assert_eq!(packings.has_room(0, 1), open < 1, "{open}");
        }
    }
}
