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
        self.record_bytes_from(RECORD_DATA_BYTES_UNKNOWN)
    }

    /// The same, which is `assumed` at least while the rate is not known.
    pub fn record_bytes_from(&self, assumed: usize) -> usize {
        let least = self.rate().map_or(assumed, |_| RECORD_DATA_BYTES_MIN);
        self.carries_in(RECORD_TIME)
            .clamp(least, STREAM_DATA_BYTES_MAX)
    }

    /// Bytes that the path carries in `time`; where [`Self::rate`] has none, what it has carried lately.
    pub fn carries_in(&self, time: Duration) -> usize {
        let bytes = u128::from(self.rate.carried()) * time.as_micros() / 1_000_000;
        usize::try_from(bytes).unwrap_or(usize::MAX)
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
mod tests;
