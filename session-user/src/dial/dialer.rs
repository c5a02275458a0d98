//! Dialling a target for a peer.
//!
//! 1. the name, if it is one, must be one that some rule could admit;
//! 2. resolve it;
//! 3. each address must be allowed; the ones that are not are left out;
//! 4. connect to the rest, one after the other, within the time given;
//! 5. a failure keeps the real errno, because the application is to see what it would have seen.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::LazyLock;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use session_proto::wire::Target;
use socket2::{Domain, Protocol as Transport, Socket, Type};
use tokio::io::Interest;
use tokio::time::{Instant, timeout_at};

use super::shares::Shares;
use super::{AllowList, Denied, Protocol, SeenAs};
use crate::requests::{AppStream, register};

/// Addresses of one name that are tried; more only help somebody who wants to keep us busy.
const ADDRESSES_MAX: usize = 16;
/// An address gets its share of the time, but at least this: a connect over a mobile network
/// takes two round trips and perhaps a lost SYN (1 s).
const ATTEMPT_MIN: Duration = Duration::from_millis(1500);
/// And at most this, while there are others to try.
const ATTEMPT_MAX: Duration = Duration::from_secs(10);
/// Names resolved at once. getaddrinfo blocks a thread of a pool of tokio's (512) for as long as the
/// name server pleases, even after nobody waits for it; files need that pool as well.
const LOOKUPS_MAX: usize = 64;
/// Of these, for one peer: it may ask for names whose name servers never answer.
const LOOKUPS_OF_PEER_MAX: usize = 16;

static LOOKUPS: LazyLock<Shares> = LazyLock::new(|| Shares::new(LOOKUPS_MAX, LOOKUPS_OF_PEER_MAX));

/// Why a target could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The operator does not allow it.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// Not a host name at all.
    #[error("peer asked for an impossible host name `{0}`")]
    BadName(String),
    /// The name has no address, or the name server gave no answer.
    #[error("cannot resolve {target}: {error}; check this host's name servers")]
    Resolve {
        /// The target.
        target: String,
        /// What the resolver said.
        error: io::Error,
    },
    /// The target or the network refused.
    #[error("cannot connect to {target} ({addr}): {error}")]
    Connect {
        /// The target.
        target: String,
        /// The address that was tried last.
        addr: SocketAddr,
        /// What the kernel said.
        error: io::Error,
    },
    /// The peer has as many UDP sockets here as it may, or all peers have.
    #[error(
        "no socket for a flow to {target}: peers have as many as they may; raise LimitNOFILE if they need more"
    )]
    TooMany {
        /// The target.
        target: String,
    },
    /// Time ran out.
    #[error("{doing} {target} took longer than {after:?}")]
    Timeout {
        /// `connecting to` or `resolving`.
        doing: &'static str,
        /// The target.
        target: String,
        /// The time it had.
        after: Duration,
    },
}

impl DialError {
    /// The errno to report to the application's end. A denial is EACCES. A name without an
    /// address is EHOSTUNREACH: connect() knows no error for it, and "no such host" is what it
    /// means. A flow without a socket is ENOBUFS: a datagram is lost, and the next may have better luck.
    /// A connect that failed keeps the kernel's own.
    pub fn errno(&self) -> i32 {
        match self {
            DialError::Denied(_) => libc::EACCES,
            DialError::BadName(_) | DialError::Resolve { .. } => libc::EHOSTUNREACH,
            DialError::Connect { error, .. } => error.raw_os_error().unwrap_or(libc::EIO),
            DialError::TooMany { .. } => libc::ENOBUFS,
            DialError::Timeout { .. } => libc::ETIMEDOUT,
        }
    }
}

/// For whom a target is dialled.
#[derive(Debug, Clone, Default)]
pub struct Caller {
    /// Its name.
    pub name: String,
    /// Its SPIFFE ID.
    pub id: String,
    /// How targets see it.
    pub seen_as: SeenAs,
}

