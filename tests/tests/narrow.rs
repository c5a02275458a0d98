//! Links that let small packets through and lose large ones without a word.

use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use session_lab::{Direction, Lab, LinkName, Shape};
use session_tests::{
    Nginx, TestBed, begun, endless, eventually, finish, holdfast_says, make_file, reader, sha256,
};

/// Nothing in these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);
/// What an upload sends.
const BYTES: usize = 6_000_000;

/// What one sends that is still under way when its link has been left and returned to, which is after 3 s at first and 6 s
/// then: only what is large meets the hole, and not each time is there something behind it that tells.
const BYTES_LONG: usize = 8 * BYTES;

/// A Python program that sends so many bytes, 4 MB a second, and waits until all have arrived.
const SENDER: &str = r#"
import socket, sys, time
s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
left = int(sys.argv[3])
print("first", flush=True)
while left:
    n = min(left, 20000)
    s.sendall(b"x" * n)
    left -= n
    time.sleep(0.005)
s.shutdown(socket.SHUT_WR)
print(s.recv(64).decode(), flush=True)
"#;

/// A server in the lab that reads one connection to its end and answers how many bytes came.
fn counter(lab: &Lab) -> anyhow::Result<SocketAddr> {
    let listener = lab
        .server()
        .run(|| TcpListener::bind((Lab::target(false), 0)))?;
    let addr = listener.local_addr()?;
    std::thread::spawn(move || {
        use std::io::Write;
        let Ok((mut socket, _)) = listener.accept() else {
            return;
        };
        let (mut buffer, mut total) = (vec![0; 65536], 0);
        while let Ok(n) = socket.read(&mut buffer)
            && n > 0
        {
            total += n;
        }
        let _ = write!(socket, "{total}");
    });
    Ok(addr)
}

fn nginx_url(file: &str) -> String {
    format!("http://{}:{}/{file}", Lab::target(false), Nginx::PORT)
}

fn sender(bed: &TestBed, to: SocketAddr, bytes: usize) -> anyhow::Result<Child> {
    let (ip, port) = (to.ip().to_string(), to.port().to_string());
    let words = ["python3", "-u", "-c", SENDER, &ip, &port];
    bed.start(&[&words[..], &[&bytes.to_string()]].concat())
}

fn handovers(control: &Path) -> anyhow::Result<Vec<Value>> {
    let text = holdfast_says(control, &["handovers", "--json"])?;
    Ok(serde_json::from_str(&text)?)
}

fn shape(mtu: Option<usize>) -> Shape {
    Shape {
        delay: Duration::from_millis(10),
        mtu,
        ..Shape::default()
    }
}

fn shaped() -> anyhow::Result<TestBed> {
    TestBed::with(|c| c.shapes = [shape(None); 2])
}

/// How many bytes the first stream of the session has received.
fn received(bed: &TestBed) -> u64 {
    let session = bed.bed.session();
    session.map_or(0, |s| s.streams.iter().map(|s| s.rx).sum())
}

/// The only link loses large packets both ways: what both ends send goes on in smaller ones.
fn goes_on(mtu: usize, segment: u16) -> anyhow::Result<()> {
    let mut bed = shaped()?;
    bed.bed.lab.cut(LinkName::Lte)?;
    bed.bed.await_link(LinkName::Wifi, LIMIT)?;
    let nginx = Nginx::start(&bed.bed.lab, &bed.path(""))?;
    let expected = make_file(&nginx.root.join("file"), 3 * BYTES)?;
    let (url, file) = (nginx_url("file"), bed.path("out"));
    let file_name = file.display().to_string();
    // Slow enough to be under way when it happens.
    let slowly = ["--limit-rate", "6M", "-o", &file_name, &url];
    let down = bed.start(&[&["curl", "-sS", "-f"], &slowly[..]].concat())?;
    let mut up = sender(&bed, counter(&bed.bed.lab)?, BYTES)?;
    begun(&mut up)?;
    eventually("the download has begun", LIMIT, || received(&bed) > 100_000)?;
    bed.bed
        .lab
        .shape(LinkName::Wifi, Direction::Both, shape(Some(mtu)))?;
    let output = finish(up, LIMIT).with_context(|| bed.bed.log("client"))?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    ensure!(
        said == BYTES.to_string(),
        "the server said {said:?}\n{}",
        bed.bed.log("client")
    );
    let output = finish(down, LIMIT).with_context(|| bed.bed.log("client"))?;
    ensure!(output.status.success() && sha256(&file)? == expected);
    let words = format!("at most {segment} bytes");
    let control = bed.bed.client_control();
    let told = eventually("the handover tells why", LIMIT, || {
        let all = handovers(&control).unwrap_or_default();
        let tells = |h: &Value| h["decision"].as_str().is_some_and(|d| d.contains(&words));
        all.iter().any(tells)
    });
    told.with_context(|| format!("{:#?}", handovers(&control)))?;
    ensure!(
        bed.bed
            .log("client")
            .contains("large packets vanish on wifi0")
    );
    Ok(())
}

#[test]
fn a_transfer_goes_on_where_1280_bytes_pass() -> anyhow::Result<()> {
    goes_on(1280, 1200)
}

#[test]
fn a_transfer_goes_on_where_1124_bytes_pass() -> anyhow::Result<()> {
    goes_on(1124, 1000)
}

/// Beside a link that works as it is, such a one is left, and not returned to while it is so.
#[test]
fn a_link_that_loses_large_packets_comes_after_one_that_does_not() -> anyhow::Result<()> {
    let mut bed = shaped()?;
    bed.bed.await_standby(LinkName::Lte, LIMIT)?;
    let mut down = reader(&bed, endless(&bed.bed.lab)?)?;
    begun(&mut down)?;
    let mut up = sender(&bed, counter(&bed.bed.lab)?, BYTES_LONG)?;
    begun(&mut up)?;
    bed.bed
        .lab
        .shape(LinkName::Wifi, Direction::Both, shape(Some(1280)))?;
    bed.bed.await_link(LinkName::Lte, LIMIT)?;
    eventually("it is found out why", LIMIT, || {
        bed.bed
            .log("client")
            .contains("large packets vanish on wifi0")
    })?;
    // The standby there is made anew, with segments that pass, and is of use when it must be.
    bed.bed.await_standby(LinkName::Wifi, LIMIT)?;
    let output = finish(up, LIMIT)?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    ensure!(said == BYTES_LONG.to_string(), "the server said {said:?}");
    bed.bed.await_link(LinkName::Lte, LIMIT)?;
    bed.bed.lab.cut(LinkName::Lte)?;
    bed.bed.await_link(LinkName::Wifi, LIMIT)?;
    let before = received(&bed);
    eventually("the download goes on", LIMIT, || {
        received(&bed) > before + 100_000
    })?;
    // When the other comes back, it is the better one, though it is less preferred.
    bed.bed.lab.restore(LinkName::Lte)?;
    bed.bed.await_link(LinkName::Lte, LIMIT)?;
    down.kill()?;
    down.wait()?;
    Ok(())
}
