//! One path: a socket of ours and an address of the peer.

use std::collections::VecDeque;
use std::time::Duration;

use super::mtu::Mtu;
use crate::Time;
use crate::limits::{
    SILENCE_MARGIN, UDP_AMPLIFICATION, UDP_ASK_DATAGRAMS, UDP_ASK_EVERY, UDP_ASK_STEADY_MAX,
    UDP_ASK_STEADY_MIN, UDP_ASKED_MAX, UDP_FRAMES_BYTES_MAX, UDP_RETRY, UDP_RETRY_MAX,
    UDP_SILENCE_MARGIN, UDP_STALE, UDP_TRIES_MAX, UDP_UNKNOWN_RTT,
};
use crate::seal::Connection;
use crate::wire::Frame;

/// What a path is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Nothing is known of it now, and nothing was asked.
    Idle,
    /// It was asked and has not answered: datagrams go over TCP as well.
    Tried,
    /// It answers.
    Usable,
    /// It does not: datagrams go over TCP alone, and it is asked again then, should there be any.
    Blocked { until: Time },
}

/// PINGs in a row to a blocked path.
const BLOCKED_TRIES_MAX: u32 = 2;

/// A PING that went out.
#[derive(Clone, Copy, Debug)]
struct Asked {
    token: u64,
    /// Of its packet.
    size: usize,
    at: Time,
}

/// An address is asked to prove itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Challenge {
    pub data: [u8; 8],
    pub tries: u32,
    pub due: Time,
}

#[derive(Debug)]
pub(super) struct Path {
    pub standing: Standing,
    /// The next time that it stays blocked.
    retry: Duration,
    /// Whoever receives there is the peer. An initiator knows where its peer is.
    pub validated: bool,
    /// Bytes from and to it, for the limit on those to an address that is not validated.
    received: u64,
    sent: u64,
    /// One past the highest number of a packet from it that could move the peer's address.
    pub highest: u64,
    /// This end's counter and name.
    pub connection: Option<(u64, Connection)>,
    srtt: Option<Duration>,
    rttvar: Duration,
    /// What an answer should take while none is known.
    pub guess: Option<Duration>,
    /// What is not answered, oldest first. While the path is usable there are several; otherwise each
    /// follows when the one before it is given up.
    asked: VecDeque<Asked>,
    /// Then the oldest is late, or the last one is given up.
    due: Option<Time>,
    /// How many have been given up in a row.
    misses: u32,
    /// When the last one went out, and how many datagrams have since.
    asked_at: Option<Time>,
    datagrams_since: u32,
    answered_at: Option<Time>,
    pub sent_at: Time,
    pub mtu: Mtu,
    pub challenge: Option<Challenge>,
    /// Frames that go with the next packet, the token of a PING among them, and the size that it asks
    /// for.
    frames: Vec<u8>,
    ping: Option<u64>,
    pad_to: usize,
}

impl Path {
    /// `link`: what the link leaves for UDP's payload, in bytes.
    pub fn new(link: usize, validated: bool) -> Self {
        Self {
            standing: Standing::Idle,
            retry: UDP_RETRY,
            validated,
            received: 0,
            sent: 0,
            highest: 0,
            connection: None,
            srtt: None,
            rttvar: Duration::ZERO,
            guess: None,
            asked: VecDeque::new(),
            due: None,
            misses: 0,
            asked_at: None,
            datagrams_since: 0,
            answered_at: None,
            sent_at: Time::ZERO,
            mtu: Mtu::new(link),
            challenge: None,
            frames: Vec::new(),
            ping: None,
            pad_to: 0,
        }
    }

    /// Whatever was known of how it answers is old.
    pub fn begin_again(&mut self) {
        self.standing = Standing::Idle;
        self.retry = UDP_RETRY;
        self.forget_asked();
    }

    fn forget_asked(&mut self) {
        self.asked.clear();
        self.due = None;
        self.misses = 0;
    }

