//! The local bypass: what an application sends goes straight to the agent's socket, past TCP on loopback.
//!
//! Order is kept by two facts of the kernel. A reader takes what was redirected before it takes what came by TCP
//! (`tcp_bpf_recvmsg` in net/ipv4/tcp_bpf.c), so a message may go by TCP behind redirected ones at any time. The
//! opposite would overtake; so redirecting begins only when all that was sent by TCP has been read.
//!
//! A connection that goes by TCP again leaves for good: the kernel's own functions for sockets that take part make TCP
//! slower than it is, and their reads that wait fail (EAGAIN) when the send buffer has room again.

use crate::FlowKey;

/// Connections that may have the bypass at once. Others go by TCP.
pub const BYPASS_FLOWS_MAX: u32 = 16_384;
/// What may wait in the agent's socket beside TCP, in bytes; one message more where nothing waits.
pub const BYPASS_UNREAD_MAX: u64 = 512 * 1024;
/// Least size, in bytes, of a large message. Smaller ones cost more than by TCP, which puts many of them into one segment,
/// and a kilobyte of the kernel's memory each.
pub const BYPASS_LARGE: u32 = 32 * 1024;
/// So many small messages may be sent without the agent ever having read all before them.
pub const BYPASS_SMALL_MAX: u32 = 64;
/// [`Bypassed::slot`] of a connection that the agent has not taken yet.
pub const BYPASS_NO_SLOT: u32 = u32::MAX;

/// States of [`Bypassed::phase`].
pub mod phase {
    /// Messages go by TCP until the agent has read all of them.
    pub const WAITING: u32 = 0;
    /// Messages are redirected.
    pub const REDIRECTING: u32 = 1;
    /// Messages go by TCP for good.
    pub const LEFT: u32 = 2;
}

/// What the agent and the programs tell each other of one connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BypassSlot {
    /// Bytes that the agent has read, in whichever way they came.
    pub read: u64,
    /// 1 once the connection goes by TCP for good, and the agent is to take its socket out; then 0 again.
    pub left: u64,
}

/// State kept with an application's socket that has the bypass.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bypassed {
    /// The connection, by which the agent's end is found.
    pub key: FlowKey,
    /// Bytes that went by TCP.
    pub by_tcp: u64,
    /// Bytes that were redirected.
    pub redirected: u64,
    /// TCP's next sequence number when `by_tcp` was last brought up to date.
    pub seq: u32,
    /// Where the agent says how much it has read, or [`BYPASS_NO_SLOT`].
    pub slot: u32,
    /// One of [`phase`].
    pub phase: u32,
    /// Small messages since the agent had last read all; while waiting, all messages.
    pub small: u32,
}

impl Bypassed {
    /// Whether a message of so many bytes may be redirected, and what follows from it for the next one. `seq`: TCP's next
    /// sequence number now; `read`: bytes that the agent has read of this connection, in whichever way they came.
    ///
    /// Whoever redirects the message then adds to [`Bypassed::redirected`]. A redirection that fails afterwards leaves that
    /// too large: then the agent never seems to have read all, the connection leaves, and nothing else is wrong.
    #[inline(always)]
    pub fn may_redirect(&mut self, size: u32, seq: u32, read: u64) -> bool {
        let more = u64::from(seq.wrapping_sub(self.seq));
        self.by_tcp = self.by_tcp.wrapping_add(more);
        self.seq = seq;
        if self.phase == phase::LEFT {
            return false;
        }
        let sent = self.by_tcp.wrapping_add(self.redirected);
        if sent == read {
            self.phase = phase::REDIRECTING;
            self.small = 0;
            return true;
        }
        let waits = self.phase == phase::WAITING;
        if waits || size < BYPASS_LARGE {
            self.small += 1;
        }
        let unread = sent.wrapping_sub(read).saturating_add(u64::from(size));
        if self.small > BYPASS_SMALL_MAX || (!waits && unread > BYPASS_UNREAD_MAX) {
            self.phase = phase::LEFT;
            return false;
        }
        !waits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection whose first byte has the sequence number 100.
    fn new() -> Bypassed {
        Bypassed {
            seq: 100,
            ..Bypassed::default()
        }
    }

    #[test]
    fn it_begins_when_all_has_been_read() {
        // Five bytes stood in the queue already, as with TCP Fast Open.
        let mut flow = new();
        assert!(!flow.may_redirect(5, 105, 0));
        assert!(!flow.may_redirect(5, 110, 5), "as many as it has seen");
        assert!(!flow.may_redirect(BYPASS_LARGE, 115, 14));
        assert!(flow.may_redirect(5, 115, 15));
    }

    #[test]
    fn it_leaves_where_the_agent_never_keeps_up() {
        let mut flow = new();
        for seq in 0..BYPASS_SMALL_MAX {
            assert!(!flow.may_redirect(1, 101 + seq, 0));
            assert_eq!(flow.phase, phase::WAITING);
        }
        assert!(!flow.may_redirect(1, 200, 0));
        assert_eq!(flow.phase, phase::LEFT);
        assert!(!flow.may_redirect(1, 200, 100), "for good");
    }

    #[test]
    fn large_messages_follow_each_other_up_to_the_limit() {
        let mut flow = new();
        for _ in 0..BYPASS_UNREAD_MAX / u64::from(BYPASS_LARGE) {
            assert!(flow.may_redirect(BYPASS_LARGE, 100, 0));
            flow.redirected += u64::from(BYPASS_LARGE);
        }
        assert!(!flow.may_redirect(1, 100, 0));
        assert_eq!(flow.phase, phase::LEFT);
        assert!(!flow.may_redirect(1, 101, BYPASS_UNREAD_MAX + 1));
    }

    #[test]
    fn few_small_messages_may_wait() {
        let mut flow = new();
        for _ in 0..3 {
            // Whoever reads all in between may be sent as many again.
            let read = flow.redirected;
            assert!(flow.may_redirect(9, 100, read));
            flow.redirected += 9;
            for _ in 0..BYPASS_SMALL_MAX {
                assert!(flow.may_redirect(9, 100, read));
                flow.redirected += 9;
            }
        }
        assert!(!flow.may_redirect(9, 100, 1));
        assert_eq!(flow.phase, phase::LEFT);
    }

    #[test]
    fn numbers_wrap() {
        let mut flow = Bypassed {
            seq: u32::MAX - 4,
            ..Bypassed::default()
        };
        assert!(!flow.may_redirect(5, 5, 0));
        assert_eq!(flow.by_tcp, 10);
        assert!(flow.may_redirect(5, 5, 10));
    }
}
