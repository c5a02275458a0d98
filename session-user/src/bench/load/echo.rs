//! Servers for very many connections: they return every byte, or never read one.

use std::io;
use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::Context;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::super::programs::raise_descriptors;
use crate::stdio::print_line;

/// Connections that wait to be accepted.
const BACKLOG: u32 = 4096;
/// Bytes returned at once.
const CHUNK_BYTES: usize = 16 * 1024;

/// Arguments of the hidden `bench app-echo`.
#[derive(Debug, clap::Args)]
pub struct EchoArgs {
    /// Where every byte is returned; several with commas.
    #[arg(long, value_delimiter = ',')]
    listen: Vec<SocketAddr>,
    /// Where nothing is ever read; several with commas.
    #[arg(long, value_delimiter = ',')]
    mute: Vec<SocketAddr>,
}

/// Serves until it is killed; says so when it listens everywhere.
pub fn app(args: &EchoArgs) -> anyhow::Result<ExitCode> {
    raise_descriptors()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut servers = JoinSet::new();
        for (addresses, mute) in [(&args.listen, false), (&args.mute, true)] {
            for &at in addresses {
                let listener = listen(at).with_context(|| format!("cannot listen on {at}"))?;
                servers.spawn(serve(listener, mute));
            }
        }
        print_line("listens");
        match servers.join_next().await {
            Some(ended) => ended?.context("accepting"),
            None => Ok(()),
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

fn listen(at: SocketAddr) -> io::Result<TcpListener> {
    let socket = match at {
        SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4(),
        SocketAddr::V6(_) => tokio::net::TcpSocket::new_v6(),
    }?;
    socket.set_reuseaddr(true)?;
    socket.bind(at)?;
    socket.listen(BACKLOG)
}

async fn serve(listener: TcpListener, mute: bool) -> io::Result<()> {
    let mut unread = Vec::new();
    loop {
        let (socket, _) = listener.accept().await?;
        if mute {
            // They stand until this process ends.
            unread.push(socket);
            continue;
        }
        tokio::spawn(async move {
            // A connection that breaks is over; whoever made it knows.
            let _ = echo(socket).await;
        });
    }
}

async fn echo(socket: TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let mut left = Vec::new();
    loop {
        if left.is_empty() {
            socket.readable().await?;
            if !pump(&socket, &mut left)? {
                return Ok(());
            }
        } else {
            socket.writable().await?;
            match socket.try_write(&left) {
                Ok(n) => drop(left.drain(..n)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Returns what can be read, with what cannot be written in `left`; false at the end. The buffer is on the stack for
/// the moment, so that a connection that says nothing needs none.
fn pump(socket: &TcpStream, left: &mut Vec<u8>) -> io::Result<bool> {
    let mut buf = [0; CHUNK_BYTES];
    let n = match socket.try_read(&mut buf) {
        Ok(0) => return Ok(false),
        Ok(n) => n,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
        Err(error) => return Err(error),
    };
    let written = match socket.try_write(&buf[..n]) {
        Ok(written) => written,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
        Err(error) => return Err(error),
    };
    *left = buf[written..n].to_vec();
    Ok(true)
}
