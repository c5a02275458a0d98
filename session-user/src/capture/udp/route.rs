//! The one route that capture adds: what makes the addresses that stand for IPv6 destinations this host's own.
//!
//! `local fde6:b481:678d:568e::/64 dev lo`, in the kernel's own table of local addresses. It is there only while a rule
//! captures UDP over IPv6. IPv4 needs none, for all of 127.0.0.0/8 is local from the start.

use std::io;
use std::net::Ipv6Addr;

use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use session_ebpf_common::UDP_PREFIX6;

use super::orphans;

/// Index of the loopback device (`LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;
const PREFIX_BITS: u8 = 64;
/// `RT_TABLE_LOCAL` of linux/rtnetlink.h.
const LOCAL_TABLE: u8 = 255;

/// The route, for as long as this lives.
#[derive(Debug)]
pub struct AnyIp(());

impl AnyIp {
    /// Adds it to the current network namespace; one that an agent which was killed has left is taken over. The answer
    /// comes at once, from the kernel itself.
    pub fn add() -> io::Result<Self> {
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        ask(RouteNetlinkMessage::NewRoute(route()), flags).map(|()| Self(()))
    }
}

impl Drop for AnyIp {
    fn drop(&mut self) {
        if let Err(error) = remove() {
            tracing::warn!(%error, prefix = %prefix(), "the route of captured IPv6 datagrams stays");
        }
    }
}

/// Removes the route, also one that an agent which was killed has left; not before the sockets that are connected into its
/// prefix have been ended, for what they send would leave this host as it is. If they cannot be, the route stays.
pub fn remove() -> io::Result<()> {
    orphans::end()?;
    match ask(RouteNetlinkMessage::DelRoute(route()), 0) {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ESRCH | libc::EAFNOSUPPORT | libc::EOPNOTSUPP)
            ) =>
        {
            Ok(())
        }
        done => done,
    }
}

fn prefix() -> Ipv6Addr {
    let half = |word: u32| u64::from(u32::from_be(word));
    let upper = half(UDP_PREFIX6[0]) << 32 | half(UDP_PREFIX6[1]);
    Ipv6Addr::from_bits(u128::from(upper) << 64)
}

fn route() -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = AddressFamily::Inet6;
    route.header.destination_prefix_length = PREFIX_BITS;
    route.header.table = LOCAL_TABLE;
    route.header.protocol = RouteProtocol::Static;
    route.header.scope = RouteScope::Universe;
    route.header.kind = RouteType::Local;
    route.attributes = vec![
        RouteAttribute::Destination(RouteAddress::Inet6(prefix())),
        RouteAttribute::Oif(LOOPBACK),
    ];
    route
}

/// Sends one request and waits for what the kernel says.
fn ask(request: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut message = NetlinkMessage::from(request);
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    message.header.sequence_number = 1;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer);
    match answer.map_err(io::Error::other)?.payload {
        NetlinkPayload::Error(error) if error.code.is_none() => Ok(()),
        NetlinkPayload::Error(error) => Err(error.to_io()),
        _ => Err(io::Error::other("the kernel's answer is no answer")),
    }
}
