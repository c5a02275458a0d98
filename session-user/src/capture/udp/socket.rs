//! The sockets on loopback to which captured datagrams go.

use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::task::{Context, Poll};

use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg, setsockopt, sockopt};
use nix::{setsockopt_impl, sockopt_impl};
use quinn_udp::{Transmit, UdpSockRef, UdpSocketState};
use ring::rand::{SecureRandom as _, SystemRandom};
use session_ebpf_common::{Ports, id_of};
use session_proto::wire::Dscp;
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::super::CaptureError;
use super::super::gate::words;
use super::super::injector::Injector;
use super::batch::{Batch, Meta};
use super::unreachable::{Unreachable, packet};

/// Room for bursts on the way to the agent and back, in bytes as the kernel counts them.
const BUFFER_BYTES: usize = 8 << 20;
/// The same in each of the other network namespaces, of which there may be many.
const BUFFER_BYTES_ELSEWHERE: usize = 2 << 20;
sockopt_impl!(
    /// `IPV6_MTU_DISCOVER` (ipv6(7)).
    Ipv6MtuDiscover,
    SetOnly,
    libc::IPPROTO_IPV6,
    libc::IPV6_MTU_DISCOVER,
    libc::c_int
);
sockopt_impl!(
    /// `IPV6_DONTFRAG` (RFC 3542, section 11.2).
    Ipv6DontFrag,
    SetOnly,
    libc::IPPROTO_IPV6,
    libc::IPV6_DONTFRAG,
    libc::c_int
);

/// Index of the loopback device (`LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;

/// What marks the datagrams of captured applications: drawn anew by each agent. Whoever has learned it, and may set marks in
/// a network namespace (`SO_MARK` of socket(7)), is taken there for a captured application.
#[derive(Clone, Copy, Debug)]
pub struct Mark(pub u32);

impl Mark {
    /// A new one.
    pub fn draw() -> Result<Self, CaptureError> {
        let mut bytes = [0; 4];
        let drawn = SystemRandom::new().fill(&mut bytes);
        drawn.map_err(|_| CaptureError::Runtime {
            what: "draw the mark of captured datagrams",
            source: io::Error::other("there is no randomness"),
        })?;
        // 0 is what every other packet has.
        Ok(Self(u32::from_ne_bytes(bytes) | 1))
    }

    /// Classic BPF that passes what has the mark and drops the rest: Linux, `SKF_AD_MARK` of linux/filter.h.
    fn filter(self) -> [SockFilter; 4] {
        let code = |parts: [u32; 3]| (parts[0] | parts[1] | parts[2]) as u16;
        let load = code([libc::BPF_LD, libc::BPF_W, libc::BPF_ABS]);
        let same = code([libc::BPF_JMP, libc::BPF_JEQ, libc::BPF_K]);
        let verdict = code([libc::BPF_RET, libc::BPF_K, 0]);
        let mark_at = (libc::SKF_AD_OFF + libc::SKF_AD_MARK) as u32;
        [
            SockFilter::new(load, 0, 0, mark_at),
            SockFilter::new(same, 0, 1, self.0),
            SockFilter::new(verdict, 0, 0, u32::MAX),
            SockFilter::new(verdict, 0, 0, 0),
        ]
    }
}

/// Both sockets of one network namespace, which no runtime drives yet.
#[derive(Debug)]
pub struct Sockets {
    v4: Socket,
    v6: Option<Socket>,
    injector: Option<Arc<Injector>>,
}

