//! Limits that the operator sets, and identities that change while a session stands.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use session_lab::{Lab, LinkName};
use session_tests::{TestBed, begun, endless, eventually, program, reader};
use session_user::control::{Client, Request, Response};
use session_user::pki;

/// Nothing in these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);

fn end(mut child: Child) -> anyhow::Result<()> {
    child.kill()?;
    child.wait()?;
    Ok(())
}

/// Another unit on the client's host, which captures nothing.
fn another_unit(bed: &TestBed) -> anyhow::Result<Child> {
    let ca = bed.path("pki");
    let hour = Duration::from_secs(3600);
    pki::issue(&ca, "other", hour, &ca, SystemTime::now(), true)?;
    let text = std::fs::read_to_string(bed.path("client.toml"))?;
    let (before, rest) = text
        .split_once("[[capture]]")
        .context("the client captures nothing")?;
    let links = rest.find("[links]").map_or("", |at| &rest[at..]);
    let config = format!("{before}{links}")
        .replace("client.crt", "other.crt")
        .replace("client.key", "other.key")
        .replace("client.sock", "other.sock");
    let file = bed.path("other.toml");
    std::fs::write(&file, config)?;
    let log = std::fs::File::create(bed.path("other.log"))?;
    let mut command = Command::new(program());
    command.arg("agent").arg("--config").arg(file);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    Ok(bed.bed.lab.client().spawn(command)?)
}

