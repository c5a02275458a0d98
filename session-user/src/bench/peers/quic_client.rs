//! The QUIC tunnel's end at the client: every connection becomes a stream. It binds its socket to the
//! best link, and binds anew (quinn's `Endpoint::rebind`) when that link is lost, when a better one
//! is there, or, if it is told to, when nothing comes back.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;
use quinn::{ClientConfig, Connection, Endpoint, EndpointConfig, TokioRuntime, TransportConfig};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpStream};

use super::follow::best;
use super::quic::{PROBE, SERVER_NAME};
use super::quic_server::BUFFER_BYTES;
use crate::link::{LinkMonitor, LinkSnapshot, MonitorConfig};
use crate::stdio::{print_line, say};

/// So many probes go out in the time of silence that is allowed, and so often it looks for answers.
const PROBES_PER_SILENCE: u32 = 3;
const LOOKS_PER_SILENCE: u32 = 15;
/// After a move so many datagrams of this size follow. A server sends at most three times the bytes
/// that it has received on a path which is not validated (RFC 9000, section 8.2): a few small packets
/// would let it answer only after a tenth of a second.
const CREDIT: [u8; 1100] = [0; 1100];
const CREDITS: usize = 3;
/// After a move silence is no sign for this long, beside four round trips: the path must be validated,
/// what was lost on the old one fills the windows, and the server's pacing begins anew.
const PATIENCE: Duration = Duration::from_millis(300);
/// Less than half of the 30 s after which quinn gives an idle connection up: between two measurements others have their turn.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// A link on which nothing came back is not preferred for this long, unless it goes and comes back.
const DEMOTION: Duration = Duration::from_secs(5);

/// Arguments of the hidden `bench peer quic-client`.
#[derive(Debug, clap::Args)]
pub struct ClientArgs {
    /// The tunnel's other end (UDP).
    #[arg(long)]
    server: SocketAddr,
    /// Its certificate (DER).
    #[arg(long)]
    certificate: PathBuf,
    /// The links, best first.
    #[arg(long, value_delimiter = ',')]
    links: Vec<String>,
    /// Probes, and moves to the next link after so many milliseconds without a packet; 0: never.
    #[arg(long, default_value_t = 0)]
    silence_ms: u32,
}

/// Forwards until it is killed; the first line says where it listens, on loopback.
pub fn run(args: &ClientArgs) -> anyhow::Result<()> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(std::fs::read(&args.certificate)?))?;
    let mut config = ClientConfig::with_root_certificates(Arc::new(roots))?;
    let mut transport = TransportConfig::default();
    transport.keep_alive_interval(Some(KEEP_ALIVE));
    config.transport_config(Arc::new(transport));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut monitor = LinkMonitor::start(&MonitorConfig::default())?;
        let mut snapshot = monitor.snapshot();
        let (link, socket) = loop {
            if let Some(bound) = bind(&snapshot, &args.links, args.server)? {
                break bound;
            }
            snapshot = monitor.changed().await?;
        };
        let runtime = Arc::new(TokioRuntime);
        let mut endpoint = Endpoint::new(EndpointConfig::default(), None, socket, runtime)?;
        endpoint.set_default_client_config(config);
        let connection = endpoint.connect(args.server, SERVER_NAME)?.await?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        print_line(listener.local_addr()?);
        tokio::spawn(accept(listener, connection.clone()));
        let mut mover = Mover {
            args,
            endpoint,
            connection,
            link,
            demoted: None,
        };
        mover.follow(&mut monitor).await
    })
}

async fn accept(listener: TcpListener, connection: Connection) -> anyhow::Result<()> {
    loop {
        let (socket, _) = listener.accept().await?;
        tokio::spawn(forward(socket, connection.clone()));
    }
}

async fn forward(mut socket: TcpStream, connection: Connection) -> anyhow::Result<()> {
    socket.set_nodelay(true)?;
    let (send, recv) = connection.open_bi().await?;
    let mut stream = tokio::io::join(recv, send);
    copy_bidirectional_with_sizes(&mut socket, &mut stream, BUFFER_BYTES, BUFFER_BYTES).await?;
    Ok(())
}

