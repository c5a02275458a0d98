//! What the kernel knows of transports that do not answer: TCP's own acknowledgements.
//!
//! The session's answers wait in the queues of both hosts, so in bulk their absence tells late; and what
//! is late may only wait. TCP's acknowledgements come from the peer's kernel, steadily while much is under
//! way: where they go on, a transport is not called silent, and where they stop, it is, at once.

use std::time::{Duration, Instant};

use session_proto::session::Handle;

use super::Driver;
use super::carrier::Carrier;
use crate::transport::TcpInfo;

/// Least time between two looks at a socket that may be silent.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// TCP's acknowledgements come later than usual by so much, at most, while hosts and links are busy.
const HOST_BUSY: Duration = Duration::from_millis(30);
/// A peer's process that is scheduled late answers within this time.
const PEER_BUSY: Duration = Duration::from_millis(60);
/// Bytes under way from which on acknowledgements come steadily.
const BUSY_BYTES: u64 = 32 * 1024;
/// Segments in flight from which on the peer does not delay its acknowledgement: it does so for one of
/// every two (RFC 9293 section 3.8.6.3), and some hosts for more.
const STEADY_SEGMENTS: u32 = 8;
/// What was delivered long ago says nothing of longer times.
const RATE_UNKNOWN: Duration = Duration::from_secs(1);
/// A transport that has sent nothing for so long is idle.
const RESTS_AFTER: Duration = Duration::from_millis(80);

impl Driver {
    /// `handle` has taken bytes. While much is under way, its acknowledgements are looked at.
    pub(super) fn watch(&mut self, handle: Handle) {
        let busy = self.session.in_flight(handle) >= BUSY_BYTES;
        if let Some(carrier) = self.carriers.get_mut(&handle).filter(|_| busy) {
            (carrier.watch_at).get_or_insert_with(|| Instant::now() + HOST_BUSY);
        }
    }

    /// Looks at the transports whose time has come, and calls those silent whose acknowledgements have
    /// stopped while much is under way.
    pub(super) fn look_for_quiet(&mut self, now: Instant) {
        let due = |at: &mut Instant| now >= *at;
        let mut quiet = Vec::new();
        for (&handle, carrier) in &mut self.carriers {
            if carrier.watch_at.take_if(due).is_none() || self.session.is_silent(handle) {
                continue;
            }
            let Some(info) = carrier.look() else {
                continue;
            };
            if info.unacked < STEADY_SEGMENTS {
                carrier.rest(&info, now);
                continue;
            }
            let Some(oldest) = self.session.unanswered_since(handle) else {
                carrier.watch_at = Some(now + HOST_BUSY);
                continue;
            };
            // What went out after a pause is not acknowledged before a round trip is over.
            let under_way = self.clock.now().since(oldest);
            let longest = longest(&info, carrier.pacing.limit());
            let first = (info.rtt + longest).saturating_sub(under_way);
            let still = carrier.acked_since.elapsed();
            let wait = longest.saturating_sub(still).max(first);
            if wait.is_zero() {
                quiet.push(handle);
            } else {
                carrier.watch_at = Some(now + wait.max(LOOK_AGAIN));
            }
        }
        for handle in quiet {
            self.session.suspect(self.clock.now(), handle);
        }
    }

    /// What is late may wait in a queue, of the kernel or of the link, and then TCP's acknowledgements
    /// go on coming. Where they do, the transport is not called silent yet.
    pub(super) fn vouch(&mut self) {
        let now = self.clock.now();
        let suspects: Vec<Handle> = self.session.suspects(now).collect();
        for handle in suspects {
            let Some(carrier) = self.carriers.get_mut(&handle) else {
                continue;
            };
            let Some(info) = carrier.look() else {
                continue;
            };
            let still = carrier.acked_since.elapsed();
            let longest = longest(&info, carrier.pacing.limit());
            let acked = longest.checked_sub(still);
            if let Some(more) = acked.max(carrier.is_heard(&info)) {
                self.session.vouch(handle, now + more.max(LOOK_AGAIN));
            }
        }
    }
}

impl Carrier {
    /// For how much longer the peer may be heard to send, where all that was sent has arrived: the answer may be queued behind
    /// that. Where something has not, a path may take what is small, and that is what is still heard.
    fn is_heard(&self, info: &TcpInfo) -> Option<Duration> {
        HOST_BUSY
            .checked_sub(self.heard_at.elapsed())
            .filter(|_| info.unacked == 0)
    }

    /// Little or nothing is under way. After bulk, what is idle has another congestion control again, before
    /// the kernel shrinks its window: that is after a retransmission timeout, which is 200 ms or more.
    fn rest(&mut self, info: &TcpInfo, now: Instant) {
        if !self.in_bulk {
            return;
        }
        if info.unacked == 0 && info.notsent == 0 && info.last_sent >= RESTS_AFTER {
            self.set_bulk(false);
        } else {
            self.watch_at = Some(now + RESTS_AFTER);
        }
    }
}

/// The longest time between two acknowledgements while the path works and the transport sends `limit` bytes
/// a second at most.
fn longest(info: &TcpInfo, limit: Option<u64>) -> Duration {
    if info.unacked == 0 {
        // All was delivered: it is the peer's process that is late.
        return PEER_BUSY;
    }
    let busy = HOST_BUSY.max(info.rttvar * 4);
    let window = u64::from(info.snd_cwnd) * u64::from(info.snd_mss);
    let paced = limit
        .is_some_and(|l| u128::from(l) * info.rtt.as_micros() < u128::from(window) * 1_000_000);
    // With less under way than the window, it is the application that sets the pace.
    let spread = paced || info.unacked + info.unacked / 8 + 2 < info.snd_cwnd;
    if !spread {
        // Where the window is the limit, what was sent together is acknowledged together, once in a round
        // trip: such is slow start.
        return busy + info.rtt;
    }
    // Between two acknowledgements of what is delivered, with twice as much for delayed ones.
    let segments = u64::from(info.snd_mss) * 4;
    let of_rate = (segments * 1_000_000).checked_div(info.delivery_rate);
    let of_rate = Duration::from_micros(of_rate.unwrap_or_default());
    busy + of_rate.min(info.rtt + RATE_UNKNOWN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_transports_are_given_more_time() {
        let fast = TcpInfo {
            rtt: Duration::from_millis(40),
            unacked: 100,
            snd_cwnd: 200,
            snd_mss: 1448,
            delivery_rate: 6_250_000,
            ..TcpInfo::default()
        };
        let limit = Some(6_000_000);
        assert!(longest(&fast, limit) < HOST_BUSY + Duration::from_millis(1));
        let slow = TcpInfo {
            delivery_rate: 20_000,
            ..fast
        };
        assert!(longest(&slow, limit) > Duration::from_millis(300));
        // What an application sends evenly is acknowledged evenly.
        assert!(longest(&fast, None) < HOST_BUSY + Duration::from_millis(1));
        let delivered = TcpInfo { unacked: 0, ..fast };
        assert_eq!(longest(&delivered, limit), PEER_BUSY);
    }

    #[test]
    fn slow_start_acknowledges_once_in_a_round_trip() {
        for ms in [40, 150, 600] {
            let rtt = Duration::from_millis(ms);
            let begun = TcpInfo {
                rtt,
                unacked: 20,
                snd_cwnd: 20,
                snd_mss: 1448,
                delivery_rate: 1_000_000,
                ..TcpInfo::default()
            };
            for limit in [None, Some(50_000_000)] {
                assert!(longest(&begun, limit) >= rtt + HOST_BUSY, "{limit:?}");
            }
        }
    }
}
