//! The lab does what it promises, and leaves nothing behind.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use session_lab::{
    Direction, HostState, Lab, LabConfig, LinkName, Netns, Shape, TestCgroup, cgroup2_root,
};

/// Longer than any answer in the lab takes on a busy machine.
const ANSWER: Duration = Duration::from_secs(2);
/// A datagram that did not arrive by now will not.
const SILENCE: Duration = Duration::from_millis(300);

/// Answers every datagram, in the lab's server.
struct Echo {
    addr: SocketAddr,
    socket: UdpSocket,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Echo {
    fn start(lab: &Lab, ip: IpAddr) -> anyhow::Result<Self> {
        let socket = lab.server().run(move || UdpSocket::bind((ip, 0)))?;
        let addr = socket.local_addr()?;
        let answering = socket.try_clone()?;
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((n, from)) = answering.recv_from(&mut buffer) {
                if n == 0 {
                    return;
                }
                // Its link may be cut: then there is nobody to answer.
                let _ = answering.send_to(&buffer[..n], from);
            }
        });
        Ok(Self {
            addr,
            socket,
            thread: Some(thread),
        })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // A datagram to itself ends it; loopback loses none.
        let _ = self.socket.send_to(b"", self.addr);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Whether a datagram over `link` is answered.
fn reaches(lab: &Lab, link: LinkName, to: SocketAddr, wait: Duration) -> bool {
    let from: IpAddr = if to.is_ipv4() {
        link.client_v4().into()
    } else {
        link.client_v6().into()
    };
    lab.client().run(move || {
        let ask = || -> std::io::Result<()> {
            let socket = UdpSocket::bind((from, 0))?;
            bind_device(&socket, link)?;
            socket.connect(to)?;
            socket.set_read_timeout(Some(wait))?;
            socket.send(b"?")?;
            socket.recv(&mut [0; 8]).map(|_| ())
        };
        ask().is_ok()
    })
}

fn bind_device(socket: &UdpSocket, link: LinkName) -> std::io::Result<()> {
    let name = std::ffi::OsString::from(link.name());
    nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::BindToDevice, &name)
        .map_err(std::io::Error::from)
}

fn lab() -> anyhow::Result<Lab> {
    Lab::new(&LabConfig::default())
}

