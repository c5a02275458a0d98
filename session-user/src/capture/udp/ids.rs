//! The ids of destinations: what they stand for, and which are given up when there are many.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use aya::maps::{Array, HashMap, MapData, MapError};
use nix::time::{ClockId, clock_gettime};
use ring::rand::{SecureRandom as _, SystemRandom};
use session_ebpf_common::{Assigned, Destination, UDP_IDS_MAX, counter, id_address, id_of};

use super::super::tables::{found_or_none, ignore_absent};
use super::heard::HeardIds;
use super::tables::Tables;

/// Ids in use from which on idle ones are given up.
const MARK: u64 = UDP_IDS_MAX as u64 / 2;
/// How long an id must be idle for that.
pub const IDLE: Duration = Duration::from_secs(60);
/// The time of an id's last use is no more exact than this.
const GRAIN: Duration = Duration::from_secs(10);
/// Draws of a random id before a destination is given up, as in the programs.
const DRAWS: u32 = 4;
/// Only what is not there (`BPF_NOEXIST`), only what is (`BPF_EXIST`): bpf(2).
const NEW: u64 = 1;
const KNOWN: u64 = 2;

/// The programs' tables of ids, by descriptors of one's own.
pub struct IdMaps {
    /// The ids of destinations.
    pub ids: HashMap<MapData, Destination, Assigned>,
    /// The destinations of ids.
    pub destinations: HashMap<MapData, u32, Destination>,
}

/// What gives ids out, and knows what they stand for.
pub struct Ids {
    maps: IdMaps,
    /// The programs' counters, by a descriptor of our own.
    counters: Array<MapData, u64>,
    /// None while it is at work.
    collector: Option<Collector>,
    /// Ids that were given up.
    collected: u64,
    /// Ids that were given here, and not by the programs.
    given: u64,
    heard: HeardIds,
}

/// What gives ids up, beside all that goes on with them.
pub struct Collector {
    maps: IdMaps,
    /// Ids that stood for a destination which did not have them, when that was last looked at: they may just have been
    /// drawn.
    nameless: HashSet<u32>,
}

impl fmt::Debug for Ids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let collected = self.collected;
        f.debug_struct("Ids")
            .field("collected", &collected)
            .finish_non_exhaustive()
    }
}

impl Ids {
    /// Takes the maps, and once more the same for what gives ids up.
    pub fn new(maps: IdMaps, same: IdMaps, counters: Array<MapData, u64>) -> Self {
        Self {
            maps,
            counters,
            collector: Some(Collector {
                maps: same,
                nameless: HashSet::new(),
            }),
            collected: 0,
            given: 0,
            heard: HeardIds::default(),
        }
    }

    /// What an id stands for; `None` if it was given up, or never given.
    pub fn destination(&self, id: u32) -> Result<Option<Destination>, MapError> {
        found_or_none(self.maps.destinations.get(&id, 0))
    }

    /// Gives an id by hand.
    #[cfg(test)]
    pub fn assign(&mut self, id: u32, destination: &Destination) -> Result<(), MapError> {
        self.maps.destinations.insert(id, destination, 0)
    }

    /// The id of whom a socket of `group` has heard, drawn now if he has none, as the programs draw one for whom an
    /// application speaks to. None where idle ones are to be given up: those come first.
    pub fn id_for(&mut self, destination: &Destination, group: u64) -> io::Result<Option<u32>> {
        let now = now()?;
        if let Some(known) = self.assigned(destination)? {
            return Ok(self.used_again(destination, &known, now));
        }
        if self.in_use() > MARK || !self.heard.admits(group) {
            return Ok(None);
        }
        for _ in 0..DRAWS {
            let Some(id) = id_of(&id_address(random()?, &destination.addr)) else {
                continue;
            };
            if (self.maps.destinations.insert(id, destination, NEW)).is_err() {
                continue;
            }
            if (self.maps.ids.insert(destination, used_at(id, now), NEW)).is_ok() {
                self.given += 1;
                self.heard.insert(id, group);
                return Ok(Some(id));
            }
            // A program was first, or there is no room.
            ignore_absent(self.maps.destinations.remove(&id)).map_err(io::Error::other)?;
            if let Some(known) = self.assigned(destination)? {
                return Ok(Some(known.id));
            }
            // What kept it out has been given up already.
        }
        Ok(None)
    }

