//! Streams that use two links, and several transports on one link, as the configuration says.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use anyhow::{Context, ensure};
use session_lab::{Lab, LinkName, Shape};
use session_tests::{TestBed, begun, endless, eventually, finish, reader};
use session_user::control::SessionReport;

/// Nothing in these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// The lanes that stand on `link`, in order.
fn lanes(session: &SessionReport, link: LinkName) -> Vec<u64> {
    let here = session.transports.iter();
    let here = here.filter(|t| t.up && t.link == link.name());
    let mut lanes: Vec<u64> = here.map(|t| t.lane).collect();
    lanes.sort_unstable();
    lanes
}

#[test]
fn the_link_in_use_has_its_lanes_and_they_follow_the_session() -> anyhow::Result<()> {
    let mut bed = TestBed::with(|config| {
        config.client_extra.push_str("[transport]\nlanes = 2\n");
    })?;
    let mut child = reader(&bed, endless(&bed.bed.lab)?)?;
    begun(&mut child)?;
    let all =
        |s: &SessionReport| lanes(s, LinkName::Wifi) == [0, 1, 2] && lanes(s, LinkName::Lte) == [0];
    bed.bed.wait(LIMIT, all)?;
    bed.bed.lab.cut(LinkName::Wifi)?;
    let moved = |s: &SessionReport| {
        lanes(s, LinkName::Lte) == [0, 1, 2] && lanes(s, LinkName::Wifi).is_empty()
    };
    bed.bed.wait(LIMIT, moved)?;
    ensure!(child.try_wait()?.is_none(), "the application has ended");
    child.kill()?;
    child.wait()?;
    Ok(())
}

#[test]
fn every_stream_can_have_a_lane_of_its_own() -> anyhow::Result<()> {
    let mut bed = TestBed::with(|config| {
        config
            .client_extra
            .push_str("[transport]\nlanes = \"per-stream\"\n");
    })?;
    let server = endless(&bed.bed.lab)?;
    let mut children = Vec::new();
    for _ in 0..2 {
        let mut child = reader(&bed, server)?;
        begun(&mut child)?;
        children.push(child);
    }
    let all = |s: &SessionReport| {
        lanes(s, LinkName::Wifi).len() == 3 && s.streams.iter().all(|s| s.own_lane)
    };
    bed.bed.wait(LIMIT, all)?;
    for mut child in children {
        child.kill()?;
        child.wait()?;
    }
    // Without streams there is nothing to keep apart.
    bed.bed.wait(LIMIT, |s| lanes(s, LinkName::Wifi) == [0])
}

#[test]
fn a_rule_chooses_streams_by_their_cgroup() -> anyhow::Result<()> {
    let mut bed = TestBed::with(|config| {
        let rules = "[[stream]]\ncgroups = [\"nobody.slice\"]\nlinks = \"bonded\"\n\
                     [[stream]]\ncgroups = [\"*\"]\nlinks = \"redundant\"\n";
        config.client_extra.push_str(rules);
    })?;
    let mut child = reader(&bed, endless(&bed.bed.lab)?)?;
    begun(&mut child)?;
    bed.bed.await_standby(LinkName::Lte, LIMIT)?;
    let session = bed.bed.session().context("no session")?;
    ensure!(session.streams[0].links == "redundant", "{session:#?}");
    // Both links carry what it gets.
    let bytes = |bed: &TestBed, link: LinkName| {
        let session = bed.bed.session()?;
        let mut here = session.transports.iter().filter(|t| t.link == link.name());
        here.next().map(|t| t.bytes_in)
    };
    let before = bytes(&bed, LinkName::Lte).context("no standby")?;
    eventually("the standby carries as well", LIMIT, || {
        bytes(&bed, LinkName::Lte).is_some_and(|now| now > before + 50_000)
    })?;
    child.kill()?;
    child.wait()?;
    Ok(())
}

/// Uploads without end, and beside it ten times a little that the server must have to the end.
const BESIDE_BULK: &str = r#"
import socket, sys, threading
to = (sys.argv[1], int(sys.argv[2]))
def endless():
    s = socket.create_connection(to)
    while True:
        s.sendall(bytes(65536))
threading.Thread(target=endless, daemon=True).start()
for size in range(1, 100000, 10000):
    s = socket.create_connection(to)
    s.sendall(bytes(size))
    s.shutdown(socket.SHUT_WR)
    said = s.makefile().read()
    assert said == str(size), (said, size)
print("all")
"#;

/// A server in the lab that says how many bytes came, once all have.
fn counting(lab: &Lab) -> anyhow::Result<SocketAddr> {
    let bind = || TcpListener::bind((Lab::target(false), 0));
    let listener = lab.server().run(bind)?;
    let addr = listener.local_addr()?;
    std::thread::spawn(move || {
        for mut socket in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut buffer = vec![0; 64 * 1024];
                let mut total = 0;
                while let Ok(n @ 1..) = socket.read(&mut buffer) {
                    total += n;
                }
                // The test may have ended.
                let _ = socket.write_all(total.to_string().as_bytes());
            });
        }
    });
    Ok(addr)
}

#[test]
fn a_redundant_stream_in_bulk_leaves_others_their_turn() -> anyhow::Result<()> {
    let mut bed = TestBed::with(|config| {
        config
            .client_extra
            .push_str("[[stream]]\nlinks = \"redundant\"\n");
        let shape = Shape {
            delay: Duration::from_millis(10),
            rate_mbit: Some(20.0),
            ..Shape::default()
        };
        config.shapes = [shape; 2];
    })?;
    bed.bed.await_standby(LinkName::Lte, LIMIT)?;
    let to = counting(&bed.bed.lab)?;
    let (ip, port) = (to.ip().to_string(), to.port().to_string());
    let child = bed.start(&["python3", "-c", BESIDE_BULK, &ip, &port])?;
    let output = finish(child, LIMIT)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.stdout == b"all\n", "{said}");
    Ok(())
}
