//! An application that moves text or noise one way as fast as it goes, and its server.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use socket2::SockRef;

use super::super::pattern::Pattern;
use super::corpus::Log;
use crate::stdio::print_line;

/// Bytes of one write.
const WRITE_BYTES: usize = 64 * 1024;
/// An order: direction, content, and for how many milliseconds.
const ORDER_BYTES: usize = 6;

/// What is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Content {
    /// A log, which shrinks.
    Text,
    /// Bytes that do not.
    Noise,
}

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Way {
    /// From the client to the server.
    Up,
    /// From the server to the client.
    Down,
}

impl Content {
    /// As on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Noise => "noise",
        }
    }
}

impl Way {
    /// As on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}

/// Arguments of the hidden `bench app-load`.
#[derive(Debug, clap::Args)]
pub struct LoadArgs {
    /// The application's server.
    #[arg(long)]
    server: SocketAddr,
    /// Which way.
    #[arg(long, value_enum)]
    way: Way,
    /// What.
    #[arg(long, value_enum)]
    content: Content,
    /// For how long it is sent, in milliseconds.
    #[arg(long)]
    millis: u32,
}

/// What was measured.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Loaded {
    /// Bytes that arrived, each as it was sent.
    pub bytes: u64,
    /// From the order until the last of them had arrived and the sender could know.
    pub seconds: f64,
}

/// The bytes that both ends know.
enum Bytes {
    Text(Log),
    Noise(Pattern),
}

impl Bytes {
    fn of(content: Content) -> Self {
        match content {
            Content::Text => Self::Text(Log::new()),
            Content::Noise => Self::Noise(Pattern::new()),
        }
    }

    fn at(&self, offset: u64, len: usize) -> &[u8] {
        match self {
            Self::Text(log) => log.at(offset, len),
            Self::Noise(pattern) => pattern.at(offset, len),
        }
    }

    /// Sends until the time is over; returns how many.
    fn send(&self, socket: &mut TcpStream, time: Duration) -> std::io::Result<u64> {
        let (end, mut sent) = (Instant::now() + time, 0);
        while Instant::now() < end {
            let chunk = self.at(sent, WRITE_BYTES);
            socket.write_all(chunk)?;
            sent += chunk.len() as u64;
        }
        socket.shutdown(Shutdown::Write)?;
        Ok(sent)
    }

    /// Reads to the end; returns how many came. Other bytes than were sent are an error.
    fn receive(&self, socket: &mut TcpStream) -> std::io::Result<u64> {
        let (mut buf, mut got) = (vec![0; WRITE_BYTES], 0);
        loop {
            let n = socket.read(&mut buf)?;
            if n == 0 {
                return Ok(got);
            }
            if buf[..n] != *self.at(got, n) {
                return Err(ErrorKind::InvalidData.into());
            }
            got += n as u64;
        }
    }
}

/// Moves what it is told to, and prints what was measured.
pub fn app(args: &LoadArgs) -> anyhow::Result<ExitCode> {
    let bytes = Bytes::of(args.content);
    let began = Instant::now();
    let mut socket = TcpStream::connect(args.server)?;
    socket.set_nodelay(true)?;
    let mut order = vec![args.way as u8, args.content as u8];
    order.extend_from_slice(&args.millis.to_le_bytes());
    socket.write_all(&order)?;
    let bytes = match args.way {
        Way::Up => {
            let sent = bytes.send(&mut socket, Duration::from_millis(args.millis.into()))?;
            let mut received = [0; 8];
            socket.read_exact(&mut received)?;
            let received = u64::from_le_bytes(received);
            ensure!(received == sent, "{sent} were sent, {received} arrived");
            received
        }
        Way::Down => bytes.receive(&mut socket)?,
    };
    let seconds = began.elapsed().as_secs_f64();
    print_line(serde_json::to_string(&Loaded { bytes, seconds })?);
    Ok(ExitCode::SUCCESS)
}

/// The server, on threads of this process; it takes no more connections when this is dropped.
pub struct LoadServer {
    listener: TcpListener,
    thread: Option<JoinHandle<()>>,
}

impl LoadServer {
    /// Serves those who connect to `listener`.
    pub fn start(listener: TcpListener) -> anyhow::Result<Self> {
        let accepting = listener.try_clone()?;
        // Computed once: it takes longer than a connection.
        let known = [Content::Text, Content::Noise].map(Bytes::of);
        let thread = thread::spawn(move || {
            thread::scope(|scope| {
                for socket in accepting.incoming().map_while(Result::ok) {
                    // The client sees what has failed by what it gets.
                    scope.spawn(|| serve(socket, &known).ok());
                }
            });
        });
        Ok(Self {
            listener,
            thread: Some(thread),
        })
    }

    /// Where it listens.
    pub fn addr(&self) -> anyhow::Result<SocketAddr> {
        self.listener.local_addr().context("a listener's address")
    }
}

impl Drop for LoadServer {
    fn drop(&mut self) {
        // Its accept() returns then (shutdown(2) of a socket that listens).
        let _ = SockRef::from(&self.listener).shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed already.
            let _ = thread.join();
        }
    }
}

fn serve(mut socket: TcpStream, known: &[Bytes; 2]) -> std::io::Result<()> {
    let mut order = [0; ORDER_BYTES];
    socket.read_exact(&mut order)?;
    let [way, content, millis @ ..] = order;
    let bytes = &known[usize::from(content == Content::Noise as u8)];
    let time = Duration::from_millis(u32::from_le_bytes(millis).into());
    if way == Way::Down as u8 {
        bytes.send(&mut socket, time)?;
        // It ends when the client has everything.
        socket.read(&mut [0]).map(|_| ())
    } else {
        let received = bytes.receive(&mut socket)?;
        socket.write_all(&received.to_le_bytes())
    }
}
