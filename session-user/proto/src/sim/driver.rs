//! The initiator's driver in runs that have one like the agent's: it prefers some links to others,
//! keeps a standby on each, dials elsewhere on silence, gives up what stays silent, and returns.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::Side;
use super::net::Purpose;
use super::trouble::Moment;
use super::world::{Happening, World};
use crate::Time;
use crate::session::Handle;

/// The path of a silent transport is dialled again after this time, or two round trips.
const SAME_PATH_AFTER: Duration = Duration::from_millis(250);
/// A link that fell silent is not used for this time, and for double with each further time.
const DEMOTED: Duration = Duration::from_secs(3);
const DEMOTED_MAX: Duration = Duration::from_secs(60);
/// Waits between attempts once every link has failed.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// TCP sends its SYN again after this time, and once more after double of it.
const SYN_AFTER: Duration = Duration::from_secs(1);
const SYN_TRIES_MAX: u32 = 2;

/// What the driver remembers.
#[derive(Debug, Default)]
pub(super) struct Driver {
    /// Until when a link is not to be used, and how often it fell silent.
    demoted: BTreeMap<usize, (Time, u32)>,
    pending: VecDeque<usize>,
    /// The wire that is to carry, and the one that is to be a standby, while they are connected.
    pub attempt: Option<usize>,
    pub standby: Option<usize>,
    retry_at: Option<Time>,
    backoff: Duration,
    same_path_at: Option<Time>,
    pub doomed: BTreeMap<Handle, Time>,
    carrying: Option<Handle>,
    /// Something has changed that the policy must hear of.
    must_decide: bool,
}

