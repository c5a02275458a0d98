//! What each frame does.

use std::time::Duration;

use bytes::Bytes;

use super::event::{Event, Handle, StreamId, TransportFault, Violation};
use super::receive::Stop;
use super::stream::{RecvHalf, Stream};
use super::transport::Phase;
use super::unpacking::Unpacking;
use super::{Session, State};
use crate::Time;
use crate::limits::{PIECES_AHEAD_MAX, PONGS_QUEUED_MAX};
use crate::wire::{Ack, Frame, Mode, Params, Service, StreamHeader, Target};

impl Session {
    pub(super) fn handle_frame(
        &mut self,
        now: Time,
        handle: Handle,
        plain: &Bytes,
        frame: Frame<'_>,
    ) -> Result<(), Stop> {
        let phase = self
            .transports
            .get(&handle)
            .ok_or(TransportFault::Unknown)?
            .phase;
        match (&frame, phase) {
            (Frame::Resume { .. }, Phase::AwaitResume)
            | (Frame::Resumed { .. }, Phase::AwaitResumed) => {}
            (_, Phase::Up) => {}
            _ => return Err(TransportFault::Unauthenticated.into()),
        }
        // A responder that has just read HELLO may say no at once.
        let greeting = matches!(
            frame,
            Frame::Hello { .. } | Frame::Accept { .. } | Frame::Close { .. }
        );
        let probing = matches!(
            frame,
            Frame::Ping { .. } | Frame::Pong { .. } | Frame::Ack { .. }
        );
        if !self.is_open() && !self.is_ending() && !greeting && !probing {
            return Err(Violation::protocol("a frame before the session is open").into());
        }
        match frame {
            Frame::Ping { token } => self.answer_ping(handle, token),
            Frame::Pong { token } => self.handle_pong(now, handle, token),
            Frame::Ack { ack, delay_us } => {
                self.handle_ack(now, handle, &ack, Duration::from_micros(delay_us))?;
            }
            Frame::Hello { params } => self.handle_hello(params)?,
            Frame::Accept { params } => self.handle_accept(params)?,
            Frame::Resume {
                counter,
                hard,
                standby,
                ack,
                route,
            } => {
                if let Some(transport) = self.transports.get_mut(&handle) {
                    transport.route = route;
                }
                self.handle_resume(now, handle, counter, hard, standby, &ack)?;
            }
            Frame::Resumed { ack } => self.handle_resumed(now, handle, &ack)?,
            Frame::TransportStatus {
                seq,
                seen,
                hard,
                standby,
            } => self.handle_status(handle, seq, seen, hard, standby),
            Frame::TransportLost { id } => self.handle_transport_lost(handle, id),
            Frame::TransportClose { .. } => self.handle_transport_close(handle),
            Frame::Close { code, reason } => self.handle_close(now, code, reason),
            Frame::Rekey { epoch, first } => self.handle_rekey(epoch, first)?,
            Frame::Reauth {
                generation,
                offset,
                data,
            } => {
                self.handle_reauth(generation, offset, plain.slice_ref(data))?;
            }
            Frame::ReauthDone { generation } => self.handle_reauth_done(now, generation)?,
            // The peer may not have heard yet that the session is over.
            _ if self.is_ending() => {}
            Frame::Datagram { header, data } => {
                let data = plain.slice_ref(data);
                let before = self.datagrams.stats.received;
                if self.handle_datagram(now, &header, data)? {
                    self.answer_flow(handle, header.flow);
                }
                let fresh = self.datagrams.stats.received > before;
                self.datagram_over_tcp_came(now, handle, fresh);
            }
            Frame::FlowOk { id } => self.handle_flow_ok(id)?,
            Frame::FlowClosed { id, errno } => self.handle_flow_closed(id, errno)?,
            stream_frame => {
                if let (Frame::Stream { .. } | Frame::Packed { .. }, Some(transport)) =
                    (&stream_frame, self.transports.get_mut(&handle))
                {
                    transport.term.received(now);
                }
                self.handle_stream_frame(plain, stream_frame)?;
            }
        }
        Ok(())
    }

