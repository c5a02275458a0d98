//! An application that sends on several connections at once, as fast as they take it.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use serde::{Deserialize, Serialize};

use super::super::app::Direction;
use super::super::pattern::Pattern;
use crate::stdio::print_line;

/// Bytes of one write.
const WRITE_BYTES: usize = 64 * 1024;

/// Arguments of the hidden `bench app-streams`.
#[derive(Debug, clap::Args)]
pub struct StreamsArgs {
    /// The application's server.
    #[arg(long)]
    server: SocketAddr,
    /// How many connections.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000))]
    streams: u16,
    /// For how long, in milliseconds.
    #[arg(long)]
    millis: u64,
}

/// What was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Streamed {
    /// Bytes of each connection, all of which the server has received.
    pub bytes: Vec<u64>,
    /// From the first byte until the server had said so for the last connection.
    pub seconds: f64,
    /// User and system time of this process.
    pub cpu_s: f64,
}

/// Sends until the time is over, and prints what was measured.
pub fn run(args: &StreamsArgs) -> anyhow::Result<ExitCode> {
    let begin = Arc::new(Barrier::new(usize::from(args.streams) + 1));
    let time = Duration::from_millis(args.millis);
    let threads: Vec<_> = (0..args.streams)
        .map(|_| {
            let (begin, server) = (Arc::clone(&begin), args.server);
            thread::spawn(move || {
                let socket = open(server);
                begin.wait();
                send(socket?, time)
            })
        })
        .collect();
    begin.wait();
    let began = Instant::now();
    let mut bytes = Vec::with_capacity(threads.len());
    for thread in threads {
        let sent = thread.join().ok().context("a sender panicked")?;
        bytes.push(sent?);
    }
    let streamed = Streamed {
        bytes,
        seconds: began.elapsed().as_secs_f64(),
        cpu_s: own_cpu()?,
    };
    print_line(serde_json::to_string(&streamed)?);
    Ok(ExitCode::SUCCESS)
}

fn open(server: SocketAddr) -> anyhow::Result<TcpStream> {
    let mut socket = TcpStream::connect(server)?;
    socket.set_nodelay(true)?;
    socket.write_all(&[Direction::Upload as u8, 0, 0, 0, 0])?;
    Ok(socket)
}

fn send(mut socket: TcpStream, time: Duration) -> anyhow::Result<u64> {
    let (pattern, end) = (Pattern::new(), Instant::now() + time);
    let mut sent = 0;
    while Instant::now() < end {
        let chunk = pattern.at(sent, WRITE_BYTES);
        socket.write_all(chunk)?;
        sent += chunk.len() as u64;
    }
    socket.shutdown(Shutdown::Write)?;
    let mut total = [0; 8];
    socket.read_exact(&mut total)?;
    let received = u64::from_le_bytes(total);
    ensure!(
        received == sent,
        "{sent} bytes were sent and {received} received"
    );
    Ok(sent)
}

/// User and system time of this process, in seconds.
fn own_cpu() -> anyhow::Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(micros as f64 / 1e6)
}
