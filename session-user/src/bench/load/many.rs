//! An application with very many connections: it opens them at once, and then each asks for an echo now and then, or
//! all send as much as is taken.
//!
//! It obeys a line of standard input after the other, and answers each with a line of JSON: `begin`, `stalls FROM TO`
//! (in nanoseconds of CLOCK_MONOTONIC), `flood`. When its input ends, so does it.

use std::cell::RefCell;
use std::io::{self, BufRead, BufReader};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinSet, LocalSet};

use super::super::app::now_ns;
use super::super::programs::raise_descriptors;
use super::super::stats::Summary;
use crate::stdio::print_line;

/// An agent that is out of descriptors leaves connections waiting: longer than one takes among ten thousand.
const DIAL_TAKES: Duration = Duration::from_secs(30);
/// Bytes of a question.
const QUESTION_BYTES: usize = 64;
/// Bytes of one write of a flood.
const FLOOD_BYTES: usize = 16 * 1024;
/// Send buffer of a connection that floods.
const FLOOD_BUFFER_BYTES: usize = 64 * 1024;
/// A flood has come to a stop when nothing was taken for so long.
const FLOOD_STOPS: Duration = Duration::from_secs(1);
/// It is not waited for longer.
const FLOOD_LIMIT: Duration = Duration::from_secs(30);
/// What is sent so shortly before a cut may be under way then.
const BEFORE_CUT_NS: u64 = 5_000_000;
/// What is sent so shortly after it meets whatever it leaves behind.
const AFTER_CUT_NS: u64 = 50_000_000;

/// Arguments of the hidden `bench app-many`.
#[derive(Debug, Clone, clap::Args)]
pub struct ManyArgs {
    /// Servers, several with commas; connections lead to one after the other.
    #[arg(long, value_delimiter = ',', required = true)]
    server: Vec<SocketAddr>,
    /// How many connections.
    #[arg(long)]
    streams: usize,
    /// Connections that are made at once.
    #[arg(long, default_value_t = 256)]
    at_once: usize,
    /// Time between two questions of a connection, in milliseconds.
    #[arg(long, default_value_t = 1000)]
    every_ms: u64,
    /// The servers answer nothing.
    #[arg(long)]
    silent: bool,
}

/// All connections have been made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Opened {
    /// Those on which the first question was answered.
    pub streams: usize,
    /// From the first connect() to the last answer.
    pub seconds: f64,
    /// The first thing that went wrong.
    pub trouble: Option<String>,
}

/// What a cut cost.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Stalls {
    /// The longest wait for an echo of each connection, in milliseconds.
    pub streams_ms: Summary,
    /// Waits for echoes of what was sent just before or after the beginning, in milliseconds.
    pub met_ms: Summary,
    /// How many of these.
    pub met: usize,
    /// Connections that have ended, or returned something else than they were given.
    pub lost: usize,
}

/// A question that has been answered.
struct Echoed {
    stream: usize,
    sent_ns: u64,
    came_ns: u64,
}

/// What the tasks of all connections have seen.
#[derive(Default)]
struct Log {
    echoed: Vec<Echoed>,
    /// When the question that is under way on each connection was sent.
    asked: Vec<Option<u64>>,
    lost: usize,
    flooded: u64,
}

type Shared = Rc<RefCell<Log>>;

/// Opens the connections, says so, and obeys until standard input ends.
pub fn app(args: &ManyArgs) -> anyhow::Result<ExitCode> {
    raise_descriptors()?;
    let (send, lines) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in BufReader::new(io::stdin()).lines().map_while(Result::ok) {
            if send.send(line).is_err() {
                return;
            }
        }
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    LocalSet::new().block_on(&runtime, run(args, lines))?;
    Ok(ExitCode::SUCCESS)
}

async fn run(args: &ManyArgs, mut lines: mpsc::UnboundedReceiver<String>) -> anyhow::Result<()> {
    let (sockets, opened) = open(args).await?;
    print_line(serde_json::to_string(&opened)?);
    let log = Shared::default();
    log.borrow_mut().asked.resize(sockets.len(), None);
    let mut sockets = Some(sockets);
    let mut tasks = JoinSet::new();
    while let Some(line) = lines.recv().await {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["begin"] => {
                let every = Duration::from_millis(args.every_ms);
                let sockets = sockets.take().context("they are in use")?;
                begin(sockets, every, &log, &mut tasks);
                print_line("\"begun\"");
            }
            ["flood"] => {
                for socket in sockets.take().context("they are in use")? {
                    tasks.spawn_local(flood(socket, Rc::clone(&log)));
                }
                print_line(flooded(&log).await);
            }
            ["stalls", from, to] => {
                let stalls = stalls(&log.borrow(), from.parse()?, to.parse()?);
                print_line(serde_json::to_string(&stalls)?);
            }
            _ => bail!("`{line}` is no order"),
        }
    }
    Ok(())
}

/// Makes all connections, and asks one question on each.
async fn open(args: &ManyArgs) -> anyhow::Result<(Vec<TcpStream>, Opened)> {
    let began = Instant::now();
    let turns = Rc::new(Semaphore::new(args.at_once));
    let mut dials = JoinSet::new();
    for number in 0..args.streams {
        let (turns, silent) = (Rc::clone(&turns), args.silent);
        let server = args.server[number % args.server.len()];
        dials.spawn_local(async move {
            let _turn = turns.acquire().await.map_err(io::Error::other)?;
            let dialled = tokio::time::timeout(DIAL_TAKES, dial(server, number, silent)).await;
            dialled.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        });
    }
    let (mut sockets, mut trouble) = (Vec::with_capacity(args.streams), None);
    while let Some(dialled) = dials.join_next().await {
        match dialled? {
            Ok(socket) => sockets.push(socket),
            Err(error) => drop(trouble.get_or_insert_with(|| error.to_string())),
        }
    }
    let opened = Opened {
        streams: sockets.len(),
        seconds: began.elapsed().as_secs_f64(),
        trouble,
    };
    Ok((sockets, opened))
}

