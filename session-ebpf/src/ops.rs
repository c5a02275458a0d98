//! What every program on socket operations reads of its context.

use aya_ebpf::{EbpfContext as _, bindings::bpf_sock_ops, programs::SockOpsContext};

use session_ebpf_common::MAPPED;
pub use session_ebpf_common::Words;

use crate::access::{load, load4};

/// Writes an IPv4 address (network order) as v4-mapped.
#[inline(always)]
pub fn mapped(v4: u32) -> Words {
    [0, 0, MAPPED, v4]
}

/// What the socket operations need of their context.
pub trait SockOps {
    /// The raw context.
    fn raw(&self) -> *mut bpf_sock_ops;

    /// Local port of the socket, host order.
    #[inline(always)]
    fn local_port(&self) -> u32 {
        load!((*self.raw()).local_port)
    }

    /// Remote port of the socket, host order.
    #[inline(always)]
    fn remote_port(&self) -> u32 {
        u32::from_be(load!((*self.raw()).remote_port))
    }

    /// Local address of the socket.
    #[inline(always)]
    fn local_addr(&self) -> Words {
        let (v4, v6) = (
            load!((*self.raw()).local_ip4),
            load4!((*self.raw()).local_ip6),
        );
        if self.is_v4() { mapped(v4) } else { v6 }
    }

    /// Remote address of the socket.
    #[inline(always)]
    fn remote_addr(&self) -> Words {
        let (v4, v6) = (
            load!((*self.raw()).remote_ip4),
            load4!((*self.raw()).remote_ip6),
        );
        if self.is_v4() { mapped(v4) } else { v6 }
    }

    /// Whether the socket is AF_INET.
    #[inline(always)]
    fn is_v4(&self) -> bool {
        load!((*self.raw()).family) == 2
    }
}

impl SockOps for SockOpsContext {
    #[inline(always)]
    fn raw(&self) -> *mut bpf_sock_ops {
        self.as_ptr().cast()
    }
}
