//! UDP in the emulated network: packets that are lost, late, out of order, twice, damaged; NATs; and an
//! attacker who copies, changes and sends what he saw from addresses of his own.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytes::{Bytes, BytesMut};

use super::world::{Happening, World};
use super::{Mutation, Side};
use crate::limits::UDP_AMPLIFICATION;
use crate::seal::SealError;
use crate::session::{PacketFault, UdpPath, UdpTransmit};

/// The responder's address.
const SERVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 100)), 443);
/// Sockets of the initiator on one link are so far apart.
const LINKS: u64 = 100;
/// Packets that an attacker remembers.
const SEEN_MAX: usize = 12;
/// Addresses of an attacker.
const STRANGERS: u64 = 6;

/// A packet on its way.
#[derive(Clone, Debug)]
pub(super) struct Packet {
    to: Side,
    path: UdpPath,
    from: SocketAddr,
    bytes: Bytes,
    /// As the sender made it, and from its address.
    honest: bool,
    /// An attacker got it at his own address, and hands it on.
    handed_on: bool,
}

fn stranger(number: u64) -> SocketAddr {
    let ip = Ipv4Addr::new(203, 0, 113, 1 + (number % STRANGERS) as u8);
    SocketAddr::from((ip, 6666))
}

fn is_stranger(addr: SocketAddr) -> bool {
    matches!(addr.ip(), IpAddr::V4(ip) if ip.octets()[..3] == [203, 0, 113])
}

