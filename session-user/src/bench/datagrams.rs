//! The measured application over UDP: a client sends a datagram each millisecond, and the server sends every one back.
//!
//! A datagram that is lost is not sent again, so that what a cut costs is counted in datagrams beside time: no more may
//! be lost than were under way, there or back, when the link was cut.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::app::{ClientOrders, Pace, Seen, now_ns};
use super::arrivals::Recorder;
use super::cuts::Cut;
use super::pattern::Pattern;

/// The number in front of each datagram, in bytes.
const NUMBER_BYTES: usize = 8;
/// Largest datagram of the application.
const ROOM: usize = 64 * 1024;
/// After its end the client waits for what is under way until nothing has come for so long.
const SILENCE: Duration = Duration::from_secs(1);

/// Sends every datagram back to where it came from, until the process ends.
pub fn serve(addr: SocketAddr) -> io::Result<()> {
    let socket = UdpSocket::bind(addr)?;
    thread::spawn(move || {
        let mut data = vec![0; ROOM];
        loop {
            // An error is of an earlier answer, whose client has gone.
            if let Ok((n, from)) = socket.recv_from(&mut data) {
                let _ = socket.send_to(&data[..n], from);
            }
        }
    });
    Ok(())
}

/// Where the times of each datagram are, beside the arrivals.
fn times_of(arrivals: &Path) -> PathBuf {
    arrivals.with_extension("datagrams")
}

/// When each datagram was sent and came back, by its number; 0: it never came.
#[derive(Clone, Debug, Default)]
pub struct Times(Vec<(u64, u64)>);

/// Datagrams of one cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fate {
    /// Sent before the cut was noticed, and not back by the cut.
    pub in_flight: u64,
    /// Never came back, of those and of what was sent in the time that was watched.
    pub lost: u64,
}

impl Times {
    /// Reads what the client that wrote `arrivals` has written beside it.
    pub fn read(arrivals: &Path) -> io::Result<Self> {
        let raw = std::fs::read(times_of(arrivals))?;
        let mut words = raw
            .as_chunks::<8>()
            .0
            .iter()
            .map(|w| u64::from_le_bytes(*w));
        let pairs = std::iter::from_fn(|| Some((words.next()?, words.next()?)));
        Ok(Self(pairs.collect()))
    }

    fn write(&self, arrivals: &Path) -> io::Result<()> {
        let words = self.0.iter().flat_map(|&(sent, back)| [sent, back]);
        let raw: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        std::fs::write(times_of(arrivals), raw)
    }

    /// What became of the datagrams around one cut.
    pub fn fate(&self, cut: &Cut) -> Fate {
        let (at, to) = cut.window;
        let noticed = cut.handover.as_ref().map_or(at, |h| h.noticed_ns.max(at));
        let mut fate = Fate::default();
        let watched = (self.0.iter()).filter(|(sent, _)| (cut.control.0..=to).contains(sent));
        for &(sent, back) in watched {
            fate.in_flight += u64::from(sent <= noticed && (back == 0 || back > at));
            fate.lost += u64::from(back == 0);
        }
        fate
    }

    /// Datagrams that were lost while nothing happened: in none of these times.
    pub fn lost_otherwise(&self, times: impl Iterator<Item = (u64, u64)> + Clone) -> u64 {
        let watched = |sent: u64| times.clone().any(|(from, to)| (from..=to).contains(&sent));
        let lost = (self.0.iter()).filter(|&&(sent, back)| back == 0 && !watched(sent));
        lost.count() as u64
    }
}

