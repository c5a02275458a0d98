//! The monitor's memory: news in, snapshots out. No sockets and no clock, so that what it decides
//! can be tested event by event.
//!
//! Losses count at once. A link that becomes able to carry something settles for the debounce
//! time first. Routes that go are not taken from the message: DHCP clients and routing daemons
//! replace a route by removing it and adding it again, so a removal only asks for a new reading a
//! moment later. The same reading repairs what the kernel never tells: at link down it drops the
//! IPv4 addresses' routes without a word.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::kind;
use super::message::{AddressFacts, LinkFacts, News, RouteFacts};
use super::model::{
    Address, Change, ChangeKind, Link, LinkKind, LinkSnapshot, LinkState, Route, Scope,
};

/// How long after a removed route the routes are read again.
const ROUTE_QUIET: Duration = Duration::from_millis(20);
/// Dumps start at least this far apart,
const DUMP_INTERVAL_MIN: Duration = Duration::from_millis(20);
/// and take at most about a tenth of the time, however large the tables are.
const DUMP_SHARE: u32 = 10;
/// More routes than this on one link are not kept; a default route comes first in a dump.
const ROUTES_MAX: usize = 4096;

const IFF_UP: u32 = 1;
const IFF_LOWER_UP: u32 = 1 << 16;
const OPER_UNKNOWN: u8 = 0;
const OPER_UP: u8 = 6;
const IFA_F_TEMPORARY: u32 = 0x01;
const IFA_F_OPTIMISTIC: u32 = 0x04;
const IFA_F_DADFAILED: u32 = 0x08;
const IFA_F_DEPRECATED: u32 = 0x20;
const IFA_F_TENTATIVE: u32 = 0x40;

/// A link and, for each fact of it, the reading in which it was last seen.
#[derive(Debug)]
struct Entry {
    link: Link,
    seen: u64,
    addresses_seen: Vec<u64>,
    routes_seen: Vec<u64>,
}

#[derive(Debug)]
pub(super) struct Table {
    debounce: Duration,
    entries: BTreeMap<u32, Entry>,
    /// Number of the latest reading (full dump); facts not seen in it go when it ends.
    reading: u64,
    read_began: Option<Instant>,
    /// A dump is wanted, at this time.
    dump_at: Option<Instant>,
    /// Not before this time.
    dump_not_before: Option<Instant>,
    /// What happened during the reading makes it worthless.
    read_again: bool,
    version: u64,
    changes: Vec<Change>,
    published: Vec<Link>,
    /// A usable link or an address of one was lost: publish without waiting for more.
    urgent: bool,
    first: bool,
}

impl Table {
    pub(super) fn new(debounce: Duration) -> Table {
        Table {
            debounce,
            entries: BTreeMap::new(),
            reading: 0,
            read_began: None,
            dump_at: None,
            dump_not_before: None,
            read_again: false,
            version: 0,
            changes: Vec::new(),
            published: Vec::new(),
            urgent: false,
            first: true,
        }
    }

    /// Takes in one message.
    pub(super) fn handle_news(&mut self, news: News, now: Instant) {
        match news {
            News::Link(facts) => self.handle_link(facts, now),
            News::LinkGone(index) => self.remove(index, now),
            News::Address(facts) => self.handle_address(&facts, now),
            News::AddressGone(facts) => self.handle_address_gone(&facts, now),
            News::Routes { hops, replace } => {
                for hop in &hops {
                    self.handle_route(hop, now);
                }
                if replace {
                    self.want_reading(now + ROUTE_QUIET);
                }
            }
            News::RouteGone => self.want_reading(now + ROUTE_QUIET),
            News::Done | News::Refused(_) | News::Other => {}
        }
    }

    /// Notifications were lost or could not be read: only a new reading tells the truth.
    pub(super) fn handle_gap(&mut self, now: Instant) {
        self.read_again = true;
        self.want_reading(now);
    }

    /// Asks for a reading, at the latest at `at`.
    pub(super) fn want_reading(&mut self, at: Instant) {
        self.dump_at = Some(self.dump_at.map_or(at, |earlier| earlier.min(at)));
    }

    /// Whether a reading is to begin now; if so it has begun.
    #[must_use]
    pub(super) fn poll_reading(&mut self, now: Instant) -> bool {
        if self.read_began.is_some() || self.reading_due().is_none_or(|due| now < due) {
            return false;
        }
        self.dump_at = None;
        self.read_again = false;
        self.reading += 1;
        self.read_began = Some(now);
        true
    }

