//! The plain proxies that Holdfast is compared with: tokio, one loop each way, nothing else. The bytes are copied, or stay in
//! the kernel.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::AsFd;
use std::process::ExitCode;

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;
use socket2::SockRef;
use tokio::io::{Interest, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream};

use crate::stdio::print_line;

/// Bytes of its buffers: where the cost per byte stops falling.
const BUFFER_BYTES: usize = 64 * 1024;
/// Bytes that a pipe between two sockets may hold: what an unprivileged process may ask for (pipe(7)).
const PIPE_BYTES: i32 = 1 << 20;

/// Arguments of the hidden `bench app-proxy`.
#[derive(Debug, clap::Args)]
pub struct ProxyArgs {
    /// Where to listen.
    #[arg(long)]
    listen: SocketAddr,
    /// Where every connection goes.
    #[arg(long)]
    to: SocketAddr,
    /// With splice(2): nothing is copied to this process.
    #[arg(long)]
    splice: bool,
}

/// Forwards until it is killed; the first line says where it listens.
pub fn run(args: &ProxyArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let splices = args.splice;
    runtime.block_on(async {
        let listener = TcpListener::bind(args.listen).await?;
        print_line(listener.local_addr()?);
        loop {
            let (mut from, _) = listener.accept().await?;
            let to = args.to;
            tokio::spawn(async move {
                let mut to = TcpStream::connect(to).await?;
                from.set_nodelay(true)?;
                to.set_nodelay(true)?;
                if splices {
                    let both = tokio::try_join!(splice_all(&from, &to), splice_all(&to, &from));
                    return both.map(|_| ());
                }
                copy_bidirectional_with_sizes(&mut from, &mut to, BUFFER_BYTES, BUFFER_BYTES)
                    .await
                    .map(|_| ())
            });
        }
    })
}

/// Moves all that comes `from` one socket `to` the other, and then its end.
async fn splice_all(from: &TcpStream, to: &TcpStream) -> io::Result<()> {
    let (out, into) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
    // Less is slower, and nothing else.
    let _ = fcntl(&into, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES));
    loop {
        // The pipe is empty: only the socket can make it wait.
        let read = || splice_once(from, &into, PIPE_BYTES as usize);
        let mut left = from.async_io(Interest::READABLE, read).await?;
        if left == 0 {
            return SockRef::from(to).shutdown(Shutdown::Write);
        }
        while left > 0 {
            let write = || splice_once(&out, to, left);
            left -= to.async_io(Interest::WRITABLE, write).await?;
        }
    }
}

fn splice_once(from: &impl AsFd, to: &impl AsFd, bytes: usize) -> io::Result<usize> {
    let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
    Ok(splice(from, None, to, None, bytes, flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn pair() -> io::Result<(TcpStream, TcpStream)> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let to = listener.local_addr()?;
        let (near, far) = tokio::try_join!(TcpStream::connect(to), listener.accept())?;
        Ok((near, far.0))
    }

    #[tokio::test]
    async fn every_byte_and_the_end_come_through_a_pipe() {
        let (mut near, from) = pair().await.unwrap();
        let (to, mut far) = pair().await.unwrap();
        let sent: Vec<u8> = (0..5_000_000_u32).map(|n| (n * 31 % 251) as u8).collect();
        let send = async {
            near.write_all(&sent).await.unwrap();
            near.shutdown().await.unwrap();
        };
        let mut got = Vec::new();
        let ((), moved, read) =
            tokio::join!(send, splice_all(&from, &to), far.read_to_end(&mut got));
        moved.unwrap();
        read.unwrap();
        assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
    }
}
