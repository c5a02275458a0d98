//! How fast a transport may send, so that the queue before the narrowest link of its path stays short.
//!
//! The kernel's congestion controls fill that queue: cubic until it overflows, bbr to a round trip's
//! worth, and either loses much of it when it starts. What waits there is lost with the link, delays what
//! matters more, and makes every byte behind a lost packet wait for it. So the agent puts a limit above
//! the congestion control (`SO_MAX_PACING_RATE`): below what is delivered while a queue of ours stands, just
//! below it afterwards, and now and then a little above, to find out whether there is more. The idea is that
//! of BBR's and Vegas' delay-based phases; what competes for the link and fills the queue all the same is
//! found out after a few rounds.

use std::time::{Duration, Instant};

use super::TcpInfo;

/// A delay of so much beyond the least one is a queue, or an eighth of the least one if that is more.
const QUEUE: Duration = Duration::from_millis(4);
/// Or, if that is more, so many times as much as round trips differ while none stands: Wi-Fi and mobile networks jitter by
/// 10 ms and more. Evenly spread delays are on average 2 mean deviations longer than the least.
const JITTER: u32 = 3;
/// Least time between two looks.
const LOOK: Duration = Duration::from_millis(5);
/// Bytes that a transport must have sent since the last look for the look to tell anything.
const BUSY_BYTES: u64 = 16 * 1024;
/// Or what goes out in two of the shortest round trips at the limit, where that is less, but at least so much.
const BUSY_BYTES_MIN: u64 = 6 * 1024;
/// So many rounds in a row that drain nothing: the delay is the path's own, or another's queue.
const STUCK_MAX: u32 = 5;
/// Rounds between two attempts to have more than the link was seen to carry: at first, and at most, when
/// attempts lead to nothing but queues.
const HELD_MIN: u32 = 4;
const HELD_MAX: u32 = 24;
/// While a queue stands that may be another's, so much of what is delivered is sent.
const LESS: f64 = 0.8;
/// Rounds whose best counts as what is delivered: a queue that grows on the way back makes one look slow.
const RECENT: usize = 3;
/// Rounds until what a higher limit did is seen.
const SEEN_AFTER: u32 = 2;
/// The least limit, in bytes a second: 2 segments each 40 ms.
const LIMIT_MIN: u64 = 72_000;
/// `TCP_NOTSENT_LOWAT` is what goes out in this time, within bounds.
const UNSENT: Duration = Duration::from_millis(4);
/// A pair of transports goes by one part of so many below what the slower link carries.
const PAIR_BELOW: u64 = 20;
/// A write is what goes out in 2 ms, or in one of a pair in 1 ms, within bounds.
const WRITES_PER_S: u64 = 500;
/// Least size of a write, where there is so much, in bytes.
const WRITE_MIN: usize = 4 * 1024;
/// One buffer of the kernel takes about so much: 45 full segments.
const BUFFER_BYTES: usize = 64 * 1024;
/// Least `TCP_NOTSENT_LOWAT`, in bytes.
const UNSENT_MIN: u64 = 16 * 1024;

/// The state of one transport.
#[derive(Debug)]
pub struct Pacing {
    limit: Option<u64>,
    /// The shortest round trip, until that turns out not to be reached any more.
    base: Option<Duration>,
    /// Rounds in a row in which the queue did not shrink.
    stuck: u32,
    last_rtt: Duration,
    /// The limit of the last look: what is delivered is what was sent by then.
    last_limit: Option<u64>,
    /// Mean deviation of the round trips while no queue stands.
    jitter: Duration,
    /// What was delivered when the queue came, in bytes a second.
    delivered_then: u64,
    /// What was delivered in the latest rounds, in bytes a second.
    recent: [u64; RECENT],
    /// A queue stands: the limit of before.
    before_queue: Option<u64>,
    /// It came of sending more than was delivered, and this is what the link carries; otherwise it is what
    /// others send, or waits on the way back.
    link_rate: Option<u64>,
    /// Rounds until more is tried, and how many they were when a queue last was the answer.
    held: u32,
    hold: u32,
    /// Attempts in a row that were no queue's cause.
    raised: u32,
    /// What the link carries, once a queue has shown it, or the highest rate of late.
    carried: u64,
    /// It was a queue that showed it.
    certain: bool,
    /// It goes at the pace of another one.
    paired: bool,
    looked_at: Instant,
    sent_then: u64,
    /// Bytes that were in the socket then, and not sent.
    unsent_then: u64,
    /// Segments that had been delivered then.
    segments_then: u32,
}

