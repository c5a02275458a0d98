//! In which order streams go on that had something to send and no room for it.

use std::collections::VecDeque;

use session_proto::session::{StreamId, Way};

/// Streams that wait for room, in a row for each way that they are sent on and one for what all of them share: one that
/// finds no room says so of its own row alone, or of all. Those that send little come first, so that a question need not
/// wait for transfers; then those that got nothing the last time, and then the others. There may be very many: they are
/// let on as long as there is room, and not all at once.
#[derive(Debug, Default)]
pub(super) struct Blocked {
    /// Few: one for each lane that there can be, and one for each mode.
    rows: Vec<Row>,
    /// How often a stream has come to wait.
    waits: u64,
}

/// Streams for which there is room at the same time.
#[derive(Debug)]
struct Row {
    /// `None`: for those that found no room for anybody.
    way: Option<Way>,
    /// By [`Class`], each stream with its turn among all rows.
    queues: [VecDeque<(u64, StreamId)>; CLASSES],
    /// Room came, and nobody has found it used up since.
    room: bool,
}

/// Which streams come first.
#[derive(Clone, Copy, Debug)]
enum Class {
    Small,
    Overdue,
    Other,
}

const CLASSES: usize = 3;

impl Row {
    fn is_empty(&self) -> bool {
        self.queues.iter().all(VecDeque::is_empty)
    }
}

impl Blocked {
    /// Found no room on its way; `None`: there is none for anybody. `small`: it sends little; `sent`: it has sent
    /// something since it last waited, and has more.
    pub fn wait(&mut self, id: StreamId, way: Option<Way>, small: bool, sent: bool) {
        let class = match (small, sent) {
            (true, false) => Class::Small,
            (false, false) => Class::Overdue,
            // One that had more to say than there was room for is no question, however little it sends on a slow link.
            (_, true) => Class::Other,
        };
        if way.is_none() {
            self.rows.iter_mut().for_each(|row| row.room = false);
        }
        let turn = self.waits;
        self.waits += 1;
        let row = self.row(way);
        row.room = false;
        row.queues[class as usize].push_back((turn, id));
    }

    fn row(&mut self, way: Option<Way>) -> &mut Row {
        let known = self.rows.iter().position(|row| row.way == way);
        let index = known.unwrap_or_else(|| {
            self.rows.push(Row {
                way,
                queues: Default::default(),
                room: false,
            });
            self.rows.len() - 1
        });
        &mut self.rows[index]
    }

    /// There is room somewhere: who it is for shows when they try.
    pub fn room_came(&mut self) {
        // The ways change with the lanes that there are.
        self.rows.retain(|row| !row.is_empty());
        self.rows.iter_mut().for_each(|row| row.room = true);
    }

    /// Who goes on next, while there is room.
    pub fn next(&mut self) -> Option<StreamId> {
        (0..CLASSES).find_map(|class| {
            let open = self.rows.iter_mut().filter(|row| row.room);
            let queues = open.map(|row| &mut row.queues[class]);
            let waiting = queues.filter_map(|queue| Some((queue.front()?.0, queue)));
            let (_, first) = waiting.min_by_key(|(turn, _)| *turn)?;
            first.pop_front().map(|(_, id)| id)
        })
    }

    /// Nobody waits any more.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use session_proto::session::LaneChoice;
    use session_proto::wire::Mode;

    const USUAL: Option<Way> = Some(Way {
        mode: Mode::Single,
        lane: LaneChoice::First,
    });
    const LANE: Option<Way> = Some(Way {
        mode: Mode::Single,
        lane: LaneChoice::Own(1),
    });
    const BONDED: Option<Way> = Some(Way {
        mode: Mode::Bonded,
        lane: LaneChoice::First,
    });

    fn all(blocked: &mut Blocked) -> Vec<StreamId> {
        std::iter::from_fn(|| blocked.next()).collect()
    }

    #[test]
    fn small_streams_come_first_and_then_those_that_got_nothing() {
        let mut blocked = Blocked::default();
        for (id, way, small, sent) in [
            (1, USUAL, false, true),
            (2, LANE, false, false),
            (3, USUAL, true, true),
            (4, USUAL, false, false),
            (5, BONDED, true, false),
            (6, None, false, false),
        ] {
            blocked.wait(id, way, small, sent);
        }
        assert_eq!(blocked.next(), None);
        blocked.room_came();
        assert_eq!(all(&mut blocked), [5, 2, 4, 6, 1, 3]);
    }

    #[test]
    fn nobody_goes_on_once_somebody_found_no_room() {
        let mut blocked = Blocked::default();
        for id in 0..3 {
            blocked.wait(id, USUAL, false, false);
        }
        blocked.room_came();
        assert_eq!(blocked.next(), Some(0));
        blocked.wait(0, USUAL, false, true);
        assert_eq!(blocked.next(), None);
        blocked.room_came();
        assert_eq!(all(&mut blocked), [1, 2, 0]);
    }

    #[test]
    fn a_way_without_room_holds_up_no_other() {
        let mut blocked = Blocked::default();
        for (id, way) in [(0, LANE), (1, LANE), (2, USUAL), (3, BONDED), (4, USUAL)] {
            blocked.wait(id, way, false, false);
        }
        blocked.room_came();
        assert_eq!(blocked.next(), Some(0));
        blocked.wait(0, LANE, false, false);
        assert_eq!(blocked.next(), Some(2));
        blocked.wait(2, USUAL, false, true);
        assert_eq!(all(&mut blocked), [3]);
        blocked.room_came();
        assert_eq!(all(&mut blocked), [1, 4, 0, 2]);
    }

    #[test]
    fn one_whose_way_has_changed_holds_up_none_of_those_it_waited_with() {
        let mut blocked = Blocked::default();
        for id in 0..3 {
            blocked.wait(id, USUAL, false, false);
        }
        blocked.room_came();
        assert_eq!(blocked.next(), Some(0));
        blocked.wait(0, LANE, false, false);
        assert_eq!(all(&mut blocked), [1, 2]);
    }

    #[test]
    fn what_all_share_holds_up_everybody() {
        let mut blocked = Blocked::default();
        for (id, way) in [(0, LANE), (1, USUAL), (2, BONDED)] {
            blocked.wait(id, way, false, false);
        }
        blocked.room_came();
        assert_eq!(blocked.next(), Some(0));
        blocked.wait(0, None, false, true);
        assert_eq!(blocked.next(), None);
        blocked.room_came();
        assert_eq!(all(&mut blocked), [1, 2, 0]);
    }

    #[test]
    fn rows_that_nobody_waits_in_are_not_kept() {
        let mut blocked = Blocked::default();
        for of in 1..100 {
            let lane = LaneChoice::Nth { nth: 0, of };
            let way = Way {
                mode: Mode::Single,
                lane,
            };
            blocked.wait(0, Some(way), false, true);
            blocked.room_came();
            assert_eq!(blocked.next(), Some(0));
        }
        assert!(blocked.rows.len() <= 2);
    }

    /// Each round has room for one of many: all have had a turn before one has a second.
    #[test]
    fn all_have_their_turn() {
        const STREAMS: u64 = 100;
        let mut blocked = Blocked::default();
        for id in 0..STREAMS {
            blocked.wait(id, USUAL, false, false);
        }
        let mut sent = vec![0; STREAMS as usize];
        for _ in 0..3 * STREAMS {
            blocked.room_came();
            let id = blocked.next().unwrap();
            sent[id as usize] += 1;
            blocked.wait(id, USUAL, false, true);
        }
        assert!(sent.iter().all(|n| (2..=4).contains(n)), "{sent:?}");
    }
}
