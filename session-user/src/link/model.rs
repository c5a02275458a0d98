//! What is known about the links: plain data, and the one question that matters of it, whether a
//! link can carry a connection to a given address.

use std::fmt;
use std::net::IpAddr;
use std::time::Instant;

use ipnet::IpNet;

/// What sort of interface a link is. From its hardware type (ARPHRD), the kernel's link kind and,
/// where sysfs shows this very interface, its `wireless` folder and `DEVTYPE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LinkKind {
    /// Wired Ethernet, and whatever behaves like it (veth, bridge, bond, VLAN).
    Ethernet,
    /// IEEE 802.11.
    Wifi,
    /// A cellular modem.
    Wwan,
    /// A tunnel or another device without a medium of its own.
    Tunnel,
    /// The loopback device.
    Loopback,
    /// None of these.
    Other,
}

impl fmt::Display for LinkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LinkKind::Ethernet => "ethernet",
            LinkKind::Wifi => "wifi",
            LinkKind::Wwan => "wwan",
            LinkKind::Tunnel => "tunnel",
            LinkKind::Loopback => "loopback",
            LinkKind::Other => "other",
        })
    }
}

/// How far an address is valid (`enum rt_scope_t`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Anywhere.
    Global,
    /// On this link only, as fe80::/10 and 169.254/16 are.
    Link,
    /// On this host only.
    Host,
}

/// An address of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Address {
    /// The address itself.
    pub ip: IpAddr,
    /// Length of its network prefix, in bits.
    pub prefix: u8,
    /// How far it is valid.
    pub scope: Scope,
    /// Duplicate address detection has not ended, or it has failed: nothing can be bound to it.
    pub tentative: bool,
    /// Its preferred lifetime is over: good for what exists, not for anything new (RFC 4862).
    pub deprecated: bool,
    /// An IPv6 privacy address (RFC 8981), which lives for hours only.
    pub temporary: bool,
}

impl Address {
    /// Whether a connection can be bound to it now.
    pub fn bindable(&self) -> bool {
        !self.tentative && self.scope != Scope::Host
    }

    fn net_holds(&self, ip: IpAddr) -> bool {
        IpNet::new(self.ip, self.prefix).is_ok_and(|net| net.contains(&ip))
    }
}

/// A unicast route of the main table over a link (one next hop of it).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Route {
    /// Where it leads; `0.0.0.0/0` and `::/0` are the default routes.
    pub dst: IpNet,
    /// The next hop; `None` means that the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// Its metric; lower is preferred.
    pub metric: u32,
    /// The source address that the route asks for.
    pub source: Option<IpAddr>,
}

/// Where a link stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkState {
    /// It cannot carry anything.
    Unusable,
    /// It could carry something, but has done so for less than the debounce time.
    Settling {
        /// When it becomes usable, if nothing happens until then.
        until: Instant,
    },
    /// It is up, has carrier, an address, and a route for that address.
    Usable,
}

/// A network interface with what is known about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The kernel's index of it.
    pub index: u32,
    /// Its name, such as `wlan0`.
    pub name: String,
    /// What sort it is.
    pub kind: LinkKind,
    /// Somebody set it up (IFF_UP).
    pub admin_up: bool,
    /// The medium is there (IFF_LOWER_UP, and no operational state that contradicts).
    pub carrier: bool,
    /// Its addresses, IPv4 and IPv6, in the kernel's order.
    pub addresses: Vec<Address>,
    /// The routes of the main table over it.
    pub routes: Vec<Route>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Where it stands.
    pub state: LinkState,
    /// Since when it stands there.
    pub since: Instant,
}

/// The address to bind a connection to, as [`Link::usable_for`] found it.
pub type SourceAddress = IpAddr;

/// Why a link cannot carry a connection to some address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// Nobody set it up.
    #[error("{0} is down")]
    Down(String),
    /// Its medium is missing.
    #[error("no carrier on {0}")]
    NoCarrier(String),
    /// No address of the family that is needed.
    #[error("no {family} address on {link}")]
    NoAddress {
        /// The link's name.
        link: String,
        /// `IPv4` or `IPv6`.
        family: &'static str,
    },
    /// The only addresses are still being checked for duplicates, or are duplicates.
    #[error("address {ip} on {link} is tentative")]
    Tentative {
        /// The link's name.
        link: String,
        /// One of them.
        ip: IpAddr,
    },
    /// No route of the main table over the link covers the address. A socket that is bound to a
    /// device reaches nothing without one; no other route is of use to it.
    #[error("no route to {to} over {link}")]
    NoRoute {
        /// The link's name.
        link: String,
        /// What was to be reached.
        to: IpAddr,
    },
    /// It has come back less than the debounce time ago.
    #[error("{0} is settling")]
    Settling(String),
}

impl Link {
    /// The best route over this link that covers `dst`: longest prefix, then lowest metric.
    pub fn route_to(&self, dst: IpAddr) -> Option<&Route> {
        let dst = dst.to_canonical();
        self.routes
            .iter()
            .filter(|route| route.dst.contains(&dst))
            .min_by_key(|route| (u8::MAX - route.dst.prefix_len(), route.metric))
    }