/// Whether a path loses packets for other reasons than a full queue.
#[derive(Debug, Default)]
pub struct Losses {
    delivered: u32,
    retransmitted: u32,
    lossy: bool,
}

impl Losses {
    /// Segments after which the lost ones are counted.
    const SEGMENTS: u32 = 512;
    /// One lost of so many is a lossy path: cubic would keep a tenth of its window (RFC 9438 section 5.2).
    const ONE_OF: u32 = 100;

    /// Takes in what the kernel says; returns whether the path is lossy.
    pub fn look(&mut self, info: &TcpInfo) -> bool {
        let delivered = info.delivered.wrapping_sub(self.delivered);
        if delivered >= Self::SEGMENTS {
            let lost = info.retransmitted.wrapping_sub(self.retransmitted);
            self.lossy = lost > delivered / Self::ONE_OF;
            self.delivered = info.delivered;
            self.retransmitted = info.retransmitted;
        }
        self.lossy
    }
}

/// What the socket is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paced {
    /// `SO_MAX_PACING_RATE`, in bytes a second.
    pub limit: u64,
    /// `TCP_NOTSENT_LOWAT`, in bytes, at most what is configured.
    pub unsent: u32,
}

impl Pacing {
    /// A transport whose path carried `known` bytes a second when it was last used.
    pub fn new(known: Option<u64>, now: Instant) -> Self {
        Self {
            limit: known.map(|rate| rate.max(LIMIT_MIN)),
            base: None,
            stuck: 0,
            last_rtt: Duration::ZERO,
            last_limit: known,
            jitter: Duration::ZERO,
            delivered_then: 0,
            recent: [0; RECENT],
            before_queue: None,
            link_rate: None,
            held: 0,
            hold: HELD_MIN,
            raised: 0,
            carried: 0,
            certain: false,
            paired: false,
            looked_at: now,
            sent_then: 0,
            unsent_then: 0,
            segments_then: 0,
        }
    }

    /// The limit, in bytes a second; `None` while the kernel alone decides.
    pub fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// Bytes of one write, at most, so that the kernel does not hold much more than it is told to; `None`
    /// where that is as much as one of its buffers takes.
    pub fn write_bytes(&self) -> Option<usize> {
        let per_s = if self.paired {
            WRITES_PER_S * 2
        } else {
            WRITES_PER_S
        };
        let bytes = usize::try_from(self.limit? / per_s).unwrap_or(usize::MAX);
        (bytes < BUFFER_BYTES).then_some(bytes.max(WRITE_MIN))
    }

    /// What the path carries, in bytes a second, as far as that is known: what another transport may begin
    /// with.
    pub fn rate(&self) -> Option<u64> {
        let rate = Some(self.carried).filter(|rate| *rate > 0)?;
        Some(if self.certain { rate } else { rate - rate / 10 })
    }

    /// The transport begins to carry, and `known` bytes a second are what its path or the session had.
    /// Returns what to tell it, unless it knows better.
    pub fn adopt(&mut self, known: u64) -> Option<Paced> {
        if self.limit.is_some() {
            return None;
        }
        let limit = known.max(LIMIT_MIN);
        self.limit = Some(limit);
        Some(Paced::at(limit))
    }

    /// It goes at the pace of another one, which has the limit `common`: it does not learn by itself that its
    /// link carries more. Returns what to tell both.
    pub fn pair(&mut self, common: u64) -> Paced {
        self.limit = self
            .limit
            .map(|limit| limit.min(common.saturating_add(common / 8)));
        self.paired = true;
        let limit = common - common / PAIR_BELOW;
        let unsent = (limit / WRITES_PER_S).max(WRITE_MIN as u64);
        Paced {
            limit,
            unsent: u32::try_from(unsent).unwrap_or(u32::MAX),
        }
    }

    /// It goes at its own pace.
    pub fn part(&mut self) {
        self.paired = false;
    }

    /// Whether it is time to look, `sent` bytes having been given to the socket so far.
    pub fn is_due(&self, sent: u64, now: Instant) -> bool {
        let wait = self.base.unwrap_or(LOOK).max(LOOK);
        now >= self.looked_at + wait && sent >= self.sent_then + self.busy_bytes(wait)
    }

