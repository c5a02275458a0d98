//! The application's end of a stream.

use std::io::{self, IoSlice};
use std::net::{Shutdown, SocketAddr};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BufMut;
use socket2::SockRef;
use tokio::net::{TcpStream, UnixStream};

/// A connected stream socket of an application, or of a target.
///
/// A Unix socket knows no reset: where a TCP socket would be reset, it is closed.
#[derive(Debug)]
pub enum AppStream {
    /// Over TCP.
    Tcp(TcpStream),
    /// Over a Unix socket.
    Unix(UnixStream),
}

/// Calls the same method on whichever socket it is.
macro_rules! each {
    ($self:expr, $socket:ident => $call:expr) => {
        match $self {
            Self::Tcp($socket) => $call,
            Self::Unix($socket) => $call,
        }
    };
}

impl AppStream {
    /// As [`TcpStream::try_read_buf`].
    pub fn try_read_buf(&self, buf: &mut impl BufMut) -> io::Result<usize> {
        each!(self, socket => socket.try_read_buf(buf))
    }

    /// As [`TcpStream::try_write_vectored`].
    pub fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        each!(self, socket => socket.try_write_vectored(slices))
    }

    /// As [`TcpStream::poll_read_ready`].
    pub fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, socket => socket.poll_read_ready(cx))
    }

    /// As [`TcpStream::poll_write_ready`].
    pub fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, socket => socket.poll_write_ready(cx))
    }

    /// Address of the other end, if it has one.
    pub fn peer_addr(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(socket) => socket.peer_addr().ok(),
            Self::Unix(_) => None,
        }
    }

    /// Ends one direction or both.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.raw().shutdown(how)
    }

    /// What closing the socket means from now on: a reset, or an end in order.
    pub fn reset_on_close(&self, reset: bool) -> io::Result<()> {
        match self {
            Self::Tcp(_) => self.raw().set_linger(reset.then_some(Duration::ZERO)),
            Self::Unix(_) => Ok(()),
        }
    }

    fn raw(&self) -> SockRef<'_> {
        each!(self, socket => SockRef::from(socket))
    }
}

impl From<TcpStream> for AppStream {
    fn from(socket: TcpStream) -> Self {
        Self::Tcp(socket)
    }
}

impl From<UnixStream> for AppStream {
    fn from(socket: UnixStream) -> Self {
        Self::Unix(socket)
    }
}
