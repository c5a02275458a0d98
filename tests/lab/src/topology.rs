//! The hosts, links and addresses of the lab, and what can be done to its links.
//!
//! ```text
//!              wifi0 10.10.1.2/24  2001:db8:1::2/64
//!   client  <                                         >  router  --  server  srv0 10.10.9.2/24  2001:db8:9::2/64
//!              lte0  10.10.2.2/24  2001:db8:2::2/64                       \--  srv1 10.10.8.2/24  2001:db8:8::2/64
//!                                                                            targets 198.51.100.10, 2001:db8:100::10
//! ```

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::emulator::Emulator;
use crate::flags;
use crate::netns::Netns;

/// One of the client's links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkName {
    /// `wifi0`, the one with the better metric.
    Wifi,
    /// `lte0`.
    Lte,
}

impl LinkName {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Wifi, Self::Lte];

    /// The client's interface.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Wifi => "wifi0",
            Self::Lte => "lte0",
        }
    }

    /// The router's interface.
    pub const fn router_side(self) -> &'static str {
        match self {
            Self::Wifi => "r-wifi",
            Self::Lte => "r-lte",
        }
    }

    const fn number(self) -> u8 {
        match self {
            Self::Wifi => 1,
            Self::Lte => 2,
        }
    }

    const fn metric(self) -> &'static str {
        match self {
            Self::Wifi => "100",
            Self::Lte => "200",
        }
    }

    /// The client's IPv4 address on it.
    pub const fn client_v4(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 10, self.number(), 2)
    }

    /// The client's IPv6 address on it.
    pub const fn client_v6(self) -> Ipv6Addr {
        Ipv6Addr::new(0x2001, 0xdb8, self.number() as u16, 0, 0, 0, 0, 2)
    }
}

/// Which way packets go, as the client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client.
    Up,
    /// To the client.
    Down,
    /// Either.
    Both,
}

/// How the lab is made.
#[derive(Clone, Debug)]
pub struct LabConfig {
    /// Whether the network routes to the targets, so that the client reaches them without a
    /// gateway too.
    pub targets_routed: bool,
    /// Whether the server has a second link, `srv1`.
    pub second_server_link: bool,
}

impl Default for LabConfig {
    fn default() -> Self {
        Self {
            targets_routed: true,
            second_server_link: false,
        }
    }
}

/// The lab. Dropping it removes everything.
pub struct Lab {
    /// First, so that it ends before the namespace that it works in.
    pub(crate) emulator: OnceLock<Emulator>,
    client: Netns,
    router: Netns,
    server: Netns,
}

/// Waiting for a link to be as it was asked to be: veth does it at once.
const SETTLE: Duration = Duration::from_secs(5);

impl Lab {
    /// Makes the namespaces, links, addresses and routes.
    pub fn new(config: &LabConfig) -> anyhow::Result<Self> {
        let lab = Self {
            emulator: OnceLock::new(),
            client: Netns::new("client")?,
            router: Netns::new("router")?,
            server: Netns::new("server")?,
        };
        for netns in [&lab.client, &lab.router, &lab.server] {
            // Duplicate address detection would make addresses wait a second; nobody else is here.
            netns.sysctl("net/ipv6/conf/all/accept_dad", "0")?;
            netns.sysctl("net/ipv6/conf/default/accept_dad", "0")?;
        }
        for netns in [&lab.client, &lab.server] {
            // Both ends of TCP Fast Open, for IPv6 too, as `holdfast doctor` advises.
            netns.sysctl("net/ipv4/tcp_fastopen", "3")?;
        }
        for link in LinkName::ALL {
            lab.wire(&lab.client, link.name(), link.router_side())?;
            lab.router.ip(&[
                "addr",
                "add",
                &format!("10.10.{}.1/24", link.number()),
                "dev",
                link.router_side(),
            ])?;
            let v6 = format!("2001:db8:{}::1/64", link.number());
            lab.router
                .ip(&["addr", "add", &v6, "dev", link.router_side(), "nodad"])?;
            lab.configure(link)?;
        }
        lab.make_server(config)?;
        lab.make_router()?;
        Ok(lab)
    }

