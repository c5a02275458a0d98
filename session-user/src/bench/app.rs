//! The measured application: an ordinary program with ordinary sockets. The very same one runs
//! through Holdfast and, for comparison, without it.
//!
//! A client says in its first byte what it wants. *Download*: the server sends until the client
//! ends its direction. *Upload*: the client sends, the server answers the total at the end. *Echo*:
//! the server returns every byte. Each receiver writes down when bytes arrived, on the host's
//! monotonic clock.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

use super::arrivals::Recorder;
use super::pattern::Pattern;

/// Which way the measured bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// From the server to the client.
    Download,
    /// From the client to the server.
    Upload,
    /// From the client to the server and back.
    Echo,
    /// The same by UDP, a datagram each millisecond.
    #[serde(rename = "udp-echo")]
    UdpEcho,
}

impl Direction {
    /// All of them that are streams.
    pub const ALL: [Self; 3] = [Self::Download, Self::Upload, Self::Echo];

    /// The name, as in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Download => "download",
            Self::Upload => "upload",
            Self::Echo => "echo",
            Self::UdpEcho => "udp-echo",
        }
    }
}

/// How much is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// This many bytes each millisecond.
    PerMillisecond(usize),
    /// As fast as it goes.
    Bulk,
}

impl Pace {
    /// The name, as in reports.
    pub fn name(self) -> String {
        match self {
            Self::PerMillisecond(bytes) => format!("{} kB/ms", bytes as f64 / 1e3),
            Self::Bulk => "bulk".to_owned(),
        }
    }
}

/// What one end saw.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Seen {
    /// Bytes given to the socket.
    pub sent: u64,
    /// Bytes that arrived.
    pub received: u64,
    /// Arrived bytes that are not what was sent at their place.
    pub wrong: u64,
    /// Errors of the socket, in words.
    pub errors: Vec<String>,
}

/// Nanoseconds of CLOCK_MONOTONIC.
pub fn now_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    now.map_or(0, |t| Duration::from(t).as_nanos() as u64)
}

/// A pause in what is sent in bulk.
#[derive(Clone, Copy, Debug)]
pub struct Rest {
    /// How long it sends before.
    pub after: Duration,
    /// How long it sends nothing.
    pub length: Duration,
}

/// A client's orders.
#[derive(Clone, Debug)]
pub struct ClientOrders {
    /// Where the server is.
    pub server: SocketAddr,
    /// What to measure.
    pub direction: Direction,
    /// How much.
    pub pace: Pace,
    /// Where to write arrivals down, for download and echo.
    pub arrivals: Option<PathBuf>,
    /// `TCP_USER_TIMEOUT`, so that a dead connection ends.
    pub user_timeout: Option<Duration>,
    /// With the kernel's multipath TCP.
    pub mptcp: bool,
    /// What it sends in bulk is interrupted once.
    pub rest: Option<Rest>,
    /// Its socket, for whoever gives it up.
    pub socket: Arc<OnceLock<TcpStream>>,
}

/// A TCP socket of the family of `addr`, multipath or plain.
fn tcp_socket(addr: SocketAddr, mptcp: bool) -> io::Result<Socket> {
    let protocol = if mptcp {
        Protocol::MPTCP
    } else {
        Protocol::TCP
    };
    Socket::new(Domain::for_address(addr), Type::STREAM, Some(protocol))
}

/// Listens, with multipath TCP or plain.
pub fn listen(addr: SocketAddr, mptcp: bool) -> io::Result<TcpListener> {
    let socket = tcp_socket(addr, mptcp)?;
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    socket.listen(128)?;
    Ok(socket.into())
}

/// Runs one client until `stop`; then everything under way is awaited and counted.
pub fn run_client(orders: &ClientOrders, stop: &Arc<AtomicBool>) -> Seen {
    let mut seen = Seen::default();
    if let Err(error) = client(orders, stop, &mut seen) {
        seen.errors.push(error.to_string());
    }
    seen
}

