//! What connect() says is what the target said.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use session_lab::{Lab, LinkName};
use session_tests::{TestBed, eventually, finish};

/// Nothing in these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(30);

/// Connects in the way that its second argument names, and says what came of it: `0`, or the error's number.
const CONNECT: &str = r#"
import errno, select, socket, sys
addr, port, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
family = socket.AF_INET6 if ":" in addr else socket.AF_INET
s = socket.socket(family, socket.SOCK_STREAM)
if how == "blocking":
    print(s.connect_ex((addr, port)))
else:
    s.setblocking(False)
    first = s.connect_ex((addr, port))
    assert first == errno.EINPROGRESS, first
    poll = select.poll()
    poll.register(s, select.POLLOUT)
    poll.poll(20000)
    print(s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
"#;

/// Addresses behind the gateway that it has routes of its own kind for, and what connect() says there.
const ROUTES: [(&str, &str, i32); 6] = [
    ("unreachable", "198.51.100.1", libc::EHOSTUNREACH),
    ("prohibit", "198.51.100.2", libc::EHOSTUNREACH),
    ("throw", "198.51.100.3", libc::ENETUNREACH),
    ("unreachable", "2001:db8:99::1", libc::EHOSTUNREACH),
    ("prohibit", "2001:db8:99::2", libc::EACCES),
    ("throw", "2001:db8:99::3", libc::ENETUNREACH),
];

fn bed() -> anyhow::Result<TestBed> {
    let bed = TestBed::with(|c| {
        c.allow.push("198.51.100.0/24:*".to_owned());
        c.allow.push("[2001:db8:99::]/48:*".to_owned());
        c.client_extra = String::from(
            "[[capture]]\npeer = \"gateway\"\nto = [\"198.51.100.0/24\", \"2001:db8:99::/48\"]\n",
        );
    })?;
    let server = bed.bed.lab.server();
    for (kind, addr, _) in ROUTES {
        server.ip(&["route", "add", kind, addr])?;
    }
    Ok(bed)
}

/// What connect() to `to` says to a captured application.
fn connect(bed: &TestBed, to: &str, port: u16, how: &str) -> anyhow::Result<i32> {
    let port = port.to_string();
    let said = bed.succeed(&["python3", "-c", CONNECT, to, &port, how], LIMIT)?;
    Ok(said.trim().parse()?)
}

/// The address as an application with an IPv6 socket may write it.
fn mapped(addr: &str) -> Option<String> {
    let IpAddr::V4(addr) = addr.parse().ok()? else {
        return None;
    };
    Some(addr.to_ipv6_mapped().to_string())
}

#[test]
fn every_answer_of_the_target_is_connects_own() -> anyhow::Result<()> {
    let bed = bed()?;
    let mut expected: Vec<(String, u16, i32)> = Vec::new();
    let mut listeners = Vec::new();
    for v6 in [false, true] {
        let target = Lab::target(v6);
        let listener = bed
            .bed
            .lab
            .server()
            .run(move || TcpListener::bind((target, 0)))?;
        expected.push((target.to_string(), listener.local_addr()?.port(), 0));
        expected.push((target.to_string(), 9, libc::ECONNREFUSED));
        listeners.push(listener);
    }
    expected.extend(ROUTES.map(|(_, addr, errno)| (addr.to_owned(), 80, errno)));
    let as_mapped: Vec<_> = expected
        .iter()
        .filter_map(|(addr, port, errno)| Some((mapped(addr)?, *port, *errno)))
        .collect();
    expected.extend(as_mapped);
    for (addr, port, errno) in expected {
        for how in ["blocking", "polled"] {
            let said = connect(&bed, &addr, port, how)?;
            ensure!(
                said == errno,
                "{how} connect() to {addr} port {port} said {said}, not {errno}\n{}",
                bed.bed.last_words()
            );
        }
    }
    Ok(())
}

/// A captured application that connects to `to` and says what came of it.
fn connecting(bed: &TestBed, to: SocketAddr) -> anyhow::Result<Child> {
    let (ip, port) = (to.ip().to_string(), to.port().to_string());
    bed.start(&["python3", "-c", CONNECT, &ip, &port, "blocking"])
}

fn ensure_connected(child: Child) -> anyhow::Result<()> {
    let output = finish(child, LIMIT)?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(said.trim() == "0", "connect() said {said}");
    Ok(())
}

/// Waits until so many streams wait for their target's answer.
fn await_unanswered(bed: &TestBed, count: usize) -> anyhow::Result<()> {
    eventually(&format!("{count} connections wait"), LIMIT, || {
        bed.bed.session().is_some_and(|session| {
            session
                .streams
                .iter()
                .filter(|s| s.state == "connecting")
                .count()
                == count
        })
    })
}

#[test]
fn an_application_waits_while_there_is_no_link_and_then_connects() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let listener = bed.listen()?;
    for link in LinkName::ALL {
        bed.bed.lab.cut(link)?;
    }
    let child = connecting(&bed, listener.local_addr()?)?;
    await_unanswered(&bed, 1)?;
    // Its kernel sends the SYN again after 1 s and after 3 s, and neither may slip through.
    let control = bed.bed.client_control();
    eventually("retransmissions are held", LIMIT, || {
        let status = session_tests::holdfast(&control, &["status", "--json"]);
        status.is_ok_and(|out| {
            let status: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
            status["capture"]["held_again"]
                .as_u64()
                .is_some_and(|n| n >= 2)
        })
    })?;
    for link in LinkName::ALL {
        bed.bed.lab.restore(link)?;
    }
    ensure_connected(child)
}

