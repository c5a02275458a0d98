//! How many UDP associations there are: each has a port, and lasts as long as its client's connection.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Associations of this process.
const PLACES_MAX: usize = 1024;
/// Of these, for one client address at one door. All programs of this host have one address.
const OF_CLIENT_MAX: usize = 256;

/// Associations by door and client.
#[derive(Debug)]
pub(super) struct Places(Mutex<Option<HashMap<Key, usize>>>);

type Key = (String, IpAddr);

/// The place of one association. Dropping it makes room for another.
#[derive(Debug)]
pub(super) struct Place<'a> {
    places: &'a Places,
    key: Key,
}

impl Places {
    /// None taken.
    pub const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// A place for `client` at the door `at`, if there is one.
    pub fn take(&self, at: String, client: IpAddr) -> Option<Place<'_>> {
        let key = (at, client.to_canonical());
        let mut taken = self.lock();
        let taken = taken.get_or_insert_default();
        let of_client = taken.get(&key).copied().unwrap_or(0);
        if of_client >= OF_CLIENT_MAX || taken.values().sum::<usize>() >= PLACES_MAX {
            return None;
        }
        taken.insert(key.clone(), of_client + 1);
        Some(Place { places: self, key })
    }

    fn lock(&self) -> MutexGuard<'_, Option<HashMap<Key, usize>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        let taken = taken.get_or_insert_default();
        if let Some(count) = taken.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_client_takes_all_places_and_they_come_back() {
        let places = Places::new();
        let take = |client: u8| {
            let ip = IpAddr::from([192, 0, 2, client]);
            std::iter::from_fn(|| places.take("a door".to_owned(), ip)).collect::<Vec<_>>()
        };
        let first = take(1);
        assert_eq!(first.len(), OF_CLIENT_MAX);
        let others: Vec<_> = (2..10).map(take).collect();
        let taken: usize = others.iter().map(Vec::len).sum();
        assert_eq!(taken, PLACES_MAX - OF_CLIENT_MAX);
        drop((first, others));
        assert!(places.lock().as_ref().is_some_and(HashMap::is_empty));
    }
}
