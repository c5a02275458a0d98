//! The QUIC tunnel's end at the server: every stream becomes a connection to one address.

use std::net::SocketAddr;
use std::path::PathBuf;

use quinn::{Connection, Endpoint, Incoming, ServerConfig};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::TcpStream;

use super::quic::PROBE;
use crate::stdio::{print_line, say};

/// Bytes of each copy's buffer.
pub const BUFFER_BYTES: usize = 64 * 1024;

/// Arguments of the hidden `bench peer quic-server`.
#[derive(Debug, clap::Args)]
pub struct ServerArgs {
    /// Where to listen (UDP).
    #[arg(long)]
    listen: SocketAddr,
    /// Where every stream goes (TCP).
    #[arg(long)]
    to: SocketAddr,
    /// Its certificate (DER).
    #[arg(long)]
    certificate: PathBuf,
    /// The key to it (PKCS #8, DER).
    #[arg(long)]
    key: PathBuf,
}

/// Serves until it is killed; the first line says where.
pub fn run(args: &ServerArgs) -> anyhow::Result<()> {
    let certificate = CertificateDer::from(std::fs::read(&args.certificate)?);
    let key = PrivatePkcs8KeyDer::from(std::fs::read(&args.key)?);
    let config = ServerConfig::with_single_cert(vec![certificate], key.into())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let endpoint = Endpoint::server(config, args.listen)?;
        print_line(endpoint.local_addr()?);
        while let Some(incoming) = endpoint.accept().await {
            let to = args.to;
            tokio::spawn(async move {
                if let Err(error) = serve(incoming, to).await {
                    say(format_args!("{error:#}"));
                }
            });
        }
        Ok(())
    })
}

async fn serve(incoming: Incoming, to: SocketAddr) -> anyhow::Result<()> {
    let connection = incoming.await?;
    tokio::spawn(echo(connection.clone()));
    loop {
        let (send, recv) = connection.accept_bi().await?;
        tokio::spawn(async move {
            let mut target = TcpStream::connect(to).await?;
            target.set_nodelay(true)?;
            let mut stream = tokio::io::join(recv, send);
            copy_bidirectional_with_sizes(&mut target, &mut stream, BUFFER_BYTES, BUFFER_BYTES)
                .await
        });
    }
}

/// Answers probes until the connection ends.
async fn echo(connection: Connection) {
    while let Ok(datagram) = connection.read_datagram().await {
        if datagram != PROBE {
            continue;
        }
        // A probe that cannot be answered is what its sender wants to know of.
        let _ = connection.send_datagram(datagram);
    }
}
