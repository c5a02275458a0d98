//! rtnetlink messages, as far as the monitor needs them: bytes in, facts out.
//!
//! Only three families of messages and a dozen attributes matter here, and an unknown attribute
//! must never make the monitor blind to a link. So this reads exactly what it needs, skips the
//! rest, and copies nothing twice: the news of a lost carrier should not wait for statistics to
//! be decoded. Layouts are those of linux/rtnetlink.h, if_link.h and if_addr.h, host byte order.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Multicast groups that the monitor joins (RTNLGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR,
/// IPV6_ROUTE), as the bit mask that `bind` takes.
pub(super) const GROUPS: u32 = 1 | 1 << 4 | 1 << 6 | 1 << 8 | 1 << 10;

const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_REQUEST_DUMP: u16 = 0x301;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

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
        // The kernel takes the family from the first byte; the rest of the body is zero.
        let (kind, family, body) = match self {
            Ask::Links => (18_u16, 0, 16_usize),
            Ask::Addresses => (22, 0, 8),
            Ask::Routes4 => (26, AF_INET, 12),
            Ask::Routes6 => (26, AF_INET6, 12),
        };
        let mut bytes = Vec::with_capacity(HEADER + body);
        bytes.extend_from_slice(&((HEADER + body) as u32).to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
        bytes.extend_from_slice(&seq.to_ne_bytes());
        bytes.extend_from_slice(&0_u32.to_ne_bytes());
        bytes.push(family);
        bytes.resize(HEADER + body, 0);
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
        let length = u32_at(bytes, 0).unwrap_or(0) as usize;
        if length < HEADER || length > bytes.len() {
            bytes = &[];
            return Some(Message {
                seq: 0,
                port: 0,
                interrupted: false,
                news: None,
            });
        }
        let message = &bytes[..length];
        bytes = bytes.get(align(length)..).unwrap_or(&[]);
        let flags = u16_at(message, 6)?;
        Some(Message {
            seq: u32_at(message, 8)?,
            port: u32_at(message, 12)?,
            interrupted: flags & NLM_F_DUMP_INTR != 0,
            news: news(u16_at(message, 4)?, flags, &message[HEADER..]),
        })
    })
}

fn news(kind: u16, flags: u16, body: &[u8]) -> Option<News> {
    Some(match kind {
        NLMSG_DONE => News::Done,
        NLMSG_ERROR => News::Refused(-i32_at(body, 0)?.max(-4095)),
        // Bridges speak of their ports with AF_BRIDGE: a DELLINK there means "left the bridge".
        RTM_NEWLINK | RTM_DELLINK if *body.first()? != 0 => News::Other,
        RTM_NEWLINK => News::Link(link(body)?),
        RTM_DELLINK => News::LinkGone(u32_at(body, 4)?),
        RTM_NEWADDR | RTM_DELADDR => match (address(body)?, kind) {
            (None, _) => News::Other,
            (Some(facts), RTM_NEWADDR) => News::Address(facts),
            (Some(facts), _) => News::AddressGone(facts),
        },
        RTM_NEWROUTE | RTM_DELROUTE => match (routes(body)?, kind) {
            (hops, _) if hops.is_empty() => News::Other,
            (hops, RTM_NEWROUTE) => News::Routes {
                hops,
                replace: flags & NLM_F_REPLACE != 0,
            },
            _ => News::RouteGone,
        },
        _ => News::Other,
    })
}

fn link(body: &[u8]) -> Option<LinkFacts> {
    let mut facts = LinkFacts {
        index: u32_at(body, 4)?,
        hardware: u16_at(body, 2)?,
        flags: u32_at(body, 8)?,
        name: None,
        operstate: None,
        mtu: None,
        kind: None,
    };
    for (kind, value) in attributes(body.get(16..)?) {
        match kind {
            3 => facts.name = text(value),
            4 => facts.mtu = u32_at(value, 0),
            16 => facts.operstate = value.first().copied(),
            18 => {
                facts.kind = attributes(value)
                    .find(|(kind, _)| *kind == 1)
                    .and_then(|(_, value)| text(value));
            }
            _ => {}
        }
    }
    Some(facts)
}

