//! The lanes that streams ask for to themselves.

use session_proto::limits::LANES_MAX;

/// How many streams each lane is for. Counted, as there may be very many streams.
#[derive(Debug, Default)]
pub(super) struct OwnLanes([usize; LANES_MAX as usize]);

impl OwnLanes {
    /// One more stream asks for `lane`, which is one of [`session_proto::session::own_lane`].
    pub fn add(&mut self, lane: u64) {
        self.0[Self::index(lane)] += 1;
    }

    /// One less does.
    pub fn remove(&mut self, lane: u64) {
        self.0[Self::index(lane)] -= 1;
    }

    /// The lanes that some stream asks for, in order.
    pub fn wanted(&self) -> impl Iterator<Item = u64> {
        let counts = (1..=LANES_MAX).zip(&self.0);
        counts
            .filter(|(_, count)| **count > 0)
            .map(|(lane, _)| lane)
    }

    /// Lanes are counted from 1.
    fn index(lane: u64) -> usize {
        (lane - 1) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use session_proto::session::own_lane;

    #[test]
    fn a_lane_is_wanted_until_its_last_stream_has_ended() {
        let mut lanes = OwnLanes::default();
        // Each of the first lanes for two streams, and the last for one.
        let streams = (0..2 * LANES_MAX - 1).map(|n| 2 * n);
        streams.clone().for_each(|id| lanes.add(own_lane(id)));
        assert!(lanes.wanted().eq(1..=LANES_MAX));
        for id in streams.clone().take(LANES_MAX as usize) {
            lanes.remove(own_lane(id));
        }
        assert!(lanes.wanted().eq(1..LANES_MAX));
        for id in streams.skip(LANES_MAX as usize) {
            lanes.remove(own_lane(id));
        }
        assert_eq!(lanes.wanted().next(), None);
    }
}
