//! Whether a path answers: PINGs that ride on datagrams, their back-off, and what keeps NATs from
//! forgetting.

use super::PathKey;
use super::path::{Path, Standing};
use crate::Time;
use crate::limits::{OWN_PING_TOKENS, UDP_ASK_EVERY};
use crate::session::datagrams::FlowEvent;
use crate::session::{Handle, Role, Session};

impl Session {
    /// Whether paths are asked: while flows are open, or always if the driver wants that.
    fn udp_is_busy(&self) -> bool {
        let idle_too = self.config.udp_keep_alive_idle && !self.config.udp_keep_alive.is_zero();
        self.is_open() && (self.datagrams.in_use() || idle_too)
    }

    /// A PING goes out on `key`, with a datagram if there is one at once.
    pub(super) fn ask_path(&mut self, key: PathKey) {
        let token = OWN_PING_TOKENS + self.udp.pings;
        let guess = self.active.and_then(|h| self.rtt(h));
        if let Some(path) = self.udp.paths.get_mut(&key) {
            self.udp.pings += 1;
            self.udp.waits = true;
            path.guess = guess;
            path.ask(token);
        }
    }

    /// The path for a datagram, and whether it is sure to be one: otherwise the datagram goes over TCP
    /// as well. The path is asked if that is due.
    pub(in crate::session) fn path_for_datagram(&mut self, now: Time) -> Option<(PathKey, bool)> {
        let key = self.udp_path()?;
        self.try_path(now, key);
        let path = self.udp.paths.get_mut(&key)?;
        if path.standing == Standing::Usable && path.is_stale(now) {
            path.standing = Standing::Tried;
        }
        let sure = path.standing == Standing::Usable;
        if !sure && path.standing != Standing::Tried {
            return None;
        }
        if path.takes_question(now) || (!sure && !path.is_asked()) {
            self.ask_path(key);
        }
        Some((key, sure))
    }

    /// Nothing is known of `key`, or it was blocked for long enough: it is tried.
    fn try_path(&mut self, now: Time, key: PathKey) {
        let Some(path) = self.udp.paths.get_mut(&key) else {
            return;
        };
        match path.standing {
            Standing::Idle => path.standing = Standing::Tried,
            Standing::Blocked { until } if now >= until => {}
            _ => return,
        }
        if !path.is_asked() {
            self.ask_path(key);
        }
    }

    /// Datagrams may have to go over UDP soon, or come that way: it is tried at once.
    pub(in crate::session) fn wake_udp(&mut self, now: Time) {
        if self.udp_is_busy()
            && let Some(key) = self.udp_path()
        {
            self.try_path(now, key);
        }
    }

    /// A datagram of the peer came over TCP: perhaps it gets no answer over UDP, because a NAT has
    /// another address for this end now. A packet from here tells it which. `fresh`: no copy of it came
    /// before over UDP.
    pub(in crate::session) fn datagram_over_tcp_came(
        &mut self,
        now: Time,
        on: Handle,
        fresh: bool,
    ) {
        self.wake_udp(now);
        if fresh && self.active.is_some_and(|h| h != on) {
            self.doubt_path(now);
        }
        if self.role == Role::Initiator
            && let Some(key) = self.udp_path()
            && let Some(path) = self.udp.paths.get(&key)
            && path.standing == Standing::Usable
            && path.must_ask(now)
        {
            self.ask_path(key);
        }
    }

    /// The peer sends beside UDP and beside the active transport what does not come over these. An end that
    /// only answers has perhaps nothing under way that would tell it so.
    fn doubt_path(&mut self, now: Time) {
        let Some(key) = self.udp_path() else { return };
        let usable = |path: &&mut Path| path.standing == Standing::Usable;
        let Some(path) = self.udp.paths.get_mut(&key).filter(usable) else {
            return;
        };
        path.standing = Standing::Tried;
        self.udp.doubted = Some(now);
        if !path.is_asked() {
            self.ask_path(key);
        }
    }

    /// UDP answers: what was lost was a packet. The question over TCP may be lost as well, and then the next
    /// answer takes longer than silence; no handover should come of that.
    fn doubt_is_over(&mut self) {
        self.udp.doubted = None;
        if let Some((handle, token)) = self.udp.question.take()
            && let Some(transport) = self.transports.get_mut(&handle)
        {
            transport.pulse.excuse(token);
        }
    }

    pub(super) fn handle_udp_pong(&mut self, now: Time, token: u64) {
        let paths = &mut self.udp.paths;
        let answered = paths.iter_mut().find_map(|(key, path)| {
            let connection = path.connection;
            path.answers(now, token).then_some((*key, connection))
        });
        let Some((key, connection)) = answered else {
            return;
        };
        if let Some((counter, _)) = connection {
            self.udp.ids.confirm(counter);
        }
        self.doubt_is_over();
        self.tell_standing(key, true);
        self.probe_mtu(now, key);
    }

    fn tell_standing(&mut self, key: PathKey, usable: bool) {
        let news = (key.local, usable);
        if self.udp.told.replace(news) != Some(news) {
            self.datagrams.events.push_back(if usable {
                FlowEvent::UdpUsable(key.local)
            } else {
                FlowEvent::UdpBlocked(key.local)
            });
        }
    }

    /// When the next question on a path counts as unanswered, a key is old, or a NAT may forget.
    pub(in crate::session) fn udp_deadline(&self) -> Option<Time> {
        if !self.is_open() {
            return None;
        }
        let asked = self.udp.paths.values().filter_map(Path::deadline);
        let keys = self.udp.open_keys.iter().filter_map(|k| k.until);
        asked.chain(keys).chain(self.keep_alive_at()).min()
    }

    fn keep_alive_at(&self) -> Option<Time> {
        let every = self.config.udp_keep_alive;
        if every.is_zero() || self.role == Role::Responder || !self.udp_is_busy() {
            return None;
        }
        let path = self.udp.paths.get(&self.udp_path()?)?;
        let idle = path.standing == Standing::Usable && !path.is_asked();
        idle.then_some(path.sent_at + every.max(UDP_ASK_EVERY))
    }

    pub(in crate::session) fn check_udp(&mut self, now: Time) {
        if !self.is_open() {
            return;
        }
        self.udp
            .open_keys
            .retain(|k| k.until.is_none_or(|at| at > now));
        let busy = self.udp_is_busy();
        let due = |(_, path): &(&PathKey, &Path)| path.deadline().is_some_and(|at| now >= at);
        let keys: Vec<PathKey> = (self.udp.paths.iter())
            .filter(due)
            .map(|(&key, _)| key)
            .collect();
        for key in keys {
            self.check_challenge(now, key);
            if let Some(path) = self.udp.paths.get_mut(&key).filter(|_| !busy) {
                path.rest();
            }
            self.check_asked(now, key);
            self.check_probe(now, key);
        }
        if self.keep_alive_at().is_some_and(|at| now >= at)
            && let Some(key) = self.udp_path()
        {
            self.ask_path(key);
        }
    }

    fn check_asked(&mut self, now: Time, key: PathKey) {
        let due = |path: &&mut Path| path.is_due(now);
        let Some(path) = self.udp.paths.get_mut(&key).filter(due) else {
            return;
        };
        let blocked = path.is_blocked();
        if path.standing == Standing::Usable {
            self.udp.doubted = Some(now);
        }
        if path.missed(now) {
            self.ask_path(key);
        } else if !blocked {
            self.tell_standing(key, false);
            // Perhaps another address of the peer answers.
            self.wake_udp(now);
        }
    }
}
