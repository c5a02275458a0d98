//! Who may reach what. The default is nothing.
//!
//! A rule names peers and what they may reach:
//!
//! | written | means |
//! |---|---|
//! | `10.0.0.0/8:80` | addresses of the range, port 80 |
//! | `198.51.100.7:*` | one address, any port |
//! | `[2001:db8::]/32:443`, `[2001:db8::/32]:443` | an IPv6 range |
//! | `10.0.0.0/8:8000-8999` | a range of ports |
//! | `db.internal:5432` | the target asked for by this name |
//! | `*.corp.example:443` | by any name that ends so (not `corp.example` itself) |
//! | `10.0.0.0/8:53/udp` | as above, by UDP alone; `/tcp`: by TCP alone; without either: by both |
//!
//! Two checks that wide rules invite one to forget:
//!
//! - *Special ranges* (loopback, link-local, unspecified, multicast, broadcast, cloud metadata)
//!   are reached only through a rule whose own range lies inside of each such range that holds
//!   the address: `127.0.0.0/8:5432` opens loopback, `0.0.0.0/0:*` does not, and 169.254.169.254,
//!   which is link-local and metadata, takes a rule for exactly that address.
//! - *Names are judged twice*, by the name and by the address it resolved to. A rule for the name
//!   admits the address unless it is special (else whoever owns the name's zone could aim it at
//!   the gateway: DNS rebinding); a rule for the address admits it whatever the name. A name is
//!   not even resolved for a peer that no rule could admit.
//!
//! A v4-mapped IPv6 address is IPv4. An address that embeds an IPv4 address (NAT64, 6to4, Teredo,
//! ISATAP) needs a rule of its own as IPv6, and if the embedded one is special, one for that too.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnet::IpNet;
use session_proto::wire::Target;

use super::special::{embedded_v4, ranges_of};
use crate::glob;

/// A rule as the operator wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowRule {
    /// The peer's name, or a pattern (`*`, `?`) for it.
    pub peer: String,
    /// What it may reach, each as in the table above.
    pub to: Vec<String>,
}

/// A rule that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` in the rule for peer `{peer}`: {problem}")]
pub struct RuleError {
    /// The rule's peer.
    pub peer: String,
    /// The entry at fault.
    pub text: String,
    /// What is wrong and what was expected.
    pub problem: String,
}

/// Why something is not allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WhyDenied {
    /// No rule is for this peer.
    #[error("no rule of [[accept.allow]] is for this peer")]
    NoRuleForPeer,
    /// The peer has rules, but none covers the target.
    #[error("none of the peer's rules covers it")]
    NotCovered,
    /// A special range without a rule of its own.
    #[error("{ip} is in the {name} range {range}, which only a rule inside that range opens")]
    Special {
        /// The address at fault; for an embedded one, the IPv4 address.
        ip: IpAddr,
        /// The range.
        range: IpNet,
        /// What the range is for.
        name: &'static str,
    },
}

/// A refusal, fit for the log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("EACCES: peer `{peer}` may not reach {target}: {why}")]
pub struct Denied {
    /// Who asked.
    pub peer: String,
    /// For what.
    pub target: String,
    /// Why not.
    pub why: WhyDenied,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Host {
    Net(IpNet),
    /// A pattern in lower case, without a final dot.
    Name(String),
}

/// How a target is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// By a stream.
    Tcp,
    /// By a flow.
    Udp,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    host: Host,
    ports: RangeInclusive<u16>,
    /// None: either.
    protocol: Option<Protocol>,
}

/// A port of some protocol.
type Service = (Protocol, u16);

/// All rules, ready to be asked.
#[derive(Debug, Clone, Default)]
pub struct AllowList {
    rules: Vec<(String, Vec<Entry>)>,
    /// Targets that take a header of the PROXY protocol.
    proxied: Vec<Entry>,
}

impl AllowList {
    /// Reads the rules; the error names the entry and what was expected of it.
    pub fn parse(rules: &[AllowRule]) -> Result<AllowList, RuleError> {
        let parse_rule = |rule: &AllowRule| {
            let entries = rule.to.iter().map(|text| {
                parse_entry(text).map_err(|problem| RuleError {
                    peer: rule.peer.clone(),
                    text: text.clone(),
                    problem,
                })
            });
            Ok((rule.peer.clone(), entries.collect::<Result<_, _>>()?))
        };
        let rules = rules.iter().map(parse_rule).collect::<Result<_, _>>()?;
        Ok(AllowList {
            rules,
            proxied: Vec::new(),
        })
    }

