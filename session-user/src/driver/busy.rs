//! Whether a driver that has nothing to do looks for news again at once, or sleeps.
//!
//! To sleep and to be woken costs more than all that a question and its answer cost an agent in user space, above all
//! where the processor goes idle meanwhile: a virtual one leaves its host for that. So where news comes again and again
//! within a short time, it is looked for so long before anybody sleeps, as the kernel does for network cards
//! (`net.core.busy_poll`) and idle guests (Documentation/virt/guest-halt-polling.rst). A conversation that waits for a
//! network, or for a person, is none of that kind: one wait that takes longer ends it. Nor is a stream that only comes from one
//! side: nothing is gained by looking for its next piece.

use std::time::{Duration, Instant};

/// Who moves more than this between two waits, in bytes, is woken seldom for what it moves, and needs its processor.
const BULK: usize = 16 * 1024;
/// Who has moved so much without a wait lets the other tasks of its thread have their turn, in bytes.
const STRETCH: usize = 256 * 1024;
/// So many short waits in a row, for both sides, are a conversation that goes on.
const RUN: u8 = 8;
/// Who speaks more often than this without an answer holds no conversation. It is less than [`RUN`], so that the waits for
/// one who streams, and is acknowledged now and then, are never enough.
const SPEECH_MAX: u8 = 6;
/// Whoever looks gives way each time, and comes back within this unless somebody else has more to do than to answer.
const AWAY: Duration = Duration::from_micros(300);
/// So long nobody looks then, at first and at most: to give way to such a one costs the time that the scheduler lets it
/// run, and news would wait for that. Each pause that follows soon is twice as long as the one before.
const PAUSE_FIRST: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// What comes within so many pauses of the last one follows soon.
const SOON: u32 = 8;

/// What is known of the waits of one driver.
#[derive(Debug)]
pub(super) struct BusyPoll {
    /// It is looked for so long; zero: never.
    limit: Duration,
    /// How often in a row news came within the limit, from both sides.
    run: u8,
    /// Who was heard last, and how often in a row.
    last: Option<Speaker>,
    speech: u8,
    /// Bytes moved since it was last waited.
    moved: usize,
    /// Bytes moved since the other tasks of this thread had their turn.
    stretch: usize,
    /// The latest pause, and when it is over: nobody looks before that.
    pause: Duration,
    resume_at: Option<Instant>,
}

/// A wait that begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// What it takes is of no interest, and it is slept through.
    Sleep,
    /// The same, but what it takes is to be told.
    Measure,
    /// It is looked for news as long as [`BusyPoll::may_look`].
    Look,
}

/// Between whom an agent stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Speaker {
    /// Applications, or targets.
    Near,
    /// The peer.
    Far,
}

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// A socket of one side.
    Socket(Speaker),
    /// The driver's own deadline, which says nothing of who speaks.
    Deadline,
    /// What other threads may have to do with, which need a processor as well; and datagrams, for which nobody waits.
    Others,
}

impl BusyPoll {
    /// One that has seen nothing.
    pub fn new(limit: Duration) -> Self {
        Self {
            limit,
            run: 0,
            last: None,
            speech: 0,
            moved: 0,
            stretch: 0,
            pause: PAUSE_FIRST,
            resume_at: None,
        }
    }

    /// So many bytes came.
    pub fn moved(&mut self, bytes: usize) {
        self.moved = self.moved.saturating_add(bytes);
        self.stretch = self.stretch.saturating_add(bytes);
    }

    /// Whether the other tasks of this thread, and its sockets, come first though there is more to do.
    pub fn is_others_turn(&self) -> bool {
        self.stretch >= STRETCH
    }

    /// They had it.
    pub fn let_others(&mut self) {
        self.stretch = 0;
    }

    /// There is nothing to do.
    pub fn begin(&mut self) -> Wait {
        self.let_others();
        if std::mem::take(&mut self.moved) > BULK {
            self.run = 0;
            return Wait::Sleep;
        }
        match self.run {
            _ if self.limit.is_zero() => Wait::Sleep,
            RUN.. => Wait::Look,
            _ => Wait::Measure,
        }
    }

    /// Whether to look now, in a wait that began at `began`.
    pub fn may_look(&self, began: Instant, now: Instant) -> bool {
        let pausing = self.resume_at.is_some_and(|at| now < at);
        !pausing && now.saturating_duration_since(began) < self.limit
    }

    /// Whoever looks gave way at `then`, and is back `now`.
    pub fn gave_way(&mut self, then: Instant, now: Instant) {
        if now.saturating_duration_since(then) > AWAY {
            self.make_pause(now);
        }
    }

    fn make_pause(&mut self, now: Instant) {
        let soon = self
            .resume_at
            .is_some_and(|at| now < at + SOON * self.pause);
        self.pause = if soon {
            PAUSE_MAX.min(2 * self.pause)
        } else {
            PAUSE_FIRST
        };
        self.resume_at = Some(now + self.pause);
    }

    /// News came after so long.
    pub fn end(&mut self, what: Heard, after: Duration) {
        if let Heard::Socket(side) = what {
            let again = self.last.replace(side) == Some(side);
            self.speech = if again {
                self.speech.saturating_add(1)
            } else {
                1
            };
        }
        self.run = match what {
            Heard::Others => 0,
            _ if after > self.limit => 0,
            Heard::Deadline => self.run,
            Heard::Socket(_) if self.speech > SPEECH_MAX => 0,
            Heard::Socket(_) => RUN.min(self.run + 1),
        };
    }

