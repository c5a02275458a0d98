//! The two halves of a stream.

use std::collections::BTreeMap;

use bytes::{Buf, Bytes};

use super::beginning::Beginning;
use super::event::Violation;
use super::packing::Sending;
use super::pieces::Pieces;
use super::rivals::Pace;
use super::schedule::Appetite;
use super::unpacking::{Packed, Piece, Unpacking};
use crate::Time;
use crate::wire::Service;

/// The sending half.
#[derive(Debug)]
pub(super) struct SendHalf {
    /// Offset of the next byte.
    pub offset: u64,
    /// The peer's credit: offsets below may be sent.
    pub max: u64,
    /// FIN or RESET has been sealed.
    pub closed: bool,
}

/// The receiving half: reassembly by offset.
#[derive(Debug)]
pub(super) struct RecvHalf {
    /// Bytes in order that the application has not taken.
    ready: Pieces,
    /// Bytes beyond a gap, by offset, not overlapping, each in a buffer of its own.
    ahead: BTreeMap<u64, Piece>,
    /// As many as they are, or will be once they are unpacked.
    ahead_bytes: usize,
    pub unpacking: Unpacking,
    /// The first bytes that came.
    pub begins: Beginning,
    /// Offset behind the last byte of `ready`.
    next: u64,
    /// Offset behind the highest byte received: what the peer's use of credit is measured by.
    pub highest: u64,
    /// Offset behind the last byte that the application took.
    pub consumed: u64,
    /// Credit granted.
    pub max: u64,
    /// How much credit is granted beyond `consumed`.
    pub window: u64,
    /// How fast it is used.
    pub pace: Pace,
    pub final_size: Option<u64>,
    /// The peer aborted the stream behind `final_size`, with this code: the application is told once it has what came
    /// before.
    pub reset: Option<u64>,
    /// The peer ended its direction in order before it aborted the stream.
    pub fin: bool,
    /// The application took the end, or never will.
    pub closed: bool,
    /// The application wants no more: count bytes, keep none.
    pub discard: bool,
    /// Offset of the urgent byte, until the application has taken it: that of the newest mark, as in TCP.
    mark: Option<u64>,
}

impl RecvHalf {
    pub fn new(window: u64) -> Self {
        Self {
            ready: Pieces::default(),
            ahead: BTreeMap::new(),
            ahead_bytes: 0,
            unpacking: Unpacking::default(),
            begins: Beginning::default(),
            next: 0,
            highest: 0,
            consumed: 0,
            max: window,
            window,
            pace: Pace::default(),
            final_size: None,
            reset: None,
            fin: false,
            closed: false,
            discard: false,
            mark: None,
        }
    }

    /// Bytes held in memory.
    pub fn buffered(&self) -> usize {
        self.ready.bytes() + self.ahead_bytes
    }

    /// Takes in `data` at `offset`. Returns by how much `highest` grew.
    pub fn insert(&mut self, offset: u64, fin: bool, data: Bytes) -> Result<u64, Violation> {
        let grown = self.claim(offset, data.len(), fin)?;
        if !self.discard {
            self.keep(offset, data)?;
        }
        Ok(grown)
    }

    /// The same for bytes that are packed. They come once, and nothing else comes in their place.
    pub fn insert_packed(&mut self, offset: u64, packed: Packed) -> Result<u64, Violation> {
        let grown = self.claim(offset, packed.plain_bytes, false)?;
        if self.discard {
            return Ok(grown);
        }
        if offset <= self.next {
            self.unpack(offset, &packed)?;
            self.join()?;
        } else {
            self.keep_packed(offset, packed)?;
        }
        Ok(grown)
    }

    /// Whether `len` bytes at `offset` may come; they count as come from here on.
    fn claim(&mut self, offset: u64, len: usize, fin: bool) -> Result<u64, Violation> {
        let end = offset
            .checked_add(len as u64)
            .ok_or(Violation::protocol("stream offset out of range"))?;
        if end > self.max {
            return Err(Violation::flow("more stream data than credit"));
        }
        if fin {
            self.set_final(end)?;
            self.fin = true;
        }
        if self.final_size.is_some_and(|size| end > size) {
            return Err(Violation::protocol("stream data behind its end"));
        }
        let grown = end.saturating_sub(self.highest);
        self.highest = self.highest.max(end);
        Ok(grown)
    }

