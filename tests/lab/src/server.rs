//! The server's side of the lab: the gateway's addresses, the targets, and the router between.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use anyhow::Context;

use crate::flags;
use crate::topology::{Lab, LabConfig};

/// The server's address, where a gateway listens.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(10, 10, 9, 2);
/// The same, IPv6.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 2);
/// The server's address on its second link, where it has one.
pub const SECOND_V4: Ipv4Addr = Ipv4Addr::new(10, 10, 8, 2);
/// The same, IPv6.
pub const SECOND_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 8, 0, 0, 0, 0, 2);
/// An address of the server's, for targets behind the gateway.
pub const TARGET_V4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);
/// The same, IPv6.
pub const TARGET_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, 0x10);

/// One of the server's links.
struct Uplink {
    name: &'static str,
    router_side: &'static str,
    net: u8,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    metric: &'static str,
}

const UPLINKS: [Uplink; 2] = [
    Uplink {
        name: "srv0",
        router_side: "r-srv",
        net: 9,
        v4: GATEWAY_V4,
        v6: GATEWAY_V6,
        metric: "100",
    },
    Uplink {
        name: "srv1",
        router_side: "r-srv1",
        net: 8,
        v4: SECOND_V4,
        v6: SECOND_V6,
        metric: "200",
    },
];

impl Lab {
    pub(crate) fn make_server(&self, config: &LabConfig) -> anyhow::Result<()> {
        let uplinks = if config.second_server_link { 2 } else { 1 };
        for uplink in &UPLINKS[..uplinks] {
            self.wire(self.server(), uplink.name, uplink.router_side)?;
            self.configure_uplink(uplink)?;
            let (v4, v6) = (
                format!("10.10.{}.1/24", uplink.net),
                format!("2001:db8:{}::1/64", uplink.net),
            );
            let side = uplink.router_side;
            self.router().ip(&["addr", "add", &v4, "dev", side])?;
            self.router()
                .ip(&["-6", "addr", "add", &v6, "dev", side, "nodad"])?;
            // An access network drops packets with another link's source address; the data centre
            // of a server with two links does not.
            let strict = if uplinks == 1 { "1" } else { "0" };
            self.router()
                .sysctl(&format!("net/ipv4/conf/{side}/rp_filter"), strict)?;
        }
        let (v4, v6) = (format!("{TARGET_V4}/32"), format!("{TARGET_V6}/128"));
        self.server().ip(&["addr", "add", &v4, "dev", "lo"])?;
        self.server()
            .ip(&["-6", "addr", "add", &v6, "dev", "lo", "nodad"])?;
        if config.targets_routed {
            let via = GATEWAY_V4.to_string();
            self.router().ip(&["route", "add", &v4, "via", &via])?;
            let via = GATEWAY_V6.to_string();
            self.router()
                .ip(&["-6", "route", "add", &v6, "via", &via])?;
        }
        Ok(())
    }

    fn configure_uplink(&self, uplink: &Uplink) -> anyhow::Result<()> {
        let Uplink {
            name, net, metric, ..
        } = uplink;
        let (v4, v6) = (format!("{}/24", uplink.v4), format!("{}/64", uplink.v6));
        let (via4, via6) = (format!("10.10.{net}.1"), format!("2001:db8:{net}::1"));
        let server = self.server();
        server.ip(&["addr", "replace", &v4, "dev", name])?;
        server.ip(&["-6", "addr", "replace", &v6, "dev", name, "nodad"])?;
        server.ip(&[
            "route", "replace", "default", "via", &via4, "dev", name, "metric", metric,
        ])?;
        server.ip(&[
            "-6", "route", "replace", "default", "via", &via6, "dev", name, "metric", metric,
        ])?;
        Ok(())
    }

    pub(crate) fn make_router(&self) -> anyhow::Result<()> {
        self.router().sysctl("net/ipv4/ip_forward", "1")?;
        self.router().sysctl("net/ipv6/conf/all/forwarding", "1")?;
        // An access network drops packets with another link's source address.
        for side in ["r-wifi", "r-lte"] {
            self.router()
                .sysctl(&format!("net/ipv4/conf/{side}/rp_filter"), "1")?;
        }
        Ok(())
    }

    /// The gateway's address of the family that is asked for.
    pub const fn gateway(v6: bool) -> IpAddr {
        if v6 {
            IpAddr::V6(GATEWAY_V6)
        } else {
            IpAddr::V4(GATEWAY_V4)
        }
    }

    /// The gateway's address on the server's second link.
    pub const fn second_gateway(v6: bool) -> IpAddr {
        if v6 {
            IpAddr::V6(SECOND_V6)
        } else {
            IpAddr::V4(SECOND_V4)
        }
    }

    /// The targets' address of the family that is asked for.
    pub const fn target(v6: bool) -> IpAddr {
        if v6 {
            IpAddr::V6(TARGET_V6)
        } else {
            IpAddr::V4(TARGET_V4)
        }
    }

    /// Cuts the server's first link; returns when the kernel was told.
    pub fn cut_server(&self) -> anyhow::Result<Instant> {
        self.server()
            .run(|| {
                let at = Instant::now();
                flags::set_up("srv0", false).map(|()| at)
            })
            .context("srv0 cannot be cut")
    }

    /// Sets the server's first link up again.
    pub fn restore_server(&self) -> anyhow::Result<()> {
        self.server()
            .run(|| flags::set_up("srv0", true))
            .context("srv0 cannot be restored")?;
        self.configure_uplink(&UPLINKS[0])
    }

    /// Gives a link of the client another address: the old one is gone before the new one is there.
    pub fn replace_address(&self, link: crate::LinkName, last: u8) -> anyhow::Result<Instant> {
        let old = self
            .client()
            .ip(&["-4", "-o", "addr", "show", "dev", link.name()])?;
        let at = Instant::now();
        for word in old.split_whitespace().filter(|w| w.contains('/')) {
            self.client()
                .ip(&["addr", "del", word, "dev", link.name()])?;
        }
        let [a, b, c, _] = link.client_v4().octets();
        let new = format!("{}/24", Ipv4Addr::new(a, b, c, last));
        self.client()
            .ip(&["addr", "add", &new, "dev", link.name()])?;
        self.reroute(link)?;
        Ok(at)
    }
}
