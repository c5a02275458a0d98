//! What cases use: the peer program's other end of the control connection, sockets, events.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::seen::{poll_names, stopped};
use super::sys::{self, PollFlags};
use super::wire::{Answer, Ask, Step, Tcp, Udp, UdpHow};
use super::world::Place;
use super::{Family, Seen, cases, peer};

/// How long cases wait for an event that should come.
const EVENT_LIMIT: Duration = Duration::from_secs(4);
/// Events that have not changed for so long are taken to be all that there are.
const SETTLED: Duration = Duration::from_millis(100);

/// What to run.
pub struct ClientArgs {
    /// The case.
    pub case: String,
    /// How it reaches the target.
    pub family: Family,
    /// The peer program.
    pub control: SocketAddr,
    /// The router's link-local address.
    pub link_local: Ipv6Addr,
}

/// What a case's process says on its standard output.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// What it saw.
    pub seen: Seen,
    /// How many TCP connects it made to destinations that are captured.
    pub connects: u64,
}

/// Runs one case in this process.
pub fn client(args: &ClientArgs) -> anyhow::Result<Outcome> {
    let case = cases::all().find(|c| c.name == args.case);
    let case = case.with_context(|| format!("there is no case `{}`", args.case))?;
    peer::raise_open_files();
    let control = TcpStream::connect(args.control)
        .with_context(|| format!("no peer program at {}", args.control))?;
    let peer = Peer {
        family: args.family,
        link_local: args.link_local,
        control: Mutex::new(BufReader::new(control)),
        connects: AtomicU64::new(0),
    };
    let mut seen = Seen::default();
    if let Err(error) = (case.act)(&peer, &mut seen) {
        seen.note("stopped", stopped(&error));
    }
    Ok(Outcome {
        seen,
        connects: peer.connects.load(Ordering::Relaxed),
    })
}

/// The peer program, as a case sees it.
pub struct Peer {
    /// How the case reaches the target.
    pub family: Family,
    /// The router's link-local address.
    pub link_local: Ipv6Addr,
    control: Mutex<BufReader<TcpStream>>,
    connects: AtomicU64,
}

impl Peer {
    /// Whether packets go over IPv6.
    pub fn v6(&self) -> bool {
        self.family == Family::V6
    }

    /// Whether sockets are of AF_INET6.
    pub fn socket6(&self) -> bool {
        self.family != Family::V4
    }

    /// A place's address as this family writes it.
    pub(super) fn at(&self, place: Place, port: u16) -> SocketAddr {
        self.written(place.addr(self.v6()), port)
    }

    /// An address as this family writes it.
    pub fn written(&self, addr: IpAddr, port: u16) -> SocketAddr {
        let addr = match (self.family, addr) {
            (Family::Mapped, IpAddr::V4(v4)) => IpAddr::V6(v4.to_ipv6_mapped()),
            (_, addr) => addr,
        };
        SocketAddr::new(addr, port)
    }

    /// The address of the client's first link, as this family writes it.
    pub fn own(&self, port: u16) -> SocketAddr {
        let link = session_lab::LinkName::Wifi;
        let addr = if self.v6() {
            IpAddr::V6(link.client_v6())
        } else {
            IpAddr::V4(link.client_v4())
        };
        self.written(addr, port)
    }

    fn domain(&self) -> Domain {
        if self.socket6() {
            Domain::IPV6
        } else {
            Domain::IPV4
        }
    }

    /// A TCP socket.
    pub fn tcp(&self) -> io::Result<Socket> {
        Socket::new(self.domain(), Type::STREAM, Some(Protocol::TCP))
    }

    /// A UDP socket, on which nothing waits for ever.
    pub fn udp(&self) -> io::Result<Socket> {
        let socket = Socket::new(self.domain(), Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_read_timeout(Some(EVENT_LIMIT))?;
        Ok(socket)
    }

    /// connect(2), counted: a captured one must be found in the agent's counters. Where the socket is
    /// connected or about to be, the kernel refuses before it asks anybody.
    pub fn connect(&self, socket: &Socket, to: SocketAddr) -> io::Result<()> {
        let result = socket.connect(&SockAddr::from(to));
        let errno = result.as_ref().err().and_then(io::Error::raw_os_error);
        if !matches!(errno, Some(libc::EISCONN | libc::EALREADY)) {
            self.count();
        }
        result
    }

    /// Counts a connect that was made in another way.
    pub fn count(&self) {
        self.connects.fetch_add(1, Ordering::Relaxed);
    }

    /// connect(2) on a socket that is not made to wait; what it says is noted, and what it came to.
    pub fn connect_later(
        &self,
        seen: &mut Seen,
        socket: &Socket,
        to: SocketAddr,
    ) -> anyhow::Result<()> {
        socket.set_nonblocking(true)?;
        seen.call("connect", self.connect(socket, to));
        seen.note("poll", first_events(socket, EVENT_LIMIT)?);
        let error = socket.take_error()?.and_then(|e| e.raw_os_error());
        seen.note("SO_ERROR", super::seen::errno_of(error.unwrap_or(0)));
        Ok(())
    }

    /// A listener that does as `steps` say with one connection.
    pub fn script(&self, steps: &[Step]) -> anyhow::Result<Script<'_>> {
        self.serve(self.plain(steps))
    }

    /// What [`Self::script`] asks for, to be changed.
    pub(super) fn plain(&self, steps: &[Step]) -> Tcp {
        Tcp {
            v6: self.v6(),
            steps: steps.to_vec(),
            connections: 1,
            backlog: 128,
            accept_on_go: false,
            full: false,
            fast_open: false,
            receive_buffer: None,
            many: false,
        }
    }