/// Connects to `target` for `caller` within `timeout`, name resolution included, from the address by
/// which targets know the caller; `is_own` says which addresses are this host's. The socket has
/// TCP_NODELAY and SO_LINGER {1, 0}: should this process die, the target sees a reset, never a
/// clean end of a truncated stream. A target that takes the PROXY protocol has been told the caller.
pub async fn dial_target(
    caller: &Caller,
    is_own: impl Fn(IpAddr) -> bool,
    target: &Target,
    allow: &AllowList,
    timeout: Duration,
) -> Result<AppStream, DialError> {
    let peer = caller.name.as_str();
    let deadline = Instant::now() + timeout;
    let late = |doing| DialError::Timeout {
        doing,
        target: target.to_string(),
        after: timeout,
    };
    let addresses = addresses_of(peer, Protocol::Tcp, target, allow, deadline, timeout).await?;
    let allowed = only_allowed(peer, Protocol::Tcp, target, allow, &addresses)?;
    let mut last = late("connecting to");
    for (tried, addr) in allowed.iter().enumerate() {
        let now = Instant::now();
        let share = deadline.saturating_duration_since(now) / (allowed.len() - tried) as u32;
        // The last one has all the time that is left.
        let share = if tried + 1 < allowed.len() {
            share.clamp(ATTEMPT_MIN, ATTEMPT_MAX)
        } else {
            share
        };
        let until = (now + share).min(deadline);
        let here = addr.ip().is_loopback() || is_own(addr.ip());
        let source = caller.seen_as.towards(addr.ip(), here);
        let wants_header = allow.wants_proxy_header(addr.ip(), addr.port());
        let header = wants_header.then_some(caller);
        match timeout_at(until, connect(*addr, source, header)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => {
                last = DialError::Connect {
                    target: target.to_string(),
                    addr: *addr,
                    error,
                }
            }
            Err(_) => last = late("connecting to"),
        }
        if Instant::now() >= deadline {
            break;
        }
    }
    Err(last)
}

/// The addresses of `target`, those of a name only if `peer` could be allowed one; `after`: the time that there
/// is until `deadline`.
pub(super) async fn addresses_of(
    peer: &str,
    protocol: Protocol,
    target: &Target,
    allow: &AllowList,
    deadline: Instant,
    after: Duration,
) -> Result<Vec<SocketAddr>, DialError> {
    let (name, port) = match target {
        Target::Addr(addr) => return Ok(vec![*addr]),
        Target::Name(name, port) => (name, *port),
    };
    check_name(name)?;
    allow.check_before_resolving(peer, protocol, name, port)?;
    timeout_at(deadline, resolve(peer, name.clone(), port))
        .await
        .map_err(|_| DialError::Timeout {
            doing: "resolving",
            target: target.to_string(),
            after,
        })?
        .map_err(|error| DialError::Resolve {
            target: target.to_string(),
            error,
        })
}

/// The addresses that `peer` may reach, as they are dialled; if none, why the first may not.
pub(super) fn only_allowed(
    peer: &str,
    protocol: Protocol,
    target: &Target,
    allow: &AllowList,
    addresses: &[SocketAddr],
) -> Result<Vec<SocketAddr>, DialError> {
    let mut allowed: Vec<SocketAddr> = Vec::new();
    let mut refused = None;
    for addr in addresses {
        let canonical = canonical(*addr);
        match allow.check(peer, protocol, target, canonical.ip(), canonical.port()) {
            Ok(()) if allowed.contains(&canonical) => {}
            Ok(()) if allowed.len() < ADDRESSES_MAX => allowed.push(canonical),
            Ok(()) => {}
            Err(denied) => refused = refused.or(Some(denied)),
        }
    }
    match refused {
        Some(denied) if allowed.is_empty() => Err(denied.into()),
        _ => Ok(allowed),
    }
}

/// A v4-mapped address as IPv4; otherwise unchanged, with the scope of a link-local address.
fn canonical(addr: SocketAddr) -> SocketAddr {
    match addr.ip().to_canonical() {
        IpAddr::V4(v4) => SocketAddr::from((v4, addr.port())),
        IpAddr::V6(_) => addr,
    }
}

async fn connect(
    addr: SocketAddr,
    source: Option<IpAddr>,
    header: Option<&Caller>,
) -> io::Result<AppStream> {
    let kind = Type::STREAM.cloexec().nonblocking();
    let socket = Socket::new(Domain::for_address(addr), kind, Some(Transport::TCP))?;
    if let Some(source) = source {
        bind(&socket, source)?;
    }
    socket.set_tcp_nodelay(true)?;
    socket.set_linger(Some(Duration::ZERO))?;
    let at_once = begin(&socket, addr)?;
    let fd = register(socket)?;
    if !at_once {
        // Nothing has been written: it becomes writable when it is connected, or has failed.
        drop(fd.writable().await?);
        if let Some(error) = fd.get_ref().take_error()? {
            return Err(error);
        }
    }
    // Bound to another address it has not met itself. What is dialled as no address in particular is its own.
    let anywhere = addr.ip().is_unspecified();
    let perhaps_itself = anywhere || source.is_none_or(|source| source == addr.ip());
    let local = if perhaps_itself || header.is_some() {
        fd.get_ref().local_addr()?.as_socket()
    } else {
        None
    };
    let remote = if anywhere {
        fd.get_ref().peer_addr()?.as_socket()
    } else {
        Some(addr)
    };
    if local == remote {
        // TCP's simultaneous open with itself: the kernel chose the very port that was dialled,
        // and nobody listens there.
        return Err(io::Error::from_raw_os_error(libc::ECONNREFUSED));
    }
    if let (Some(caller), Some(local)) = (header, local) {
        let mut header = &proxy_header(caller, local, addr)?[..];
        while !header.is_empty() {
            let send = |socket: &Socket| socket.send_with_flags(header, libc::MSG_NOSIGNAL);
            let sent = fd.async_io(Interest::WRITABLE, send).await?;
            header = &header[sent..];
        }
    }
    Ok(AppStream::dialled(fd, addr))
}

