//! Sealing packets, and the probes for their size.

use std::net::SocketAddr;

use super::path::Standing;
use super::{PathKey, UdpPath, UdpTransmit};
use crate::Time;
use crate::limits::{
    OWN_PING_TOKENS, PACKET_HEADER_BYTES, TAG_BYTES, UDP_BASE_BYTES, UDP_QUEUE_BYTES,
};
use crate::session::Session;
use crate::wire::{Frame, varint_bytes};

/// What a packet has beside its frames.
const OVERHEAD: usize = PACKET_HEADER_BYTES + TAG_BYTES;

impl Session {
    /// The next packet for the driver to send, until `None`.
    #[must_use]
    pub fn poll_udp(&mut self, now: Time) -> Option<UdpTransmit> {
        self.now = now;
        if std::mem::take(&mut self.udp.waits) && self.is_open() {
            let waiting = |(_, path): &(&PathKey, &super::Path)| path.has_frames();
            let keys: Vec<PathKey> = (self.udp.paths.iter())
                .filter(waiting)
                .map(|(&key, _)| key)
                .collect();
            for key in keys {
                self.emit_waiting(now, key);
            }
        }
        let next = self.udp.out.pop_front()?;
        self.udp.out_bytes -= next.packet.len();
        Some(next)
    }

    /// The kernel refused a packet of `bytes` to `to` as too large for the link (EMSGSIZE).
    pub fn udp_too_large(&mut self, path: UdpPath, to: SocketAddr, bytes: usize) {
        let key = PathKey {
            local: path,
            remote: to,
        };
        if let Some(path) = self.udp.paths.get_mut(&key) {
            path.mtu.too_large(bytes);
        }
    }

    /// Bytes of frames that a packet on `key` has room for.
    pub(in crate::session) fn packet_room(&self, key: PathKey) -> usize {
        let mtu = self.udp.paths.get(&key).map_or(0, |p| p.mtu.current());
        mtu.saturating_sub(OVERHEAD)
    }

    /// A datagram did not fit into one packet on `key`.
    pub(in crate::session) fn want_larger_packets(&mut self, now: Time, key: PathKey) {
        if let Some(path) = self.udp.paths.get_mut(&key) {
            path.mtu.want();
            self.probe_mtu(now, key);
        }
    }

    /// Sends `frame` in one packet on `key`, together with what waits there if there is room for both.
    /// False if it cannot be sent. `bytes`: what the frame has, at most.
    pub(in crate::session) fn emit(
        &mut self,
        now: Time,
        key: PathKey,
        frame: &Frame<'_>,
        bytes: usize,
    ) -> bool {
        let room = self.packet_room(key);
        let Some(path) = self.udp.paths.get_mut(&key) else {
            return false;
        };
        if path.has_frames() && path.frames_bytes() + bytes > room {
            self.emit_waiting(now, key);
        }
        self.emit_with(now, key, Some(frame), bytes)
    }

    fn emit_waiting(&mut self, now: Time, key: PathKey) {
        self.emit_with(now, key, None, 0);
    }

    /// What waits on `key`, and `frame` behind it.
    fn emit_with(
        &mut self,
        now: Time,
        key: PathKey,
        frame: Option<&Frame<'_>>,
        bytes: usize,
    ) -> bool {
        let Some(path) = self.udp.paths.get_mut(&key) else {
            return false;
        };
        let whole = path.has_frames();
        let (waiting, pad_to) = path.take_frames();
        let mut packet = begun(waiting.len() + bytes + pad_to);
        packet.extend_from_slice(&waiting);
        if let Some(frame) = frame {
            frame.encode(&mut packet);
        }
        let sent = self.seal_packet(now, key, packet, pad_to, whole);
        if let Some(path) = self.udp.paths.get_mut(&key).filter(|_| whole && !sent) {
            path.fails(now);
        }
        sent
    }

