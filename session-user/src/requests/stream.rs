//! The application's end of a stream.

use std::any::Any;
use std::io::{self, IoSlice};
use std::net::{Shutdown, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use socket2::{SockRef, Socket};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use super::marked::{MarkedSocket, Taken};

/// See [`AppStream::bound_unsent`], in bytes.
const UNSENT_MAX: u32 = 256 * 1024;

/// A connected stream socket of an application, or of a target.
#[derive(Debug)]
pub struct AppStream {
    socket: AppSocket,
    /// The other end, where it is known.
    peer: Option<SocketAddr>,
    /// What was read from the socket already, and comes before the rest.
    read_already: Bytes,
    /// Waits for an error where nobody reads any more.
    watch: Option<ErrorWatch>,
    /// Is told how much is read: see [`Self::past_tcp`]. Behind the socket, and so dropped after it.
    tally: Option<Box<dyn PastTcp>>,
    /// What must live as long as the connection does.
    #[expect(dead_code, reason = "dropped with it, not read")]
    kept: Option<Box<dyn Any + Send + Sync>>,
}

/// Ends when the socket has an error.
struct ErrorWatch(Pin<Box<dyn Future<Output = ()> + Send>>);

impl std::fmt::Debug for ErrorWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ErrorWatch")
    }
}

/// Is told of reads: see [`AppStream::past_tcp`].
pub trait PastTcp: std::fmt::Debug + Send + Sync {
    /// The socket is about to be read.
    fn about_to_read(&self);
    /// So many bytes were read from it.
    fn have_read(&self, bytes: usize);
}

/// What kind of socket it is.
///
/// A Unix socket knows no reset: where a TCP socket would be reset, it is closed.
#[derive(Debug)]
enum AppSocket {
    Tcp(TcpStream),
    /// The same, in no runtime yet: for [`AppStream::marked`].
    Accepted(Socket),
    /// The same, where urgent data is seen.
    Marked(MarkedSocket),
    Unix(UnixStream),
}

/// Calls the same method on whichever socket it is.
macro_rules! each {
    ($socket:expr, $inner:ident => $call:expr, $error:ident => $failed:expr) => {
        match $socket {
            AppSocket::Tcp($inner) => $call,
            AppSocket::Marked($inner) => $call,
            AppSocket::Unix($inner) => $call,
            AppSocket::Accepted(_) => {
                let $error = not_yet();
                $failed
            }
        }
    };
}

/// A bug of ours, for which no application should lose more than its connection.
fn not_yet() -> io::Error {
    io::Error::other("the socket is in no runtime yet")
}

impl AppStream {
    /// Gives a listener the options that the sockets of [`Self::accepted`] have of it (`sk_clone_lock` of net/core/sock.c), so
    /// that they are not set for each: what is written goes at once, urgent data is seen at its place, a close that was not
    /// put in order is a reset, and what waits unsent is bounded as by [`Self::bound_unsent`].
    pub fn prepare(listener: &Socket) -> io::Result<()> {
        listener.set_tcp_nodelay(true)?;
        listener.set_out_of_band_inline(true)?;
        listener.set_linger(Some(Duration::ZERO))?;
        listener.set_tcp_notsent_lowat(UNSENT_MAX)
    }

    /// A TCP socket that `peer` has connected to and that does not block, of a listener that was [prepared](Self::prepare). It
    /// is of use only once it is [`Self::marked`], in the runtime of whoever uses it.
    pub fn accepted(socket: Socket, peer: SocketAddr) -> Self {
        Self::with(AppSocket::Accepted(socket), Some(peer))
    }

    /// One that has connected to `peer`, and is [registered](super::register) in the current runtime.
    pub fn dialled(fd: AsyncFd<Socket>, peer: SocketAddr) -> Self {
        let socket = MarkedSocket::registered(fd);
        Self::with(AppSocket::Marked(socket), Some(peer))
    }

    fn with(socket: AppSocket, peer: Option<SocketAddr>) -> Self {
        Self {
            socket,
            peer,
            read_already: Bytes::new(),
            watch: None,
            tally: None,
            kept: None,
        }
    }

    /// The same with bytes that were read from the socket already.
    pub fn behind(self, read_already: Bytes) -> Self {
        Self {
            read_already,
            ..self
        }
    }

    /// The same with something that is dropped with it.
    pub fn keeping(self, kept: impl Any + Send + Sync) -> Self {
        Self {
            kept: Some(Box::new(kept)),
            ..self
        }
    }