/// Begins to connect. True: it is connected already, as to a target on this host. The kernel handles the answer only when
/// connect() lets go of the socket, so that it takes a second call to hear of it (`__inet_stream_connect` of net/ipv4/af_inet.c).
fn begin(socket: &Socket, addr: SocketAddr) -> io::Result<bool> {
    let addr = addr.into();
    for _ in 0..2 {
        match socket.connect(&addr) {
            Ok(()) => return Ok(true),
            Err(error) if is_under_way(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// Of a socket that does not block.
fn is_under_way(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINPROGRESS | libc::EALREADY)
    )
}

/// Binds a socket to an address; its port is chosen when it connects: there are as many of them for each target as there
/// are ports.
fn bind(socket: &Socket, source: IpAddr) -> io::Result<()> {
    if source.is_ipv6() {
        // A network that is this host's by a local route has no single addresses, and IPv6 asks for one.
        socket.set_freebind_v6(true)?;
    }
    // IPv6 sockets have it as well (ip(7), Linux 4.2).
    setsockopt(socket, sockopt::IpBindAddressNoPort, &true)?;
    socket.bind(&SocketAddr::new(source, 0).into())
}

/// Version 2 of the PROXY protocol (HAProxy's proxy-protocol.txt): the caller's address in place of ours, and its
/// SPIFFE ID in a type for custom use.
fn proxy_header(caller: &Caller, ours: SocketAddr, target: SocketAddr) -> io::Result<Vec<u8>> {
    use ppp::v2::{Addresses, Builder, Command, Protocol, Version};
    /// The first of PP2_TYPE_MIN_CUSTOM to PP2_TYPE_MAX_CUSTOM.
    const CALLER_ID: u8 = 0xe0;
    let source = SocketAddr::new(caller.seen_as.told().unwrap_or(ours.ip()), ours.port());
    let addresses = match (source, target) {
        (SocketAddr::V4(_), SocketAddr::V4(_)) | (SocketAddr::V6(_), SocketAddr::V6(_)) => {
            Addresses::from((source, target))
        }
        // Both have one family there.
        _ => Addresses::from((mapped(source), mapped(target))),
    };
    Builder::with_addresses(Version::Two | Command::Proxy, Protocol::Stream, addresses)
        .write_tlv(CALLER_ID, caller.id.as_bytes())?
        .build()
}

fn mapped(addr: SocketAddr) -> SocketAddr {
    match addr.ip() {
        IpAddr::V4(ip) => SocketAddr::from((ip.to_ipv6_mapped(), addr.port())),
        IpAddr::V6(_) => addr,
    }
}

/// Bounds what is handed to the resolver: RFC 1035 says at most 253 characters, labels of 1 to 63.
fn check_name(name: &str) -> Result<(), DialError> {
    let plain = name.strip_suffix('.').unwrap_or(name);
    let fits = |label: &str| {
        (1..=63).contains(&label.len())
            && (label.bytes()).all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    if plain.len() <= 253 && plain.split('.').all(fits) {
        return Ok(());
    }
    let shown: String = name.chars().take(64).collect();
    Err(DialError::BadName(shown.escape_debug().to_string()))
}

async fn resolve(peer: &str, name: String, port: u16) -> io::Result<Vec<SocketAddr>> {
    let share = LOOKUPS.acquire(peer).await.map_err(io::Error::other)?;
    // In a task of its own: the share is held until getaddrinfo returns, also when the caller
    // has given up by then.
    let lookup = tokio::spawn(async move {
        let _share = share;
        let found: io::Result<Vec<SocketAddr>> = tokio::net::lookup_host((name, port))
            .await
            .map(Iterator::collect);
        found
    });
    let found = lookup.await.map_err(io::Error::other)??;
    if found.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "it has no address"));
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
