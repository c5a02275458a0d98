//! Address ranges that a wide rule never means: the gateway itself, its links, and the services
//! that hand credentials to whoever asks from the right machine.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::LazyLock;

use ipnet::IpNet;

/// A range with its name in messages.
type Range = (IpNet, &'static str);

/// Read once: every dial asks.
static RANGES: LazyLock<Vec<Range>> = LazyLock::new(|| {
    let read = |(range, name): &(&str, &'static str)| Some((range.parse().ok()?, *name));
    WRITTEN.iter().filter_map(read).collect()
});

/// The same as one reads it.
const WRITTEN: &[(&str, &str)] = &[
    // RFC 1122 3.2.1.3: "this host on this network"; Linux connects 0.0.0.0 to itself.
    ("0.0.0.0/8", "unspecified"),
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link-local"),
    ("169.254.169.254/32", "cloud metadata"),
    ("100.100.100.200/32", "cloud metadata"),
    ("168.63.129.16/32", "cloud metadata"),
    ("192.0.0.192/32", "cloud metadata"),
    ("224.0.0.0/4", "multicast"),
    ("255.255.255.255/32", "broadcast"),
    ("::/128", "unspecified"),
    ("::1/128", "loopback"),
    // RFC 4291 2.5.5.1, deprecated: nothing on the internet, yet some stacks map it to IPv4.
    ("::/96", "IPv4-compatible"),
    ("fe80::/10", "link-local"),
    ("ff00::/8", "multicast"),
    ("fd00:ec2::254/128", "cloud metadata"),
    ("fd20:ce::254/128", "cloud metadata"),
];

/// The special ranges that hold `ip`, each with its name. A metadata address may be in two.
pub(super) fn ranges_of(ip: IpAddr) -> impl Iterator<Item = Range> {
    let holds = move |(range, _): &Range| range.contains(&ip);
    RANGES.iter().copied().filter(holds)
}

/// The IPv4 address that an IPv6 address leads to through a translator or a tunnel. It is judged
/// as well, lest `64:ff9b::7f00:1` be a way around the rules for 127.0.0.1. (A v4-mapped address
/// never gets here: it is IPv4 and is made so before anything else.)
///
/// Known forms: NAT64 64:ff9b::/96 (RFC 6052), 6to4 2002::/16 (RFC 3056), Teredo 2001::/32 (the
/// client's address, inverted, RFC 4380) and ISATAP `::[200:]5efe:a.b.c.d` (RFC 5214). The prefix
/// of a NAT64 of one's own network (such as 64:ff9b:1::/48) cannot be known here: name it only in
/// rules for peers that may reach everything behind it.
pub(super) fn embedded_v4(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    let s = ip.segments();
    let v4 = |high: u16, low: u16| Ipv4Addr::from(u32::from(high) << 16 | u32::from(low));
    match s {
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some(v4(high, low)),
        [0x2002, high, low, ..] => Some(v4(high, low)),
        [0x2001, 0, .., high, low] => Some(v4(!high, !low)),
        [.., 0 | 0x200, 0x5efe, high, low] => Some(v4(high, low)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_range_in_the_table_is_one() {
        for (range, name) in WRITTEN {
            let net: IpNet = range.parse().expect(range);
            assert_eq!(net, net.trunc(), "{range}");
            assert!(ranges_of(net.addr()).any(|(_, found)| found == *name));
        }
    }

    #[test]
    fn embedded_addresses_are_found() {
        for (v6, v4) in [
            ("64:ff9b::7f00:1", Some("127.0.0.1")),
            ("2002:a9fe:a9fe::1", Some("169.254.169.254")),
            ("2001:0:1::80ff:fffe", Some("127.0.0.1")),
            ("2001:db8::5efe:a00:1", Some("10.0.0.1")),
            ("2001:db8::200:5efe:a00:1", Some("10.0.0.1")),
            ("2001:db8::1", None),
            ("2606:4700::1111", None),
        ] {
            let found = embedded_v4(v6.parse().unwrap());
            assert_eq!(found, v4.map(|v4| v4.parse().unwrap()), "{v6}");
        }
    }
}