    /// The same for a socket whose bytes may come past TCP; `tally` is told of all that are read. Where they do the kernel
    /// answers neither how many wait nor which of them is urgent, so none is.
    pub fn past_tcp(self, tally: impl PastTcp + 'static) -> Self {
        Self {
            tally: Some(Box::new(tally)),
            ..self
        }
    }

    /// The same for one who minds urgent data: reads tell of it, and it can be written. Only in the runtime in which the
    /// socket is used from here on. After an error the socket is gone.
    pub fn marked(self) -> io::Result<Self> {
        let socket = match self.socket {
            AppSocket::Tcp(socket) => {
                let socket = Socket::from(socket.into_std()?);
                AppSocket::Marked(MarkedSocket::new(socket, self.tally.is_some())?)
            }
            AppSocket::Accepted(socket) => {
                AppSocket::Marked(MarkedSocket::prepared(socket, self.tally.is_some())?)
            }
            AppSocket::Marked(mut socket) => {
                socket.past_tcp = self.tally.is_some();
                AppSocket::Marked(socket)
            }
            // A Unix stream knows none.
            AppSocket::Unix(socket) => AppSocket::Unix(UnixStream::from_std(socket.into_std()?)?),
        };
        Ok(Self { socket, ..self })
    }

    /// As [`TcpStream::try_read_buf`]. Once [`Self::marked`], a read ends before an urgent byte, and the next one begins
    /// with it and says so. `buf` must have room.
    pub fn try_read(&mut self, buf: &mut impl BufMut) -> io::Result<Taken> {
        let plain = |bytes| Taken {
            bytes,
            urgent: false,
        };
        if !self.read_already.is_empty() {
            let n = self.read_already.len().min(buf.remaining_mut());
            buf.put((&mut self.read_already).take(n));
            return Ok(plain(n));
        }
        if let Some(tally) = &self.tally {
            tally.about_to_read();
        }
        let taken = match &mut self.socket {
            AppSocket::Tcp(socket) => plain(socket.try_read_buf(buf)?),
            AppSocket::Marked(socket) => socket.try_read(buf)?,
            AppSocket::Unix(socket) => plain(socket.try_read_buf(buf)?),
            AppSocket::Accepted(_) => return Err(not_yet()),
        };
        if let Some(tally) = &self.tally {
            tally.have_read(taken.bytes);
        }
        Ok(taken)
    }

