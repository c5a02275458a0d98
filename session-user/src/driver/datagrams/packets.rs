//! Packets between the session and its sockets.

use std::io;

use bytes::BytesMut;
use session_proto::session::{UdpPath, UdpTransmit};

use super::sockets::Which;
use super::{BYTES_PER_TURN, Inbound, TAKEN_PER_TURN};
use crate::driver::Driver;
use crate::transport::{PacketSocket, WRITE_BYTES_MAX};

/// Room from which packets are cut that were received.
const ARENA_BYTES: usize = 64 * 1024;
/// Packets that go out in one write, at most (UDP_MAX_SEGMENTS of linux/udp.h).
const SEGMENTS_MAX: usize = 64;

/// What became of a write.
enum Sent {
    Done,
    /// Nothing: the socket takes none now.
    Blocked,
    Failed(io::Error),
}

impl Driver {
    /// One of the session's own UDP sockets is ready.
    pub(in crate::driver) fn udp_ready(&mut self, path: UdpPath) {
        let mut room = self.datagrams.room.take().unwrap_or_default();
        let mut bytes = 0;
        for _ in 0..TAKEN_PER_TURN {
            if bytes >= BYTES_PER_TURN {
                break;
            }
            let Some(local) = self.datagrams.locals.get(&path) else {
                break;
            };
            let Which::Own(socket, source) = &local.socket else {
                break;
            };
            let count = match socket.try_recv(&mut room) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if socket.poll_recv_ready(&mut source.context()).is_pending() {
                        break;
                    }
                    continue;
                }
                Err(error) => {
                    // Of an earlier packet, or of the link, whose end is told elsewhere.
                    tracing::debug!(link = %local.link, %error, "receiving packets");
                    source.requeue();
                    break;
                }
            };
            for batch in room.batches(count) {
                bytes += batch.bytes.len();
                for packet in batch.packets() {
                    self.take_packet(path, batch.from, packet);
                }
            }
            self.settle_flows();
        }
        self.datagrams.room = Some(room);
        self.busy.moved(bytes);
        if let Some(local) = self.datagrams.locals.get(&path)
            && let Which::Own(socket, source) = &local.socket
            && socket.poll_recv_ready(&mut source.context()).is_ready()
        {
            source.requeue();
        }
    }

    fn take_packet(&mut self, path: UdpPath, from: std::net::SocketAddr, packet: &[u8]) {
        let arena = &mut self.datagrams.arena;
        if arena.capacity() < packet.len() {
            // What was cut from it before has mostly gone, so that this rarely allocates.
            arena.reserve(ARENA_BYTES.max(packet.len()));
        }
        arena.extend_from_slice(packet);
        let packet = arena.split();
        self.open_packet(path, from, packet);
    }

    fn open_packet(&mut self, path: UdpPath, from: std::net::SocketAddr, packet: BytesMut) {
        let now = self.clock.now();
        if let Err(fault) = self.session.handle_udp(now, path, from, packet) {
            tracing::trace!(%from, %fault, "a packet is dropped");
        }
    }

    /// Packets came to one of the unit's sockets.
    pub(in crate::driver) fn packets_arrived(&mut self, first: Inbound) {
        let mut next = Some(first);
        let mut bytes = 0;
        for _ in 0..TAKEN_PER_TURN {
            let Some(inbound) = next.take_if(|_| bytes < BYTES_PER_TURN) else {
                break;
            };
            bytes += inbound.bytes.len();
            self.take_inbound(inbound);
            let listening = self.datagrams.listening.as_mut();
            next = listening.and_then(|l| l.inbound.try_recv().ok());
        }
        if let Some(inbound) = next {
            self.take_inbound(inbound);
        }
    }

    fn take_inbound(&mut self, mut inbound: Inbound) {
        let Some(path) = self.path_of(&inbound) else {
            return;
        };
        while !inbound.bytes.is_empty() {
            let one = inbound.stride.clamp(1, inbound.bytes.len());
            let packet = inbound.bytes.split_to(one);
            self.open_packet(path, inbound.from, packet);
        }
        self.settle_flows();
    }

    /// Sends the packets that the session has.
    pub(in crate::driver) fn flush_udp(&mut self) {
        self.datagrams.unwritten = 0;
        let mut group = std::mem::take(&mut self.datagrams.group);
        loop {
            self.gather(&mut group);
            let Some(first) = group.first() else { break };
            let path = first.path;
            match self.send_group(&group) {
                Sent::Done => group.clear(),
                Sent::Blocked => {
                    let carries = self.session.udp_status().is_some_and(|s| s.path == path);
                    if carries && self.awaits_room(path) {
                        for packet in group.drain(..).rev() {
                            self.datagrams.held.push_front(packet);
                        }
                        break;
                    }
                    // What is not for the path in use must not hold up what is.
                    self.datagrams.counters.packets_unsent += group.len() as u64;
                    group.clear();
                }
                Sent::Failed(error) if group.len() > 1 => {
                    tracing::debug!(%error, "packets go out one by one");
                    let mut all = true;
                    for packet in group.drain(..) {
                        all &= self.send_single(&packet);
                    }
                    if all && let Some(socket) = self.socket_of(path) {
                        socket.refuses_several(&error);
                    }
                }
                Sent::Failed(error) => {
                    for packet in group.drain(..) {
                        self.unsendable(&packet, &error);
                    }
                }
            }
        }
        self.datagrams.group = group;
    }

    /// The next packets that one write can take: of one size, but for the last, on one path to one address.
    fn gather(&mut self, group: &mut Vec<UdpTransmit>) {
        let now = self.clock.now();
        let mut bytes = 0;
        loop {
            let held = self.datagrams.held.pop_front();
            let Some(next) = held.or_else(|| self.session.poll_udp(now)) else {
                return;
            };
            if let (Some(first), Some(last)) = (group.first(), group.last()) {
                let same = (next.path, next.to) == (first.path, first.to);
                let fits = last.packet.len() == first.packet.len()
                    && next.packet.len() <= first.packet.len()
                    && group.len() < self.segments_max(first.path)
                    && bytes + next.packet.len() <= WRITE_BYTES_MAX;
                if !(same && fits) {
                    self.datagrams.held.push_front(next);
                    return;
                }
            }
            bytes += next.packet.len();
            group.push(next);
        }
    }

    fn segments_max(&self, path: UdpPath) -> usize {
        let socket = self.socket_of(path);
        socket.map_or(1, |s| s.segments_max().min(SEGMENTS_MAX))
    }

    fn socket_of(&self, path: UdpPath) -> Option<&PacketSocket> {
        Some(match &self.datagrams.locals.get(&path)?.socket {
            Which::Own(socket, _) => socket,
            Which::Shared(socket, _) => socket,
        })
    }

    fn send_group(&mut self, group: &[UdpTransmit]) -> Sent {
        let [first, rest @ ..] = group else {
            return Sent::Done;
        };
        if rest.is_empty() {
            return self.send_packets(first, &first.packet, None);
        }
        let mut joined = std::mem::take(&mut self.datagrams.joined);
        joined.clear();
        for transmit in group {
            joined.extend_from_slice(&transmit.packet);
        }
        let sent = self.send_packets(first, &joined, Some(first.packet.len()));
        self.datagrams.joined = joined;
        sent
    }

    fn send_packets(&self, to: &UdpTransmit, bytes: &[u8], segment: Option<usize>) -> Sent {
        let Some(local) = self.datagrams.locals.get(&to.path) else {
            return Sent::Done;
        };
        let sent = match &local.socket {
            Which::Own(socket, _) => socket.try_send(to.to, None, bytes, segment),
            Which::Shared(socket, _) => socket.try_send(to.to, Some(local.ip), bytes, segment),
        };
        match sent {
            Ok(()) => Sent::Done,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Sent::Blocked,
            Err(error) => Sent::Failed(error),
        }
    }

    /// Whether it went.
    fn send_single(&mut self, packet: &UdpTransmit) -> bool {
        match self.send_packets(packet, &packet.packet, None) {
            Sent::Done => return true,
            Sent::Blocked => self.datagrams.counters.packets_unsent += 1,
            Sent::Failed(error) => self.unsendable(packet, &error),
        }
        false
    }

    fn unsendable(&mut self, packet: &UdpTransmit, error: &io::Error) {
        self.datagrams.counters.packets_unsent += 1;
        if error.raw_os_error() == Some(libc::EMSGSIZE) {
            let bytes = packet.packet.len();
            self.session.udp_too_large(packet.path, packet.to, bytes);
            return;
        }
        tracing::debug!(to = %packet.to, %error, "a packet is not sent");
        if error.raw_os_error() == Some(libc::EINVAL) {
            // Our address is not this host's any more (ip(7), IP_PKTINFO).
            self.drop_shared(packet.path);
        }
    }

    /// Whether the driver will be told when the socket takes packets again. One that sessions share tells only one.
    fn awaits_room(&self, path: UdpPath) -> bool {
        match self.datagrams.locals.get(&path).map(|l| &l.socket) {
            Some(Which::Own(socket, source)) => {
                if socket.poll_send_ready(&mut source.context()).is_ready() {
                    source.requeue();
                }
                true
            }
            Some(Which::Shared(..)) | None => false,
        }
    }
}