    /// Whether `peer` may reach `target` by `protocol`; `resolved` and `port` are the address really dialled.
    pub fn check(
        &self,
        peer: &str,
        protocol: Protocol,
        target: &Target,
        resolved: IpAddr,
        port: u16,
    ) -> Result<(), Denied> {
        let resolved = resolved.to_canonical();
        let service = (protocol, port);
        let denied = |why| {
            Err(Denied {
                peer: peer.to_owned(),
                target: match target {
                    Target::Addr(_) => target.to_string(),
                    Target::Name(..) => format!("{target} (resolved to {resolved})"),
                },
                why,
            })
        };
        if !self.knows(peer) {
            return denied(WhyDenied::NoRuleForPeer);
        }
        if let Some((ip, range, name)) = self.closed_range(peer, resolved, service) {
            return denied(WhyDenied::Special { ip, range, name });
        }
        let by_address = self.any_net(peer, service, |net| net.contains(&resolved));
        let by_name =
            matches!(target, Target::Name(name, _) if self.allows_name(peer, name, service));
        if by_address || by_name {
            Ok(())
        } else {
            denied(WhyDenied::NotCovered)
        }
    }

    /// Whether any answer to resolving `name` could be allowed: a rule covers the name, or one
    /// for addresses covers the port. If not, resolving would only tell the peer what is there.
    pub fn check_before_resolving(
        &self,
        peer: &str,
        protocol: Protocol,
        name: &str,
        port: u16,
    ) -> Result<(), Denied> {
        let service = (protocol, port);
        let denied = |why| {
            Err(Denied {
                peer: peer.to_owned(),
                target: Target::Name(name.to_owned(), port).to_string(),
                why,
            })
        };
        if !self.knows(peer) {
            denied(WhyDenied::NoRuleForPeer)
        } else if self.allows_name(peer, name, service) || self.any_net(peer, service, |_| true) {
            Ok(())
        } else {
            denied(WhyDenied::NotCovered)
        }
    }

    /// The same rules, and which targets are told by the PROXY protocol for whom they are dialled: each
    /// as in a rule's `to`.
    pub fn with_proxy_headers(mut self, to: &[String]) -> Result<AllowList, RuleError> {
        let rule = AllowRule {
            peer: "*".to_owned(),
            to: to.to_vec(),
        };
        self.proxied = AllowList::parse(&[rule])?
            .rules
            .pop()
            .map_or(Vec::new(), |(_, to)| to);
        Ok(self)
    }

    /// Whether a target is told by the PROXY protocol for whom it is dialled.
    pub fn wants_proxy_header(&self, ip: IpAddr, port: u16) -> bool {
        (self.proxied.iter()).any(|entry| {
            entry.ports.contains(&port)
                && matches!(&entry.host, Host::Net(net) if net.contains(&ip.to_canonical()))
        })
    }

    fn knows(&self, peer: &str) -> bool {
        (self.rules.iter()).any(|(pattern, _)| glob::matches(pattern, peer))
    }

    fn entries(&self, peer: &str, (protocol, port): Service) -> impl Iterator<Item = &Entry> {
        (self.rules.iter())
            .filter(move |(pattern, _)| glob::matches(pattern, peer))
            .flat_map(|(_, entries)| entries)
            .filter(move |e| e.ports.contains(&port) && e.protocol.is_none_or(|p| p == protocol))
    }

    fn any_net(&self, peer: &str, service: Service, fits: impl Fn(&IpNet) -> bool) -> bool {
        self.entries(peer, service)
            .any(|entry| matches!(&entry.host, Host::Net(net) if fits(net)))
    }

    fn allows_name(&self, peer: &str, name: &str, service: Service) -> bool {
        let name = plain_name(name);
        self.entries(peer, service).any(
            |entry| matches!(&entry.host, Host::Name(pattern) if glob::matches(pattern, &name)),
        )
    }

