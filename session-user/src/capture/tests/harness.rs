//! A namespace, a cgroup, an agent that says what it was told, and applications in forked processes.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    mem::MaybeUninit,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd, BorrowedFd},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::Path,
    process::Command,
    rc::Rc,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use nix::{
    sched::{CloneFlags, unshare},
    sys::signal::{Signal, kill},
    sys::wait::{WaitStatus, waitpid},
    unistd::{ForkResult, Pid, alarm, fork, pipe},
};
use session_proto::wire::Target;
use socket2::{Domain, SockRef};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::mpsc,
    task::LocalSet,
    time::timeout,
};
use tracing::level_filters::LevelFilter;

use crate::capture::{
    Action, Capture, CaptureConfig, CaptureRule, Captured, FlowWay, FlowWays, Scope, cgroup,
};
use crate::requests::{AppFlow, FlowInput, RequestQueue};

/// Addresses of the namespace's own device `d0`: a destination that can be reached directly.
pub const HERE4: &str = "10.9.0.1";
pub const HERE6: &str = "2001:db8:9::1";
/// Longest that any single step may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a test in a thread with a network namespace of its own and a runtime.
pub fn in_netns<F: Future<Output = ()>>(body: impl FnOnce() -> F + Send + 'static) {
    let outcome = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
        for line in [
            "link set lo up".to_owned(),
            "link add d0 type veth peer name d1".to_owned(),
            "link set d0 up".to_owned(),
            "link set d1 up".to_owned(),
            format!("addr add {HERE4}/24 dev d0"),
            format!("addr add {HERE6}/64 dev d0 nodad"),
        ] {
            let mut command = Command::new("ip");
            let status =
                quiet(|| command.args(line.split(' ')).status()).expect("ip, from iproute2");
            assert!(status.success(), "ip {line}");
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("runtime");
        LocalSet::new().block_on(&runtime, async {
            timeout(2 * PATIENCE, body()).await.expect("the test hangs")
        });
    })
    .join();
    if let Err(panic) = outcome {
        resume_unwind(panic);
    }
}

/// A fresh cgroup.
pub fn scope() -> Scope {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!(
        "holdfast-capture-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    );
    Scope::create(&cgroup::cgroup2_root().expect("cgroup v2"), &name).expect("a cgroup")
}

/// A rule for some destinations.
pub fn rule(to: &[&str], peer: u32) -> CaptureRule {
    let to = to
        .iter()
        .map(|net| net.parse().expect("a prefix"))
        .collect();
    CaptureRule {
        to,
        ..CaptureRule::capture(peer)
    }
}

/// As [`rule`], which refuses what cannot be captured.
pub fn closed(to: &[&str], peer: u32) -> CaptureRule {
    CaptureRule {
        action: Action::Capture {
            peer,
            fail_closed: true,
            early: false,
        },
        ..rule(to, peer)
    }
}

/// A rule for every destination.
pub fn everything() -> CaptureRule {
    rule(&["0.0.0.0/0", "::/0"], 1)
}

/// Loaded programs attached to a fresh cgroup.
pub fn capture(rules: &[CaptureRule]) -> (Capture, Scope) {
    let scope = scope();
    let config = CaptureConfig {
        rules: rules.to_vec(),
        log: LevelFilter::DEBUG,
        ..CaptureConfig::default()
    };
    let mut capture = Capture::load(&config).unwrap_or_else(|error| panic!("{error}"));
    capture
        .attach(scope.path())
        .unwrap_or_else(|error| panic!("{error}"));
    (capture, scope)
}

/// What the agent saw of one connection.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Seen {
    pub original: SocketAddr,
    pub peer: u32,
    pub data: String,
}

/// Serves captured connections: says the original destination and the peer, then reads to the end.
pub fn serve(capture: Rc<Capture>) -> mpsc::UnboundedReceiver<Seen> {
    let (report, reports) = mpsc::unbounded_channel();
    tokio::task::spawn_local(async move {
        while let Ok(captured) = capture.entrance().accept().await {
            let report = report.clone();
            tokio::task::spawn_local(async move {
                let _ = report.send(answer(captured).await);
            });
        }
    });
    reports
}

/// Says the original destination and the peer, then reads to the end.
pub async fn answer(
    Captured {
        socket,
        original,
        peer,
        ..
    }: Captured,
) -> Seen {
    let mut socket = socket.marked().expect("a runtime that takes the socket");
    let mut data = Vec::new();
    // An application that has left already does not hear the greeting; what it sent is still to be read.
    let _ = socket
        .write_all(format!("{original} for {peer}\n").as_bytes())
        .await;
    let _ = socket.read_to_end(&mut data).await;
    let _ = socket.reset_on_close(false);
    Seen {
        original,
        peer,
        data: String::from_utf8_lossy(&data).into_owned(),
    }
}

/// A datagram that came to a peer's queue.
#[derive(Debug, PartialEq, Eq)]
pub struct Heard {
    pub target: String,
    pub peer: u32,
    pub data: Vec<u8>,
}

/// Every flow goes to the queue of its peer.
pub struct ToPeers(pub Vec<Arc<RequestQueue>>);

