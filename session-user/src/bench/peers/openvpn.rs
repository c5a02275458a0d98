//! OpenVPN over UDP, with a static key and `float`: each end takes its peer's packets from wherever
//! they come.

use std::process::Command;

use anyhow::Context;

use super::site::{Host, Site, Way, ask};
use super::wireguard::{device, inner, route};
use super::{Peer, find, not_installed};

/// Where its server listens.
const PORT: &str = "1194";
/// What it says when the other end has been heard.
const CONNECTED: &str = "Initialization Sequence Completed";

/// A tunnel between client and server; the application's server is behind it.
pub struct OpenVpn;

impl Peer for OpenVpn {
    fn name(&self) -> &'static str {
        "openvpn"
    }

    fn missing(&self) -> Option<String> {
        not_installed(&["openvpn"])
    }

    fn start(&self, site: &Site<'_>) -> anyhow::Result<Way> {
        let mut way = Way::to(site.server);
        let program = find("openvpn").context("openvpn is not installed")?;
        let shown = program.display().to_string();
        let key = site.dir.join("openvpn.key").display().to_string();
        ask(&shown, &["--genkey", "secret", &key], "")?;
        let (client, server, prefix) = inner(site.v6);
        let gateway = site.gateway().to_string();
        let proto = if site.v6 { "udp6" } else { "udp4" };
        for host in [Host::Server, Host::Client] {
            let device = device("ov", host);
            let mut command = Command::new(&program);
            command.args(["--dev", &device, "--dev-type", "tun", "--proto", proto]);
            command.args(["--secret", &key, "--cipher", "AES-256-CBC", "--float"]);
            // Without a pseudo-random wait after a restart, and alive while nobody speaks.
            command.args(["--ping", "10", "--ping-restart", "120"]);
            let (own, other) = match host {
                Host::Client => (client, server),
                Host::Server => (server, client),
            };
            if site.v6 {
                let own = format!("{own}/{prefix}");
                command.args(["--ifconfig-ipv6", &own, other]);
            } else {
                command.args(["--ifconfig", own, other]);
            }
            match host {
                Host::Client => {
                    command.args(["--remote", &gateway, PORT, "--nobind"]);
                    let running = site.start(host, "openvpn-client", command)?;
                    way.at_client.push(running);
                }
                Host::Server => {
                    command.args(["--local", &gateway, "--lport", PORT]);
                    let running = site.start(host, "openvpn-server", command)?;
                    way.at_server.push(running);
                }
            }
        }
        site.wait("openvpn-client", || {
            way.check()?;
            Ok(site.said("openvpn-client").contains(CONNECTED))
        })?;
        route(site, &mut way, &device("ov", Host::Client))?;
        Ok(way)
    }
}