impl World<'_> {
    pub fn link_of(&self, handle: Handle) -> Option<usize> {
        let wire = self.hosts[Side::Initiator as usize].wires.get(&handle)?;
        self.wires.get(wire).map(|w| w.link)
    }

    pub fn rank(&self, link: usize) -> (bool, usize) {
        let order = self.script.preference.iter().flatten();
        let demoted = self.driver.demoted.get(&link);
        let demoted = demoted.is_some_and(|(until, _)| *until > self.now);
        (demoted, order.take_while(|&&l| l != link).count())
    }

    pub fn look_at(&mut self, at: Time) {
        self.at(at.max(self.now), Happening::Look);
    }

    /// What the driver does after every turn.
    pub fn drive(&mut self) {
        if self.is_asleep(Side::Initiator) {
            return;
        }
        let Some(session) = &self.hosts[Side::Initiator as usize].session else {
            return;
        };
        if !session.is_open() {
            return;
        }
        let (now, active) = (self.now, session.active());
        let old = std::mem::replace(&mut self.driver.carrying, active);
        if old != active
            && let Some(old) = old.filter(|_| active.is_some())
            && let Some(link) = self.link_of(old)
        {
            // The peer moved: it may have noticed something that this end has not.
            if let Some(session) = self.session(Side::Initiator) {
                session.doubt(now, old);
            }
            self.demote(link);
            self.driver.must_decide = true;
        }
        let alone = active.is_none();
        if std::mem::take(&mut self.driver.must_decide) || alone {
            self.decide_link();
        }
    }

    /// Something happened that the policy must hear of.
    pub fn must_decide(&mut self) {
        self.driver.must_decide = true;
    }

    /// This side's own move is no news to it.
    pub fn driver_moved(&mut self, side: Side) {
        if side == Side::Initiator {
            let active = self.session(side).and_then(|s| s.active());
            self.driver.carrying = active;
        }
    }

    pub fn driver_woke(&mut self) {
        self.driver.demoted.clear();
        self.driver.retry_at = None;
        self.must_decide();
    }

    /// A link can be used again.
    pub fn link_came(&mut self, link: usize) {
        self.driver.demoted.remove(&link);
        self.driver.retry_at = None;
        self.must_decide();
    }

    fn decide_link(&mut self) {
        if self.script.preference.is_none() || self.rejoin.is_some() {
            return;
        }
        let Some(session) = &self.hosts[Side::Initiator as usize].session else {
            return;
        };
        let active = session.active();
        let silent = active.filter(|h| session.is_silent(*h));
        let answers = |h: Handle| Some(h) != silent && session.is_up(h) && !session.is_silent(h);
        if silent.is_some() && session.transports().any(answers) {
            return;
        }
        let own = active.and_then(|h| self.link_of(h));
        let mut ordered: Vec<usize> = (0..self.links.len())
            .filter(|&l| self.links[l].up)
            .collect();
        ordered.sort_by_key(|&l| self.rank(l));
        if active.is_none() || silent.is_some() {
            if self.driver.attempt.is_none() && self.driver.retry_at.is_none() {
                if silent.is_some() {
                    ordered.sort_by_key(|&l| Some(l) == own);
                }
                self.driver.pending = ordered.into();
                self.next_attempt(own);
            }
            return;
        }
        self.driver.pending.clear();
        self.driver.retry_at = None;
        if let (Some(&best), Some(own)) = (ordered.first(), own)
            && self.rank(best) < self.rank(own)
        {
            self.go_softly(best);
        }
        self.tend_standbys(&ordered);
    }

    fn next_attempt(&mut self, own: Option<usize>) {
        let Some(link) = self.driver.pending.pop_front() else {
            let backoff = (self.driver.backoff * 2).clamp(BACKOFF_FIRST, BACKOFF_MAX);
            self.driver.backoff = backoff;
            self.driver.retry_at = Some(self.now + backoff);
            return self.look_at(self.now + backoff);
        };
        let wait = self.driver.same_path_at.filter(|at| *at > self.now);
        if let Some(at) = wait.filter(|_| own == Some(link)) {
            self.driver.retry_at = Some(at);
            return self.look_at(at);
        }
        self.driver.attempt = Some(self.start_dial(link));
    }

    pub fn start_dial(&mut self, link: usize) -> usize {
        self.host(Side::Initiator).connecting += 1;
        let purpose = Purpose::Resume {
            standby: true,
            replaces: false,
        };
        self.connect(Side::Initiator, link, purpose)
    }

    /// New records go to `link` once a transport stands there; the one in use works.
    fn go_softly(&mut self, link: usize) {
        let Some(session) = &self.hosts[Side::Initiator as usize].session else {
            return;
        };
        let answers = |h: &Handle| session.is_up(*h) && !session.is_silent(*h);
        let ready = (session.transports().filter(answers)).find(|h| self.link_of(*h) == Some(link));
        match ready {
            Some(handle) => {
                if let Some(session) = self.session(Side::Initiator) {
                    session.set_active(handle);
                }
                self.driver_moved(Side::Initiator);
                self.moment(Moment::Move);
            }
            None => self.dial_standby(link),
        }
    }

    /// A wire that the driver dials is connected, or was tried in vain. False if it is none of its.
    pub fn driver_connected(&mut self, wire: usize, reached: bool) -> bool {
        let carrying = self.driver.attempt.take_if(|w| *w == wire).is_some();
        let standby = self.driver.standby.take_if(|w| *w == wire).is_some();
        if !carrying && !standby {
            return false;
        }
        let Some(link) = self.wires.get(&wire).map(|w| w.link) else {
            return true;
        };
        if !reached {
            self.demote_for(link, SYN_AFTER);
            self.wires.remove(&wire);
            let active = self.session(Side::Initiator).and_then(|s| s.active());
            if carrying && !self.carries() {
                let own = active.and_then(|h| self.link_of(h));
                self.next_attempt(own);
            }
            self.must_decide();
            return true;
        }
        let works = self.carries();
        let session = self.session(Side::Initiator);
        let silent = session.and_then(|s| s.active().filter(|h| s.is_silent(*h)));
        if let Some(silent) = silent {
            self.doom(silent);
        }
        self.dial_on(wire, Side::Initiator, works);
        self.driver_moved(Side::Initiator);
        true
    }

    fn carries(&mut self) -> bool {
        let session = self.session(Side::Initiator);
        session.is_some_and(|s| s.active().is_some_and(|h| s.is_up(h) && !s.is_silent(h)))
    }

    /// Whether a connection attempt is made again: TCP sends its SYN more than once.
    pub fn syn_again(&mut self, wire: usize) -> bool {
        let Some(found) = self.wires.get_mut(&wire) else {
            return false;
        };
        let link = &self.links[found.link];
        if self.few || !link.up || found.dead || found.tries >= SYN_TRIES_MAX {
            return false;
        }
        let wait = SYN_AFTER * (1 << found.tries);
        found.tries += 1;
        self.after(wait, Happening::Connected { wire });
        true
    }

    pub fn driver_up(&mut self) {
        self.driver.backoff = Duration::ZERO;
        self.must_decide();
    }

    fn demote(&mut self, link: usize) {
        let times = self.driver.demoted.get(&link).map_or(0, |(_, n)| *n);
        let time = (DEMOTED * (1 << times.min(5))).min(DEMOTED_MAX);
        self.driver
            .demoted
            .insert(link, (self.now + time, times + 1));
        self.look_at(self.now + time);
    }

    fn demote_for(&mut self, link: usize, time: Duration) {
        let entry = self.driver.demoted.entry(link).or_default();
        entry.0 = entry.0.max(self.now + time);
        self.look_at(self.now + time);
    }

    pub fn rtt(&self, handle: Handle) -> Duration {
        let session = self.hosts[Side::Initiator as usize].session.as_ref();
        session.and_then(|s| s.rtt(handle)).unwrap_or_default()
    }

    /// What was sent on `handle` is not answered in time.
    pub fn driver_silent(&mut self, side: Side, handle: Handle) {
        if side == Side::Responder {
            return;
        }
        if self.session(side).and_then(|s| s.active()) != Some(handle) {
            return self.doom(handle);
        }
        let wait = SAME_PATH_AFTER.max(self.rtt(handle) * 2);
        self.driver.same_path_at = Some(self.now + wait);
        self.must_decide();
    }

    /// The session has left `from`, which was silent.
    pub fn driver_handed_over(&mut self, side: Side, from: Handle) {
        self.driver_moved(side);
        if side == Side::Responder {
            return;
        }
        self.doom(from);
        if let Some(link) = self.link_of(from) {
            self.demote(link);
        }
        self.must_decide();
    }

    /// The driver's own deadlines.
    pub fn look(&mut self) {
        let now = self.now;
        self.driver.retry_at.take_if(|at| *at <= now);
        let due: Vec<Handle> = (self.driver.doomed.iter())
            .filter(|(_, at)| **at <= now)
            .map(|(&h, _)| h)
            .collect();
        for handle in due {
            self.driver.doomed.remove(&handle);
            let session = self.hosts[Side::Initiator as usize].session.as_ref();
            let hopeless =
                session.is_some_and(|s| s.is_silent(handle) && s.active() != Some(handle));
            let wire = self.hosts[Side::Initiator as usize].wires.get(&handle);
            if let Some(&wire) = wire.filter(|_| hopeless) {
                self.wire_gone(wire, Side::Initiator, "it stayed silent");
            }
        }
        self.must_decide();
    }
}
