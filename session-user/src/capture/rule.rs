//! What a capture rule says, and why it does not match.

use std::{fmt, net::SocketAddr, ops::RangeInclusive};

use ipnet::IpNet;
use session_ebpf_common::protocol;

/// Some connections, and what is done with them. Rules stand in an order: the first that matches decides; what none
/// matches goes direct.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptureRule {
    /// Destinations. v4-mapped IPv6 prefixes mean IPv4.
    pub to: Vec<IpNet>,
    /// Names of destinations, in lower case, as patterns; a rule has these or `to`. What the agent answers for them
    /// leads to a reserved range ([`super::reserve`]).
    pub names: Vec<String>,
    /// Destinations inside `to` that this rule is not for (another rule may still be).
    pub except: Vec<IpNet>,
    /// Destination ports; empty means all.
    pub ports: Vec<RangeInclusive<u16>>,
    /// What is carried over IP.
    pub protocols: Protocols,
    /// Real user ids of the process that connects, in the initial user namespace; empty means all.
    pub uids: Vec<RangeInclusive<u32>>,
    /// What is done.
    pub action: Action,
}

/// What is done with what a rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It goes through a peer.
    Capture {
        /// Index of the peer that carries the connections, handed back with each of them.
        peer: u32,
        /// Refuse connections while the agent cannot take them, instead of letting them go direct.
        fail_closed: bool,
        /// Let connections succeed before their targets have answered, and their data go out with OPEN.
        early: bool,
    },
    /// It goes as if there were no agent.
    Direct,
    /// It fails with ECONNREFUSED: `connect()`, and on a UDP socket `sendto()`.
    Refuse,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Capture { .. } => "capture",
            Self::Direct => "direct",
            Self::Refuse => "refuse",
        })
    }
}

/// Protocols that a rule is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocols {
    /// TCP and UDP.
    #[default]
    Both,
    /// TCP alone.
    Tcp,
    /// UDP alone.
    Udp,
}

impl Protocols {
    /// Bits of `session_ebpf_common::protocol`.
    pub(super) fn bits(self) -> u8 {
        match self {
            Self::Both => protocol::TCP | protocol::UDP,
            Self::Tcp => protocol::TCP,
            Self::Udp => protocol::UDP,
        }
    }
}

/// One protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// Its bit of `session_ebpf_common::protocol`.
    pub(super) fn bit(self) -> u8 {
        match self {
            Self::Tcp => protocol::TCP,
            Self::Udp => protocol::UDP,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A connection, or a UDP conversation, that rules are asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// Where it wants to go.
    pub to: SocketAddr,
    /// Real user id of who connects.
    pub uid: u32,
    /// Over what.
    pub protocol: Protocol,
}

impl CaptureRule {
    /// A rule that captures everything that goes to `to`, which is still empty, for `peer`.
    pub fn capture(peer: u32) -> Self {
        Self {
            to: Vec::new(),
            names: Vec::new(),
            except: Vec::new(),
            ports: Vec::new(),
            protocols: Protocols::Both,
            uids: Vec::new(),
            action: Action::Capture {
                peer,
                fail_closed: false,
                early: false,
            },
        }
    }

    /// Whether it refuses what the agent cannot take, which must outlive the agent.
    pub fn is_fail_closed(&self) -> bool {
        let Action::Capture { fail_closed, .. } = self.action else {
            return false;
        };
        fail_closed
    }

    /// Whether it holds for a port and a protocol.
    pub fn holds(&self, port: u16, protocol: Protocol) -> bool {
        let ports = self.ports.is_empty() || self.ports.iter().any(|range| range.contains(&port));
        ports && self.protocols.bits() & protocol.bit() != 0
    }

    /// Whether it holds for a destination, whoever speaks to it.
    pub(super) fn covers(&self, to: SocketAddr, protocol: Protocol) -> bool {
        let ip = to.ip().to_canonical();
        let inside = |net: &IpNet| super::policy::normal(*net).contains(&ip);
        self.names.is_empty()
            && self.holds(to.port(), protocol)
            && self.to.iter().any(inside)
            && !self.except.iter().any(inside)
    }

    /// Whether it matches every connection to its destinations.
    pub(super) fn takes_all(&self) -> bool {
        self.ports.is_empty() && self.uids.is_empty() && self.protocols == Protocols::Both
    }

    /// Why it does not match, in words; `None` if it does.
    pub fn mismatch(&self, question: &Question) -> Option<String> {
        let (ip, port) = (question.to.ip().to_canonical(), question.to.port());
        let inside = |net: &&IpNet| super::policy::normal(**net).contains(&ip);
        if self.protocols.bits() & question.protocol.bit() == 0 {
            let other = match question.protocol {
                Protocol::Tcp => "udp",
                Protocol::Udp => "tcp",
            };
            return Some(format!("it is for {other} alone"));
        }
        if !self.names.is_empty() {
            return Some(format!("it is for names: {}", strings(&self.names)));
        }
        if !self.to.iter().any(|net| inside(&net)) {
            return Some(format!("{ip} is not in {}", list(&self.to)));
        }
        if let Some(net) = self.except.iter().find(inside) {
            return Some(format!("{ip} is excepted by {net}"));
        }
        if !self.ports.is_empty() && !self.ports.iter().any(|range| range.contains(&port)) {
            return Some(format!("port {port} is not in {}", ranges(&self.ports)));
        }
        if !self.uids.is_empty() && !self.uids.iter().any(|range| range.contains(&question.uid)) {
            let uid = question.uid;
            return Some(format!("uid {uid} is not in {}", ranges(&self.uids)));
        }
        None
    }
}

/// What it says, as it would be typed, in one line.
impl fmt::Display for CaptureRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.names.is_empty() {
            write!(f, "{} to {}", self.action, list(&self.to))?;
        } else {
            write!(f, "{} names {}", self.action, strings(&self.names))?;
        }
        if !self.except.is_empty() {
            write!(f, " except {}", list(&self.except))?;
        }
        if !self.ports.is_empty() {
            write!(f, " ports {}", ranges(&self.ports))?;
        }
        match self.protocols {
            Protocols::Both => {}
            Protocols::Tcp => f.write_str(" protocol tcp")?,
            Protocols::Udp => f.write_str(" protocol udp")?,
        }
        if !self.uids.is_empty() {
            write!(f, " uids {}", ranges(&self.uids))?;
        }
        Ok(())
    }
}