    fn busy_bytes(&self, base: Duration) -> u64 {
        let micros = u64::try_from(base.as_micros() * 2).unwrap_or(u64::MAX);
        let of_limit = |limit: u64| limit.saturating_mul(micros) / 1_000_000;
        // A queue that drains is given its time.
        match self.limit.filter(|_| self.before_queue.is_none()) {
            Some(limit) => of_limit(limit).clamp(BUSY_BYTES_MIN, BUSY_BYTES),
            None => BUSY_BYTES,
        }
    }

    /// Takes in what the kernel says; returns what to tell it, if that has changed.
    pub fn look(&mut self, info: &TcpInfo, sent: u64, now: Instant) -> Option<Paced> {
        let time = now.saturating_duration_since(self.looked_at);
        // What has left the socket, whatever had been given to it.
        let unsent = u64::from(info.notsent);
        let left = (sent + self.unsent_then).saturating_sub(self.sent_then + unsent);
        let sent_rate = per_second(left, time);
        self.unsent_then = unsent;
        let segments = u64::from(info.delivered.wrapping_sub(self.segments_then));
        self.segments_then = info.delivered;
        self.looked_at = now;
        self.sent_then = sent;
        if info.rtt.is_zero() || info.delivery_rate == 0 {
            return None;
        }
        let known = Some(info.min_rtt).filter(|rtt| !rtt.is_zero());
        let base = self.base.unwrap_or(known.unwrap_or(info.rtt)).min(info.rtt);
        self.base = Some(base);
        let before = self.limit;
        // The kernel counts whole segments: small ones, such as those of answers to a transfer the other way, look like far
        // more than was ever sent, and fill a window that does not grow with them.
        // While a queue drains, the limit is that low.
        let limits = [self.limit, self.last_limit].into_iter().flatten();
        let might = limits.fold(info.delivery_rate, u64::min);
        let app_limited = info.app_limited || sent_rate < might / 2;
        if app_limited && !(self.paired && self.fills_limit(info.delivery_rate)) {
            // It says what the application does, not what the path takes. Where a queue was not ours, the
            // limit is what it was; otherwise it is what the link was seen to carry.
            let before = self.before_queue.take();
            self.limit = match self.link_rate.take() {
                Some(link) => self.limit.map(|limit| limit.max(link - link / 50)),
                None => before.or(self.limit),
            };
        } else {
            // The kernel's rate may be of before: a first burst that overran the queue is answered by what was left of it, and
            // none of that is a new sample.
            let counted = per_second(segments * u64::from(info.snd_mss), time).min(sent_rate);
            let first = self.recent.contains(&0);
            self.recent.rotate_right(1);
            self.recent[0] = if first {
                info.delivery_rate.max(counted)
            } else {
                info.delivery_rate
            };
            let usual = QUEUE.max(base / 8).max(self.jitter * JITTER);
            if info.rtt.saturating_sub(base) > usual {
                self.drain(info, base);
            } else {
                self.jitter = match self.jitter {
                    Duration::ZERO => info.rttvar,
                    known => (known * 7 + info.rttvar) / 8,
                };
                self.probe(info);
            }
        }
        if !app_limited && !self.certain {
            self.carried = info.delivery_rate.max(self.carried - self.carried / 16);
        }
        self.last_rtt = info.rtt;
        self.last_limit = before;
        let limit = self.limit.filter(|_| self.limit != before)?;
        Some(Paced::at(limit))
    }

    /// Whether it is the limit that holds it back. One of a pair goes below it, and waits for the other.
    fn fills_limit(&self, rate: u64) -> bool {
        let part = if self.paired { 4 } else { 10 };
        self.limit.is_some_and(|limit| rate >= limit - limit / part)
    }

    /// What is delivered, as far as the kernel's samples tell: they are of whole segments, few of which are under way on a
    /// slow link, and acknowledged in pairs.
    fn seen_of_late(&self, info: &TcpInfo) -> u64 {
        let best = self.recent.iter().copied().max().unwrap_or_default();
        best.saturating_add(per_round_trip(info.snd_mss.into(), info))
    }

