//! One end of the session and its sockets: what the agent's driver does, in the same order.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::{Buf, Bytes};

use super::app::App;
use super::driver::Driver;
use super::net::{Item, Purpose};
use super::renew::Renewal;
use super::rng::mix;
use super::trouble::Moment;
use super::world::{Happening, World};
use super::{Mutation, Side};
use crate::Time;
use crate::limits::LANES_MAX;
use crate::seal::{Aead, SealError, Secret, SessionSecret};
use crate::session::{Handle, Session, StreamId, TransportFault};
use crate::wire::{Kind, Preamble, Reply, ResumeToken, Route, Status};

/// How long a transport may stay unauthenticated.
const UP_BY: Duration = Duration::from_secs(5);

/// One end.
pub(super) struct Host {
    pub side: Side,
    pub session: Option<Session>,
    /// The wires of its transports.
    pub wires: BTreeMap<Handle, usize>,
    pub tokens: BTreeMap<ResumeToken, u64>,
    pub apps: BTreeMap<StreamId, App>,
    /// Streams to open as soon as that can be.
    pub wanted: u64,
    pub timer_at: Option<Time>,
    pub redial_at: Option<Time>,
    pub connecting: usize,
    pub backoff: Duration,
    pub retired: BTreeSet<Handle>,
    pub renewal: Option<Renewal>,
    pub generation: u16,
    pub pings: BTreeSet<u64>,
    /// The script (or the peer's forgetting) allows the session to end here.
    pub may_end: bool,
    pub ended: Option<(u64, bool)>,
}

impl Host {
    pub fn new(side: Side) -> Self {
        Self {
            side,
            session: None,
            wires: BTreeMap::new(),
            tokens: BTreeMap::new(),
            apps: BTreeMap::new(),
            wanted: 0,
            timer_at: None,
            redial_at: None,
            connecting: 0,
            backoff: Duration::ZERO,
            retired: BTreeSet::new(),
            renewal: None,
            generation: 0,
            pings: BTreeSet::new(),
            may_end: false,
            ended: None,
        }
    }

    /// Transports that both ends have authenticated, and that lead to the peer.
    pub fn up(&self) -> Vec<Handle> {
        let session = self.session.iter();
        let all = session.flat_map(|s| s.transports().filter(|&h| s.is_up(h)));
        all.filter(|h| self.wires.contains_key(h)).collect()
    }

    /// The session has come to its end here, or was forgotten.
    pub fn is_over(&self) -> bool {
        self.session.as_ref().is_none_or(Session::is_closed)
    }
}

/// A secret that both ends know and nobody else.
pub(super) fn secret(seed: u64, purpose: u64) -> Secret {
    let mut bytes = [0; 32];
    for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&mix(seed ^ mix(purpose << 8 | i as u64)).to_be_bytes());
    }
    Secret::new(bytes)
}

