//! The one route that capture adds: what makes the addresses that stand for IPv6 destinations this host's own.
//!
//! `local fde6:b481:678d:568e::/64 dev lo`, in the kernel's own table of local addresses. It is there only while a rule
//! captures UDP over IPv6, in each network namespace where the agent is. IPv4 needs none, for all of 127.0.0.0/8 is local
//! from the start.

use std::io;
use std::net::Ipv6Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use session_ebpf_common::UDP_PREFIX6;

use super::orphans::Orphans;
use super::tables::Tables;

/// Index of the loopback device (`LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;
const PREFIX_BITS: u8 = 64;
/// `RT_TABLE_LOCAL` of linux/rtnetlink.h.
const LOCAL_TABLE: u8 = 255;

/// Whether a route that is to go is another's by now, and stays.
#[derive(Clone, Debug, Default)]
pub struct Heir(Arc<Mutex<bool>>);

impl Heir {
    /// It stays. If it has gone already, whoever it is to stay for adds it again.
    pub fn take_over(&self) {
        *self.locked() = true;
    }

    /// Whether the route has not gone yet.
    pub fn is_awaited(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    fn locked(&self) -> MutexGuard<'_, bool> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The route of one network namespace, and what changes it from wherever that is done. Dropped, it takes the route along.
#[derive(Debug)]
pub struct AnyIp {
    netlink: Socket,
    orphans: Orphans,
    requests: u32,
    there: bool,
    heir: Heir,
}

impl AnyIp {
    /// For the network namespace that this thread is in, which `tables` are of. Changes nothing yet.
    pub fn open(tables: Arc<Tables>) -> io::Result<Self> {
        let mut netlink = Socket::new(NETLINK_ROUTE)?;
        netlink.bind_auto()?;
        netlink.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            netlink,
            orphans: Orphans::open(tables),
            requests: 0,
            there: false,
            heir: Heir::default(),
        })
    }

    /// What keeps it when this is dropped.
    pub fn heir(&self) -> Heir {
        self.heir.clone()
    }

    /// Whether it has been added.
    pub fn is_there(&self) -> bool {
        self.there
    }

    /// Adds it; one that an agent which was killed has left is taken over. The answer comes at once, from the kernel
    /// itself.
    pub fn add(&mut self) -> io::Result<()> {
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        self.ask(RouteNetlinkMessage::NewRoute(route()), flags)?;
        self.there = true;
        Ok(())
    }

    /// Removes it, also one that an agent which was killed has left; not before the sockets that are connected into its
    /// prefix have been ended, for what they send would leave this host as it is. If they cannot be, the route stays.
    pub fn remove(&mut self) -> io::Result<()> {
        let heir = self.heir.clone();
        let ours = !*heir.locked();
        if ours {
            self.orphans.end()?;
        }
        // Looking for them may have taken long. Nobody takes the route over while it goes.
        let taken_over = heir.locked();
        if !*taken_over {
            self.delete()?;
        }
        self.there = false;
        Ok(())
    }

    fn delete(&mut self) -> io::Result<()> {
        match self.ask(RouteNetlinkMessage::DelRoute(route()), 0) {
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

    /// Sends one request and waits for what the kernel says.
    fn ask(&mut self, request: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.requests = self.requests.wrapping_add(1);
        let mut message = NetlinkMessage::from(request);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        message.header.sequence_number = self.requests;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.netlink.send(&bytes, 0)?;
        loop {
            let (answer, _) = self.netlink.recv_from_full()?;
            let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer);
            let answer = answer.map_err(io::Error::other)?;
            // What an earlier request was answered may be here still, if nobody has waited for it.
            if answer.header.sequence_number != self.requests {
                continue;
            }
            return match answer.payload {
                NetlinkPayload::Error(error) if error.code.is_none() => Ok(()),
                NetlinkPayload::Error(error) => Err(error.to_io()),
                _ => Err(io::Error::other("the kernel's answer is no answer")),
            };
        }
    }
}

impl Drop for AnyIp {
    fn drop(&mut self) {
        if self.there
            && let Err(error) = self.remove()
        {
            tracing::warn!(%error, prefix = %prefix(), "the route of captured IPv6 datagrams stays");
        }
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
