//! The lab around the cases: addresses that answer in every way that a network can.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::Context;
use nix::sys::socket::SockaddrStorage;
use session_lab::{Lab, Netns};
use session_user::bench::bed::BedConfig;

/// Where the peer program listens for cases; not captured.
pub(super) fn control() -> SocketAddr {
    SocketAddr::new(Lab::gateway(false), 7900)
}

/// Destinations behind the gateway. All are captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The peer program's address.
    Target,
    /// An address of the server's network that no host has.
    NoHost,
    /// A network that nobody has a route to.
    NoNetwork,
    /// An address that a firewall refuses with an ICMP message.
    Prohibited,
    /// An address whose packets vanish.
    Silent,
}

impl Place {
    const ALL: [Self; 5] = [
        Self::Target,
        Self::NoHost,
        Self::NoNetwork,
        Self::Prohibited,
        Self::Silent,
    ];

    /// Its address.
    pub const fn addr(self, v6: bool) -> IpAddr {
        const fn four(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
            IpAddr::V4(Ipv4Addr::new(a, b, c, d))
        }
        const fn six(net: u16, host: u16) -> IpAddr {
            IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, net, 0, 0, 0, 0, host))
        }
        match (self, v6) {
            (Self::Target, v6) => Lab::target(v6),
            (Self::NoHost, false) => four(10, 10, 9, 99),
            (Self::NoHost, true) => six(9, 0x99),
            (Self::NoNetwork, false) => four(203, 0, 113, 7),
            (Self::NoNetwork, true) => six(0x200, 7),
            (Self::Prohibited, false) => four(203, 0, 113, 77),
            (Self::Prohibited, true) => six(0x200, 0x77),
            (Self::Silent, false) => four(198, 51, 100, 66),
            (Self::Silent, true) => six(0x101, 0x66),
        }
    }
}

/// Captures every place, and lets the gateway try to reach it.
pub(super) fn configure(config: &mut BedConfig) {
    let all = || {
        Place::ALL
            .into_iter()
            .flat_map(|p| [p.addr(false), p.addr(true)])
    };
    config.allow = all()
        .map(|a| match a {
            IpAddr::V4(a) => format!("{a}/32:*"),
            IpAddr::V6(a) => format!("[{a}]/128:*"),
        })
        .collect();
    // One case has 10,000 connections at once, more than a gateway grants to a peer unless it is told to.
    config.accept_extra.push_str("max_streams = 20000\n");
    let others: Vec<String> = all()
        .filter(|a| *a != Lab::target(a.is_ipv6()))
        .map(|a| format!("\"{a}\""))
        .collect();
    config.client_extra.push_str(&format!(
        "[[capture]]\npeer = \"gateway\"\nto = [{}]\n",
        others.join(", ")
    ));
}

/// Gives each place its way of answering.
pub(super) fn furnish(lab: &Lab) -> anyhow::Result<()> {
    let router = lab.router();
    for (netns, link) in [(router, "r-srv"), (lab.server(), "srv0")] {
        // Each case must get its own error, however many came before.
        netns.sysctl("net/ipv4/icmp_ratelimit", "0")?;
        netns.sysctl("net/ipv6/icmp/ratelimit", "0")?;
        for family in ["ipv4", "ipv6"] {
            // A host that is not there is known not to be there after 200 ms instead of 3 s.
            let neigh = format!("net/{family}/neigh/{link}");
            netns.sysctl(&format!("{neigh}/mcast_solicit"), "1")?;
            netns.sysctl(&format!("{neigh}/retrans_time_ms"), "200")?;
        }
    }
    for v6 in [false, true] {
        let silent = Place::Silent.addr(v6).to_string();
        let family = if v6 { "-6" } else { "-4" };
        router.ip(&[family, "route", "add", "blackhole", &silent])?;
    }
    let (none4, none6) = ("icmp-net-unreachable", "icmp6-no-route");
    reject(router, Place::NoNetwork, none4, none6)?;
    let (no4, no6) = ("icmp-admin-prohibited", "icmp6-adm-prohibited");
    reject(router, Place::Prohibited, no4, no6)?;
    delay_rejected(lab)
}

/// The networks of [`Place::NoNetwork`] and [`Place::Prohibited`], and of nothing else.
const REJECTED: [(&str, &str); 2] = [
    ("iptables", "203.0.113.0/24"),
    ("ip6tables", "2001:db8:200::/64"),
];

/// Gives what will be rejected a way of 1 ms. In a lab without any delay the message is back before the
/// sender's connect(2) has let go of its socket, and the kernel passes it over until the SYN is sent again;
/// no real network is so fast.
fn delay_rejected(lab: &Lab) -> anyhow::Result<()> {
    lab.round_trip(Duration::from_millis(2))?;
    for (program, network) in REJECTED {
        // All else goes around the emulator, whose rules follow in this chain.
        let rule = ["-w", "-t", "mangle", "-I", "FORWARD", "1"];
        let matching = ["!", "-d", network, "-j", "ACCEPT"];
        lab.router()
            .exec(program, &[&rule[..], &matching].concat())?;
    }
    Ok(())
}

/// Has the router answer with these messages. Routes of such kinds say the same, but IPv4's send no more
/// than one message a second to a host, and no namespace can change that.
fn reject(router: &Netns, place: Place, v4: &str, v6: &str) -> anyhow::Result<()> {
    for (is_v6, program, with) in [(false, "iptables", v4), (true, "ip6tables", v6)] {
        let to = place.addr(is_v6).to_string();
        // Rules see only what is to be forwarded; nothing gets as far as this link.
        let family = if is_v6 { "-6" } else { "-4" };
        let out = session_lab::LinkName::Lte.router_side();
        router.ip(&[family, "route", "add", &to, "dev", out])?;
        let rule = ["-w", "-A", "FORWARD", "-d", &to, "-j", "REJECT"];
        router.exec(program, &[&rule[..], &["--reject-with", with]].concat())?;
    }
    Ok(())
}

/// The router's link-local address on the client's first link.
pub(super) fn link_local(lab: &Lab) -> anyhow::Result<Ipv6Addr> {
    let text = lab
        .router()
        .ip(&["-6", "-o", "addr", "show", "dev", "r-wifi", "scope", "link"])?;
    let word = text.split_whitespace().find(|w| w.starts_with("fe80"));
    let addr = word.and_then(|w| w.split('/').next());
    addr.context("the router has no link-local address")?
        .parse()
        .context("the router's link-local address")
}

/// An address as the kernel gives it.
pub(super) fn socket_addr(addr: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = addr.as_sockaddr_in().map(|a| SocketAddr::from(*a));
    v4.or_else(|| addr.as_sockaddr_in6().map(|a| SocketAddr::from(*a)))
}
