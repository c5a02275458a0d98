//! From transport bytes to opened records.

use bytes::{Buf, Bytes, BytesMut};

use super::event::{Handle, TransportFault, Violation};
use super::transport::Phase;
use super::{Role, Session, State};
use crate::Time;
use crate::limits::{RECORD_HEADER_BYTES, RECORD_WINDOW, VERSION};
use crate::seal::{Epoch, SealError};
use crate::wire::{Frame, Reader, RecordHeader, Reply, Space, Status};

/// What stopped the handling of a record.
pub(super) enum Stop {
    /// The transport is at fault: the session lives on.
    Transport(TransportFault),
    /// The peer is at fault.
    Session(Violation),
}

impl From<Violation> for Stop {
    fn from(violation: Violation) -> Self {
        Self::Session(violation)
    }
}

impl From<TransportFault> for Stop {
    fn from(fault: TransportFault) -> Self {
        Self::Transport(fault)
    }
}

impl Session {
    /// Takes all complete records from the front of `input`, which holds what was read from
    /// `handle`'s socket and nobody has taken yet. A fault ends the transport: close its socket
    /// and call [`Session::transport_lost`].
    pub fn handle_bytes(
        &mut self,
        now: Time,
        handle: Handle,
        input: &mut BytesMut,
    ) -> Result<(), TransportFault> {
        self.now = now;
        self.take_reply(handle, input)?;
        while input.len() >= RECORD_HEADER_BYTES {
            if self.state == State::Closed {
                return Err(TransportFault::Closed);
            }
            let phase = self
                .transports
                .get(&handle)
                .ok_or(TransportFault::Unknown)?
                .phase;
            if phase == Phase::AwaitReply {
                break;
            }
            let mut raw = [0; RECORD_HEADER_BYTES];
            raw.copy_from_slice(&input[..RECORD_HEADER_BYTES]);
            let header = RecordHeader::parse(&raw)?;
            let total = RECORD_HEADER_BYTES + header.payload_bytes;
            if input.len() < total {
                break;
            }
            let record = input.split_to(total);
            match self.handle_record(now, handle, &raw, &header, record) {
                Ok(()) => {}
                Err(Stop::Transport(fault)) => return Err(fault),
                Err(Stop::Session(violation)) => self.violated(now, violation),
            }
        }
        Ok(())
    }

    /// Makes room in `input` for the next read of about `bytes`, and for the record that has begun to come, if there is not
    /// enough. Buffers that applications have taken all of are used again. True if `input` is in another buffer now, of
    /// which all is its own.
    pub fn make_room(&mut self, input: &mut BytesMut, bytes: usize) -> bool {
        let missing = Self::missing_bytes(input);
        input.capacity() - input.len() < missing.max(bytes / 2)
            && self.pool.make_room(self.now, input, bytes.max(2 * missing))
    }

    /// How many bytes of `input` are missing for the next record, for the size of the next read.
    pub fn missing_bytes(input: &BytesMut) -> usize {
        let Some(raw) = input.first_chunk::<RECORD_HEADER_BYTES>() else {
            return 0;
        };
        RecordHeader::parse(raw).map_or(0, |h| {
            (RECORD_HEADER_BYTES + h.payload_bytes).saturating_sub(input.len())
        })
    }

    fn take_reply(&mut self, handle: Handle, input: &mut BytesMut) -> Result<(), TransportFault> {
        let transport = self
            .transports
            .get_mut(&handle)
            .ok_or(TransportFault::Unknown)?;
        if transport.phase != Phase::AwaitReply {
            return Ok(());
        }
        let Some(reply) = Reply::parse(input)? else {
            return Ok(());
        };
        if reply.status != Status::Ok {
            return Err(TransportFault::Refused(reply.status));
        }
        if reply.version != VERSION {
            return Err(TransportFault::Refused(Status::Version));
        }
        input.advance(Reply::BYTES);
        transport.phase = Phase::AwaitResumed;
        Ok(())
    }

