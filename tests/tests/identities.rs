//! Targets know each unit by an address that does not move.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, ensure};
use session_lab::{Lab, LinkName};
use session_tests::{TestBed, eventually, finish, holdfast};

/// Nothing in these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(30);

/// Connects, says a word, and waits for the end.
const TALK: &str = "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2]))); s.sendall(b'hello'); s.recv(1)";

fn listener(bed: &TestBed, addr: IpAddr) -> anyhow::Result<TcpListener> {
    let bound = bed
        .bed
        .lab
        .server()
        .run(move || TcpListener::bind((addr, 0)));
    Ok(bound?)
}

/// A captured application talks to `to` through the socket that `listener` accepts.
fn talk(
    bed: &TestBed,
    to: SocketAddr,
    listener: &TcpListener,
) -> anyhow::Result<(TcpStream, SocketAddr, Vec<u8>)> {
    let (ip, port) = (to.ip().to_string(), to.port().to_string());
    let child = bed.start(&["python3", "-c", TALK, &ip, &port])?;
    let (mut socket, from) = listener.accept()?;
    socket.set_read_timeout(Some(LIMIT))?;
    let mut heard = Vec::new();
    let mut buffer = [0; 256];
    while !heard.ends_with(b"hello") {
        let n = socket.read(&mut buffer)?;
        ensure!(n > 0, "the application said only {heard:?}");
        heard.extend_from_slice(&buffer[..n]);
    }
    socket.write_all(b"!")?;
    finish(child, LIMIT)?;
    Ok((socket, from, heard))
}

/// What `holdfast peers` says of the client's address at the gateway.
fn told(bed: &TestBed) -> anyhow::Result<serde_json::Value> {
    let control = bed.path("gateway.sock");
    let output = holdfast(&control, &["peers", "--json"])?;
    let units: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    Ok(units[0].clone())
}

#[test]
fn a_unit_has_one_address_over_handovers_and_restarts() -> anyhow::Result<()> {
    let mut bed = TestBed::new()?;
    let listener = listener(&bed, Lab::target(false))?;
    let to = listener.local_addr()?;
    let (_, first, _) = talk(&bed, to, &listener)?;
    let IpAddr::V4(ip) = first.ip() else {
        anyhow::bail!("seen as {first}")
    };
    ensure!(
        ip.octets()[0] == 127 && ip.octets()[1] & 0xc0 == 64,
        "the target saw {ip}, outside of 127.64.0.0/10"
    );
    let unit = told(&bed)?;
    ensure!(
        unit["addresses"][0] == ip.to_string(),
        "`peers` says {unit}"
    );
    ensure!(
        unit["name"] == "client" && unit["state"] == "up",
        "`peers` says {unit}"
    );
    let certificate = unit["certificate"].as_str().unwrap_or_default();
    ensure!(
        certificate.starts_with("spiffe://") && certificate.ends_with("/client"),
        "`peers` says {unit}"
    );

    bed.bed.lab.cut(LinkName::Wifi)?;
    bed.bed.await_link(LinkName::Lte, LIMIT)?;
    let (_, moved, _) = talk(&bed, to, &listener)?;
    ensure!(moved.ip() == ip, "after a handover the target saw {moved}");
    bed.bed.lab.restore(LinkName::Wifi)?;

    bed.bed.gateway_agent = None;
    bed.bed.client_agent = None;
    bed.bed.start_gateway()?;
    bed.bed.start_client()?;
    bed.bed.await_session()?;
    let (_, again, _) = talk(&bed, to, &listener)?;
    ensure!(again.ip() == ip, "after a restart the target saw {again}");
    Ok(())
}

