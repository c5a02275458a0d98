//! How a transport is doing: its round-trip time, and whether it has fallen silent.
//!
//! Every record that the peer has not acknowledged is a probe. Where the oldest one has been under
//! way for longer than an answer ever takes, the transport is silent, long before the kernel's
//! retransmission timer says anything. The arithmetic is that of RFC 9002 section 5 and 6.2.

use std::collections::VecDeque;
use std::time::Duration;

use super::rate::{Rate, Sent};
use super::retained::Retained;
use crate::Time;
use crate::limits::{
    ACK_DELAY, RECORD_DATA_BYTES_MIN, RECORD_DATA_BYTES_UNKNOWN, RECORD_TIME, REDUNDANT_ASK_EVERY,
    SILENCE_MARGIN, SILENCE_UNKNOWN_RTT, STREAM_DATA_BYTES_MAX,
};

/// Marks kept, at most. The last one then stands for all that is written later.
const MARKS_MAX: usize = 256;
/// Records written within this time share a mark.
const MARK_EVERY: Duration = Duration::from_millis(1);

/// Some records that were written at about the same time.
#[derive(Clone, Copy, Debug)]
struct Mark {
    /// How many had been written with the last of them.
    end: u64,
    at: Time,
    sent: Sent,
    /// Whether all of them were on no other transport, and whether more followed all of them at once.
    fresh: bool,
    busy: bool,
}

/// A record that a socket took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Written {
    pub number: u64,
    /// Its sealed bytes.
    pub len: usize,
    /// It was on no other transport.
    pub fresh: bool,
    /// More follows at once.
    pub busy: bool,
}

#[derive(Debug, Default)]
pub(super) struct Pulse {
    srtt: Option<Duration>,
    rttvar: Duration,
    /// A record whose acknowledgement will tell the round-trip time.
    sample: Option<(u64, Time)>,
    /// What was written and may be unacknowledged, oldest first. The last of some may have come over
    /// another transport when the first has not come at all, so every one counts.
    numbers: VecDeque<u64>,
    /// How many were written before these.
    settled: u64,
    /// The same, by time.
    marks: VecDeque<Mark>,
    /// Since when the socket has taken nothing of what is to be written.
    blocked: Option<Time>,
    /// A PING of ours that has not been answered.
    ping: Option<(u64, Time)>,
    /// When to ask, should nothing more be heard.
    ask_at: Option<Time>,
    /// Nothing that was written before counts any more.
    floor: Time,
    /// When something last came, in either direction: an answer, were it to one of many records, or a record of the peer's.
    progress: Time,
    /// When a PONG last came.
    heard_at: Time,
    /// The driver knows that the path is alive, and will look again then.
    vouched: Time,
    silent: bool,
    rate: Rate,
}

impl Pulse {
    /// The smoothed round-trip time, once it is known.
    pub fn rtt(&self) -> Option<Duration> {
        self.srtt
    }

    pub fn is_silent(&self) -> bool {
        self.silent
    }

    /// Longest time that an answer takes.
    fn patience(&self) -> Duration {
        match self.srtt {
            Some(srtt) => srtt + SILENCE_MARGIN.max(self.rttvar * 4) + ACK_DELAY,
            None => SILENCE_UNKNOWN_RTT,
        }
    }

    /// The socket took the last byte of a record.
    pub fn written(&mut self, record: Written, now: Time) {
        let Written {
            number,
            len,
            fresh,
            busy,
        } = record;
        if fresh && self.sample.is_none() {
            self.sample = Some((number, now));
        }
        let sent = self.rate.written(len);
        self.numbers.push_back(number);
        let end = self.settled + self.numbers.len() as u64;
        let full = self.marks.len() >= MARKS_MAX;
        match self.marks.back_mut() {
            Some(last) if now.since(last.at) < MARK_EVERY => {
                last.end = end;
                last.sent.join(sent);
                last.fresh &= fresh;
                last.busy &= busy;
            }
            Some(last) if full => {
                *last = Mark {
                    end,
                    at: now,
                    sent,
                    fresh: last.fresh && fresh,
                    busy: last.busy && busy,
                };
            }
            _ => self.marks.push_back(Mark {
                end,
                at: now,
                sent,
                fresh,
                busy,
            }),
        }
    }