    pub fn rtt(&self) -> Option<Duration> {
        self.srtt
    }

    /// Longest time that an answer takes.
    pub fn patience(&self) -> Duration {
        let Some(srtt) = self.srtt else {
            let guess = self.guess.map(|rtt| rtt * 2 + SILENCE_MARGIN);
            return guess.map_or(UDP_UNKNOWN_RTT, |g| g.min(UDP_UNKNOWN_RTT));
        };
        srtt + SILENCE_MARGIN.max(self.rttvar * 4)
    }

    /// The same for a question on a usable path: nothing is given up when it is over.
    fn lateness(&self) -> Duration {
        let usual = |srtt| srtt + UDP_SILENCE_MARGIN.max(self.rttvar * 4);
        self.srtt.map_or_else(|| self.patience(), usual)
    }

    fn measured(&mut self, rtt: Duration) {
        let Some(srtt) = self.srtt else {
            self.srtt = Some(rtt);
            self.rttvar = rtt / 2;
            return;
        };
        // As with other transports: what takes far longer was held up by something else.
        let rtt = rtt.min(self.patience() * 3);
        self.rttvar = (self.rttvar * 3 + srtt.abs_diff(rtt)) / 4;
        self.srtt = Some((srtt * 7 + rtt) / 8);
    }

    /// Whether `bytes` more may be sent to it.
    pub fn may_send(&self, bytes: usize) -> bool {
        self.validated || self.sent + bytes as u64 <= UDP_AMPLIFICATION * self.received
    }

    /// An authentic packet came from it.
    pub fn hears(&mut self, bytes: usize) {
        self.received += bytes as u64;
    }

    /// A frame goes with the next packet. Answers that nobody has room for are not sent.
    pub fn push(&mut self, frame: &Frame<'_>) {
        if self.frames.len() < UDP_FRAMES_BYTES_MAX {
            frame.encode(&mut self.frames);
        }
    }

    /// Whether something waits for a packet.
    pub fn has_frames(&self) -> bool {
        !self.frames.is_empty()
    }

    /// Whether it was given up for now.
    pub fn is_blocked(&self) -> bool {
        matches!(self.standing, Standing::Blocked { .. })
    }

    /// Bytes that wait for a packet.
    pub fn frames_bytes(&self) -> usize {
        self.frames.len()
    }

    /// What waits for a packet, with the size that this should have.
    pub fn take_frames(&mut self) -> (Vec<u8>, usize) {
        let pad_to = std::mem::take(&mut self.pad_to);
        (std::mem::take(&mut self.frames), pad_to)
    }

    /// Whether a PING is under way, or is to be.
    pub fn is_asked(&self) -> bool {
        self.due.is_some() || self.ping.is_some()
    }

    /// Whether it has not been asked for a while.
    pub fn must_ask(&self, now: Time) -> bool {
        let recently = |at: Time| now.since(at) < UDP_ASK_EVERY;
        !self.is_asked() && !self.answered_at.is_some_and(recently)
    }

    /// A datagram is to go out: whether it takes a question along. It does where none went for a while, and
    /// again and again while datagrams go out steadily.
    pub fn takes_question(&mut self, now: Time) -> bool {
        self.datagrams_since = self.datagrams_since.saturating_add(1);
        if self.standing != Standing::Usable || self.ping.is_some() {
            return false;
        }
        let Some(at) = self.asked_at else { return true };
        let quarter = self.srtt.map_or(UDP_ASK_STEADY_MAX, |srtt| srtt / 4);
        let every = quarter.clamp(UDP_ASK_STEADY_MIN, UDP_ASK_STEADY_MAX);
        let steady = now.since(at) >= every && self.datagrams_since >= UDP_ASK_DATAGRAMS;
        let due = steady || now.since(at) >= UDP_ASK_EVERY;
        due && self.asked.len() < UDP_ASKED_MAX
    }

