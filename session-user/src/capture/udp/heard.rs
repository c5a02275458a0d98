//! What a socket that is not connected hears of those whom it has not spoken to.
//!
//! Their datagrams come with a flow of the socket, and say who sent them. The application is to see that, so the sender
//! gets an id as a destination has one, and the datagram goes out from the id's address: only the task that has the ids
//! can do it. What the application then says to the sender is a flow like any other.
//!
//! Whoever speaks from ever new addresses gets no more than a part of the ids, and all that speak to one socket fewer still.
//!
//! A peer speaks for those alone that the rules lead to through it: an application is not made to believe that a host
//! of its own network has sent what came from the peer.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock, Weak};

use bytes::Bytes;
use session_ebpf_common::{Destination, UDP_IDS_MAX, id_of, is_for_many, is_local, is_of_one_link};
use session_proto::wire::Dscp;
use tokio::sync::mpsc;

use super::super::gate::words;
use super::super::rule::{Action, CaptureRule, Protocol};
use super::socket::Door;
use crate::requests::FlowQueue;

/// Such datagrams that wait for the task that has the ids, at most.
pub const WAITING_MAX: usize = 128;

/// Ids of those who were heard and are not spoken to, at once: whoever speaks to applications from ever new addresses is
/// to leave most for their own destinations ([`UDP_IDS_MAX`]).
const IDS_MAX: usize = UDP_IDS_MAX as usize / 8;
/// Those of one socket.
const IDS_EACH: usize = 256;

/// A datagram of somebody whom the application has not spoken to.
pub struct Stranger {
    /// The application's socket.
    pub socket: Arc<AppSocket>,
    /// The queue of the peer that it came through.
    pub queue: Arc<FlowQueue>,
    /// A destination of the socket.
    pub like: Destination,
    /// Who sent it.
    pub source: SocketAddr,
    /// What.
    pub data: Bytes,
    /// With which service.
    pub dscp: Dscp,
}

/// A socket of an application that is not connected, as long as any flow of it lasts.
#[derive(Debug)]
pub struct AppSocket {
    /// Tells it from all others of this process.
    pub group: u64,
    /// The socket of ours that it speaks to; gone when the agent has left the network namespace, which a socket would
    /// keep alive.
    pub door: Weak<Door>,
    /// Its address and port.
    pub addr: SocketAddr,
}

/// Where a flow of such a socket hands on what others than its target have sent.
pub struct Ear {
    /// The socket.
    pub socket: Arc<AppSocket>,
    /// See [`Stranger`].
    pub queue: Arc<FlowQueue>,
    /// The flow's destination.
    pub like: Destination,
    /// To the task that has the ids.
    pub strangers: mpsc::Sender<Stranger>,
}

impl Ear {
    /// Takes a datagram of `source`; false if it cannot be heard.
    pub fn hear(&self, source: SocketAddr, data: &[u8], dscp: Dscp) -> bool {
        let source = SocketAddr::new(source.ip().to_canonical(), source.port());
        // A socket of ours is for one family.
        if source.is_ipv4() != self.socket.addr.is_ipv4() {
            return false;
        }
        let stranger = Stranger {
            socket: Arc::clone(&self.socket),
            queue: Arc::clone(&self.queue),
            like: self.like,
            source,
            data: Bytes::copy_from_slice(data),
            dscp,
        };
        self.strangers.try_send(stranger).is_ok()
    }
}

/// The rules of capture as they are now.
#[derive(Debug, Default)]
pub struct Rules(RwLock<Vec<CaptureRule>>);

impl Rules {
    /// They are others from now on.
    pub fn set(&self, rules: &[CaptureRule]) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = rules.to_vec();
    }

    /// The peer through which an application speaks to `addr`, if it does so through any. Rules for some users count as
    /// rules for all: whose the socket is, is not known here, and where it matters nothing is heard rather than too much.
    pub fn peer_of(&self, addr: SocketAddr) -> Option<u32> {
        let known = words(addr.ip());
        let ours = is_local(&known) || id_of(&known).is_some();
        if addr.port() == 0 || ours || is_of_one_link(&known) || is_for_many(&known) {
            return None;
        }
        let rules = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let first = rules.iter().find(|rule| rule.covers(addr, Protocol::Udp));
        match first?.action {
            Action::Capture { peer, .. } => Some(peer),
            Action::Direct | Action::Refuse => None,
        }
    }
}

