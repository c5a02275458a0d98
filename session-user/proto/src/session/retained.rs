//! Space R of the sender: sealed records, kept until the peer acknowledges them.

use std::collections::VecDeque;

use bytes::Bytes;

use super::buf::Sealed;
use super::event::{Handle, Violation};
use super::memory::Part;
use super::schedule::Place;
use crate::limits::RETAINED_OVERHEAD_BYTES;
use crate::wire::Ack;

#[derive(Debug)]
struct Record {
    bytes: Bytes,
    /// What is charged for it: the buffer that it keeps alive, and book-keeping.
    cost: usize,
    /// The transport that it is scheduled on; `None` while it waits for one.
    on: Option<Handle>,
    /// A second transport that carries it too.
    copy: Option<Handle>,
    /// Its stream asked for two: the copy is not taken back when the first transport answers.
    doubled: bool,
    /// Whether it was ever scheduled.
    tried: bool,
}

/// Which copies are taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Copies {
    /// All: their transport is of no use.
    All,
    /// Those that were made in doubt, and none that a stream asked for.
    Guesses,
}

/// A byte leaves here only on the peer's acknowledgement.
#[derive(Debug, Default)]
pub(super) struct Retained {
    /// Number of the first entry of `records`.
    base: u64,
    /// `None` where a record has been acknowledged out of order.
    records: VecDeque<Option<Record>>,
    memory: Part,
}

impl Retained {
    /// Empty; `memory` is charged for what comes.
    pub fn within(memory: Part) -> Self {
        Self {
            memory,
            ..Self::default()
        }
    }

    /// Bytes that it may hold, where a session by itself may hold `most`. `adrift`: no transport carries it, for longer
    /// perhaps than others can wait for what it holds.
    pub fn limit(&self, most: usize, adrift: bool) -> usize {
        most.min(self.memory.sending_limit(adrift))
    }

    /// The number that the next record gets.
    pub fn next_number(&self) -> u64 {
        self.base + self.records.len() as u64
    }

    /// The lowest number that is not acknowledged.
    pub fn lowest(&self) -> u64 {
        self.base
    }

    /// Highest sent minus lowest unacknowledged.
    pub fn span(&self) -> u64 {
        self.records.len() as u64
    }

    /// Bytes of the buffers that records keep alive, with book-keeping.
    pub fn bytes(&self) -> usize {
        self.memory.used()
    }

    pub fn push(&mut self, sealed: Sealed, place: Place) {
        let cost = sealed.buffer_bytes + RETAINED_OVERHEAD_BYTES;
        self.memory.add(cost);
        self.records.push_back(Some(Record {
            bytes: sealed.bytes,
            cost,
            on: place.on,
            copy: place.copy,
            doubled: place.doubled,
            tried: place.on.is_some(),
        }));
    }

    /// The sealed bytes of `number`, unless they have been acknowledged.
    pub fn get(&self, number: u64) -> Option<&Bytes> {
        let index = usize::try_from(number.checked_sub(self.base)?).ok()?;
        self.records.get(index)?.as_ref().map(|r| &r.bytes)
    }

    /// Frees what `ack` covers. True if anything was freed.
    pub fn acknowledge(&mut self, ack: &Ack) -> Result<bool, Violation> {
        let end = self.next_number();
        let highest = ack.ranges.last().map_or(ack.cumulative, |r| r.end);
        if highest > end {
            return Err(Violation::protocol(
                "acknowledgement of a record that was never sent",
            ));
        }
        let mut freed = false;
        while self.base < ack.cumulative {
            if let Some(record) = self.records.pop_front().flatten() {
                self.memory.sub(record.cost);
                freed = true;
            }
            self.base += 1;
        }
        for range in &ack.ranges {
            for number in range.start.max(self.base)..range.end {
                freed |= self.free(number);
            }
        }
        while matches!(self.records.front(), Some(None)) {
            self.records.pop_front();
            self.base += 1;
        }
        Ok(freed)
    }

    fn free(&mut self, number: u64) -> bool {
        let slot = &mut self.records[(number - self.base) as usize];
        let Some(record) = slot.take() else {
            return false;
        };
        self.memory.sub(record.cost);
        true
    }

    /// What was scheduled on `lost` alone waits for another transport.
    pub fn unschedule(&mut self, lost: Handle) {
        for record in self.records.iter_mut().flatten() {
            if record.copy == Some(lost) {
                record.copy = None;
            }
            if record.on == Some(lost) {
                record.on = record.copy.take();
            }
        }
    }

    /// Schedules what is on `from` alone on `to` as well, up to `room` bytes; calls `each` with number
    /// and length, in order. Returns the room that is left, which is none if something was left out.
    pub fn copy(
        &mut self,
        from: Handle,
        to: Handle,
        mut room: usize,
        mut each: impl FnMut(u64, usize),
    ) -> usize {
        for (index, slot) in self.records.iter_mut().enumerate() {
            let alone = |r: &&mut Record| r.on == Some(from) && r.copy.is_none();
            if let Some(record) = slot.as_mut().filter(alone) {
                let Some(left) = room.checked_sub(record.bytes.len()) else {
                    return 0;
                };
                room = left;
                record.copy = Some(to);
                each(self.base + index as u64, record.bytes.len());
            }
        }
        room
    }

    /// Takes back what was copied to `to`.
    pub fn uncopy(&mut self, to: Handle, which: Copies) {
        for record in self.records.iter_mut().flatten() {
            if record.copy == Some(to) && (which == Copies::All || !record.doubled) {
                record.copy = None;
            }
        }
    }

    /// What is on both stays on `to` alone.
    pub fn keep_copies(&mut self, from: Handle, to: Handle) {
        for record in self.records.iter_mut().flatten() {
            if record.on == Some(from) && record.copy == Some(to) {
                record.on = record.copy.take();
            }
        }
    }

    /// Whether `number` is not acknowledged and scheduled on `handle`.
    pub fn is_on(&self, number: u64, handle: Handle) -> bool {
        let index = number
            .checked_sub(self.base)
            .and_then(|i| usize::try_from(i).ok());
        let record = index.and_then(|i| self.records.get(i)?.as_ref());
        record.is_some_and(|r| r.on == Some(handle) || r.copy == Some(handle))
    }

    /// Schedules everything that waits on `handle`; calls `each` with number, length and
    /// whether it had been scheduled before, in order.
    pub fn schedule_waiting(&mut self, handle: Handle, mut each: impl FnMut(u64, usize, bool)) {
        for (index, slot) in self.records.iter_mut().enumerate() {
            if let Some(record) = slot.as_mut().filter(|r| r.on.is_none()) {
                record.on = Some(handle);
                each(self.base + index as u64, record.bytes.len(), record.tried);
                record.tried = true;
            }
        }
    }

    /// Whether any record is still scheduled on `handle`.
    pub fn any_on(&self, handle: Handle) -> bool {
        let here = |r: &Record| r.on == Some(handle) || r.copy == Some(handle);
        self.records.iter().flatten().any(here)
    }
}
