//! A door's socket, and who comes through it.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::{At, Door};
use crate::requests::AppStream;

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// A listening socket. A Unix socket is removed with it.
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

/// Somebody who came.
pub(super) enum Client {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

impl Listener {
    /// Binds and listens.
    pub fn open(door: &Door) -> io::Result<Self> {
        match &door.at {
            At::Tcp(addr) => Ok(Self::Tcp(tcp(*addr)?)),
            // The configuration lets a UDP port lead to a target only.
            At::Udp(_) => Err(io::ErrorKind::Unsupported.into()),
            At::Unix(path) => Ok(Self::Unix(unix(path, door.group.as_deref())?, path.clone())),
        }
    }

    /// The next client. Cancel-safe.
    pub async fn accept(&self) -> io::Result<Client> {
        match self {
            Self::Tcp(listener) => {
                let (socket, from) = listener.accept().await?;
                socket.set_nodelay(true)?;
                Ok(Client::Tcp(socket, from))
            }
            Self::Unix(listener, _) => Ok(Client::Unix(listener.accept().await?.0)),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // Best effort: the next agent replaces a socket that nobody listens on.
            let _ = fs::remove_file(path);
        }
    }
}

fn tcp(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(addr),
        Type::STREAM.cloexec().nonblocking(),
        Some(Protocol::TCP),
    )?;
    if addr.is_ipv6() {
        // `[::]` is IPv6 alone: IPv4 has a line of its own, or none.
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

fn unix(path: &Path, group: Option<&str>) -> io::Result<UnixListener> {
    use std::os::unix::net::UnixListener as Std;
    let listener = match Std::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && !is_alive(path) => {
            fs::remove_file(path)?;
            Std::bind(path)?
        }
        bound => bound?,
    };
    let mode = match group {
        Some(name) => {
            let group = nix::unistd::Group::from_name(name)?;
            let unknown = || {
                io::Error::new(
                    io::ErrorKind::NotFound,
                    format!("no group is called {name}"),
                )
            };
            nix::unistd::chown(path, None, Some(group.ok_or_else(unknown)?.gid))?;
            0o660
        }
        None => 0o600,
    };
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Whether somebody listens at the socket `path`.
fn is_alive(path: &Path) -> bool {
    let found = std::os::unix::net::UnixStream::connect(path);
    !matches!(found, Err(error) if error.kind() == io::ErrorKind::ConnectionRefused)
}

impl Client {
    /// Its address, if it came over a network.
    pub fn address(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp(_, from) => Some(from.ip()),
            Self::Unix(_) => None,
        }
    }

    /// What it is called in logs.
    pub fn name(&self) -> String {
        match self {
            Self::Tcp(_, from) => from.to_string(),
            Self::Unix(socket) => {
                let pid = socket.peer_cred().ok().and_then(|cred| cred.pid());
                pid.map_or_else(|| "a process".to_owned(), |pid| format!("process {pid}"))
            }
        }
    }

    /// The application's end of a stream: a close that was not put in order is a reset.
    pub fn into_stream(self) -> io::Result<AppStream> {
        let stream = match self {
            Self::Tcp(socket, _) => AppStream::from(socket),
            Self::Unix(socket) => AppStream::from(socket),
        };
        stream.reset_on_close(true)?;
        Ok(stream)
    }
}