    /// The size is known: from FIN or from RESET_STREAM.
    pub fn set_final(&mut self, size: u64) -> Result<(), Violation> {
        if self.final_size.is_some_and(|known| known != size) || size < self.highest {
            return Err(Violation::protocol("the final size of a stream changed"));
        }
        if size > self.max {
            return Err(Violation::flow("final size of a stream above its credit"));
        }
        self.final_size = Some(size);
        self.unpack_no_more();
        Ok(())
    }

    fn keep(&mut self, mut offset: u64, mut data: Bytes) -> Result<(), Violation> {
        if offset < self.next {
            let known = (self.next - offset).min(data.len() as u64);
            data.advance(known as usize);
            offset += known;
        }
        if data.is_empty() {
            return Ok(());
        }
        if offset == self.next {
            self.append(data);
            self.join()?;
        } else {
            self.keep_ahead(offset, data);
        }
        Ok(())
    }

    /// Appends what is packed and begins at `offset`, where all before it is there.
    fn unpack(&mut self, offset: u64, packed: &Packed) -> Result<(), Violation> {
        if offset + packed.plain_bytes as u64 <= self.next {
            return Ok(());
        }
        if offset < self.next {
            return Err(Violation::protocol("packed data in place of other data"));
        }
        let plain = self.unpacking.unpack(offset, packed)?;
        self.append(plain);
        Ok(())
    }

    fn keep_packed(&mut self, offset: u64, packed: Packed) -> Result<(), Violation> {
        let end = offset + packed.plain_bytes as u64;
        let last = self.ahead.range(..end).next_back();
        if last.is_some_and(|(&start, held)| start + held.len() as u64 > offset) {
            return Err(Violation::protocol("packed data in place of other data"));
        }
        self.ahead_bytes += packed.plain_bytes;
        let data = Bytes::copy_from_slice(&packed.data);
        let piece = Piece::Packed(Packed { data, ..packed });
        self.ahead.insert(offset, piece);
        Ok(())
    }

    /// The sender has given up what packs.
    pub fn packing_over(&mut self, offset: u64) -> Result<(), Violation> {
        if offset > self.final_size.unwrap_or(self.max) {
            return Err(Violation::protocol(
                "the end of packing behind that of the stream",
            ));
        }
        if !self.discard {
            self.unpacking.over(offset, self.next);
        }
        Ok(())
    }

    /// Gives back what unpacks, if the end of the stream has come.
    fn unpack_no_more(&mut self) {
        if self.final_size == Some(self.next) {
            self.unpacking.end();
        }
    }

    fn append(&mut self, data: Bytes) {
        self.begins.add(self.next, &data);
        self.next += data.len() as u64;
        self.ready.push(data);
        self.unpacking.reached(self.next);
    }

    /// Keeps the parts of `data` that are not held yet.
    fn keep_ahead(&mut self, mut offset: u64, mut data: Bytes) {
        if let Some((&start, held)) = self.ahead.range(..=offset).next_back() {
            let covered = (start + held.len() as u64)
                .saturating_sub(offset)
                .min(data.len() as u64);
            data.advance(covered as usize);
            offset += covered;
        }
        while !data.is_empty() {
            let following = self
                .ahead
                .range(offset..)
                .next()
                .map(|(&start, held)| (start, held.len()));
            let (start, held) = following.unwrap_or((u64::MAX, 0));
            let free = (start - offset).min(data.len() as u64) as usize;
            let piece = data.split_to(free);
            if !piece.is_empty() {
                self.ahead_bytes += piece.len();
                let piece = Piece::Plain(Bytes::copy_from_slice(&piece));
                self.ahead.insert(offset, piece);
            }
            let skip = held.min(data.len());
            data.advance(skip);
            offset = start.saturating_add(skip as u64);
        }
    }

    fn join(&mut self) -> Result<(), Violation> {
        while let Some(entry) = self.ahead.first_entry() {
            let start = *entry.key();
            if start > self.next {
                break;
            }
            let piece = entry.remove();
            self.ahead_bytes -= piece.len();
            match piece {
                Piece::Packed(packed) => self.unpack(start, &packed)?,
                Piece::Plain(mut data) => {
                    let known = (self.next - start).min(data.len() as u64);
                    data.advance(known as usize);
                    if !data.is_empty() {
                        self.append(data);
                    }
                }
            }
        }
        self.unpack_no_more();
        Ok(())
    }

