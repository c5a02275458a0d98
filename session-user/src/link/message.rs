//! rtnetlink messages, as far as the monitor needs them: bytes in, facts out.
//!
//! The library decodes; here is chosen what is decoded. A message of addresses or routes is decoded
//! whole. A link is decoded attribute by attribute, only those that are needed: the library refuses
//! a whole message for one attribute that it does not understand, and a kernel of tomorrow must not
//! make the monitor blind to a link. That also keeps the news of a lost carrier from waiting for
//! statistics to be decoded.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use rtnetlink::packet_core::{
    NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REPLACE, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR,
    NetlinkBuffer, NetlinkMessage, NlasIterator, ParseableParametrized, parse_i32, parse_string,
};
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkHeader, LinkMessage};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteType, RouteVia,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

/// Multicast groups that the monitor joins (RTNLGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR,
/// IPV6_ROUTE), as the bit mask that `bind` takes.
pub(super) const GROUPS: u32 = 1 | 1 << 4 | 1 << 6 | 1 << 8 | 1 << 10;

/// `struct ifinfomsg` (linux/rtnetlink.h).
const LINK_HEADER: usize = 16;

/// What one dump asks for; a full reading of the state is all four, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    Links,
    Addresses,
    Routes4,
    Routes6,
}

impl Ask {
    /// The dump that follows in a full reading.
    pub(super) fn next(self) -> Option<Ask> {
        match self {
            Ask::Links => Some(Ask::Addresses),
            Ask::Addresses => Some(Ask::Routes4),
            Ask::Routes4 => Some(Ask::Routes6),
            Ask::Routes6 => None,
        }
    }

    /// The request's bytes.
    pub(super) fn request(self, seq: u32) -> Vec<u8> {
        let routes = |family| {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            RouteNetlinkMessage::GetRoute(message)
        };
        let mut message = NetlinkMessage::from(match self {
            Ask::Links => RouteNetlinkMessage::GetLink(LinkMessage::default()),
            Ask::Addresses => RouteNetlinkMessage::GetAddress(AddressMessage::default()),
            Ask::Routes4 => routes(AddressFamily::Inet),
            Ask::Routes6 => routes(AddressFamily::Inet6),
        });
        message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        message.header.sequence_number = seq;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }
}

/// A link as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LinkFacts {
    pub index: u32,
    /// Absent in some messages; then the known name stays.
    pub name: Option<String>,
    pub hardware: u16,
    pub flags: u32,
    pub operstate: Option<u8>,
    pub mtu: Option<u32>,
    /// IFLA_INFO_KIND, such as `veth` or `wireguard`.
    pub kind: Option<String>,
}

/// An address on a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AddressFacts {
    pub index: u32,
    pub ip: IpAddr,
    pub prefix: u8,
    pub scope: u8,
    pub flags: u32,
}

/// One next hop of a route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RouteFacts {
    pub index: u32,
    pub dst: IpNet,
    pub gateway: Option<IpAddr>,
    pub metric: u32,
    pub source: Option<IpAddr>,
}

/// What a message says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum News {
    Link(LinkFacts),
    LinkGone(u32),
    Address(AddressFacts),
    AddressGone(AddressFacts),
    /// `replace`: it took the place of a route that is not named.
    Routes {
        hops: Vec<RouteFacts>,
        replace: bool,
    },
    /// Some route of the main table went.
    RouteGone,
    /// End of a dump.
    Done,
    /// The kernel refused a request with this errno; 0 is an acknowledgement.
    Refused(i32),
    /// Something that does not matter here.
    Other,
}

/// A message with what its header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Message {
    pub seq: u32,
    pub port: u32,
    /// The dump is inconsistent because something changed meanwhile.
    pub interrupted: bool,
    /// `None`: the body cannot be read.
    pub news: Option<News>,
}

/// Splits a datagram into its messages. Ends early, with a `None` body, where a length makes no
/// sense: nothing behind it can be trusted.
pub(super) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let Ok(message) = NetlinkBuffer::new_checked(bytes) else {
            bytes = &[];
            return Some(Message {
                seq: 0,
                port: 0,
                interrupted: false,
                news: None,
            });
        };
        let length = (message.length() as usize).next_multiple_of(4);
        bytes = bytes.get(length..).unwrap_or(&[]);
        Some(Message {
            seq: message.sequence_number(),
            port: message.port_number(),
            interrupted: message.flags() & NLM_F_DUMP_INTR != 0,
            news: news(message.message_type(), message.flags(), message.payload()),
        })
    })
}