/// `Some(None)` for a family other than IPv4 and IPv6.
fn address(body: &[u8]) -> Option<Option<AddressFacts>> {
    let family = *body.first()?;
    if family != AF_INET && family != AF_INET6 {
        return Some(None);
    }
    let mut flags = u32::from(*body.get(2)?);
    let (mut address, mut local) = (None, None);
    for (kind, value) in attributes(body.get(8..)?) {
        match kind {
            1 => address = Some(ip(value)?),
            2 => local = Some(ip(value)?),
            8 => flags = u32_at(value, 0)?,
            _ => {}
        }
    }
    Some(Some(AddressFacts {
        index: u32_at(body, 4)?,
        // On a point-to-point link IFA_ADDRESS is the far end and IFA_LOCAL is ours.
        ip: local.or(address)?,
        prefix: body[1],
        scope: body[3],
        flags,
    }))
}

/// The next hops of a unicast route of the main table; empty for every other route.
fn routes(body: &[u8]) -> Option<Vec<RouteFacts>> {
    const MAIN_TABLE: u32 = 254;
    const UNICAST: u8 = 1;
    const RTM_F_CLONED: u32 = 0x200;
    let (family, prefix) = (*body.first()?, *body.get(1)?);
    let mut table = u32::from(*body.get(4)?);
    let unicast = *body.get(7)? == UNICAST && u32_at(body, 8)? & RTM_F_CLONED == 0;
    if !unicast || (family != AF_INET && family != AF_INET6) {
        return Some(Vec::new());
    }
    let (mut dst, mut out, mut gateway, mut metric, mut source, mut hops) =
        (None, None, None, 0, None, &[][..]);
    for (kind, value) in attributes(body.get(12..)?) {
        match kind {
            1 => dst = Some(ip(value)?),
            4 => out = u32_at(value, 0),
            5 => gateway = ip(value),
            6 => metric = u32_at(value, 0)?,
            7 => source = ip(value),
            9 => hops = value,
            15 => table = u32_at(value, 0)?,
            // RTA_VIA: a gateway of the other family (RFC 5549), after two bytes of family.
            18 => gateway = value.get(2..).and_then(ip),
            _ => {}
        }
    }
    if table != MAIN_TABLE {
        return Some(Vec::new());
    }
    let any = if family == AF_INET {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    } else {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    };
    let dst = IpNet::new(dst.unwrap_or(any), prefix).ok()?;
    let hop = |index, gateway| RouteFacts {
        index,
        dst,
        gateway,
        metric,
        source,
    };
    let mut found: Vec<_> = out.into_iter().map(|index| hop(index, gateway)).collect();
    found.extend(next_hops(hops).map(|(index, gateway)| hop(index, gateway)));
    Some(found)
}

/// The entries of RTA_MULTIPATH: `struct rtnexthop`, each followed by attributes of its own.
fn next_hops(mut bytes: &[u8]) -> impl Iterator<Item = (u32, Option<IpAddr>)> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let index = u32_at(bytes, 4)?;
        let own = bytes.get(8..length)?;
        bytes = bytes.get(align(length)..).unwrap_or(&[]);
        let gateway = attributes(own)
            .find_map(|(kind, value)| match kind {
                5 => Some(ip(value)),
                18 => Some(value.get(2..).and_then(ip)),
                _ => None,
            })
            .flatten();
        Some((index, gateway))
    })
}

/// Attributes as (type without its flag bits, value); ends where a length makes no sense.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & 0x3fff;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(align(length)..).unwrap_or(&[]);
        Some((kind, value))
    })
}

fn align(length: usize) -> usize {
    length.next_multiple_of(4)
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(IpAddr::from(v4));
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

/// A C string: up to the first NUL.
fn text(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    std::str::from_utf8(&bytes[..end]).ok().map(str::to_owned)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_ne_bytes)
}