#[test]
fn both_links_reach_the_server_in_both_families() -> anyhow::Result<()> {
    let lab = lab()?;
    for v6 in [false, true] {
        for ip in [Lab::gateway(v6), Lab::target(v6)] {
            let echo = Echo::start(&lab, ip)?;
            for link in LinkName::ALL {
                ensure!(
                    reaches(&lab, link, echo.addr, ANSWER),
                    "{link:?} does not reach {ip}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn targets_can_be_out_of_the_networks_reach() -> anyhow::Result<()> {
    let lab = Lab::new(&LabConfig {
        targets_routed: false,
        ..LabConfig::default()
    })?;
    for v6 in [false, true] {
        let gateway = Echo::start(&lab, Lab::gateway(v6))?;
        let target = Echo::start(&lab, Lab::target(v6))?;
        ensure!(reaches(&lab, LinkName::Wifi, gateway.addr, ANSWER));
        ensure!(!reaches(&lab, LinkName::Wifi, target.addr, SILENCE));
    }
    Ok(())
}

#[test]
fn a_cut_link_is_dead_and_comes_back_whole() -> anyhow::Result<()> {
    let lab = lab()?;
    for v6 in [false, true] {
        let echo = Echo::start(&lab, Lab::gateway(v6))?;
        for _ in 0..3 {
            lab.cut(LinkName::Wifi)?;
            ensure!(!reaches(&lab, LinkName::Wifi, echo.addr, SILENCE));
            ensure!(reaches(&lab, LinkName::Lte, echo.addr, ANSWER));
            lab.restore(LinkName::Wifi)?;
            ensure!(reaches(&lab, LinkName::Wifi, echo.addr, ANSWER));
        }
    }
    Ok(())
}

#[test]
fn carrier_goes_and_comes_back() -> anyhow::Result<()> {
    let lab = lab()?;
    let echo = Echo::start(&lab, Lab::gateway(false))?;
    lab.carrier_down(LinkName::Lte)?;
    let shown = lab.client().ip(&["link", "show", "dev", "lte0"])?;
    ensure!(shown.contains("NO-CARRIER"), "{shown}");
    ensure!(!reaches(&lab, LinkName::Lte, echo.addr, SILENCE));
    ensure!(reaches(&lab, LinkName::Wifi, echo.addr, ANSWER));
    lab.carrier_up(LinkName::Lte)?;
    ensure!(reaches(&lab, LinkName::Lte, echo.addr, ANSWER));
    Ok(())
}

#[test]
fn a_black_hole_swallows_the_direction_that_was_named() -> anyhow::Result<()> {
    let lab = lab()?;
    let echo = Echo::start(&lab, Lab::gateway(false))?;
    for direction in [Direction::Up, Direction::Down, Direction::Both] {
        lab.blackhole(LinkName::Wifi, direction)?;
        ensure!(
            !reaches(&lab, LinkName::Wifi, echo.addr, SILENCE),
            "{direction:?} lets an answer through"
        );
        ensure!(
            reaches(&lab, LinkName::Lte, echo.addr, ANSWER),
            "{direction:?} swallows the other link"
        );
        // Which way: does a datagram of the client's get to the server?
        let seen = arrives(&lab, LinkName::Wifi)?;
        ensure!(seen == (direction == Direction::Down), "{direction:?}");
        lab.unblackhole(LinkName::Wifi)?;
        ensure!(reaches(&lab, LinkName::Wifi, echo.addr, ANSWER));
    }
    Ok(())
}

/// Whether a datagram of the client's gets to the server over `link`.
fn arrives(lab: &Lab, link: LinkName) -> anyhow::Result<bool> {
    let server = lab
        .server()
        .run(|| UdpSocket::bind((Lab::gateway(false), 0)))?;
    server.set_read_timeout(Some(SILENCE))?;
    let to = server.local_addr()?;
    lab.client().run(move || -> std::io::Result<()> {
        let socket = UdpSocket::bind((link.client_v4(), 0))?;
        bind_device(&socket, link)?;
        socket.send_to(b"!", to).map(|_| ())
    })?;
    Ok(server.recv(&mut [0; 8]).is_ok())
}

/// A limit is a limit, and goes when it is taken away: the same bytes with and without.
#[test]
fn a_rate_limit_slows_a_link_until_it_is_taken_away() -> anyhow::Result<()> {
    let lab = lab()?;
    let free = transfer(&lab, 2 << 20)?;
    lab.rate(LinkName::Wifi, Some(20))?;
    let slow = transfer(&lab, 2 << 20)?;
    lab.rate(LinkName::Wifi, None)?;
    let again = transfer(&lab, 2 << 20)?;
    // 2 MiB at 20 Mbit/s are 0.84 s.
    ensure!(
        slow > Duration::from_millis(700),
        "2 MiB at 20 Mbit/s took {slow:?}"
    );
    ensure!(
        free < slow && again < slow,
        "without a limit {free:?} and {again:?}, with one {slow:?}"
    );
    Ok(())
}

#[test]
fn a_round_trip_takes_as_long_as_asked() -> anyhow::Result<()> {
    let lab = lab()?;
    let rtt = Duration::from_millis(40);
    lab.round_trip(rtt)?;
    for v6 in [false, true] {
        let echo = Echo::start(&lab, Lab::gateway(v6))?;
        let to = echo.addr;
        let took = lab.client().run(move || -> std::io::Result<Duration> {
            let any: IpAddr = if v6 {
                "::".parse().unwrap()
            } else {
                "0.0.0.0".parse().unwrap()
            };
            let socket = UdpSocket::bind((any, 0))?;
            socket.set_read_timeout(Some(ANSWER))?;
            let mut best = ANSWER;
            for _ in 0..5 {
                let begun = Instant::now();
                socket.send_to(b"?", to)?;
                socket.recv(&mut [0; 8])?;
                best = best.min(begun.elapsed());
            }
            Ok(best)
        })?;
        // The best of five: a busy machine only ever makes it longer.
        ensure!(took >= rtt && took < rtt * 2, "v6 {v6}: {took:?}");
    }
    ensure!(lab.lateness_p99() <= Duration::from_millis(10));
    Ok(())
}

/// A packet that is above the path's MTU vanishes, and nobody is told.
#[test]
fn large_packets_vanish_in_an_mtu_hole() -> anyhow::Result<()> {
    let lab = lab()?;
    let shape = Shape {
        mtu: Some(1280),
        ..Shape::default()
    };
    lab.shape(LinkName::Wifi, Direction::Both, shape)?;
    let server = lab
        .server()
        .run(|| UdpSocket::bind((Lab::gateway(false), 0)))?;
    server.set_read_timeout(Some(SILENCE))?;
    let to = server.local_addr()?;
    // With 28 bytes of IP and UDP headers: 1281 and 1280.
    for (payload, passes) in [(1253, false), (1252, true)] {
        lab.client().run(move || -> std::io::Result<()> {
            let socket = UdpSocket::bind((LinkName::Wifi.client_v4(), 0))?;
            socket.send_to(&vec![0; payload], to).map(|_| ())
        })?;
        let arrived = server.recv(&mut [0; 2048]).is_ok();
        ensure!(arrived == passes, "{payload} bytes: arrived {arrived}");
    }
    Ok(())
}

/// Once the NAT has forgotten, nothing passes in either direction, and neither end is told.
#[test]
fn a_nat_forgets_its_mappings_in_silence() -> anyhow::Result<()> {
    let lab = lab()?;
    lab.nat(LinkName::Wifi)?;
    let listener = lab
        .server()
        .run(|| TcpListener::bind((Lab::gateway(false), 0)))?;
    let to = listener.local_addr()?;
    let connect = || lab.client().run(move || TcpStream::connect(to));
    let mut near = connect()?;
    let (mut far, from) = listener.accept()?;
    ensure!(
        from.ip() == IpAddr::from([10, 10, 9, 1]),
        "not translated: {from}"
    );
    let mut byte = [0];
    near.write_all(b"1")?;
    far.read_exact(&mut byte)?;

    lab.forget_mappings()?;
    for end in [&mut near, &mut far] {
        end.write_all(b"2")?;
    }
    for end in [&mut near, &mut far] {
        end.set_read_timeout(Some(SILENCE))?;
        let kind = end.read(&mut byte).map_err(|e| e.kind());
        ensure!(kind == Err(std::io::ErrorKind::WouldBlock), "{kind:?}");
    }
    // A new connection gets a new mapping.
    connect()?.write_all(b"3")?;
    let (mut again, _) = listener.accept()?;
    again.read_exact(&mut byte)?;
    ensure!(&byte == b"3");
    Ok(())
}

/// The time that `bytes` take from the server to the client over the better link.
fn transfer(lab: &Lab, bytes: usize) -> anyhow::Result<Duration> {
    let listener = lab
        .server()
        .run(|| TcpListener::bind((Lab::gateway(false), 0)))?;
    let to = listener.local_addr()?;
    let sender = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut socket, _) = listener.accept()?;
        std::io::Write::write_all(&mut socket, &vec![7; bytes])?;
        socket.shutdown(Shutdown::Write)
    });
    let mut socket = lab.client().run(move || TcpStream::connect(to))?;
    let began = Instant::now();
    let got = std::io::copy(&mut socket, &mut std::io::sink())?;
    ensure!(got == bytes as u64, "{got} of {bytes} bytes arrived");
    sender
        .join()
        .map_err(|_| anyhow::anyhow!("the sender panicked"))??;
    Ok(began.elapsed())
}

#[test]
fn the_host_is_left_as_it_was() -> anyhow::Result<()> {
    let before = HostState::here();
    {
        let lab = lab()?;
        lab.cut(LinkName::Wifi)?;
        let during = before.differences(&HostState::here());
        ensure!(during.is_empty(), "with a lab: {during}");
        // And the comparison sees what it is there to see.
        let client = HostState::of(lab.client());
        lab.client()
            .ip(&["rule", "add", "from", "192.0.2.1", "lookup", "7"])?;
        let seen = client.differences(&HostState::of(lab.client()));
        ensure!(seen.contains("192.0.2.1"), "{seen}");
    }
    let after = before.differences(&HostState::here());
    ensure!(after.is_empty(), "after a lab: {after}");
    Ok(())
}

#[test]
fn programs_and_namespaces_end_with_the_lab() -> anyhow::Result<()> {
    let netns = Netns::new("short-lived")?;
    let mut command = Command::new("sleep");
    command.arg("1000");
    let mut child = netns.spawn(command)?;
    drop(netns);
    ensure!(gone(&mut child)?, "a program has survived its namespace");
    Ok(())
}

/// Whether `child` ends by itself.
fn gone(child: &mut std::process::Child) -> anyhow::Result<bool> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if child.try_wait()?.is_some() {
            return Ok(true);
        }
        // A child's end can be waited for, but not with a limit.
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill()?;
    child.wait()?;
    Ok(false)
}

