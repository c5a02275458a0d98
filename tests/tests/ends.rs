//! Ends are told apart: an error is never a clean end, a hold is never an error, and nothing hangs.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use session_lab::{Lab, LinkName};
use session_tests::{
    Nginx, TestBed, begun, endless, eventually, finish, make_file, reader, said, sha256,
};
use session_user::bench::bed::Bed;

/// Nothing in these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);

fn kill_hard(pid: u32) -> anyhow::Result<()> {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid)?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)?;
    Ok(())
}

#[test]
fn a_killed_client_agent_resets_its_applications() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let mut child = reader(&bed, endless(&bed.bed.lab)?)?;
    begun(&mut child)?;
    kill_hard(bed.bed.client_agent.as_ref().context("no agent")?.pid())?;
    let said = said(child, LIMIT)?;
    ensure!(
        said.starts_with("error 104"),
        "a truncated stream ended with: {said}"
    );
    Ok(())
}

#[test]
fn a_killed_gateway_resets_the_applications_and_the_targets() -> anyhow::Result<()> {
    let bed =
        TestBed::with(|c| c.client_extra = "[session]\npeer_gone_after = \"1s\"\n".to_owned())?;
    let mut child = reader(&bed, endless(&bed.bed.lab)?)?;
    begun(&mut child)?;
    kill_hard(bed.bed.gateway_agent.as_ref().context("no agent")?.pid())?;
    let said = said(child, LIMIT)?;
    ensure!(
        said.starts_with("error 104"),
        "a truncated stream ended with: {said}"
    );
    Ok(())
}

#[test]
fn a_restarted_gateway_resets_old_streams_within_two_seconds() -> anyhow::Result<()> {
    let mut bed = TestBed::new()?;
    let server = endless(&bed.bed.lab)?;
    let mut child = reader(&bed, server)?;
    begun(&mut child)?;
    kill_hard(bed.bed.gateway_agent.as_ref().context("no agent")?.pid())?;
    bed.bed.gateway_agent = None;
    bed.bed.start_gateway()?;
    let restarted = Instant::now();
    let words = said(child, LIMIT)?;
    let took = restarted.elapsed();
    ensure!(
        words.starts_with("error 104"),
        "a stream of a forgotten session ended with: {words}"
    );
    ensure!(
        took < Duration::from_secs(2),
        "it took {took:?} after the gateway was back"
    );
    // And the new session carries new streams.
    bed.bed.await_session()?;
    let mut child = reader(&bed, server)?;
    begun(&mut child)?;
    child.kill()?;
    child.wait()?;
    Ok(())
}

#[test]
fn a_minute_without_any_link_is_held() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let nginx = Nginx::start(&bed.bed.lab, &bed.path(""))?;
    let expected = make_file(&nginx.root.join("file"), 64 << 20)?;
    let out = bed.path("out");
    let url = format!(
        "http://{}/file",
        SocketAddr::new(Lab::target(false), Nginx::PORT)
    );
    let curl = bed.start(&[
        "curl",
        "-sS",
        "-f",
        "--limit-rate",
        "12M",
        "-o",
        &out.display().to_string(),
        &url,
    ])?;
    eventually("the transfer begins", LIMIT, || {
        std::fs::metadata(&out).is_ok_and(|m| m.len() > 4 << 20)
    })?;
    for link in LinkName::ALL {
        bed.bed.lab.cut(link)?;
    }
    // How long no link is there is what is tested.
    std::thread::sleep(Duration::from_secs(60));
    let session = bed.bed.session().context("the session has gone")?;
    ensure!(
        session.state == "holding",
        "the session is {}",
        session.state
    );
    ensure!(
        session.memory_bytes <= 64 << 20,
        "it holds {} bytes",
        session.memory_bytes
    );
    for link in LinkName::ALL {
        bed.bed.lab.restore(link)?;
    }
    let output = finish(curl, LIMIT)?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    ensure!(sha256(&out)? == expected, "the file arrived changed");
    Ok(())
}

