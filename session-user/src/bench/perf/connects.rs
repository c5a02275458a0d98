//! An application that connects, asks once and goes, again and again.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::super::app::Direction;
use crate::stdio::print_line;

/// Connections under way at once.
const AT_ONCE: usize = 8;
/// Bytes of a question.
const BYTES: usize = 64;

/// Arguments of the hidden `bench app-connects`.
#[derive(Debug, clap::Args)]
pub struct ConnectsArgs {
    /// The application's server.
    #[arg(long)]
    server: SocketAddr,
    /// For how long, in milliseconds.
    #[arg(long)]
    millis: u64,
}

/// What was measured.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Connected {
    /// Connections on which the answer came.
    pub connections: usize,
    /// How long it took.
    pub seconds: f64,
}

/// Connects until the time is over, and prints what was measured.
pub fn run(args: &ConnectsArgs) -> anyhow::Result<ExitCode> {
    let began = Instant::now();
    let end = began + Duration::from_millis(args.millis);
    let threads: Vec<_> = (0..AT_ONCE)
        .map(|_| {
            let server = args.server;
            thread::spawn(move || connect_until(server, end))
        })
        .collect();
    let mut connections = 0;
    for thread in threads {
        connections += thread.join().ok().context("a client panicked")??;
    }
    let connected = Connected {
        connections,
        seconds: began.elapsed().as_secs_f64(),
    };
    print_line(serde_json::to_string(&connected)?);
    Ok(ExitCode::SUCCESS)
}

fn connect_until(server: SocketAddr, end: Instant) -> anyhow::Result<usize> {
    let mut question = [7; 5 + BYTES];
    question[..5].copy_from_slice(&[Direction::Echo as u8, 0, 0, 0, 0]);
    let mut answer = [0; BYTES];
    let mut count = 0;
    while Instant::now() < end {
        ask(server, &question, &mut answer).with_context(|| format!("connection {count}"))?;
        count += 1;
    }
    Ok(count)
}

/// One connection; an error says at which step.
fn ask(server: SocketAddr, question: &[u8], answer: &mut [u8]) -> anyhow::Result<()> {
    let mut socket = TcpStream::connect(server).context("connect")?;
    socket.set_nodelay(true)?;
    socket.write_all(question).context("write")?;
    socket.read_exact(answer).context("read")
}