impl FlowWays for ToPeers {
    fn find(&self, original: SocketAddr, peer: u32) -> Result<FlowWay, i32> {
        // What the agent itself would take has a number beyond all peers: the last queue is for it.
        let queue = self.0.get(peer as usize).or(self.0.last());
        Ok(FlowWay {
            queue: Arc::clone(&queue.ok_or(libc::EHOSTUNREACH)?.flows),
            target: Target::Addr(original),
            kept: None,
        })
    }
}

/// A flow without a datagram for so long ends: longer than any of the tests that do not wait for that.
pub const FLOW_IDLE: Duration = Duration::from_secs(300);

/// Peers whose queues [`talk`] looks at.
pub const PEERS: u32 = 16;

/// Takes captured datagrams and answers them as the driver of a session would: says the destination, the peer and what
/// was sent; long ones it sends back. A datagram `refuse` is answered as from a closed port.
pub fn talk(capture: &mut Capture) -> mpsc::UnboundedReceiver<Heard> {
    let (report, reports) = mpsc::unbounded_channel();
    let queues: Vec<Arc<RequestQueue>> = (0..PEERS).map(|_| Arc::default()).collect();
    let datagrams = capture.take_datagrams().expect("not taken yet");
    tokio::task::spawn_local(datagrams.run(ToPeers(queues.clone()), FLOW_IDLE));
    for (peer, queue) in (0..PEERS).zip(queues) {
        let report = report.clone();
        tokio::task::spawn_local(async move {
            loop {
                queue.flows.available().await;
                while let Some(input) = queue.flows.pop() {
                    if let FlowInput::Datagram(flow, data, _) = input {
                        reply(&flow, peer, &data);
                        let target = flow.target.to_string();
                        let data = data.to_vec();
                        let _ = report.send(Heard { target, peer, data });
                    }
                }
            }
        });
    }
    reports
}

fn reply(flow: &AppFlow, peer: u32, data: &[u8]) {
    match data {
        b"refuse" => flow.end().failed(libc::ECONNREFUSED),
        b"unreachable" => flow.end().failed(libc::EHOSTUNREACH),
        short if short.len() < 100 => {
            let text = format!(
                "{} for {peer} {}",
                flow.target,
                String::from_utf8_lossy(short)
            );
            flow.end().deliver(text.as_bytes());
        }
        long => flow.end().deliver(long),
    }
}

/// A UDP server outside of capture, which says whom it hears.
pub fn direct_echo(addr: &str) -> SocketAddr {
    let socket = UdpSocket::bind((addr, 0)).expect("an address of this namespace");
    let bound = socket.local_addr().expect("bound");
    thread::spawn(move || {
        let mut buffer = [0; 2000];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let text = format!(
                "direct {} {}",
                from.ip(),
                String::from_utf8_lossy(&buffer[..len])
            );
            let _ = socket.send_to(text.as_bytes(), from);
        }
    });
    bound
}

/// In an application: a datagram, and what comes back with its source.
pub fn exchange(socket: &UdpSocket, to: SocketAddr, text: &str) -> io::Result<String> {
    socket.set_read_timeout(Some(PATIENCE))?;
    // A call that a signal, or capture, has interrupted is made again.
    while let Err(error) = socket.send_to(text.as_bytes(), to) {
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    hear(socket)
}

/// In an application: a datagram that comes, and its source.
pub fn hear(socket: &UdpSocket) -> io::Result<String> {
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut buffer = [0; 2000];
    let (len, from) = socket.recv_from(&mut buffer)?;
    Ok(format!(
        "{} from {from}",
        String::from_utf8_lossy(&buffer[..len])
    ))
}

/// What [`exchange`] says when the datagram was captured.
pub fn answered(to: &str, peer: u32, text: &str, from: &str) -> String {
    format!("{to} for {peer} {text} from {from}")
}

/// A server outside of capture: says "direct" and closes in order.
pub fn direct_server(addr: &str) -> SocketAddr {
    let listener = TcpListener::bind((addr, 0)).expect("an address of this namespace");
    let bound = listener.local_addr().expect("bound");
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = (&stream).write_all(b"direct\n");
        }
    });
    bound
}

/// In an application: reads the greeting and says whom getpeername names.
pub fn greeting(stream: &TcpStream) -> io::Result<String> {
    let peer = stream.peer_addr()?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(format!("{} peer {peer}", line.trim_end()))
}

/// In an application: connects and reads the greeting.
pub fn ask(to: impl ToString) -> io::Result<String> {
    let to: SocketAddr = to.to_string().parse().map_err(io::Error::other)?;
    greeting(&TcpStream::connect(to)?)
}

/// What [`ask`] says when the connection was captured.
pub fn captured(to: &str, peer: u32) -> String {
    format!("{to} for {peer} peer {to}")
}

/// What [`ask`] says when the connection went direct.
pub fn direct(to: impl ToString) -> String {
    format!("direct peer {}", to.to_string())
}

/// Held by whoever makes a process, until that process has closed the descriptors that it inherited.
static FORKS: Mutex<()> = Mutex::new(());

