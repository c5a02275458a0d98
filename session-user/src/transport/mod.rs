//! Transport sockets: TCP connections that are bound to one link, and UDP sockets beside them.
//!
//! A socket bound with SO_BINDTODEVICE uses only routes over that device, so that two transports
//! run over two links at once without any rule or mark in the host's routing.

mod error;
mod info;
mod pacing;
mod packets;
#[cfg(test)]
mod tests;
mod window;
mod write;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

pub use error::TransportError;
pub use info::{TcpInfo, tcp_info};
pub use pacing::{Losses, Paced, Pacing};
pub use packets::{Batch, PacketSocket, ReceiveRoom, WRITE_BYTES_MAX};
use ring::rand::{SecureRandom as _, SystemRandom};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
pub use window::{InitialWindow, WindowError};
pub use write::{slices_within, write_apart, write_together};

/// Connections that wait for `accept()`: a gateway whose clients all come back at once after an
/// outage must not refuse any.
const BACKLOG: i32 = 1024;

/// Connections of a listener that may have brought data in their SYN and not confirmed it yet. Beyond it
/// they are made in the usual way.
const FAST_OPEN_QUEUE: i32 = 256;

/// Receive window of a transport, in bytes: 800 Mbit/s at 40 ms, and somewhat more than the kernel
/// would come to by itself. An agent never stops reading a transport, so this much is not held for long.
const RECEIVE_BYTES: usize = 4 << 20;

/// The same connection in the current runtime, for one that was made in another: its thread would have to tell this one of
/// all that comes.
pub fn adopt(socket: TcpStream) -> std::io::Result<TcpStream> {
    TcpStream::from_std(socket.into_std()?)
}

/// Options of transport sockets, at both ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransportOptions {
    /// `TCP_NOTSENT_LOWAT` (tcp(7)): bytes that the kernel takes beyond what it has sent. What is
    /// above stays in user space, where a handover can still move it and newer data of another
    /// stream can pass it.
    pub notsent_lowat: u32,
    /// `TCP_USER_TIMEOUT` (RFC 5482): how long sent bytes may stay unacknowledged before the
    /// kernel gives the connection up. It counts while there are some ([`be_patient`]).
    pub user_timeout: Duration,
    /// `TCP_CONGESTION`. Where the kernel refuses it, the host's default stays.
    pub congestion: Congestion,
    /// Idle time before the first keep-alive probe: it finds a peer that vanished, and no more
    /// often than a NAT's usual timeout asks for. Each transport has a time of its own, up to a quarter less: those
    /// of many that were made at once would come at once, and be lost together.
    pub keepalive_idle: Duration,
    /// Time between keep-alive probes, at most. Each transport has one of its own, shorter by one or three tenths: those of
    /// many that were lost together would be lost together again.
    pub keepalive_interval: Duration,
    /// Unanswered keep-alive probes that end the connection.
    pub keepalive_probes: u32,
    /// TCP Fast Open (RFC 7413): taken from peers, and used where [`DialSpec::fast_open`] asks for it.
    pub fast_open: bool,
}

/// Which congestion control transports have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Congestion {
    /// The host's default.
    #[default]
    Host,
    /// [`Self::IDLE`] for what waits or sends little, [`Self::BULK`] for what sends much over a path that
    /// loses little.
    Auto,
    /// One by the kernel's name.
    Named(String),
}

impl Congestion {
    /// Its window outlives idleness: `tcp_slow_start_after_idle` leaves alone what has `cong_control`.
    pub const IDLE: &str = "bbr";
    /// It never stops of its own accord.
    pub const BULK: &str = "cubic";

    fn at_first(&self) -> Option<&str> {
        match self {
            Self::Host => None,
            Self::Auto => Some(Self::IDLE),
            Self::Named(name) => Some(name),
        }
    }
}