impl World<'_> {
    pub fn host(&mut self, side: Side) -> &mut Host {
        &mut self.hosts[side as usize]
    }

    pub fn session(&mut self, side: Side) -> Option<&mut Session> {
        self.hosts[side as usize].session.as_mut()
    }

    /// A full handshake is complete on a new wire: both ends have a session and no stream.
    pub fn begin(&mut self) {
        self.attempt += 1;
        self.kept = Default::default();
        self.driver = Driver::default();
        self.live_anew();
        let attempt = u64::from(self.attempt);
        let link = self.rng.below(self.links.len() as u64) as usize;
        self.first_link = link;
        let wire = self.connect(Side::Initiator, link, Purpose::First);
        let aead =
            [Aead::Aes128Gcm, Aead::Aes256Gcm, Aead::ChaCha20Poly1305][self.attempt as usize % 3];
        let keys = SessionSecret::new(aead, &secret(self.script.seed, attempt));
        for side in Side::BOTH {
            let config = self.script.configs[side as usize].clone();
            let (session, handle) = match side {
                Side::Initiator => Session::initiate(self.now, config, keys.clone(), None),
                Side::Responder => Session::respond(self.now, config, keys.clone()),
            };
            let mut host = Host::new(side);
            let old = &mut self.hosts[side as usize];
            // Streams of a session that never opened are opened anew in the next.
            host.wanted = old.wanted
                + old
                    .apps
                    .keys()
                    .filter(|id| Side::opener(**id) == side)
                    .count() as u64;
            host.timer_at = None;
            host.wires.insert(handle, wire);
            host.session = Some(session);
            self.hosts[side as usize] = host;
            if let Some(found) = self.wires.get_mut(&wire) {
                found.ends[side as usize].open = true;
                found.ends[side as usize].handle = Some(handle);
            }
        }
        self.flows_anew();
        self.moment(Moment::Begin);
    }

    /// The initiator's session never opened and has lost its only transport: begin again.
    pub fn begin_again(&mut self) {
        let wires: Vec<usize> = self
            .hosts
            .iter()
            .flat_map(|h| h.wires.values().copied())
            .collect();
        for wire in wires {
            for side in Side::BOTH {
                self.close_end(wire, side, true);
            }
        }
        self.check.begin_anew();
        self.trace(|| "the session never opened: a full handshake again".to_owned());
        self.begin();
    }

    /// The responder answers HELLO.
    pub fn decide(&mut self, attempt: u32) {
        if attempt == self.attempt
            && let Some(session) = self.session(Side::Responder)
        {
            session.accept(None);
            self.open_wanted(Side::Responder);
        }
    }

    /// A connection attempt has ended.
    pub fn connected_wire(&mut self, wire: usize) {
        let Some(found) = self.wires.get(&wire) else {
            return;
        };
        let (dialler, purpose) = (found.dialler, found.purpose);
        let link = &self.links[found.link];
        let lost = link.loss > 0 && self.rng.chance(link.loss);
        let reached = link.up && link.hole == [false; 2] && !found.dead && !lost;
        match purpose {
            Purpose::First => {
                // The handshake ran on it already: it is there or dies here.
                self.after(
                    UP_BY,
                    Happening::Late {
                        wire,
                        side: Side::Initiator,
                    },
                );
                if !reached {
                    self.kill(wire);
                }
            }
            Purpose::Attack => self.attack_begins(wire),
            Purpose::Rejoin => self.rejoin_connected(wire, reached),
            Purpose::Resume { .. } | Purpose::Lane => {
                let carries = matches!(purpose, Purpose::Resume { standby: false, .. });
                if !reached && self.syn_again(wire) {
                    return;
                }
                let host = self.host(dialler);
                host.connecting = host.connecting.saturating_sub(1);
                if self.driver_connected(wire, reached) {
                    return;
                }
                if !reached {
                    self.wires.remove(&wire);
                    return;
                }
                self.dial_on(wire, dialler, !carries);
            }
        }
    }

    pub fn dial_on(&mut self, wire: usize, dialler: Side, standby: bool) {
        let route = self.route(wire, dialler);
        let dialled = self.session(dialler).map(|s| s.dial_over(route, standby));
        let Some(Ok(handle)) = dialled else {
            self.wires.remove(&wire);
            return;
        };
        self.trace(|| {
            format!(
                "{dialler:?} dials transport {} on wire {wire}",
                handle.as_u64()
            )
        });
        self.host(dialler).wires.insert(handle, wire);
        if let Some(found) = self.wires.get_mut(&wire) {
            found.ends[dialler as usize].open = true;
            found.ends[dialler as usize].handle = Some(handle);
            found.ends[dialler.other() as usize].open = true;
            found.pipes[dialler as usize].tap.greeting = 24;
            found.pipes[dialler.other() as usize].tap.greeting = Reply::BYTES;
        }
        for side in Side::BOTH {
            self.after(UP_BY, Happening::Late { wire, side });
        }
        self.moment(Moment::Dial);
    }

    /// As a driver numbers them: the path of the full handshake is 0, and a transport beside another on
    /// the same link is one of its lanes.
    fn route(&self, wire: usize, dialler: Side) -> Route {
        let links = self.links.len();
        let link = self.wires.get(&wire).map_or(0, |w| w.link);
        let path = ((link + links - self.first_link) % links) as u64 * 256;
        let host = &self.hosts[dialler as usize];
        let taken = |lane: u64| {
            let route = Route { path, lane };
            (host.session.iter()).any(|s| s.transports().any(|h| s.route(h) == Some(route)))
        };
        let lane = (0..LANES_MAX).find(|l| !taken(*l)).unwrap_or_default();
        Route { path, lane }
    }

    /// Whether `side` still waits for `wire` to be authenticated.
    pub fn late(&mut self, wire: usize, side: Side) {
        let Some(found) = self.wires.get(&wire).filter(|w| w.ends[side as usize].open) else {
            return;
        };
        let host = &self.hosts[side as usize];
        let ready = match (found.purpose, found.ends[side as usize].handle) {
            (Purpose::First, _) => host
                .session
                .as_ref()
                .is_some_and(|s| s.is_open() || s.is_ending()),
            (_, Some(handle)) => host.session.as_ref().is_some_and(|s| s.is_up(handle)),
            (_, None) => false,
        };
        if !ready {
            self.wire_gone(wire, side, "it was not authenticated in time");
        }
    }

    /// Bytes arrived at `side` of `wire`.
    pub fn received(&mut self, wire: usize, side: Side) {
        let Some(found) = self.wires.get_mut(&wire) else {
            return;
        };
        match found.purpose {
            Purpose::Rejoin => return self.rejoin_received(wire, side),
            Purpose::Attack if side == found.dialler => {
                found.ends[side as usize].input.clear();
                return;
            }
            _ => {}
        }
        if found.ends[side as usize].handle.is_none() && !self.greet(wire, side) {
            return;
        }
        let Some(found) = self.wires.get_mut(&wire) else {
            return;
        };
        let end = &mut found.ends[side as usize];
        let Some(handle) = end.handle else { return };
        let Some(session) = self.hosts[side as usize].session.as_mut() else {
            return;
        };
        let mut outcome = session.handle_bytes(self.now, handle, &mut end.input);
        if self.mutation == Some(Mutation::StrayFault) && self.check.tally.steps > 50 {
            outcome = Err(TransportFault::Unauthenticated);
        }
        if let Err(fault) = outcome {
            self.faulty(wire, side, fault);
        }
    }

    /// Reads the preamble of a wire that the peer dialled. True once it is a transport.
    fn greet(&mut self, wire: usize, side: Side) -> bool {
        let Some(found) = self.wires.get_mut(&wire) else {
            return false;
        };
        let end = &mut found.ends[side as usize];
        let (preamble, used) = match Preamble::parse(&end.input) {
            Ok(None) => return false,
            Ok(Some(parsed)) => parsed,
            Err(fault) => {
                self.faulty(wire, side, fault.into());
                return false;
            }
        };
        end.input.advance(used);
        let host = &mut self.hosts[side as usize];
        let counter = match preamble.kind {
            Kind::Resume(token) => host.tokens.get(&token).copied(),
            Kind::Full => None,
        };
        let accepted = match (counter, &mut host.session) {
            (Some(counter), Some(session)) => session.accept_transport(counter),
            _ => Err(TransportFault::Refused(Status::UnknownSession)),
        };
        match accepted {
            Ok(handle) => {
                end.handle = Some(handle);
                host.wires.insert(handle, wire);
                self.trace(|| {
                    format!(
                        "{side:?} accepts wire {wire} as transport {}",
                        handle.as_u64()
                    )
                });
                true
            }
            Err(fault) => {
                let status = match fault {
                    TransportFault::Refused(status) => status,
                    _ => Status::UnknownSession,
                };
                self.trace(|| format!("{side:?} refuses wire {wire}: {status:?}"));
                let reply = Bytes::copy_from_slice(&Reply::new(status).encode());
                self.transmit(wire, side, Item::Data(reply));
                self.close_end(wire, side, false);
                false
            }
        }
    }

    /// `side`'s session says that `wire` carries bad bytes.
    fn faulty(&mut self, wire: usize, side: Side, fault: TransportFault) {
        let tampered = self.wires.get(&wire).is_some_and(|w| w.tampered);
        let by_peer = matches!(
            fault,
            TransportFault::Refused(_)
                | TransportFault::StaleResume { .. }
                | TransportFault::Closed
                // Other transports went on while this one was silent, until its keys were gone.
                | TransportFault::Seal(SealError::Retired(_))
        );
        if !tampered && !by_peer {
            self.fail(format!(
                "{side:?}: honest bytes on wire {wire} are refused: {fault}"
            ));
        }
        let unknown = fault == TransportFault::Refused(Status::UnknownSession);
        self.trace(|| format!("{side:?}: fault on wire {wire}: {fault}"));
        self.wire_gone(wire, side, "a fault");
        if unknown && side == Side::Initiator {
            self.rejoin_begin();
        }
    }

    /// `side` loses `wire`.
    pub fn wire_gone(&mut self, wire: usize, side: Side, why: &str) {
        let Some(found) = self.wires.get(&wire).filter(|w| w.ends[side as usize].open) else {
            return;
        };
        let handle = found.ends[side as usize].handle;
        if found.purpose == Purpose::Rejoin {
            return self.rejoin_over(wire);
        }
        self.trace(|| format!("{side:?} loses wire {wire}: {why}"));
        let reset = self.rng.chance(500);
        self.close_end(wire, side, reset);
        if let Some(handle) = handle {
            self.drop_transport(side, handle);
            self.moment(Moment::Lost);
        }
    }

    pub fn drop_transport(&mut self, side: Side, handle: Handle) {
        let host = self.host(side);
        host.wires.remove(&handle);
        host.retired.remove(&handle);
        if let Some(session) = &mut host.session {
            session.transport_lost(handle);
        }
        if side == Side::Initiator {
            self.driver_moved(side);
            self.must_decide();
        }
    }
}