/// Runs something while no new process holds copies of this one's descriptors: a program is detached when the last copy
/// of its link is closed.
pub fn quiet<T>(action: impl FnOnce() -> T) -> T {
    let _guard = FORKS.lock().unwrap_or_else(PoisonError::into_inner);
    action()
}

/// A forked process that runs an application's code in a cgroup.
pub struct App {
    pid: Pid,
    output: fs::File,
    /// It is still to be waited for.
    ours: bool,
}

/// A test that fails leaves no process behind, and so no cgroup either.
impl Drop for App {
    fn drop(&mut self) {
        if self.ours {
            let _ = kill(self.pid, Signal::SIGKILL);
            let _ = waitpid(self.pid, None);
        }
    }
}

impl App {
    /// Starts `body` in the current namespace and in `scope`, in which the process is before it makes any socket.
    pub fn start(scope: &Scope, body: impl FnOnce() -> io::Result<String>) -> Self {
        let (output, input) = pipe().expect("a pipe");
        let (mut output, input) = (fs::File::from(output), fs::File::from(input));
        let procs = scope.path().join("cgroup.procs");
        quiet(|| {
            // SAFETY: the child uses memory allocation, which glibc keeps usable after fork, system calls, and no lock
            // that another thread of this process may have held; it never returns from this block.
            match unsafe { fork() }.expect("a process") {
                ForkResult::Parent { child } => {
                    drop(input);
                    // The child's first byte says that it holds nothing of ours any more.
                    output.read_exact(&mut [0]).expect("a child that starts");
                    Self {
                        pid: child,
                        output,
                        ours: true,
                    }
                }
                ForkResult::Child => become_app(input, &procs, body),
            }
        })
    }

    /// The process's id.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// What `body` returned; an errno is given by name.
    pub async fn result(mut self) -> Result<String, String> {
        let wait = tokio::task::spawn_blocking(move || {
            self.ours = false;
            let mut text = String::new();
            (&self.output).read_to_string(&mut text).expect("a pipe");
            (text, waitpid(self.pid, None).expect("our child"))
        });
        let (text, status) = timeout(PATIENCE, wait)
            .await
            .expect("the application hangs")
            .expect("joined");
        if let Some(text) = text.strip_prefix("ok ") {
            return Ok(text.to_owned());
        }
        let end = if matches!(status, WaitStatus::Exited(_, 0)) {
            String::new()
        } else {
            format!("{status:?}")
        };
        Err(format!("{}{end}", text.trim_start_matches("error ")))
    }
}

/// Closes the programs, links and internet sockets of the tests around. The runtime's own descriptors stay, for an
/// application may start a runtime too.
fn close_inherited() {
    let names = fs::read_dir("/proc/self/fd")
        .expect("proc")
        .flatten()
        .map(|entry| entry.file_name());
    let inherited: Vec<i32> = names
        .filter_map(|name| name.to_str()?.parse().ok())
        .collect();
    for fd in inherited {
        let what = fs::read_link(format!("/proc/self/fd/{fd}")).unwrap_or_default();
        let what = what.to_string_lossy();
        // SAFETY: the descriptor was listed just now, and this process has a single thread.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        let internet = what.starts_with("socket:")
            && SockRef::from(&borrowed)
                .domain()
                .is_ok_and(|domain| domain != Domain::UNIX);
        if internet || what.starts_with("anon_inode:bpf") {
            // SAFETY: nothing in this process uses it from here on.
            unsafe { libc::close(fd) };
        }
    }
}

/// The child's life, from fork to exit.
fn become_app(mut output: fs::File, procs: &Path, body: impl FnOnce() -> io::Result<String>) -> ! {
    // Whatever goes wrong, the process ends.
    alarm::set(2 * PATIENCE.as_secs() as u32);
    close_inherited();
    let started = output.write_all(b"+").and_then(|()| fs::write(procs, "0"));
    let result = started.and_then(|()| {
        // A panic must not unwind into what is the test's own stack in the parent.
        catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| Err(io::Error::other("panicked")))
    });
    let text = match result {
        Ok(text) => format!("ok {text}"),
        Err(error) => format!(
            "error {}",
            error.raw_os_error().map_or(error.to_string(), errno_name)
        ),
    };
    let _ = output.write_all(text.as_bytes());
    // SAFETY: ends the process without running the parent's exit handlers.
    unsafe { libc::_exit(0) }
}

fn errno_name(code: i32) -> String {
    format!("{:?}", nix::errno::Errno::from_raw(code))
}

/// Runs an application to its end.
pub async fn run(
    scope: &Scope,
    body: impl FnOnce() -> io::Result<String>,
) -> Result<String, String> {
    App::start(scope, body).result().await
}

/// Ends a socket's connection: connect() to AF_UNSPEC.
pub fn disconnect(socket: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: all zeroes is a valid sockaddr: AF_UNSPEC.
    let unspecified: libc::sockaddr = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: a live descriptor, and an address with its length.
    let result = unsafe {
        libc::connect(
            socket.as_raw_fd(),
            &raw const unspecified,
            size_of_val(&unspecified) as u32,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