    /// The byte at `offset` is urgent, unless a newer mark stands or the application has taken it.
    pub fn mark(&mut self, offset: u64) -> Result<(), Violation> {
        if offset >= self.max {
            return Err(Violation::flow("an urgent mark beyond the stream's credit"));
        }
        if self.final_size.is_some_and(|size| offset >= size) {
            return Err(Violation::protocol(
                "an urgent mark behind the end of its stream",
            ));
        }
        if offset >= self.consumed && !self.discard {
            self.mark = self.mark.max(Some(offset));
        }
        Ok(())
    }

    /// Whether the next byte is the urgent one.
    pub fn is_at_mark(&self) -> bool {
        self.mark == Some(self.consumed)
    }

    /// How many bytes may be shown at once: those before the urgent one, or that one alone.
    fn before_mark(&self) -> usize {
        let bytes = self.mark.map(|mark| (mark - self.consumed).max(1));
        bytes.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX))
    }

    /// The next bytes in order, whatever is marked.
    pub fn peek(&self) -> Option<&Bytes> {
        self.ready.first()
    }

    /// The next bytes in order, as far as they may be shown at once.
    pub fn next_piece(&self) -> Option<Bytes> {
        let front = self.ready.first()?;
        Some(front.slice(..front.len().min(self.before_mark())))
    }

    /// All bytes in order that may be shown at once, for a vectored write.
    pub fn ready(&self) -> impl Iterator<Item = &[u8]> {
        let mut left = self.before_mark();
        self.ready.iter().map_while(move |bytes| {
            let shown = bytes.len().min(left);
            left -= shown;
            (shown > 0).then_some(&bytes[..shown])
        })
    }

    /// The application took `taken` bytes, at most what is ready.
    pub fn consume(&mut self, now: Time, taken: usize) {
        self.ready.take(now, taken);
        self.consumed += taken as u64;
        self.mark = self.mark.filter(|mark| *mark >= self.consumed);
    }

    /// Whether the application has taken every byte and the end is known.
    pub fn at_end(&self) -> bool {
        self.final_size == Some(self.consumed)
    }

    /// Drops what is held; returns how many bytes between `consumed` and `highest` count as taken.
    pub fn drop_all(&mut self) -> u64 {
        self.discard = true;
        self.mark = None;
        self.ready = Pieces::default();
        self.ahead.clear();
        self.ahead_bytes = 0;
        self.unpacking.end();
        let taken = self.highest - self.consumed;
        self.consumed = self.highest;
        taken
    }

    /// What is ready, as it is kept.
    pub fn pieces(&mut self) -> &mut Pieces {
        &mut self.ready
    }

    /// Buffers that pieces came in and still share.
    pub fn loose_buffers(&self) -> usize {
        self.ready.buffers()
    }

    /// Bytes beyond a gap.
    pub fn bytes_ahead(&self) -> usize {
        self.ahead_bytes
    }

    /// Pieces beyond a gap.
    pub fn pieces_ahead(&self) -> usize {
        self.ahead.len()
    }
}

/// One stream.
#[derive(Debug)]
pub(super) struct Stream {
    pub send: SendHalf,
    pub recv: RecvHalf,
    /// Opened by the peer and its OPEN has not arrived: data may have overtaken it.
    pub awaiting_open: bool,
    /// The driver has been told [`super::Event::Readable`] and has not read since.
    pub told_readable: bool,
    /// Credit for it is due to be sent.
    pub credit_due: bool,
    /// The driver found no credit of its own, and is to be told of some.
    pub wants_credit: bool,
    /// What its opener asked for.
    pub service: Service,
    pub appetite: Appetite,
    pub packing: Sending,
}

impl Stream {
    pub fn new(send_max: u64, recv_window: u64, awaiting_open: bool) -> Self {
        Self {
            send: SendHalf {
                offset: 0,
                max: send_max,
                closed: false,
            },
            recv: RecvHalf::new(recv_window),
            awaiting_open,
            told_readable: false,
            credit_due: false,
            wants_credit: false,
            service: Service::default(),
            appetite: Appetite::default(),
            packing: Sending::default(),
        }
    }

