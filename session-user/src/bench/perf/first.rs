//! How long a new connection takes to its first answer, over links that have a round-trip time.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use session_lab::Shape;

use super::super::app::Direction;
use super::super::bed::BedConfig;
use super::names::FIRST_BYTE;
use super::rows::{Figures, Row};
use super::stand::Stand;
use super::systems::System;
use crate::stdio::print_line;

/// Round-trip time of the links.
const RTT: Duration = Duration::from_millis(40);
/// Bytes of a question.
const BYTES: usize = 64;
/// Connections of each pass.
const CONNECTS: &str = "20";

/// Arguments of the hidden `bench app-first-byte`.
#[derive(Debug, clap::Args)]
pub struct FirstByteArgs {
    /// The application's server.
    #[arg(long)]
    server: SocketAddr,
    /// How many connections, one after the other.
    #[arg(long)]
    connects: usize,
}

/// What was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FirstBytes {
    /// From the call of connect() to the first byte of the answer, in milliseconds.
    pub ms: Vec<f64>,
}

/// Connects and asks, again and again, and prints what was measured.
pub fn app(args: &FirstByteArgs) -> anyhow::Result<ExitCode> {
    let mut question = [7; 5 + BYTES];
    question[..5].copy_from_slice(&[Direction::Echo as u8, 0, 0, 0, 0]);
    let mut ms = Vec::with_capacity(args.connects);
    for _ in 0..args.connects {
        let began = Instant::now();
        let mut socket = TcpStream::connect(args.server)?;
        socket.set_nodelay(true)?;
        socket.write_all(&question)?;
        socket.read_exact(&mut [0])?;
        ms.push(began.elapsed().as_secs_f64() * 1e3);
    }
    print_line(serde_json::to_string(&FirstBytes { ms })?);
    Ok(ExitCode::SUCCESS)
}

/// Measures it directly, captured, and captured with `connect = "early"`.
pub fn rows(passes: u16) -> anyhow::Result<Vec<Row>> {
    let mut ways = Vec::new();
    for system in [System::Direct, System::Holdfast, System::Early] {
        ways.push(way(system)?);
    }
    for _ in 0..passes {
        for (figures, stand) in &mut ways {
            let seen: FirstBytes = stand.run("app-first-byte", &["--connects", CONNECTS])?;
            stand.await_served(seen.ms.len())?;
            figures.values.extend(seen.ms);
        }
    }
    let direct = ways.first().map(|(figures, _)| (figures.system, figures));
    Ok(ways
        .iter()
        .map(|(figures, _)| figures.row(direct))
        .collect())
}

fn way(system: System) -> anyhow::Result<(Figures, Stand)> {
    let stand = Stand::with(system, |config: &mut BedConfig| {
        config.shapes = [Shape {
            delay: RTT / 2,
            ..Shape::default()
        }; 2];
    })?;
    Ok((Figures::new(FIRST_BYTE, system.name()), stand))
}
