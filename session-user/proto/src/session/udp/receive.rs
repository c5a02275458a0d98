//! Opening packets, and what their frames do.

use std::net::SocketAddr;

use bytes::{Bytes, BytesMut};

use super::{OpenKey, PathKey, UdpPath};
use crate::Time;
use crate::limits::{FORGED_PACKETS_MAX, OLD_PACKETS_TIME, PACKET_HEADER_BYTES};
use crate::seal::{Epoch, SealError};
use crate::session::Session;
use crate::session::event::Violation;
use crate::wire::{Frame, FrameType, PacketHeader, Reader, Space, VARINT_MAX, WireError};

/// Why a packet was dropped. Nothing else follows from it, but for counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PacketFault {
    /// Bytes that are no packet.
    #[error("wrong bytes: {0}")]
    Wire(#[from] WireError),
    /// Its connection id is none that the peer may use now.
    #[error("the packet is not this session's")]
    Unknown,
    /// It came before, or is so old that nobody knows.
    #[error("the packet came before")]
    Repeated,
    /// It cannot be opened.
    #[error("wrong packet: {0}")]
    Seal(#[from] SealError),
    /// The session is not (or no longer) open.
    #[error("the session is not open")]
    Closed,
}

impl Session {
    /// A packet came on one of the driver's sockets. It is opened in place.
    pub fn handle_udp(
        &mut self,
        now: Time,
        path: UdpPath,
        from: SocketAddr,
        packet: BytesMut,
    ) -> Result<(), PacketFault> {
        self.now = now;
        let opened = self.open_packet(now, packet);
        match &opened {
            Ok(_) => self.datagrams.stats.packets_received += 1,
            Err(PacketFault::Repeated) => self.datagrams.stats.packets_repeated += 1,
            Err(_) => self.datagrams.stats.packets_refused += 1,
        }
        let Opened {
            number,
            size,
            plain,
        } = opened?;
        let key = PathKey {
            local: path,
            remote: from,
        };
        self.heard_from(now, key, number, size, can_move(&plain));
        if let Err(violation) = self.handle_packet(now, key, &plain) {
            self.violated(now, violation);
        }
        Ok(())
    }

    fn open_packet(&mut self, now: Time, mut packet: BytesMut) -> Result<Opened, PacketFault> {
        if !self.is_open() {
            return Err(PacketFault::Closed);
        }
        let header = PacketHeader::parse(&packet)?;
        let known = self.udp.ids.find(header.id);
        let (counter, connection) = known.ok_or(PacketFault::Unknown)?;
        let (epoch, number) = connection.reveal(&header);
        if number > VARINT_MAX || self.datagrams.stats.packets_refused > FORGED_PACKETS_MAX {
            return Err(SealError::NotAuthentic.into());
        }
        if !self.udp.received.is_fresh(number) {
            return Err(PacketFault::Repeated);
        }
        let size = packet.len();
        let mut raw = [0; PACKET_HEADER_BYTES];
        raw.copy_from_slice(&packet[..PACKET_HEADER_BYTES]);
        let sealed = &mut packet[PACKET_HEADER_BYTES..];
        let cached = self.udp.open_keys.iter().find(|k| k.epoch == epoch);
        let len = if let Some(cached) = cached {
            cached.key.open(&raw, number, sealed)?
        } else {
            let len = self.open.open_datagram(epoch, &raw, number, sealed)?;
            self.keep_key(now, epoch);
            len
        };
        self.udp.received.insert(number);
        self.saw_id(counter);
        let plain = packet.freeze();
        Ok(Opened {
            number,
            size,
            plain: plain.slice(PACKET_HEADER_BYTES..PACKET_HEADER_BYTES + len),
        })
    }

    /// What `epoch` opens will come again: to derive its key for each packet would be dear.
    fn keep_key(&mut self, now: Time, epoch: Epoch) {
        if let Some(key) = self.open.datagram_key(epoch) {
            let until = None;
            self.udp.open_keys.push(OpenKey { epoch, key, until });
        }
        self.retire_packet_keys(now);
    }

    /// Keys of epochs that are retired go, but not at once.
    pub(in crate::session) fn retire_packet_keys(&mut self, now: Time) {
        for old in &mut self.udp.open_keys {
            if !self.open.is_live(old.epoch) {
                old.until.get_or_insert(now + OLD_PACKETS_TIME);
            }
        }
    }

    fn handle_packet(&mut self, now: Time, key: PathKey, plain: &Bytes) -> Result<(), Violation> {
        let mut reader = Reader::new(plain);
        while !reader.is_empty() {
            let frame = match Frame::parse(&mut reader, Space::Datagram) {
                Ok(Some(frame)) => frame,
                Ok(None) => continue,
                Err(_) => return Err(Violation::protocol("a frame that cannot be parsed")),
            };
            match frame {
                Frame::Datagram { header, data } => {
                    let named = self.handle_datagram(now, &header, plain.slice_ref(data))?;
                    if named {
                        self.answer_on(key, &Frame::FlowOk { id: header.flow });
                    }
                }
                Frame::FlowOk { id } => self.handle_flow_ok(id)?,
                Frame::Ping { token } => self.answer_on(key, &Frame::Pong { token }),
                Frame::Pong { token } => self.handle_udp_pong(now, token),
                Frame::PathChallenge { data } => {
                    self.answer_on(key, &Frame::PathResponse { data });
                }
                Frame::PathResponse { data } => self.handle_path_response(now, key, data),
                _ => {}
            }
        }
        Ok(())
    }

    /// Answers go where the question came from; nothing goes to an address that the session does not
    /// know.
    fn answer_on(&mut self, key: PathKey, frame: &Frame<'_>) {
        if let Some(path) = self.udp.paths.get_mut(&key) {
            path.push(frame);
            self.udp.waits = true;
        }
    }
}

struct Opened {
    number: u64,
    size: usize,
    plain: Bytes,
}

/// Whether a packet may move the peer's address: answers go back the way that the questions came, also
/// when the peer has left it.
fn can_move(plain: &[u8]) -> bool {
    let mut reader = Reader::new(plain);
    while let Ok(frame) = Frame::parse(&mut reader, Space::Datagram) {
        let answers = [FrameType::Pong, FrameType::PathResponse, FrameType::Padding];
        if frame.is_some_and(|f| !answers.contains(&f.frame_type())) {
            return true;
        }
    }
    false
}
