//! Which lane a stream uses, and what streams wait for that can send nothing: those that are placed alike have room at the
//! same time.

use super::Session;
use super::event::{Handle, StreamId};
use crate::limits::LANES_MAX;
use crate::wire::{Mode, Route, Service};

/// What a stream lacks that has no [capacity](Session::capacity).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lack {
    /// Credit of its own: [`super::Event::StreamWritable`] tells of more.
    OwnCredit,
    /// What all streams share, such as memory and the session's credit: [`super::Event::Writable`] tells of more.
    Common,
    /// Room in a queue, as all streams of this way do: [`super::Event::Writable`] tells of more, in whichever queue.
    Queue(Way),
    /// Nothing that may come: it sends no more.
    Ended,
}

/// By which rule a stream's records are placed. At any time those of one way go to the same transports, or have the
/// same choice of them, and so there is room for all of them or for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Way {
    /// What the stream's opener asked for.
    pub mode: Mode,
    /// Which lane it is to use where that stands.
    pub lane: LaneChoice,
}

/// Which lane of the active path a stream is to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LaneChoice {
    /// The path's first transport.
    #[default]
    First,
    /// The lane of this number.
    Own(u64),
    /// One of all that stand, by its place among them.
    Nth {
        /// Counted from 0.
        nth: usize,
        /// How many stand.
        of: usize,
    },
}

impl Session {
    /// A lane of the active path, if the stream is to use one and it stands.
    pub(super) fn lane(&self, id: StreamId, service: Service, active: Handle) -> Option<Handle> {
        let handle = |(handle, _)| handle;
        match self.lane_choice(id, service, active) {
            LaneChoice::First => None,
            LaneChoice::Own(lane) => {
                let mut lanes = self.lanes(active);
                lanes.find(|(_, route)| route.lane == lane).map(handle)
            }
            LaneChoice::Nth { nth, .. } => self.lanes(active).nth(nth).map(handle),
        }
    }

    fn lane_choice(&self, id: StreamId, service: Service, active: Handle) -> LaneChoice {
        if service.own_lane {
            return LaneChoice::Own(own_lane(id));
        }
        let stream = self.streams.get(&id);
        if !stream.is_some_and(|s| s.appetite.is_bulk(self.now)) {
            return LaneChoice::First;
        }
        match self.lanes(active).count() {
            0 => LaneChoice::First,
            of => LaneChoice::Nth {
                nth: (id >> 1) as usize % of,
                of,
            },
        }
    }

    /// The lanes that stand on the path of `active`, oldest first.
    fn lanes(&self, active: Handle) -> impl Iterator<Item = (Handle, Route)> {
        let path = self.transports.get(&active).map(|t| t.route.path);
        let routes = self.transports.keys();
        routes
            .filter_map(|h| Some((*h, self.answering(*h)?.route)))
            .filter(move |(_, route)| Some(route.path) == path && route.lane > 0)
    }

    /// By which rule the records of `id` are placed now.
    pub(super) fn way(&self, id: StreamId) -> Way {
        let service = self.service(id).unwrap_or_default();
        let lane = match self.active {
            Some(active) if service.mode != Mode::Bonded => self.lane_choice(id, service, active),
            _ => LaneChoice::First,
        };
        Way {
            mode: service.mode,
            lane,
        }
    }

    /// What `id` lacks, where its [capacity](Self::capacity) is zero.
    pub fn lack(&self, id: StreamId) -> Lack {
        if self.streams.get(&id).is_none_or(|s| s.send.closed) {
            Lack::Ended
        } else if self.lacks_own_credit(id) {
            Lack::OwnCredit
        } else if self.memory_room() == 0 || self.credit_of(id) == 0 {
            Lack::Common
        } else {
            Lack::Queue(self.way(id))
        }
    }
}

/// The lane of a stream that asks for one to itself. Lanes are few: streams far apart share one.
pub const fn own_lane(id: StreamId) -> u64 {
    1 + (id >> 1) % LANES_MAX
}
