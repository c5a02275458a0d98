//! What a connection of this host would have without capture.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::capture::Native;
use crate::link::{LinkKind, LinkSnapshot};

/// Addresses of documentation (RFC 5737, RFC 3849): only default routes, or none, lead there.
const ELSEWHERE4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const ELSEWHERE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// Source address and MTU of what the default routes carry, as the kernel would choose them: over the usable link whose
/// route has the lowest metric.
pub(super) fn native(links: &LinkSnapshot) -> Native {
    let towards = |elsewhere: IpAddr| {
        let routes = links.links.iter().filter_map(|link| {
            let metric = link.route_to(elsewhere)?.metric;
            let source = link.usable_for(elsewhere).ok()?;
            (link.kind != LinkKind::Loopback).then_some((metric, source, link.mtu))
        });
        routes.min_by_key(|(metric, ..)| *metric)
    };
    let v4 = towards(ELSEWHERE4.into()).and_then(|(_, source, mtu)| match source {
        IpAddr::V4(ip) => Some((ip, mtu)),
        IpAddr::V6(_) => None,
    });
    let v6 = towards(ELSEWHERE6.into()).and_then(|(_, source, mtu)| match source {
        IpAddr::V6(ip) => Some((ip, mtu)),
        IpAddr::V4(_) => None,
    });
    let name = |link: &crate::link::Link| (link.index, link.name.clone());
    Native {
        v4,
        v6,
        links: links.links.iter().map(name).collect(),
    }
}
