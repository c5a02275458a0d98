//! Which transport a record goes to, and how much may be sealed for it.
//!
//! Records go to the active transport, unless their stream asked for more: *redundant* ones go to a
//! second path as well, *bonded* ones wherever they are through first. Beside the active transport
//! there may be *lanes*, further transports on its path, which keep the queues of streams apart.

use std::time::Duration;

use super::Session;
use super::event::{Event, Handle, StreamId};
use super::pool::room_within;
use super::transport::{Phase, Transport};
use crate::Time;
use crate::limits::{
    BOND_QUEUE_BYTES, BOND_REORDER_BYTES, RECORD_DATA_BYTES_MIN, RECORD_DATA_BYTES_UNKNOWN,
    RECORD_WINDOW_RESERVE, RETAIN_RESERVE_BYTES, RETAINED_OVERHEAD_BYTES, STREAM_DATA_BYTES_MAX,
};
use crate::wire::{Mode, Route, Service};

/// Where a record goes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Place {
    /// `None`: it waits for a transport.
    pub on: Option<Handle>,
    pub copy: Option<Handle>,
    /// The copy is what its stream asked for, not a guess.
    pub doubled: bool,
}

impl Place {
    const fn one(on: Handle) -> Self {
        Self {
            on: Some(on),
            copy: None,
            doubled: false,
        }
    }

    pub fn handles(self) -> impl Iterator<Item = Handle> {
        [self.on, self.copy].into_iter().flatten()
    }
}

/// Whether a stream takes all that it is given: then others should not wait behind it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Appetite {
    window_at: Time,
    written: usize,
    hungry_until: Time,
}

impl Appetite {
    /// Bytes are counted over this time.
    const WINDOW: Duration = Duration::from_millis(250);
    /// A stream that wrote less in it is interactive, even if it had to wait.
    const BULK_BYTES: usize = 64 * 1024;
    /// One that wrote less than this is small: a question, or keys that are typed.
    const SMALL_BYTES: usize = 16 * 1024;
    /// A bulk stream is one for so long after it last had to wait.
    const LASTS: Duration = Duration::from_secs(1);

    pub fn wrote(&mut self, now: Time, bytes: usize) {
        if now.since(self.window_at) > Self::WINDOW {
            self.window_at = now;
            self.written = 0;
        }
        self.written += bytes;
    }

    fn waits(&mut self, now: Time) {
        if self.written >= Self::BULK_BYTES {
            self.hungry_until = now + Self::LASTS;
        }
    }

    fn is_small(&self, now: Time) -> bool {
        now.since(self.window_at) > Self::WINDOW || self.written < Self::SMALL_BYTES
    }

    pub fn is_bulk(&self, now: Time) -> bool {
        now < self.hungry_until
    }
}

impl Session {
    fn usable(&self, handle: Handle) -> Option<&Transport> {
        self.transports.get(&handle).filter(|t| t.can_carry())
    }

    /// One that the peer has answered on, and still does.
    pub(super) fn answering(&self, handle: Handle) -> Option<&Transport> {
        let answers = |t: &&Transport| t.phase == Phase::Up && !t.pulse.is_silent();
        self.usable(handle).filter(answers)
    }

    /// Where the next record of stream `id` goes; `None` while none should be made.
    pub(super) fn place_data(&self, id: StreamId) -> Option<Place> {
        let Some(active) = self.active.filter(|h| self.usable(*h).is_some()) else {
            return Some(Place::default());
        };
        let service = self.streams.get(&id)?.service;
        let doubled = service.mode == Mode::Redundant;
        if let Some(place) = self.place_uncertain(active, doubled) {
            return Some(place);
        }
        Some(Place::one(match service.mode {
            Mode::Bonded => self.soonest()?,
            Mode::Single | Mode::Redundant => match self.lane(id, service, active) {
                Some(lane) => lane,
                None => self.eased(active)?,
            },
        }))
    }

    /// Where a record of other frames goes. Those of redundant streams must not stall them.
    pub(super) fn place_control(&self) -> Place {
        let Some(active) = self.active.filter(|h| self.usable(*h).is_some()) else {
            return Place::default();
        };
        self.place_uncertain(active, self.doubled_streams > 0)
            .unwrap_or(Place::one(active))
    }

    /// On two transports, if the record is to be `doubled` and there is another path, or if it is not
    /// known whether the active transport works.
    fn place_uncertain(&self, active: Handle, doubled: bool) -> Option<Place> {
        if doubled && let Some(copy) = self.partner(active) {
            return Some(Place {
                on: Some(active),
                copy: Some(copy),
                doubled,
            });
        }
        let hedge = self.hedge?;
        let copies = hedge.room > 0 && hedge.to != active && self.usable(hedge.to).is_some();
        Some(Place {
            on: Some(active),
            copy: copies.then_some(hedge.to),
            doubled: false,
        })
    }

