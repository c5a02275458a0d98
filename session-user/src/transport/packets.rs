//! Sockets of the UDP transport: many packets in one system call, and none of them fragmented on its way.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use quinn_udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// Largest read: what the kernel joins at most (GRO), in bytes.
const READ_BYTES: usize = 64 * 1024;
/// Reads of one system call.
const READS: usize = 4;
/// Largest write, in bytes: what the kernel takes apart at most (GSO), under the limit of UDP over IPv4.
pub const WRITE_BYTES_MAX: usize = 64_000;

/// A UDP socket for packets of sessions.
#[derive(Debug)]
pub struct PacketSocket {
    socket: UdpSocket,
    state: UdpSocketState,
    local: SocketAddr,
    /// quinn-udp has such a limit too, and ends it for good with the first EINVAL, whatever that is of: a peer's port 0,
    /// an address of ours that has gone.
    segments: AtomicUsize,
}

/// Where packets are received. Kept, so that it allocates once.
pub struct ReceiveRoom {
    bytes: Box<[u8]>,
    metas: [RecvMeta; READS],
}

/// Packets that came together, from one address to one other.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Their sender.
    pub from: SocketAddr,
    /// Which of our addresses they were sent to.
    pub to: Option<IpAddr>,
    /// All of them.
    pub bytes: &'a [u8],
    /// Bytes of each; the last may have fewer.
    pub stride: usize,
}

impl Default for ReceiveRoom {
    fn default() -> Self {
        Self {
            bytes: vec![0; READ_BYTES * READS].into(),
            metas: [RecvMeta::default(); READS],
        }
    }
}

impl ReceiveRoom {
    /// What the latest [`PacketSocket::try_recv`] brought; `count` is what it returned.
    pub fn batches(&self, count: usize) -> impl Iterator<Item = Batch<'_>> {
        let rooms = self.bytes.chunks(READ_BYTES);
        rooms
            .zip(&self.metas)
            .take(count)
            .map(|(room, meta)| Batch {
                from: meta.addr,
                to: meta.dst_ip,
                bytes: &room[..meta.len],
                stride: meta.stride.max(1),
            })
    }
}

impl<'a> Batch<'a> {
    /// Each packet.
    pub fn packets(&self) -> impl Iterator<Item = &'a [u8]> {
        self.bytes.chunks(self.stride)
    }
}

impl PacketSocket {
    /// A socket that uses only routes over `device`, bound to its address `source` and a port of the kernel's choice.
    pub fn on_link(device: &str, source: IpAddr) -> io::Result<Self> {
        let addr = SocketAddr::new(source, 0);
        let socket = open(addr)?;
        socket.bind_device(Some(device.as_bytes()))?;
        socket.bind(&addr.into())?;
        Self::new(socket)
    }

    /// A socket at an address that others know. An IPv6 address takes IPv6 only, as [`super::listen`] does.
    pub fn listen(addr: SocketAddr) -> io::Result<Self> {
        let socket = open(addr)?;
        if addr.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        // Many sessions share it.
        super::open_window(&socket);
        socket.bind(&addr.into())?;
        Self::new(socket)
    }

    fn new(socket: Socket) -> io::Result<Self> {
        let socket = UdpSocket::from_std(socket.into())?;
        // Also sets IP_PMTUDISC_PROBE, asks for destination addresses and turns GRO on.
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        let local = socket.local_addr()?;
        Ok(Self {
            socket,
            segments: AtomicUsize::new(state.max_gso_segments()),
            state,
            local,
        })
    }

    /// The same for datagrams of applications, which may be larger than a packet.
    pub fn fragmenting(self) -> io::Result<Self> {
        super::info::let_fragment(&self.socket, self.local.is_ipv6())?;
        Ok(self)
    }

    /// Where it is bound.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Packets that one write may have.
    pub fn segments_max(&self) -> usize {
        self.segments.load(Ordering::Relaxed)
    }

    /// Writes have one packet each from now on: a write of several failed with `error`, and each of them went by itself.
    /// Does nothing if such an error does not speak of segmentation (udp(7): EINVAL; EIO of devices that cannot).
    pub fn refuses_several(&self, error: &io::Error) {
        if let Some(libc::EIO | libc::EINVAL) = error.raw_os_error()
            && self.segments.swap(1, Ordering::Relaxed) > 1
        {
            tracing::info!(at = %self.local, %error, "packets go out one by one from now on: there is no segmentation offload");
        }
    }

