//! The application side: opening, writing, reading and ending streams.

use bytes::Bytes;

use super::Session;
use super::buf::SendBuf;
use super::event::{Event, StreamError, StreamId};
use super::stream::Stream;
use super::unpacking::Unpacking;
use crate::Time;
use crate::wire::{Frame, Mode, Service, StreamHeader, Target};

impl Session {
    /// Opens a stream to `target`, which the peer dials. Data may be written at once; the result
    /// comes as [`super::Event::StreamConnected`] or [`super::Event::StreamRefused`].
    pub fn open(&mut self, target: Target) -> Result<StreamId, StreamError> {
        self.open_with(target, Service::default())
    }

    /// The same for a stream whose records use the links as `service` says, in both directions.
    pub fn open_with(&mut self, target: Target, service: Service) -> Result<StreamId, StreamError> {
        if !self.is_open() {
            return Err(StreamError::NotOpen);
        }
        if self.flow.local_opened >= self.flow.local_max {
            return Err(StreamError::TooMany);
        }
        let id = self.flow.local_opened * 2 + self.role.bit();
        self.flow.local_opened += 1;
        self.stats.streams_opened += 1;
        let mut stream = Stream::new(
            self.peer.initial_max_stream_data,
            self.flow.initial_window,
            false,
        );
        self.flow.begin(&stream);
        stream.service = service;
        stream.recv.unpacking = Unpacking::new(self.packings.slots());
        self.streams.insert(id, stream);
        self.doubled_streams += usize::from(service.mode == Mode::Redundant);
        self.push_control(&Frame::Open {
            id,
            target,
            service,
        });
        self.raise(id);
        Ok(id)
    }

    /// The target of a stream that the peer opened is connected.
    pub fn connected(&mut self, id: StreamId) {
        if self.streams.contains_key(&id) {
            self.raise(id);
            self.push_control(&Frame::OpenOk { id });
        }
    }

    /// The target of a stream that the peer opened could not be connected: `errno` says why, in
    /// Linux's generic numbering. The stream is gone.
    pub fn refuse(&mut self, id: StreamId, errno: u64) {
        if self.streams.contains_key(&id) {
            self.push_control(&Frame::OpenFailed { id, errno });
            self.abort(id, errno);
        }
    }

    /// A buffer for at most `room` bytes of data: one of a record that is acknowledged, if there is one.
    pub fn send_buf(&mut self, room: usize) -> SendBuf {
        SendBuf::of(&mut self.pool, self.now, room)
    }

    /// A copy of `data` in such a buffer.
    pub fn send_copy(&mut self, data: &[u8]) -> SendBuf {
        SendBuf::copy_in(&mut self.pool, self.now, data)
    }

    /// Seals and schedules `data` as the next bytes of stream `id`.
    pub fn write(&mut self, now: Time, id: StreamId, data: SendBuf) -> Result<(), StreamError> {
        let place = self.place_data(id).unwrap_or_default();
        if let Some(header) = self.claim(now, id, data.len())? {
            self.send_data(now, &header, data, place);
        }
        Ok(())
    }

    /// The header of the next `len` bytes of stream `id`, which count as sent from here on; `None` for none.
    pub(super) fn claim(
        &mut self,
        now: Time,
        id: StreamId,
        len: usize,
    ) -> Result<Option<StreamHeader>, StreamError> {
        let capacity = self.claimable(id);
        let stream = self.streams.get_mut(&id).ok_or(StreamError::Gone)?;
        if stream.send.closed {
            return Err(StreamError::Finished);
        }
        if len > capacity {
            return Err(StreamError::NoCapacity);
        }
        if len == 0 {
            return Ok(None);
        }
        let header = StreamHeader {
            id,
            offset: stream.send.offset,
            fin: false,
        };
        stream.send.offset += len as u64;
        self.flow.sent += len as u64;
        self.stats.bytes_sent += len as u64;
        stream.appetite.wrote(now, len);
        Ok(Some(header))
    }

    /// The application sends no more on `id`: FIN goes behind the last byte.
    pub fn finish(&mut self, id: StreamId) -> Result<(), StreamError> {
        let stream = self.streams.get_mut(&id).ok_or(StreamError::Gone)?;
        if stream.send.closed {
            return Err(StreamError::Finished);
        }
        stream.send.closed = true;
        self.packings.release(&mut stream.packing);
        let header = StreamHeader {
            id,
            offset: stream.send.offset,
            fin: true,
        };
        self.push_control(&Frame::Stream { header, data: &[] });
        self.reap(id);
        Ok(())
    }

