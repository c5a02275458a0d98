//! Reading captured datagrams, many in one call.
//!
//! As quinn-udp reads, but with the whole Type of Service octet of each, of which it tells two bits only.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd as _;

use nix::cmsg_space;
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, MultiHeaders, RecvMsg, SockaddrStorage, recvmmsg,
};
use quinn_udp::BATCH_SIZE;
use session_proto::wire::Dscp;
use tokio::net::UdpSocket;

/// The largest datagram, and the most that the kernel joins into one (`UDP_GRO`).
const BUFFER: usize = 65_535;
/// Room for the control messages of a datagram, in bytes: both ends' addresses, the octet, the size of joined ones, and
/// the time, which quinn-udp asks for (cmsg(3)).
const CONTROL: usize = 192;

/// What is known of a datagram, or of several of one size that came joined.
#[derive(Clone, Copy, Debug)]
pub struct Meta {
    /// The application's address and port.
    pub from: SocketAddr,
    /// The address that it was sent to.
    pub to: Option<IpAddr>,
    /// Index of the device that it came by.
    pub interface: Option<u32>,
    /// What it asks of the networks.
    pub dscp: Dscp,
    /// Bytes of all of them, and of each but the last.
    len: usize,
    stride: usize,
}

/// Buffers of one reading.
pub struct Batch {
    bytes: Vec<u8>,
    metas: Vec<Option<Meta>>,
}

impl Default for Batch {
    fn default() -> Self {
        Self {
            // Zeroed by the kernel: what is never filled takes no memory.
            bytes: vec![0; BATCH_SIZE * BUFFER],
            metas: Vec::with_capacity(BATCH_SIZE),
        }
    }
}

impl Batch {
    /// Reads what `socket` has, up to all buffers, without waiting. What was in them is gone.
    pub fn fill(&mut self, socket: &UdpSocket) -> io::Result<()> {
        self.metas.clear();
        let buffers = self.bytes.chunks_exact_mut(BUFFER);
        let mut slices: Vec<_> = buffers.map(|buffer| [IoSliceMut::new(buffer)]).collect();
        // Made anew, for a call leaves in them how much room it has used.
        let control = cmsg_space!([u8; CONTROL]);
        let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(BATCH_SIZE, Some(control));
        let (fd, flags) = (socket.as_raw_fd(), MsgFlags::empty());
        let messages = recvmmsg(fd, &mut headers, slices.iter_mut(), flags, None)?;
        self.metas.extend(messages.map(|message| meta(&message)));
        Ok(())
    }

    /// The datagrams that came, each by itself.
    pub fn datagrams(&self) -> impl Iterator<Item = (&Meta, &[u8])> {
        let buffers = self.bytes.chunks_exact(BUFFER).zip(&self.metas);
        let known = buffers.filter_map(|(buffer, meta)| Some((buffer, meta.as_ref()?)));
        known.flat_map(|(buffer, meta)| {
            let data = &buffer[..meta.len.min(BUFFER)];
            let stride = meta.stride.max(1);
            // An empty datagram is one.
            let count = data.len().div_ceil(stride).max(1);
            (0..count).map(move |index| {
                let end = ((index + 1) * stride).min(data.len());
                (meta, &data[(index * stride).min(end)..end])
            })
        })
    }
}

/// None for a message without a source, which is none of an application's.
fn meta(message: &RecvMsg<'_, '_, SockaddrStorage>) -> Option<Meta> {
    let mut meta = Meta {
        from: socket_addr(message.address.as_ref()?)?,
        to: None,
        interface: None,
        dscp: Dscp::default(),
        len: message.bytes,
        stride: message.bytes,
    };
    for part in message.cmsgs().ok()? {
        match part {
            ControlMessageOwned::Ipv4PacketInfo(info) => {
                meta.to = Some(Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes()).into());
                meta.interface = u32::try_from(info.ipi_ifindex).ok();
            }
            ControlMessageOwned::Ipv6PacketInfo(info) => {
                meta.to = Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).into());
                meta.interface = Some(info.ipi6_ifindex);
            }
            ControlMessageOwned::Ipv4Tos(tos) => meta.dscp = Dscp::of_tos(tos),
            // Only eight bits of it are used (RFC 3542, section 6.5).
            ControlMessageOwned::Ipv6TClass(class) => meta.dscp = Dscp::of_tos(class as u8),
            ControlMessageOwned::UdpGroSegments(size) => {
                meta.stride = usize::try_from(size).unwrap_or(meta.len);
            }
            _ => {}
        }
    }
    Some(meta)
}

fn socket_addr(addr: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = addr.as_sockaddr_in().map(|a| SocketAddr::from(*a));
    v4.or_else(|| addr.as_sockaddr_in6().map(|a| SocketAddr::from(*a)))
}
