//! The ids of destinations: what they stand for, and which are given up when there are many.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use aya::maps::{Array, HashMap, MapData, MapError};
use nix::time::{ClockId, clock_gettime};
use session_ebpf_common::{Assigned, Destination, UDP_IDS_MAX, counter, id_of};

use super::super::gate::words;
use super::super::tables::{found_or_none, ignore_absent};

/// Ids in use from which on idle ones are given up.
const MARK: u64 = UDP_IDS_MAX as u64 / 2;
/// How long an id must be idle for that.
pub const IDLE: Duration = Duration::from_secs(60);

/// The programs' tables of ids.
pub struct Ids {
    ids: HashMap<MapData, Destination, Assigned>,
    destinations: HashMap<MapData, u32, Destination>,
    /// The programs' counters, by a descriptor of our own.
    counters: Array<MapData, u64>,
    /// Ids that were given up.
    collected: u64,
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

    /// Ids in use.
    pub fn in_use(&self) -> u64 {
        let given = self.counters.get(&counter::UDP_IDS, 0).unwrap_or_default();
        given.saturating_sub(self.collected)
    }

    /// Whether there are so many that idle ones are to be given up.
    pub fn is_crowded(&self) -> bool {
        self.in_use() > MARK
    }

    /// Gives up the ids that have been idle for longer than `idle`, that are not in `busy`, and that no socket is connected to. Takes up
    /// to some 100 ms: not for a task's own thread. Returns how many there were.
    pub fn collect(&mut self, busy: &HashSet<u32>, idle: Duration) -> io::Result<u64> {
        let connected = connected()?;
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

/// The programs' clock.
fn now() -> io::Result<Duration> {
    Ok(Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?))
}

/// Ids of the destinations that UDP sockets of this network namespace are connected to. A connected socket may be silent
/// for as long as it likes.
fn connected() -> io::Result<HashSet<u32>> {
    let mut found = HashSet::new();
    for table in ["udp", "udp6"] {
        let text = match fs::read_to_string(format!("/proc/thread-self/net/{table}")) {
            Ok(text) => text,
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let remotes = text.lines().filter_map(ends);
        found.extend(remotes.filter_map(|(_, remote)| id_of(&words(remote.ip()))));
    }
    Ok(found)
}

/// The local and the remote end in a line of /proc/net/udp or udp6 (`udp4_format_sock` in the kernel's net/ipv4/udp.c).
pub fn ends(line: &str) -> Option<(SocketAddr, SocketAddr)> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    Some((end(fields.next()?)?, end(fields.next()?)?))
}

/// Words as this host stores them, in hexadecimal, and a port.
fn end(field: &str) -> Option<SocketAddr> {
    let (addr, port) = field.split_once(':')?;
    let word = |at: usize| u32::from_str_radix(addr.get(at * 8..at * 8 + 8)?, 16).ok();
    let ip: IpAddr = match addr.len() {
        8 => IpAddr::V4(word(0)?.to_ne_bytes().into()),
        32 => {
            let mut bytes = [0; 16];
            for (at, chunk) in bytes.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(at)?.to_ne_bytes());
            }
            IpAddr::V6(bytes.into())
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connected_socket_is_seen() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect("127.128.18.52:9").unwrap();
        assert!(connected().unwrap().contains(&0x1234));
    }

    #[test]
    fn lines_that_are_none_are_passed_over() {
        let head = "   sl  local_address rem_address   st tx_queue";
        assert_eq!(ends(head), None);
        assert_eq!(ends(""), None);
        let v6 =
            "  1: 00000000000000000000000001000000:C350 B80D0120000000000000000001000000:0035 07";
        if cfg!(target_endian = "little") {
            let (local, remote) = ends(v6).unwrap();
            assert_eq!(local, "[::1]:50000".parse().unwrap());
            assert_eq!(remote, "[2001:db8::1]:53".parse().unwrap());
        }
    }
}