/// The ids that were given to those who are heard.
#[derive(Debug, Default)]
pub struct HeardIds {
    /// Each with the group of the socket that has heard first of whom it stands for.
    groups: HashMap<u32, u64>,
    /// How many there are of each group.
    counts: HashMap<u64, usize>,
    turned_away: bool,
}

impl HeardIds {
    /// Whether a socket may have one more.
    pub fn admits(&mut self, group: u64) -> bool {
        let of_group = self.counts.get(&group).copied().unwrap_or(0);
        let room = self.groups.len() < IDS_MAX && of_group < IDS_EACH;
        self.turned_away |= !room;
        room
    }

    /// Whether there was one without room since ids were last collected.
    pub fn has_turned_away(&self) -> bool {
        self.turned_away
    }

    /// All.
    pub fn ids(&self) -> Vec<u32> {
        self.groups.keys().copied().collect()
    }

    /// A socket of `group` has heard somebody new.
    pub fn insert(&mut self, id: u32, group: u64) {
        self.groups.insert(id, group);
        *self.counts.entry(group).or_default() += 1;
    }

    /// It is not one of them any more, if it was.
    pub fn remove(&mut self, id: u32) {
        let Some(group) = self.groups.remove(&id) else {
            return;
        };
        if let Entry::Occupied(mut count) = self.counts.entry(group) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }

    /// Idle ids were looked for, and these given up.
    pub fn collected(&mut self, given_up: &[u32]) {
        for id in given_up {
            self.remove(*id);
        }
        self.turned_away = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_those_who_are_heard_are_few() {
        let mut heard = HeardIds::default();
        let mut next = 0;
        let mut fill = |heard: &mut HeardIds, group| {
            let before = next;
            while heard.admits(group) {
                heard.insert(next, group);
                next += 1;
            }
            (next - before) as usize
        };
        assert!(!heard.has_turned_away());
        assert_eq!(fill(&mut heard, 1), IDS_EACH);
        assert!(heard.has_turned_away());
        let others: usize = (2..100).map(|group| fill(&mut heard, group)).sum();
        assert_eq!(others + IDS_EACH, IDS_MAX);
        // One is spoken to, two are idle.
        heard.remove(0);
        heard.remove(0);
        heard.collected(&[1, 2, u32::MAX]);
        assert!(!heard.has_turned_away());
        assert_eq!(fill(&mut heard, 1), 3);
        let all = heard.ids();
        heard.collected(&all);
        assert!(heard.groups.is_empty() && heard.counts.is_empty());
    }
    use crate::capture::rule::Protocols;

    fn rule(to: &str, action: Action) -> CaptureRule {
        CaptureRule {
            to: vec![to.parse().unwrap()],
            action,
            ..CaptureRule::capture(0)
        }
    }

    #[test]
    fn a_peer_speaks_for_those_that_are_reached_through_it() {
        let through = |peer| Action::Capture {
            peer,
            fail_closed: false,
            early: false,
        };
        let rules = Rules::default();
        let of = |addr: &str| rules.peer_of(addr.parse().unwrap());
        assert_eq!(of("192.0.2.1:69"), None);
        rules.set(&[
            CaptureRule {
                protocols: Protocols::Tcp,
                ..rule("192.0.2.0/25", through(3))
            },
            rule("192.0.2.64/26", Action::Direct),
            CaptureRule {
                uids: vec![1000..=1000],
                ..rule("192.0.2.32/27", through(2))
            },
            CaptureRule {
                except: vec!["192.0.2.128/25".parse().unwrap()],
                ..rule("192.0.2.0/24", through(1))
            },
            rule("::/0", through(4)),
            rule("127.0.0.0/8", through(5)),
        ]);
        assert_eq!(of("192.0.2.1:69"), Some(1));
        assert_eq!(of("192.0.2.33:69"), Some(2));
        assert_eq!(of("[2001:db8::1]:69"), Some(4));
        for none in [
            "192.0.2.65:69",
            "192.0.2.129:69",
            "192.0.2.1:0",
            "127.0.0.1:69",
            "127.128.0.1:69",
            "[::1]:69",
            "[fe80::1]:69",
            "[ff02::1]:69",
            "[fde6:b481:678d:568e::1]:69",
        ] {
            assert_eq!(of(none), None, "{none}");
        }
    }
}