    /// Whether it may have been forgotten by a NAT on its way.
    pub fn is_stale(&self, now: Time) -> bool {
        self.answered_at.is_none_or(|at| now.since(at) >= UDP_STALE)
    }

    /// A PING goes with the next packet.
    pub fn ask(&mut self, token: u64) {
        self.ping = Some(token);
        // A blocked path gets two: the second one is small.
        let nth = self.misses + u32::from(self.is_blocked());
        self.pad_to = self.mtu.first_size(nth);
        Frame::Ping { token }.encode(&mut self.frames);
    }

    /// What waited could not be sent: a PING among it is not under way, and is not due again at once.
    pub fn fails(&mut self, now: Time) {
        self.ping = None;
        self.sent_at = now;
        if self.due.is_none() && self.standing == Standing::Tried {
            self.standing = Standing::Idle;
        }
    }

    /// A packet of `size` went out; `whole`: with the frames that waited.
    pub fn sends(&mut self, now: Time, size: usize, whole: bool) {
        self.sent += size as u64;
        self.sent_at = now;
        let Some(token) = self.ping.take_if(|_| whole) else {
            return self.mtu.sends(now, size);
        };
        self.asked.push_back(Asked {
            token,
            size,
            at: now,
        });
        (self.asked_at, self.datagrams_since) = (Some(now), 0);
        if self.standing == Standing::Usable {
            self.wait_for_oldest();
        } else {
            self.due = Some(now + self.patience() * (1 << self.misses.min(6)));
        }
    }

    fn wait_for_oldest(&mut self) {
        self.due = self.asked.front().map(|a| a.at + self.lateness());
    }

    /// When the next of PING, probe and challenge counts as lost.
    pub fn deadline(&self) -> Option<Time> {
        let challenge = self.challenge.map(|c| c.due);
        let all = [self.due, self.mtu.due(), challenge];
        all.into_iter().flatten().min()
    }

    pub fn is_due(&self, now: Time) -> bool {
        self.due.is_some_and(|at| now >= at)
    }

    /// A PONG came: true if it answers a PING on this path.
    pub fn answers(&mut self, now: Time, token: u64) -> bool {
        if let Some(index) = self.asked.iter().position(|a| a.token == token) {
            self.answers_nth(now, index);
        } else if self.mtu.answers(token).is_some() {
            self.forget_asked();
        } else {
            return false;
        }
        self.standing = Standing::Usable;
        self.retry = UDP_RETRY;
        self.answered_at = Some(now);
        true
    }

    /// What was asked before is excused: a packet may be lost. What was asked later is waited for.
    fn answers_nth(&mut self, now: Time, index: usize) {
        let asked = self.asked[index];
        self.measured(now.since(asked.at));
        let before = self.asked.drain(..=index).map(|a| a.size);
        let larger = before.filter(|s| *s > asked.size).max();
        if let Some(size) = larger.filter(|_| self.misses > 0) {
            self.mtu.doubts(now, size);
        }
        self.mtu.passes(asked.size);
        self.misses = 0;
        self.wait_for_oldest();
    }

    /// A PING was not answered. True if it is to be asked again.
    pub fn missed(&mut self, now: Time) -> bool {
        self.due = None;
        self.misses += 1;
        let blocked = self.is_blocked();
        let tries = if blocked {
            BLOCKED_TRIES_MAX
        } else {
            UDP_TRIES_MAX
        };
        if self.misses < tries {
            if !blocked {
                self.standing = Standing::Tried;
            }
            return true;
        }
        self.forget_asked();
        let until = now + self.retry;
        self.retry = (self.retry * 2).min(UDP_RETRY_MAX);
        self.standing = Standing::Blocked { until };
        false
    }

    /// Nothing is sent any more: what is under way is not waited for.
    pub fn rest(&mut self) {
        self.forget_asked();
        self.mtu.rest();
        if matches!(self.standing, Standing::Tried) {
            self.standing = Standing::Idle;
        }
    }
}