    pub(crate) fn wire(&self, host: &Netns, name: &str, router_side: &str) -> anyhow::Result<()> {
        host.ip(&[
            "link",
            "add",
            name,
            "type",
            "veth",
            "peer",
            "name",
            router_side,
        ])?;
        // The other namespace has no name; it is given by a descriptor of this very process.
        let fd = std::os::fd::AsRawFd::as_raw_fd(&self.router.fd());
        let path = format!("/proc/{}/fd/{fd}", std::process::id());
        host.ip(&["link", "set", router_side, "netns", &path])?;
        host.ip(&["link", "set", name, "up"])?;
        self.router.ip(&["link", "set", router_side, "up"])?;
        Ok(())
    }

    /// Addresses and routes of a client's link, as DHCP and router advertisements would leave them.
    fn configure(&self, link: LinkName) -> anyhow::Result<()> {
        let name = link.name();
        let v4 = format!("{}/24", link.client_v4());
        let v6 = format!("{}/64", link.client_v6());
        self.client.ip(&["addr", "replace", &v4, "dev", name])?;
        self.client
            .ip(&["-6", "addr", "replace", &v6, "dev", name, "nodad"])?;
        self.reroute(link)
    }

    /// The default routes over a client's link.
    pub(crate) fn reroute(&self, link: LinkName) -> anyhow::Result<()> {
        let name = link.name();
        let via4 = format!("10.10.{}.1", link.number());
        let via6 = format!("2001:db8:{}::1", link.number());
        self.client.ip(&[
            "route",
            "replace",
            "default",
            "via",
            &via4,
            "dev",
            name,
            "metric",
            link.metric(),
        ])?;
        self.client.ip(&[
            "-6",
            "route",
            "replace",
            "default",
            "via",
            &via6,
            "dev",
            name,
            "metric",
            link.metric(),
        ])?;
        Ok(())
    }

    /// The host with two links.
    pub fn client(&self) -> &Netns {
        &self.client
    }

    /// The network between.
    pub fn router(&self) -> &Netns {
        &self.router
    }

    /// The host with the gateway and the targets.
    pub fn server(&self) -> &Netns {
        &self.server
    }

    /// Cuts a link by setting it down; returns when the kernel was told.
    pub fn cut(&self, link: LinkName) -> anyhow::Result<Instant> {
        self.client
            .run(move || {
                let at = Instant::now();
                flags::set_up(link.name(), false).map(|()| at)
            })
            .with_context(|| format!("{} cannot be cut", link.name()))
    }

    /// Sets a link up again and gives it the addresses and routes that the kernel dropped.
    pub fn restore(&self, link: LinkName) -> anyhow::Result<()> {
        self.client
            .run(move || flags::set_up(link.name(), true))
            .with_context(|| format!("{} cannot be restored", link.name()))?;
        let deadline = Instant::now() + SETTLE;
        // Right after the link is up an IPv6 route may still be refused.
        loop {
            match self.configure(link) {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > deadline => return Err(error),
                // The kernel does not tell when it takes one.
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Gives a link that is up the addresses and routes that the kernel dropped when it went down,
    /// as a DHCP client and router advertisements would.
    pub fn readdress(&self, link: LinkName) -> anyhow::Result<()> {
        self.configure(link)
    }

    /// Takes the carrier away: the router's end goes down.
    pub fn carrier_down(&self, link: LinkName) -> anyhow::Result<Instant> {
        self.router
            .run(move || {
                let at = Instant::now();
                flags::set_up(link.router_side(), false).map(|()| at)
            })
            .with_context(|| format!("{} cannot be set down", link.router_side()))
    }

    /// Gives the carrier back.
    pub fn carrier_up(&self, link: LinkName) -> anyhow::Result<()> {
        self.router
            .run(move || flags::set_up(link.router_side(), true))
            .with_context(|| format!("{} cannot be set up", link.router_side()))?;
        let v6 = format!("2001:db8:{}::1/64", link.number());
        self.router.ip(&[
            "-6",
            "addr",
            "replace",
            &v6,
            "dev",
            link.router_side(),
            "nodad",
        ])?;
        self.configure(link)
    }
}
