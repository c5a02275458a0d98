//! The peer program: the application's other end, which does what scripts say.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use session_lab::Lab;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::peer_steps::{self, PeerConnection};
use super::peer_udp;
use super::wire::{Answer, Ask, Tcp};

/// How long a report waits for connections to end; a case has less time than the runner gives it.
const REPORT_LIMIT: Duration = Duration::from_secs(6);
/// TCP_FASTOPEN's queue.
const FAST_OPEN_QUEUE: i32 = 16;

/// Serves cases that connect to `control`, until it is killed.
pub fn serve(control: SocketAddr) -> anyhow::Result<()> {
    raise_open_files();
    let listener = TcpListener::bind(control)
        .with_context(|| format!("the peer program cannot listen on {control}"))?;
    for client in listener.incoming() {
        let client = client?;
        std::thread::spawn(move || {
            if let Err(error) = Case::default().run(&client) {
                eprintln!("peer: a case's control connection failed: {error:#}");
            }
        });
    }
    Ok(())
}

/// As many descriptors as are allowed: thousands of connections are held at once.
pub fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    // Where it cannot be raised, the cases that need it show it.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// What a case and the threads of one script share.
#[derive(Default)]
pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// How often the case said go.
    gone: usize,
    /// The case has ended: nobody waits for anything any more.
    over: bool,
    /// Each connection's lines.
    lines: Vec<Vec<String>>,
    /// Connections whose steps are through.
    ended: usize,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the `nth` go; `false` if the case has ended instead.
    pub fn await_go(&self, nth: usize) -> bool {
        let state = self
            .changed
            .wait_while(self.lock(), |s| s.gone < nth && !s.over)
            .unwrap_or_else(PoisonError::into_inner);
        !state.over
    }

    /// A new connection; returns its number.
    pub fn begin(&self) -> usize {
        let mut state = self.lock();
        state.lines.push(Vec::new());
        state.lines.len() - 1
    }

    /// A line of a connection's report.
    pub fn say(&self, connection: usize, line: String) {
        self.lock().lines[connection].push(line);
    }

    /// A connection's steps are through.
    pub fn end(&self) {
        self.lock().ended += 1;
        self.changed.notify_all();
    }

    /// Whether the case has ended.
    pub fn is_over(&self) -> bool {
        self.lock().over
    }

    fn go(&self) {
        self.lock().gone += 1;
        self.changed.notify_all();
    }

    fn over(&self) {
        self.lock().over = true;
        self.changed.notify_all();
    }

    fn report(&self, connections: usize) -> Vec<Vec<String>> {
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), REPORT_LIMIT, |s| s.ended < connections);
        let (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        let mut lines = state.lines.clone();
        if timeout.timed_out() {
            let missing = format!("{} of {connections} connections ended", state.ended);
            lines.push(vec![missing]);
        }
        lines
    }
}

/// One case's scripts.
#[derive(Default)]
struct Case {
    scripts: Vec<Script>,
    udp: HashMap<u32, std::net::UdpSocket>,
}

struct Script {
    shared: Arc<Shared>,
    connections: usize,
}

impl Case {
    fn run(mut self, client: &TcpStream) -> anyhow::Result<()> {
        let mut out = client.try_clone()?;
        for line in BufReader::new(client).lines() {
            // A client that is killed resets its connection.
            let Ok(line) = line else { break };
            let ask: Ask = serde_json::from_str(&line)?;
            let answer = self
                .answer(ask)
                .unwrap_or_else(|e| Answer::Error(format!("{e:#}")));
            let mut text = serde_json::to_string(&answer)?;
            text.push('\n');
            if out.write_all(text.as_bytes()).is_err() {
                break;
            }
        }
        Ok(())
    }

    fn answer(&mut self, ask: Ask) -> anyhow::Result<Answer> {
        match ask {
            Ask::Tcp(tcp) => {
                let connections = if tcp.many { 0 } else { tcp.connections };
                let (name, shared) = self.script(connections)?;
                Ok(Answer::Ports(name, vec![listen(tcp, shared)?]))
            }
            Ask::Udp(udp) => {
                let (name, shared) = self.script(0)?;
                let (ports, first) = peer_udp::open(&udp, &shared)?;
                self.udp.insert(name, first);
                Ok(Answer::Ports(name, ports))
            }
            Ask::Go(name) => {
                self.named(name)?.shared.go();
                Ok(Answer::Done)
            }
            Ask::Report(name) => {
                let script = self.named(name)?;
                Ok(Answer::Report(script.shared.report(script.connections)))
            }
            Ask::SendTo { script, to, bytes } => {
                let socket = self.udp.get(&script).context("not a UDP script")?;
                socket.send_to(&bytes, to)?;
                Ok(Answer::Done)
            }
        }
    }

