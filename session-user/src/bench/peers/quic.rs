//! A tunnel over QUIC: each of the application's connections is a bidirectional stream of one
//! connection. The client's end moves its socket to another link.

use std::fs;
use std::net::SocketAddr;

use anyhow::Context;

use super::Peer;
use super::site::{Host, Site, Way};

/// The name in the server's certificate.
pub const SERVER_NAME: &str = "tunnel.example";
/// The client's question whether anybody is there: a datagram that comes back.
pub const PROBE: &[u8] = b"probe";
/// Where the server's end listens (UDP).
const PORT: u16 = 4433;
/// The silence after which the probing client moves.
const SILENCE_MS: &str = "30";

/// A pair of tunnel ends built on quinn.
pub struct Quic {
    /// Whether the client moves when nothing comes back, too.
    pub probe: bool,
}

impl Peer for Quic {
    fn name(&self) -> &'static str {
        if self.probe { "quic-probe" } else { "quic" }
    }

    fn start(&self, site: &Site<'_>) -> anyhow::Result<Way> {
        let made = rcgen::generate_simple_self_signed([SERVER_NAME.to_owned()])
            .context("no certificate can be made")?;
        let (cert, key) = (site.dir.join("quic.crt"), site.dir.join("quic.key"));
        fs::write(&cert, made.cert.der())?;
        fs::write(&key, made.signing_key.serialize_der())?;
        let (cert, key) = (cert.display().to_string(), key.display().to_string());
        let listen = SocketAddr::new(site.gateway(), PORT).to_string();
        let target = site.server.to_string();
        let arguments = [
            "--listen",
            &listen,
            "--to",
            &target,
            "--certificate",
            &cert,
            "--key",
            &key,
        ];
        let (server, _) = site.start_own(Host::Server, "quic-server", &arguments)?;
        let links = Site::links();
        let mut arguments = vec![
            "--server",
            &listen,
            "--certificate",
            &cert,
            "--links",
            &links,
        ];
        if self.probe {
            arguments.extend(["--silence-ms", SILENCE_MS]);
        }
        let (client, first) = site.start_own(Host::Client, "quic-client", &arguments)?;
        let dial: SocketAddr = first
            .parse()
            .context("the tunnel's client says no address")?;
        let mut way = Way::to(dial);
        way.at_server.push(server);
        way.at_client.push(client);
        Ok(way)
    }
}