/// A socket on the best link to `server`, with the link's name and address.
fn bind(
    snapshot: &LinkSnapshot,
    links: &[String],
    server: SocketAddr,
) -> anyhow::Result<Option<(Bound, UdpSocket)>> {
    let Some((link, source)) = best(snapshot, links, server.ip()) else {
        return Ok(None);
    };
    let socket = Socket::new(
        Domain::for_address(server),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    socket.bind_device(Some(link.name.as_bytes()))?;
    socket
        .bind(&SocketAddr::new(source, 0).into())
        .with_context(|| format!("no socket can be bound to {source} on {}", link.name))?;
    let bound = Bound {
        name: link.name.clone(),
        source,
    };
    Ok(Some((bound, socket.into())))
}

/// Where the socket is bound.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bound {
    name: String,
    source: IpAddr,
}

/// Moves the tunnel's socket.
struct Mover<'a> {
    args: &'a ClientArgs,
    endpoint: Endpoint,
    connection: Connection,
    link: Bound,
    /// A link on which nothing came back, and until when that counts.
    demoted: Option<(String, Instant)>,
}

impl Mover<'_> {
    /// Follows the links until the connection ends.
    async fn follow(&mut self, monitor: &mut LinkMonitor) -> anyhow::Result<()> {
        let silence = Duration::from_millis(self.args.silence_ms.into());
        let mut probe_at = Instant::now();
        let (mut heard, mut heard_at) = (0, Instant::now());
        let mut patient_until = heard_at + self.patience();
        loop {
            let look = tokio::time::sleep(silence / LOOKS_PER_SILENCE);
            tokio::select! {
                error = self.connection.closed() => bail!("the tunnel has ended: {error}"),
                news = monitor.changed() => {
                    let snapshot = news?;
                    self.demoted.take_if(|(name, _)| snapshot.lost().any(|lost| lost == name));
                    if self.choose(&snapshot)? {
                        patient_until = Instant::now() + self.patience();
                    }
                }
                () = look, if !silence.is_zero() => {}
            }
            if silence.is_zero() {
                continue;
            }
            let now = Instant::now();
            let count = self.connection.stats().udp_rx.datagrams;
            if count != heard {
                (heard, heard_at) = (count, now);
            }
            if now >= probe_at {
                // A probe that cannot be sent is not answered, and that is noticed below.
                let _ = self.connection.send_datagram(Bytes::from_static(PROBE));
                probe_at = now + silence / PROBES_PER_SILENCE;
            }
            if now >= patient_until && now.duration_since(heard_at) >= silence {
                say(format_args!(
                    "nothing came over {} for {:?}",
                    self.link.name,
                    now.duration_since(heard_at)
                ));
                self.demoted = Some((self.link.name.clone(), now + DEMOTION));
                self.choose(&monitor.snapshot())?;
                patient_until = now + self.patience();
            }
            if self.demoted.take_if(|(_, until)| *until <= now).is_some()
                && self.choose(&monitor.snapshot())?
            {
                patient_until = now + self.patience();
            }
        }
    }

    fn patience(&self) -> Duration {
        PATIENCE + self.connection.rtt() * 4
    }

    /// Moves to the best link, if that is another one; returns whether it has.
    fn choose(&mut self, snapshot: &LinkSnapshot) -> anyhow::Result<bool> {
        let mut links = self.args.links.clone();
        // What is demoted is better than nothing.
        links.sort_by_key(|name| self.demoted.as_ref().is_some_and(|(link, _)| link == name));
        match bind(snapshot, &links, self.args.server)? {
            Some((bound, socket)) if bound != self.link => {
                self.endpoint.rebind(socket)?;
                self.link = bound;
                for _ in 0..CREDITS {
                    // Where the path takes no such datagram, its other packets must do.
                    let _ = self.connection.send_datagram(Bytes::from_static(&CREDIT));
                }
                Ok(true)
            }
            // Nothing better, or nothing at all: what is bound stays.
            _ => Ok(false),
        }
    }
}
