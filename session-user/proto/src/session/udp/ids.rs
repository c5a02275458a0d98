//! Connection ids: what packets are called, on each path something else.

use std::collections::BTreeMap;

use super::PathKey;
use crate::limits::CONNECTIONS_AHEAD;
use crate::seal::Connection;
use crate::session::Session;
use crate::session::datagrams::FlowEvent;
use crate::wire::ConnectionId;

/// Counters of both directions; they begin at 1.
#[derive(Debug, Default)]
pub(super) struct Ids {
    /// The last that a path of this end began with.
    used: u64,
    /// The highest that the peer is known to have seen.
    confirmed: u64,
    /// The highest of the peer's that was seen.
    highest: u64,
    known: BTreeMap<ConnectionId, (u64, Connection)>,
}

impl Ids {
    pub fn known(&self) -> impl Iterator<Item = ConnectionId> + '_ {
        self.known.keys().copied()
    }

    pub fn find(&self, id: ConnectionId) -> Option<(u64, Connection)> {
        self.known.get(&id).copied()
    }

    /// The counter of a path that begins. The peer looks for a certain number ahead of what it has seen:
    /// where nothing was ever answered, the ids of earlier attempts are used again.
    fn next(&mut self) -> u64 {
        self.used = match self.used + 1 {
            next if next > self.confirmed + CONNECTIONS_AHEAD => self.confirmed + 1,
            next => next,
        };
        self.used
    }

    /// Whether the peer still knows `counter`.
    fn is_current(&self, counter: u64) -> bool {
        counter + CONNECTIONS_AHEAD > self.confirmed
    }

    /// The peer has answered to `counter`.
    pub fn confirm(&mut self, counter: u64) {
        self.confirmed = self.confirmed.max(counter);
        self.used = self.used.max(self.confirmed);
    }
}

impl Session {
    /// What this end calls its packets on `key`'s path.
    pub(super) fn connection_on(&mut self, key: PathKey) -> Option<Connection> {
        let path = self.udp.paths.get_mut(&key)?;
        let current = |(counter, _): &(u64, Connection)| self.udp.ids.is_current(*counter);
        if let Some((_, connection)) = path.connection.filter(current) {
            return Some(connection);
        }
        let counter = self.udp.ids.next();
        let connection = self.names.connection(self.role.sends(), counter);
        path.connection = Some((counter, connection));
        Some(connection)
    }

    /// The peer's ids that may come next are those around the highest that has come.
    pub(super) fn recognise_ids(&mut self) {
        let highest = self.udp.ids.highest;
        let last = highest + CONNECTIONS_AHEAD;
        let first = highest.saturating_sub(CONNECTIONS_AHEAD).max(1);
        let known = &mut self.udp.ids.known;
        known.retain(|_, (counter, _)| *counter >= first);
        let have = known.values().map(|(counter, _)| *counter).max();
        let from = have.map_or(first, |h| h + 1);
        if from > last {
            return;
        }
        for counter in from..=last {
            let connection = self.names.connection(self.role.receives(), counter);
            known.insert(connection.id, (counter, connection));
        }
        self.datagrams
            .events
            .push_back(FlowEvent::ConnectionIdsChanged);
    }

    /// An authentic packet came under the peer's `counter`.
    pub(super) fn saw_id(&mut self, counter: u64) {
        if counter > self.udp.ids.highest {
            self.udp.ids.highest = counter;
            self.recognise_ids();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sender_never_runs_ahead_of_what_its_peer_looks_for() {
        let mut ids = Ids::default();
        for round in 0..200 {
            let counter = ids.next();
            assert!((1..=CONNECTIONS_AHEAD).contains(&counter), "{round}");
        }
        ids.confirm(9);
        let all: Vec<u64> = (0..CONNECTIONS_AHEAD).map(|_| ids.next()).collect();
        assert!(all.iter().all(|c| (10..=9 + CONNECTIONS_AHEAD).contains(c)));
        ids.confirm(30);
        assert!(ids.is_current(30) && ids.is_current(1));
        ids.confirm(33);
        assert!(!ids.is_current(1) && ids.is_current(2));
    }
}
