//! The listeners on loopback where captured connections arrive.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::atomic::{AtomicUsize, Ordering},
    task::{Context, Poll},
    time::Duration,
};

use session_ebpf_common::V6_PORTS;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpStream};

use super::{CaptureError, Hop};

/// Connections that may wait to be accepted, per listener.
const BACKLOG: i32 = 4096;

/// Ports of the listeners; 0 where there is none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ports {
    /// IPv4 listener.
    pub v4: u16,
    /// Marker listener.
    pub marker: u16,
    /// IPv6 listeners, all 0 where `::1` does not exist.
    pub v6: [u16; V6_PORTS],
}

/// All listeners of one network namespace.
#[derive(Debug)]
pub struct Listeners {
    /// The IPv4 listener first, then those for IPv6.
    accepting: Vec<TcpListener>,
    /// Listens and is never accepted from: its presence tells the programs that the agent lives. Needed beside the
    /// others, because the programs' lookup does not find a listener that is bound to a device.
    marker: Socket,
    /// Which listener is asked first next time, so that none starves.
    turn: AtomicUsize,
    /// Cookie of the network namespace.
    netns_cookie: u64,
}

impl Listeners {
    /// Opens the listeners in the current network namespace, at ports that the kernel chooses.
    pub fn open() -> Result<Self, CaptureError> {
        let mut accepting = vec![asynchronous(open_v4()?)?];
        for _ in 0..V6_PORTS {
            match open((Ipv6Addr::LOCALHOST, 0).into(), None, BACKLOG) {
                Ok(socket) => accepting.push(asynchronous(socket)?),
                // All or none: the programs spread over a full list.
                Err(CaptureError::Listener { source, .. })
                    if is_absent(&source) && accepting.len() == 1 =>
                {
                    tracing::warn!(
                        "no IPv6 on the loopback interface: IPv6 connections are not captured"
                    );
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        let marker = open((Ipv4Addr::LOCALHOST, 0).into(), None, 1)?;
        let netns_cookie = netns_cookie(&marker).map_err(|source| CaptureError::Runtime {
            what: "read the cookie of the network namespace",
            source,
        })?;
        Ok(Self {
            accepting,
            marker,
            turn: AtomicUsize::new(0),
            netns_cookie,
        })
    }

    /// Ports of the listeners.
    pub fn ports(&self) -> Ports {
        let port = |listener: &TcpListener| listener.local_addr().map_or(0, |addr| addr.port());
        let mut ports = Ports {
            v4: port(&self.accepting[0]),
            ..Ports::default()
        };
        ports.marker = self
            .marker
            .local_addr()
            .ok()
            .and_then(|addr| addr.as_socket())
            .map_or(0, |addr| addr.port());
        for (slot, listener) in ports.v6.iter_mut().zip(&self.accepting[1..]) {
            *slot = port(listener);
        }
        ports
    }

    /// The loopback hop of an accepted socket, whose far end is `app` and called connect() at that time.
    pub fn hop(&self, socket: &TcpStream, app: SocketAddr, called_at: u64) -> io::Result<Hop> {
        let agent = socket.local_addr()?;
        Ok(Hop::between(self.netns_cookie, app, agent, called_at))
    }

    /// The next connection on any listener.
    pub fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
        let count = self.accepting.len();
        let first = self.turn.fetch_add(1, Ordering::Relaxed);
        for offset in 0..count {
            let listener = &self.accepting[first.wrapping_add(offset) % count];
            match listener.poll_accept(cx) {
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

/// An accepted socket: small writes go out at once, and a close that was not put in order shows as a reset, never as a
/// clean end.
pub fn prepare(socket: &TcpStream) -> io::Result<()> {
    SockRef::from(socket).set_linger(Some(Duration::ZERO))?;
    socket.set_nodelay(true)
}

/// One listener for all of 127.0.0.0/9. On every address, but only on lo: unreachable from outside.
fn open_v4() -> Result<Socket, CaptureError> {
    open((Ipv4Addr::UNSPECIFIED, 0).into(), Some(b"lo"), BACKLOG)
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
        // Inherited by accepted sockets. bbr would pace the loopback hop to half its speed.
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

fn asynchronous(socket: Socket) -> Result<TcpListener, CaptureError> {
    let listener = TcpListener::from_std(socket.into());
    listener.map_err(|source| CaptureError::Runtime {
        what: "register a listener with the runtime",
        source,
    })
}

/// Data in the SYN would be acknowledged before the agent has decided. After listen(), because a host may turn fast open
/// on for all listeners (net.ipv4.tcp_fastopen & 0x400), which happens there.
fn fast_open_off(socket: &Socket) -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
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

/// `SO_NETNS_COOKIE` (Linux 5.14): the number by which the programs know the socket's network namespace.
fn netns_cookie(socket: &Socket) -> io::Result<u64> {
    use std::os::fd::AsRawFd as _;
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
    pub fn close_accepting(&self) {
        for listener in &self.accepting {
            SockRef::from(listener)
                .shutdown(std::net::Shutdown::Both)
                .expect("a listener");
        }
    }

    /// Stops listening altogether, as the death of the agent would.
    pub fn close(&self) {
        self.close_accepting();
        self.marker
            .shutdown(std::net::Shutdown::Both)
            .expect("a listener");
    }
}
