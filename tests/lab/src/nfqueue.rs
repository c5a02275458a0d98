//! NFQUEUE: packets of a namespace wait in the kernel until this process gives its verdict.
//!
//! Only the first bytes of each are copied here. Spoken directly, because the libraries for it
//! either hide their socket, so that no timer can be waited for beside it, or bind a C library.
//! The layouts are those of include/uapi/linux/netfilter/nfnetlink_queue.h.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto,
    setsockopt, socket, sockopt,
};

const SUBSYSTEM: u16 = 3 << 8;
const PACKET: u16 = SUBSYSTEM;
const VERDICT: u16 = SUBSYSTEM | 1;
const CONFIG: u16 = SUBSYSTEM | 2;
const CONFIG_COMMAND: u16 = 1;
const CONFIG_PARAMETERS: u16 = 2;
const CONFIG_MAXIMUM: u16 = 3;
const COMMAND_BIND: u8 = 1;
const COPY_PACKET: u8 = 2;
const ATTRIBUTE_HEADER: u16 = 1;
const ATTRIBUTE_VERDICT: u16 = 2;
const ATTRIBUTE_PAYLOAD: u16 = 10;
const ATTRIBUTE_LENGTH: u16 = 13;
/// `NF_DROP` and `NF_ACCEPT` of include/uapi/linux/netfilter.h.
const DROP: u32 = 0;
const ACCEPT: u32 = 1;

/// Bytes of each packet that are copied: enough to learn its length.
const COPIED_BYTES: u32 = 64;
/// Packets that may wait in the kernel.
const WAITING_MAX: u32 = 1 << 14;
/// Room for notices of packets.
const SOCKET_BYTES: usize = 8 << 20;

/// A packet that waits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiting {
    /// Its queue.
    pub queue: u16,
    id: u32,
    /// Its length from the IP header on, in bytes.
    pub bytes: usize,
}

/// Some queues of the namespace that it was made in.
pub(crate) struct Queues {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl Queues {
    /// Takes over the queues with these numbers, in the calling thread's namespace.
    pub fn open(numbers: &[u16]) -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkNetFilter,
        )?;
        setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BYTES)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        let this = Self {
            socket,
            buffer: vec![0; 64 * 1024],
        };
        for &number in numbers {
            let mut parameters = COPIED_BYTES.to_be_bytes().to_vec();
            parameters.push(COPY_PACKET);
            this.send(
                CONFIG,
                number,
                &[(CONFIG_COMMAND, &[COMMAND_BIND, 0, 0, 0])],
            )?;
            this.send(
                CONFIG,
                number,
                &[
                    (CONFIG_PARAMETERS, &parameters),
                    (CONFIG_MAXIMUM, &WAITING_MAX.to_be_bytes()),
                ],
            )?;
        }
        Ok(this)
    }

    fn send(&self, kind: u16, queue: u16, attributes: &[(u16, &[u8])]) -> io::Result<()> {
        let mut message = vec![0; 16];
        // nfgenmsg: family and version are zero.
        message.extend_from_slice(&[0, 0]);
        message.extend_from_slice(&queue.to_be_bytes());
        for (number, value) in attributes {
            let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
            message.extend_from_slice(&length.to_ne_bytes());
            message.extend_from_slice(&number.to_ne_bytes());
            message.extend_from_slice(value);
            message.resize(message.len().next_multiple_of(4), 0);
        }
        let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
        message[..4].copy_from_slice(&length.to_ne_bytes());
        message[4..6].copy_from_slice(&kind.to_ne_bytes());
        message[6..8].copy_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
        let kernel = NetlinkAddr::new(0, 0);
        sendto(
            self.socket.as_raw_fd(),
            &message,
            &kernel,
            MsgFlags::empty(),
        )?;
        Ok(())
    }

    /// Gives each packet that has come to `each`; returns when there are no more.
    pub fn receive(&mut self, mut each: impl FnMut(Waiting)) -> io::Result<()> {
        loop {
            let fd = self.socket.as_raw_fd();
            let n = match recv(fd, &mut self.buffer, MsgFlags::empty()) {
                Ok(n) => n,
                Err(nix::Error::EAGAIN) => return Ok(()),
                // Notices were lost; the packets of those are dropped by the kernel.
                Err(nix::Error::ENOBUFS | nix::Error::EINTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let mut rest = &self.buffer[..n];
            while let Some(length) = u32_at(rest, 0) {
                let length = length as usize;
                let Some(message) = rest.get(..length).filter(|m| m.len() >= 20) else {
                    break;
                };
                if let Some(waiting) = parse(message) {
                    each(waiting);
                }
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }

    /// Lets a packet go on, or drops it.
    pub fn decide(&self, packet: Waiting, accept: bool) -> io::Result<()> {
        let mut verdict = [0; 8];
        let code = if accept { ACCEPT } else { DROP };
        verdict[..4].copy_from_slice(&code.to_be_bytes());
        verdict[4..].copy_from_slice(&packet.id.to_be_bytes());
        self.send(VERDICT, packet.queue, &[(ATTRIBUTE_VERDICT, &verdict)])
    }
}

impl AsFd for Queues {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Flushes the connection tracking of the calling thread's namespace, and with it every NAT mapping
/// (include/uapi/linux/netfilter/nfnetlink_conntrack.h).
pub(crate) fn forget_connections() -> io::Result<()> {
    const DELETE: u16 = 1 << 8 | 2;
    Queues::open(&[])?.send(DELETE, 0, &[])
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// A packet's notice; `None` for anything else, such as an error without a request of ours.
fn parse(message: &[u8]) -> Option<Waiting> {
    if u16_at(message, 4)? != PACKET {
        return None;
    }
    let queue = u16::from_be(u16_at(message, 18)?);
    let (mut id, mut copied, mut whole) = (None, 0, None);
    let mut rest = &message[20..];
    while let (Some(length), Some(number)) = (u16_at(rest, 0), u16_at(rest, 2)) {
        let length = usize::from(length);
        let value = rest.get(4..length)?;
        // The upper bits are flags.
        match number & 0x3fff {
            ATTRIBUTE_HEADER => id = u32_at(value, 0).map(u32::from_be),
            ATTRIBUTE_PAYLOAD => copied = value.len(),
            ATTRIBUTE_LENGTH => whole = u32_at(value, 0).map(u32::from_be),
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(Waiting {
        queue,
        id: id?,
        bytes: whole.map_or(copied, |w| w as usize),
    })
}