fn i32_at(bytes: &[u8], at: usize) -> Option<i32> {
    array(bytes, at).map(i32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&((HEADER + body.len()) as u32).to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&7_u32.to_ne_bytes());
        bytes.extend_from_slice(&9_u32.to_ne_bytes());
        bytes.extend_from_slice(body);
        bytes.resize(align(bytes.len()), 0);
        bytes
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(value);
        bytes.resize(align(bytes.len()), 0);
        bytes
    }

    fn only(bytes: &[u8]) -> Option<News> {
        let all: Vec<_> = messages(bytes).collect();
        assert_eq!(all.len(), 1);
        all[0].news.clone()
    }

    fn link_body(family: u8) -> Vec<u8> {
        let mut body = vec![family, 0, 1, 0];
        body.extend_from_slice(&3_u32.to_ne_bytes());
        body.extend_from_slice(&0x1_0041_u32.to_ne_bytes());
        body.extend_from_slice(&[0; 4]);
        body.extend(attribute(3, b"wifi0\0"));
        body.extend(attribute(4, &1500_u32.to_ne_bytes()));
        body.extend(attribute(16, &[6]));
        body.extend(attribute(18, &attribute(1, b"veth\0")));
        body.extend(attribute(4000, b"from a kernel of tomorrow"));
        body
    }

    #[test]
    fn a_link_is_read_past_unknown_attributes() {
        let Some(News::Link(link)) = only(&message(RTM_NEWLINK, 0, &link_body(0))) else {
            panic!("not a link");
        };
        assert_eq!((link.index, link.flags), (3, 0x1_0041));
        assert_eq!(link.name.as_deref(), Some("wifi0"));
        assert_eq!(link.kind.as_deref(), Some("veth"));
        assert_eq!((link.mtu, link.operstate), (Some(1500), Some(6)));
    }

    #[test]
    fn leaving_a_bridge_is_not_the_end_of_a_link() {
        let bytes = message(RTM_DELLINK, 0, &link_body(7));
        assert_eq!(only(&bytes), Some(News::Other));
    }

    #[test]
    fn a_route_with_several_next_hops_is_one_fact_for_each() {
        let mut hop = vec![0, 0, 0, 0];
        hop.extend_from_slice(&4_u32.to_ne_bytes());
        hop.extend(attribute(5, &[10, 0, 0, 1]));
        let length = hop.len() as u16;
        hop[..2].copy_from_slice(&length.to_ne_bytes());
        let mut second = hop.clone();
        second[4] = 5;
        let mut body = vec![AF_INET, 0, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0];
        body.extend(attribute(6, &100_u32.to_ne_bytes()));
        body.extend(attribute(9, &[hop, second].concat()));
        let Some(News::Routes { hops, replace }) =
            only(&message(RTM_NEWROUTE, NLM_F_REPLACE, &body))
        else {
            panic!("not a route");
        };
        assert!(replace);
        assert_eq!(hops.iter().map(|h| h.index).collect::<Vec<_>>(), [4, 5]);
        assert!(hops.iter().all(|h| h.metric == 100
            && h.dst.to_string() == "0.0.0.0/0"
            && h.gateway == Some("10.0.0.1".parse().unwrap())));
    }

    #[test]
    fn a_truncated_message_says_so_and_ends_the_datagram() {
        let whole = message(RTM_NEWLINK, 0, &link_body(0));
        for cut in 1..whole.len() {
            let all: Vec<_> = messages(&whole[..cut]).collect();
            assert_eq!(all.len(), 1, "cut at {cut}");
            assert_eq!(all[0].news, None, "cut at {cut}");
        }
    }

    #[test]
    fn an_answer_carries_seq_port_and_errno() {
        let body = (-16_i32).to_ne_bytes();
        let bytes = message(NLMSG_ERROR, NLM_F_DUMP_INTR, &body);
        let all: Vec<_> = messages(&bytes).collect();
        assert_eq!((all[0].seq, all[0].port, all[0].interrupted), (7, 9, true));
        assert_eq!(all[0].news, Some(News::Refused(16)));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let count = messages(&bytes).count();
            prop_assert!(count <= bytes.len() / HEADER + 1);
        }

        #[test]
        fn no_body_panics(kind in 16_u16..26, body in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(messages(&message(kind, 0, &body)).count() >= 1);
        }
    }
}
