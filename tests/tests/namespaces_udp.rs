//! Datagrams of captured programs in network namespaces that have no connectivity of their own: only a loopback
//! interface.

use std::net::{SocketAddr, UdpSocket};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use session_lab::{Lab, Netns};
use session_tests::{Dns, TestBed, command, eventually, finish, program};

/// Nothing in these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);
/// Port of the echo servers, and one that nobody has.
const ECHO: u16 = 7008;
const CLOSED: u16 = 9;

/// What goes first in a shell that is to have nothing but a loopback interface.
const ALONE: [&str; 6] = [
    "unshare",
    "-n",
    "sh",
    "-c",
    "ip link set lo up && exec \"$@\"",
    "sh",
];

/// Asks the echo server at each address of a port, by sockets that are connected and not, each once.
const ASKER: &str = r#"
import socket, sys
port = int(sys.argv[1])
for host in sys.argv[2:]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for connected in (False, True):
        s = socket.socket(family, socket.SOCK_DGRAM)
        s.settimeout(30)
        text = f"{host} {connected}".encode()
        if connected:
            s.connect((host, port))
            assert s.getpeername()[:2] == (host, port), s.getpeername()
            s.send(text)
        else:
            s.sendto(text, (host, port))
        answer, source = s.recvfrom(2000)
        assert (answer, source[:2]) == (text, (host, port)), (answer, source)
print("all came back")
"#;

/// Sends to a port that nobody has, and says what its connected socket then says.
const REFUSED: &str = r#"
import errno, socket, sys
for host in sys.argv[2:]:
    s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(30)
    s.connect((host, int(sys.argv[1])))
    s.send(b"anybody?")
    try:
        s.recv(100)
        print("heard")
    except OSError as e:
        print(errno.errorcode.get(e.errno, str(e)))
"#;

/// Binds one port and talks until a line comes; each answer must be to what was asked.
const TALKER: &str = r#"
import select, socket, sys
name, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("0.0.0.0", 4711))
s.settimeout(30)
number = 0
while number < 200 or not select.select([sys.stdin], [], [], 0)[0]:
    text = f"{name} {number}".encode()
    s.sendto(text, (host, port))
    answer = s.recv(2000)
    assert answer == text, (answer, text)
    number += 1
print("all came back")
"#;

/// Talks once, and stays.
const STAYER: &str = r#"
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.connect((sys.argv[1], int(sys.argv[2])))
s.send(b"x")
s.recv(10)
time.sleep(1000)
"#;

/// Sends back what it gets, over IPv4 and IPv6.
struct Echo {
    over: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Echo {
    fn start(lab: &Lab) -> anyhow::Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for v6 in [false, true] {
            let at = SocketAddr::new(Lab::target(v6), ECHO);
            let socket = lab.server().run(move || UdpSocket::bind(at))?;
            socket.set_read_timeout(Some(Duration::from_millis(50)))?;
            let told = Arc::clone(&over);
            threads.push(std::thread::spawn(move || {
                let mut data = vec![0; 70_000];
                while !told.load(Ordering::Relaxed) {
                    if let Ok((n, from)) = socket.recv_from(&mut data) {
                        // Whoever asked may have gone.
                        let _ = socket.send_to(&data[..n], from);
                    }
                }
            }));
        }
        Ok(Self { over, threads })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A thread that has panicked has said so.
            let _ = thread.join();
        }
    }
}

fn v4() -> String {
    Lab::target(false).to_string()
}

fn v6() -> String {
    Lab::target(true).to_string()
}

fn mapped() -> String {
    format!("::ffff:{}", v4())
}