    /// The id of a destination that has one, used now. None where it may just be given up: written in between, this would
    /// leave an id without what it stands for, or in place of the one that a program has drawn since.
    fn used_again(
        &mut self,
        destination: &Destination,
        known: &Assigned,
        now: Duration,
    ) -> Option<u32> {
        let idle = now.saturating_sub(Duration::from_nanos(known.used_at));
        // It may have begun to look a little later than now.
        if idle + GRAIN >= IDLE && self.collector.is_none() {
            return None;
        }
        if idle > GRAIN {
            // A program may write it at the same time: either is as right.
            let _ = (self.maps.ids).insert(destination, used_at(known.id, now), KNOWN);
        }
        Some(known.id)
    }

    /// An application speaks to whom it had only heard: he is one of its destinations from now on.
    pub fn spoken_to(&mut self, id: u32) {
        self.heard.remove(id);
    }

    fn assigned(&self, destination: &Destination) -> io::Result<Option<Assigned>> {
        found_or_none(self.maps.ids.get(destination, 0)).map_err(io::Error::other)
    }

    /// Ids in use.
    pub fn in_use(&self) -> u64 {
        let given = self.counters.get(&counter::UDP_IDS, 0).unwrap_or_default();
        (given + self.given).saturating_sub(self.collected)
    }

    /// Whether there are so many that idle ones are to be given up.
    pub fn is_crowded(&self) -> bool {
        self.in_use() > MARK || self.heard.has_turned_away()
    }

    /// What gives idle ones up, and the ids that it is to look at, if not all. None while it is at work.
    pub fn collector(&mut self) -> Option<(Collector, Option<Vec<u32>>)> {
        let collector = self.collector.take()?;
        let heard_alone = self.in_use() <= MARK;
        Some((collector, heard_alone.then(|| self.heard.ids())))
    }

    /// It has done its work, and given up these.
    pub fn collected(&mut self, collector: Collector, given_up: &[u32]) {
        self.collector = Some(collector);
        self.collected += given_up.len() as u64;
        self.heard.collected(given_up);
    }

    /// Gives up all that are idle at once. Returns how many there were.
    #[cfg(test)]
    pub fn collect(&mut self, idle: Duration, tables: &[Arc<Tables>]) -> io::Result<usize> {
        let (mut collector, _) = self.collector().expect("nobody else has it");
        let given_up = collector.collect(None, &HashSet::new(), idle, tables)?;
        self.collected(collector, &given_up);
        Ok(given_up.len())
    }
}

impl Collector {
    /// Gives up the ids, all or these (`among`), that have been idle for longer than `idle`, that are not in `busy`, and
    /// that no socket in `tables` is connected to: those of all network namespaces in which the agent is. Takes up to some
    /// 100 ms, and longer where somebody has very many sockets: not for a task's own thread. Returns which there were.
    ///
    /// What is opened meanwhile is not in `busy`: its id was used a moment ago, or a socket is connected to it.
    pub fn collect(
        &mut self,
        among: Option<Vec<u32>>,
        busy: &HashSet<u32>,
        idle: Duration,
        tables: &[Arc<Tables>],
    ) -> io::Result<Vec<u32>> {
        self.collect_but(among, busy, idle, || {
            let mut connected = HashSet::new();
            for tables in tables {
                connected.extend(tables.connected()?);
            }
            Ok(connected)
        })
    }