#[test]
fn what_no_rule_allows_is_refused_and_logged() -> anyhow::Result<()> {
    let bed = TestBed::with(|c| c.allow = vec![format!("{}/32:9999", Lab::target(false))])?;
    let server = endless(&bed.bed.lab)?;
    let said = said(reader(&bed, server)?, LIMIT)?;
    ensure!(
        said.starts_with("error 113"),
        "a denied target showed as: {said}"
    );
    eventually("the log names the denial", LIMIT, || {
        let log = bed.bed.log("gateway");
        log.contains("EACCES: peer `client` may not reach")
            && log.contains("none of the peer's rules covers it")
    })
    .with_context(|| bed.bed.log("gateway"))
}

/// Half-close in both directions through the whole path.
#[test]
fn half_closed_streams_carry_on_in_the_other_direction() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let listener = bed
        .bed
        .lab
        .server()
        .run(|| TcpListener::bind((Lab::target(false), 0)))?;
    let addr = listener.local_addr()?;
    let server = std::thread::spawn(move || -> anyhow::Result<(Vec<u8>, Vec<u8>)> {
        // First: the client ends its direction, then we answer. Second: we end ours, then it talks.
        let mut first = Vec::new();
        let (mut socket, _) = listener.accept()?;
        socket.read_to_end(&mut first)?;
        socket.write_all(&first)?;
        drop(socket);
        let (mut socket, _) = listener.accept()?;
        socket.write_all(b"over to you")?;
        socket.shutdown(std::net::Shutdown::Write)?;
        let mut second = Vec::new();
        socket.read_to_end(&mut second)?;
        Ok((first, second))
    });
    let program = r#"
import socket, sys
a = (sys.argv[1], int(sys.argv[2]))
def rest(s):
    b = b""
    while True:
        d = s.recv(65536)
        if not d: return b
        b += d
s = socket.create_connection(a); s.sendall(b"x" * 300000); s.shutdown(socket.SHUT_WR)
print(len(rest(s)))
s = socket.create_connection(a)
print(rest(s).decode()); s.sendall(b"y" * 200000); s.close()
"#;
    let said = bed.succeed(
        &[
            "python3",
            "-c",
            program,
            &addr.ip().to_string(),
            &addr.port().to_string(),
        ],
        LIMIT,
    )?;
    ensure!(
        said.lines().collect::<Vec<_>>() == ["300000", "over to you"],
        "the client saw {said:?}"
    );
    let (first, second) = server
        .join()
        .map_err(|_| anyhow::anyhow!("the server panicked"))??;
    ensure!(
        first.len() == 300_000 && second == vec![b'y'; 200_000],
        "the server saw something else"
    );
    Ok(())
}

/// A sender whose reader is stuck is held back; the agents' memory does not grow.
#[test]
fn a_stuck_reader_holds_its_sender_back() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let listener = bed
        .bed
        .lab
        .server()
        .run(|| TcpListener::bind((Lab::target(false), 0)))?;
    let addr = listener.local_addr()?;
    let stuck = std::thread::spawn(move || listener.accept());
    let program = r#"
import socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2]))); s.settimeout(3)
n = 0
try:
    while n < 1 << 30: n += s.send(b"z" * 65536)
except TimeoutError: pass
print(n)
"#;
    let said = bed.succeed(
        &[
            "python3",
            "-c",
            program,
            &addr.ip().to_string(),
            &addr.port().to_string(),
        ],
        LIMIT,
    )?;
    let taken: usize = said.trim().parse()?;
    // The sender's own kernel may keep that much, with Holdfast or without. Then come the agent's receive buffer, the
    // stream's window, and what the gateway's kernel and the target's keep: a few hundred kilobytes each.
    let wmem = fs::read_to_string("/proc/sys/net/ipv4/tcp_wmem")?;
    let own: usize = wmem
        .split_whitespace()
        .last()
        .context("tcp_wmem")?
        .parse()?;
    ensure!(
        taken < own + (4 << 20),
        "{taken} bytes were taken from the sender, of which its own kernel keeps {own}"
    );
    drop(stuck.join());
    Ok(())
}

fn drains(bed: &mut Bed, signal: &str) -> anyhow::Result<()> {
    let pid = bed
        .client_agent
        .as_ref()
        .context("no agent")?
        .pid()
        .to_string();
    ensure!(
        Command::new("kill")
            .args([signal, &pid])
            .status()?
            .success(),
        "kill failed"
    );
    Ok(())
}