    /// The reading has ended: what it did not show is gone, unless it must be repeated.
    pub(super) fn handle_read_end(&mut self, complete: bool, now: Instant) {
        let Some(began) = self.read_began.take() else {
            return;
        };
        let pause = (now.saturating_duration_since(began) * DUMP_SHARE).max(DUMP_INTERVAL_MIN);
        self.dump_not_before = Some(now + pause);
        if !complete || self.read_again {
            self.want_reading(now);
            return;
        }
        let reading = self.reading;
        let gone: Vec<u32> = (self.entries.iter())
            .filter(|(_, entry)| entry.seen != reading)
            .map(|(index, _)| *index)
            .collect();
        for index in gone {
            self.remove(index, now);
        }
        for entry in self.entries.values_mut() {
            let before = entry.link.addresses.len();
            sweep(
                &mut entry.link.addresses,
                &mut entry.addresses_seen,
                reading,
            );
            sweep(&mut entry.link.routes, &mut entry.routes_seen, reading);
            self.urgent |= entry.link.addresses.len() != before;
        }
        self.judge_all(now);
        if self.first {
            self.first = false;
            // What was there before us needs no time to settle.
            for entry in self.entries.values_mut() {
                if matches!(entry.link.state, LinkState::Settling { .. }) {
                    entry.link.state = LinkState::Usable;
                }
            }
        }
    }

    /// Ends the settling of links whose time has come.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        for entry in self.entries.values_mut() {
            let link = &mut entry.link;
            if matches!(link.state, LinkState::Settling { until } if until <= now) {
                link.state = LinkState::Usable;
                link.since = now;
                note(
                    &mut self.changes,
                    self.version,
                    link,
                    ChangeKind::Gained,
                    now,
                );
            }
        }
    }

    /// When `handle_timeout` and `poll_reading` are to be called next.
    #[must_use]
    pub(super) fn poll_deadline(&self) -> Option<Instant> {
        let settling = self.entries.values().filter_map(|e| match e.link.state {
            LinkState::Settling { until } => Some(until),
            _ => None,
        });
        let due = self.reading_due().filter(|_| self.read_began.is_none());
        settling.chain(due).min()
    }

    /// Whether something was lost that must be told before the rest of the queue is read.
    #[must_use]
    pub(super) fn is_urgent(&self) -> bool {
        self.urgent
    }

    /// The next snapshot, if anything in it differs from the one before.
    #[must_use]
    pub(super) fn poll_snapshot(&mut self, read_at: Instant) -> Option<LinkSnapshot> {
        self.urgent = false;
        let links: Vec<Link> = self.entries.values().map(|e| e.link.clone()).collect();
        let news = self
            .changes
            .last()
            .is_some_and(|c| c.version > self.version);
        if self.first || (links == self.published && !news && self.version > 0) {
            return None;
        }
        self.version += 1;
        self.published.clone_from(&links);
        Some(LinkSnapshot {
            version: self.version,
            links,
            read_at,
            changes: self.changes.clone(),
        })
    }

    fn reading_due(&self) -> Option<Instant> {
        let at = self.dump_at?;
        Some(self.dump_not_before.map_or(at, |floor| floor.max(at)))
    }

    fn handle_link(&mut self, facts: LinkFacts, now: Instant) {
        let reading = self.reading;
        let known = self.entries.contains_key(&facts.index);
        let entry = self.entries.entry(facts.index).or_insert_with(|| Entry {
            link: unknown(facts.index, now),
            seen: reading,
            addresses_seen: Vec::new(),
            routes_seen: Vec::new(),
        });
        entry.seen = reading;
        let link = &mut entry.link;
        let (was_up, had_carrier) = (link.admin_up, link.carrier);
        link.admin_up = facts.flags & IFF_UP != 0;
        link.carrier = facts.flags & IFF_LOWER_UP != 0
            && matches!(facts.operstate, None | Some(OPER_UP | OPER_UNKNOWN));
        link.mtu = facts.mtu.unwrap_or(link.mtu);
        let renamed = facts.name.as_ref().is_some_and(|name| *name != link.name);
        if let Some(name) = facts.name.as_ref().filter(|_| renamed) {
            link.name.clone_from(name);
        }
        if renamed || link.kind == LinkKind::Other {
            link.kind = kind::of(&facts, &link.name);
        }
        if known && (was_up, had_carrier) != (link.admin_up, link.carrier) {
            self.want_reading(now);
        }
        self.judge(facts.index, now);
    }

    fn handle_address(&mut self, facts: &AddressFacts, now: Instant) {
        let reading = self.reading;
        let Some(entry) = self.entries.get_mut(&facts.index) else {
            return self.handle_gap(now);
        };
        let address = address(facts);
        let known = (entry.link.addresses.iter()).position(|a| same_address(a, &address));
        if let Some(at) = known {
            // An address that turns out to be a duplicate is as good as removed.
            self.urgent |= address.tentative && !entry.link.addresses[at].tentative;
            entry.link.addresses[at] = address;
            entry.addresses_seen[at] = reading;
        } else {
            entry.link.addresses.push(address);
            entry.addresses_seen.push(reading);
        }
        self.judge(facts.index, now);
    }

    fn handle_address_gone(&mut self, facts: &AddressFacts, now: Instant) {
        let Some(entry) = self.entries.get_mut(&facts.index) else {
            return;
        };
        let gone = address(facts);
        if let Some(at) = (entry.link.addresses.iter()).position(|a| same_address(a, &gone)) {
            entry.link.addresses.remove(at);
            entry.addresses_seen.remove(at);
            self.urgent |= entry.link.state == LinkState::Usable;
            // Routes that had it as their source went with it, in silence.
            self.want_reading(now + ROUTE_QUIET);
            self.judge(facts.index, now);
        }
    }

    fn handle_route(&mut self, facts: &RouteFacts, now: Instant) {
        let reading = self.reading;
        let Some(entry) = self.entries.get_mut(&facts.index) else {
            return self.handle_gap(now);
        };
        let route = Route {
            dst: facts.dst.trunc(),
            gateway: facts.gateway,
            metric: facts.metric,
            source: facts.source,
        };
        match entry.link.routes.iter().position(|known| *known == route) {
            Some(at) => entry.routes_seen[at] = reading,
            None if entry.link.routes.len() < ROUTES_MAX => {
                entry.link.routes.push(route);
                entry.routes_seen.push(reading);
            }
            None => tracing::debug!(
                link = entry.link.name,
                dst = %route.dst,
                "route not kept: the link has {ROUTES_MAX} already"
            ),
        }
        self.judge(facts.index, now);
    }

    fn remove(&mut self, index: u32, now: Instant) {
        let Some(entry) = self.entries.remove(&index) else {
            return;
        };
        if entry.link.state == LinkState::Usable {
            let changes = &mut self.changes;
            note(changes, self.version, &entry.link, ChangeKind::Lost, now);
            self.urgent = true;
        }
    }

    fn judge_all(&mut self, now: Instant) {
        let indexes: Vec<u32> = self.entries.keys().copied().collect();
        for index in indexes {
            self.judge(index, now);
        }
    }

    /// Moves a link between its states.
    fn judge(&mut self, index: u32, now: Instant) {
        let Some(link) = self.entries.get_mut(&index).map(|entry| &mut entry.link) else {
            return;
        };
        link.state = match (able(link), link.state) {
            (true, LinkState::Unusable) => LinkState::Settling {
                until: now + self.debounce,
            },
            (false, LinkState::Usable) => {
                note(&mut self.changes, self.version, link, ChangeKind::Lost, now);
                self.urgent = true;
                LinkState::Unusable
            }
            (false, LinkState::Settling { .. }) => LinkState::Unusable,
            _ => return,
        };
        link.since = now;
    }
}

