//! A soft handover under load: the old transport goes on sending what the new one does not take yet.
//!
//! A new transport has to find out how much its path carries. What were queued there beyond that would
//! come late, and all that follows over the old one would wait for it at the receiver. So a record goes to
//! the new one only if it can go out at once.

use super::Session;
use super::event::Handle;
use super::transport::Transport;
use crate::Time;
use crate::limits::{EASE_QUEUE_BYTES, EASE_TIME};

/// The move that is being eased.
#[derive(Clone, Copy, Debug)]
pub(super) struct Easing {
    from: Handle,
    until: Time,
    /// What `from` carried, in bytes a second, if it is known.
    rate: Option<u64>,
}

impl Session {
    /// The session moves to `to` while the transport that it leaves works.
    pub(super) fn ease(&mut self, from: Option<Handle>, to: Handle) {
        let from = from.filter(|h| *h != to && self.answering(*h).is_some());
        self.easing = from.map(|from| Easing {
            from,
            until: self.now + EASE_TIME,
            rate: self.rate(from),
        });
    }

    /// Until when `handle`, which a soft handover has left, may still be needed, if it may at `now`.
    pub fn eases(&self, now: Time, handle: Handle) -> Option<Time> {
        let easing = self.easing.filter(|e| e.from == handle);
        easing.map(|e| e.until).filter(|until| now < *until)
    }

    /// When the easing ends, if it has not.
    pub(super) fn ease_due(&self) -> Option<Time> {
        let until = self.easing.map(|e| e.until);
        until.filter(|until| *until > self.now)
    }

    /// Whether an acknowledgement may make room on the transport that was moved to.
    pub(super) fn is_easing(&self) -> bool {
        self.ease_due().is_some()
    }

    /// Where a record goes that is for `active`: there, or, while it takes no more and does not carry as
    /// much as the one that was left, to that one. `None`: one of them is to be waited for.
    pub(super) fn eased(&self, active: Handle) -> Option<Handle> {
        let (Some(easing), Some(to)) = (
            self.easing.filter(|e| self.now < e.until),
            self.transports.get(&active),
        ) else {
            return Some(active);
        };
        let carries = |rate: u64| to.pulse.rate().is_some_and(|r| r >= rate - rate / 8);
        if easing.from == active || takes_at_once(to) || easing.rate.is_some_and(carries) {
            return Some(active);
        }
        match self.answering(easing.from) {
            Some(from) if from.queued_bytes() < EASE_QUEUE_BYTES => Some(easing.from),
            Some(_) => None,
            None => Some(active),
        }
    }
}

/// Whether what is queued for `transport` now goes out at once.
fn takes_at_once(transport: &Transport) -> bool {
    let queued = transport.queued_bytes();
    let under_way = transport.pulse.in_flight() + queued as u64;
    let room = |window: usize| under_way < window as u64;
    queued < EASE_QUEUE_BYTES && transport.window.is_none_or(room)
}