impl World<'_> {
    fn address(&self, link: usize) -> SocketAddr {
        let ip = Ipv4Addr::new(198, 51, 100, link as u8);
        SocketAddr::from((ip, self.flows.ports[link]))
    }

    fn socket(&self, link: usize) -> UdpPath {
        UdpPath(self.flows.sockets[link] * LINKS + link as u64)
    }

    /// The initiator has another socket on `link`.
    pub fn new_socket(&mut self, link: usize) {
        let old = self.socket(link);
        self.flows.sockets[link] += 1;
        let (now, new) = (self.now, self.socket(link));
        let Some(plan) = &self.flows.plan else { return };
        let (told, udp) = (plan.links[link].told, plan.udp[Side::Initiator as usize]);
        self.flows.preferred.take_if(|l| *l == link);
        if let Some(session) = self.session(Side::Initiator).filter(|_| udp) {
            session.udp_path_removed(old);
            session.udp_path_added(now, new, &[SERVER], told);
        }
        self.rebind(link);
    }

    /// Packets on `link` come from another address from now on.
    pub fn rebind(&mut self, link: usize) {
        self.flows.ports[link] += 1;
        self.check.tally.rebinds += 1;
    }

    pub fn block(&mut self, link: usize, blocked: bool) {
        if let Some(plan) = &mut self.flows.plan {
            plan.links[link].blocked = blocked;
        }
    }

    /// The driver prefers UDP on the link that it prefers, or wherever the plan sends it.
    pub fn prefer_path(&mut self) {
        let active = self.hosts[Side::Initiator as usize].session.as_ref();
        let active = active.and_then(|s| s.active());
        let link = self.flows.wandered.or(active.and_then(|h| self.link_of(h)));
        let link = link.or(self.flows.preferred).unwrap_or(self.first_link);
        if self.flows.preferred == Some(link) {
            return;
        }
        self.flows.preferred = Some(link);
        self.check.tally.preferences += 1;
        let (now, path) = (self.now, self.socket(link));
        if let Some(session) = self.session(Side::Initiator) {
            session.prefer_udp(now, path);
        }
    }

    /// All is calm: links let everything through that fits.
    pub fn packets_calm(&mut self) {
        let Some(plan) = &mut self.flows.plan else {
            return;
        };
        for link in &mut plan.links {
            (link.loss, link.twice, link.damaged, link.blocked) = (0, 0, 0, false);
        }
        plan.attack = 0;
        self.flows.wandered = None;
        for link in 0..self.links.len() {
            self.new_socket(link);
        }
    }

    /// Whether datagrams go over UDP where they can.
    pub fn udp_is_back(&mut self) -> bool {
        let can = |plan: &super::flow_plan::FlowPlan| plan.udp == [true; 2];
        let usable = |s: &mut crate::session::Session| s.udp_status().is_some_and(|s| s.usable);
        !self.flows.plan.as_ref().is_some_and(can)
            || self.session(Side::Initiator).is_some_and(usable)
    }

    /// `side` sends a packet.
    pub fn packet_leaves(&mut self, side: Side, transmit: UdpTransmit) {
        let UdpTransmit { path, to, packet } = transmit;
        self.check.tally.packets += 1;
        self.check.tally.wire_bytes += packet.len() as u64;
        let link = match side {
            Side::Initiator => (path.0 % LINKS) as usize,
            Side::Responder => match (0..self.links.len()).find(|l| self.address(*l) == to) {
                Some(link) => link,
                None => return self.sent_to_nobody(to, packet),
            },
        };
        let current = side == Side::Responder || self.socket(link) == path;
        let Some(told) = self.flows.plan.as_ref().map(|p| p.links[link].told) else {
            return;
        };
        if side == Side::Initiator && packet.len() + 28 > told {
            return self.fail(format!(
                "a packet of {} bytes on a link with an MTU of {told}",
                packet.len()
            ));
        }
        let swallowed = !current || self.is_swallowed(side, link, packet.len());
        self.trace(|| {
            let (bytes, fate) = (packet.len(), if swallowed { ", in vain" } else { "" });
            format!("{side:?} sends a packet of {bytes} bytes on link {link}{fate}")
        });
        if swallowed {
            return;
        }
        let (path, from) = match side {
            Side::Initiator => (UdpPath(0), self.address(link)),
            Side::Responder => (self.socket(link), SERVER),
        };
        let packet = Packet {
            to: side.other(),
            path,
            from,
            bytes: packet,
            honest: true,
            handed_on: false,
        };
        self.meddle(&packet, link);
        let twice = self.flows.plan.as_ref().map_or(0, |p| p.links[link].twice);
        if self.flow_rng().chance(twice) {
            self.send_packet(packet.clone(), link);
        }
        self.send_packet(packet, link);
    }

    fn is_swallowed(&mut self, side: Side, link: usize, bytes: usize) -> bool {
        let Some(plan) = &self.flows.plan else {
            return true;
        };
        let udp = plan.links[link].clone();
        let found = &self.links[link];
        let closed = !found.up || found.hole[side as usize] || udp.blocked;
        let large = bytes > udp.payload || found.mtu.is_some_and(|mtu| bytes > mtu.max(600));
        let loss = udp.loss.max(found.loss);
        closed || large || self.flow_rng().chance(loss)
    }

    fn send_packet(&mut self, mut packet: Packet, link: usize) {
        let damaged = self
            .flows
            .plan
            .as_ref()
            .map_or(0, |p| p.links[link].damaged);
        if self.flow_rng().chance(damaged) {
            packet = self.damage(packet);
        }
        let (delay, jitter) = (self.links[link].delay, self.links[link].jitter);
        let jitter = jitter.mul_f64(self.flow_rng().below(1000) as f64 / 1000.0);
        self.put_packet(packet, delay + jitter);
    }

    fn put_packet(&mut self, packet: Packet, delay: Duration) {
        let id = self.flows.made;
        self.flows.made += 1;
        self.flows.packets.insert(id, packet);
        self.after(delay, Happening::Packet { id });
    }

    /// A bit is another one, or the end is missing.
    fn damage(&mut self, mut packet: Packet) -> Packet {
        let mut bytes = packet.bytes.to_vec();
        let rng = self.flow_rng();
        let at = rng.below(bytes.len() as u64) as usize;
        if rng.chance(300) {
            bytes.truncate(at);
        } else {
            bytes[at] ^= 1 << rng.below(8);
        }
        packet.bytes = bytes.into();
        packet.honest = false;
        packet
    }

    /// An attacker sees `packet`, and sends what he likes.
    fn meddle(&mut self, packet: &Packet, link: usize) {
        let attack = self.flows.plan.as_ref().map_or(0, |p| p.attack);
        let blind = self.flows.blind && packet.to == Side::Responder;
        if attack == 0 || self.calm || blind {
            return;
        }
        self.flows.seen.push_back(packet.clone());
        if self.flows.seen.len() > SEEN_MAX {
            self.flows.seen.pop_front();
        }
        if !self.flow_rng().chance(attack) {
            return;
        }
        self.check.tally.forged += 1;
        let at = self.flows.seen.len() as u64;
        // The latest one, mostly: a copy that is faster is the best that he can have.
        let chosen = if self.flow_rng().chance(700) {
            at - 1
        } else {
            self.flow_rng().below(at)
        };
        let mut copy = self.flows.seen[chosen as usize].clone();
        copy.honest = false;
        let number = self.flow_rng().draw();
        match self.flow_rng().below(4) {
            0 => copy = self.damage(copy),
            // Back to its sender.
            1 if copy.to == Side::Responder => {
                (copy.to, copy.path, copy.from) = (Side::Initiator, self.socket(link), SERVER);
            }
            1 => (copy.to, copy.path, copy.from) = (Side::Responder, UdpPath(0), stranger(number)),
            _ => copy.from = stranger(number),
        }
        let delay = self.links[link].delay;
        let delay = delay.mul_f64(self.flow_rng().below(2000) as f64 / 1000.0);
        self.put_packet(copy, delay);
    }

    /// The responder sends to an address where the initiator is not (any more).
    fn sent_to_nobody(&mut self, to: SocketAddr, packet: Bytes) {
        if !is_stranger(to) {
            return;
        }
        let (came, went) = self.flows.strangers.entry(to).or_default();
        *went += packet.len() as u64;
        let mut most = *came * UDP_AMPLIFICATION;
        if self.mutation == Some(Mutation::LavishAnswer) {
            most /= 100;
        }
        let (came, went) = (*came, *went);
        if went > most {
            self.fail(format!(
                "the responder sends {went} bytes for {came} that came from {to}"
            ));
        }
        // He hands it on, as if it came from the responder.
        let link = self.flows.preferred.unwrap_or_default();
        if self.flow_rng().chance(500) && !self.calm {
            let copy = Packet {
                to: Side::Initiator,
                path: self.socket(link),
                from: SERVER,
                bytes: packet,
                honest: false,
                handed_on: true,
            };
            let delay = self.links[link].delay;
            self.put_packet(copy, delay);
        }
    }

    /// A packet arrives.
    pub fn packet_arrives(&mut self, id: u64) {
        let Some(packet) = self.flows.packets.remove(&id) else {
            return;
        };
        let Packet {
            to,
            path,
            from,
            bytes,
            honest,
            handed_on,
        } = packet;
        let has_udp = self.flows.plan.as_ref().is_some_and(|p| p.udp[to as usize]);
        // A socket buffer that nobody empties is soon full.
        if self.is_asleep(to) || !has_udp {
            return;
        }
        let link = (path.0 % LINKS) as usize;
        if to == Side::Initiator && self.socket(link) != path {
            return;
        }
        if is_stranger(from) && to == Side::Responder {
            self.flows.strangers.entry(from).or_default().0 += bytes.len() as u64;
        }
        let now = self.now;
        // Whoever got the answer as well, and could send it from his address first, would be a relay on the
        // path, which is what a NAT is.
        self.flows.blind = handed_on;
        let Some(session) = self.session(to) else {
            return;
        };
        let fault = session.handle_udp(now, path, from, BytesMut::from(&bytes[..]));
        let allowed = match fault {
            Ok(()) | Err(PacketFault::Repeated | PacketFault::Closed | PacketFault::Unknown) => {
                true
            }
            Err(PacketFault::Seal(SealError::Retired(_) | SealError::Unexpected(_))) => true,
            Err(PacketFault::Wire(_) | PacketFault::Seal(SealError::NotAuthentic)) => !honest,
        };
        self.trace(|| format!("{to:?} gets a packet of {} bytes: {fault:?}", bytes.len()));
        if !allowed {
            self.fail(format!("{to:?} refuses an honest packet: {fault:?}"));
        }
        self.settle(to);
        self.flows.blind = false;
    }

    /// Nobody but the peer moves the address that the responder sends to.
    pub fn check_address(&mut self) {
        let session = self.hosts[Side::Responder as usize].session.as_ref();
        let Some(status) = session.and_then(|s| s.udp_status()) else {
            return;
        };
        let stolen = self.mutation == Some(Mutation::StolenAddress);
        if is_stranger(status.remote) || stolen {
            self.fail(format!("the responder sends to a stranger: {status:?}"));
        }
    }
}
