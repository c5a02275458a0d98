//! Packets of sessions that this unit accepted: UDP sockets beside the listeners, and who gets what comes there.
//!
//! A packet names its session by a connection id, which only the two ends can tell from any other. What is called by no
//! name that is known is dropped without a word, and whatever else is wrong with a packet is for its session to find.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use session_proto::wire::{ConnectionId, PacketHeader};

use super::registry::Registry;
use crate::driver::Inbound;
use crate::transport::{Batch, PacketSocket, ReceiveRoom};

/// Batches of packets that wait for one session's driver; what comes beyond them is dropped.
pub const PACKETS_WAITING_MAX: usize = 128;
/// Wait after receiving failed.
const RETRY: Duration = Duration::from_millis(100);

/// Packets dropped: with a name that nobody has, or no name; and those that a driver did not take in time.
static UNKNOWN: AtomicU64 = AtomicU64::new(0);
static OVERFLOWED: AtomicU64 = AtomicU64::new(0);

/// Packets that were dropped before any session saw them: of none that is known, and of one that was busy.
pub fn dropped() -> (u64, u64) {
    (
        UNKNOWN.load(Ordering::Relaxed),
        OVERFLOWED.load(Ordering::Relaxed),
    )
}

/// Opens a UDP socket beside each listener. Where a port is taken, datagrams of those who dial that address go over
/// TCP.
pub fn listen(addresses: impl Iterator<Item = SocketAddr>) -> Arc<[Arc<PacketSocket>]> {
    let open = |addr: SocketAddr| match PacketSocket::listen(addr) {
        Ok(socket) => Some(Arc::new(socket)),
        Err(error) => {
            tracing::warn!(%addr, %error, "[accept] listen: no UDP there, so datagrams go over TCP; end the program that has the port, or say [transport] udp = false");
            None
        }
    };
    addresses.filter_map(open).collect()
}

/// Takes packets in until the task is aborted.
pub async fn serve(registry: Registry, index: usize, socket: Arc<PacketSocket>) {
    let mut room = ReceiveRoom::default();
    loop {
        match socket.recv(&mut room).await {
            Ok(count) => {
                for batch in room.batches(count) {
                    hand_over(&registry, index, &batch);
                }
            }
            Err(error) => {
                tracing::debug!(at = %socket.local_addr(), %error, "receiving packets");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// Packets that follow each other and have one name go together.
fn hand_over(registry: &Registry, index: usize, batch: &Batch<'_>) {
    let Some(to) = batch.to else { return };
    if batch.from.port() == 0 {
        // Nobody can be answered there.
        count(&UNKNOWN, batch.bytes.len(), batch.stride);
        return;
    }
    let mut rest = batch.bytes;
    while !rest.is_empty() {
        let (bytes, name) = first_run(rest, batch.stride);
        let (run, behind) = rest.split_at(bytes);
        rest = behind;
        let packets = name.and_then(|name| registry.by_connection(&name));
        let Some(packets) = packets else {
            count(&UNKNOWN, bytes, batch.stride);
            continue;
        };
        let Ok(place) = packets.try_reserve() else {
            count(&OVERFLOWED, bytes, batch.stride);
            continue;
        };
        place.send(Inbound {
            socket: index,
            to,
            from: batch.from,
            bytes: BytesMut::from(run),
            stride: batch.stride,
        });
    }
}

/// The bytes of the packets at the front that have the same name, or none.
fn first_run(bytes: &[u8], stride: usize) -> (usize, Option<ConnectionId>) {
    let name = |packet: &[u8]| PacketHeader::parse(packet).ok().map(|header| header.id);
    let first = name(bytes.get(..stride).unwrap_or(bytes));
    let same = bytes
        .chunks(stride)
        .take_while(|packet| name(packet) == first);
    (same.map(<[u8]>::len).sum(), first)
}

fn count(counter: &AtomicU64, bytes: usize, stride: usize) {
    counter.fetch_add(bytes.div_ceil(stride) as u64, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use session_proto::wire::PacketHeader;

    fn packet(id: u8, bytes: usize) -> Vec<u8> {
        let header = PacketHeader {
            id: [id; 8],
            epoch: 0,
            number: 0,
        };
        let mut packet = header.encode().to_vec();
        packet.resize(bytes, 0);
        packet
    }

    #[test]
    fn packets_of_one_session_go_together() {
        let all = [
            packet(1, 100),
            packet(1, 100),
            packet(2, 100),
            packet(2, 60),
        ]
        .concat();
        assert_eq!(first_run(&all, 100), (200, Some([1; 8])));
        assert_eq!(first_run(&all[200..], 100), (160, Some([2; 8])));
        assert_eq!(first_run(&[0; 30], 100), (30, None));
        let mixed = [vec![0; 100], packet(1, 100)].concat();
        assert_eq!(first_run(&mixed, 100), (100, None));
    }
}
