//! `[dns]`: how questions about names are answered.

use std::net::SocketAddr;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::sections::{address, network};
use super::source::Source;
use super::{DEFAULT_STATE, Dns, Result, duration, raw};
use crate::capture::DNS_PORT;

/// The range for benchmarks (RFC 2544, 198.18.0.0/15), which nobody uses in networks that carry anything.
const RANGE4: (std::net::Ipv4Addr, u8) = (std::net::Ipv4Addr::new(198, 18, 0, 0), 15);
/// Hosts in a range, as a power of two: fewer would soon be used up.
const HOST_BITS_MIN: u8 = 8;
/// Longest time that an answer may be remembered.
const TTL_MAX: Duration = Duration::from_secs(3600);

pub(super) fn dns(source: &Source<'_>, raw: &raw::Dns) -> Result<Dns> {
    let default4 = Ipv4Net::new_assert(RANGE4.0, RANGE4.1);
    let listen = source.all("dns.listen", &raw.listen, |text| match address(text)? {
        // Answers must come from the address that was asked.
        any if any.ip().is_unspecified() => Err(format!(
            "`{text}` is no address of this host: name those at which to answer, one by one"
        )),
        at => Ok(at),
    })?;
    if let (Some(from), true) = (raw.from.first(), listen.is_empty()) {
        let what = "it says who may ask at `listen`, which is not given";
        return Err(source.error(&from.span(), "dns.from", what));
    }
    let ttl = |text: &str| match duration(text)? {
        ttl if ttl <= TTL_MAX && ttl.as_secs() > 0 => Ok(ttl),
        _ => Err(format!("`{text}` is not between 1s and 1h")),
    };
    Ok(Dns {
        listen,
        from: source.all("dns.from", &raw.from, network)?,
        upstream: source.all("dns.upstream", &raw.upstream, resolver)?,
        range4: source.or("dns.range4", raw.range4.as_ref(), default4, range4)?,
        range6: source.or("dns.range6", raw.range6.as_ref(), None, |text| {
            range6(text).map(Some)
        })?,
        ttl: source.or("dns.ttl", raw.ttl.as_ref(), Duration::from_secs(60), ttl)?,
        state: raw.state.clone().unwrap_or_else(|| DEFAULT_STATE.into()),
    })
}

/// An address, with or without a port.
fn resolver(text: &str) -> std::result::Result<SocketAddr, String> {
    match text.parse() {
        Ok(ip) => Ok(SocketAddr::new(ip, DNS_PORT)),
        Err(_) => address(text),
    }
}

fn range4(text: &str) -> std::result::Result<Ipv4Net, String> {
    let wrong = || {
        format!(
            "`{text}` is not a network of IPv4 that can be reserved, such as \"198.18.0.0/15\": at least a /24, and \
             neither loopback nor multicast"
        )
    };
    let IpNet::V4(net) = network(text)?.trunc() else {
        return Err(wrong());
    };
    let first = net.addr();
    let usable = !(first.is_loopback() || first.is_multicast() || first.is_unspecified());
    let large = (8..=32 - HOST_BITS_MIN).contains(&net.prefix_len());
    (usable && large).then_some(net).ok_or_else(wrong)
}

fn range6(text: &str) -> std::result::Result<Ipv6Net, String> {
    let wrong = || {
        format!(
            "`{text}` is not a network of IPv6 that can be reserved, such as \"fd5b:1f4e:9c02::/64\": /32 to /120, and \
             neither of one link nor multicast"
        )
    };
    let IpNet::V6(net) = network(text)?.trunc() else {
        return Err(wrong());
    };
    let first = net.addr();
    let usable = !(first.is_unicast_link_local() || first.is_multicast() || first.is_unspecified());
    let large = (32..=128 - HOST_BITS_MIN).contains(&net.prefix_len());
    (usable && large && first.to_ipv4_mapped().is_none())
        .then_some(net)
        .ok_or_else(wrong)
}
