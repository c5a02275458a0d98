//! The latest handovers.

use std::collections::VecDeque;

use super::Handover;

/// A queue of bounded length; what is oldest makes room.
#[derive(Debug)]
pub(super) struct Ring {
    kept: VecDeque<Handover>,
    limit: usize,
}

impl Ring {
    pub fn new(limit: usize) -> Self {
        Self {
            kept: VecDeque::new(),
            limit,
        }
    }

    pub fn push(&mut self, handover: Handover) {
        if self.kept.len() >= self.limit {
            self.kept.pop_front();
        }
        self.kept.push_back(handover);
    }

    /// The latest `count` (with `peer`, if one is named), oldest first.
    pub fn latest(&self, peer: Option<&str>, count: usize) -> Vec<Handover> {
        let wanted = |h: &&Handover| peer.is_none_or(|peer| h.peer == peer);
        let mut out: Vec<Handover> = self
            .kept
            .iter()
            .rev()
            .filter(wanted)
            .take(count)
            .cloned()
            .collect();
        out.reverse();
        out
    }
}
