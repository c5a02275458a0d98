//! Datagrams that wait while the name of their flow's target is resolved: what a peer can make this unit hold by them.

use std::collections::VecDeque;

use bytes::Bytes;
use session_proto::wire::Dscp;

/// Datagrams of one flow that wait, at most; what comes after them is dropped.
const WAITING_MAX: usize = 16;
/// Their bytes in all flows of a session together, [`OVERHEAD`] included, at most.
const WAITING_BYTES_MAX: usize = 1 << 20;
/// What a waiting datagram takes beside its bytes: an allocation of its own and its place in a queue.
const OVERHEAD: usize = 128;
/// Flows of a session that the peer has closed while datagrams of theirs wait, at most. The peer's limit on flows does
/// not count them any more, and a name server may take minutes.
const CLOSED_MAX: usize = 64;

/// What waits in one flow.
#[derive(Debug, Default)]
pub(super) struct Queue {
    datagrams: VecDeque<(Bytes, Dscp)>,
    bytes: usize,
    /// The peer has closed the flow: it goes when this is sent.
    closed: bool,
}

/// What waits in all flows of a session.
#[derive(Debug, Default)]
pub(super) struct Room {
    bytes: usize,
    closed: usize,
}

impl Room {
    /// Adds a datagram; false if there is no room for it.
    pub fn push(&mut self, queue: &mut Queue, data: &[u8], dscp: Dscp) -> bool {
        let cost = data.len() + OVERHEAD;
        if queue.datagrams.len() >= WAITING_MAX || self.bytes + cost > WAITING_BYTES_MAX {
            return false;
        }
        self.bytes += cost;
        queue.bytes += cost;
        // A copy, since the original may hold a whole batch of packets.
        let data = Bytes::copy_from_slice(data);
        queue.datagrams.push_back((data, dscp));
        true
    }

    /// The peer has closed the flow; false if it is not worth waiting for, or too many such flows wait.
    pub fn close(&mut self, queue: &mut Queue) -> bool {
        if queue.closed {
            return true;
        }
        if queue.datagrams.is_empty() || self.closed >= CLOSED_MAX {
            return false;
        }
        queue.closed = true;
        self.closed += 1;
        true
    }

    /// What waited in a flow that waits no more, and whether the peer has closed it.
    pub fn release(&mut self, queue: Queue) -> (VecDeque<(Bytes, Dscp)>, bool) {
        self.bytes -= queue.bytes;
        self.closed -= usize::from(queue.closed);
        (queue.datagrams, queue.closed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_opens_and_closes_flows_holds_no_more_than_there_is_room() {
        let mut room = Room::default();
        let mut kept = Vec::new();
        for _ in 0..10_000 {
            let mut queue = Queue::default();
            room.push(&mut queue, b"", Dscp::default());
            if room.close(&mut queue) {
                kept.push(queue);
            } else {
                room.release(queue);
            }
        }
        assert_eq!((kept.len(), room.closed), (CLOSED_MAX, CLOSED_MAX));
        assert_eq!(room.bytes, CLOSED_MAX * OVERHEAD);
        for queue in kept {
            let (datagrams, closed) = room.release(queue);
            assert_eq!((datagrams.len(), closed), (1, true));
        }
        assert_eq!((room.bytes, room.closed), (0, 0));
    }

    #[test]
    fn empty_datagrams_take_room_too() {
        let mut room = Room::default();
        let mut queues = Vec::new();
        let mut taken = 0;
        for _ in 0..2_000 {
            let mut queue = Queue::default();
            while room.push(&mut queue, b"", Dscp::default()) {
                taken += 1;
            }
            queues.push(queue);
        }
        assert_eq!(taken, WAITING_BYTES_MAX / OVERHEAD);
        assert!(queues.iter().all(|q| q.datagrams.len() <= WAITING_MAX));
    }

    #[test]
    fn a_flow_in_which_nothing_waits_is_not_kept() {
        let mut room = Room::default();
        assert!(!room.close(&mut Queue::default()));
    }
}