    /// A special range that holds the address (or the one embedded in it) and that no rule opens.
    fn closed_range(
        &self,
        peer: &str,
        ip: IpAddr,
        service: Service,
    ) -> Option<(IpAddr, IpNet, &'static str)> {
        let embedded = match ip {
            IpAddr::V6(v6) => embedded_v4(v6).map(IpAddr::V4),
            IpAddr::V4(_) => None,
        };
        for ip in [Some(ip), embedded].into_iter().flatten() {
            for (range, name) in ranges_of(ip) {
                let opens = |net: &IpNet| range.contains(net) && net.contains(&ip);
                if !self.any_net(peer, service, opens) {
                    return Some((ip, range, name));
                }
            }
        }
        None
    }
}

/// Names are compared in lower case and without the final dot of an absolute name.
fn plain_name(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

fn parse_entry(text: &str) -> Result<Entry, String> {
    let (host, ports) = text
        .rsplit_once(':')
        .ok_or("a port is missing; expected HOST:PORT, HOST:FIRST-LAST or HOST:* (any port)")?;
    let (ports, protocol) = match ports.split_once('/') {
        None => (ports, None),
        Some((ports, "tcp")) => (ports, Some(Protocol::Tcp)),
        Some((ports, "udp")) => (ports, Some(Protocol::Udp)),
        Some((_, other)) => {
            return Err(format!(
                "`{other}` is neither tcp nor udp; left out, it means both"
            ));
        }
    };
    Ok(Entry {
        host: parse_host(host)?,
        ports: parse_ports(ports)?,
        protocol,
    })
}

fn parse_ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    if text == "*" {
        return Ok(1..=u16::MAX);
    }
    let port = |text: &str| match text.parse::<u16>() {
        // `parse` alone would take "+80".
        Ok(port) if port > 0 && text.bytes().all(|b| b.is_ascii_digit()) => Ok(port),
        _ => Err(format!(
            "`{text}` is not a port; expected 1 to 65535, FIRST-LAST or * (any port)"
        )),
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (port(first)?, port(last)?);
    if first > last {
        return Err(format!(
            "the range of ports ends before it begins: {first}-{last}"
        ));
    }
    Ok(first..=last)
}

fn parse_host(text: &str) -> Result<Host, String> {
    if let Some(rest) = text.strip_prefix('[') {
        let net = rest.replacen(']', "", 1);
        if rest.contains(']') && net.contains(':') {
            return parse_net(&net);
        }
        return Err("expected an IPv6 address in brackets, such as [2001:db8::]/32".to_owned());
    }
    if text.contains(':') {
        return Err(format!(
            "an IPv6 address is written in brackets, such as [{text}]:443"
        ));
    }
    let numeric = |b: u8| b.is_ascii_digit() || b == b'.' || b == b'/';
    if text.contains('/') || (!text.is_empty() && text.bytes().all(numeric)) {
        return parse_net(text);
    }
    let name = plain_name(text);
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"-_.*?".contains(&b);
    if name.is_empty() || name.len() > 253 || !name.bytes().all(fits) || name.contains("..") {
        return Err(
            "expected an address, a range such as 10.0.0.0/8, or a host name (ASCII; an \
             international name in its xn-- form)"
                .to_owned(),
        );
    }
    Ok(Host::Name(name))
}

fn parse_net(text: &str) -> Result<Host, String> {
    let net = match text.parse::<IpAddr>() {
        Ok(ip) => Ok(IpNet::from(ip)),
        Err(_) => text.parse::<IpNet>(),
    };
    let net = net.map_err(|_| {
        format!("`{text}` is neither an address nor a range such as 10.0.0.0/8 or [2001:db8::]/32")
    })?;
    if net != net.trunc() {
        return Err(format!(
            "`{net}` has bits behind its prefix; did you mean {} or {}?",
            net.trunc(),
            IpNet::from(net.addr()),
        ));
    }
    if let IpNet::V6(v6) = net {
        let mapped = Ipv6Addr::from(u128::from(Ipv4Addr::UNSPECIFIED.to_ipv6_mapped()));
        if v6.prefix_len() >= 96 && ipnet::Ipv6Net::new_assert(mapped, 96).contains(&v6) {
            return Err("a v4-mapped range is judged as IPv4; write it as IPv4".to_owned());
        }
    }
    Ok(Host::Net(net))
}

impl fmt::Display for AllowRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.peer, self.to.join(", "))
    }
}

#[cfg(test)]
mod tests;