    fn script(&mut self, connections: usize) -> anyhow::Result<(u32, Arc<Shared>)> {
        let shared = Arc::new(Shared::default());
        let name = u32::try_from(self.scripts.len())?;
        self.scripts.push(Script {
            shared: Arc::clone(&shared),
            connections,
        });
        Ok((name, shared))
    }

    fn named(&self, name: u32) -> anyhow::Result<&Script> {
        self.scripts.get(name as usize).context("no such script")
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        for script in &self.scripts {
            script.shared.over();
        }
    }
}

/// The target's address of a family.
pub(super) fn target(v6: bool) -> IpAddr {
    Lab::target(v6)
}

fn listen(tcp: Tcp, shared: Arc<Shared>) -> anyhow::Result<u16> {
    let socket = Socket::new(
        if tcp.v6 { Domain::IPV6 } else { Domain::IPV4 },
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.bind(&SocketAddr::new(target(tcp.v6), 0).into())?;
    if tcp.fast_open {
        super::sys::set_option(
            &socket,
            libc::IPPROTO_TCP,
            libc::TCP_FASTOPEN,
            FAST_OPEN_QUEUE,
        )?;
    }
    if let Some(bytes) = tcp.receive_buffer {
        // Accepted sockets inherit it, and with it a window that does not grow.
        socket.set_recv_buffer_size(bytes)?;
    }
    socket.listen(tcp.backlog)?;
    let addr = socket.local_addr()?.as_socket().context("no address")?;
    let fill = if tcp.full { fill(addr) } else { Vec::new() };
    let listener = TcpListener::from(socket);
    if tcp.many {
        std::thread::spawn(move || {
            if let Err(error) = echo_to_many(listener, &shared) {
                eprintln!("peer: {error:#}");
            }
        });
    } else {
        std::thread::spawn(move || accept(&listener, &tcp, &shared, fill));
    }
    Ok(addr.port())
}

/// Connects until the accept queue is full: then the kernel drops SYNs.
fn fill(addr: SocketAddr) -> Vec<TcpStream> {
    let mut out = Vec::new();
    let limit = Duration::from_millis(100);
    while let Ok(stream) = TcpStream::connect_timeout(&addr, limit) {
        out.push(stream);
    }
    out
}

fn accept(listener: &TcpListener, tcp: &Tcp, shared: &Arc<Shared>, fill: Vec<TcpStream>) {
    if tcp.accept_on_go && !shared.await_go(1) {
        return;
    }
    for _ in &fill {
        // They are this program's own.
        drop(listener.accept());
    }
    drop(fill);
    for _ in 0..tcp.connections {
        let Ok(Some(socket)) = accept_one(listener, shared) else {
            return;
        };
        let (steps, shared) = (tcp.steps.clone(), Arc::clone(shared));
        let number = shared.begin();
        let gone = usize::from(tcp.accept_on_go);
        std::thread::spawn(move || {
            PeerConnection::new(socket, number, gone, &shared).run(&steps);
            shared.end();
        });
    }
}

/// Accepts, unless the case ends before somebody comes.
fn accept_one(listener: &TcpListener, shared: &Shared) -> io::Result<Option<TcpStream>> {
    use nix::poll::{PollFd, PollFlags, poll};
    use std::os::fd::AsFd;
    loop {
        let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, 100u16)? > 0 {
            return listener.accept().map(|(socket, _)| Some(socket));
        }
        if shared.is_over() {
            return Ok(None);
        }
    }
}

/// Echoes to any number of connections at once, until the case ends.
fn echo_to_many(listener: TcpListener, shared: &Shared) -> anyhow::Result<()> {
    listener.set_nonblocking(true)?;
    SockRef::from(&listener).set_reuse_address(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        loop {
            // How often it is seen whether the case is over.
            let look = tokio::time::sleep(Duration::from_millis(100));
            tokio::select! {
                accepted = listener.accept() => {
                    let (mut socket, _) = accepted?;
                    tokio::spawn(async move {
                        let (mut read, mut write) = socket.split();
                        // How it ends is the client's to see.
                        let _ = tokio::io::copy(&mut read, &mut write).await;
                    });
                }
                () = look => if shared.is_over() { return Ok(()) },
            }
        }
    })
}

/// Waits until `good`, at most for as long as a report would.
pub(super) fn wait_until(mut good: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + REPORT_LIMIT;
    while !good() {
        if Instant::now() > deadline {
            return false;
        }
        // The kernel has no event for what is waited for here.
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

// Steps are in a file of their own.
pub(super) use peer_steps::unread;