/// This test starts itself as another process, which makes a lab and a program in it and is
/// killed; nothing of it may be left.
#[test]
fn a_killed_owner_leaves_nothing() -> anyhow::Result<()> {
    const OWNER: &str = "SESSION_LAB_TEST_OWNER";
    if std::env::var_os(OWNER).is_some() {
        let lab = lab()?;
        let mut command = Command::new("sleep");
        command.arg("1000");
        let sleeper = lab.client().spawn(command)?;
        println!("sleeper {}", sleeper.id());
        // It is ended before: that is what is tested.
        std::thread::sleep(Duration::from_secs(60));
        return Ok(());
    }
    let mut owner = Command::new(std::env::current_exe()?)
        .args(["a_killed_owner_leaves_nothing", "--exact", "--nocapture"])
        .env(OWNER, "1")
        .stdout(Stdio::piped())
        .spawn()?;
    let out = owner.stdout.take().context("no output")?;
    let pid = std::io::BufRead::lines(std::io::BufReader::new(out))
        .map_while(Result::ok)
        .find_map(|line| line.split("sleeper ").nth(1)?.trim().parse::<u32>().ok());
    owner.kill()?;
    owner.wait()?;
    let pid = pid.context("the owner made no lab")?;
    let process = Path::new("/proc").join(pid.to_string());
    let deadline = Instant::now() + Duration::from_secs(10);
    while is_running(&process) {
        ensure!(Instant::now() < deadline, "process {pid} is still there");
        // It is another process's child, whose end nobody tells.
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// A zombie that nobody reaps does not run.
fn is_running(process: &Path) -> bool {
    std::fs::read_to_string(process.join("stat"))
        .is_ok_and(|s| s.rsplit(") ").next().is_some_and(|s| !s.starts_with('Z')))
}

#[test]
fn a_cgroup_ends_with_its_processes() -> anyhow::Result<()> {
    let cgroup = TestCgroup::new()?;
    let path = cgroup.path().to_owned();
    ensure!(path.starts_with(cgroup2_root()?));
    let mut command = Command::new("sleep");
    command.arg("1000");
    cgroup.enter(&mut command)?;
    let mut child = command.spawn()?;
    let inside = std::fs::read_to_string(path.join("cgroup.procs"))?;
    ensure!(inside.trim() == child.id().to_string(), "{inside}");
    drop(cgroup);
    ensure!(gone(&mut child)?, "a process has survived its cgroup");
    ensure!(!path.exists());
    Ok(())
}