/// Networks that are named in a line; rules may have thousands.
const NAMED_MAX: usize = 4;

fn list(nets: &[IpNet]) -> String {
    some(nets.iter().map(IpNet::to_string), nets.len())
}

fn strings(texts: &[String]) -> String {
    some(texts.iter().cloned(), texts.len())
}

fn ranges<T: PartialEq + fmt::Display>(ranges: &[RangeInclusive<T>]) -> String {
    let one = |range: &RangeInclusive<T>| {
        if range.start() == range.end() {
            range.start().to_string()
        } else {
            format!("{}-{}", range.start(), range.end())
        }
    };
    some(ranges.iter().map(one), ranges.len())
}

fn some(items: impl Iterator<Item = String>, count: usize) -> String {
    let mut text = items.take(NAMED_MAX).collect::<Vec<_>>().join(", ");
    if count > NAMED_MAX {
        text.push_str(&format!(" and {} more", count - NAMED_MAX));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(to: &str, uid: u32, protocol: Protocol) -> Question {
        Question {
            to: to.parse().unwrap(),
            uid,
            protocol,
        }
    }

    #[test]
    fn a_mismatch_says_what_does_not_fit() {
        let rule = CaptureRule {
            to: vec!["10.0.0.0/8".parse().unwrap()],
            except: vec!["10.1.0.0/16".parse().unwrap()],
            ports: vec![22..=22, 8000..=8999],
            protocols: Protocols::Tcp,
            uids: vec![1000..=1999],
            ..CaptureRule::capture(1)
        };
        let why = |to: &str, uid| rule.mismatch(&question(to, uid, Protocol::Tcp));
        assert_eq!(why("10.2.0.1:8080", 1000), None);
        assert_eq!(why("[::ffff:10.2.0.1]:22", 1000), None);
        for (to, uid, expected) in [
            ("192.0.2.1:22", 1000, "192.0.2.1 is not in 10.0.0.0/8"),
            ("10.1.2.3:22", 1000, "10.1.2.3 is excepted by 10.1.0.0/16"),
            ("10.2.0.1:80", 1000, "port 80 is not in 22, 8000-8999"),
            ("10.2.0.1:22", 0, "uid 0 is not in 1000-1999"),
        ] {
            assert_eq!(why(to, uid).as_deref(), Some(expected));
        }
        let udp = rule.mismatch(&question("10.2.0.1:22", 1000, Protocol::Udp));
        assert_eq!(udp.as_deref(), Some("it is for tcp alone"));
        assert_eq!(
            rule.to_string(),
            "capture to 10.0.0.0/8 except 10.1.0.0/16 ports 22, 8000-8999 protocol tcp uids 1000-1999"
        );
    }

    #[test]
    fn long_lists_are_cut() {
        let net = |n: u8| format!("10.{n}.0.0/16").parse().unwrap();
        let rule = CaptureRule {
            to: (0..9).map(net).collect(),
            ..CaptureRule::capture(1)
        };
        let text = rule.to_string();
        assert!(text.ends_with("10.3.0.0/16 and 5 more"), "{text}");
    }
}
