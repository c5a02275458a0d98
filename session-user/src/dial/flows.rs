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

/// Has `peer` no further socket of a flow, as long as the result is kept.
#[cfg(test)]
pub fn exhaust(peer: &str) -> Vec<tokio::sync::OwnedSemaphorePermit> {
    SOCKETS.exhaust(peer)
}

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

/// The addresses of `target`, a name that `peer` opens a flow to, found out within `timeout`.
pub async fn resolve_flow(
    peer: &str,
    target: &Target,
    allow: &AllowList,
    timeout: Duration,
) -> Result<Vec<SocketAddr>, DialError> {
    let deadline = Instant::now() + timeout;
    addresses_of(peer, Protocol::Udp, target, allow, deadline, timeout).await
}

/// Opens the socket of a flow of `caller` to `target`, which has these addresses: of several, the first that this host
/// has a route to, as nobody can know before who answers. `is_own` says which addresses are this host's, and `shared`
/// that it is to have no socket of its own. Nothing is waited for.
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
    // What finds out which address has a route is gone at once: only a socket of its own counts.
    let share = (!shared).then(|| {
        let share = SOCKETS.try_acquire(&caller.name);
        share.ok_or_else(|| DialError::TooMany {
            target: target.to_string(),
        })
    });
    let share = share.transpose()?;
    let mut last = io::Error::from_raw_os_error(libc::EHOSTUNREACH);
    let mut tried = SocketAddr::from(([0, 0, 0, 0], 0));
    for addr in allowed {
        tried = addr;
        let (from, route) = towards(addr);
        match connected(addr, from) {
            Ok(socket) => {
                return Ok(match share {
                    Some(share) => FlowOpened::Own(FlowSocket { socket, share }),
                    None => FlowOpened::Shared(route),
                });
            }
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

    #[tokio::test]
    async fn a_flow_that_shares_a_socket_takes_no_share_of_its_own() {
        let peer = "greedy";
        let taken: Vec<_> = std::iter::from_fn(|| SOCKETS.try_acquire(peer)).collect();
        assert!(!taken.is_empty());
        let rule = AllowRule {
            peer: peer.to_owned(),
            to: vec!["127.0.0.0/8:*/udp".to_owned()],
        };
        let rules = AllowList::parse(&[rule]).unwrap();
        let caller = Caller {
            name: peer.to_owned(),
            ..Caller::default()
        };
        let addresses = ["127.0.0.1:9", "127.0.0.2:9"].map(|addr| addr.parse().unwrap());
        let target = Target::Name("two.test".to_owned(), 9);
        let open = |shared| open_flow(&caller, |_| false, &target, &rules, &addresses, shared);
        assert!(matches!(open(true), Ok(FlowOpened::Shared(_))));
        assert!(matches!(open(false), Err(DialError::TooMany { .. })));
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
            let found = resolve_flow("lorry", &target, &rules, second).await?;
            open_flow(&caller(), |_| false, &target, &rules, &found, false)
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
