//! What the simulator's checkers look at: no driver needs it, and nothing here changes anything.

use super::Session;
use super::event::{Handle, StreamId};
use super::transport::Transport;

impl Session {
    /// The number that the next record of space R gets.
    pub fn next_record(&self) -> u64 {
        self.retained.next_number()
    }

    /// The lowest record number that the peer has not acknowledged.
    pub fn lowest_unacknowledged(&self) -> u64 {
        self.retained.lowest()
    }

    /// Whether the sealed bytes of record `number` are still kept.
    pub fn retains_record(&self, number: u64) -> bool {
        self.retained.get(number).is_some()
    }

    /// Whether record `number` of the peer has been received and opened.
    pub fn has_received(&self, number: u64) -> bool {
        self.received.contains(number)
    }

    /// Every record number of the peer below this one has been received.
    pub fn received_below(&self) -> u64 {
        self.received.cumulative()
    }

    /// The silent transport and the one beside it, while records go out on both.
    pub fn hedged(&self) -> Option<(Handle, Handle)> {
        self.hedge.map(|h| (h.from, h.to))
    }

    /// Whether stream `id` could be written to while nothing waits for any socket: then nothing is left
    /// that would tell the driver so.
    pub fn could_write(&self, id: StreamId) -> bool {
        let idle = self.transports.values().all(Transport::is_idle);
        idle && self.events.is_empty() && self.capacity_of(id) > Some(0)
    }

    /// Offset behind the highest byte of stream `id` that has come.
    pub fn has_come(&self, id: StreamId) -> u64 {
        self.streams.get(&id).map_or(0, |s| s.recv.highest)
    }

    /// Whether [`Session::poll_event`] has one.
    pub fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// The transports that record `number` is scheduled on.
    pub fn carriers(&self, number: u64) -> impl Iterator<Item = Handle> + '_ {
        let all = self.transports.keys().copied();
        all.filter(move |h| self.retained.is_on(number, *h))
    }

    /// Bytes that `handle`'s socket takes until it has the last record below `below` of its queue.
    pub fn bytes_ahead(&self, handle: Handle, below: u64) -> usize {
        self.transports
            .get(&handle)
            .map_or(0, |t| t.bytes_ahead(below))
    }
}
