//! The compiled rules in the kernel's maps, and how they are replaced while connections are made.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    os::fd::AsFd as _,
    sync::Arc,
};

use aya::{
    Ebpf, Pod,
    maps::{Array, LpmTrie, Map, MapData, MapError, lpm_trie::Key},
};
use ipnet::{Ipv4Net, Ipv6Net};
use session_ebpf_common::{POLICY_SLOTS, Policy, PortRule};

use super::{CaptureError, policy::Compiled, rule::Question};

/// The rules as the kernel has them now.
pub struct Tables {
    prefixes4: LpmTrie<MapData, [u8; 4], u32>,
    prefixes6: LpmTrie<MapData, [u8; 16], u32>,
    policies: Array<MapData, Policy>,
    live: Compiled,
    /// Slot of each policy in `live`.
    slots: HashMap<Arc<Policy>, u32>,
}

impl Tables {
    /// Takes the maps, which are still empty.
    pub fn new(ebpf: &mut Ebpf) -> Result<Self, CaptureError> {
        Ok(Self {
            prefixes4: take(ebpf, "PREFIXES4")?,
            prefixes6: take(ebpf, "PREFIXES6")?,
            policies: take(ebpf, "POLICIES")?,
            live: Compiled::default(),
            slots: HashMap::new(),
        })
    }

    /// New policies go to free slots, then prefixes are pointed at them, then stale prefixes go: a connect in between
    /// sees either the old or the new policy of its prefix, never a mixture.
    pub fn apply(&mut self, new: Compiled) -> Result<(), MapError> {
        let slots = self.place(&new)?;
        for (net, policy) in &new.v4 {
            self.prefixes4.insert(&key4(net), slots[policy], 0)?;
        }
        for (net, policy) in &new.v6 {
            self.prefixes6.insert(&key6(net), slots[policy], 0)?;
        }
        for net in self.live.v4.keys().filter(|net| !new.v4.contains_key(net)) {
            ignore_absent(self.prefixes4.remove(&key4(net)))?;
        }
        for net in self.live.v6.keys().filter(|net| !new.v6.contains_key(net)) {
            ignore_absent(self.prefixes6.remove(&key6(net)))?;
        }
        self.slots = slots;
        self.live = new;
        Ok(())
    }

    /// What the programs decide about a destination: read from the kernel's own tables.
    pub fn decide(&self, question: &Question) -> Result<Option<PortRule>, MapError> {
        let found = match question.to.ip().to_canonical() {
            IpAddr::V4(addr) => self.prefixes4.get(&key(32, addr.octets()), 0),
            IpAddr::V6(addr) => self.prefixes6.get(&key(128, addr.octets()), 0),
        };
        let Some(slot) = found_or_none(found)? else {
            return Ok(None);
        };
        let policy = self.policies.get(&slot, 0)?;
        Ok(policy.decide(question.to.port(), question.uid, question.protocol.bit()))
    }

    /// Slots for the policies of `new`; those that live already keep theirs.
    fn place(&mut self, new: &Compiled) -> Result<HashMap<Arc<Policy>, u32>, MapError> {
        let taken: HashSet<u32> = self.slots.values().copied().collect();
        let mut free = (0..POLICY_SLOTS).filter(|slot| !taken.contains(slot));
        let mut slots = HashMap::new();
        for policy in new.v4.values().chain(new.v6.values()) {
            if slots.contains_key(policy) {
                continue;
            }
            let slot = match self.slots.get(policy) {
                Some(slot) => *slot,
                None => {
                    let slot = free.next().ok_or(MapError::OutOfBounds {
                        index: POLICY_SLOTS,
                        max_entries: POLICY_SLOTS,
                    })?;
                    self.policies.set(slot, **policy, 0)?;
                    slot
                }
            };
            slots.insert(Arc::clone(policy), slot);
        }
        Ok(slots)
    }
}

fn key4(net: &Ipv4Net) -> Key<[u8; 4]> {
    key(net.prefix_len(), net.addr().octets())
}

fn key6(net: &Ipv6Net) -> Key<[u8; 16]> {
    key(net.prefix_len(), net.addr().octets())
}

fn key<K: Pod>(len: u8, octets: K) -> Key<K> {
    Key::new(u32::from(len), octets)
}

/// An earlier update that failed half-way may have removed it already.
pub(super) fn ignore_absent(result: Result<(), MapError>) -> Result<(), MapError> {
    found_or_none(result).map(drop)
}

/// A key that is not there is no error.
pub(super) fn found_or_none<T>(result: Result<T, MapError>) -> Result<Option<T>, MapError> {
    match result {
        Err(MapError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
        {
            Ok(None)
        }
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(None),
        other => other.map(Some),
    }
}

/// A map by another descriptor.
pub(super) fn again<T: TryFrom<Map, Error = MapError>>(
    ebpf: &Ebpf,
    name: &'static str,
) -> Result<T, CaptureError> {
    let (map, of): (_, fn(MapData) -> Map) = match ebpf.map(name) {
        Some(Map::Array(map)) => (map, Map::Array),
        Some(Map::HashMap(map)) => (map, Map::HashMap),
        _ => {
            let unknown = MapError::InvalidName {
                name: name.to_owned(),
            };
            return Err(CaptureError::map("opening an eBPF map once more", unknown));
        }
    };
    let fd = map.fd().as_fd().try_clone_to_owned();
    let fd = fd.map_err(|source| CaptureError::Runtime {
        what: "open an eBPF map once more",
        source,
    })?;
    let opened = MapData::from_fd(fd).and_then(|data| T::try_from(of(data)));
    opened.map_err(|error| CaptureError::map("opening an eBPF map once more", error))
}

/// Takes a map out of the object, as the type that it must have.
pub(super) fn take<M: TryFrom<Map, Error = MapError>>(
    ebpf: &mut Ebpf,
    name: &str,
) -> Result<M, CaptureError> {
    let missing = || MapError::InvalidName {
        name: name.to_owned(),
    };
    let map = ebpf
        .take_map(name)
        .ok_or_else(missing)
        .and_then(M::try_from);
    map.map_err(|error| CaptureError::map(format!("opening the eBPF map {name}"), error))
}