    fn handle_record(
        &mut self,
        now: Time,
        handle: Handle,
        raw: &[u8; RECORD_HEADER_BYTES],
        header: &RecordHeader,
        mut record: BytesMut,
    ) -> Result<(), Stop> {
        let sealed = &mut record[RECORD_HEADER_BYTES..];
        let plain_bytes = match header.space {
            Space::Retained => self.open_retained(now, handle, raw, header, sealed)?,
            Space::Unretained => self.open_unretained(handle, raw, header, sealed)?,
            // No record's header says so.
            Space::Datagram => None,
        };
        let Some(plain_bytes) = plain_bytes else {
            return Ok(());
        };
        self.opened = (header.number, Epoch(header.epoch));
        let plain = record
            .freeze()
            .slice(RECORD_HEADER_BYTES..RECORD_HEADER_BYTES + plain_bytes);
        self.handle_frames(now, handle, header.space, &plain)?;
        if header.space == Space::Retained && self.open.retire(self.received.cumulative()) {
            self.forget_retired_keys();
            self.retire_packet_keys(now);
        }
        Ok(())
    }

    /// `None`: a duplicate, dropped by its number.
    fn open_retained(
        &mut self,
        now: Time,
        handle: Handle,
        raw: &[u8; RECORD_HEADER_BYTES],
        header: &RecordHeader,
        sealed: &mut [u8],
    ) -> Result<Option<usize>, Stop> {
        let transport = self
            .transports
            .get(&handle)
            .ok_or(TransportFault::Unknown)?;
        if transport.phase != Phase::Up {
            return Err(TransportFault::Unauthenticated.into());
        }
        if self.received.contains(header.number) {
            self.stats.duplicates += 1;
            self.ack.note(now, handle, 0);
            return Ok(None);
        }
        let len = self
            .open
            .open(Epoch(header.epoch), None, raw, header.number, sealed)
            .map_err(TransportFault::from)?;
        if header.number >= self.received.cumulative() + RECORD_WINDOW {
            return Err(Violation::protocol("a record number beyond the window").into());
        }
        if let Some(transport) = self.transports.get_mut(&handle) {
            transport.pulse.came(now);
            if self.role == Role::Initiator {
                transport.pulse.heard(now);
            }
        }
        let in_order = header.number == self.received.cumulative();
        self.received.insert(header.number);
        self.stats.records_received += 1;
        self.ack.note(now, handle, len);
        if !in_order {
            // Records overtake each other around a handover, or on several transports: let the sender
            // know its state.
            self.ack.soon(now);
        }
        Ok(Some(len))
    }

    /// `None`: a duplicate. A record whose keys have been wiped is a fault: the transport is so slow
    /// that the others left it behind, and what the record said cannot be known any more.
    fn open_unretained(
        &mut self,
        handle: Handle,
        raw: &[u8; RECORD_HEADER_BYTES],
        header: &RecordHeader,
        sealed: &mut [u8],
    ) -> Result<Option<usize>, Stop> {
        let transport = self
            .transports
            .get_mut(&handle)
            .ok_or(TransportFault::Unknown)?;
        if header.number < transport.next_expected {
            return Ok(None);
        }
        let epoch = Epoch(header.epoch);
        let cached = transport.open_key.as_ref().filter(|(e, _)| *e == epoch);
        let len = if let Some((_, key)) = cached {
            key.open(raw, header.number, sealed)
                .map_err(TransportFault::from)?
        } else {
            let len = self
                .open
                .open(epoch, Some(transport.wire_id), raw, header.number, sealed)
                .map_err(|error: SealError| TransportFault::from(error))?;
            transport.open_key = self
                .open
                .transport_key(epoch, transport.wire_id)
                .map(|key| (epoch, key));
            len
        };
        transport.next_expected = header.number + 1;
        Ok(Some(len))
    }

    fn forget_retired_keys(&mut self) {
        for transport in self.transports.values_mut() {
            if transport
                .open_key
                .as_ref()
                .is_some_and(|(epoch, _)| !self.open.is_live(*epoch))
            {
                transport.open_key = None;
            }
        }
    }

    fn handle_frames(
        &mut self,
        now: Time,
        handle: Handle,
        space: Space,
        plain: &Bytes,
    ) -> Result<(), Stop> {
        let mut reader = Reader::new(plain);
        while !reader.is_empty() {
            let frame = match Frame::parse(&mut reader, space) {
                Ok(Some(frame)) => frame,
                Ok(None) => continue,
                // The bytes are authentic, so they are what the peer meant.
                Err(_) => return Err(Violation::protocol("a frame that cannot be parsed").into()),
            };
            self.handle_frame(now, handle, plain, frame)?;
            if self.is_ending() && !matches!(self.state, State::Closing { .. }) {
                return Ok(());
            }
        }
        Ok(())
    }
}