#[test]
fn a_target_behind_the_gateway_sees_an_address_of_a_routed_network() -> anyhow::Result<()> {
    let bed = TestBed::with(|c| {
        c.allow.push("203.0.113.0/24:*".to_owned());
        c.allow.push("[2001:db8:113::]/48:*".to_owned());
        c.accept_extra =
            "peer_networks = [\"127.64.0.0/10\", \"10.64.0.0/16\", \"2001:db8:64::/64\"]\n"
                .to_owned();
        c.client_extra =
            "[[capture]]\npeer = \"gateway\"\nto = [\"203.0.113.0/24\", \"2001:db8:113::/48\"]\n"
                .to_owned();
    })?;
    // What the operator of such a gateway sets up: the networks lead to it, and are its own.
    let (server, router) = (bed.bed.lab.server(), bed.bed.lab.router());
    for (network, gateway) in [
        ("10.64.0.0/16", Lab::gateway(false)),
        ("2001:db8:64::/64", Lab::gateway(true)),
    ] {
        server.ip(&["route", "add", "local", network, "dev", "lo"])?;
        router.ip(&["route", "add", network, "via", &gateway.to_string()])?;
    }
    // Targets on another host.
    router.ip(&["addr", "add", "203.0.113.5/32", "dev", "lo"])?;
    router.ip(&["addr", "add", "2001:db8:113::5/128", "dev", "lo", "nodad"])?;
    for (target, network) in [
        ("203.0.113.5", "10.64.0.0/16"),
        ("2001:db8:113::5", "2001:db8:64::/64"),
    ] {
        let target: IpAddr = target.parse()?;
        let listener = router.run(move || TcpListener::bind((target, 0)))?;
        let (_, from, _) = talk(&bed, listener.local_addr()?, &listener)?;
        let network: ipnet::IpNet = network.parse()?;
        ensure!(
            network.contains(&from.ip()),
            "{target} saw {from}, outside of {network}"
        );
    }
    Ok(())
}

#[test]
fn a_target_is_told_by_the_proxy_protocol_who_calls() -> anyhow::Result<()> {
    let bed = TestBed::with(|c| {
        c.accept_extra = format!("proxy_protocol = [\"{}/32:*\"]\n", Lab::target(false));
    })?;
    let listener = listener(&bed, Lab::target(false))?;
    let to = listener.local_addr()?;
    let (_, from, heard) = talk(&bed, to, &listener)?;
    ensure!(
        heard.starts_with(b"\r\n\r\n\0\r\nQUIT\n\x21\x11"),
        "no header: {heard:?}"
    );
    let (IpAddr::V4(source), IpAddr::V4(target)) = (from.ip(), to.ip()) else {
        anyhow::bail!("not IPv4")
    };
    ensure!(
        heard[16..20] == source.octets(),
        "another source: {heard:?}"
    );
    ensure!(
        heard[20..24] == target.octets(),
        "another target: {heard:?}"
    );
    let text = String::from_utf8_lossy(&heard);
    ensure!(text.contains("/client"), "no SPIFFE ID: {text}");
    Ok(())
}

#[test]
fn two_units_never_share_an_address() -> anyhow::Result<()> {
    let bed =
        TestBed::with(|c| c.accept_extra = "peer_networks = [\"127.64.0.0/30\"]\n".to_owned())?;
    let first = told(&bed)?["addresses"][0].clone();
    ensure!(first.is_string(), "no address: {first}");
    // The other unit, for which the first has left one address.
    let file = bed.path("gateway").join("peers.json");
    eventually("the address is remembered", LIMIT, || file.is_file())?;
    let book: serde_json::Value = serde_json::from_slice(&std::fs::read(&file)?)?;
    let known = book["127.64.0.0/30"].as_object().context("no network")?;
    ensure!(known.len() == 1, "the book is {book}");
    let networks = ["127.64.0.0/30".parse()?];
    let addresses = session_user::dial::PeerAddresses::open(&bed.path("gateway"), &networks)?;
    let other = addresses.of("spiffe://lab.example/other");
    ensure!(
        other.addresses().len() == 1 && first != other.addresses()[0].to_string(),
        "{first} and {other:?}"
    );
    ensure!(
        addresses
            .of("spiffe://lab.example/third")
            .addresses()
            .is_empty()
    );
    Ok(())
}
