//! The kernel's multipath TCP: a subflow on each link, both active.

use anyhow::Context;
use session_lab::LinkName;

use super::super::app;
use super::super::scenario::Scenario;
use super::Peer;
use super::site::{Host, Site, Way};

/// Subflows and announced addresses that a connection may have (the kernel's maximum).
const LIMIT: &str = "8";

/// Sockets of IPPROTO_MPTCP, endpoints as an operator configures them with `ip mptcp`.
pub struct Mptcp {
    /// With a path manager of ours that removes the address of a link that is lost.
    pub manager: bool,
}

impl Peer for Mptcp {
    fn name(&self) -> &'static str {
        if self.manager { "mptcp-pm" } else { "mptcp" }
    }

    fn missing(&self) -> Option<String> {
        let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
        let error = app::listen(any, true).err()?;
        Some(format!("the kernel makes no MPTCP sockets: {error}"))
    }

    fn lacks(&self, scenario: Scenario) -> Option<&'static str> {
        match scenario {
            Scenario::Soft => Some("nobody can tell it to move while its link works"),
            Scenario::CutCold => Some("its subflow on the other link stands always"),
            Scenario::Wake => Some("there is no program that could sleep"),
            _ => None,
        }
    }

    fn uses_both_links(&self) -> bool {
        true
    }

    fn app_options(&self) -> &'static [&'static str] {
        &["--mptcp"]
    }

    fn start(&self, site: &Site<'_>) -> anyhow::Result<Way> {
        let mut way = Way::to(site.server);
        for host in [Host::Client, Host::Server] {
            let netns = host.netns(site.lab);
            netns.ip(&["mptcp", "endpoint", "flush"])?;
            netns.ip(&[
                "mptcp",
                "limits",
                "set",
                "subflows",
                LIMIT,
                "add_addr_accepted",
                LIMIT,
            ])?;
        }
        if self.manager {
            let to = site.server.ip().to_string();
            let arguments = ["--links", &Site::links(), "--to", &to];
            let (manager, _) = site.start_own(Host::Client, "follow-endpoints", &arguments)?;
            way.at_client.push(manager);
            // It speaks to an `ip` of its own.
            site.wait("follow-endpoints", || Ok(endpoints(site)? >= up(site)?))?;
            return Ok(way);
        }
        for link in LinkName::ALL {
            // One that is down at the start has no address that could be used.
            if let Some(address) = address(site, link)? {
                let add = [
                    "mptcp",
                    "endpoint",
                    "add",
                    &address,
                    "dev",
                    link.name(),
                    "subflow",
                ];
                site.lab.client().ip(&add)?;
            }
        }
        Ok(way)
    }
}

/// The present address of a link of the client's that is up.
fn address(site: &Site<'_>, link: LinkName) -> anyhow::Result<Option<String>> {
    let family = if site.v6 { "-6" } else { "-4" };
    let show = [
        family,
        "-o",
        "addr",
        "show",
        "dev",
        link.name(),
        "up",
        "scope",
        "global",
    ];
    let text = site.lab.client().ip(&show)?;
    let Some(line) = text.lines().next() else {
        return Ok(None);
    };
    let word = line.split_whitespace().find(|word| word.contains('/'));
    let word = word.context("`ip` shows an address without a prefix")?;
    Ok(word.split('/').next().map(str::to_owned))
}

fn endpoints(site: &Site<'_>) -> anyhow::Result<usize> {
    let text = site.lab.client().ip(&["mptcp", "endpoint", "show"])?;
    Ok(text.lines().count())
}

fn up(site: &Site<'_>) -> anyhow::Result<usize> {
    let mut count = 0;
    for link in LinkName::ALL {
        count += usize::from(address(site, link)?.is_some());
    }
    Ok(count)
}