    /// The rate that data is carried at, in bytes a second, once it is known.
    pub fn rate(&self) -> Option<u64> {
        self.rate.bytes_per_s()
    }

    /// Bytes that were written and are not acknowledged.
    pub fn in_flight(&self) -> u64 {
        self.rate.in_flight()
    }

    /// When what is written now behind `queued` bytes is through.
    pub fn through_in(&self, queued: usize) -> Duration {
        let ahead = self.rate.in_flight() + queued as u64;
        let busy = (self.rate()).map(|r| Duration::from_micros(ahead * 1_000_000 / r.max(1)));
        let empty = self.srtt.unwrap_or(SILENCE_UNKNOWN_RTT);
        empty.max(busy.unwrap_or_default())
    }

    /// The best size of a record: what the path carries in [`RECORD_TIME`].
    pub fn record_bytes(&self) -> usize {
        let Some(rate) = self.rate() else {
            return RECORD_DATA_BYTES_UNKNOWN;
        };
        let bytes = u128::from(rate) * RECORD_TIME.as_micros() / 1_000_000;
        usize::try_from(bytes)
            .unwrap_or(usize::MAX)
            .clamp(RECORD_DATA_BYTES_MIN, STREAM_DATA_BYTES_MAX)
    }

    /// Whether nothing has come on it for a while, and nobody asks.
    pub fn is_unheard(&self, now: Time) -> bool {
        self.may_be_asked() && now.since(self.heard_at) >= REDUNDANT_ASK_EVERY
    }

    /// Whether no PONG has come since `at`.
    pub fn has_not_answered_since(&self, at: Time) -> bool {
        self.heard_at < at
    }

    /// Whether a PING would tell something that is not known yet.
    pub fn may_be_asked(&self) -> bool {
        self.ping.is_none() && !self.silent
    }

    /// Something is to be written. Where nothing of space R is under way, a socket that takes nothing
    /// is all that shows that nothing goes on.
    pub fn waits(&mut self, now: Time) {
        self.blocked.get_or_insert(now);
    }

    /// Since when the socket has taken nothing of what is to be written.
    pub fn blocked_since(&self) -> Option<Time> {
        self.blocked
    }

    /// Nothing is to be written any more.
    pub fn nothing_waits(&mut self) {
        self.blocked = None;
    }

    /// Its socket may take something only now: the path is new.
    pub fn opens(&mut self, now: Time) {
        self.blocked = self.blocked.map(|_| now);
    }

    /// The socket took something; `all`: nothing more is to be written.
    pub fn taken(&mut self, all: bool, now: Time) {
        self.blocked = (!all).then_some(now);
    }

    /// A PING of ours goes out.
    pub fn asked(&mut self, token: u64, now: Time) {
        self.ping = Some((token, now));
        self.ask_at = None;
    }

    /// A PONG came. True if it answers the PING that is under way.
    pub fn answered(&mut self, token: u64, now: Time) -> bool {
        let Some((_, at)) = self.ping.take_if(|(t, _)| *t == token) else {
            return false;
        };
        self.measured(now.since(at));
        self.progress = now;
        self.heard_at = now;
        true
    }

    /// The PING `token` was sent on a doubt that is over. It may wait for TCP's retransmission, and is not
    /// waited for.
    pub fn excuse(&mut self, token: u64) {
        if !self.silent {
            self.ping.take_if(|(t, _)| *t == token);
        }
    }

    /// The path is known to be alive: whatever is late waits in a queue.
    pub fn vouch(&mut self, until: Time) {
        self.vouched = until;
    }

    /// Something of space R came: if nothing follows, and nothing of ours is under way that would
    /// tell, ask.
    pub fn heard(&mut self, now: Time) {
        let quiet = self.srtt.unwrap_or(SILENCE_UNKNOWN_RTT).max(SILENCE_MARGIN);
        self.ask_at = Some(now + quiet);
    }

