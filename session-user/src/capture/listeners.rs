//! The listeners on loopback where captured connections arrive, in one network namespace; and the socket that tells the
//! programs that the agent lives.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, FromRawFd as _, RawFd},
    sync::atomic::{AtomicUsize, Ordering},
    task::{Context, Poll, ready},
};

use session_ebpf_common::{Ports, V6_PORTS};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::Handle,
};

use super::{CaptureError, Hop};
use crate::requests::AppStream;

/// Connections that may wait to be accepted, per listener.
const BACKLOG: i32 = 4096;

/// A socket that listens and is never accepted from: the programs know by it that the agent lives.
#[derive(Debug)]
pub struct Marker(Socket);

impl Marker {
    /// Opens it in the current network namespace; which one that is does not matter.
    pub fn open() -> Result<Self, CaptureError> {
        open((Ipv4Addr::LOCALHOST, 0).into(), None, 1).map(Self)
    }
}

impl AsRawFd for Marker {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Listeners that no runtime drives yet.
#[derive(Debug)]
pub struct Opened {
    v4: Socket,
    /// [`V6_PORTS`] of them, or none.
    v6: Vec<Socket>,
}

impl Opened {
    /// Opens the listeners in the network namespace of this thread: at the ports that are usual elsewhere, where they are
    /// given and free, and otherwise at ports that the kernel chooses.
    pub fn open(usual: &Ports) -> Result<Self, CaptureError> {
        // For all of 127.0.0.0/9. On every address, but only on lo: unreachable from outside.
        let v4 = open_near(Ipv4Addr::UNSPECIFIED.into(), usual.v4, Some(b"lo"))?;
        let mut v6 = Vec::with_capacity(V6_PORTS);
        for port in usual.v6 {
            match open_near(Ipv6Addr::LOCALHOST.into(), port, None) {
                Ok(socket) => v6.push(socket),
                // All or none: the programs spread over a full list.
                Err(CaptureError::Listener { source, .. })
                    if is_absent(&source) && v6.is_empty() =>
                {
                    tracing::warn!(
                        "no IPv6 on the loopback interface: IPv6 connections are not captured"
                    );
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Self { v4, v6 })
    }

    /// Ports of the listeners.
    pub fn ports(&self) -> Ports {
        let port = |socket: &Socket| {
            let bound = socket.local_addr().ok().and_then(|addr| addr.as_socket());
            bound.map_or(0, |addr| addr.port())
        };
        let mut ports = Ports {
            v4: port(&self.v4),
            ..Ports::default()
        };
        for (slot, socket) in ports.v6.iter_mut().zip(&self.v6) {
            *slot = port(socket);
        }
        ports
    }

    /// Cookie of the network namespace (`SO_NETNS_COOKIE`, Linux 5.14), by which the programs know it.
    pub fn netns_cookie(&self) -> io::Result<u64> {
        netns_cookie(&self.v4)
    }

    /// Has `runtime` drive them.
    pub fn register(self, runtime: &Handle) -> Result<Listeners, CaptureError> {
        let _driven_there = runtime.enter();
        let netns_cookie = self
            .netns_cookie()
            .map_err(|source| CaptureError::Runtime {
                what: "read the cookie of the network namespace",
                source,
            })?;
        let ports = self.ports();
        let sockets = std::iter::once(self.v4).chain(self.v6);
        Ok(Listeners {
            accepting: sockets.map(asynchronous).collect::<Result<_, _>>()?,
            ports,
            turn: AtomicUsize::new(0),
            netns_cookie,
        })
    }
}

/// All listeners of one network namespace.
#[derive(Debug)]
pub struct Listeners {
    /// The IPv4 listener first, then those for IPv6.
    accepting: Vec<AsyncFd<Socket>>,
    ports: Ports,
    /// Which listener is asked first next time, so that none starves.
    turn: AtomicUsize,
    /// Cookie of the network namespace.
    netns_cookie: u64,
}

impl Listeners {
    /// Ports of the listeners.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Cookie of the network namespace.
    pub fn netns_cookie(&self) -> u64 {
        self.netns_cookie
    }

    /// The loopback hop of an accepted socket, whose far end is `app` and called connect() at that time.
    pub fn hop(&self, socket: &Socket, app: SocketAddr, called_at: u64) -> io::Result<Hop> {
        let agent = socket.local_addr()?;
        let agent = agent.as_socket().ok_or(io::ErrorKind::InvalidData)?;
        Ok(Hop::between(self.netns_cookie, app, agent, called_at))
    }

    /// The next connection on any listener, and its other end. The socket does not block, sends small writes at once, has
    /// urgent data inline, and shows a close that was not put in order as a reset, never as a clean end.
    pub fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Socket, SocketAddr)>> {
        let count = self.accepting.len();
        let first = self.turn.fetch_add(1, Ordering::Relaxed);
        for offset in 0..count {
            let listener = &self.accepting[first.wrapping_add(offset) % count];
            match poll_accept(listener, cx) {
                Poll::Ready(Err(error)) if is_about_one_connection(&error) => {
                    cx.waker().wake_by_ref();
                }
                Poll::Ready(result) => return Poll::Ready(result),
                Poll::Pending => {}
            }
        }
        Poll::Pending
    }
}

fn poll_accept(
    listener: &AsyncFd<Socket>,
    cx: &mut Context<'_>,
) -> Poll<io::Result<(Socket, SocketAddr)>> {
    loop {
        let mut ready = ready!(listener.poll_read_ready(cx))?;
        if let Ok(accepted) = ready.try_io(|listener| accept(listener.get_ref())) {
            return Poll::Ready(accepted);
        }
    }
}

/// accept4(2). The socket is in no runtime yet: its driver registers it for what it is to be told.
fn accept(listener: &Socket) -> io::Result<(Socket, SocketAddr)> {
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let accept = |addr: *mut socket2::SockAddrStorage, len: *mut libc::socklen_t| {
        // SAFETY: a live descriptor; `addr` has room for `len` bytes, and both outlive the call.
        let fd = unsafe { libc::accept4(listener.as_raw_fd(), addr.cast(), len, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just opened it for nobody else.
        Ok(unsafe { Socket::from_raw_fd(fd) })
    };
    // SAFETY: where accept4 succeeds it has written an address and its length.
    let (socket, peer) = unsafe { SockAddr::try_init(accept) }?;
    let peer = peer.as_socket().ok_or(io::ErrorKind::InvalidData)?;
    Ok((socket, peer))
}

/// A listener at `port`, or where that is taken, at one that the kernel chooses.
fn open_near(ip: IpAddr, port: u16, device: Option<&[u8]>) -> Result<Socket, CaptureError> {
    match open((ip, port).into(), device, BACKLOG) {
        Err(CaptureError::Listener { source, .. })
            if port != 0 && source.kind() == io::ErrorKind::AddrInUse =>
        {
            open((ip, 0).into(), device, BACKLOG)
        }
        other => other,
    }
}

fn open(addr: SocketAddr, device: Option<&[u8]>, backlog: i32) -> Result<Socket, CaptureError> {
    let open = || {
        let socket = Socket::new(
            Domain::for_address(addr),
            Type::STREAM.cloexec().nonblocking(),
            Some(Protocol::TCP),
        )?;
        if addr.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        if device.is_some() {
            socket.bind_device(device)?;
        }
        // Connections that were accepted there before do not keep a port from being listened on again.
        socket.set_reuse_address(true)?;
        AppStream::prepare(&socket)?;
        // bbr would pace the loopback hop to half its speed.
        if let Err(error) = socket.set_tcp_congestion(b"cubic") {
            tracing::debug!(%error, "cubic is not available for the loopback hop");
        }
        socket.bind(&addr.into())?;
        socket.listen(backlog)?;
        fast_open_off(&socket)?;
        Ok(socket)
    };
    open().map_err(|source| CaptureError::Listener { addr, source })
}

fn asynchronous(socket: Socket) -> Result<AsyncFd<Socket>, CaptureError> {
    // SAFETY: a `Socket` keeps its descriptor for its whole life, and the registration owns it.
    let listener = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
    listener.map_err(|source| CaptureError::Runtime {
        what: "register a listener with the runtime",
        source: source.into(),
    })
}

/// Data in the SYN would be acknowledged before the agent has decided. After listen(), because a host may turn fast open
/// on for all listeners (net.ipv4.tcp_fastopen & 0x400), which happens there.
fn fast_open_off(socket: &Socket) -> io::Result<()> {
    let queue: libc::c_int = 0;
    // SAFETY: a live descriptor, and a pointer to an int with its length.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_FASTOPEN,
            (&raw const queue).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    let error = io::Error::last_os_error();
    // A kernel without fast open has nothing to turn off.
    if result == 0 || error.raw_os_error() == Some(libc::ENOPROTOOPT) {
        Ok(())
    } else {
        Err(error)
    }
}

/// `SO_NETNS_COOKIE` (Linux 5.14): the number by which the programs know the network namespace of a socket.
pub fn netns_cookie(socket: &impl AsRawFd) -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: a live descriptor, and pointers to a u64 and to its length, both of which outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if result == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether the error says that the host has no IPv6 loopback address.
fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT)
    )
}

/// accept(2): errors that belong to one connection, not to the listener.
fn is_about_one_connection(error: &io::Error) -> bool {
    let network = [
        libc::ECONNABORTED,
        libc::ENETDOWN,
        libc::EPROTO,
        libc::ENOPROTOOPT,
        libc::EHOSTDOWN,
        libc::EHOSTUNREACH,
        libc::EOPNOTSUPP,
        libc::ENETUNREACH,
        libc::EINTR,
    ];
    error
        .raw_os_error()
        .is_some_and(|code| network.contains(&code))
}

#[cfg(test)]
impl Listeners {
    /// Stops accepting while the marker still stands. By shutdown, because a process forked by another test may hold
    /// copies of the descriptors for a moment.
    pub fn close(&self) {
        for listener in &self.accepting {
            (listener.get_ref())
                .shutdown(std::net::Shutdown::Both)
                .expect("a listener");
        }
    }
}

#[cfg(test)]
impl Marker {
    /// Stops listening, as the death of the agent would.
    pub fn close(&self) {
        self.0
            .shutdown(std::net::Shutdown::Both)
            .expect("a listener");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nobody sets them for each socket (`sk_clone_lock` of net/core/sock.c).
    #[test]
    fn accepted_sockets_have_the_options_of_their_listener() {
        let listener = open((Ipv4Addr::LOCALHOST, 0).into(), None, 1).unwrap();
        let addr = listener.local_addr().unwrap().as_socket().unwrap();
        let app = std::net::TcpStream::connect(addr).unwrap();
        // It does not block: accept4 says so where the kernel has not finished the handshake yet.
        let (socket, from) = loop {
            match accept(&listener) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                accepted => break accepted.unwrap(),
            }
        };
        assert_eq!(from, app.local_addr().unwrap());
        assert!(socket.tcp_nodelay().unwrap() && socket.out_of_band_inline().unwrap());
        assert_eq!(socket.linger().unwrap(), Some(std::time::Duration::ZERO));
        assert_eq!(socket.tcp_notsent_lowat().unwrap(), 256 * 1024);
        assert!(socket.nonblocking().unwrap());
    }
}