/// What a program has printed, which has succeeded.
fn said(bed: &TestBed, output: &Output) -> anyhow::Result<String> {
    let errors = String::from_utf8_lossy(&output.stderr);
    let log = bed.bed.last_words();
    ensure!(
        output.status.success(),
        "{}: {errors}\n{log}",
        output.status
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Runs a program in a new namespace by `holdfast run`.
fn run_in(bed: &TestBed, netns: &Netns, words: &[&str]) -> anyhow::Result<String> {
    let run = [&["run", "--"], words].concat();
    let output = netns.output(command(&bed.bed.client_control(), &run))?;
    said(bed, &output)
}

/// The agent hears of the namespace by the datagram itself.
#[test]
fn the_first_datagram_comes_back() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let _echo = Echo::start(&bed.bed.lab)?;
    let port = ECHO.to_string();
    for hosts in [&[v4(), mapped()][..], &[mapped(), v4(), v6()]] {
        let words = ["python3", "-c", ASKER, &port];
        let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
        let words = [&ALONE[..], &words, &hosts].concat();
        let output = bed.run(&words, LIMIT)?;
        ensure!(said(&bed, &output)? == "all came back");
    }
    eventually("the agent leaves", LIMIT, || {
        bed.bed.log("client").contains("no longer listening in it")
    })
}

#[test]
fn run_in_a_namespace_is_ready_for_datagrams_of_both_families() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let _echo = Echo::start(&bed.bed.lab)?;
    let _dns = Dns::start(&bed.bed.lab, &bed.path(""))?;
    let port = ECHO.to_string();
    let inside = Netns::new("box")?;
    for host in [v6(), v4(), mapped()] {
        let words = ["python3", "-c", ASKER, &port, &host];
        ensure!(run_in(&bed, &inside, &words)? == "all came back");
    }
    let program = program().display().to_string();
    let control = bed.bed.client_control().display().to_string();
    let to = format!("{}:{ECHO}", v4());
    let explain = [
        &*program,
        "--control",
        &control,
        "explain",
        "--protocol",
        "udp",
        &to,
    ];
    let told = run_in(&bed, &inside, &explain)?;
    ensure!(told.contains("its rule captures it"), "{told}");
    let (server, port) = (format!("@{}", v4()), Dns::PORT.to_string());
    let dig = [
        "dig", &server, "-p", &port, "+tries=1", "+time=10", "+short",
    ];
    let known = run_in(&bed, &inside, &[&dig[..], &["host.example"]].concat())?;
    ensure!(known == "192.0.2.1", "{known}");
    let closed = CLOSED.to_string();
    let (v4, v6, mapped) = (v4(), v6(), mapped());
    let words = ["python3", "-c", REFUSED, &closed, &v4, &v6, &mapped];
    let refused = run_in(&bed, &inside, &words)?;
    ensure!(
        refused == "ECONNREFUSED\nECONNREFUSED\nECONNREFUSED",
        "{refused}"
    );
    Ok(())
}

#[test]
fn two_namespaces_talk_from_one_port_at_once() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let _echo = Echo::start(&bed.bed.lab)?;
    let (host, port) = (v4(), ECHO.to_string());
    let start = |name: &'static str| {
        let words = ["python3", "-c", TALKER, name, &host, &port];
        bed.start(&[&ALONE[..], &words].concat())
    };
    let children = [start("one")?, start("two")?];
    let flows = || bed.bed.session().map_or(0, |s| s.flows.len());
    eventually("both talk", LIMIT, || flows() == 2)?;
    for mut child in children {
        drop(child.stdin.take());
        let told = said(&bed, &finish(child, LIMIT)?)?;
        ensure!(told.ends_with("all came back"), "{told}");
    }
    Ok(())
}

/// The routes of the namespace that a process is in, for IPv6 addresses of its own.
fn local_routes(pid: u32) -> anyhow::Result<String> {
    let mut command = Command::new("nsenter");
    let netns = format!("--net=/proc/{pid}/ns/net");
    let ip = ["ip", "-6", "route", "show", "table", "local"];
    command.arg(netns).args(ip).stdin(Stdio::null());
    let output = command.output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn the_end_of_the_agent_takes_its_route_along() -> anyhow::Result<()> {
    const ROUTE: &str = "local fde6:b481:678d:568e::/64 dev lo";
    let mut bed = TestBed::new()?;
    let _echo = Echo::start(&bed.bed.lab)?;
    let (host, port) = (v4(), ECHO.to_string());
    let words = ["python3", "-c", STAYER, &host, &port];
    let mut child = bed.start(&[&ALONE[..], &words].concat())?;
    // `unshare` becomes the shell, and that becomes the program.
    let has = |there: bool| {
        let routes = local_routes(child.id());
        routes.is_ok_and(|routes| routes.contains(ROUTE) == there)
    };
    eventually("the agent has its route there", LIMIT, || {
        has(true) && bed.bed.session().is_some_and(|s| !s.flows.is_empty())
    })?;
    let agent = bed.bed.client_agent.take().context("no agent")?;
    let pid = Pid::from_raw(i32::try_from(agent.pid())?);
    kill(pid, Signal::SIGTERM)?;
    eventually("the route is gone", LIMIT, || has(false))?;
    drop(agent);
    child.kill()?;
    child.wait()?;
    Ok(())
}
