//! Sockets of flows towards their targets.
//!
//! As for streams: rules, names, the address by which targets know the caller. Each flow has a socket of its own, which
//! is connected, so that only its target's answers come in, and ICMP errors say what became of a datagram (udp(7)).

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::LazyLock;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};
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

/// Opens the socket of a flow to `target`, a name, for `caller` within `timeout`; `is_own` says which addresses are
/// this host's.
pub async fn dial_flow(
    caller: &Caller,
    is_own: impl Fn(IpAddr) -> bool,
    target: &Target,
    allow: &AllowList,
    timeout: Duration,
) -> Result<FlowSocket, DialError> {
    let deadline = Instant::now() + timeout;
    let peer = caller.name.as_str();
    let found = addresses_of(peer, Protocol::Udp, target, allow, deadline, timeout).await?;
    open_flow(caller, is_own, target, allow, &found)
}

/// The same where the addresses of `target` are known: nothing is waited for. Of several, the first that this host has
/// a route to: who answers, nobody can know before.
pub fn open_flow(
    caller: &Caller,
    is_own: impl Fn(IpAddr) -> bool,
    target: &Target,
    allow: &AllowList,
    addresses: &[SocketAddr],
) -> Result<FlowSocket, DialError> {
    let allowed = only_allowed(&caller.name, Protocol::Udp, target, allow, addresses)?;
    let share = (SOCKETS.try_acquire(&caller.name)).ok_or_else(|| DialError::TooMany {
        target: target.to_string(),
    })?;
    let mut last = io::Error::from_raw_os_error(libc::EHOSTUNREACH);
    let mut tried = SocketAddr::from(([0, 0, 0, 0], 0));
    for addr in allowed {
        let here = addr.ip().is_loopback() || is_own(addr.ip());
        tried = addr;
        match connected(addr, caller.seen_as.towards(addr.ip(), here)) {
            Ok(socket) => return Ok(FlowSocket { socket, share }),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dial::AllowRule;

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

    #[tokio::test]
    async fn a_port_that_nobody_has_refuses_the_next_call() {
        let gone = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let addr = gone.local_addr().unwrap();
        drop(gone);
        let rules = allow("127.0.0.0/8:*/udp");
        let opened = open_flow(&caller(), |_| false, &Target::Addr(addr), &rules, &[addr]).unwrap();
        let (socket, _share) = opened.into_parts();
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
            dial_flow(&caller(), |_| false, &target, &rules, second).await
        };
        let opened = dial(allow(&format!("127.0.0.0/8:{port}"))).await.unwrap();
        let (socket, _share) = opened.into_parts();
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