    /// Aborts both directions of `id`, as a TCP reset does; `code` is an errno in Linux's generic
    /// numbering. What was received and not read is dropped.
    pub fn abort(&mut self, id: StreamId, code: u64) {
        self.stop_sending(id, code);
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        let mut stop = None;
        if !stream.recv.closed && !stream.recv.discard {
            let freed = stream.recv.drop_all();
            if stream.recv.at_end() {
                stream.recv.closed = true;
            } else {
                stop = Some(Frame::StopSending { id, code });
            }
            self.flow.consume(freed);
        }
        if let Some(stop) = stop {
            self.push_control(&stop);
        }
        self.reap(id);
    }

    /// Aborts the sending half of `id`.
    pub(super) fn stop_sending(&mut self, id: StreamId, code: u64) {
        let open = self.streams.get_mut(&id).filter(|s| !s.send.closed);
        if let Some(stream) = open {
            stream.send.closed = true;
            self.packings.release(&mut stream.packing);
            if std::mem::take(&mut stream.wants_credit) {
                self.events.push_back(Event::StreamWritable(id));
            }
            let final_size = stream.send.offset;
            self.push_control(&Frame::ResetStream {
                id,
                code,
                final_size,
            });
        }
    }

    /// The next bytes of `id` in order, or `None` if there are none yet.
    pub fn peek(&self, id: StreamId) -> Option<Bytes> {
        self.streams.get(&id)?.recv.next_piece()
    }

    /// All bytes of `id` in order that can be read, for a vectored write. They end before an urgent byte; that one is
    /// shown alone ([`Self::is_urgent`]).
    pub fn readable(&self, id: StreamId) -> impl Iterator<Item = &[u8]> {
        self.streams
            .get(&id)
            .into_iter()
            .flat_map(|s| s.recv.ready())
    }

    /// The application took `taken` bytes of what [`Self::readable`] showed.
    pub fn consume(&mut self, id: StreamId, taken: usize) {
        let open = self.streams.len();
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        let loose = stream.recv.loose_buffers();
        stream.recv.consume(self.now, taken);
        self.loose_buffers =
            (self.loose_buffers + stream.recv.loose_buffers()).saturating_sub(loose);
        self.flow.consume(taken as u64);
        self.flow
            .replenish(self.now, id, stream, open, self.config.stream_window_max);
    }

    /// Whether the application has taken every byte of `id` and the peer ended it. Telling ends
    /// the receiving half: call it once the application has been told. Where the peer aborted the
    /// stream instead, [`super::Event::StreamReset`] comes now.
    pub fn take_end(&mut self, id: StreamId) -> bool {
        let Some(stream) = self.streams.get_mut(&id) else {
            return false;
        };
        stream.told_readable = false;
        if stream.recv.closed || !stream.recv.at_end() {
            return false;
        }
        stream.recv.closed = true;
        if let Some(code) = stream.recv.reset {
            let ended = stream.recv.fin;
            self.events.push_back(Event::StreamReset { id, code });
            self.abort(id, code);
            self.reap(id);
            return ended;
        }
        self.reap(id);
        true
    }

    /// The driver could not hand over all that was readable: [`super::Event::Readable`] comes again with further bytes.
    /// What stays is moved into buffers of its own size if it came in small pieces and its reader has taken none of late: a
    /// few bytes are not to hold on to a large buffer. All else stays as it is until there is too much of it, or the next
    /// [`Self::rest`]: it is about to go, or worth its buffer.
    pub fn leave_rest(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        stream.told_readable = false;
        if stream.recv.pieces().waste_buffers(self.now) {
            let loose = stream.recv.loose_buffers();
            stream.recv.pieces().compact();
            self.loose_buffers = self.loose_buffers.saturating_sub(loose);
        } else if stream.recv.loose_buffers() > 0 {
            self.pool.rest_later(self.now);
        }
    }

    /// Queues a frame of space R.
    pub(super) fn push_control(&mut self, frame: &Frame<'_>) {
        let mut bytes = Vec::with_capacity(16);
        frame.encode(&mut bytes);
        self.control.push_back(bytes);
    }
}
