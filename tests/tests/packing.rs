//! What streams carry is packed where the link is what holds them up, and comes out as it went in.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use anyhow::{Context, ensure};
use session_lab::{Lab, LinkName, Shape};
use session_tests::{TestBed, finish, holdfast_says};
use session_user::control::{PackedReport, SessionReport};
use sha2::{Digest, Sha256};

/// Nothing in these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);
/// Bytes of each transfer.
const BYTES: usize = 6_000_000;

/// A Python program that fetches what it is told to, and prints its digest and the seconds that it took.
const FETCH: &str = r"
import hashlib, socket, sys, time
s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
s.sendall(sys.argv[3].encode())
got, begun = hashlib.sha256(), time.monotonic()
while data := s.recv(65536):
    got.update(data)
print(got.hexdigest(), time.monotonic() - begun)
";

/// Numbers that look random: xorshift64.
fn numbers() -> impl Iterator<Item = u64> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    })
}

/// A log as services write them.
fn text() -> Vec<u8> {
    let lines = numbers().enumerate().map(|(line, drawn)| {
        let level = ["info", "info", "info", "warn", "error"][(drawn % 5) as usize];
        format!(
            "{{\"ts\":\"2026-01-01T00:{:02}:{:02}.{:03}Z\",\"level\":\"{level}\",\"service\":\"orders\",\
             \"path\":\"/api/v1/items/{}\",\"status\":200,\"took_us\":{}}}\n",
            line / 6_000 % 60,
            line / 100 % 60,
            drawn >> 8 & 0x3ff,
            drawn >> 20 & 0x3ff,
            drawn >> 40 & 0xffff,
        )
    });
    lines.flat_map(String::into_bytes).take(BYTES).collect()
}

fn noise() -> Vec<u8> {
    numbers().flat_map(u64::to_be_bytes).take(BYTES).collect()
}

/// A server in the lab that sends what the first byte of a connection asks for: text or noise.
fn serve(lab: &Lab) -> anyhow::Result<SocketAddr> {
    let bind = || TcpListener::bind((Lab::target(false), 0));
    let listener = lab.server().run(bind)?;
    let addr = listener.local_addr()?;
    std::thread::spawn(move || {
        for mut socket in listener.incoming().map_while(Result::ok) {
            let mut wanted = [0];
            if socket.read_exact(&mut wanted).is_ok() {
                let data = if wanted == *b"t" { text() } else { noise() };
                // The test may have ended.
                let _ = socket.write_all(&data);
            }
        }
    });
    Ok(addr)
}

/// Both links carry 10 Mbit/s.
fn narrow(config: &str) -> anyhow::Result<(TestBed, SocketAddr)> {
    let bed = TestBed::with(|c| {
        c.client_extra = String::from(config);
        let shape = Shape {
            delay: Duration::from_millis(10),
            rate_mbit: Some(10.0),
            ..Shape::default()
        };
        c.shapes = [shape; 2];
    })?;
    let to = serve(&bed.bed.lab)?;
    Ok((bed, to))
}

/// Fetches `what`; `meanwhile` is called once the stream is under way. Returns the seconds that it took.
fn fetch(
    bed: &mut TestBed,
    to: SocketAddr,
    what: &str,
    meanwhile: impl FnOnce(&mut TestBed) -> anyhow::Result<()>,
) -> anyhow::Result<f64> {
    let (ip, port) = (to.ip().to_string(), to.port().to_string());
    let child = bed.start(&["python3", "-c", FETCH, &ip, &port, what])?;
    meanwhile(bed)?;
    let output = finish(child, LIMIT)?;
    let said = String::from_utf8_lossy(&output.stdout);
    let (digest, seconds) = said.trim().split_once(' ').with_context(|| {
        let error = String::from_utf8_lossy(&output.stderr);
        format!("{error}{}", bed.bed.last_words())
    })?;
    let expected = if what == "t" { text() } else { noise() };
    let expected = hex::encode(Sha256::digest(expected));
    ensure!(digest == expected, "the bytes differ");
    Ok(seconds.parse()?)
}

/// What comes in of the streams of `session`.
fn incoming(session: &SessionReport) -> impl Iterator<Item = &PackedReport> {
    session.streams.iter().map(|s| &s.packed_in)
}

#[test]
fn text_over_a_narrow_link_is_packed_and_noise_is_not() -> anyhow::Result<()> {
    for (config, codec, times) in [("", "zstd", 3.0), ("lz4", "lz4", 1.8)] {
        let config = match config {
            "" => String::new(),
            codec => format!("[transport]\ncompression = \"{codec}\"\n"),
        };
        let (mut bed, to) = narrow(&config)?;
        let plain = fetch(&mut bed, to, "n", |bed| {
            bed.bed
                .wait(LIMIT, |s| s.streams.iter().any(|s| s.rx > 3_000_000))?;
            let session = bed.bed.session().context("no session")?;
            ensure!(
                incoming(&session).all(|p| p.codec.is_none()),
                "{session:#?}"
            );
            Ok(())
        })?;
        let packed = fetch(&mut bed, to, "t", |bed| {
            let shrinks = |p: &PackedReport| {
                p.codec.as_deref() == Some(codec) && p.ratio.is_some_and(|r| r > times)
            };
            bed.bed.wait(LIMIT, |s| incoming(s).any(shrinks))?;
            let said = holdfast_says(&bed.bed.client_control(), &["sessions"])?;
            ensure!(said.contains(&format!("  in {codec} (")), "{said}");
            Ok(())
        })?;
        // The same link, in the same run.
        ensure!(
            packed * times < plain,
            "{codec}: {packed} s, and {plain} s for noise"
        );
    }
    Ok(())
}

#[test]
fn packed_streams_go_on_over_the_other_link() -> anyhow::Result<()> {
    let (mut bed, to) = narrow("")?;
    bed.bed.await_standby(LinkName::Lte, LIMIT)?;
    fetch(&mut bed, to, "t", |bed| {
        bed.bed
            .wait(LIMIT, |s| incoming(s).any(|p| p.bytes > 500_000))?;
        bed.bed.lab.cut(LinkName::Wifi)?;
        bed.bed
            .wait(LIMIT, |s| incoming(s).any(|p| p.bytes > 2_000_000))?;
        bed.bed.lab.restore(LinkName::Wifi)
    })?;
    Ok(())
}

#[test]
fn nothing_is_packed_where_one_end_wants_none() -> anyhow::Result<()> {
    // For all streams, and by a rule of the end that opens them; the other end sends what is looked at.
    for config in ["[transport]", "[[stream]]"] {
        let (mut bed, to) = narrow(&format!("{config}\ncompression = \"off\"\n"))?;
        fetch(&mut bed, to, "t", |bed| {
            bed.bed
                .wait(LIMIT, |s| s.streams.iter().any(|s| s.rx > 3_000_000))?;
            let session = bed.bed.session().context("no session")?;
            ensure!(incoming(&session).all(|p| p.bytes == 0), "{session:#?}");
            Ok(())
        })?;
    }
    Ok(())
}
