//! Credit: for all streams together, for each stream, and for opening streams.

use std::collections::VecDeque;

use super::Session;
use super::config::Config;
use super::event::{Event, StreamId, Violation};
use super::memory::Part;
use super::rivals::Rivals;
use super::stream::{RecvHalf, Stream};
use crate::Time;
use crate::limits::{BOND_WINDOW_BYTES, FIRST_WINDOW_MAX, FIRST_WINDOW_MIN, PROVEN_BYTES};
use crate::wire::{Frame, Mode};

/// Counts and limits that belong to no single stream.
#[derive(Debug)]
pub(super) struct Flow {
    /// Stream bytes sent, all streams.
    pub sent: u64,
    /// The peer's credit for them.
    pub send_max: u64,
    /// Stream bytes received (highest offsets), all streams.
    pub received: u64,
    /// Stream bytes that applications took.
    pub consumed: u64,
    /// Credit granted for `received`.
    pub recv_max: u64,
    /// Credit beyond `consumed`, and the memory kept for it.
    pub recv_budget: u64,
    /// First credit of each stream.
    pub initial_window: u64,
    /// The windows of all streams that are not over: what readers that are stuck may come to hold.
    promised: Part,
    rivals: Rivals,
    pub max_data_due: bool,
    pub credit_due: VecDeque<StreamId>,

    /// Streams that this end has opened, and may open.
    pub local_opened: u64,
    pub local_max: u64,
    /// Streams that the peer has opened, may open, and that are over.
    pub remote_opened: u64,
    pub remote_max: u64,
    pub remote_closed: u64,
    pub max_streams_due: bool,
}

impl Flow {
    pub fn new(config: &Config) -> Self {
        let recv_budget = (config.memory_bytes / 2) as u64;
        // Small enough that the first windows of as many streams as the peer may open fit into half of the budget, as far as
        // a window can be so small: those whose readers are stuck must not use up what the others need. Where there are
        // few, it is raised at once.
        let fair = recv_budget / 2 / config.max_streams.max(1);
        let initial_window = fair
            .clamp(FIRST_WINDOW_MIN, FIRST_WINDOW_MAX)
            .min(config.stream_window_max);
        Self {
            sent: 0,
            send_max: 0,
            received: 0,
            consumed: 0,
            recv_max: recv_budget,
            recv_budget,
            initial_window,
            promised: config.shared_memory.receiving(),
            rivals: Rivals::default(),
            max_data_due: false,
            credit_due: VecDeque::new(),
            local_opened: 0,
            local_max: 0,
            remote_opened: 0,
            remote_max: config.max_streams,
            remote_closed: 0,
            max_streams_due: false,
        }
    }

    /// The peer used `bytes` more of the common credit.
    pub fn receive(&mut self, bytes: u64) -> Result<(), Violation> {
        self.received += bytes;
        if self.received > self.recv_max {
            return Err(Violation::flow("more data than the session's credit"));
        }
        self.renew();
        Ok(())
    }

    /// Applications took `bytes`, or never will: the memory is free again.
    pub fn consume(&mut self, bytes: u64) {
        self.consumed += bytes;
        self.renew();
    }

    /// Renews the credit for all streams once half of what may be granted is new. What comes in makes it due as much as
    /// what is read: it may be for readers that are stuck, after which nobody reads.
    fn renew(&mut self) {
        // What readers that are stuck hold comes back to nobody: the others share the rest, and are told in time for that.
        let free = (self.consumed + self.recv_budget).saturating_sub(self.received);
        let fresh = (self.consumed + self.recv_budget).saturating_sub(self.recv_max);
        if fresh >= (free / 2).max(FIRST_WINDOW_MIN.min(self.recv_budget / 2)) {
            self.recv_max = self.consumed + self.recv_budget;
            self.max_data_due = true;
        }
    }

    /// A stream is new.
    pub fn begin(&mut self, stream: &Stream) {
        self.promised.add(stream.recv.window as usize);
    }

    /// What windows may grow to, together.
    fn windows_max(&self) -> u64 {
        self.recv_budget - self.recv_budget / 4
    }

