//! All raw access to the hooks' contexts.
//!
//! The verifier allows only loads at constant offsets from the context, of the width it expects. LLVM likes to merge
//! neighbouring loads and stores, or to turn a choice between two fields into one load through a computed pointer;
//! both are refused ("dereference of modified ctx ptr"). Every access here is therefore volatile and one word wide,
//! and fields are read before a choice between them is made.

use core::{arch::asm, mem::offset_of};

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr},
    helpers::{bpf_get_netns_cookie, bpf_getsockopt, bpf_setsockopt, generated::bpf_set_retval},
    programs::SockAddrContext,
};

pub use session_ebpf_common::{id_of, is_local, is_mapped, is_of_one_link};

use session_ebpf_common::NAME_BYTES;

pub use crate::ops::{Words, mapped};
use crate::{
    access::{load, load4},
    maps::HAS_SET_RETVAL,
};

/// Verdict of a connect hook: go on.
pub const ALLOW: i32 = 1;
/// Verdict of a connect hook: fail, with EPERM unless a return value was set.
const DENY: i32 = 0;
const EINTR: i32 = 4;
const ECONNREFUSED: i32 = 111;

const AF_INET: u32 = 2;
const TCP_ESTABLISHED: u32 = 1;
const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE: i32 = 25;
const SOL_TCP: i32 = 6;
const TCP_CONGESTION: i32 = 13;

/// Writes one field of a context.
macro_rules! store {
    ($field:expr, $value:expr) => {
        // SAFETY: as for loads; the verifier also checks that the field may be written by this hook.
        unsafe { core::ptr::write_volatile(&raw mut $field, $value) }
    };
}

/// What the connect and peer-name hooks need of their context.
pub trait SockAddr {
    /// The raw context.
    fn raw(&self) -> *mut bpf_sock_addr;

    /// The socket that the call is made on.
    #[inline(always)]
    fn sock(&self) -> *mut bpf_sock {
        const _: () = assert!(offset_of!(bpf_sock_addr, __bindgen_anon_1) == 64);
        let sk: *mut bpf_sock;
        // SAFETY: the context is valid while the program runs, and the socket's pointer is at this offset of it, which is
        // asserted above. By hand, because in a large program LLVM computes the field's address once for several loads.
        unsafe {
            asm!("{sk} = *(u64 *)({ctx} + 64)", sk = out(reg) sk, ctx = in(reg) self.raw(), options(pure, readonly, nostack));
        }
        sk
    }

    /// The socket's protocol, `IPPROTO_*`.
    #[inline(always)]
    fn protocol(&self) -> u32 {
        load!((*self.raw()).protocol)
    }

    /// The address of an IPv4 hook, as v4-mapped.
    #[inline(always)]
    fn addr4(&self) -> Words {
        mapped(load!((*self.raw()).user_ip4))
    }

    /// The address of an IPv6 hook.
    #[inline(always)]
    fn addr6(&self) -> Words {
        load4!((*self.raw()).user_ip6)
    }

    /// The port, host order.
    #[inline(always)]
    fn port(&self) -> u16 {
        u16::from_be(load!((*self.raw()).user_port) as u16)
    }

    /// Sets the address of an IPv4 hook from the last word of `addr`.
    #[inline(always)]
    fn set_addr4(&self, addr: &Words) {
        store!((*self.raw()).user_ip4, addr[3]);
    }

    /// Sets the address of an IPv6 hook.
    #[inline(always)]
    fn set_addr6(&self, addr: &Words) {
        store!((*self.raw()).user_ip6[0], addr[0]);
        store!((*self.raw()).user_ip6[1], addr[1]);
        store!((*self.raw()).user_ip6[2], addr[2]);
        store!((*self.raw()).user_ip6[3], addr[3]);
    }

    /// Sets the port, given in host order.
    #[inline(always)]
    fn set_port(&self, port: u16) {
        store!((*self.raw()).user_port, u32::from(port.to_be()));
    }

    /// Frees the socket from the device that it is bound to, if any; false when the kernel refuses.
    ///
    /// A redirected connection never leaves loopback, so a bound device would only make it time out.
    #[inline(always)]
    fn unbind_device(&self) -> bool {
        let sk = self.sock();
        if sk.is_null() || load!((*sk).bound_dev_if) == 0 {
            return true;
        }
        let mut none = [0_u8; 4];
        // SAFETY: the buffer outlives the call and its length is given.
        unsafe {
            bpf_setsockopt(
                self.raw().cast(),
                SOL_SOCKET,
                SO_BINDTODEVICE,
                none.as_mut_ptr().cast(),
                4,
            ) == 0
        }
    }