    /// A queue stands. Where more was sent than is delivered, it is of our making: what is delivered is
    /// what the link carries, and for a while less is to come. Where it is not, a little less tells whether
    /// some of it was.
    fn drain(&mut self, info: &TcpInfo, base: Duration) {
        let delivered = self.recent.iter().copied().max().unwrap_or_default();
        if self.before_queue.is_none() {
            // Without a limit, what is delivered is all that is known.
            self.before_queue = Some(self.limit.unwrap_or(delivered));
            self.delivered_then = delivered;
        }
        // The limit says what is sent only where the congestion window allows as much.
        let window = u64::from(info.snd_cwnd) * u64::from(info.snd_mss);
        let window_rate = per_round_trip(window, info);
        let limits = [self.limit, self.last_limit].into_iter().flatten();
        let sends = (limits.min().unwrap_or(u64::MAX)).min(window_rate);
        if self.link_rate.is_none() && sends > delivered + delivered / 20 {
            self.link_rate = Some(delivered);
        }
        // A delay that comes and goes by itself shrinks every other time, a little.
        let shrinks = info.rtt + self.jitter.max(info.rttvar) + QUEUE / 8 < self.last_rtt;
        self.stuck = if shrinks { 0 } else { self.stuck + 1 };
        if self.stuck > STUCK_MAX {
            self.stuck = 0;
            self.base = Some(info.rtt);
            // So less was sent in vain.
            let before = self.before_queue.take();
            let known = self.link_rate.take().or(before).unwrap_or(delivered);
            let most = delivered.max(self.delivered_then).max(LIMIT_MIN);
            self.limit = Some(known.clamp(LIMIT_MIN, most));
            return;
        }
        let (rate, part) = match self.link_rate {
            Some(link) => {
                // Not even that comes through which is sent: the link carries less than was thought.
                let slower =
                    (self.limit).is_some_and(|l| delivered < l - l / 10 && window_rate >= l);
                let link = if slower {
                    delivered
                } else {
                    link.max(delivered)
                };
                self.link_rate = Some(link);
                let part = base.as_secs_f64() / info.rtt.as_secs_f64();
                (link, part.clamp(0.5, 0.95))
            }
            None => (delivered, LESS),
        };
        let below = ((rate as f64 * part) as u64).max(LIMIT_MIN);
        self.limit = Some(self.limit.map_or(below, |limit| limit.min(below)));
    }

    /// None stands. Behind one of our making, the link's rate is known, and just below it none builds
    /// up; otherwise, if it is the limit that holds the transport back, there may be more to have.
    fn probe(&mut self, info: &TcpInfo) {
        self.stuck = 0;
        let Some(limit) = self.limit else { return };
        let before = self.before_queue.take();
        if let Some(link) = self.link_rate.take() {
            self.raised = 0;
            self.carried = link;
            self.certain = true;
            self.hold = (self.hold * 2).min(HELD_MAX);
            self.held = self.hold;
            self.limit = Some((link - link / 50).max(LIMIT_MIN));
        } else if let Some(before) = before {
            // Some of it may have been ours. The kernel's rates are somewhat high, so that what is sent
            // may be more than the link carries and look like less.
            self.raised = 0;
            self.held = HELD_MIN;
            self.limit = Some((before - before / 32).max(limit));
        } else if self.held > 0 {
            self.held -= 1;
        } else if self.fills_limit(self.seen_of_late(info)) {
            self.carried = self.carried.max(info.delivery_rate);
            self.held = SEEN_AFTER;
            if self.raised > 0 {
                self.hold = HELD_MIN;
            }
            self.raised += 1;
            // What has been met by no queue three times is far from the link's rate.
            let part = if self.raised > 3 { 4 } else { 8 };
            self.limit = Some(limit.saturating_add(limit / part));
        }
    }
}

/// So many bytes in each round trip, by the second.
fn per_round_trip(bytes: u64, info: &TcpInfo) -> u64 {
    per_second(bytes, info.rtt)
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    let micros = time.as_micros().max(1) as u64;
    bytes.saturating_mul(1_000_000) / micros
}

impl Paced {
    /// What goes with a limit.
    pub fn at(limit: u64) -> Self {
        let micros = u64::try_from(UNSENT.as_micros()).unwrap_or(u64::MAX);
        let unsent = (limit.saturating_mul(micros) / 1_000_000).max(UNSENT_MIN);
        Self {
            limit,
            unsent: u32::try_from(unsent).unwrap_or(u32::MAX),
        }
    }
}

#[cfg(test)]
#[path = "pacing_tests.rs"]
mod tests;