    /// The transport that has least in common with `active`.
    pub(super) fn partner(&self, active: Handle) -> Option<Handle> {
        let route = self.transports.get(&active)?.route;
        let others = self.transports.keys().copied().filter(|h| *h != active);
        let apart = others.filter_map(|h| {
            let transport = self.answering(h)?;
            let distance = transport.route.distance(route);
            (distance > 0 && transport.route.lane == 0).then_some((distance, transport.wire_id, h))
        });
        apart.max().map(|(_, _, h)| h)
    }

    /// The transport over which a record is through first; `None` where that one has to be waited for.
    fn soonest(&self) -> Option<Handle> {
        let (mut best, mut best_free) = (None::<Duration>, None::<(Duration, Handle)>);
        let mut rates = 0;
        for &handle in self.transports.keys() {
            let Some(t) = self.answering(handle).filter(|t| t.route.lane == 0) else {
                continue;
            };
            rates += t.pulse.rate().unwrap_or(0);
            let eta = t.pulse.through_in(t.queued_bytes());
            best = Some(best.map_or(eta, |b| b.min(eta)));
            let free = t.queued_bytes() < BOND_QUEUE_BYTES;
            if free && best_free.is_none_or(|(b, _)| eta < b) {
                best_free = Some((eta, handle));
            }
        }
        let (eta, handle) = best_free.or_else(|| self.lonely())?;
        let ahead = eta.saturating_sub(best.unwrap_or(eta)).as_micros();
        // What goes on at the total rate until the slow one is through waits in the receiver's memory.
        let waiting = ahead * u128::from(rates) / 1_000_000;
        (waiting <= BOND_REORDER_BYTES as u128).then_some(handle)
    }

    /// Nothing answers yet: what is active may have just been dialled.
    fn lonely(&self) -> Option<(Duration, Handle)> {
        let answering = |h: &Handle| self.answering(*h).is_some_and(|t| t.route.lane == 0);
        if self.transports.keys().any(answering) {
            return None;
        }
        let active = self.active?;
        let full = self.usable(active)?.is_full();
        (!full).then_some((Duration::ZERO, active))
    }

    /// Whether `id` has sent little of late: what it sends should not wait for transfers.
    pub fn sends_little(&self, id: StreamId) -> bool {
        let stream = self.streams.get(&id);
        stream.is_some_and(|s| s.appetite.is_small(self.now))
    }

    /// How many bytes [`Session::write`] takes for `id` now, at most one record's worth. Zero
    /// means: wait for what [`Self::lack`] says.
    pub fn capacity(&mut self, id: StreamId) -> usize {
        let (room, credit) = (self.memory_room(), self.credit_of(id));
        self.wants_room |= room == 0;
        if credit == 0 {
            self.want_credit(id);
        }
        let Some(most) = self.queue_room(id).or_else(|| self.room_elsewhere(id)) else {
            self.wants_queue = true;
            self.room_due = self.pair_due().into_iter().chain(self.ease_due()).min();
            return 0;
        };
        room.min(credit).min(most)
    }

    /// A stream that has to wait may be one for another queue from here on, and that one may have room.
    fn room_elsewhere(&mut self, id: StreamId) -> Option<usize> {
        let (now, before) = (self.now, self.way(id));
        let stream = self.streams.get_mut(&id)?;
        stream.appetite.waits(now);
        stream.packing.waits(now);
        if self.way(id) == before {
            return None;
        }
        self.queue_room(id)
    }

    /// [`Self::capacity`] without regard to the record's best size, and without a wish to be told.
    #[cfg(feature = "sim")]
    pub(super) fn capacity_of(&self, id: StreamId) -> Option<usize> {
        self.queue_room(id)?;
        Some(self.memory_room().min(self.credit_of(id)))
    }

    /// The best size of the next record of `id`; `None` while the queues that it might go to are full.
    fn queue_room(&self, id: StreamId) -> Option<usize> {
        let place = self.place_data(id)?;
        // While it is not known whether the active one works, its queue says nothing.
        let counts = match self.hedge {
            Some(hedge) => Place::one(hedge.to),
            None => place,
        };
        if self.hedge.is_some_and(|hedge| hedge.room == 0) {
            // It would go on the silent one alone, and all of it at once elsewhere when that is settled.
            return None;
        }
        let waits = self.waits_in_pair(counts).unwrap_or_else(|| {
            let mut queues = counts.handles().peekable();
            queues.peek().is_some() && queues.all(|h| self.is_full_beside_pair(h))
        });
        if waits {
            return None;
        }
        let size = self.plain_record_bytes(place);
        let most = self.flight_room();
        let stream = self.streams.get(&id);
        Some(stream.map_or(size.min(most), |s| s.packing.plain_bytes(size, most)))
    }

