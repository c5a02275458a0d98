//! A port where anybody may ask: for hosts without eBPF, and for those who would rather be told of their resolver.
//!
//! What is not about captured names goes to the first of this host's resolvers that answers.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use resolv_conf::ScopedIp;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::answer::{Carrier, Reply};
use super::resolver::{MESSAGE_MAX, Resolver, Way};
use super::stream::{IDLE_TIMEOUT, read_message, write_message};
use crate::capture::DNS_PORT;

/// Questions by UDP that are being answered, and clients over TCP, at most; for each place. Beyond it they wait in the
/// kernel.
const BUSY_MAX: usize = 512;
/// Clients over TCP that may wait to be accepted.
const BACKLOG: i32 = 128;
/// Wait after a socket failed for want of descriptors or memory.
const RETRY: Duration = Duration::from_millis(100);
/// Time for one resolver to answer over TCP before the next is asked.
const ATTEMPT: Duration = Duration::from_secs(5);

/// Where the agent answers.
#[derive(Clone, Debug)]
pub struct Place {
    /// An address of this host.
    pub at: SocketAddr,
    /// Who may ask beside this host.
    pub from: Vec<IpNet>,
    /// Resolvers for what is not about captured names; empty means those of `resolv_conf`.
    pub upstream: Vec<SocketAddr>,
    /// Where this host says which resolvers it asks. It is read, never written.
    pub resolv_conf: PathBuf,
}

/// A place where the agent cannot answer.
#[derive(Debug, thiserror::Error)]
#[error("[dns] listen {at}: {source}")]
pub struct ListenError {
    /// Where it was to be.
    pub at: SocketAddr,
    /// Why not.
    #[source]
    pub source: io::Error,
}

/// Answers at all places until it is dropped.
#[derive(Debug, Default)]
pub struct Listening {
    tasks: JoinSet<()>,
}

impl Listening {
    /// Answers at these places, over UDP and TCP. Needs a tokio runtime.
    pub fn open(
        places: impl IntoIterator<Item = Place>,
        resolver: &Resolver,
    ) -> Result<Self, ListenError> {
        let mut tasks = JoinSet::new();
        let places: Vec<Place> = places.into_iter().collect();
        let own: Arc<[SocketAddr]> = places.iter().map(|place| place.at).collect();
        for place in places {
            let failed = |source| ListenError {
                at: place.at,
                source,
            };
            let udp = bind(place.at, Type::DGRAM).map_err(failed)?;
            let udp = UdpSocket::from_std(udp.into()).map_err(failed)?;
            let tcp = bind(place.at, Type::STREAM).map_err(failed)?;
            let tcp = TcpListener::from_std(tcp.into()).map_err(failed)?;
            tracing::info!(at = %place.at, "questions about names are answered");
            let desk = Arc::new(Desk {
                resolver: resolver.clone(),
                own: Arc::clone(&own),
                place,
            });
            tasks.spawn(datagrams(Arc::clone(&desk), Arc::new(udp)));
            tasks.spawn(streams(desk, tcp));
        }
        Ok(Self { tasks })
    }

    /// Answers no more.
    pub fn close(&mut self) {
        self.tasks.abort_all();
    }
}

fn bind(at: SocketAddr, kind: Type) -> io::Result<Socket> {
    let kind = kind.cloexec().nonblocking();
    let socket = Socket::new(Domain::for_address(at), kind, None::<Protocol>)?;
    if at.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if socket.r#type()? == Type::STREAM {
        socket.set_reuse_address(true)?;
    }
    socket.bind(&at.into())?;
    if socket.r#type()? == Type::STREAM {
        socket.listen(BACKLOG)?;
    }
    Ok(socket)
}

/// One place, and what is known there.
struct Desk {
    resolver: Resolver,
    /// All places of this agent.
    own: Arc<[SocketAddr]>,
    place: Place,
}