impl Default for TransportOptions {
    fn default() -> Self {
        Self {
            notsent_lowat: 128 * 1024,
            congestion: Congestion::Host,
            user_timeout: Duration::from_secs(20),
            keepalive_idle: Duration::from_secs(60),
            keepalive_interval: Duration::from_secs(10),
            keepalive_probes: 3,
            fast_open: true,
        }
    }
}

impl TransportOptions {
    /// `TCP_USER_TIMEOUT` of a connection that waits for nothing. Where it is set, the kernel ends a connection at the first
    /// unanswered keep-alive probe after it, however many it was told to send (`tcp_keepalive_timer` in
    /// net/ipv4/tcp_timer.c): it has to be longer than all of them take.
    fn idle_timeout(&self) -> Duration {
        let all_probes = self.keepalive_idle + self.keepalive_interval * self.keepalive_probes;
        self.user_timeout.max(all_probes)
    }

    /// When the first keep-alive probe of one connection is due. The kernel's timers of a minute are two seconds
    /// coarse.
    fn keepalive_idle_of_one(&self, drawn: [u8; 4]) -> Duration {
        let less = self.keepalive_idle / 4 * (u32::from_ne_bytes(drawn) >> 24) / 255;
        whole_seconds(self.keepalive_idle.saturating_sub(less))
    }

    /// When the next probes of one connection are due. Of the usual 10 s it is 7 or 9: even numbers of seconds would be as
    /// coarse as the first, for the kernel rounds them up to when it looks at those of others.
    fn keepalive_interval_of_one(&self, drawn: [u8; 4]) -> Duration {
        let tenths = if drawn[0] & 1 == 0 { 7 } else { 9 };
        whole_seconds(self.keepalive_interval * tenths / 10)
    }
}

/// As the kernel counts keep-alive times.
fn whole_seconds(time: Duration) -> Duration {
    Duration::from_secs(time.as_secs().max(1))
}

/// Where to dial, and over what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DialSpec {
    /// The link's name, for SO_BINDTODEVICE; `None`: whatever the routes say.
    pub device: Option<String>,
    /// The source address; `None`: the kernel's choice.
    pub source: Option<IpAddr>,
    /// The peer.
    pub remote: SocketAddr,
    /// Time for the connection to be made.
    pub timeout: Duration,
    /// Largest segment in either direction, in bytes, where the path loses larger packets; `None`: what
    /// the link's MTU allows.
    pub segment: Option<u16>,
    /// The first write may go in the SYN. [`dial`] may return then before anything was sent, and
    /// [`TcpInfo::is_opening`] tells until the peer has answered.
    pub fast_open: bool,
}

/// Dials one transport.
pub async fn dial(
    spec: &DialSpec,
    options: &TransportOptions,
) -> Result<TcpStream, TransportError> {
    let socket = prepare(spec, options).map_err(|error| TransportError::of(spec, error))?;
    match tokio::time::timeout(spec.timeout, socket.connect(spec.remote)).await {
        Ok(connected) => connected.map_err(|error| TransportError::of(spec, error)),
        Err(_) => Err(TransportError::timeout(spec)),
    }
}