#[test]
fn sigterm_drains_and_a_second_one_ends() -> anyhow::Result<()> {
    let mut bed = TestBed::new()?;
    let server = endless(&bed.bed.lab)?;
    let mut child = reader(&bed, server)?;
    begun(&mut child)?;
    drains(&mut bed.bed, "-TERM")?;
    eventually("the agent drains", LIMIT, || {
        bed.bed.log("client").contains("draining")
    })?;
    ensure!(
        child.try_wait()?.is_none(),
        "the stream did not outlive the first signal"
    );
    // A new connection goes direct: the targets are routed in this lab.
    let mut direct = reader(&bed, server)?;
    begun(&mut direct)?;
    drains(&mut bed.bed, "-TERM")?;
    let words = said(child, LIMIT)?;
    ensure!(
        words.starts_with("error 104"),
        "the second signal showed as: {words}"
    );
    ensure!(
        direct.try_wait()?.is_none(),
        "the direct connection was touched"
    );
    direct.kill()?;
    direct.wait()?;
    eventually("the agent ends", LIMIT, || {
        bed.bed.log("client").contains("the agent has ended")
    })
}

/// The carrier of a link goes, not the link itself.
#[test]
fn carrier_loss_is_a_cut() -> anyhow::Result<()> {
    let mut bed = TestBed::new()?;
    let mut child = reader(&bed, endless(&bed.bed.lab)?)?;
    begun(&mut child)?;
    for _ in 0..3 {
        bed.bed.await_link(LinkName::Wifi, LIMIT)?;
        bed.bed.lab.carrier_down(LinkName::Wifi)?;
        bed.bed.await_link(LinkName::Lte, LIMIT)?;
        bed.bed.lab.carrier_up(LinkName::Wifi)?;
    }
    ensure!(child.try_wait()?.is_none(), "the application noticed");
    child.kill()?;
    child.wait()?;
    Ok(())
}

/// Bytes that are not a Holdfast peer's end their connection and nothing else.
#[test]
fn strangers_at_the_gateway_harm_nobody() -> anyhow::Result<()> {
    let mut bed = TestBed::new()?;
    let mut child = reader(&bed, endless(&bed.bed.lab)?)?;
    begun(&mut child)?;
    let gateway = SocketAddr::new(Lab::gateway(false), 7843);
    let mut replayed_token = b"HFST\x01\x01\x02\x00".to_vec();
    replayed_token.extend([7; 16]);
    replayed_token.extend([0x80; 64]);
    let attacks: Vec<(Vec<u8>, &[u8])> = vec![
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), b""),
        (vec![0xff; 70_000], b""),
        (b"HFST\x09\x0a\x01\x00".to_vec(), b"HFST\x01\x01\x00\x00"),
        (replayed_token, b"HFST\x01\x02\x00\x00"),
        (
            [
                b"HFST\x01\x01\x01\x00".to_vec(),
                vec![0x16, 3, 1, 0xff, 0xff],
                vec![0; 70_000],
            ]
            .concat(),
            b"HFST\x01\x00\x00\x00",
        ),
    ];
    for (bytes, expected) in attacks {
        let answer = bed
            .bed
            .lab
            .client()
            .run(move || -> std::io::Result<Vec<u8>> {
                let mut socket = TcpStream::connect(gateway)?;
                socket.set_read_timeout(Some(Duration::from_secs(20)))?;
                // The gateway may hang up before it has read everything.
                let _ = socket.write_all(&bytes);
                let mut answer = Vec::new();
                let _ = socket.read_to_end(&mut answer);
                Ok(answer)
            })?;
        ensure!(
            answer.starts_with(expected),
            "expected {expected:?}, the gateway said {answer:?}"
        );
    }
    ensure!(child.try_wait()?.is_none(), "the application noticed");
    let session = bed.bed.session().context("the session has gone")?;
    ensure!(
        session.state == "up" && session.handovers_total == 0,
        "the session noticed"
    );
    child.kill()?;
    child.wait()?;
    bed.bed.client_agent = None;
    Ok(())
}
