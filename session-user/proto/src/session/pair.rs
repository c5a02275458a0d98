//! Redundant records: over two transports at the pace of the slower one.
//!
//! What one lags by is what the loss of the other costs. So where both are about as fast, new records wait
//! for both. One that is far slower, or whose socket takes nothing any more, does not hold the other back.

use super::Session;
use super::event::Handle;
use super::schedule::Place;
use super::transport::Transport;
use crate::Time;
use crate::limits::REDUNDANT_WAIT;

impl Session {
    /// The two transports that redundant records travel on, while there are such streams and both stand.
    pub fn pair(&self) -> Option<[Handle; 2]> {
        let active = self.active.filter(|_| self.doubled_streams > 0)?;
        Some([active, self.partner(active)?])
    }

    /// Whether redundant records of `place` wait for a queue to become shorter; `None`: they are not
    /// redundant.
    pub(super) fn waits_in_pair(&self, place: Place) -> Option<bool> {
        let [one, two] = [place.on, place.copy].map(|h| h.and_then(|h| self.transports.get(&h)));
        let (one, two) = (one?, two.filter(|_| place.doubled)?);
        Some(match (self.is_stuck(one), self.is_stuck(two)) {
            (true, true) => one.is_full() && two.is_full(),
            (true, false) => two.is_full(),
            (false, true) => one.is_full(),
            (false, false) => {
                let [a, b] = [one, two].map(|t| t.pulse.rate().unwrap_or_default());
                let in_step = a.min(b) == 0 || a.min(b) >= a.max(b) / 2;
                let faster = if a > b { one } else { two };
                (in_step && (is_behind(one) || is_behind(two))) || (!in_step && faster.is_full())
            }
        })
    }

    /// Whether `handle` takes no more of other streams. On one of a pair these leave room for redundant
    /// records, which wait for a short queue.
    pub(super) fn is_full_beside_pair(&self, handle: Handle) -> bool {
        let Some(transport) = self.transports.get(&handle) else {
            return true;
        };
        let paired = self.pair().is_some_and(|pair| pair.contains(&handle));
        transport.is_full() || (paired && !self.is_stuck(transport) && is_behind(transport))
    }

    /// It has had something to send for longer than a socket takes that is only paced.
    fn is_stuck(&self, transport: &Transport) -> bool {
        let since = transport.pulse.blocked_since();
        since.is_some_and(|at| self.now.since(at) >= REDUNDANT_WAIT)
    }

    /// When a transport that is waited for is waited for no more.
    pub(super) fn pair_due(&self) -> Option<Time> {
        let pair = self.pair()?.map(|h| self.transports.get(&h));
        let behind = pair.into_iter().flatten().filter(|t| is_behind(t));
        behind
            .filter_map(|t| Some(t.pulse.blocked_since()? + REDUNDANT_WAIT))
            .filter(|at| *at > self.now)
            .min()
    }

    /// Streams that wait for room may look again, if the time has come.
    pub(super) fn check_room(&mut self, now: Time) {
        if self.room_due.is_some_and(|at| now >= at) {
            self.queues_changed();
        }
    }
}

fn is_behind(transport: &Transport) -> bool {
    transport.queued_bytes() >= transport.doubled_limit()
}