async fn datagrams(desk: Arc<Desk>, socket: Arc<UdpSocket>) {
    let busy = Arc::new(Semaphore::new(BUSY_MAX));
    let mut buffer = vec![0; MESSAGE_MAX];
    loop {
        let Ok(permit) = Arc::clone(&busy).acquire_owned().await else {
            return;
        };
        let (length, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            // An answer met a closed port: that is the client's affair.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
            Err(error) => {
                tracing::warn!(at = %desk.place.at, %error, "a question could not be received");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        if !desk.admits(from.ip()) {
            continue;
        }
        let question = buffer[..length].to_vec();
        let (desk, socket) = (Arc::clone(&desk), Arc::clone(&socket));
        tokio::spawn(async move {
            let _permit = permit;
            if let Some(answer) = desk.answer(&question, Carrier::Udp).await {
                // Datagrams may be lost.
                let _ = socket.send_to(&answer, from).await;
            }
        });
    }
}

async fn streams(desk: Arc<Desk>, listener: TcpListener) {
    let busy = Arc::new(Semaphore::new(BUSY_MAX));
    loop {
        let Ok(permit) = Arc::clone(&busy).acquire_owned().await else {
            return;
        };
        let (client, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(at = %desk.place.at, %error, "a client could not be accepted");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        if !desk.admits(from.ip()) {
            continue;
        }
        let desk = Arc::clone(&desk);
        tokio::spawn(async move {
            let _permit = permit;
            if let Err(error) = desk.serve(client).await {
                tracing::debug!(at = %desk.place.at, %from, %error, "a client over TCP has failed");
            }
        });
    }
}

impl Desk {
    fn admits(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        ip.is_loopback()
            || ip == self.place.at.ip()
            || self.place.from.iter().any(|net| net.contains(&ip))
    }

    async fn serve(&self, mut client: TcpStream) -> io::Result<()> {
        loop {
            let next = timeout(IDLE_TIMEOUT, read_message(&mut client)).await;
            let Some(question) = next.map_err(io::Error::from)?? else {
                return Ok(());
            };
            match self.answer(&question, Carrier::Tcp).await {
                Some(answer) => write_message(&mut client, &answer).await?,
                None => return Ok(()),
            }
        }
    }

    /// The answer; `None` if nobody has one.
    async fn answer(&self, question: &[u8], carrier: Carrier) -> Option<Vec<u8>> {
        match self.resolver.reply(question, carrier) {
            Reply::Answer(answer) => return Some(answer),
            Reply::Nothing => return None,
            Reply::Forward => {}
        }
        for upstream in self.upstream() {
            let answer = match carrier {
                Carrier::Udp => {
                    let asked = self.resolver.forward(question, upstream, &Way::Direct);
                    timeout(ATTEMPT, asked).await.ok()
                }
                Carrier::Tcp => {
                    let asked = ask_over_tcp(question, upstream);
                    let asked = timeout(ATTEMPT, asked).await.ok();
                    asked.map(|answer| answer.map_err(|e| e.raw_os_error().unwrap_or(libc::EIO)))
                }
            };
            match answer {
                Some(Ok(Some(answer))) => return Some(answer),
                other => {
                    tracing::debug!(%upstream, ?other, "a resolver gave no answer");
                }
            }
        }
        None
    }

    /// The resolvers, without the places of this agent, which would ask each other for ever.
    fn upstream(&self) -> Vec<SocketAddr> {
        let mut resolvers = self.place.upstream.clone();
        if resolvers.is_empty() {
            match fs::read(&self.place.resolv_conf) {
                Ok(text) => resolvers = named_in(&text),
                Err(error) => {
                    tracing::warn!(path = %self.place.resolv_conf.display(), %error, "it is not known which resolvers this host asks");
                }
            }
        }
        resolvers.retain(|resolver| !self.own.iter().any(|own| leads_to(*resolver, *own)));
        resolvers
    }
}

/// Whether what is sent to `to` comes to a socket that is bound to `own`.
fn leads_to(to: SocketAddr, own: SocketAddr) -> bool {
    let everywhere = own.ip().is_unspecified() && to.ip().is_loopback();
    to.port() == own.port() && (to.ip() == own.ip() || everywhere)
}

/// The resolvers that a resolv.conf names.
fn named_in(text: &[u8]) -> Vec<SocketAddr> {
    match resolv_conf::Config::parse(text) {
        Ok(config) => config.nameservers.iter().filter_map(place_of).collect(),
        Err(error) => {
            tracing::warn!(%error, "resolv.conf is not understood");
            Vec::new()
        }
    }
}

/// Where a resolver is; `None` if it is on a link that there is not.
fn place_of(resolver: &ScopedIp) -> Option<SocketAddr> {
    Some(match resolver {
        ScopedIp::V4(ip) => SocketAddr::from((*ip, DNS_PORT)),
        ScopedIp::V6(ip, None) => SocketAddr::from((*ip, DNS_PORT)),
        ScopedIp::V6(ip, Some(link)) => {
            // By its name, or by its number already.
            let by_name = nix::net::if_::if_nametoindex(link.as_str()).ok();
            let index = by_name.or_else(|| link.parse().ok())?;
            SocketAddrV6::new(*ip, DNS_PORT, 0, index).into()
        }
    })
}

async fn ask_over_tcp(question: &[u8], upstream: SocketAddr) -> io::Result<Option<Vec<u8>>> {
    let mut socket = TcpStream::connect(upstream).await?;
    write_message(&mut socket, question).await?;
    read_message(&mut socket).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_the_agent_ask_neither_themselves_nor_each_other() {
        let leads = |to: &str, own: &str| leads_to(to.parse().unwrap(), own.parse().unwrap());
        assert!(leads("127.0.0.1:53", "127.0.0.1:53") && leads("127.0.0.1:53", "0.0.0.0:53"));
        assert!(!leads("127.0.0.1:53", "127.0.0.1:5353") && !leads("192.0.2.1:53", "0.0.0.0:53"));
    }

    #[test]
    fn resolvers_are_read_from_resolv_conf() {
        let text = b"# comment\nsearch corp.example\nnameserver 192.0.2.53\nnameserver 2001:db8::53\noptions edns0 trust-ad\n";
        let expected: Vec<SocketAddr> = ["192.0.2.53:53", "[2001:db8::53]:53"]
            .map(|text| text.parse().unwrap())
            .to_vec();
        assert_eq!(named_in(text), expected);
        assert!(named_in(b"").is_empty());
    }
}