    /// A listener.
    pub(super) fn serve(&self, tcp: Tcp) -> anyhow::Result<Script<'_>> {
        self.made(&Ask::Tcp(tcp))
    }

    /// A listener that echoes to any number of connections.
    pub fn echo_to_many(&self) -> anyhow::Result<Script<'_>> {
        let mut tcp = self.plain(&[]);
        (tcp.many, tcp.backlog) = (true, 4096);
        self.serve(tcp)
    }

    /// UDP sockets.
    pub(super) fn udp_peer(&self, sockets: usize, how: UdpHow) -> anyhow::Result<Script<'_>> {
        let v6 = self.v6();
        self.made(&Ask::Udp(Udp { v6, sockets, how }))
    }

    fn made(&self, ask: &Ask) -> anyhow::Result<Script<'_>> {
        let Answer::Ports(name, ports) = self.ask(ask)? else {
            bail!("the peer program answers something else");
        };
        Ok(Script {
            peer: self,
            name,
            ports,
        })
    }

    fn ask(&self, ask: &Ask) -> anyhow::Result<Answer> {
        let mut control = self
            .control
            .lock()
            .map_err(|_| anyhow::anyhow!("poisoned"))?;
        let mut line = serde_json::to_string(ask)?;
        line.push('\n');
        control.get_mut().write_all(line.as_bytes())?;
        line.clear();
        control.read_line(&mut line)?;
        match serde_json::from_str(&line).context("the peer program has gone")? {
            Answer::Error(what) => bail!("the peer program says: {what}"),
            answer => Ok(answer),
        }
    }

    /// A connection to a script, which must come about.
    pub fn dial(&self, script: &Script<'_>) -> anyhow::Result<Socket> {
        let socket = self.tcp()?;
        self.connect(&socket, script.addr())
            .context("the case cannot begin")?;
        Ok(socket)
    }

    /// A port of the target on which nobody listens (discard, RFC 863).
    pub fn closed_port(&self) -> SocketAddr {
        self.at(Place::Target, 9)
    }
}

/// What the peer program does for a case.
pub struct Script<'a> {
    peer: &'a Peer,
    name: u32,
    /// Its ports.
    pub ports: Vec<u16>,
}

impl Script<'_> {
    /// Where it is.
    pub fn addr(&self) -> SocketAddr {
        self.addr_of(0)
    }

    /// Where its nth socket is.
    pub fn addr_of(&self, nth: usize) -> SocketAddr {
        self.peer.at(Place::Target, self.ports[nth])
    }

    /// Lets the next [`Step::Go`] pass.
    pub fn go(&self) -> anyhow::Result<()> {
        self.peer.ask(&Ask::Go(self.name)).map(|_| ())
    }

    /// What each connection has seen, when all have ended.
    pub fn reports(&self) -> anyhow::Result<Vec<Vec<String>>> {
        match self.peer.ask(&Ask::Report(self.name))? {
            Answer::Report(lines) => Ok(lines),
            other => bail!("the peer program answers {other:?}"),
        }
    }

    /// What they have seen, one after the other.
    pub fn report(&self) -> anyhow::Result<Vec<String>> {
        Ok(self.reports()?.concat())
    }

    /// Sends a datagram from its first socket.
    pub fn send_to(&self, to: SocketAddr, bytes: &[u8]) -> anyhow::Result<()> {
        let ask = Ask::SendTo {
            script: self.name,
            to,
            bytes: bytes.to_vec(),
        };
        self.peer.ask(&ask).map(|_| ())
    }
}

/// Everything that poll(2) can tell.
pub fn every_event() -> PollFlags {
    PollFlags::POLLIN | PollFlags::POLLPRI | PollFlags::POLLOUT | PollFlags::POLLRDHUP
}

/// What poll(2) says now.
pub fn events_now(fd: impl AsFd, interest: PollFlags) -> io::Result<PollFlags> {
    sys::poll(fd, interest, Duration::ZERO)
}

/// What poll(2) for POLLOUT says first, within `limit`.
pub fn first_events(fd: impl AsFd, limit: Duration) -> io::Result<String> {
    wait_for(fd, PollFlags::POLLOUT, limit).map(poll_names)
}

/// What poll(2) returns, within `limit`.
pub fn wait_for(fd: impl AsFd, interest: PollFlags, limit: Duration) -> io::Result<PollFlags> {
    sys::poll(fd, interest, limit)
}

/// Waits until poll(2) tells all of `wanted`, then until what it tells does not change any more: a segment
/// and the FIN behind it may be two events or one.
pub fn settled(fd: impl AsFd, wanted: PollFlags) -> io::Result<String> {
    let deadline = Instant::now() + EVENT_LIMIT;
    let (mut last, mut since) = (PollFlags::empty(), Instant::now());
    loop {
        let now = events_now(&fd, every_event())?;
        if now != last {
            (last, since) = (now, Instant::now());
        }
        let there = now.contains(wanted) && since.elapsed() > SETTLED;
        if there || Instant::now() > deadline {
            return Ok(poll_names(now));
        }
        // poll(2) cannot wait for a change.
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until so many bytes can be read.
pub fn await_unread(fd: impl AsFd, bytes: usize) -> anyhow::Result<()> {
    let there = peer::wait_until(|| peer::unread(&fd) >= bytes);
    ensure!(there, "only {} bytes came", peer::unread(&fd));
    Ok(())
}