    /// Something came that is [`Heard::Others`], whether it was waited for or not.
    pub fn interrupted(&mut self) {
        self.run = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(100);
    const LATE: Duration = Duration::from_micros(101);
    const MICRO: Duration = Duration::from_micros(1);

    impl BusyPoll {
        /// One that looks for news for `limit`, since it has heard both sides in turn.
        pub fn in_conversation(limit: Duration) -> Self {
            let mut busy = Self::new(limit);
            busy.run = RUN;
            busy
        }
    }

    /// One that has just come to look.
    fn in_conversation() -> BusyPoll {
        let mut busy = BusyPoll::new(LIMIT);
        for _ in 0..RUN / 2 {
            for side in [Speaker::Near, Speaker::Far] {
                assert_eq!(busy.begin(), Wait::Measure);
                busy.end(Heard::Socket(side), LIMIT);
            }
        }
        assert_eq!(busy.begin(), Wait::Look);
        busy
    }

    #[test]
    fn others_have_their_turn_though_there_is_always_more_to_do() {
        let mut busy = BusyPoll::new(LIMIT);
        busy.moved(STRETCH - 1);
        assert!(!busy.is_others_turn());
        busy.moved(1);
        assert!(busy.is_others_turn());
        busy.let_others();
        assert!(!busy.is_others_turn());
        busy.moved(STRETCH);
        busy.begin();
        assert!(!busy.is_others_turn());
        busy.moved(usize::MAX);
        busy.moved(usize::MAX);
        assert!(busy.is_others_turn());
    }

    #[test]
    fn one_long_wait_ends_a_conversation() {
        let long = [Heard::Socket(Speaker::Near), Heard::Deadline];
        for news in long {
            let mut busy = in_conversation();
            busy.end(news, LIMIT);
            assert_eq!(busy.begin(), Wait::Look);
            busy.end(news, LATE);
            assert_eq!(busy.begin(), Wait::Measure);
        }
    }

    #[test]
    fn what_others_have_to_do_with_is_none() {
        let mut busy = in_conversation();
        busy.interrupted();
        assert_eq!(busy.begin(), Wait::Measure);
        let mut busy = in_conversation();
        busy.end(Heard::Others, MICRO);
        assert_eq!(busy.begin(), Wait::Measure);
    }

    #[test]
    fn a_stream_from_one_side_is_none() {
        for (side, other) in [(Speaker::Near, Speaker::Far), (Speaker::Far, Speaker::Near)] {
            let mut busy = BusyPoll::new(LIMIT);
            for _ in 0..10 {
                for _ in 0..32 {
                    busy.end(Heard::Socket(side), MICRO);
                    assert_eq!(busy.begin(), Wait::Measure);
                }
                // It is acknowledged.
                busy.end(Heard::Socket(other), MICRO);
                assert_eq!(busy.begin(), Wait::Measure);
            }
        }
    }

    #[test]
    fn answers_in_several_pieces_end_no_conversation() {
        let mut busy = in_conversation();
        for _ in 0..100 {
            for side in [Speaker::Near, Speaker::Far] {
                for _ in 0..SPEECH_MAX {
                    busy.end(Heard::Socket(side), MICRO);
                    assert_eq!(busy.begin(), Wait::Look);
                }
            }
        }
    }

    #[test]
    fn bulk_is_none() {
        let mut busy = in_conversation();
        busy.moved(BULK);
        assert_eq!(busy.begin(), Wait::Look);
        busy.moved(BULK);
        busy.moved(1);
        assert_eq!(busy.begin(), Wait::Sleep);
        assert_eq!(busy.begin(), Wait::Measure);
        busy.moved(usize::MAX);
        busy.moved(usize::MAX);
        assert_eq!(busy.begin(), Wait::Sleep);
    }

    #[test]
    fn it_looks_for_as_long_as_it_may() {
        let busy = in_conversation();
        let began = Instant::now();
        let mut now = began;
        let mut looks = 0;
        while busy.may_look(began, now) {
            now += 10 * MICRO;
            looks += 1;
        }
        assert_eq!(looks, 10);
    }

    #[test]
    fn who_was_off_its_processor_leaves_it_to_others_for_a_while() {
        let mut busy = in_conversation();
        let began = Instant::now();
        busy.gave_way(began, began + AWAY);
        assert!(busy.may_look(began, began));
        let away = began + AWAY + MICRO;
        busy.gave_way(began, away);
        let later = away + PAUSE_FIRST.saturating_sub(MICRO);
        assert!(!busy.may_look(later, later));
        let then = away + PAUSE_FIRST;
        assert!(busy.may_look(then, then));
    }

    #[test]
    fn pauses_grow_where_they_follow_each_other_and_are_short_again() {
        let mut busy = in_conversation();
        let mut now = Instant::now();
        let mut pauses = Vec::new();
        for _ in 0..10 {
            busy.gave_way(now, now + LATE + AWAY);
            now += LATE + AWAY + busy.pause + Duration::from_millis(1);
            pauses.push(busy.pause);
        }
        let first = PAUSE_FIRST;
        assert_eq!(pauses[..4], [first, 2 * first, 4 * first, 8 * first]);
        assert_eq!(pauses[8..], [PAUSE_MAX; 2]);
        now += (SOON + 1) * PAUSE_MAX;
        busy.gave_way(now, now + LATE + AWAY);
        assert_eq!(busy.pause, first);
    }

    #[test]
    fn without_a_limit_nothing_is_measured() {
        let mut busy = BusyPoll::new(Duration::ZERO);
        for _ in 0..2 * RUN {
            assert_eq!(busy.begin(), Wait::Sleep);
            busy.end(Heard::Socket(Speaker::Near), Duration::ZERO);
            busy.end(Heard::Socket(Speaker::Far), Duration::ZERO);
        }
    }
}