    /// Whether it is time to ask. Where something is under way, its answer will tell.
    pub fn must_ask(&self, now: Time) -> bool {
        !self.silent && !self.is_waiting() && self.ask_at.is_some_and(|at| now >= at)
    }

    /// An acknowledgement was taken in; `here`: it came on this transport, `delay` after what it
    /// acknowledges.
    pub fn acknowledged(&mut self, retained: &Retained, here: bool, delay: Duration, now: Time) {
        if let Some((number, at)) = self.sample
            && retained.get(number).is_none()
        {
            self.sample = None;
            if here {
                self.measured(now.since(at).saturating_sub(delay));
            }
        }
        while let Some(&number) = self.numbers.front()
            && retained.get(number).is_none()
        {
            self.numbers.pop_front();
            self.settled += 1;
            // What was written at once is answered one by one where the path is slow.
            self.progress = now;
        }
        while let Some(mark) = self.marks.front()
            && mark.end <= self.settled
        {
            let Mark {
                at,
                sent,
                fresh,
                busy,
                ..
            } = *mark;
            self.rate
                .delivered(sent, now.since(at), fresh.then_some(busy));
            self.marks.pop_front();
        }
    }

    /// A record of the peer's came: an answer may be queued behind it, and behind what follows it at once.
    pub fn came(&mut self, now: Time) {
        self.progress = now;
    }

    /// A first or further round-trip time (RFC 9002 section 5.3). What takes far longer than an answer
    /// may was held up by something else, such as a host that slept: it must not make this end deaf to
    /// silence for long.
    pub fn measured(&mut self, rtt: Duration) {
        let Some(srtt) = self.srtt else {
            let rtt = rtt.min(SILENCE_UNKNOWN_RTT);
            self.srtt = Some(rtt);
            self.rttvar = rtt / 2;
            return;
        };
        let rtt = rtt.min(self.patience() * 3);
        self.rttvar = (self.rttvar * 3 + srtt.abs_diff(rtt)) / 4;
        self.srtt = Some((srtt * 7 + rtt) / 8);
    }

    /// The peer answered on it: whatever was late is forgiven.
    pub fn lives(&mut self, now: Time) {
        if self.silent {
            self.silent = false;
            self.floor = now;
        }
    }

    /// When it is silent, or is to be asked, unless something comes.
    pub fn deadline(&self) -> Option<Time> {
        if self.silent {
            return None;
        }
        match self.oldest() {
            Some(at) => {
                let at = at.max(self.floor);
                // However alive the path is: for so long nothing at all has come through.
                let at_last = at.max(self.progress) + self.patience() * 3;
                Some((at + self.patience()).max(self.vouched.min(at_last)))
            }
            None => self.ask_at,
        }
    }

    /// When the oldest was written that is not answered.
    pub fn oldest(&self) -> Option<Time> {
        let oldest = self.marks.front().map(|m| m.at).or(self.blocked);
        let asked = self.ping.map(|(_, at)| at);
        [oldest, asked].into_iter().flatten().min()
    }

    /// Whether something is under way whose answer will tell.
    pub fn is_waiting(&self) -> bool {
        !self.marks.is_empty() || self.blocked.is_some() || self.ping.is_some()
    }

    /// Whether the time has come to call it silent; then it is.
    pub fn falls_silent(&mut self, now: Time) -> bool {
        self.deadline().is_some_and(|at| now >= at) && self.becomes_silent()
    }

    /// The driver knows that it is silent: true if anything is under way, and it was not known.
    pub fn becomes_silent(&mut self) -> bool {
        if self.silent || !self.is_waiting() {
            return false;
        }
        self.silent = true;
        // An answer that comes so late says nothing of the next one.
        self.sample = None;
        true
    }