    /// The same, where `connected` finds the ids that sockets are connected to.
    fn collect_but(
        &mut self,
        among: Option<Vec<u32>>,
        busy: &HashSet<u32>,
        idle: Duration,
        connected: impl FnOnce() -> io::Result<HashSet<u32>>,
    ) -> io::Result<Vec<u32>> {
        // First: a socket that connects behind the back of a long look has used its id since.
        let before = now()?.saturating_sub(idle);
        let connected = connected()?;
        let all = || {
            self.maps
                .destinations
                .keys()
                .filter_map(Result::ok)
                .collect()
        };
        let ids: Vec<u32> = among.unwrap_or_else(all);
        let seen = std::mem::take(&mut self.nameless);
        let mut given_up = Vec::new();
        for id in ids {
            if busy.contains(&id) || connected.contains(&id) {
                continue;
            }
            match self.give_up(id, before, &seen) {
                Ok(true) => given_up.push(id),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(%error, "ids of idle destinations cannot be given up");
                    break;
                }
            }
        }
        Ok(given_up)
    }

    /// Whether it was idle and is given up. Its name goes first, so that whoever asks from now on gets another id. One
    /// that has none goes if it had none the last time (`seen`) either: a program writes first what an id stands for.
    fn give_up(
        &mut self,
        id: u32,
        before: Duration,
        seen: &HashSet<u32>,
    ) -> Result<bool, MapError> {
        let Some(destination) = found_or_none(self.maps.destinations.get(&id, 0))? else {
            return Ok(false);
        };
        let assigned = found_or_none(self.maps.ids.get(&destination, 0))?;
        let Some(used) = assigned.filter(|assigned| assigned.id == id) else {
            if seen.contains(&id) {
                // The programs have never counted it.
                ignore_absent(self.maps.destinations.remove(&id))?;
            } else {
                self.nameless.insert(id);
            }
            return Ok(false);
        };
        if Duration::from_nanos(used.used_at) > before {
            return Ok(false);
        }
        ignore_absent(self.maps.ids.remove(&destination))?;
        ignore_absent(self.maps.destinations.remove(&id))?;
        Ok(true)
    }
}

fn used_at(id: u32, now: Duration) -> Assigned {
    Assigned {
        used_at: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        id,
        pad: 0,
    }
}

fn random() -> io::Result<u32> {
    let mut bytes = [0; 4];
    let drawn = SystemRandom::new().fill(&mut bytes);
    drawn.map_err(|_| io::Error::other("there is no randomness"))?;
    Ok(u32::from_ne_bytes(bytes))
}

/// The programs' clock.
fn now() -> io::Result<Duration> {
    Ok(Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::Capture;
    use crate::capture::gate::words;
    use crate::capture::tests::harness::{capture, everything, in_netns};

    /// The ids of a capture, one of them with what it stands for.
    fn one_id() -> (Capture, Ids, Destination, u32) {
        let (mut capture, _) = capture(&[everything()]);
        let mut ids = capture.take_datagrams().unwrap().ids;
        let destination = Destination {
            addr: words([192, 0, 2, 1].into()),
            port: 53,
            peer: 1,
            cgroup: 1,
            netns_cookie: 1,
        };
        let id = ids.id_for(&destination, 1).unwrap().unwrap();
        (capture, ids, destination, id)
    }

    #[test]
    fn what_is_used_while_sockets_are_looked_at_is_not_given_up() {
        in_netns(async || {
            let (_capture, mut ids, destination, id) = one_id();
            let (mut collector, _) = ids.collector().unwrap();
            let none = HashSet::new();
            let mut collect = |used: bool| {
                collector.collect_but(None, &none, Duration::ZERO, || {
                    // Its socket connects when it has been looked for already.
                    if used {
                        let value = used_at(id, now()?);
                        (ids.maps.ids.insert(destination, value, KNOWN)).unwrap();
                    }
                    Ok(HashSet::new())
                })
            };
            assert!(collect(true).unwrap().is_empty());
            assert_eq!(collect(false).unwrap(), [id]);
        });
    }

    #[test]
    fn what_may_just_be_given_up_is_not_written_again() {
        in_netns(async || {
            let (_capture, mut ids, destination, id) = one_id();
            let long_ago = used_at(id, Duration::ZERO);
            (ids.maps.ids.insert(destination, long_ago, KNOWN)).unwrap();
            let (collector, _) = ids.collector().unwrap();
            assert_eq!(ids.id_for(&destination, 1).unwrap(), None);
            assert_eq!(ids.assigned(&destination).unwrap().unwrap().used_at, 0);
            ids.collected(collector, &[]);
            assert_eq!(ids.id_for(&destination, 1).unwrap(), Some(id));
            assert_ne!(ids.assigned(&destination).unwrap().unwrap().used_at, 0);
        });
    }
}
