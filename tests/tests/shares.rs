//! Sessions of one gateway have equal shares of it, however many streams each has.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::ensure;
use session_lab::Lab;
use session_tests::{TestBed, await_listener, eventually, program};
use session_user::bench::bed::Running;
use session_user::pki;

/// Nothing here takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(30);
/// Streams of the session that has many.
const CROWD: usize = 24;
/// For how long both send all they can.
const MEASURED: Duration = Duration::from_secs(3);
/// Doors of the unit with one stream, and of that with many.
const DOORS: [&str; 2] = ["127.0.0.1:8100", "127.0.0.1:8200"];

/// The doors lead there, so it is known before anything listens.
fn target() -> SocketAddr {
    SocketAddr::new(Lab::target(false), 7100)
}

/// A target that sends all it can to whoever connects.
fn flood(bed: &TestBed) -> anyhow::Result<()> {
    let listener = bed.bed.lab.server().run(|| TcpListener::bind(target()))?;
    std::thread::spawn(move || {
        for mut socket in listener.incoming().map_while(Result::ok) {
            let bytes = vec![7; 65536];
            std::thread::spawn(move || while socket.write_all(&bytes).is_ok() {});
        }
    });
    Ok(())
}

fn door(at: &str) -> String {
    let target = target();
    format!("[[listen]]\nat = \"{at}\"\npeer = \"gateway\"\nto = \"{target}\"\n")
}

/// A second unit in the client's namespace, beside the bed's own.
fn second_unit(bed: &TestBed) -> anyhow::Result<Running> {
    let (pki, now) = (bed.path("pki"), SystemTime::now());
    pki::issue(&pki, "crowd", Duration::from_secs(3600), &pki, now, true)?;
    let own = fs::read_to_string(bed.path("client.toml"))?;
    let peer = own
        .lines()
        .skip_while(|line| *line != "[[peer]]")
        .take_while(|line| !line.starts_with("[[capture]]"));
    let peer: Vec<&str> = peer.collect();
    let identity = |what| pki.join(what).display().to_string();
    let text = format!(
        "[identity]\ncertificate = \"{}\"\nkey = \"{}\"\nca = \"{}\"\n[agent]\ncontrol = \"{}\"\n{}\n{}",
        identity("crowd.crt"),
        identity("crowd.key"),
        identity("ca.crt"),
        bed.path("crowd.sock").display(),
        peer.join("\n"),
        door(DOORS[1])
    );
    let config = bed.path("crowd.toml");
    fs::write(&config, text)?;
    let mut command = Command::new(program());
    command.arg("agent").arg("--config").arg(&config);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(fs::File::create(bed.path("crowd.log"))?);
    let child = bed.bed.lab.client().spawn(command)?;
    Ok(Running::new(child, "second unit"))
}

/// Connects `count` times to the door at `at`, once it is open, and counts what comes until `over`.
fn readers(
    bed: &TestBed,
    at: &'static str,
    count: usize,
    over: &Arc<AtomicBool>,
) -> anyhow::Result<Arc<AtomicU64>> {
    await_listener(bed.bed.lab.client(), at.parse()?)?;
    let bytes = Arc::new(AtomicU64::new(0));
    for _ in 0..count {
        let mut socket = bed.bed.lab.client().run(move || TcpStream::connect(at))?;
        socket.set_read_timeout(Some(LIMIT))?;
        let (bytes, over) = (Arc::clone(&bytes), Arc::clone(over));
        std::thread::spawn(move || {
            let mut buffer = vec![0; 65536];
            while !over.load(Ordering::Relaxed)
                && let Ok(n @ 1..) = socket.read(&mut buffer)
            {
                bytes.fetch_add(n as u64, Ordering::Relaxed);
            }
        });
    }
    Ok(bytes)
}

#[test]
fn a_session_with_one_stream_is_not_starved_by_one_with_many() -> anyhow::Result<()> {
    let bed = TestBed::with(|c| {
        c.client_extra = door(DOORS[0]);
        c.gateway_extra = format!(
            "[[accept.allow]]\npeer = \"crowd\"\nto = [\"{}:*\"]\n",
            Lab::target(false)
        );
    })?;
    flood(&bed)?;
    let _second = second_unit(&bed)?;
    let over = Arc::new(AtomicBool::new(false));
    let crowd = readers(&bed, DOORS[1], CROWD, &over)?;
    let lone = readers(&bed, DOORS[0], 1, &over)?;
    let moved = || [&lone, &crowd].map(|bytes| bytes.load(Ordering::Relaxed));
    eventually("both have begun", LIMIT, || moved().iter().all(|n| *n > 0))?;
    let (before, began) = (moved(), Instant::now());
    // It is a rate that is measured.
    std::thread::sleep(MEASURED);
    let after = moved();
    over.store(true, Ordering::Relaxed);
    let [lone, crowd] = [0, 1].map(|i| (after[i] - before[i]) as f64);
    let megabytes = (lone + crowd) / 1e6 / began.elapsed().as_secs_f64();
    // By streams it would be a twenty-fifth. The programs of both sides share the processors with the agents.
    ensure!(
        lone >= (lone + crowd) / 8.0,
        "one stream had {lone} of {} bytes, at {megabytes} MB/s\n{}",
        lone + crowd,
        bed.bed.last_words()
    );
    Ok(())
}