#[test]
fn an_application_waits_while_there_is_no_session_and_then_connects() -> anyhow::Result<()> {
    let mut bed = TestBed::new()?;
    let listener = bed.listen()?;
    bed.bed.gateway_agent = None;
    bed.bed.client_agent = None;
    bed.bed.start_client()?;
    let control = bed.bed.client_control();
    let waiting = |count: u64| {
        let status = session_tests::holdfast(&control, &["status", "--json"]);
        status.is_ok_and(|out| {
            let status: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
            status["peers"][0]["waiting"] == count
        })
    };
    eventually("the agent captures", LIMIT, || waiting(0))?;
    let child = connecting(&bed, listener.local_addr()?)?;
    eventually("the connection waits", LIMIT, || waiting(1))?;
    // One that gives up is not kept.
    let mut other = connecting(&bed, listener.local_addr()?)?;
    eventually("both wait", LIMIT, || waiting(2))?;
    other.kill()?;
    other.wait()?;
    eventually("one waits", LIMIT, || waiting(1))?;
    bed.bed.start_gateway()?;
    ensure_connected(child)
}

#[test]
fn what_an_application_gives_up_does_not_stay_open_at_the_target() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let listener = bed.listen()?;
    for link in LinkName::ALL {
        bed.bed.lab.cut(link)?;
    }
    let mut child = connecting(&bed, listener.local_addr()?)?;
    await_unanswered(&bed, 1)?;
    child.kill()?;
    child.wait()?;
    await_unanswered(&bed, 0)?;
    for link in LinkName::ALL {
        bed.bed.lab.restore(link)?;
    }
    // OPEN was on its way: the target may have been connected, and then is reset. The one that follows stays, for
    // its target never ends its side.
    ensure_connected(connecting(&bed, listener.local_addr()?)?)?;
    eventually("only the second connection is left", LIMIT, || {
        let session = bed.bed.gateway_session();
        session.is_some_and(|session| session.streams_total == 2 && session.streams.len() == 1)
    })
}

#[test]
fn an_early_connection_succeeds_at_once_and_is_reset_if_the_target_refuses() -> anyhow::Result<()> {
    const SAY: &str = r#"
import socket, sys
s = socket.socket()
print(s.connect_ex((sys.argv[1], int(sys.argv[2]))))
try:
    s.sendall(b"hello")
    print(s.recv(5).decode())
except OSError as e:
    print(e.errno)
"#;
    let bed = TestBed::with(|c| c.capture_extra = String::from("connect = \"early\"\n"))?;
    let listener = bed.listen()?;
    let to = listener.local_addr()?;
    std::thread::spawn(move || {
        let (mut socket, _) = listener.accept()?;
        let mut heard = [0; 5];
        std::io::Read::read_exact(&mut socket, &mut heard)?;
        std::io::Write::write_all(&mut socket, &heard)
    });
    for (port, expected) in [(to.port(), "0\nhello\n"), (9, "0\n104\n")] {
        let words = [
            "python3",
            "-c",
            SAY,
            &to.ip().to_string(),
            &port.to_string(),
        ];
        let said = bed.succeed(&words, LIMIT)?;
        ensure!(said == expected, "port {port}: {said}");
    }
    Ok(())
}

#[test]
fn many_connections_at_once_have_each_their_own_answer() -> anyhow::Result<()> {
    const MANY: &str = r#"
import asyncio, errno, sys
addr, port, closed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
async def one(i):
    try:
        r, w = await asyncio.open_connection(addr, port if i % 2 else closed)
        w.write(b"%d\n" % i)
        said = await r.readline()
        w.close()
        return said == b"%d\n" % i and i % 2 == 1
    except ConnectionRefusedError:
        return i % 2 == 0
async def main():
    right = await asyncio.gather(*(one(i) for i in range(1000)))
    print(sum(right))
asyncio.run(main())
"#;
    let bed = TestBed::new()?;
    let target = Lab::target(false);
    let listener = bed
        .bed
        .lab
        .server()
        .run(move || TcpListener::bind((target, 0)))?;
    let to: SocketAddr = listener.local_addr()?;
    std::thread::spawn(move || {
        for socket in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut line = Vec::new();
                let mut byte = [0];
                while std::io::Read::read_exact(&mut &socket, &mut byte).is_ok() {
                    line.push(byte[0]);
                    if byte == *b"\n" {
                        // The application may be gone.
                        let _ = std::io::Write::write_all(&mut &socket, &line);
                        return;
                    }
                }
            });
        }
    });
    let began = Instant::now();
    let said = bed.succeed(
        &[
            "python3",
            "-c",
            MANY,
            &to.ip().to_string(),
            &to.port().to_string(),
            "9",
        ],
        LIMIT,
    )?;
    let right: u32 = said.trim().parse().context(said)?;
    ensure!(
        right == 1000,
        "{right} of 1000 were answered rightly, in {:?}\n{}",
        began.elapsed(),
        bed.bed.last_words()
    );
    Ok(())
}