    /// The best size of a record that is not packed and goes to `place`.
    pub(super) fn plain_record_bytes(&self, place: Place) -> usize {
        let transports = place.handles().filter_map(|h| self.transports.get(&h));
        let sizes = transports.map(|t| self.record_bytes(t));
        sizes.min().unwrap_or(STREAM_DATA_BYTES_MAX)
    }

    /// The best size of a record on `transport`: as on another one, while nothing is known of it.
    fn record_bytes(&self, transport: &Transport) -> usize {
        let known = |t: &&Transport| t.pulse.rate().is_some();
        if known(&transport) {
            return transport.pulse.record_bytes();
        }
        let others = self.transports.values().filter(known);
        let most = others.map(|t| t.pulse.record_bytes()).max();
        let assumed = most.unwrap_or(RECORD_DATA_BYTES_UNKNOWN);
        (transport.pulse).record_bytes_from(assumed.min(RECORD_DATA_BYTES_UNKNOWN))
    }

    /// A record that is sent again keeps its size: it must not be most of what a standby may send
    /// before its first answer.
    fn flight_room(&self) -> usize {
        let standbys = (self.transports.iter()).filter(|(h, _)| self.active != Some(**h));
        standbys
            .filter_map(|(_, t)| t.window)
            .min()
            .map_or(usize::MAX, |w| (w / 2).max(RECORD_DATA_BYTES_MIN))
    }

    /// What memory, record numbers and key epochs leave for data.
    pub(super) fn memory_room(&self) -> usize {
        let own = self.config.memory_bytes / 2;
        self.room_of(self.retained.limit(own, self.active.is_none()))
    }

    /// What [`Self::claim`] takes: what other sessions do must not take back what [`Self::capacity`] has said.
    pub(super) fn claimable(&self, id: StreamId) -> usize {
        if self.queue_room(id).is_none() {
            return 0;
        }
        let room = self.room_of(self.config.memory_bytes / 2);
        room.min(self.credit_of(id))
    }

    /// What a budget for what is not acknowledged leaves for data, with record numbers and key epochs.
    fn room_of(&self, budget: usize) -> usize {
        if !self.is_open() || self.epochs.exhausted(self.config.rekey_records) {
            return 0;
        }
        if self.retained.span() + RECORD_WINDOW_RESERVE >= self.peer.record_window {
            return 0;
        }
        let used =
            self.retained.bytes() + RETAIN_RESERVE_BYTES.min(budget / 4) + RETAINED_OVERHEAD_BYTES;
        room_within(budget.saturating_sub(used)).min(STREAM_DATA_BYTES_MAX)
    }

    /// Memory was freed: tell the driver if it waits.
    pub(super) fn unblock(&mut self) {
        if self.wants_room && self.memory_room() > 0 {
            self.wants_room = false;
            self.events.push_back(Event::Writable);
        }
    }

    /// The queue of `handle` has become shorter.
    pub(super) fn queue_moved(&mut self, handle: Handle) {
        let room = |t: &Transport| !t.is_full();
        if self.wants_queue && self.transports.get(&handle).is_some_and(room) {
            self.queues_changed();
        }
    }

    /// Records may go elsewhere now.
    pub(super) fn queues_changed(&mut self) {
        self.room_due = None;
        if std::mem::take(&mut self.wants_queue) {
            self.events.push_back(Event::Writable);
        }
    }

    /// The driver knows from elsewhere, such as the kernel's congestion window, how many bytes
    /// `handle` may send at once.
    pub fn assume_window(&mut self, handle: Handle, bytes: usize) {
        if let Some(transport) = self.transports.get_mut(&handle) {
            transport.window = Some(bytes);
        }
    }

    /// Where `handle` runs, as its dialler said.
    pub fn route(&self, handle: Handle) -> Option<Route> {
        Some(self.transports.get(&handle)?.route)
    }

    /// What the opener of stream `id` asked for.
    pub fn service(&self, id: StreamId) -> Option<Service> {
        Some(self.streams.get(&id)?.service)
    }

    /// How fast `handle` carries data, in bytes a second, once that is known.
    pub fn rate(&self, handle: Handle) -> Option<u64> {
        self.transports.get(&handle)?.pulse.rate()
    }
}