fn news(kind: u16, flags: u16, body: &[u8]) -> Option<News> {
    match kind {
        NLMSG_DONE => return Some(News::Done),
        NLMSG_ERROR => return Some(News::Refused(-parse_i32(body.get(..4)?).ok()?.max(-4095))),
        libc::RTM_NEWLINK | libc::RTM_DELLINK => return link(kind, body),
        _ => {}
    }
    Some(
        match RouteNetlinkMessage::parse_with_param(body, kind).ok()? {
            RouteNetlinkMessage::NewAddress(message) => match address(&message)? {
                Some(facts) => News::Address(facts),
                None => News::Other,
            },
            RouteNetlinkMessage::DelAddress(message) => match address(&message)? {
                Some(facts) => News::AddressGone(facts),
                None => News::Other,
            },
            RouteNetlinkMessage::NewRoute(message) => {
                let hops = routes(&message)?;
                let replace = flags & NLM_F_REPLACE != 0;
                if hops.is_empty() {
                    News::Other
                } else {
                    News::Routes { hops, replace }
                }
            }
            RouteNetlinkMessage::DelRoute(message) if !routes(&message)?.is_empty() => {
                News::RouteGone
            }
            _ => News::Other,
        },
    )
}

fn link(kind: u16, body: &[u8]) -> Option<News> {
    let header = LinkHeader::parse(body).ok()?;
    let family = header.interface_family;
    // Bridges speak of their ports with AF_BRIDGE: a DELLINK there means "left the bridge".
    if family != AddressFamily::Unspec {
        return Some(News::Other);
    }
    if kind == libc::RTM_DELLINK {
        return Some(News::LinkGone(header.index));
    }
    let mut facts = LinkFacts {
        index: header.index,
        hardware: header.link_layer_type.into(),
        flags: header.flags.bits(),
        name: None,
        operstate: None,
        mtu: None,
        kind: None,
    };
    for attribute in NlasIterator::new(body.get(LINK_HEADER..)?) {
        let attribute = attribute.ok()?;
        match attribute.kind() {
            libc::IFLA_LINKINFO => facts.kind = kind_in(attribute.value()),
            libc::IFLA_IFNAME | libc::IFLA_MTU | libc::IFLA_OPERSTATE => {
                match LinkAttribute::parse_with_param(&attribute, family) {
                    Ok(LinkAttribute::IfName(name)) => facts.name = Some(name),
                    Ok(LinkAttribute::Mtu(mtu)) => facts.mtu = Some(mtu),
                    Ok(LinkAttribute::OperState(state)) => facts.operstate = Some(state.into()),
                    _ => {}
                }
            }
            _ => {}
        }
    }
    Some(News::Link(facts))
}

/// IFLA_INFO_KIND; what else is in IFLA_LINKINFO is each driver's own.
fn kind_in(info: &[u8]) -> Option<String> {
    NlasIterator::new(info)
        .map_while(Result::ok)
        .find(|nested| nested.kind() == libc::IFLA_INFO_KIND)
        .and_then(|nested| parse_string(nested.value()).ok())
}

/// `Some(None)` for a family other than IPv4 and IPv6.
fn address(message: &AddressMessage) -> Option<Option<AddressFacts>> {
    let header = &message.header;
    if !is_ip(header.family) {
        return Some(None);
    }
    let mut flags = u32::from(header.flags.bits());
    let (mut address, mut local) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Flags(all) => flags = all.bits(),
            _ => {}
        }
    }
    Some(Some(AddressFacts {
        index: header.index,
        // On a point-to-point link IFA_ADDRESS is the far end and IFA_LOCAL is ours.
        ip: local.or(address)?,
        prefix: header.prefix_len,
        scope: header.scope.into(),
        flags,
    }))
}

/// The next hops of a unicast route of the main table; empty for every other route.
fn routes(message: &RouteMessage) -> Option<Vec<RouteFacts>> {
    let header = &message.header;
    let unicast = header.kind == RouteType::Unicast && !header.flags.contains(RouteFlags::Cloned);
    if !unicast || !is_ip(header.address_family) {
        return Some(Vec::new());
    }
    let mut table = u32::from(header.table);
    let (mut dst, mut metric, mut source, mut hops) = (None, 0, None, &[][..]);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => dst = Some(ip(address)?),
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::PrefSource(address) => source = ip(address),
            RouteAttribute::MultiPath(several) => hops = several,
            RouteAttribute::Table(number) => table = *number,
            _ => {}
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) {
        return Some(Vec::new());
    }
    let any = if header.address_family == AddressFamily::Inet {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    } else {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    };
    let dst = IpNet::new(dst.unwrap_or(any), header.destination_prefix_length).ok()?;
    let hop = |index, gateway| RouteFacts {
        index,
        dst,
        gateway,
        metric,
        source,
    };
    let own = message.attributes.iter().find_map(|a| match a {
        RouteAttribute::Oif(index) => Some(hop(*index, gateway(&message.attributes))),
        _ => None,
    });
    let several = hops
        .iter()
        .map(|h| hop(h.interface_index, gateway(&h.attributes)));
    Some(own.into_iter().chain(several).collect())
}

/// Of the route's own family, or of the other (RTA_VIA, RFC 5549).
fn gateway(attributes: &[RouteAttribute]) -> Option<IpAddr> {
    attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(address) => ip(address),
        RouteAttribute::Via(RouteVia::Inet(v4)) => Some(IpAddr::V4(*v4)),
        RouteAttribute::Via(RouteVia::Inet6(v6)) => Some(IpAddr::V6(*v6)),
        _ => None,
    })
}

fn is_ip(family: AddressFamily) -> bool {
    matches!(family, AddressFamily::Inet | AddressFamily::Inet6)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}