    /// Seals the frames behind the room for the header at the front of `packet`, padded to `pad_to`
    /// bytes in all; `whole`: with the frames that waited on the path.
    fn seal_packet(
        &mut self,
        now: Time,
        key: PathKey,
        mut packet: Vec<u8>,
        pad_to: usize,
        whole: bool,
    ) -> bool {
        pad(&mut packet, pad_to.saturating_sub(TAG_BYTES));
        let size = packet.len() + TAG_BYTES;
        let may = |p: &super::Path| p.may_send(size);
        let permitted = self.udp.paths.get(&key).is_some_and(may);
        if !permitted {
            return false;
        }
        self.rekey_if_due(now);
        if self.epochs.exhausted(self.config.rekey_records) {
            return false;
        }
        let Some(connection) = self.connection_on(key) else {
            return false;
        };
        let number = self.udp.next_number;
        self.udp.next_number += 1;
        let epoch = self.seal.epoch();
        if self.udp.seal_key.as_ref().is_none_or(|(e, _)| *e != epoch) {
            self.udp.seal_key = Some((epoch, self.seal.datagram_key()));
        }
        let Some((_, sealing)) = &self.udp.seal_key else {
            return false;
        };
        let header = connection.hide(epoch, number).encode();
        packet[..PACKET_HEADER_BYTES].copy_from_slice(&header);
        let tag = sealing.seal(&header, number, &mut packet[PACKET_HEADER_BYTES..]);
        packet.extend_from_slice(&tag);
        self.epochs.sealed();
        self.datagrams.stats.packets_sent += 1;
        if let Some(path) = self.udp.paths.get_mut(&key) {
            path.sends(now, size, whole);
        }
        self.udp.out_bytes += size;
        self.udp.out.push_back(UdpTransmit {
            path: key.local,
            to: key.remote,
            packet: packet.into(),
        });
        while self.udp.out_bytes > UDP_QUEUE_BYTES
            && let Some(old) = self.udp.out.pop_front()
        {
            self.udp.out_bytes -= old.packet.len();
            self.datagrams.stats.packets_dropped += 1;
        }
        true
    }

    /// Whether a packet of the base size, with `bytes` of frames and what waits, may go to `key`.
    pub(in crate::session) fn may_emit(&self, key: PathKey, bytes: usize) -> bool {
        self.udp.paths.get(&key).is_some_and(|path| {
            let size = bytes + path.frames_bytes() + OVERHEAD;
            size <= UDP_BASE_BYTES && path.may_send(size)
        })
    }

    /// A size is tried, if there is one to try.
    pub(super) fn probe_mtu(&mut self, now: Time, key: PathKey) {
        let Some(path) = self.udp.paths.get_mut(&key) else {
            return;
        };
        if path.standing == Standing::Usable
            && let Some(size) = path.mtu.next(now)
        {
            self.send_probe(now, key, size);
        }
    }

    fn send_probe(&mut self, now: Time, key: PathKey, size: usize) {
        let token = OWN_PING_TOKENS + self.udp.pings;
        self.udp.pings += 1;
        let mut packet = begun(size);
        Frame::Ping { token }.encode(&mut packet);
        let sent = self.seal_packet(now, key, packet, size, false);
        if let Some(path) = self.udp.paths.get_mut(&key) {
            let due = now + path.patience();
            if sent {
                path.mtu.probes(size, token, due);
            } else {
                path.mtu.rest();
            }
        }
    }

    pub(super) fn check_probe(&mut self, now: Time, key: PathKey) {
        let Some(path) = self.udp.paths.get_mut(&key) else {
            return;
        };
        if path.mtu.due().is_none_or(|at| now < at) {
            return;
        }
        match path.mtu.missed(now) {
            Some(size) => self.send_probe(now, key, size),
            None => self.probe_mtu(now, key),
        }
    }
}

/// The buffer of a packet, with room for its header and `bytes` of frames.
fn begun(bytes: usize) -> Vec<u8> {
    let mut packet = Vec::with_capacity(OVERHEAD + bytes);
    packet.resize(PACKET_HEADER_BYTES, 0);
    packet
}

/// Makes `plain` `to` bytes long, or one less where no frame has just that length.
fn pad(plain: &mut Vec<u8>, to: usize) {
    let missing = to.saturating_sub(plain.len());
    let Some(mut bytes) = missing.checked_sub(2) else {
        return;
    };
    while 1 + varint_bytes(bytes as u64) + bytes > missing {
        bytes -= 1;
    }
    Frame::Padding { bytes }.encode(plain);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_comes_within_a_byte_of_any_length() {
        for to in 0..40_000 {
            let mut plain = vec![1; 20];
            pad(&mut plain, to);
            let missed = to.saturating_sub(plain.len());
            assert!(plain.len() <= to.max(20) && missed <= 3, "{to}");
        }
    }
}
