//! WireGuard in user space (wireguard-go), with a route to its peer that follows the links.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, ensure};

use super::site::{Host, Site, Way, ask};
use super::{Peer, find, not_installed};

/// Where it listens.
const PORT: u16 = 51820;
/// The bytes of a packet inside, as WireGuard's own tools choose them.
const MTU: &str = "1420";
/// Where it puts the sockets by which `wg` speaks to it.
const SOCKETS: &str = "/var/run/wireguard";

/// A tunnel between client and server; the application's server is behind it.
pub struct Wireguard;

/// The tunnel's addresses: the client's, the server's, and the prefix of both.
pub const fn inner(v6: bool) -> (&'static str, &'static str, &'static str) {
    if v6 {
        ("fd66::2", "fd66::1", "64")
    } else {
        ("10.66.0.2", "10.66.0.1", "24")
    }
}

/// The name of a tunnel's device: no two runs of this program share one.
pub fn device(kind: &str, host: Host) -> String {
    let end = if host == Host::Client { "c" } else { "s" };
    format!("{kind}{}{end}", std::process::id())
}

/// Leads the client's packets to the application's server into the tunnel, and keeps those to the
/// tunnel's other end on the best link.
pub fn route(site: &Site<'_>, way: &mut Way, device: &str) -> anyhow::Result<()> {
    let target = format!("{}/{}", site.server.ip(), site.host_prefix());
    let client = site.lab.client();
    client.ip(&["route", "replace", &target, "dev", device])?;
    let gateway = site.gateway().to_string();
    let arguments = ["--links", &Site::links(), "--to", &gateway];
    let (follower, _) = site.start_own(Host::Client, "follow-route", &arguments)?;
    way.at_client.push(follower);
    let mut delete = vec!["route".to_owned(), "del".to_owned(), gateway];
    if site.v6 {
        delete.insert(0, "-6".to_owned());
    }
    way.undo.push((Host::Client, delete));
    Ok(())
}

impl Peer for Wireguard {
    fn name(&self) -> &'static str {
        "wireguard"
    }

    fn missing(&self) -> Option<String> {
        not_installed(&["wireguard-go", "wg"])
    }

    fn start(&self, site: &Site<'_>) -> anyhow::Result<Way> {
        let mut way = Way::to(site.server);
        let (client, server, prefix) = inner(site.v6);
        let keys = [keys()?, keys()?];
        let ends = [(Host::Client, client), (Host::Server, server)];
        for (number, (host, address)) in ends.into_iter().enumerate() {
            let device = device("wg", host);
            start(site, &mut way, host, &device)?;
            let netns = host.netns(site.lab);
            let private = site.dir.join(format!("{device}.key"));
            std::fs::write(&private, &keys[number].0)?;
            let private = private.display().to_string();
            let port = PORT.to_string();
            let mut set = vec!["set", &device, "private-key", &private];
            let (host_prefix, gateway) =
                (site.host_prefix(), SocketAddr::new(site.gateway(), PORT));
            let allowed = match host {
                Host::Client => {
                    format!("{server}/{host_prefix},{}/{host_prefix}", site.server.ip())
                }
                Host::Server => format!("{client}/{host_prefix}"),
            };
            let gateway = gateway.to_string();
            if host == Host::Server {
                set.extend(["listen-port", &port]);
            }
            set.extend(["peer", &keys[1 - number].1, "allowed-ips", &allowed]);
            if host == Host::Client {
                // As on every client behind a NAT.
                set.extend(["endpoint", &gateway, "persistent-keepalive", "25"]);
            }
            netns.exec("wg", &set)?;
            let address = format!("{address}/{prefix}");
            let mut add = vec!["addr", "add", &address, "dev", &device];
            if site.v6 {
                add.push("nodad");
            }
            netns.ip(&add)?;
            netns.ip(&["link", "set", &device, "mtu", MTU, "up"])?;
        }
        route(site, &mut way, &device("wg", Host::Client))?;
        let device = device("wg", Host::Client);
        site.wait("follow-route", || {
            let text = site
                .lab
                .client()
                .exec("wg", &["show", &device, "latest-handshakes"])?;
            Ok(text.split_whitespace().last().is_some_and(|at| at != "0"))
        })?;
        way.check()?;
        Ok(way)
    }
}

/// A private key and the public one to it.
fn keys() -> anyhow::Result<(String, String)> {
    let private = ask("wg", &["genkey"], "")?;
    let public = ask("wg", &["pubkey"], &private)?;
    Ok((private, public))
}

/// Starts one end; its device is there on return.
fn start(site: &Site<'_>, way: &mut Way, host: Host, device: &str) -> anyhow::Result<()> {
    let name = match host {
        Host::Client => "wireguard-client",
        Host::Server => "wireguard-server",
    };
    let program = find("wireguard-go").context("wireguard-go is not installed")?;
    let mut command = Command::new(program);
    command.args(["--foreground", device]);
    // It warns of the kernel's own WireGuard, and wants to be told that it is wanted.
    command.env("WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD", "1");
    let socket = PathBuf::from(format!("{SOCKETS}/{device}.sock"));
    way.litter.push(socket.clone());
    let mut running = site.start(host, name, command)?;
    site.wait(name, || {
        running.check()?;
        Ok(socket.exists())
    })?;
    ensure!(
        host.netns(site.lab).ip(&["link", "show", device]).is_ok(),
        "{name} made no device: {}",
        site.said(name)
    );
    match host {
        Host::Client => way.at_client.push(running),
        Host::Server => way.at_server.push(running),
    }
    Ok(())
}