impl Sockets {
    /// Opens them in the network namespace that this thread is in: at the ports that are usual elsewhere, where they are
    /// given and free, and otherwise at ports that the kernel chooses. `own`: whether it is the agent's own. Without the
    /// means to inject packets (CAP_NET_RAW) applications are not told of destinations that are not to be reached.
    pub fn open(
        mark: Mark,
        own: bool,
        usual: &Ports,
        injector: Option<Arc<Injector>>,
    ) -> Result<Self, CaptureError> {
        let v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, usual.udp4));
        let v6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, usual.udp6));
        let room = if own {
            BUFFER_BYTES
        } else {
            BUFFER_BYTES_ELSEWHERE
        };
        let open = |addr| open_near(addr, mark, room);
        let failed = |addr| move |source| CaptureError::Listener { addr, source };
        Ok(Self {
            v4: open(v4).map_err(failed(v4))?,
            v6: match open(v6) {
                Ok(socket) => Some(socket),
                Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => None,
                Err(error) => return Err(failed(v6)(error)),
            },
            injector,
        })
    }

    /// Ports for IPv4 and IPv6; 0 where there is no socket.
    pub fn ports(&self) -> (u16, u16) {
        let port = |socket: &Socket| {
            let bound = socket.local_addr().ok().and_then(|addr| addr.as_socket());
            bound.map_or(0, |addr| addr.port())
        };
        (port(&self.v4), self.v6.as_ref().map_or(0, port))
    }

    /// Has the current runtime drive them. `netns`: the cookie of their network namespace.
    pub fn register(self, netns: u64) -> io::Result<Vec<Arc<Door>>> {
        let injector = self.injector;
        let doors = std::iter::once(self.v4).chain(self.v6);
        let doors = doors.map(|socket| Door::over(socket, netns, injector.clone()).map(Arc::new));
        doors.collect()
    }
}

#[cfg(test)]
impl Sockets {
    /// Puts a file in the place of a socket: no runtime drives that, for epoll(7) refuses it.
    pub fn spoil(&mut self) {
        use std::os::{fd::OwnedFd, unix::fs::OpenOptionsExt as _};
        let mut file = std::fs::OpenOptions::new();
        let file = file.read(true).custom_flags(libc::O_NONBLOCK);
        let file = file.open("/dev/null").expect("a file");
        self.v4 = OwnedFd::from(file).into();
    }
}

/// A socket at the port of `addr`, or where that is taken, at one that the kernel chooses.
fn open_near(mut addr: SocketAddr, mark: Mark, room: usize) -> io::Result<Socket> {
    match open(addr, mark, room) {
        Err(error) if addr.port() != 0 && error.kind() == io::ErrorKind::AddrInUse => {
            addr.set_port(0);
            open(addr, mark, room)
        }
        other => other,
    }
}

fn open(addr: SocketAddr, mark: Mark, room: usize) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(addr),
        Type::DGRAM.cloexec().nonblocking(),
        Some(Protocol::UDP),
    )?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
        // To answer from addresses that are no interface's. Not bound to loopback, or it could not answer those who
        // have a source address of another device; the filter and [`arrival`] keep strangers out.
        socket.set_freebind_v6(true)?;
    } else {
        socket.bind_device(Some(b"lo"))?;
    }
    socket.attach_filter(&mark.filter())?;
    enlarge(&socket, room);
    socket.bind(&addr.into())?;
    Ok(socket)
}

/// One socket.
#[derive(Debug)]
pub struct Door {
    socket: UdpSocket,
    state: UdpSocketState,
    local: SocketAddr,
    netns: u64,
    injector: Option<Arc<Injector>>,
}

impl Door {
    fn over(socket: Socket, netns: u64, injector: Option<Arc<Injector>>) -> io::Result<Self> {
        let socket = UdpSocket::from_std(socket.into())?;
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        let local = socket.local_addr()?;
        if local.is_ipv6() {
            // quinn-udp has its packets never fragmented. The largest datagram and its headers are more than loopback's
            // MTU.
            setsockopt(&socket, Ipv6DontFrag, &0)?;
            setsockopt(&socket, Ipv6MtuDiscover, &libc::IPV6_PMTUDISC_DONT)?;
        }
        Ok(Self {
            socket,
            state,
            local,
            netns,
            injector,
        })
    }

    /// Cookie of its network namespace.
    pub fn netns(&self) -> u64 {
        self.netns
    }

