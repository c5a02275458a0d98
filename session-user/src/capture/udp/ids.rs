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

/// The programs' tables of ids.
pub struct Ids {
    ids: HashMap<MapData, Destination, Assigned>,
    destinations: HashMap<MapData, u32, Destination>,
    /// The programs' counters, by a descriptor of our own.
    counters: Array<MapData, u64>,
    /// Ids that were given up.
    collected: u64,
    /// Ids that were given here, and not by the programs.
    given: u64,
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
    /// Takes the maps.
    pub fn new(
        ids: HashMap<MapData, Destination, Assigned>,
        destinations: HashMap<MapData, u32, Destination>,
        counters: Array<MapData, u64>,
    ) -> Self {
        Self {
            ids,
            destinations,
            counters,
            collected: 0,
            given: 0,
            nameless: HashSet::new(),
        }
    }

    /// What an id stands for; `None` if it was given up, or never given.
    pub fn destination(&self, id: u32) -> Result<Option<Destination>, MapError> {
        found_or_none(self.destinations.get(&id, 0))
    }

    /// Gives an id by hand.
    #[cfg(test)]
    pub fn assign(&mut self, id: u32, destination: &Destination) -> Result<(), MapError> {
        self.destinations.insert(id, destination, 0)
    }

    /// The id of a destination, drawn now if it has none, as the programs draw one for whom an application speaks to.
    /// None where idle ones are to be given up: those come first.
    pub fn id_for(&mut self, destination: &Destination) -> io::Result<Option<u32>> {
        let now = now()?;
        if let Some(known) = self.assigned(destination)? {
            let used = Duration::from_nanos(known.used_at);
            if now.saturating_sub(used) > GRAIN {
                // A program may write it at the same time: either is as right.
                let _ = self.ids.insert(destination, used_at(known.id, now), KNOWN);
            }
            return Ok(Some(known.id));
        }
        if self.is_crowded() {
            return Ok(None);
        }
        for _ in 0..DRAWS {
            let Some(id) = id_of(&id_address(random()?, &destination.addr)) else {
                return Ok(None);
            };
            if self.destinations.insert(id, destination, NEW).is_err() {
                continue;
            }
            if (self.ids.insert(destination, used_at(id, now), NEW)).is_ok() {
                self.given += 1;
                return Ok(Some(id));
            }
            // A program was first, or there is no room.
            ignore_absent(self.destinations.remove(&id)).map_err(io::Error::other)?;
            return Ok(self.assigned(destination)?.map(|known| known.id));
        }
        Ok(None)
    }

    fn assigned(&self, destination: &Destination) -> io::Result<Option<Assigned>> {
        found_or_none(self.ids.get(destination, 0)).map_err(io::Error::other)
    }

    /// Ids in use.
    pub fn in_use(&self) -> u64 {
        let given = self.counters.get(&counter::UDP_IDS, 0).unwrap_or_default();
        (given + self.given).saturating_sub(self.collected)
    }

    /// Whether there are so many that idle ones are to be given up.
    pub fn is_crowded(&self) -> bool {
        self.in_use() > MARK
    }

    /// Gives up the ids that have been idle for longer than `idle`, that are not in `busy`, and that no socket in `tables`
    /// is connected to: those of all network namespaces in which the agent is. Takes up to some 100 ms: not for a task's
    /// own thread. Returns how many there were.
    pub fn collect(
        &mut self,
        busy: &HashSet<u32>,
        idle: Duration,
        tables: &[Arc<Tables>],
    ) -> io::Result<u64> {
        let mut connected = HashSet::new();
        for tables in tables {
            connected.extend(tables.connected()?);
        }
        let before = now()?.saturating_sub(idle);
        let ids: Vec<u32> = self.destinations.keys().filter_map(Result::ok).collect();
        let seen = std::mem::take(&mut self.nameless);
        let mut count = 0;
        for id in ids {
            if busy.contains(&id) || connected.contains(&id) {
                continue;
            }
            let given = self.give_up(id, before, &seen);
            count += u64::from(given.map_err(io::Error::other)?);
        }
        self.collected += count;
        Ok(count)
    }

    /// Whether it was idle and is given up. Its name goes first, so that whoever asks from now on gets another id. One
    /// that has none goes if it had none the last time (`seen`) either: a program writes first what an id stands for.
    fn give_up(
        &mut self,
        id: u32,
        before: Duration,
        seen: &HashSet<u32>,
    ) -> Result<bool, MapError> {
        let Some(destination) = self.destination(id)? else {
            return Ok(false);
        };
        let assigned = found_or_none(self.ids.get(&destination, 0))?;
        let Some(used) = assigned.filter(|assigned| assigned.id == id) else {
            if seen.contains(&id) {
                // The programs have never counted it.
                ignore_absent(self.destinations.remove(&id))?;
            } else {
                self.nameless.insert(id);
            }
            return Ok(false);
        };
        if Duration::from_nanos(used.used_at) > before {
            return Ok(false);
        }
        ignore_absent(self.ids.remove(&destination))?;
        ignore_absent(self.destinations.remove(&id))?;
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