    /// Sends `bytes` to `to`, from our address `from` if there is a choice; `segment`: they are several packets of so
    /// many bytes each, but for the last, which may have fewer. An error is `WouldBlock`, or of all packets.
    pub fn try_send(
        &self,
        to: SocketAddr,
        from: Option<IpAddr>,
        bytes: &[u8],
        segment: Option<usize>,
    ) -> io::Result<()> {
        let transmit = Transmit {
            destination: to,
            ecn: None,
            contents: bytes,
            segment_size: segment,
            src_ip: from,
        };
        let send = || {
            let socket = UdpSockRef::from(&self.socket);
            self.state.try_send(socket, &transmit)
        };
        match send() {
            // Again as tokio wants it, which does not know a new socket's readiness: so it tells when to go on.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.socket.try_io(Interest::WRITABLE, send)
            }
            done => done,
        }
    }

    /// Receives what is there; returns how many batches of packets that is. An error may be `WouldBlock`.
    pub fn try_recv(&self, room: &mut ReceiveRoom) -> io::Result<usize> {
        let mut rooms = room.bytes.chunks_mut(READ_BYTES);
        let mut slices: [IoSliceMut<'_>; READS] =
            std::array::from_fn(|_| IoSliceMut::new(rooms.next().unwrap_or_default()));
        self.socket.try_io(Interest::READABLE, || {
            self.state
                .recv(UdpSockRef::from(&self.socket), &mut slices, &mut room.metas)
        })
    }

    /// Receives as soon as something is there. Cancel-safe.
    pub async fn recv(&self, room: &mut ReceiveRoom) -> io::Result<usize> {
        loop {
            self.socket.readable().await?;
            match self.try_recv(room) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
        }
    }

    /// Whether something may be there. Only the latest context is told.
    pub fn poll_recv_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.poll_recv_ready(cx)
    }

    /// Whether something may be sent. Only the latest context is told.
    pub fn poll_send_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.poll_send_ready(cx)
    }
}

fn open(addr: SocketAddr) -> io::Result<Socket> {
    let domain = Domain::for_address(addr);
    Socket::new(domain, Type::DGRAM.nonblocking(), Some(Protocol::UDP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn many_packets_go_in_one_write_and_come_as_they_were() {
        let far = PacketSocket::listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let near = PacketSocket::on_link("lo", "127.0.0.1".parse().unwrap()).unwrap();
        let packets: Vec<Vec<u8>> = (0..10)
            .map(|n| vec![n; if n < 9 { 1200 } else { 7 }])
            .collect();
        let all = packets.concat();
        near.try_send(far.local_addr(), None, &all, Some(1200))
            .unwrap();
        let mut room = ReceiveRoom::default();
        let mut got: Vec<Vec<u8>> = Vec::new();
        while got.len() < packets.len() {
            let count = far.recv(&mut room).await.unwrap();
            for batch in room.batches(count) {
                assert_eq!(
                    (batch.from, batch.to),
                    (near.local_addr(), Some([127, 0, 0, 1].into()))
                );
                got.extend(batch.packets().map(<[u8]>::to_vec));
            }
        }
        assert_eq!(got, packets);
        assert_eq!(
            far.try_recv(&mut room).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
    }

    #[tokio::test]
    async fn an_answer_leaves_from_the_address_that_was_asked() {
        let far = PacketSocket::listen("0.0.0.0:0".parse().unwrap()).unwrap();
        let near = PacketSocket::listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let asked: IpAddr = [127, 0, 0, 7].into();
        let to = SocketAddr::new(asked, far.local_addr().port());
        near.try_send(to, None, b"who are you?", None).unwrap();
        let mut room = ReceiveRoom::default();
        far.recv(&mut room).await.unwrap();
        let question = room.batches(1).next().unwrap();
        far.try_send(question.from, question.to, b"the same", None)
            .unwrap();
        near.recv(&mut room).await.unwrap();
        let answer = room.batches(1).next().unwrap();
        assert_eq!((answer.from, answer.bytes), (to, &b"the same"[..]));
    }

    #[tokio::test]
    async fn what_cannot_be_sent_at_all_does_not_end_segmentation() {
        let far = PacketSocket::listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let near = PacketSocket::listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let most = near.segments_max();
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let error = near.try_send(nowhere, None, b"?", None).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        assert_eq!(near.segments_max(), most);
        near.try_send(far.local_addr(), None, &[0; 3000], Some(1000))
            .unwrap();
        near.refuses_several(&io::Error::from_raw_os_error(libc::EMSGSIZE));
        assert_eq!(near.segments_max(), most);
        near.refuses_several(&error);
        assert_eq!(near.segments_max(), 1);
    }

    #[tokio::test]
    async fn what_is_larger_than_the_link_is_told() {
        let near = PacketSocket::on_link("lo", "127.0.0.1".parse().unwrap()).unwrap();
        let to = "127.0.0.1:9".parse().unwrap();
        let error = near.try_send(to, None, &vec![0; 65_600], None).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
    }
}