fn prepare(spec: &DialSpec, options: &TransportOptions) -> std::io::Result<TcpSocket> {
    let socket = Socket::new(
        Domain::for_address(spec.remote),
        Type::STREAM.nonblocking(),
        Some(Protocol::TCP),
    )?;
    socket.bind_device(spec.device.as_deref().map(str::as_bytes))?;
    open_window(&socket);
    tune(SockRef::from(&socket), options)?;
    if let Some(segment) = spec.segment {
        // Before connect(): the SYN tells the peer.
        socket.set_tcp_mss(segment.into())?;
    }
    if spec.fast_open
        && options.fast_open
        && let Err(error) = info::fast_open_connect(&socket)
    {
        // The host may have turned it off; then the connection is made as ever.
        tracing::debug!(%error, "no TCP Fast Open");
    }
    if let Some(source) = spec.source {
        // The port is chosen at connect(): a bind() without this takes one for all destinations.
        info::bind_address_no_port(&socket)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    Ok(TcpSocket::from_std_stream(socket.into()))
}

/// Lets the peer send [`RECEIVE_BYTES`] at once. By itself the kernel offers 64 KiB at first and more
/// only as data comes, so that a standby that has been idle could not take a handover's worth of it.
/// Where the agent may not (CAP_NET_ADMIN), that stays as it is.
fn open_window(socket: &impl std::os::fd::AsFd) {
    use nix::sys::socket::{setsockopt, sockopt};
    if let Err(error) = setsockopt(socket, sockopt::RcvBufForce, &RECEIVE_BYTES) {
        tracing::debug!(%error, "the kernel chooses the receive window");
    }
}

fn tune(socket: SockRef<'_>, options: &TransportOptions) -> std::io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_notsent_lowat(options.notsent_lowat)?;
    socket.set_tcp_user_timeout(Some(options.idle_timeout()))?;
    if let Some(name) = options.congestion.at_first()
        && let Err(error) = socket.set_tcp_congestion(name.as_bytes())
    {
        static TOLD: std::sync::Once = std::sync::Once::new();
        TOLD.call_once(|| {
            tracing::warn!(%name, %error, "[transport] congestion: the kernel does not have it, or not for this agent; the host's default is used");
        });
    }
    let mut drawn = [0; 4];
    if SystemRandom::new().fill(&mut drawn).is_err() {
        tracing::debug!(
            "keep-alive probes of transports may come at once: the kernel gives no random bytes"
        );
    }
    let keepalive = TcpKeepalive::new()
        .with_time(options.keepalive_idle_of_one(drawn))
        .with_interval(options.keepalive_interval_of_one(drawn))
        .with_retries(options.keepalive_probes);
    socket.set_tcp_keepalive(&keepalive)
}

/// `patient`: `stream` waits for nothing, and ends when no keep-alive probe is answered; otherwise it ends when
/// what it sends is not acknowledged for [`TransportOptions::user_timeout`]. A new transport is patient.
pub fn be_patient(
    stream: &TcpStream,
    patient: bool,
    options: &TransportOptions,
) -> std::io::Result<()> {
    let timeout = if patient {
        options.idle_timeout()
    } else {
        options.user_timeout
    };
    SockRef::from(stream).set_tcp_user_timeout(Some(timeout))
}

/// Limits how fast `stream` sends, and with it what the kernel takes beyond what it has sent.
pub fn pace(stream: &TcpStream, paced: Paced, options: &TransportOptions) -> std::io::Result<()> {
    info::max_pacing_rate(stream, paced.limit)?;
    SockRef::from(stream).set_tcp_notsent_lowat(paced.unsent.min(options.notsent_lowat))
}

/// The kernel's name of the congestion control of `stream`, which may not be the one that was asked for.
pub fn congestion(stream: &TcpStream) -> Option<String> {
    let name = SockRef::from(stream).tcp_congestion().ok()?;
    let name = String::from_utf8_lossy(&name);
    Some(name.trim_end_matches('\0').to_owned())
}

/// Gives an accepted transport the options of a dialled one.
pub fn tune_accepted(stream: &TcpStream, options: &TransportOptions) -> std::io::Result<()> {
    tune(SockRef::from(stream), options)
}

/// Listens for transports. An IPv6 address takes IPv6 only, so that `[::]` and `0.0.0.0` can both
/// be given. `fast_open`: data in a SYN is taken, where the host allows it.
pub fn listen(addr: SocketAddr, fast_open: bool) -> std::io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(addr),
        Type::STREAM.nonblocking(),
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    open_window(&socket);
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    let queue = if fast_open { FAST_OPEN_QUEUE } else { 0 };
    // After listen(), because a host may turn it on for all listeners (net.ipv4.tcp_fastopen & 0x400),
    // which happens there.
    if let Err(error) = info::fast_open_queue(&socket, queue) {
        tracing::debug!(%error, "no TCP Fast Open");
    }
    TcpListener::from_std(socket.into())
}