    /// Whether a connection bound to this link can be made to `dst` now, and from which address;
    /// otherwise the first reason against it, in words. A v4-mapped `dst` is judged as IPv4.
    ///
    /// The source is the one that the route asks for, else an address in the prefix of the next
    /// hop; among equals a stable, not deprecated, global one. IPv6 privacy addresses come after
    /// stable ones: they end within hours, and each end costs a handover.
    pub fn usable_for(&self, dst: IpAddr) -> Result<SourceAddress, Unusable> {
        let dst = dst.to_canonical();
        let name = || self.name.clone();
        if !self.admin_up {
            return Err(Unusable::Down(name()));
        }
        if !self.carrier {
            return Err(Unusable::NoCarrier(name()));
        }
        if self.kind == LinkKind::Loopback {
            return self.loopback_for(dst);
        }
        let usable = |address: &&Address| {
            address.ip.is_ipv4() == dst.is_ipv4()
                && address.scope != Scope::Host
                && (address.scope == Scope::Global || dst.is_ipv4() || link_local(dst))
        };
        let Some(first) = self.addresses.iter().find(usable) else {
            return Err(Unusable::NoAddress {
                link: name(),
                family: if dst.is_ipv4() { "IPv4" } else { "IPv6" },
            });
        };
        if !self.addresses.iter().filter(usable).any(|a| a.bindable()) {
            return Err(Unusable::Tentative {
                link: name(),
                ip: first.ip,
            });
        }
        let Some(route) = self.route_to(dst) else {
            return Err(Unusable::NoRoute {
                link: name(),
                to: dst,
            });
        };
        if self.state != LinkState::Usable {
            return Err(Unusable::Settling(name()));
        }
        let near = route.gateway.unwrap_or(dst);
        let best = self
            .addresses
            .iter()
            .filter(usable)
            .filter(|address| address.bindable())
            .min_by_key(|address| {
                (
                    route.source != Some(address.ip),
                    address.deprecated,
                    address.scope != Scope::Global && !link_local(dst),
                    !address.net_holds(near),
                    address.temporary,
                )
            });
        Ok(best.map_or(first.ip, |address| address.ip))
    }

    /// Whether `source` is an address of this link to which a connection can still be bound.
    pub fn holds(&self, source: IpAddr) -> bool {
        let source = source.to_canonical();
        self.addresses
            .iter()
            .any(|address| address.ip == source && !address.tentative)
    }

    /// Loopback's routes are in the local table, which the monitor does not read.
    fn loopback_for(&self, dst: IpAddr) -> Result<SourceAddress, Unusable> {
        let own = self
            .addresses
            .iter()
            .find(|address| address.ip.is_ipv4() == dst.is_ipv4());
        match own {
            Some(address) if dst.is_loopback() => Ok(address.ip),
            _ => Err(Unusable::NoRoute {
                link: self.name.clone(),
                to: dst,
            }),
        }
    }
}

fn link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// What became of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// It can no longer carry anything.
    Lost,
    /// It can again, and has been able to for the debounce time.
    Gained,
}

/// A link was lost or gained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The version of the first snapshot that shows it.
    pub version: u64,
    /// The link's name.
    pub link: String,
    /// Which of both.
    pub kind: ChangeKind,
    /// When the netlink message that told it was read (when its debounce ended, for `Gained`).
    pub at: Instant,
}

/// All links at one moment.
#[derive(Debug, Clone)]
pub struct LinkSnapshot {
    /// Rises by one with each published snapshot; the first is 1.
    pub version: u64,
    /// All links of the namespace, by index.
    pub links: Vec<Link>,
    /// When the netlink message that led to this snapshot was read.
    pub read_at: Instant,
    /// The latest losses and gains, oldest first, at most [`LinkSnapshot::CHANGES_MAX`]. A reader
    /// that was slow and missed snapshots still finds here what happened in them.
    pub changes: Vec<Change>,
}

impl LinkSnapshot {
    /// How many changes a snapshot remembers.
    pub const CHANGES_MAX: usize = 64;

    /// The link of this name.
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }

    /// What was lost and gained after the snapshot of `version`, oldest first.
    pub fn changes_since(&self, version: u64) -> impl Iterator<Item = &Change> {
        self.changes
            .iter()
            .filter(move |change| change.version > version)
    }

    /// The links lost with exactly this snapshot.
    pub fn lost(&self) -> impl Iterator<Item = &str> {
        self.new_ones(ChangeKind::Lost)
    }

    /// The links gained with exactly this snapshot.
    pub fn gained(&self) -> impl Iterator<Item = &str> {
        self.new_ones(ChangeKind::Gained)
    }

    fn new_ones(&self, kind: ChangeKind) -> impl Iterator<Item = &str> {
        self.changes_since(self.version - 1)
            .filter(move |change| change.kind == kind)
            .map(|change| change.link.as_str())
    }
}
