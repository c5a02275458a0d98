//! Following the peer's address (RFC 9000 sections 8 and 9).
//!
//! Only the responder follows: an initiator sends where its driver says. A packet that is authentic and
//! has the highest number so far makes the address that it came from a candidate, which is challenged;
//! what goes there is bounded by what came from there. The address in use stays until the candidate has
//! answered from where it was challenged, and is still where the highest number came from.

use super::path::{Challenge, Path};
use super::{PathKey, payload_of};
use crate::Time;
use crate::limits::{CHALLENGE_TRIES_MAX, UDP_CANDIDATES_MAX};
use crate::session::{Role, Session};
use crate::wire::Frame;

impl Session {
    /// Packet `number` of `size` bytes came from `key`; `moves`: it may move the peer's address.
    pub(super) fn heard_from(
        &mut self,
        now: Time,
        key: PathKey,
        number: u64,
        size: usize,
        moves: bool,
    ) {
        if self.role == Role::Initiator {
            if let Some(path) = self.udp.paths.get_mut(&key) {
                path.hears(size);
            }
            return;
        }
        let newest = moves && number >= self.udp.moved;
        if newest {
            self.udp.moved = number + 1;
            self.make_candidate(key);
        }
        let Some(path) = self.udp.paths.get_mut(&key) else {
            return;
        };
        path.hears(size);
        if moves {
            path.highest = path.highest.max(number + 1);
        }
        let current = self.udp.current == Some(key);
        if current && path.is_blocked() {
            path.begin_again();
            return self.wake_udp(now);
        }
        if newest && !current && path.challenge.is_none() {
            self.challenge(now, key, 0);
        }
    }

    /// `key` is one of the addresses that may be the peer's.
    fn make_candidate(&mut self, key: PathKey) {
        let Some(local) = self.udp.locals.get(&key.local) else {
            return;
        };
        if self.udp.paths.contains_key(&key) {
            return;
        }
        let link = payload_of(local.link_mtu, key.remote);
        let candidates = |(k, _): &(&PathKey, &Path)| Some(**k) != self.udp.current;
        let all = self.udp.paths.iter().filter(candidates);
        if all.clone().count() >= UDP_CANDIDATES_MAX
            && let Some((&oldest, _)) = all.min_by_key(|(_, p)| p.highest)
        {
            self.udp.paths.remove(&oldest);
        }
        self.udp.paths.insert(key, Path::new(link, false));
    }

    fn challenge(&mut self, now: Time, key: PathKey, tries: u32) {
        let data = self.udp.challenges.draw();
        if let Some(path) = self.udp.paths.get_mut(&key) {
            let due = now + path.patience() * (1 << tries);
            // Each one is new, and the last one counts: an answer takes no longer than this waits.
            path.challenge = Some(Challenge { data, tries, due });
            path.push(&Frame::PathChallenge { data });
            self.udp.waits = true;
        }
    }

    /// A challenge that nobody answers is repeated a few times; then the address was not the peer's.
    pub(super) fn check_challenge(&mut self, now: Time, key: PathKey) {
        let Some(path) = self.udp.paths.get_mut(&key) else {
            return;
        };
        let Some(challenge) = path.challenge.filter(|c| now >= c.due) else {
            return;
        };
        if challenge.tries + 1 < CHALLENGE_TRIES_MAX {
            return self.challenge(now, key, challenge.tries + 1);
        }
        path.challenge = None;
        if self.udp.current != Some(key) {
            self.udp.paths.remove(&key);
        }
    }

    /// The answer must come from where the challenge went: whoever handed it on to the peer is not it.
    pub(super) fn handle_path_response(&mut self, now: Time, key: PathKey, data: [u8; 8]) {
        let Some(path) = self.udp.paths.get_mut(&key) else {
            return;
        };
        if path.challenge.take_if(|c| c.data == data).is_none() {
            return;
        }
        if let Some((counter, _)) = path.connection {
            self.udp.ids.confirm(counter);
        }
        let highest = path.highest;
        path.validated = true;
        let current = self.udp.current.and_then(|k| self.udp.paths.get(&k));
        if current.is_some_and(|c| c.highest > highest) {
            // The peer has gone back meanwhile.
            self.udp.paths.remove(&key);
            return;
        }
        if let Some(old) = self.udp.current.replace(key).filter(|old| *old != key) {
            self.udp.paths.remove(&old);
            self.datagrams.stats.moves += 1;
        }
        self.wake_udp(now);
    }

    /// The address that is being validated and that the peer was last heard from, if it is another than
    /// the one in use.
    pub(in crate::session) fn candidate(&self) -> Option<PathKey> {
        if self.role == Role::Initiator {
            return None;
        }
        let newest = self.udp.paths.iter().max_by_key(|(_, p)| p.highest);
        let key = newest.map(|(&key, _)| key);
        key.filter(|k| Some(*k) != self.udp.current)
    }
}
