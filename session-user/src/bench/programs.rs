//! The measured application as processes: a server, and one client for each direction.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::app::{self, ClientOrders, Direction, Pace, Rest, Seen, Served};
use super::bed::own_program;
use crate::stdio::print_line;

/// Arguments of the hidden `bench app-server`.
#[derive(Debug, clap::Args)]
pub struct ServerArgs {
    /// Where to listen; port 0: any.
    #[arg(long)]
    listen: SocketAddr,
    /// Where arrivals of uploads are written down.
    #[arg(long)]
    dir: PathBuf,
    /// With multipath TCP.
    #[arg(long, hide = true)]
    mptcp: bool,
    /// Gives every connection up when standard input ends.
    #[arg(long, hide = true)]
    until_eof: bool,
}

/// Arguments of the hidden `bench app-client`.
#[derive(Debug, clap::Args)]
pub struct ClientArgs {
    /// The server.
    #[arg(long)]
    server: SocketAddr,
    /// What to measure.
    #[arg(long)]
    direction: Direction,
    /// Bytes each millisecond; 0: as fast as it goes.
    #[arg(long)]
    pace: usize,
    /// Where arrivals are written down.
    #[arg(long)]
    arrivals: PathBuf,
    /// `TCP_USER_TIMEOUT` in milliseconds; 0: none.
    #[arg(long, default_value_t = 0)]
    user_timeout_ms: u64,
    /// With multipath TCP.
    #[arg(long)]
    mptcp: bool,
    /// Sends nothing for so many milliseconds, once; 0: it does not rest.
    #[arg(long, default_value_t = 0)]
    rest_ms: u64,
    /// How long it sends before that.
    #[arg(long, default_value_t = 0)]
    rest_after_ms: u64,
}

/// Descriptors that a process may have at most with CAP_SYS_RESOURCE, where `fs.nr_open` was left as it is.
const DESCRIPTORS_MOST: u64 = 1 << 20;

/// As many descriptors as this process may have, and its children with it: each connection takes some. Returns how many.
pub fn raise_descriptors() -> anyhow::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if hard < DESCRIPTORS_MOST
        && setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS_MOST, DESCRIPTORS_MOST).is_ok()
    {
        return Ok(DESCRIPTORS_MOST);
    }
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

/// Serves; the first line says where, and every connection that ends is a line.
pub fn server(args: &ServerArgs) -> anyhow::Result<ExitCode> {
    raise_descriptors()?;
    let listener = app::listen(args.listen, args.mptcp)
        .with_context(|| format!("cannot listen on {}", args.listen))?;
    let at = listener.local_addr()?;
    super::datagrams::serve(at).with_context(|| format!("no UDP at {at}"))?;
    print_line(at);
    let report = |served: Served| {
        if let Ok(line) = serde_json::to_string(&served) {
            print_line(line);
        }
    };
    let standing = Arc::new(app::Standing::default());
    if args.until_eof {
        let standing = Arc::clone(&standing);
        std::thread::spawn(move || {
            // Whatever the reason, the end of standard input is the order.
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            app::give_up(&standing);
        });
    }
    app::serve(&listener, &args.dir, &standing, &report)?;
    Ok(ExitCode::SUCCESS)
}

/// Runs until standard input ends, then prints what was seen. A byte before that end means that
/// what is under way is given up.
pub fn client(args: &ClientArgs) -> anyhow::Result<ExitCode> {
    let stop = Arc::new(AtomicBool::new(false));
    let socket = Arc::new(OnceLock::<TcpStream>::new());
    let (told, given_up) = (Arc::clone(&stop), Arc::clone(&socket));
    std::thread::spawn(move || {
        let read = std::io::stdin().read(&mut [0]);
        told.store(true, Ordering::Release);
        if let (Ok(1), Some(socket)) = (read, given_up.get()) {
            // One that has died already cannot be ended again.
            let _ = socket.shutdown(Shutdown::Both);
        }
    });
    let timeout = Duration::from_millis(args.user_timeout_ms);
    let orders = ClientOrders {
        server: args.server,
        direction: args.direction,
        pace: if args.pace == 0 {
            Pace::Bulk
        } else {
            Pace::PerMillisecond(args.pace)
        },
        arrivals: Some(args.arrivals.clone()),
        user_timeout: (!timeout.is_zero()).then_some(timeout),
        mptcp: args.mptcp,
        rest: (args.rest_ms > 0).then(|| Rest {
            after: Duration::from_millis(args.rest_after_ms),
            length: Duration::from_millis(args.rest_ms),
        }),
        socket,
    };
    let seen = app::run_client(&orders, &stop);
    print_line(serde_json::to_string(&seen)?);
    Ok(ExitCode::SUCCESS)
}

