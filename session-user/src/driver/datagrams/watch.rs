//! The news that a target's socket has an error: nobody has that port, or nobody is there.
//!
//! tokio wakes a reader for bytes and for ends, not for an error alone, which is all that ICMP brings (`EPOLLERR`).

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// Waits for errors of a socket.
pub(super) struct ErrorWatch(Pin<Box<dyn Future<Output = ()> + Send>>);

impl ErrorWatch {
    pub fn of(socket: &Arc<UdpSocket>) -> Self {
        let socket = Arc::clone(socket);
        Self(Box::pin(async move {
            if socket.ready(Interest::ERROR).await.is_err() {
                // The runtime ends.
                std::future::pending::<()>().await;
            }
        }))
    }

    /// Ready once when the socket that it was made for has an error.
    pub fn poll_told(&mut self, socket: &Arc<UdpSocket>, cx: &mut Context<'_>) -> Poll<()> {
        ready!(self.0.as_mut().poll(cx));
        // Taken note of: the next one is told again.
        let _ = socket.try_io(Interest::ERROR, || {
            Err::<(), _>(io::ErrorKind::WouldBlock.into())
        });
        *self = Self::of(socket);
        Poll::Ready(())
    }

    /// The error of the socket that it was made for, once there is one.
    pub fn poll(&mut self, socket: &Arc<UdpSocket>, cx: &mut Context<'_>) -> Poll<io::Error> {
        loop {
            ready!(self.poll_told(socket, cx));
            match SockRef::from(&**socket).take_error() {
                Ok(None) => {}
                Ok(Some(error)) | Err(error) => return Poll::Ready(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn an_error_is_told_to_whoever_waits_and_the_next_one_too() {
        let gone = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let nobody = gone.local_addr().unwrap();
        drop(gone);
        let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        socket.connect(nobody).await.unwrap();
        let mut watch = ErrorWatch::of(&socket);
        for _ in 0..2 {
            let told = std::future::poll_fn(|cx| watch.poll(&socket, cx));
            let asking = async {
                // Not before the other one waits: what is there already is found without a wake-up.
                tokio::time::sleep(Duration::from_millis(20)).await;
                SockRef::from(&*socket).send(b"anybody?")
            };
            let both = async { tokio::join!(told, asking) };
            let (error, asked) = tokio::time::timeout(Duration::from_secs(5), both)
                .await
                .unwrap();
            assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED));
            asked.unwrap();
        }
    }
}