    pub fn finished(&self) -> bool {
        self.send.closed && self.recv.closed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What is shown at once, again and again until nothing is left; whether it is urgent.
    fn shown(half: &mut RecvHalf) -> Vec<(bool, Vec<u8>)> {
        let mut out = Vec::new();
        loop {
            let bytes: Vec<u8> = half.ready().flatten().copied().collect();
            if bytes.is_empty() {
                return out;
            }
            out.push((half.is_at_mark(), bytes));
            half.consume(Time::ZERO, out[out.len() - 1].1.len());
        }
    }

    fn take_in(half: &mut RecvHalf, offset: u64, data: &'static [u8]) {
        half.insert(offset, false, Bytes::from_static(data))
            .unwrap();
    }

    #[test]
    fn an_urgent_byte_is_shown_alone() {
        let mut half = RecvHalf::new(100);
        half.mark(6).unwrap();
        take_in(&mut half, 7, b"after");
        take_in(&mut half, 0, b"bef");
        assert_eq!(half.next_piece().unwrap(), "bef");
        take_in(&mut half, 3, b"ore!");
        let all = shown(&mut half);
        let expected: [(bool, &[u8]); 3] = [(false, b"before"), (true, b"!"), (false, b"after")];
        assert!(
            all.iter().map(|(u, b)| (*u, &b[..])).eq(expected),
            "{all:?}"
        );
        // It is over, and so is what comes too late.
        half.mark(6).unwrap();
        take_in(&mut half, 12, b"and more");
        assert_eq!(shown(&mut half), [(false, b"and more".to_vec())]);
    }

    #[test]
    fn the_newest_mark_stands_in_whatever_order_they_come() {
        for order in [[2, 4], [4, 2]] {
            let mut half = RecvHalf::new(100);
            take_in(&mut half, 0, b"ab!c!");
            for offset in order {
                half.mark(offset).unwrap();
            }
            let all = shown(&mut half);
            assert_eq!(all, [(false, b"ab!c".to_vec()), (true, b"!".to_vec())]);
        }
    }

    #[test]
    fn a_mark_before_its_byte_holds_nothing_up() {
        let mut half = RecvHalf::new(100);
        take_in(&mut half, 0, b"ab");
        half.mark(2).unwrap();
        assert_eq!(shown(&mut half), [(false, b"ab".to_vec())]);
        assert!(half.is_at_mark() && half.next_piece().is_none());
        take_in(&mut half, 2, b"!c");
        half.pieces().compact();
        let all = shown(&mut half);
        assert_eq!(all, [(true, b"!".to_vec()), (false, b"c".to_vec())]);
    }

    #[test]
    fn marks_are_bounded_by_credit_and_end() {
        let mut half = RecvHalf::new(100);
        half.mark(99).unwrap();
        assert!(half.mark(100).is_err());
        let mut half = RecvHalf::new(100);
        half.set_final(10).unwrap();
        half.mark(9).unwrap();
        assert!(half.mark(10).is_err());
        half.drop_all();
        half.mark(9).unwrap();
        assert!(half.mark.is_none());
    }

    proptest! {
        #[test]
        fn any_order_with_overlaps_gives_the_bytes(
            pieces in proptest::collection::vec((0usize..400, 1usize..120), 1..60),
            take in proptest::collection::vec(0usize..200, 60),
        ) {
            let source: Vec<u8> = (0..600u32).map(|i| (i * 7 % 251) as u8).collect();
            let mut half = RecvHalf::new(10_000);
            let mut out = Vec::new();
            let mut all = pieces;
            all.push((0, 600));
            for (i, (start, len)) in all.into_iter().enumerate() {
                let end = (start + len).min(600);
                half.insert(start as u64, false, Bytes::copy_from_slice(&source[start..end])).unwrap();
                let mut want = take.get(i).copied().unwrap_or(0);
                while want > 0 {
                    let Some(front) = half.peek() else { break };
                    let n = want.min(front.len());
                    out.extend_from_slice(&front[..n]);
                    half.consume(Time::ZERO, n);
                    want -= n;
                }
                if i % 3 == 0 { half.pieces().compact(); }
                prop_assert!(half.buffered() <= 600);
            }
            while let Some(front) = half.peek().cloned() {
                out.extend_from_slice(&front);
                half.consume(Time::ZERO, front.len());
            }
            prop_assert_eq!(out, source);
            prop_assert_eq!(half.buffered(), 0);
        }
    }
}
