//! The plain proxy that Holdfast is compared with: tokio, one copy loop each way, nothing else.

use std::net::SocketAddr;
use std::process::ExitCode;

use crate::stdio::print_line;
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpStream};

/// Bytes of its buffers: where the cost per byte stops falling.
const BUFFER_BYTES: usize = 64 * 1024;

/// Arguments of the hidden `bench app-proxy`.
#[derive(Debug, clap::Args)]
pub struct ProxyArgs {
    /// Where to listen.
    #[arg(long)]
    listen: SocketAddr,
    /// Where every connection goes.
    #[arg(long)]
    to: SocketAddr,
}

/// Forwards until it is killed; the first line says where it listens.
pub fn run(args: &ProxyArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
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
                copy_bidirectional_with_sizes(&mut from, &mut to, BUFFER_BYTES, BUFFER_BYTES).await
            });
        }
    })
}