fn client(orders: &ClientOrders, stop: &Arc<AtomicBool>, seen: &mut Seen) -> io::Result<()> {
    if orders.direction == Direction::UdpEcho {
        return super::datagrams::run_client(orders, stop, seen);
    }
    let socket = tcp_socket(orders.server, orders.mptcp)?;
    socket.connect(&orders.server.into())?;
    socket.set_tcp_nodelay(true)?;
    if orders.user_timeout.is_some() {
        socket.set_tcp_user_timeout(orders.user_timeout)?;
    }
    let mut socket = TcpStream::from(socket);
    let _ = orders.socket.set(socket.try_clone()?);
    let pace = match orders.pace {
        Pace::PerMillisecond(bytes) => u32::try_from(bytes).unwrap_or(u32::MAX),
        Pace::Bulk => 0,
    };
    let mut order = vec![orders.direction as u8];
    order.extend_from_slice(&pace.to_le_bytes());
    socket.write_all(&order)?;
    match orders.direction {
        Direction::Download => {
            let ending = socket.try_clone()?;
            let stop = Arc::clone(stop);
            let ender = thread::spawn(move || {
                wait_for(&stop);
                // A connection that has died already cannot be ended again.
                let _ = ending.shutdown(Shutdown::Write);
            });
            let received = receive(&mut socket, orders.arrivals.as_deref(), seen);
            join(ender);
            received
        }
        Direction::Upload => {
            send(&mut socket, orders.pace, orders.rest, stop, &mut seen.sent)?;
            socket.shutdown(Shutdown::Write)?;
            let mut total = [0; 8];
            socket.read_exact(&mut total)?;
            seen.received = u64::from_le_bytes(total);
            Ok(())
        }
        Direction::Echo => {
            let mut sending = socket.try_clone()?;
            let (pace, stop) = (orders.pace, Arc::clone(stop));
            let sender = thread::spawn(move || {
                let mut sent = 0;
                let outcome = send(&mut sending, pace, None, &stop, &mut sent);
                // A connection that has died already cannot be ended again.
                let _ = sending.shutdown(Shutdown::Write);
                (sent, outcome)
            });
            let received = receive(&mut socket, orders.arrivals.as_deref(), seen);
            let (sent, outcome) = join(sender).unwrap_or((0, Ok(())));
            seen.sent = sent;
            outcome.and(received)
        }
        // It is no stream.
        Direction::UdpEcho => Ok(()),
    }
}

fn join<T>(thread: thread::JoinHandle<T>) -> Option<T> {
    thread.join().ok()
}

fn wait_for(stop: &AtomicBool) {
    while !stop.load(Ordering::Acquire) {
        thread::park_timeout(Duration::from_millis(5));
    }
}

fn receive(socket: &mut TcpStream, arrivals: Option<&Path>, seen: &mut Seen) -> io::Result<()> {
    let pattern = Pattern::new();
    let mut arrivals = Recorder::to(arrivals)?;
    let mut buf = vec![0; 256 * 1024];
    loop {
        let n = socket.read(&mut buf)?;
        if n == 0 {
            return Ok(());
        }
        arrivals.note(seen.received + n as u64)?;
        seen.wrong += pattern.mismatches(seen.received, &buf[..n]);
        seen.received += n as u64;
    }
}

/// Sends at `pace` until `stop`; counts in `sent` the bytes that the socket took, also where it fails
/// later.
fn send(
    socket: &mut TcpStream,
    pace: Pace,
    mut rest: Option<Rest>,
    stop: &AtomicBool,
    sent: &mut u64,
) -> io::Result<()> {
    let pattern = Pattern::new();
    let start = now_ns();
    while !stop.load(Ordering::Acquire) {
        match pace {
            Pace::Bulk => {
                let sending = Duration::from_nanos(now_ns() - start);
                if let Some(rest) = rest.take_if(|rest| sending >= rest.after) {
                    // What is measured is what follows it.
                    thread::sleep(rest.length);
                }
                let chunk = pattern.at(*sent, 64 * 1024);
                socket.write_all(chunk)?;
                *sent += chunk.len() as u64;
            }
            Pace::PerMillisecond(bytes) => {
                let due = (now_ns() - start) / 1_000_000 + 1;
                // After a stall of the sender itself the missing messages follow at once, as an
                // application with a clock of its own would send them.
                while *sent < due * bytes as u64 {
                    socket.write_all(pattern.at(*sent, bytes))?;
                    *sent += bytes as u64;
                }
                let next = start + due * 1_000_000;
                // The pace itself: one message each millisecond of the clock.
                thread::sleep(Duration::from_nanos(next.saturating_sub(now_ns())));
            }
        }
    }
    Ok(())
}