/// Whether a link can carry something to somewhere.
fn able(link: &Link) -> bool {
    let family_able = |v4: bool| {
        let address = (link.addresses.iter())
            .any(|a| a.ip.is_ipv4() == v4 && a.bindable() && (v4 || a.scope == Scope::Global));
        address
            && link
                .routes
                .iter()
                .any(|route| route.dst.addr().is_ipv4() == v4)
    };
    let loopback = link.kind == LinkKind::Loopback;
    link.admin_up && link.carrier && (loopback || family_able(true) || family_able(false))
}

fn note(changes: &mut Vec<Change>, version: u64, link: &Link, kind: ChangeKind, at: Instant) {
    if changes.len() >= LinkSnapshot::CHANGES_MAX {
        changes.remove(0);
    }
    changes.push(Change {
        version: version + 1,
        link: link.name.clone(),
        kind,
        at,
    });
}

fn sweep<T>(items: &mut Vec<T>, seen: &mut Vec<u64>, reading: u64) {
    let mut marks = seen.iter();
    items.retain(|_| marks.next() == Some(&reading));
    seen.retain(|mark| *mark == reading);
}

fn unknown(index: u32, now: Instant) -> Link {
    Link {
        index,
        name: format!("if{index}"),
        kind: LinkKind::Other,
        admin_up: false,
        carrier: false,
        addresses: Vec::new(),
        routes: Vec::new(),
        mtu: 0,
        state: LinkState::Unusable,
        since: now,
    }
}

fn same_address(a: &Address, b: &Address) -> bool {
    a.ip == b.ip && a.prefix == b.prefix
}

fn address(facts: &AddressFacts) -> Address {
    let flag = |flag| facts.flags & flag != 0;
    let tentative = flag(IFA_F_TENTATIVE) && !flag(IFA_F_OPTIMISTIC);
    Address {
        ip: facts.ip,
        prefix: facts.prefix,
        // enum rt_scope_t: 0 universe, 200 site, 253 link, 254 host, 255 nowhere.
        scope: match facts.scope {
            254.. => Scope::Host,
            253 => Scope::Link,
            _ => Scope::Global,
        },
        tentative: tentative || flag(IFA_F_DADFAILED),
        deprecated: flag(IFA_F_DEPRECATED),
        // The same bit means "secondary" for IPv4.
        temporary: facts.ip.is_ipv6() && flag(IFA_F_TEMPORARY),
    }
}