#[test]
fn a_gateway_takes_no_more_sessions_than_it_may() -> anyhow::Result<()> {
    let mut bed = TestBed::with(|c| c.accept_extra = "max_sessions = 1\n".to_owned())?;
    let other = another_unit(&bed)?;
    let log = || std::fs::read_to_string(bed.path("other.log")).unwrap_or_default();
    eventually("the second unit is told of the limit", LIMIT, || {
        log().contains("at a limit")
    })?;
    ensure!(bed.bed.log("gateway").contains("max_sessions is reached"));
    ensure!(!log().contains("a session begins"));
    ensure!(bed.bed.session().is_some_and(|s| s.state == "up"));
    // When the first leaves there is room.
    let first = bed.bed.client_agent.take().context("no agent")?;
    let pid = nix::unistd::Pid::from_raw(i32::try_from(first.pid())?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
    let log = || std::fs::read_to_string(bed.path("other.log")).unwrap_or_default();
    eventually("the second unit gets its session", LIMIT, || {
        log().contains("a session begins")
    })?;
    end(other)
}

/// The peer's limit of streams makes applications wait, not fail.
#[test]
fn streams_beyond_the_limit_wait_for_their_turn() -> anyhow::Result<()> {
    let bed = TestBed::with(|c| c.accept_extra = "max_streams = 2\n".to_owned())?;
    let server = endless(&bed.bed.lab)?;
    let mut first = reader(&bed, server)?;
    begun(&mut first)?;
    let mut second = reader(&bed, server)?;
    begun(&mut second)?;
    let mut third = reader(&bed, server)?;
    eventually("the third connection waits", LIMIT, || {
        waiting(&bed).is_some_and(|n| n == 1)
    })?;
    ensure!(bed.bed.session().is_some_and(|s| s.streams.len() == 2));
    end(first)?;
    begun(&mut third)?;
    ensure!(waiting(&bed) == Some(0));
    end(second)?;
    end(third)
}

fn waiting(bed: &TestBed) -> Option<usize> {
    let mut client = Client::connect(&bed.bed.client_control()).ok()?;
    let Ok(Response::Status(status)) = client.call(&Request::Status) else {
        return None;
    };
    Some(status.peers.first()?.waiting)
}

/// Whoever says nothing, or stops in the middle of a handshake, is cut off in time.
#[test]
fn silent_strangers_are_cut_off() -> anyhow::Result<()> {
    let bed = TestBed::with(|c| c.accept_extra = "handshake_timeout = \"1s\"\n".to_owned())?;
    let gateway = SocketAddr::new(Lab::gateway(false), 7843);
    // Nothing at all; half a preamble; a whole one, and no TLS behind it.
    for opening in [&b""[..], b"HFST\x01", b"HFST\x01\x01\x01\x00"] {
        let left = bed.bed.lab.client().run(move || -> anyhow::Result<bool> {
            let mut socket = TcpStream::connect(gateway)?;
            socket.set_read_timeout(Some(LIMIT))?;
            socket.write_all(opening)?;
            let mut answer = Vec::new();
            // An end or a reset: either way the gateway has left. A time-out is an error.
            match socket.read_to_end(&mut answer) {
                Ok(_) => Ok(true),
                Err(error) => Ok(error.kind() == std::io::ErrorKind::ConnectionReset),
            }
        })?;
        ensure!(left, "{opening:?} is kept");
    }
    // A line may follow the end of the socket.
    let told = |what: &str| bed.bed.log("gateway").contains(what);
    eventually("the log tells of both", LIMIT, || {
        told("no preamble within 1s") && told("did not complete the handshake within 1s")
    })?;
    ensure!(bed.bed.session().is_some_and(|s| s.state == "up"));
    Ok(())
}

/// Keys and certificates are renewed inside the session while bytes flow and a link is cut.
#[test]
fn keys_and_certificates_are_renewed_in_a_running_session() -> anyhow::Result<()> {
    let often = "[session]\nreauth_after = \"1s\"\nrekey_records = 1024\n".to_owned();
    let mut bed = TestBed::with(|c| {
        c.client_extra.clone_from(&often);
        c.gateway_extra.clone_from(&often);
    })?;
    let mut child = reader(&bed, endless(&bed.bed.lab)?)?;
    begun(&mut child)?;
    let renewed = |bed: &TestBed| bed.bed.log("client").matches("are renewed").count();
    eventually("keys are renewed", LIMIT, || renewed(&bed) >= 2)?;
    // A new certificate, taken up without a new session.
    let ca = bed.path("pki");
    let two_hours = Duration::from_secs(7200);
    pki::issue(&ca, "client", two_hours, &ca, SystemTime::now(), true)?;
    let mut client = Client::connect(&bed.bed.client_control())?;
    ensure!(matches!(client.call(&Request::Reload)?, Response::Done(_)));
    let before = renewed(&bed);
    for link in [LinkName::Wifi, LinkName::Lte] {
        bed.bed.lab.cut(link)?;
        // How long the link is away.
        std::thread::sleep(Duration::from_millis(300));
        bed.bed.lab.restore(link)?;
        bed.bed.await_link(LinkName::Wifi, LIMIT)?;
    }
    eventually("keys are renewed again", LIMIT, || {
        renewed(&bed) >= before + 2
    })?;
    // The old certificate is worth nothing any more; the session has long had the new one.
    let serials = issued(&ca)?;
    pki::revoke(&ca, &serials[0], SystemTime::now())?;
    let mut gateway = Client::connect(&bed.path("gateway.sock"))?;
    ensure!(matches!(gateway.call(&Request::Reload)?, Response::Done(_)));
    let after = renewed(&bed);
    eventually("and again", LIMIT, || renewed(&bed) > after)?;
    ensure!(child.try_wait()?.is_none(), "the application noticed");
    let log = bed.bed.log("client");
    ensure!(log.matches("a session begins").count() == 1, "{log}");
    end(child)
}

/// Serial numbers of the client's certificates, oldest first.
fn issued(ca: &std::path::Path) -> anyhow::Result<Vec<String>> {
    let text = std::fs::read_to_string(ca.join("issued.toml"))?;
    let mut serials = Vec::new();
    let mut client = false;
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("name = ") {
            client = name == "\"client\"";
        } else if let Some(serial) = line.strip_prefix("serial = ").filter(|_| client) {
            serials.push(serial.trim_matches('"').to_owned());
        }
    }
    ensure!(serials.len() == 2, "{text}");
    Ok(serials)
}

/// A unit whose certificate ends, and is not renewed, is closed when the grace is over.
#[test]
fn an_expired_unit_is_closed_after_its_grace() -> anyhow::Result<()> {
    let mut bed = TestBed::with(|c| {
        c.holdfast = false;
        c.gateway_extra = "[session]\nexpiry_grace = \"1s\"\n".to_owned();
    })?;
    bed.bed.make_identities()?;
    let ca = bed.path("pki");
    let soon = Duration::from_secs(6);
    pki::issue(&ca, "client", soon, &ca, SystemTime::now(), true)?;
    bed.bed.start_gateway()?;
    bed.bed.start_client()?;
    bed.bed.await_session()?;
    eventually("the gateway closes the session", LIMIT, || {
        bed.bed.log("gateway").contains("has expired")
    })?;
    eventually("the client knows why", LIMIT, || {
        let log = bed.bed.log("client");
        log.contains("expired")
            && log.contains("a session has ended") | log.contains("the session has ended")
    })
}