/// What one connection of the server saw.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Served {
    /// What the client wanted.
    pub direction: Direction,
    /// What was seen.
    pub seen: Seen,
    /// Where its arrivals are.
    pub arrivals: Option<PathBuf>,
}

/// The connections of a server that stand, by number, so that they can be given up.
pub type Standing = Mutex<BTreeMap<u32, TcpStream>>;

/// Ends every connection in both directions, whatever is under way.
pub fn give_up(standing: &Standing) {
    let standing = standing.lock().unwrap_or_else(PoisonError::into_inner);
    for socket in standing.values() {
        // One that has just ended by itself is no matter.
        let _ = socket.shutdown(Shutdown::Both);
    }
}

/// Serves connections of `listener`, each on a thread; `report` is called at the end of each.
/// Arrivals of uploads go to files in `dir`.
pub fn serve(
    listener: &TcpListener,
    dir: &Path,
    standing: &Standing,
    report: &(dyn Fn(Served) + Send + Sync),
) -> io::Result<()> {
    let open = || standing.lock().unwrap_or_else(PoisonError::into_inner);
    thread::scope(|scope| {
        for number in 0u32.. {
            let (socket, _) = listener.accept()?;
            open().insert(number, socket.try_clone()?);
            scope.spawn(move || {
                let served = serve_one(socket, &dir.join(format!("served-{number}")));
                open().remove(&number);
                served.map(report);
            });
        }
        Ok(())
    })
}

fn serve_one(mut socket: TcpStream, arrivals: &Path) -> Option<Served> {
    let mut order = [0; 5];
    socket.read_exact(&mut order).ok()?;
    let direction = Direction::ALL.into_iter().find(|d| *d as u8 == order[0])?;
    let [_, pace @ ..] = order;
    let pace = match u32::from_le_bytes(pace) {
        0 => Pace::Bulk,
        bytes => Pace::PerMillisecond(bytes as usize),
    };
    let mut served = Served {
        direction,
        seen: Seen::default(),
        arrivals: None,
    };
    if direction == Direction::Upload {
        served.arrivals = Some(arrivals.to_owned());
    }
    let outcome = socket
        .set_nodelay(true)
        .and_then(|()| serve_direction(&mut socket, pace, arrivals, &mut served));
    if let Err(error) = outcome {
        served.seen.errors.push(error.to_string());
    }
    Some(served)
}

fn serve_direction(
    socket: &mut TcpStream,
    pace: Pace,
    arrivals: &Path,
    served: &mut Served,
) -> io::Result<()> {
    match served.direction {
        Direction::Download => {
            let stop = Arc::new(AtomicBool::new(false));
            let mut ending = socket.try_clone()?;
            let told = Arc::clone(&stop);
            let ender = thread::spawn(move || {
                // The client sends nothing more: the next read returns at its end, or at its death.
                let _ = ending.read(&mut [0]);
                told.store(true, Ordering::Release);
            });
            let sent = send(socket, pace, None, &stop, &mut served.seen.sent);
            let ended = socket.shutdown(Shutdown::Write);
            join(ender);
            sent.and(ended)
        }
        Direction::Upload => {
            receive(socket, Some(arrivals), &mut served.seen)?;
            socket.write_all(&served.seen.received.to_le_bytes())
        }
        Direction::Echo => {
            let mut buf = vec![0; 256 * 1024];
            loop {
                let n = socket.read(&mut buf)?;
                if n == 0 {
                    return socket.shutdown(Shutdown::Write);
                }
                served.seen.received += n as u64;
                socket.write_all(&buf[..n])?;
                served.seen.sent += n as u64;
            }
        }
        // It is no stream.
        Direction::UdpEcho => Ok(()),
    }
}