    /// How much of that is left, and of what all sessions have.
    fn windows_left(&self) -> u64 {
        let left = (self.windows_max()).saturating_sub(self.promised.used() as u64);
        left.min(self.promised.free() as u64)
    }

    /// What each of `open` streams that are fast may have, with as much for one that becomes fast next.
    fn share(&self, now: Time, open: usize) -> u64 {
        let share = self.windows_max() / (self.rivals.of_late(now) + 1);
        share.max(self.unproven_window(open))
    }

    /// By how much a window may grow that wants `more`: by half of what is left up to three quarters of the budget, and of
    /// what all sessions have left, so that there is some for others whatever a few do, and what comes in always finds room
    /// beside what is stuck.
    fn allowed(&self, more: u64) -> u64 {
        let part = more.min(self.windows_left() / 2);
        // Less is not worth a frame.
        if part == more || part >= FIRST_WINDOW_MIN {
            part
        } else {
            0
        }
    }

    /// The window of one of `open` streams whose reader has not been seen to read: all that the kernel takes may lie in
    /// its buffers.
    fn unproven_window(&self, open: usize) -> u64 {
        let share = self.recv_budget / 16 / (open.max(1) as u64);
        share.clamp(
            self.initial_window,
            FIRST_WINDOW_MAX.max(self.initial_window),
        )
    }

    /// Grants `stream` more than its first window where there are few. Returns the new limit, if it is one.
    pub fn raise(&mut self, stream: &mut Stream, open: usize, window_max: u64) -> Option<u64> {
        let recv = &mut stream.recv;
        let window = self.unproven_window(open).min(window_max);
        if recv.discard || recv.final_size.is_some() || window <= recv.window {
            return None;
        }
        let more = self.allowed(window - recv.window);
        self.promised.add(more as usize);
        recv.window += more;
        recv.max = recv.consumed + recv.window;
        (more > 0).then_some(recv.max)
    }

    /// By how much the window of a stream may grow, whose part of the budget would be `share`: beyond that only as long as as
    /// much is left.
    fn growth(&self, recv: &RecvHalf, open: usize, window_max: u64, share: u64) -> u64 {
        let most = if recv.consumed < PROVEN_BYTES {
            self.unproven_window(open)
        } else {
            let spare = self.windows_left().saturating_sub(share);
            share.max(recv.window + spare)
        };
        let most = most.min(window_max);
        let more = recv.window.min(most.saturating_sub(recv.window));
        self.allowed(more)
    }

    /// Grants `stream`, one of `open`, more once it has used half of its window; the window doubles while its reader
    /// reads and there is budget, so that a fast path is not held back by it. Where others that are as fast have less, and
    /// little is left for them, it shrinks to what all may have: no credit is taken back, but less is granted anew.
    pub fn replenish(
        &mut self,
        now: Time,
        id: StreamId,
        stream: &mut Stream,
        open: usize,
        window_max: u64,
    ) {
        let recv = &mut stream.recv;
        let left = recv.max - recv.consumed;
        if recv.final_size.is_some() || recv.discard || left >= recv.window / 2 {
            return;
        }
        // What has not been seen to read gets no share.
        if recv.consumed >= PROVEN_BYTES {
            self.rivals.renewed(&mut recv.pace, now);
        }
        let window_max = match stream.service.mode {
            Mode::Bonded => window_max.min(BOND_WINDOW_BYTES),
            Mode::Single | Mode::Redundant => window_max,
        };
        let share = self.share(now, open);
        let part = share.max(left);
        if part < recv.window && self.windows_left() < share {
            self.promised.sub((recv.window - part) as usize);
            recv.window = part;
            if left >= recv.window / 2 {
                return;
            }
        } else {
            let more = self.growth(recv, open, window_max, share);
            self.promised.add(more as usize);
            recv.window += more;
        }
        recv.max = recv.consumed + recv.window;
        if !stream.credit_due {
            stream.credit_due = true;
            self.credit_due.push_back(id);
        }
    }

