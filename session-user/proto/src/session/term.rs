//! The first things that happen on a transport since it began to carry: what a driver's trace tells of
//! a handover. Nothing is decided by it.

use super::event::Handle;
use super::retained::Retained;
use super::{Session, Transport};
use crate::Time;

/// When the first of each came. Of a transport that carries again, since it does so again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Firsts {
    /// The socket took the whole of a record of space R.
    pub sent: Option<Time>,
    /// The peer acknowledged that record.
    pub acknowledged: Option<Time>,
    /// Bytes of a stream came.
    pub received: Option<Time>,
}

/// What is known of one transport's term.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Term {
    firsts: Firsts,
    /// The first record, until it is acknowledged.
    number: Option<u64>,
}

impl Term {
    /// The socket took the last byte of record `number`.
    pub fn written(&mut self, number: u64, now: Time) {
        if self.firsts.sent.is_none() {
            self.firsts.sent = Some(now);
            self.number = Some(number);
        }
    }

    /// An acknowledgement was taken in.
    pub fn acknowledged(&mut self, retained: &Retained, now: Time) {
        let freed = |number: &mut u64| retained.get(*number).is_none();
        if self.number.take_if(freed).is_some() {
            self.firsts.acknowledged = Some(now);
        }
    }

    /// Bytes of a stream came.
    pub fn received(&mut self, now: Time) {
        self.firsts.received.get_or_insert(now);
    }
}

impl Session {
    /// What came first on `handle` since new records go to it, or since it stands in for a silent one.
    pub fn firsts(&self, handle: Handle) -> Firsts {
        self.transports
            .get(&handle)
            .map_or_else(Firsts::default, |t| t.term.firsts)
    }

    /// When the oldest was written that is unanswered on `handle`, if anything is.
    pub fn unanswered_since(&self, handle: Handle) -> Option<Time> {
        self.transports.get(&handle)?.pulse.oldest()
    }

    pub(super) fn begin_term(&mut self, handle: Handle) {
        self.set_term(handle, Term::default());
    }

    pub(super) fn term(&self, handle: Handle) -> Term {
        self.transports
            .get(&handle)
            .map_or_else(Term::default, |t: &Transport| t.term)
    }

    pub(super) fn set_term(&mut self, handle: Handle, term: Term) {
        if let Some(transport) = self.transports.get_mut(&handle) {
            transport.term = term;
        }
    }
}
