//! Sockets of flows towards their targets.
//!
//! As for streams: rules, names, the address by which targets know the caller. A flow has a socket of its own, which
//! is connected, so that only its target's answers come in, and ICMP errors say what became of a datagram (udp(7)). Flows
//! of an application's socket that is not connected share one that is not either.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::LazyLock;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{setsockopt, sockopt};
use session_proto::wire::Target;
use socket2::{Domain, SockRef, Socket, Type};
use tokio::net::UdpSocket;
use tokio::time::Instant;

use super::dialer::{addresses_of, only_allowed};
use super::shares::{Share, Shares};
use super::{AllowList, Caller, DialError, Protocol};

/// The part of this process's descriptors that flows may have: transports need some, or no session could be resumed.
const DESCRIPTORS_PART: u64 = 4;
/// The part of these that one peer may have.
const PEER_PART: usize = 2;
/// Descriptors where the limit cannot be read: the usual one.
const DESCRIPTORS_USUAL: u64 = 1024;

static SOCKETS: LazyLock<Shares> = LazyLock::new(|| {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(DESCRIPTORS_USUAL, |(soft, _)| soft);
    let all = usize::try_from(limit / DESCRIPTORS_PART).unwrap_or(usize::MAX);
    Shares::new(all, all.div_ceil(PEER_PART))
});

/// The socket of a flow, which counts among those that this process may have.
#[derive(Debug)]
pub struct FlowSocket {
    socket: UdpSocket,
    share: Share,
}

impl FlowSocket {
    /// The socket, and what is to be kept as long as it is.
    pub fn into_parts(self) -> (UdpSocket, Share) {
        (self.socket, self.share)
    }
}

/// Where a flow goes that shares a socket with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowRoute {
    /// Its target's address.
    pub to: SocketAddr,
    /// The address of ours by which the target knows the caller; unspecified where the kernel chooses.
    pub from: IpAddr,
    /// The target is on this host.
    pub here: bool,
}

impl FlowRoute {
    fn new(to: SocketAddr, from: Option<IpAddr>, here: bool) -> Self {
        let any = match to {
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        Self {
            // As addresses are compared: without what is only of use on this host.
            to: SocketAddr::new(to.ip(), to.port()),
            from: from.unwrap_or(any),
            here,
        }
    }

    /// Whether a socket at `local` can go there. The kernel may have chosen the very port that is the target's: nobody
    /// else is there then.
    pub fn check(&self, local: SocketAddr) -> Result<(), DialError> {
        let same = self.from.is_unspecified() || self.from == self.to.ip();
        if self.here && same && local.port() == self.to.port() {
            return Err(self.failed(io::Error::from_raw_os_error(libc::ECONNREFUSED)));
        }
        Ok(())
    }

    fn failed(&self, error: io::Error) -> DialError {
        DialError::Connect {
            target: self.to.to_string(),
            addr: self.to,
            error,
        }
    }
}

/// What a flow has towards its target.
#[derive(Debug)]
pub enum FlowOpened {
    /// A socket of its own.
    Own(FlowSocket),
    /// It shares one, which [`open_shared`] opens.
    Shared(FlowRoute),
}

/// Opens a socket of `peer` for the flow of `route` and others: it is not connected, and ICMP errors wait in its error
/// queue with what they are about.
pub fn open_shared(peer: &str, route: &FlowRoute) -> Result<FlowSocket, DialError> {
    let share = SOCKETS
        .try_acquire(peer)
        .ok_or_else(|| DialError::TooMany {
            target: route.to.to_string(),
        })?;
    let socket = unconnected(route.from).map_err(|error| route.failed(error))?;
    let local = socket.local_addr().map_err(|error| route.failed(error))?;
    route.check(local)?;
    Ok(FlowSocket { socket, share })
}

/// Opens the socket of a flow to `target`, a name, for `caller` within `timeout`; `is_own` says which addresses are
/// this host's, and `shared` that it is to have no socket of its own.
pub async fn dial_flow(
    caller: &Caller,
    is_own: impl Fn(IpAddr) -> bool,
    target: &Target,
    allow: &AllowList,
    timeout: Duration,
    shared: bool,
) -> Result<FlowOpened, DialError> {
    let deadline = Instant::now() + timeout;
    let peer = caller.name.as_str();
    let found = addresses_of(peer, Protocol::Udp, target, allow, deadline, timeout).await?;
    open_flow(caller, is_own, target, allow, &found, shared)
}

/// The same where the addresses of `target` are known: nothing is waited for. Of several, the first that this host has
/// a route to: who answers, nobody can know before.
pub fn open_flow(
    caller: &Caller,
    is_own: impl Fn(IpAddr) -> bool,
    target: &Target,
    allow: &AllowList,
    addresses: &[SocketAddr],
    shared: bool,
) -> Result<FlowOpened, DialError> {
    let allowed = only_allowed(&caller.name, Protocol::Udp, target, allow, addresses)?;
    let towards = |addr: SocketAddr| {
        let here = addr.ip().is_loopback() || is_own(addr.ip());
        let from = caller.seen_as.towards(addr.ip(), here);
        (from, FlowRoute::new(addr, from, here))
    };
    if let [only] = allowed[..]
        && shared
    {
        return Ok(FlowOpened::Shared(towards(only).1));
    }
    let share = (SOCKETS.try_acquire(&caller.name)).ok_or_else(|| DialError::TooMany {
        target: target.to_string(),
    })?;
    let mut last = io::Error::from_raw_os_error(libc::EHOSTUNREACH);
    let mut tried = SocketAddr::from(([0, 0, 0, 0], 0));
    for addr in allowed {
        tried = addr;
        let (from, route) = towards(addr);
        match connected(addr, from) {
            Ok(_) if shared => return Ok(FlowOpened::Shared(route)),
            Ok(socket) => return Ok(FlowOpened::Own(FlowSocket { socket, share })),
            Err(error) => last = error,
        }
    }
    Err(DialError::Connect {
        target: target.to_string(),
        addr: tried,
        error: last,
    })
}

fn connected(addr: SocketAddr, source: Option<IpAddr>) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM.nonblocking(), None)?;
    if let Some(source) = source {
        if source.is_ipv6() {
            // See `bound` of streams: a network that is this host's by a local route has no single addresses.
            SockRef::from(&socket).set_freebind_v6(true)?;
        }
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    socket.connect(&addr.into())?;
    let socket = UdpSocket::from_std(socket.into())?;
    if socket.local_addr()? == addr {
        // The kernel chose the very port that is the target's: nobody else is there.
        return Err(io::Error::from_raw_os_error(libc::ECONNREFUSED));
    }
    Ok(socket)
}