    fn handle_stream_frame(&mut self, plain: &Bytes, frame: Frame<'_>) -> Result<(), Violation> {
        match frame {
            Frame::Stream { header, data } => self.handle_stream(&header, plain.slice_ref(data)),
            Frame::Urgent { id, offset } => self.handle_urgent(id, offset),
            Frame::Packed { header, data } => self.handle_packed(&header, plain.slice_ref(data)),
            Frame::PackingOver { id, offset } => self.handle_packing_over(id, offset),
            Frame::MaxData { max } => {
                self.flow.send_max = self.flow.send_max.max(max);
                self.credit_arrived();
                Ok(())
            }
            Frame::MaxStreamData { id, max } => self.handle_max_stream_data(id, max),
            Frame::MaxStreams { max } => {
                if max > self.flow.local_max {
                    self.flow.local_max = max;
                    self.events.push_back(Event::StreamsAvailable);
                }
                Ok(())
            }
            Frame::ResetStream {
                id,
                code,
                final_size,
            } => self.handle_reset(id, code, final_size),
            Frame::StopSending { id, code } => self.handle_stop(id, code),
            Frame::Open {
                id,
                target,
                service,
            } => self.handle_open(id, target, service),
            Frame::OpenOk { id } => {
                self.check_local(id)?;
                if self.streams.contains_key(&id) {
                    self.events.push_back(Event::StreamConnected(id));
                }
                Ok(())
            }
            Frame::OpenFailed { id, errno } => {
                self.check_local(id)?;
                if self.streams.contains_key(&id) {
                    self.events.push_back(Event::StreamRefused { id, errno });
                    self.abort(id, errno);
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// A peer that asks and does not read gets no more answers than these.
    fn answer_ping(&mut self, handle: Handle, token: u64) {
        let room = self
            .transports
            .get(&handle)
            .is_some_and(|t| t.urgent_len() < PONGS_QUEUED_MAX);
        if room {
            self.send_unretained(handle, &Frame::Pong { token });
        }
    }

    /// FLOW_OK goes back with the datagrams, or not at all: the next one asks again.
    fn answer_flow(&mut self, handle: Handle, id: u64) {
        if let Some(transport) = self.transports.get_mut(&handle)
            && transport.can_carry()
            && transport.has_datagram_room()
        {
            let mut frame = Vec::with_capacity(16);
            Frame::FlowOk { id }.encode(&mut frame);
            transport.push_datagram(frame.into());
        }
    }

    fn check_local(&self, id: StreamId) -> Result<(), Violation> {
        let ours = id & 1 == self.role.bit();
        if !ours || id >> 1 >= self.flow.local_opened {
            return Err(Violation::protocol(
                "an answer to a stream that was never opened",
            ));
        }
        Ok(())
    }

    /// `ack` came on `handle`, `delay` after the first record that it acknowledges.
    pub(super) fn handle_ack(
        &mut self,
        now: Time,
        handle: Handle,
        ack: &Ack,
        delay: Duration,
    ) -> Result<(), Violation> {
        if self.retained.acknowledge(ack)? {
            let mut shorter = false;
            for (&other, transport) in self.transports.iter_mut() {
                let here = other == handle;
                transport
                    .pulse
                    .acknowledged(&self.retained, here, delay, now);
                transport.term.acknowledged(&self.retained, now);
                // What is left out is never written, so nothing else would tell that there is room.
                shorter |= transport.skip_acknowledged(&self.retained);
            }
            if shorter || self.is_easing() {
                self.queues_changed();
            }
            self.answered(now, handle);
            let lowest = self.retained.lowest();
            self.epochs.acknowledged(lowest);
            if matches!(self.state, State::Closing { number: Some(n), .. } if lowest > n) {
                self.state = State::Closed;
            }
            self.unblock();
        }
        Ok(())
    }

    fn handle_hello(&mut self, params: &[u8]) -> Result<(), Violation> {
        if self.state != State::AwaitHello {
            return Err(Violation::protocol("HELLO at the wrong time"));
        }
        let params = Params::parse(params)
            .map_err(|_| Violation::protocol("HELLO that cannot be parsed"))?;
        self.adopt_peer(params.clone());
        self.state = State::AwaitDecision;
        self.events.push_back(Event::Hello(params));
        Ok(())
    }

    fn handle_accept(&mut self, params: &[u8]) -> Result<(), Violation> {
        if self.state != State::AwaitAccept {
            return Err(Violation::protocol("ACCEPT at the wrong time"));
        }
        let params = Params::parse(params)
            .map_err(|_| Violation::protocol("ACCEPT that cannot be parsed"))?;
        self.adopt_peer(params.clone());
        self.state = State::Open;
        self.events.push_back(Event::Accepted(params));
        self.events.push_back(Event::TokensChanged);
        Ok(())
    }

    fn handle_close(&mut self, now: Time, code: u64, reason: &[u8]) {
        // The sender of CLOSE waits for its acknowledgement, also when both close at once.
        self.ack.at_once(now);
        if self.is_ending() {
            return;
        }
        self.drop_streams();
        let reason = String::from_utf8_lossy(reason)
            .chars()
            .filter(|c| !c.is_control())
            .collect();
        self.state = State::Closing {
            until: now + crate::limits::ACK_DELAY,
            number: None,
        };
        self.events.push_back(Event::Closed {
            code,
            reason,
            by_peer: true,
        });
    }

    /// The stream that the peer's frame speaks of: made now if it is new, `None` if it is over.
    pub(super) fn peer_stream(&mut self, id: StreamId) -> Result<Option<&mut Stream>, Violation> {
        if id & 1 == self.role.bit() {
            self.check_local(id)?;
            return Ok(self.streams.get_mut(&id));
        }
        let index = id >> 1;
        if index >= self.flow.remote_max {
            return Err(Violation::flow("more streams than allowed"));
        }
        // Data may overtake its OPEN, and OPENs each other, when records travel on two transports.
        while self.flow.remote_opened <= index {
            let new = self.flow.remote_opened * 2 + (id & 1);
            self.flow.remote_opened += 1;
            self.stats.streams_opened += 1;
            let mut stream = Stream::new(
                self.peer.initial_max_stream_data,
                self.flow.initial_window,
                true,
            );
            self.flow.begin(&stream);
            stream.recv.unpacking = Unpacking::new(self.packings.slots());
            self.streams.insert(new, stream);
        }
        Ok(self.streams.get_mut(&id))
    }

    fn handle_open(
        &mut self,
        id: StreamId,
        target: Target,
        service: Service,
    ) -> Result<(), Violation> {
        if id & 1 == self.role.bit() {
            return Err(Violation::protocol("OPEN with a number of the other end"));
        }
        let Some(stream) = self.peer_stream(id)? else {
            return Ok(());
        };
        if !stream.awaiting_open {
            return Err(Violation::protocol("OPEN of a stream that is open"));
        }
        stream.awaiting_open = false;
        stream.service = service;
        self.doubled_streams += usize::from(service.mode == Mode::Redundant);
        self.events.push_back(Event::StreamOpened { id, target });
        self.tell_readable(id);
        Ok(())
    }

    fn handle_stream(&mut self, header: &StreamHeader, data: Bytes) -> Result<(), Violation> {
        self.arrived(header.id, data.len() as u64, |recv| {
            recv.insert(header.offset, header.fin, data)
        })
    }

    /// `len` bytes of stream `id` have come, which `insert` takes in: it returns by how much the stream grew.
    pub(super) fn arrived(
        &mut self,
        id: StreamId,
        len: u64,
        insert: impl FnOnce(&mut RecvHalf) -> Result<u64, Violation>,
    ) -> Result<(), Violation> {
        let Some(stream) = self.peer_stream(id)? else {
            return Ok(());
        };
        let before = (stream.recv.loose_buffers(), stream.recv.pieces_ahead());
        let grown = insert(&mut stream.recv)?;
        let after = (stream.recv.loose_buffers(), stream.recv.pieces_ahead());
        let ahead = stream.recv.bytes_ahead();
        let discarded = if stream.recv.discard {
            stream.recv.drop_all()
        } else {
            0
        };
        if stream.recv.discard && stream.recv.at_end() {
            stream.recv.closed = true;
        }
        self.stats.reorder_bytes_max = self.stats.reorder_bytes_max.max(ahead);
        self.count_pieces(before, after)?;
        self.stats.bytes_received += grown.min(len);
        self.flow.receive(grown)?;
        if discarded > 0 {
            self.flow.consume(discarded);
        }
        self.tell_readable(id);
        self.reap(id);
        Ok(())
    }

    /// Keeps what is held beside the bytes themselves within bounds.
    fn count_pieces(
        &mut self,
        before: (usize, usize),
        after: (usize, usize),
    ) -> Result<(), Violation> {
        self.loose_buffers += after.0.saturating_sub(before.0);
        self.pieces_ahead = (self.pieces_ahead + after.1).saturating_sub(before.1);
        if self.loose_buffers > self.config.loose_buffers() || self.pieces_ahead > PIECES_AHEAD_MAX
        {
            self.settle_pieces();
        }
        if self.pieces_ahead > PIECES_AHEAD_MAX {
            return Err(Violation::flow(
                "more pieces beyond gaps than records can explain",
            ));
        }
        Ok(())
    }

    /// Pieces may hold on to too many read buffers: those that nobody took get their own. The
    /// counts still have those of streams that ended; here they are made exact again.
    pub(super) fn settle_pieces(&mut self) {
        self.loose_buffers = 0;
        self.pieces_ahead = 0;
        for stream in self.streams.values_mut() {
            stream.recv.pieces().compact();
            self.pieces_ahead += stream.recv.pieces_ahead();
        }
    }

    fn tell_readable(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        let something =
            stream.recv.peek().is_some() || (stream.recv.at_end() && !stream.recv.closed);
        if something && !stream.told_readable && !stream.awaiting_open && !stream.recv.discard {
            stream.told_readable = true;
            self.events.push_back(Event::Readable(id));
        }
    }

    fn handle_max_stream_data(&mut self, id: StreamId, max: u64) -> Result<(), Violation> {
        if let Some(stream) = self.peer_stream(id)? {
            stream.send.max = stream.send.max.max(max);
            if std::mem::take(&mut stream.wants_credit) {
                self.events.push_back(Event::StreamWritable(id));
            }
        }
        Ok(())
    }

    fn handle_reset(&mut self, id: StreamId, code: u64, final_size: u64) -> Result<(), Violation> {
        let Some(stream) = self.peer_stream(id)? else {
            return Ok(());
        };
        stream.recv.set_final(final_size)?;
        let recv = &mut stream.recv;
        if !recv.discard && !stream.awaiting_open && !recv.at_end() {
            // What was sent before the abort was sent, and comes: a socket gives its reader the bytes first as well.
            recv.reset = Some(code);
            return Ok(());
        }
        let unseen = final_size - stream.recv.highest;
        stream.recv.highest = final_size;
        let told = stream.recv.discard || stream.awaiting_open;
        stream.recv.closed = true;
        let freed = stream.recv.drop_all();
        self.flow.receive(unseen)?;
        self.flow.consume(freed);
        if !told {
            self.events.push_back(Event::StreamReset { id, code });
        }
        self.abort(id, code);
        self.reap(id);
        Ok(())
    }

    fn handle_stop(&mut self, id: StreamId, code: u64) -> Result<(), Violation> {
        let Some(stream) = self.peer_stream(id)? else {
            return Ok(());
        };
        let recv = &stream.recv;
        if recv.final_size.is_some() && !recv.at_end() && !recv.discard && !stream.awaiting_open {
            // The application hears of it behind the last byte, unless it has ended its own direction before.
            if !stream.send.closed {
                stream.recv.reset = Some(code);
                self.stop_sending(id, code);
            }
            return Ok(());
        }
        // Whoever still sends must hear of it, also when the peer's end was read long ago.
        let unfinished = !stream.send.closed || !stream.recv.closed;
        if unfinished && !stream.recv.discard {
            self.events.push_back(Event::StreamReset { id, code });
        }
        self.abort(id, code);
        Ok(())
    }
}