async fn dial(server: SocketAddr, number: usize, silent: bool) -> io::Result<TcpStream> {
    let mut socket = TcpStream::connect(server).await?;
    socket.set_nodelay(true)?;
    if silent {
        // What waits here takes of the memory that the kernel has for all TCP of the host, and is not what is measured.
        SockRef::from(&socket).set_send_buffer_size(FLOOD_BUFFER_BYTES)?;
    } else {
        ask(&mut socket, number as u64).await?;
    }
    Ok(socket)
}

/// Asks, and waits for the echo.
async fn ask(socket: &mut TcpStream, number: u64) -> io::Result<()> {
    let mut question = [0x5a; QUESTION_BYTES];
    question[..8].copy_from_slice(&number.to_le_bytes());
    let mut answer = [0; QUESTION_BYTES];
    socket.write_all(&question).await?;
    socket.read_exact(&mut answer).await?;
    if answer == question {
        Ok(())
    } else {
        Err(io::Error::other("other bytes came back"))
    }
}

/// Lets every connection ask, spread over the time between two questions.
fn begin(sockets: Vec<TcpStream>, every: Duration, log: &Shared, tasks: &mut JoinSet<()>) {
    let start = Instant::now();
    let count = sockets.len().max(1) as u32;
    for (stream, mut socket) in sockets.into_iter().enumerate() {
        let log = Rc::clone(log);
        let mut due = start + every * stream as u32 / count;
        tasks.spawn_local(async move {
            for round in 0_u64.. {
                tokio::time::sleep_until(due.into()).await;
                let sent_ns = now_ns();
                log.borrow_mut().asked[stream] = Some(sent_ns);
                let number = round << 32 | stream as u64;
                let answered = ask(&mut socket, number).await;
                let mut log = log.borrow_mut();
                log.asked[stream] = None;
                if answered.is_err() {
                    log.lost += 1;
                    return;
                }
                log.echoed.push(Echoed {
                    stream,
                    sent_ns,
                    came_ns: now_ns(),
                });
                // One that was late does not ask twice at once.
                due = (due + every).max(Instant::now());
            }
        });
    }
}

/// The waits for echoes of what was sent before `to` and not back by `from`.
fn stalls(log: &Log, from: u64, to: u64) -> Stalls {
    let now = now_ns();
    let waiting = log.asked.iter().enumerate().filter_map(|(stream, sent)| {
        let sent_ns = (*sent)?;
        Some((stream, sent_ns, now))
    });
    let echoed = log.echoed.iter().map(|e| (e.stream, e.sent_ns, e.came_ns));
    let mut worst = vec![0.0_f64; log.asked.len()];
    let mut met = Vec::new();
    for (stream, sent, came) in echoed.chain(waiting) {
        if sent >= to || came < from {
            continue;
        }
        let wait = (came - sent) as f64 / 1e6;
        worst[stream] = worst[stream].max(wait);
        if sent + BEFORE_CUT_NS >= from && sent < from + AFTER_CUT_NS {
            met.push(wait);
        }
    }
    Stalls {
        streams_ms: Summary::of(&worst),
        met_ms: Summary::of(&met),
        met: met.len(),
        lost: log.lost,
    }
}

async fn flood(mut socket: TcpStream, log: Shared) {
    let bytes = [0xa5; FLOOD_BYTES];
    while let Ok(n) = socket.write(&bytes).await {
        log.borrow_mut().flooded += n as u64;
    }
    log.borrow_mut().lost += 1;
}

/// Waits until no more is taken; returns the bytes that were.
async fn flooded(log: &Shared) -> u64 {
    let began = Instant::now();
    let mut before = u64::MAX;
    loop {
        let now = log.borrow().flooded;
        if now == before || began.elapsed() >= FLOOD_LIMIT {
            return now;
        }
        before = now;
        // Nothing tells when a socket is never going to take more.
        tokio::time::sleep(FLOOD_STOPS).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_still_awaited_counts_as_a_stall() {
        let second = 1_000_000_000;
        let now = now_ns();
        let cut = now - second;
        let echoed = |stream, sent_ns, came_ns| Echoed {
            stream,
            sent_ns,
            came_ns,
        };
        let log = Log {
            echoed: vec![
                echoed(0, cut - 2_000_000, cut + 8_000_000),
                // Over before the cut, and asked after what was watched.
                echoed(0, cut - 900_000_000, cut - 100_000_000),
                echoed(1, cut + 500_000_000, cut + 501_000_000),
                echoed(1, now - 1, now),
            ],
            asked: vec![None, None, Some(cut + 10_000_000)],
            lost: 0,
            flooded: 0,
        };
        let stalls = stalls(&log, cut, now - 10);
        assert!((9.9..10.1).contains(&stalls.streams_ms.p50), "{stalls:?}");
        assert!(stalls.streams_ms.max > 900.0, "{stalls:?}");
        assert_eq!(stalls.met, 2);
    }
}