fn unconnected(from: IpAddr) -> io::Result<UdpSocket> {
    let addr = SocketAddr::new(from, 0);
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM.nonblocking(), None)?;
    if from.is_ipv6() {
        // IPv4 has a socket of its own.
        socket.set_only_v6(true)?;
        // See `connected`.
        socket.set_freebind_v6(true)?;
        setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
    } else {
        setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
    }
    socket.bind(&addr.into())?;
    UdpSocket::from_std(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dial::{AllowRule, SeenAs};

    fn allow(to: &str) -> AllowList {
        let to = vec![to.to_owned()];
        let peer = "lorry".to_owned();
        AllowList::parse(&[AllowRule { peer, to }]).unwrap()
    }

    fn caller() -> Caller {
        Caller {
            name: "lorry".to_owned(),
            ..Caller::default()
        }
    }

    fn own(opened: FlowOpened) -> FlowSocket {
        match opened {
            FlowOpened::Own(socket) => socket,
            FlowOpened::Shared(route) => panic!("{route:?}"),
        }
    }

    #[test]
    fn a_shared_socket_has_the_address_that_its_targets_are_to_see() {
        let seen_as = SeenAs::of(&["127.64.0.9", "10.64.0.9"]);
        let caller = Caller {
            seen_as,
            ..caller()
        };
        let rules = allow("0.0.0.0/0:*/udp");
        let route = |text: &str| {
            let addr: SocketAddr = text.parse().unwrap();
            let own = |ip: IpAddr| ip == IpAddr::from([192, 0, 2, 1]);
            let opened = open_flow(&caller, own, &Target::Addr(addr), &rules, &[addr], true);
            match opened {
                Ok(FlowOpened::Shared(route)) => (route.from.to_string(), route.here),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(route("192.0.2.1:9"), ("127.64.0.9".to_owned(), true));
        assert_eq!(route("192.0.2.2:9"), ("10.64.0.9".to_owned(), false));
    }

    #[test]
    fn a_shared_socket_is_no_target_of_its_own() {
        let route = FlowRoute::new("127.0.0.1:9".parse().unwrap(), None, true);
        assert!(route.check("0.0.0.0:9".parse().unwrap()).is_err());
        assert!(route.check("0.0.0.0:8".parse().unwrap()).is_ok());
        let elsewhere = FlowRoute::new("192.0.2.1:9".parse().unwrap(), None, false);
        assert!(elsewhere.check("0.0.0.0:9".parse().unwrap()).is_ok());
    }

    #[tokio::test]
    async fn a_port_that_nobody_has_refuses_the_next_call() {
        let gone = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let addr = gone.local_addr().unwrap();
        drop(gone);
        let rules = allow("127.0.0.0/8:*/udp");
        let target = Target::Addr(addr);
        let opened = open_flow(&caller(), |_| false, &target, &rules, &[addr], false);
        let (socket, _share) = own(opened.unwrap()).into_parts();
        socket.send(b"anybody?").await.unwrap();
        let mut answer = [0; 8];
        let error = socket.recv(&mut answer).await.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED));
    }

    #[tokio::test]
    async fn a_name_leads_to_a_socket_and_rules_for_tcp_do_not() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let port = server.local_addr().unwrap().port();
        let target = Target::Name("localhost".to_owned(), port);
        let dial = async |rules: AllowList| {
            let second = Duration::from_secs(1);
            dial_flow(&caller(), |_| false, &target, &rules, second, false).await
        };
        let opened = dial(allow(&format!("127.0.0.0/8:{port}"))).await.unwrap();
        let (socket, _share) = own(opened).into_parts();
        socket.send(b"hello").await.unwrap();
        let mut heard = [0; 8];
        let (n, from) = server.recv_from(&mut heard).await.unwrap();
        assert_eq!(
            (&heard[..n], from),
            (&b"hello"[..], socket.local_addr().unwrap())
        );
        let denied = dial(allow(&format!("127.0.0.0/8:{port}/tcp"))).await;
        assert!(matches!(denied, Err(DialError::Denied(_))), "{denied:?}");
    }
}
