//! The netlink socket: opened, subscribed, read. No decoding here.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, getsockname,
    recvmsg, sendto, setsockopt, socket, sockopt,
};

use super::message::{Ask, GROUPS};

/// The kernel sends dumps in datagrams of at most 32 KiB (`netlink_dump` in af_netlink.c); one
/// notification is far smaller.
pub(super) const DATAGRAM_MAX: usize = 64 * 1024;

/// What a read found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Read {
    /// A datagram of this many bytes from the kernel.
    Datagram(usize),
    /// The queue is empty.
    Empty,
    /// The kernel dropped notifications because the queue was full.
    Overrun,
    /// A datagram that is of no use: cut off, or not from the kernel.
    Unusable,
}

/// A routing socket in the network namespace of the thread that opened it. Notifications and
/// dumps share its queue, so that they are read in the order in which the kernel made them and an
/// old dump can never hide a newer loss.
#[derive(Debug)]
pub(super) struct RouteSocket {
    fd: OwnedFd,
    port: u32,
}

impl RouteSocket {
    /// Opens and subscribes. `receive_buffer` is in bytes; above `net.core.rmem_max` it takes
    /// CAP_NET_ADMIN, without which the kernel's limit stands.
    pub(super) fn open(receive_buffer: usize) -> Result<RouteSocket, Errno> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkRoute,
        )?;
        if setsockopt(&fd, sockopt::RcvBufForce, &receive_buffer).is_err() {
            setsockopt(&fd, sockopt::RcvBuf, &receive_buffer)?;
        }
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
        let port = getsockname::<NetlinkAddr>(fd.as_raw_fd())?.pid();
        Ok(RouteSocket { fd, port })
    }

    /// The port id by which answers to this socket are known.
    pub(super) fn port(&self) -> u32 {
        self.port
    }

    /// Asks for a dump. The kernel runs one at a time on a socket (EBUSY otherwise). A refusal is
    /// an answer like any other, and while the queue is full the kernel drops it.
    pub(super) fn ask(&self, what: Ask, seq: u32) -> Result<(), Errno> {
        let kernel = NetlinkAddr::new(0, 0);
        let request = what.request(seq);
        sendto(self.fd.as_raw_fd(), &request, &kernel, MsgFlags::empty()).map(|_| ())
    }

    /// Reads one datagram without waiting.
    pub(super) fn read(&self, buffer: &mut [u8]) -> Result<Read, Errno> {
        let mut slices = [IoSliceMut::new(buffer)];
        let got = recvmsg::<NetlinkAddr>(self.fd.as_raw_fd(), &mut slices, None, MsgFlags::empty());
        match got {
            // Any process may send to this port; only the kernel's port is 0.
            Ok(m) if m.address.is_none_or(|from| from.pid() != 0) => Ok(Read::Unusable),
            Ok(m) if m.flags.contains(MsgFlags::MSG_TRUNC) => Ok(Read::Unusable),
            Ok(m) => Ok(Read::Datagram(m.bytes)),
            Err(Errno::EAGAIN) => Ok(Read::Empty),
            Err(Errno::ENOBUFS) => Ok(Read::Overrun),
            Err(Errno::EINTR) => self.read(buffer),
            Err(errno) => Err(errno),
        }
    }
}

impl AsFd for RouteSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
