//! Writes after which the kernel does not hold more than it should.
//!
//! `TCP_NOTSENT_LOWAT` is looked at when a buffer is begun, and one buffer takes 45 segments: on a slow
//! link that is 10 ms and more, which nothing can pass, and by which one of two redundant transports may
//! lag. `MSG_EOR` ends a buffer (net/ipv4/tcp.c, `tcp_skb_can_collapse_to`).

use std::io::{self, IoSlice};

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// How many of `slices` are `most` bytes or less together; one at least.
pub fn slices_within(slices: &[IoSlice<'_>], most: usize) -> usize {
    let mut sum = 0;
    let fits = |slice: &&IoSlice<'_>| {
        sum += slice.len();
        sum <= most
    };
    slices.iter().take_while(fits).count().max(1)
}

/// Writes without waiting, like [`TcpStream::try_write_vectored`]; what follows begins another buffer.
pub fn write_apart(stream: &TcpStream, slices: &[IoSlice<'_>]) -> io::Result<usize> {
    let flags = libc::MSG_EOR | libc::MSG_NOSIGNAL;
    stream.try_io(Interest::WRITABLE, || {
        SockRef::from(stream).send_vectored_with_flags(slices, flags)
    })
}

/// Writes `slices`, of which the kernel takes as much as it has room for.
pub fn write_together(stream: &TcpStream, slices: &[IoSlice<'_>]) -> io::Result<usize> {
    match slices {
        // The kernel has less to do for one slice, and a record that is said for itself is one.
        [one] => stream.try_write(one),
        several => stream.try_write_vectored(several),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[test]
    fn whole_slices_and_never_none() {
        let bytes = [0; 100];
        let slices = [IoSlice::new(&bytes), IoSlice::new(&bytes)];
        assert_eq!(slices_within(&slices, 50), 1);
        assert_eq!(slices_within(&slices, 199), 1);
        assert_eq!(slices_within(&slices, 200), 2);
    }

    #[tokio::test]
    async fn buffers_end_where_writes_do() -> io::Result<()> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let to = listener.local_addr()?;
        let (near, far) = tokio::join!(TcpStream::connect(to), listener.accept());
        let (near, (mut far, _)) = (near?, far?);
        // Readiness may be told for nothing: both wait until there is something.
        let written = near.async_io(Interest::WRITABLE, || {
            write_apart(&near, &[IoSlice::new(b"ab"), IoSlice::new(b"c")])
        });
        assert_eq!(written.await?, 3);
        let mut buf = [0; 8];
        assert_eq!(far.read(&mut buf).await?, 3);
        Ok(())
    }
}