    /// Nothing comes beyond an end that is known, and nothing is held of what nobody wants: the rest of the window is
    /// free.
    pub fn narrow(&mut self, recv: &mut RecvHalf) {
        let rest = match recv.final_size {
            _ if recv.discard => 0,
            Some(size) => size - recv.consumed,
            None => return,
        };
        let less = recv.window.saturating_sub(rest);
        self.promised.sub(less as usize);
        recv.window -= less;
    }

    /// The stream is over: its part of the budget is free.
    pub fn forget(&mut self, stream: &Stream) {
        self.promised.sub(stream.recv.window as usize);
    }
}

impl Session {
    pub(super) fn credit_of(&self, id: StreamId) -> usize {
        let Some(stream) = self.streams.get(&id).filter(|s| !s.send.closed) else {
            return 0;
        };
        let credit = (stream.send.max - stream.send.offset)
            .min(self.flow.send_max.saturating_sub(self.flow.sent));
        usize::try_from(credit).unwrap_or(usize::MAX)
    }

    /// Whether `id` lacks credit of its own, whatever all streams together have.
    pub fn lacks_own_credit(&self, id: StreamId) -> bool {
        let spent = |s: &Stream| !s.send.closed && s.send.offset >= s.send.max;
        self.streams.get(&id).is_some_and(spent)
    }

    /// The driver found no credit for `id`, and is to be told when there is some: of its own, or of all.
    pub(super) fn want_credit(&mut self, id: StreamId) {
        if self.lacks_own_credit(id) {
            if let Some(stream) = self.streams.get_mut(&id) {
                stream.wants_credit = true;
            }
        } else {
            self.wants_credit = true;
        }
    }

    /// Grants a stream that is new to this end more than its first window, if there are few.
    pub(super) fn raise(&mut self, id: StreamId) {
        let (open, most) = (self.streams.len(), self.config.stream_window_max);
        let raised = match self.streams.get_mut(&id) {
            Some(stream) => self.flow.raise(stream, open, most),
            None => None,
        };
        if let Some(max) = raised {
            self.push_control(&Frame::MaxStreamData { id, max });
        }
    }

    /// Credit for all streams came in.
    pub(super) fn credit_arrived(&mut self) {
        if self.wants_credit {
            self.wants_credit = false;
            self.events.push_back(Event::Writable);
        }
    }

    /// Something of `id` may be over: gives back what it needs no more, and removes it once both halves are.
    pub(super) fn reap(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        self.flow.narrow(&mut stream.recv);
        if !stream.finished() {
            return;
        }
        let Some(stream) = self.streams.remove(&id) else {
            return;
        };
        self.doubled_streams -= usize::from(stream.service.mode == Mode::Redundant);
        self.flow.forget(&stream);
        if id & 1 != self.role.bit() {
            self.flow.remote_closed += 1;
            let spare = self.flow.remote_max - self.flow.remote_closed;
            // A quarter of the limit at a time: one frame for many short streams. The limit itself
            // rises when the frame is sealed, which a peer that acknowledges nothing prevents.
            self.flow.max_streams_due |=
                spare <= self.config.max_streams - self.config.max_streams.div_ceil(4);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All credit may be used up for readers that are stuck after the others have read what they had.
    #[test]
    fn credit_is_renewed_though_nobody_reads_any_more() {
        let mut flow = Flow::new(&Config::default());
        let budget = flow.recv_budget;
        flow.receive(budget * 3 / 8).unwrap();
        flow.consume(budget * 3 / 8);
        assert!(!flow.max_data_due);
        flow.receive(flow.recv_max - flow.received).unwrap();
        assert!(flow.max_data_due && flow.recv_max > flow.received);
    }

    /// A window grows by a part of what it wants where there is no more.
    #[test]
    fn windows_share_what_is_left() {
        let mut flow = Flow::new(&Config::default());
        let most = flow.recv_budget / 4 * 3;
        assert_eq!(flow.allowed(most / 2), most / 2);
        assert_eq!(flow.allowed(most), most / 2);
        flow.promised.add((most - FIRST_WINDOW_MIN) as usize);
        assert_eq!(flow.allowed(FIRST_WINDOW_MIN), 0);
    }
}
