//! The application's end of a stream.

use std::any::Any;
use std::io::{self, IoSlice};
use std::net::{Shutdown, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// A connected stream socket of an application, or of a target.
#[derive(Debug)]
pub struct AppStream {
    socket: AppSocket,
    /// What was read from the socket already, and comes before the rest.
    read_already: Bytes,
    /// Waits for an error where nobody reads any more.
    watch: Option<ErrorWatch>,
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

/// What kind of socket it is.
///
/// A Unix socket knows no reset: where a TCP socket would be reset, it is closed.
#[derive(Debug)]
enum AppSocket {
    Tcp(Arc<TcpStream>),
    Unix(UnixStream),
}

/// Calls the same method on whichever socket it is.
macro_rules! each {
    ($socket:expr, $inner:ident => $call:expr) => {
        match &$socket {
            AppSocket::Tcp($inner) => $call,
            AppSocket::Unix($inner) => $call,
        }
    };
}

impl AppStream {
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

    /// As [`TcpStream::try_read_buf`].
    pub fn try_read_buf(&mut self, buf: &mut impl BufMut) -> io::Result<usize> {
        if self.read_already.is_empty() {
            return each!(self.socket, socket => socket.try_read_buf(buf));
        }
        let n = self.read_already.len().min(buf.remaining_mut());
        buf.put((&mut self.read_already).take(n));
        Ok(n)
    }

    /// As [`TcpStream::try_write_vectored`].
    pub fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        each!(self.socket, socket => socket.try_write_vectored(slices))
    }

    /// As [`TcpStream::poll_read_ready`].
    pub fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self.socket, socket => socket.poll_read_ready(cx))
    }

    /// As [`TcpStream::poll_write_ready`].
    pub fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self.socket, socket => socket.poll_write_ready(cx))
    }

    /// Address of the other end, if it has one.
    pub fn peer_addr(&self) -> Option<SocketAddr> {
        match &self.socket {
            AppSocket::Tcp(socket) => socket.peer_addr().ok(),
            AppSocket::Unix(_) => None,
        }
    }

    /// Ends one direction or both.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match &self.socket {
            AppSocket::Tcp(socket) => SockRef::from(&**socket).shutdown(how),
            AppSocket::Unix(socket) => SockRef::from(socket).shutdown(how),
        }
    }

    /// The socket's error, once it has one. For a socket whose other end has ended its direction: reading tells
    /// nothing any more, and a reset that follows would go unnoticed. Ready once.
    pub fn poll_error(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let AppSocket::Tcp(socket) = &self.socket else {
            // A Unix socket knows no reset.
            return Poll::Pending;
        };
        let watch = self.watch.get_or_insert_with(|| {
            let socket = Arc::clone(socket);
            ErrorWatch(Box::pin(async move {
                let told = socket.ready(Interest::ERROR).await;
                // Ready without an error says that both directions have ended in order.
                if told.is_ok_and(|ready| !ready.is_error()) {
                    std::future::pending::<()>().await;
                }
            }))
        });
        ready!(watch.0.as_mut().poll(cx));
        self.watch = Some(ErrorWatch(Box::pin(std::future::pending())));
        match SockRef::from(&**socket).take_error() {
            Ok(None) => Poll::Pending,
            Ok(Some(error)) | Err(error) => Poll::Ready(error),
        }
    }

    /// Bounds what the kernel queues of what is written, beyond what is under way (`TCP_NOTSENT_LOWAT`, tcp(7)), in
    /// bytes. A reader that reads nothing then holds its writer back after that much, instead of after a send buffer.
    pub fn bound_unsent(&self, bytes: u32) -> io::Result<()> {
        match &self.socket {
            AppSocket::Tcp(socket) => SockRef::from(&**socket).set_tcp_notsent_lowat(bytes),
            // Its queue is the reader's, and bounded by the writer's buffer (unix(7)).
            AppSocket::Unix(_) => Ok(()),
        }
    }

    /// Bounds what the kernel takes of an application on this host before it is read, in bytes (`SO_RCVBUF`, socket(7)).
    /// On a way that leaves the host the kernel knows better what it needs, and nothing changes.
    pub fn bound_unread(&self, bytes: usize) -> io::Result<()> {
        match &self.socket {
            AppSocket::Tcp(socket) if socket.peer_addr()?.ip().to_canonical().is_loopback() => {
                SockRef::from(&**socket).set_recv_buffer_size(bytes)
            }
            AppSocket::Tcp(_) | AppSocket::Unix(_) => Ok(()),
        }
    }

    /// What closing the socket means from now on: a reset, or an end in order.
    pub fn reset_on_close(&self, reset: bool) -> io::Result<()> {
        match &self.socket {
            AppSocket::Tcp(socket) => {
                SockRef::from(&**socket).set_linger(reset.then_some(Duration::ZERO))
            }
            AppSocket::Unix(_) => Ok(()),
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
            match self.try_read_buf(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read.map(drop)),
            }
        }
    }
}

impl AsyncWrite for AppStream {
    fn poll_write(
        self: Pin<&mut Self>,
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
        Self {
            socket: AppSocket::Tcp(Arc::new(socket)),
            read_already: Bytes::new(),
            watch: None,
            kept: None,
        }
    }
}

impl From<UnixStream> for AppStream {
    fn from(socket: UnixStream) -> Self {
        Self {
            socket: AppSocket::Unix(socket),
            read_already: Bytes::new(),
            watch: None,
            kept: None,
        }
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
        assert_eq!(stream.try_read_buf(&mut &mut first[..]).unwrap(), 4);
        assert_eq!(&first, b"the ");
        let mut out = Vec::with_capacity(64);
        assert_eq!(stream.try_read_buf(&mut out).unwrap(), 9);
        std::future::poll_fn(|cx| stream.poll_read_ready(cx))
            .await
            .unwrap();
        stream.try_read_buf(&mut out).unwrap();
        assert_eq!(out, b"beginning and the rest");
    }
}