/// A server under way.
pub struct Server {
    child: Child,
    lines: mpsc::Receiver<String>,
    /// Where it listens.
    pub addr: SocketAddr,
}

impl Server {
    /// Starts one; `start` puts the command where it belongs.
    pub fn start(
        listen: SocketAddr,
        dir: &Path,
        start: impl FnOnce(Command) -> std::io::Result<Child>,
    ) -> anyhow::Result<Self> {
        let mut command = Command::new(own_program()?);
        command
            .args([
                "bench",
                "app-server",
                "--listen",
                &listen.to_string(),
                "--dir",
            ])
            .arg(dir);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = start(command).context("the application's server cannot be started")?;
        let out = child.stdout.take().context("the server has no output")?;
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let first = lines
            .recv_timeout(Duration::from_secs(10))
            .context("the server does not listen")?;
        Ok(Self {
            child,
            lines,
            addr: first.parse()?,
        })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the next connection to end saw.
    pub fn next_served(&self, limit: Duration) -> Option<Served> {
        let line = self.lines.recv_timeout(limit).ok()?;
        serde_json::from_str(&line).ok()
    }

    /// Gives up every connection of a server that was started with `--until-eof` and a pipe.
    pub fn give_up(&mut self) {
        drop(self.child.stdin.take());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client under way.
pub struct Client {
    child: Child,
    /// What it measures.
    pub direction: Direction,
    /// Where its arrivals are.
    pub arrivals: PathBuf,
}

impl Client {
    /// Starts one; `start` puts the command where it belongs.
    pub fn start(
        server: SocketAddr,
        direction: Direction,
        pace: Pace,
        user_timeout: Duration,
        arrivals: PathBuf,
        start: impl FnOnce(Command) -> std::io::Result<Child>,
    ) -> anyhow::Result<Self> {
        let pace = match pace {
            Pace::PerMillisecond(bytes) => bytes,
            Pace::Bulk => 0,
        };
        let mut command = Command::new(own_program()?);
        command.args(["bench", "app-client", "--direction", direction.name()]);
        command.args(["--server", &server.to_string(), "--pace", &pace.to_string()]);
        command
            .args([
                "--user-timeout-ms",
                &user_timeout.as_millis().to_string(),
                "--arrivals",
            ])
            .arg(&arrivals);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = start(command).context("the application's client cannot be started")?;
        Ok(Self {
            child,
            direction,
            arrivals,
        })
    }

    /// Whether it has ended by itself.
    pub fn ended(&mut self) -> bool {
        self.child.try_wait().ok().flatten().is_some()
    }

    /// Tells it to end, without waiting for it.
    pub fn stop(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Tells it to give up what is under way, and takes what it saw until now.
    pub fn give_up(mut self, limit: Duration) -> anyhow::Result<Seen> {
        if let Some(mut stdin) = self.child.stdin.take() {
            // It may have ended by itself.
            let _ = stdin.write_all(&[1]);
        }
        self.finish(limit)
    }

    /// Tells it to end, and takes what it saw.
    pub fn finish(mut self, limit: Duration) -> anyhow::Result<Seen> {
        self.stop();
        let deadline = Instant::now() + limit;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                self.child.kill()?;
                self.child.wait()?;
                let seen = Seen {
                    errors: vec![format!("it hung for {limit:?}")],
                    ..Seen::default()
                };
                return Ok(seen);
            }
            // A child's end can be waited for, but not with a limit.
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut text = String::new();
        if let Some(mut out) = self.child.stdout.take() {
            out.read_to_string(&mut text)?;
        }
        match serde_json::from_str(text.trim()) {
            Ok(seen) => Ok(seen),
            Err(error) => bail!(
                "the {} client says nothing of use: {error}",
                self.direction.name()
            ),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // It may have ended by itself. One whose server is silent would wait for ever, and hold
        // our own output open for whoever reads it to its end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the server saw of each direction, once every connection has ended.
pub fn collect(server: &Server, expected: usize, limit: Duration) -> HashMap<&'static str, Served> {
    let mut out = HashMap::new();
    for _ in 0..expected {
        let Some(served) = server.next_served(limit) else {
            break;
        };
        out.insert(served.direction.name(), served);
    }
    out
}