    /// Nothing is under way any more.
    pub fn forget(&mut self) {
        self.settled += self.numbers.len() as u64;
        self.numbers.clear();
        self.marks.clear();
        self.blocked = None;
        self.sample = None;
        self.ping = None;
        self.ask_at = None;
        self.rate.forget();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::buf::Sealed;
    use crate::session::schedule::Place;
    use bytes::Bytes;

    const RTT: Duration = Duration::from_millis(40);

    fn at(ms: u64) -> Time {
        Time::from_nanos(ms * 1_000_000)
    }

    fn record(number: u64) -> Written {
        Written {
            number,
            len: 1,
            fresh: true,
            busy: true,
        }
    }

    fn known() -> Pulse {
        let mut pulse = Pulse::default();
        for _ in 0..20 {
            pulse.measured(RTT);
        }
        pulse
    }

    fn kept(records: u64) -> Retained {
        let mut retained = Retained::default();
        for _ in 0..records {
            let sealed = Sealed {
                bytes: Bytes::from_static(b"x"),
                buffer_bytes: 1,
            };
            retained.push(sealed, Place::default());
        }
        retained
    }

    #[test]
    fn an_idle_transport_never_falls_silent() {
        let mut pulse = known();
        assert_eq!(pulse.deadline(), None);
        assert!(!pulse.falls_silent(at(1_000_000)));
    }

    #[test]
    fn a_path_that_is_known_to_be_alive_is_given_time_while_answers_come() {
        let mut pulse = known();
        let mut retained = kept(2);
        pulse.written(record(0), at(100));
        pulse.written(record(1), at(102));
        let due = pulse.deadline().unwrap();
        pulse.vouch(due + Duration::from_millis(30));
        // Nothing has come: vouching counts for so long and no longer.
        let patience = pulse.patience();
        pulse.vouch(due + patience * 10);
        assert_eq!(pulse.deadline(), Some(at(100) + patience * 3));
        pulse.vouch(due + Duration::from_millis(30));
        let ack = crate::wire::Ack {
            cumulative: 1,
            ranges: Vec::new(),
        };
        retained.acknowledge(&ack).unwrap();
        pulse.acknowledged(&retained, true, Duration::ZERO, at(160));
        let second = pulse.deadline().unwrap();
        assert_eq!(second, due + Duration::from_millis(30));
        assert!(!pulse.falls_silent(due + Duration::from_millis(29)));
        assert!(pulse.falls_silent(second));
    }

    /// What a first window takes at once is under way for much longer than one answer is.
    #[test]
    fn a_path_that_answers_piece_by_piece_is_given_time() {
        let mut pulse = known();
        let mut retained = kept(20);
        (0..20).for_each(|number| pulse.written(record(number), at(100)));
        let patience = pulse.patience();
        let step = patience * 2;
        let mut now = at(100);
        for cumulative in 1..20 {
            now = now + step;
            pulse.vouch(now + step);
            assert!(!pulse.falls_silent(now), "{cumulative}");
            let ack = crate::wire::Ack {
                cumulative,
                ranges: Vec::new(),
            };
            retained.acknowledge(&ack).unwrap();
            pulse.acknowledged(&retained, true, Duration::ZERO, now);
        }
        let patience = pulse.patience();
        pulse.vouch(now + patience * 10);
        assert!(pulse.falls_silent(now + patience * 3));
    }

    /// The answer is queued behind what the peer sends.
    #[test]
    fn a_path_on_which_the_peer_sends_is_given_time() {
        let mut pulse = known();
        pulse.written(record(0), at(100));
        let patience = pulse.patience();
        let mut now = at(100);
        for _ in 0..10 {
            now = now + patience * 2;
            pulse.vouch(now + patience * 2);
            assert!(!pulse.falls_silent(now));
            pulse.came(now);
        }
        // Unless the driver knows that what is sent does not arrive.
        pulse.vouch(at(0));
        assert!(pulse.falls_silent(now));
    }

    #[test]
    fn the_oldest_record_under_way_counts() {
        let mut pulse = known();
        let mut retained = kept(3);
        for (number, ms) in [(0, 100), (1, 110), (2, 120)] {
            pulse.written(record(number), at(ms));
        }
        let first = pulse.deadline().unwrap();
        assert!(first > at(140) && first < at(180), "{first:?}");
        let ack = crate::wire::Ack {
            cumulative: 1,
            ranges: Vec::new(),
        };
        retained.acknowledge(&ack).unwrap();
        pulse.acknowledged(&retained, true, Duration::ZERO, at(140));
        let second = pulse.deadline().unwrap();
        assert_eq!(second.since(first), Duration::from_millis(10));
        assert!(!pulse.falls_silent(Time::from_nanos(second.as_nanos() - 1)));
        assert!(pulse.falls_silent(second));
        assert_eq!(pulse.deadline(), None, "it is told once");
    }

    #[test]
    fn the_last_of_some_that_came_over_another_transport_does_not_hide_the_first() {
        let mut pulse = known();
        let mut retained = kept(3);
        for number in 0..3 {
            pulse.written(record(number), at(100));
        }
        let due = pulse.deadline();
        let mut ack = crate::wire::Ack {
            cumulative: 0,
            ranges: std::iter::once(1..3).collect(),
        };
        retained.acknowledge(&ack).unwrap();
        pulse.acknowledged(&retained, true, Duration::ZERO, at(140));
        assert_eq!(pulse.deadline(), due);
        ack.cumulative = 3;
        retained.acknowledge(&ack).unwrap();
        pulse.acknowledged(&retained, true, Duration::ZERO, at(150));
        assert_eq!(pulse.deadline(), None);
    }

    #[test]
    fn what_is_written_when_there_are_marks_enough_is_waited_for() {
        let mut pulse = known();
        let all = MARKS_MAX as u64 + 50;
        let mut retained = kept(all);
        for number in 0..all {
            pulse.written(record(number), at(number * 2));
        }
        assert_eq!(pulse.marks.len(), MARKS_MAX);
        let ack = crate::wire::Ack {
            cumulative: all - 1,
            ranges: Vec::new(),
        };
        retained.acknowledge(&ack).unwrap();
        pulse.acknowledged(&retained, true, Duration::ZERO, at(all * 2));
        assert_eq!(pulse.oldest(), Some(at((all - 1) * 2)));
    }

    #[test]
    fn a_silent_transport_that_answers_gets_its_time_again() {
        let mut pulse = known();
        pulse.written(record(0), at(0));
        assert!(pulse.falls_silent(at(500)));
        pulse.lives(at(600));
        assert!(pulse.deadline().unwrap() > at(640));
    }

    #[test]
    fn an_answer_that_a_sleep_held_up_does_not_deafen() {
        let mut pulse = known();
        pulse.measured(Duration::from_secs(3600));
        assert!(pulse.patience() < Duration::from_secs(1));
        let mut fresh = Pulse::default();
        fresh.measured(Duration::from_secs(3600));
        assert!(fresh.patience() < Duration::from_secs(2));
    }

    #[test]
    fn a_socket_that_takes_nothing_is_silent() {
        let mut pulse = known();
        pulse.waits(at(10));
        pulse.taken(false, at(20));
        let due = pulse.deadline().unwrap();
        assert!(due > at(60), "it took something at 20 ms");
        pulse.taken(true, at(30));
        assert_eq!(pulse.deadline(), None);
        pulse.waits(at(40));
        assert!(pulse.falls_silent(at(200)));
    }

    #[test]
    fn a_quiet_receiver_asks_once() {
        let mut pulse = known();
        pulse.heard(at(10));
        let ask = pulse.deadline().unwrap();
        assert!(!pulse.falls_silent(ask), "asking comes first");
        assert!(pulse.must_ask(ask));
        pulse.asked(7, ask);
        assert!(!pulse.must_ask(ask + RTT));
        assert!(!pulse.answered(8, ask + RTT));
        assert!(pulse.answered(7, ask + RTT));
        assert_eq!(pulse.deadline(), None);
    }
}
