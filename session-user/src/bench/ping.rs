//! A question and its answer, again and again: the latency that a stream adds.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::app::Direction;
use crate::stdio::print_line;

/// Rounds before the first that counts.
const WARM_UP: usize = 500;

/// Arguments of the hidden `bench app-ping`.
#[derive(Debug, clap::Args)]
pub struct PingArgs {
    /// The application's server.
    #[arg(long)]
    server: SocketAddr,
    /// For how long, in milliseconds.
    #[arg(long)]
    millis: u64,
    /// Bytes of a question.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    bytes: u16,
}

/// What was measured.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Pinged {
    /// Rounds.
    pub rounds: usize,
    /// Of all rounds.
    pub rounds_per_s: f64,
    /// Median, in microseconds.
    pub p50_us: f64,
    /// 99th percentile, in microseconds.
    pub p99_us: f64,
}

/// Asks until the time is over, and prints what was measured.
pub fn run(args: &PingArgs) -> anyhow::Result<ExitCode> {
    let mut socket = TcpStream::connect(args.server)?;
    socket.set_nodelay(true)?;
    socket.write_all(&[Direction::Echo as u8, 0, 0, 0, 0])?;
    let mut buf = vec![7; usize::from(args.bytes)];
    let mut times = Vec::with_capacity(1 << 16);
    let began = Instant::now();
    let end = began + Duration::from_millis(args.millis);
    while Instant::now() < end {
        let asked = Instant::now();
        socket.write_all(&buf)?;
        socket.read_exact(&mut buf)?;
        times.push(asked.elapsed().as_secs_f64() * 1e6);
    }
    let rounds_per_s = times.len() as f64 / began.elapsed().as_secs_f64();
    let mut counted = times.split_off(WARM_UP.min(times.len() / 2));
    counted.sort_by(f64::total_cmp);
    let rank = |p: f64| {
        counted
            .get((p * counted.len() as f64) as usize)
            .copied()
            .unwrap_or(0.0)
    };
    let pinged = Pinged {
        rounds: counted.len(),
        rounds_per_s,
        p50_us: rank(0.5),
        p99_us: rank(0.99),
    };
    print_line(serde_json::to_string(&pinged)?);
    Ok(ExitCode::SUCCESS)
}