    /// Its own address: the unspecified one of its family, and its port.
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// Waits for datagrams.
    pub fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.poll_recv_ready(cx)
    }

    /// Reads what is there, up to a batch.
    pub fn read(&self, batch: &mut Batch) -> io::Result<()> {
        self.socket
            .try_io(Interest::READABLE, || batch.fill(&self.socket))
    }

    /// Sends an answer to an application from the address that stands for its destination, with the service that the
    /// destination has asked for. False if its socket, or ours, does not take more now.
    pub fn answer(&self, from: IpAddr, app: SocketAddr, data: &[u8], dscp: Dscp) -> bool {
        if !dscp.is_default() {
            // quinn-udp sets the two bits of congestion alone.
            return self.answer_as(from, app, data, dscp).is_ok();
        }
        let transmit = Transmit {
            destination: app,
            ecn: None,
            contents: data,
            segment_size: None,
            src_ip: Some(from),
        };
        let sent = self
            .state
            .try_send(UdpSockRef::from(&self.socket), &transmit);
        sent.is_ok()
    }

    fn answer_as(
        &self,
        from: IpAddr,
        app: SocketAddr,
        data: &[u8],
        dscp: Dscp,
    ) -> nix::Result<usize> {
        let (fd, data, flags) = (
            self.socket.as_raw_fd(),
            [IoSlice::new(data)],
            MsgFlags::empty(),
        );
        let app = SockaddrStorage::from(app);
        match from {
            IpAddr::V4(from) => {
                let source = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: in_addr(from),
                    ipi_addr: in_addr(Ipv4Addr::UNSPECIFIED),
                };
                let tos = dscp.tos();
                let control = [
                    ControlMessage::Ipv4PacketInfo(&source),
                    ControlMessage::Ipv4Tos(&tos),
                ];
                sendmsg(fd, &data, &control, flags, Some(&app))
            }
            IpAddr::V6(from) => {
                let source = libc::in6_pktinfo {
                    ipi6_addr: libc::in6_addr {
                        s6_addr: from.octets(),
                    },
                    ipi6_ifindex: 0,
                };
                let class = i32::from(dscp.tos());
                let control = [
                    ControlMessage::Ipv6PacketInfo(&source),
                    ControlMessage::Ipv6TClass(&class),
                ];
                sendmsg(fd, &data, &control, flags, Some(&app))
            }
        }
    }

    /// Tells an application's kernel that the destination is not to be reached, as a router or its host would.
    pub fn unreachable(&self, from: IpAddr, app: SocketAddr, why: Unreachable) {
        self.unreachable_at(SocketAddr::new(from, self.local.port()), app, why);
    }

    /// The same of what was sent to another port than this socket's.
    pub fn unreachable_at(&self, from: SocketAddr, app: SocketAddr, why: Unreachable) {
        let Some(injector) = &self.injector else {
            return;
        };
        let packet = packet(app, from, why);
        if let Err(error) = injector.send(&packet, app.ip()) {
            tracing::debug!(%error, %app, "an application could not be told that its destination is unreachable");
        }
    }
}

/// Whose datagram it is, the id that its destination has, and the address that stands for it. `None` for what came from
/// outside of loopback or stands for nothing.
pub fn arrival(meta: &Meta) -> Option<(SocketAddr, u32, IpAddr)> {
    let to = meta.to?;
    let inside = meta.interface.is_none_or(|index| index == LOOPBACK);
    let id = id_of(&words(to)).filter(|_| inside)?;
    Some((SocketAddr::new(meta.from.ip(), meta.from.port()), id, to))
}

fn in_addr(addr: Ipv4Addr) -> libc::in_addr {
    libc::in_addr {
        s_addr: u32::from_ne_bytes(addr.octets()),
    }
}

/// As far as allowed: beyond the host's limits with CAP_NET_ADMIN, else up to them.
fn enlarge(socket: &Socket, bytes: usize) {
    if setsockopt(socket, sockopt::RcvBufForce, &bytes).is_err() {
        let _ = socket.set_recv_buffer_size(bytes);
    }
    if setsockopt(socket, sockopt::SndBufForce, &bytes).is_err() {
        let _ = socket.set_send_buffer_size(bytes);
    }
}
