//! What the agent has in one network namespace: everything that is opened there is opened here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use nix::sys::socket::{getsockopt, sockopt::IpMtu};
use session_ebpf_common::{Native, Ports};
use socket2::{Domain, Protocol, Socket, Type};

use super::CaptureError;
use super::gate::words;
use super::injector::Injector;
use super::listeners::Opened;
use super::netns::NamespaceError;
use super::udp;

/// Addresses of documentation (RFC 5737, RFC 3849): only default routes, or none, lead there.
const ELSEWHERE4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const ELSEWHERE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// The agent's sockets in one network namespace. They belong to it wherever they are used, and keep it alive.
#[derive(Debug)]
pub struct NamespaceSockets {
    /// Where captured TCP connections arrive.
    pub listeners: Opened,
    /// What captured datagrams need; None where they cannot be captured.
    pub udp: Option<udp::Ground>,
    /// Sends held SYNs on; None where none are held.
    pub injector: Option<Arc<Injector>>,
    /// Know what a connection would have without capture.
    pub probes: Probes,
    /// What they have said; nothing in the agent's own namespace.
    pub native: Native,
}

impl NamespaceSockets {
    /// Opens them in the network namespace that this thread is in, at the ports that are usual if they are free. `gate`:
    /// whether SYNs are held, which needs CAP_NET_RAW there. `plan`: how datagrams are captured; where they cannot be,
    /// connections are all the same.
    pub fn open(usual: &Ports, gate: bool, plan: udp::Plan) -> Result<Self, NamespaceError> {
        if !loopback_is_up() {
            return Err(NamespaceError::LoopbackDown);
        }
        let injector = gate.then(Injector::open).transpose();
        let injector = injector.map_err(|source| CaptureError::Runtime {
            what: "open raw sockets in the network namespace (CAP_NET_RAW)",
            source,
        })?;
        let injector = injector.map(Arc::new);
        let listeners = Opened::open(usual)?;
        let udp = udp::Ground::open(plan, usual, injector.clone());
        let probes = Probes::open();
        Ok(Self {
            listeners,
            udp: udp
                .inspect_err(|error| {
                    tracing::warn!(%error, "UDP is not captured in a network namespace");
                })
                .ok(),
            injector,
            native: probes.native(),
            probes,
        })
    }

    /// Ports of the sockets.
    pub fn ports(&self) -> Ports {
        let (udp4, udp6) = self.udp.as_ref().map_or((0, 0), udp::Ground::ports);
        Ports {
            udp4,
            udp6,
            ..self.listeners.ports()
        }
    }
}

/// Whether lo is up here: netdevice(7), of this one interface, for whoever made the namespace can fill it with others. Where
/// nobody tells, what is opened next will.
fn loopback_is_up() -> bool {
    use std::os::fd::AsRawFd as _;
    let Ok(socket) = Socket::new(Domain::IPV4, Type::DGRAM.cloexec(), Some(Protocol::UDP)) else {
        return true;
    };
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    // SAFETY: a live descriptor, and the structure that the request reads and writes.
    let told = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) };
    // SAFETY: this request writes the flags, and zeroes are flags too.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    told != 0 || libc::c_int::from(flags) & libc::IFF_UP != 0
}

/// UDP sockets that ask the kernel for its routes. Nothing is ever sent on them.
#[derive(Debug)]
pub struct Probes {
    v4: Option<Socket>,
    v6: Option<Socket>,
}

impl Probes {
    /// Opens them in the network namespace that this thread is in.
    pub fn open() -> Self {
        let udp = |domain| Socket::new(domain, Type::DGRAM.cloexec(), Some(Protocol::UDP)).ok();
        Self {
            v4: udp(Domain::IPV4),
            v6: udp(Domain::IPV6),
        }
    }

    /// Source address and MTU of what the namespace's default routes carry now; nothing where it has none.
    pub fn native(&self) -> Native {
        let v4 = self.v4.as_ref().and_then(|s| route(s, ELSEWHERE4.into()));
        let v6 = self.v6.as_ref().and_then(|s| route(s, ELSEWHERE6.into()));
        Native {
            source4: v4.map_or([0; 4], |(source, _)| words(source)),
            source6: v6.map_or([0; 4], |(source, _)| words(source)),
            mtu4: v4.map_or(0, |(_, mtu)| mtu),
            mtu6: v6.map_or(0, |(_, mtu)| mtu),
        }
    }
}

/// What the kernel would send from, and the MTU there; 0 if it does not tell, as of IPv6.
fn route(socket: &Socket, to: IpAddr) -> Option<(IpAddr, u32)> {
    // A route is looked up anew at each connect(); only a fresh one frees the source address of the last.
    disconnect(socket);
    socket.connect(&SocketAddr::new(to, 9).into()).ok()?;
    let source = socket.local_addr().ok()?.as_socket()?.ip();
    let mtu = match to {
        IpAddr::V4(_) => getsockopt(socket, IpMtu).ok(),
        IpAddr::V6(_) => None,
    };
    let usable = !source.is_loopback() && !source.is_unspecified();
    usable.then_some((
        source,
        mtu.and_then(|mtu| u32::try_from(mtu).ok()).unwrap_or(0),
    ))
}

/// Takes a UDP socket's address from it, as connect(2) says of AF_UNSPEC.
fn disconnect(socket: &Socket) {
    use std::os::fd::AsRawFd as _;
    let none = libc::sockaddr {
        sa_family: libc::AF_UNSPEC as libc::sa_family_t,
        sa_data: [0; 14],
    };
    // SAFETY: a live descriptor, and an address with its length. A failure leaves the socket as it was.
    unsafe {
        libc::connect(
            socket.as_raw_fd(),
            &raw const none,
            size_of::<libc::sockaddr>() as libc::socklen_t,
        );
    }
}