/// Runs one client until `stop`.
pub fn run_client(
    orders: &ClientOrders,
    stop: &Arc<AtomicBool>,
    seen: &mut Seen,
) -> io::Result<()> {
    let Pace::PerMillisecond(bytes) = orders.pace else {
        return Err(io::Error::other("datagrams have a pace"));
    };
    let bytes = bytes.clamp(NUMBER_BYTES, ROOM);
    let any: SocketAddr = if orders.server.is_ipv4() {
        ([0, 0, 0, 0], 0).into()
    } else {
        (std::net::Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(orders.server)?;
    let (sending, told) = (socket.try_clone()?, Arc::clone(stop));
    let sender = thread::spawn(move || send(&sending, bytes, &told));
    let received = receive(&socket, bytes, orders.arrivals.as_deref(), stop, seen);
    let (sent_at, sent) = sender
        .join()
        .map_err(|_| io::Error::other("the sender has panicked"))?;
    seen.sent = (sent_at.len() * bytes) as u64;
    let mut back = received?;
    back.resize(sent_at.len(), 0);
    if let Some(arrivals) = &orders.arrivals {
        Times(sent_at.into_iter().zip(back).collect()).write(arrivals)?;
    }
    sent
}

fn content(pattern: &Pattern, number: u64, bytes: usize) -> &[u8] {
    pattern.at(number * 31, bytes - NUMBER_BYTES)
}

/// Sends one datagram each millisecond of the clock; returns when each was sent.
fn send(socket: &UdpSocket, bytes: usize, stop: &AtomicBool) -> (Vec<u64>, io::Result<()>) {
    let pattern = Pattern::new();
    let mut sent: Vec<u64> = Vec::new();
    let mut data = Vec::with_capacity(bytes);
    let start = now_ns();
    while !stop.load(Ordering::Acquire) {
        let due = (now_ns() - start) / 1_000_000 + 1;
        // As the stream's sender: what is late follows at once.
        while (sent.len() as u64) < due {
            let number = sent.len() as u64;
            data.clear();
            data.extend_from_slice(&number.to_le_bytes());
            data.extend_from_slice(content(&pattern, number, bytes));
            sent.push(now_ns());
            if let Err(error) = socket.send(&data) {
                return (sent, Err(error));
            }
        }
        let next = start + due * 1_000_000;
        // The pace itself: one datagram each millisecond of the clock.
        thread::sleep(Duration::from_nanos(next.saturating_sub(now_ns())));
    }
    (sent, Ok(()))
}

/// Takes what comes back until nothing more does; returns when each came.
fn receive(
    socket: &UdpSocket,
    bytes: usize,
    arrivals: Option<&Path>,
    stop: &AtomicBool,
    seen: &mut Seen,
) -> io::Result<Vec<u64>> {
    let pattern = Pattern::new();
    let mut arrivals = Recorder::to(arrivals)?;
    let mut back: Vec<u64> = Vec::new();
    let mut data = vec![0; ROOM];
    socket.set_read_timeout(Some(SILENCE))?;
    loop {
        let n = match socket.recv(&mut data) {
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if stop.load(Ordering::Acquire) {
                    return Ok(back);
                }
                continue;
            }
            Err(error) => return Err(error),
        };
        let number = data
            .first_chunk()
            .map_or(u64::MAX, |b| u64::from_le_bytes(*b));
        let place = usize::try_from(number).unwrap_or(usize::MAX);
        // Numbers run with the clock; what is far beyond them is no number.
        let whole = n == bytes
            && place < back.len() + 1_000_000
            && data[NUMBER_BYTES..n] == *content(&pattern, number, bytes);
        if !whole {
            seen.wrong += n as u64;
            continue;
        }
        if back.len() <= place {
            back.resize(place + 1, 0);
        }
        if back[place] != 0 {
            // At most once is promised.
            seen.wrong += n as u64;
            continue;
        }
        back[place] = now_ns();
        seen.received += n as u64;
        arrivals.note(seen.received)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn cut(from: u64, to: u64) -> Cut {
        Cut {
            control: ((from - 300) * MS, from * MS),
            window: (from * MS, to * MS),
            handover: None,
        }
    }

    #[test]
    fn what_was_under_way_is_told_from_what_was_lost() {
        // A second of datagrams with a round trip of 40 ms; a cut at 5000 ms loses those of the 20 ms before.
        let times = Times(
            (4500..5500)
                .map(|ms| {
                    let lost = (4980..5000).contains(&ms) || ms == 4600;
                    (ms * MS, if lost { 0 } else { (ms + 40) * MS })
                })
                .collect(),
        );
        let fate = times.fate(&cut(5000, 5300));
        assert_eq!(
            fate,
            Fate {
                in_flight: 40,
                lost: 20
            }
        );
        let otherwise = |at: u64| times.lost_otherwise([cut(at, at + 300).watched()].into_iter());
        assert_eq!((otherwise(5000), otherwise(9000)), (1, 21));
    }

    #[test]
    fn an_echo_is_counted() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let free = UdpSocket::bind("127.0.0.1:0")?.local_addr()?;
        serve(free)?;
        let arrivals = dir.path().join("client-udp-echo");
        let orders = ClientOrders {
            server: free,
            direction: super::super::app::Direction::UdpEcho,
            pace: Pace::PerMillisecond(1000),
            arrivals: Some(arrivals.clone()),
            user_timeout: None,
            mptcp: false,
            rest: None,
            socket: Arc::default(),
        };
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let client = thread::spawn(move || super::super::app::run_client(&orders, &told));
        // It sends one each millisecond; some are enough.
        thread::sleep(Duration::from_millis(100));
        stop.store(true, Ordering::Release);
        let seen = client.join().map_err(|_| io::Error::other("panic"))?;
        assert_eq!((seen.wrong, seen.errors), (0, Vec::new()));
        assert!(seen.sent > 0 && seen.received == seen.sent, "{}", seen.sent);
        let times = Times::read(&arrivals)?;
        assert!(times.0.iter().all(|(sent, back)| sent < back));
        Ok(())
    }
}