    /// Index of the device that the socket is bound to; 0 for none.
    #[inline(always)]
    fn device(&self) -> u32 {
        let sk = self.sock();
        if sk.is_null() {
            return 0;
        }
        load!((*sk).bound_dev_if)
    }

    /// The socket's own port, host order; 0 while it has none.
    #[inline(always)]
    fn local_port(&self) -> u16 {
        let sk = self.sock();
        if sk.is_null() {
            return 0;
        }
        load!((*sk).src_port) as u16
    }

    /// The address that an IPv6 socket is bound to; zeros for none.
    #[inline(always)]
    fn source6(&self) -> Words {
        let sk = self.sock();
        if sk.is_null() {
            return [0; 4];
        }
        load4!((*sk).src_ip6)
    }

    /// Lets the kernel choose the source address of the datagram of an IPv4 hook.
    #[inline(always)]
    fn free_source4(&self) {
        store!((*self.raw()).msg_src_ip4, 0);
    }

    /// Lets the kernel choose the source address of the datagram of an IPv6 hook.
    #[inline(always)]
    fn free_source6(&self) {
        store!((*self.raw()).msg_src_ip6[0], 0);
        store!((*self.raw()).msg_src_ip6[1], 0);
        store!((*self.raw()).msg_src_ip6[2], 0);
        store!((*self.raw()).msg_src_ip6[3], 0);
    }

    /// Cookie of the socket's network namespace.
    #[inline(always)]
    fn netns_cookie(&self) -> u64 {
        // SAFETY: the context is valid while the program runs.
        unsafe { bpf_get_netns_cookie(self.raw().cast()) }
    }

    /// Whether the socket's own address is a loopback one.
    #[inline(always)]
    fn source_is_loopback(&self) -> bool {
        let sk = self.sock();
        if sk.is_null() {
            return false;
        }
        // An IPv6 socket's IPv4 address says nothing: the kernel writes 127.0.0.6 there.
        let (family, v4) = (load!((*sk).family), load!((*sk).src_ip4));
        let v6 = load4!((*sk).src_ip6);
        let addr = if family == AF_INET { mapped(v4) } else { v6 };
        is_local(&addr) && addr[3] != 0
    }

    /// Whether the socket is connected; UDP sockets have TCP's state for it.
    #[inline(always)]
    fn is_connected(&self) -> bool {
        let sk = self.sock();
        !sk.is_null() && load!((*sk).state) == TCP_ESTABLISHED
    }

    /// Name of the socket's congestion control; empty where the kernel does not tell.
    #[inline(always)]
    fn congestion(&self) -> [u8; NAME_BYTES] {
        let mut name = [0_u8; NAME_BYTES];
        // SAFETY: the buffer outlives the call and its length is given; on an error the kernel fills it with zeros.
        unsafe {
            bpf_getsockopt(
                self.raw().cast(),
                SOL_TCP,
                TCP_CONGESTION,
                name.as_mut_ptr().cast(),
                NAME_BYTES as i32,
            )
        };
        name
    }

    /// Puts the socket on cubic; false when the kernel refuses. bbr would pace the loopback hop to half its speed.
    #[inline(always)]
    fn set_cubic(&self) -> bool {
        let mut name = *b"cubic\0\0\0";
        // SAFETY: the buffer outlives the call and its length is given.
        unsafe {
            bpf_setsockopt(
                self.raw().cast(),
                SOL_TCP,
                TCP_CONGESTION,
                name.as_mut_ptr().cast(),
                5,
            ) == 0
        }
    }
}

impl SockAddr for SockAddrContext {
    #[inline(always)]
    fn raw(&self) -> *mut bpf_sock_addr {
        self.sock_addr
    }
}

/// Makes the system call fail with ECONNREFUSED (EPERM on kernels before 5.18).
#[inline(always)]
pub fn refuse() -> i32 {
    fail(ECONNREFUSED)
}

/// Makes the system call fail with EINTR: its caller makes it again (EPERM on kernels before 5.18).
#[inline(always)]
pub fn interrupt() -> i32 {
    fail(EINTR)
}

#[inline(always)]
fn fail(errno: i32) -> i32 {
    if HAS_SET_RETVAL.load() != 0 {
        // SAFETY: sets the system call's return value; has no other effect.
        unsafe { bpf_set_retval(-errno) };
    }
    DENY
}
