//! Credit: for all streams together, for each stream, and for opening streams.

use std::collections::VecDeque;

use super::Session;
use super::config::Config;
use super::event::{Event, StreamId, Violation};
use super::stream::Stream;
use crate::limits::BOND_WINDOW_BYTES;
use crate::wire::Mode;

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
    /// Credit granted to streams beyond their first windows.
    pub grown: u64,
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
        // Small enough that the first windows of many streams fit into the budget, large enough
        // for a request and the first flight of an answer.
        let fair = recv_budget / config.max_streams.max(1);
        let initial_window = fair
            .clamp(32 * 1024, 256 * 1024)
            .min(config.stream_window_max);
        Self {
            sent: 0,
            send_max: 0,
            received: 0,
            consumed: 0,
            recv_max: recv_budget,
            recv_budget,
            initial_window,
            grown: 0,
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
        Ok(())
    }

    /// Applications took `bytes`, or never will: the memory is free again.
    pub fn consume(&mut self, bytes: u64) {
        self.consumed += bytes;
        if self.recv_max - self.consumed < self.recv_budget / 2 {
            self.recv_max = self.consumed + self.recv_budget;
            self.max_data_due = true;
        }
    }

    /// Grants `stream` more once it has used half of its window; the window doubles while there
    /// is budget, so that a fast path is not held back by it.
    pub fn replenish(&mut self, id: StreamId, stream: &mut Stream, window_max: u64) {
        let recv = &mut stream.recv;
        if recv.final_size.is_some() || recv.discard || recv.max - recv.consumed >= recv.window / 2
        {
            return;
        }
        let window_max = match stream.service.mode {
            Mode::Bonded => window_max.min(BOND_WINDOW_BYTES),
            Mode::Single | Mode::Redundant => window_max,
        };
        let more = recv.window.min(window_max.saturating_sub(recv.window));
        if more > 0 && self.grown + more <= self.recv_budget / 2 {
            self.grown += more;
            recv.window += more;
        }
        recv.max = recv.consumed + recv.window;
        if !stream.credit_due {
            stream.credit_due = true;
            self.credit_due.push_back(id);
        }
    }

    /// The stream is over: its part of the budget is free.
    pub fn forget(&mut self, stream: &Stream) {
        self.grown -= stream
            .recv
            .window
            .saturating_sub(self.initial_window)
            .min(self.grown);
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

    /// Credit for one stream or all came in.
    pub(super) fn credit_arrived(&mut self) {
        if self.wants_credit {
            self.wants_credit = false;
            self.events.push_back(Event::Writable);
        }
    }

    /// Removes `id` once both halves are over.
    pub(super) fn reap(&mut self, id: StreamId) {
        if !self.streams.get(&id).is_some_and(Stream::finished) {
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