    /// As [`TcpStream::try_write_vectored`].
    pub fn try_write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        each!(&mut self.socket, socket => socket.try_write_vectored(slices), error => Err(error))
    }

    /// Writes one byte as urgent data. Where there is none, it goes as any other.
    pub fn try_write_urgent(&mut self, byte: u8) -> io::Result<usize> {
        match &mut self.socket {
            AppSocket::Marked(socket) => socket.try_write_urgent(byte),
            AppSocket::Tcp(_) | AppSocket::Unix(_) | AppSocket::Accepted(_) => {
                self.try_write_vectored(&[IoSlice::new(&[byte])])
            }
        }
    }

    /// As [`TcpStream::poll_read_ready`].
    pub fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(&self.socket, socket => socket.poll_read_ready(cx), error => Poll::Ready(Err(error)))
    }

    /// As [`TcpStream::poll_write_ready`].
    pub fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(&self.socket, socket => socket.poll_write_ready(cx), error => Poll::Ready(Err(error)))
    }

    /// Address of the other end, if it has one.
    pub fn peer_addr(&self) -> Option<SocketAddr> {
        let asked = || self.tcp()?.peer_addr().ok()?.as_socket();
        self.peer.or_else(asked)
    }

    /// The socket, if it is one of TCP.
    pub(crate) fn tcp(&self) -> Option<SockRef<'_>> {
        match &self.socket {
            AppSocket::Tcp(socket) => Some(SockRef::from(socket)),
            AppSocket::Marked(socket) => Some(SockRef::from(socket.fd.get_ref())),
            AppSocket::Accepted(socket) => Some(SockRef::from(socket)),
            AppSocket::Unix(_) => None,
        }
    }

    /// Ends one direction or both.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match &self.socket {
            AppSocket::Tcp(socket) => SockRef::from(socket).shutdown(how),
            AppSocket::Marked(socket) => socket.fd.get_ref().shutdown(how),
            AppSocket::Accepted(socket) => socket.shutdown(how),
            AppSocket::Unix(socket) => SockRef::from(socket).shutdown(how),
        }
    }

    /// The socket's error, once it has one. For a socket whose other end has ended its direction: reading tells
    /// nothing any more, and a reset that follows would go unnoticed. Ready once, and only once [`Self::marked`].
    pub fn poll_error(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let AppSocket::Marked(socket) = &self.socket else {
            // A Unix socket knows no reset.
            return Poll::Pending;
        };
        let watch = self.watch.get_or_insert_with(|| {
            let fd = Arc::clone(&socket.fd);
            ErrorWatch(Box::pin(async move {
                let told = fd.ready(Interest::ERROR).await;
                // Ready without an error says that both directions have ended in order.
                let in_order = told.is_ok_and(|told| !told.ready().is_error());
                if in_order {
                    std::future::pending::<()>().await;
                }
            }))
        });
        ready!(watch.0.as_mut().poll(cx));
        self.watch = Some(ErrorWatch(Box::pin(std::future::pending())));
        match socket.fd.get_ref().take_error() {
            Ok(None) => Poll::Pending,
            Ok(Some(error)) | Err(error) => Poll::Ready(error),
        }
    }

    /// Bounds what the kernel queues of what is written, beyond what is under way (`TCP_NOTSENT_LOWAT`, tcp(7)), to 256 KiB:
    /// enough that a reader never waits for us, little enough that a stuck one is felt at the other end. A reader that reads
    /// nothing then holds its writer back after that much, instead of after a send buffer.
    pub fn bound_unsent(&self) -> io::Result<()> {
        match &self.socket {
            // Of its listener.
            AppSocket::Accepted(_) => Ok(()),
            // The queue of a Unix socket is the reader's, and bounded by the writer's buffer (unix(7)).
            _ => self
                .tcp()
                .map_or(Ok(()), |socket| socket.set_tcp_notsent_lowat(UNSENT_MAX)),
        }
    }

    /// Bounds what the kernel takes of an application on this host before it is read, in bytes (`SO_RCVBUF`, socket(7)).
    /// On a way that leaves the host the kernel knows better what it needs, and nothing changes.
    pub fn bound_unread(&self, bytes: usize) -> io::Result<()> {
        // What is dialled as no address in particular is this host.
        let here = |addr: SocketAddr| {
            let ip = addr.ip().to_canonical();
            ip.is_loopback() || ip.is_unspecified()
        };
        match self.tcp() {
            Some(socket) if self.peer_addr().is_some_and(here) => {
                socket.set_recv_buffer_size(bytes)
            }
            _ => Ok(()),
        }
    }

    /// What closing the socket means from now on: a reset, or an end in order.
    pub fn reset_on_close(&self, reset: bool) -> io::Result<()> {
        match self.tcp() {
            Some(socket) => socket.set_linger(reset.then_some(Duration::ZERO)),
            None => Ok(()),
        }
    }
}

/// For those who serve an application themselves.
impl AsyncRead for AppStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        loop {
            if self.read_already.is_empty() {
                ready!(self.poll_read_ready(cx))?;
            }
            match self.try_read(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read.map(drop)),
            }
        }
    }
}

impl AsyncWrite for AppStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.poll_write_ready(cx))?;
            match self.try_write_vectored(&[IoSlice::new(data)]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.shutdown(Shutdown::Write))
    }
}

impl From<TcpStream> for AppStream {
    fn from(socket: TcpStream) -> Self {
        Self::with(AppSocket::Tcp(socket), None)
    }
}

impl From<UnixStream> for AppStream {
    fn from(socket: UnixStream) -> Self {
        Self::with(AppSocket::Unix(socket), None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    #[tokio::test]
    async fn what_was_read_already_comes_first() {
        let (mut far, near) = UnixStream::pair().unwrap();
        far.write_all(b" and the rest").await.unwrap();
        let mut stream = AppStream::from(near).behind(Bytes::from_static(b"the beginning"));
        let mut first = [0; 4];
        assert_eq!(stream.try_read(&mut &mut first[..]).unwrap().bytes, 4);
        assert_eq!(&first, b"the ");
        let mut out = Vec::with_capacity(64);
        assert_eq!(stream.try_read(&mut out).unwrap().bytes, 9);
        std::future::poll_fn(|cx| stream.poll_read_ready(cx))
            .await
            .unwrap();
        stream.try_read(&mut out).unwrap();
        assert_eq!(out, b"beginning and the rest");
    }
}
