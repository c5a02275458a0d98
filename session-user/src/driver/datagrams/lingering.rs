//! Shared sockets whose last flow has ended. They stay for a while: what their application says next is to come from the
//! same port, as it would from its own socket (RFC 4787, REQ-1). They count among the sockets of flows, and go first where
//! there are too many.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::GroupKey;
use crate::dial::DialError;
use crate::driver::Driver;

/// How long one stays.
const LINGER: Duration = Duration::from_secs(30);
/// Those of a session that stay at once; the oldest goes for one more.
const LINGERING_MAX: usize = 32;

/// Those that stay, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Lingering(VecDeque<(Instant, GroupKey)>);

impl Lingering {
    /// One has no flow any more; returns another that goes for it.
    pub fn add(&mut self, key: GroupKey, now: Instant) -> Option<GroupKey> {
        let full = self.0.len() >= LINGERING_MAX;
        let oldest = full.then(|| self.oldest()).flatten();
        self.0.push_back((now, key));
        oldest
    }

    /// One has a flow again.
    pub fn remove(&mut self, key: GroupKey) {
        self.0.retain(|(_, other)| *other != key);
    }

    /// Takes the one that has stayed for longest.
    pub fn oldest(&mut self) -> Option<GroupKey> {
        self.0.pop_front().map(|(_, key)| key)
    }

    /// Takes one that has stayed for long enough.
    pub fn over(&mut self, now: Instant) -> Option<GroupKey> {
        let late = self.deadline()? <= now;
        late.then(|| self.oldest()).flatten()
    }

    /// When the next has stayed for long enough.
    pub fn deadline(&self) -> Option<Instant> {
        self.0.front().map(|(since, _)| *since + LINGER)
    }
}

impl Driver {
    /// Closes the shared sockets that have stayed for long enough.
    pub(in crate::driver) fn end_lingering(&mut self, now: Instant) {
        while let Some(key) = self.datagrams.lingering.over(now) {
            self.datagrams.groups.remove(&key);
        }
    }

    /// Does what needs a socket; where the peer has too many, again without one that nobody uses now.
    pub(super) fn with_room<T>(
        &mut self,
        mut open: impl FnMut() -> Result<T, DialError>,
    ) -> Result<T, DialError> {
        loop {
            match open() {
                Err(DialError::TooMany { target }) => {
                    let Some(key) = self.datagrams.lingering.oldest() else {
                        return Err(DialError::TooMany { target });
                    };
                    self.datagrams.groups.remove(&key);
                }
                done => return done,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dial::exhaust;
    use crate::driver::tests::gateway;
    use session_proto::wire::Target;

    #[tokio::test]
    async fn a_target_that_has_a_name_gets_the_socket_of_one_that_nobody_uses() {
        let peer = "crowded";
        let (mut driver, _near) = gateway(peer, "127.0.0.0/8:9").await;
        let addr = Target::Addr(([127, 0, 0, 1], 9).into());
        for (id, group) in [(0, 1), (2, 2)] {
            driver.flow_opened(id, addr.clone(), Some(group));
            driver.far_over(id);
        }
        assert_eq!(driver.datagrams.lingering.0.len(), 2);
        let _all = exhaust(peer);
        for (id, group) in [(4, None), (6, Some(3)), (8, None)] {
            let name = Target::Name("localhost".to_owned(), 9);
            driver.flow_opened(id, name, group);
            driver.finish_chores().await;
        }
        let open: Vec<_> = driver.datagrams.far.keys().copied().collect();
        assert_eq!(open, [4, 6], "and then there are no more");
        assert!(driver.datagrams.lingering.0.is_empty());
    }

    #[test]
    fn few_stay_and_not_for_long() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let key = GroupKey::of_test;
        let mut lingering = Lingering::default();
        assert_eq!(lingering.deadline(), None);
        for group in 0..3 {
            assert_eq!(lingering.add(key(group), at(group)), None);
        }
        lingering.remove(key(0));
        assert_eq!(lingering.over(at(30)), None);
        assert_eq!(lingering.over(at(31)), Some(key(1)));
        assert_eq!(
            (lingering.over(at(31)), lingering.deadline()),
            (None, Some(at(32)))
        );
        for group in 3..100 {
            lingering.add(key(group), at(31));
        }
        assert_eq!(lingering.0.len(), LINGERING_MAX);
        assert_eq!(lingering.add(key(100), at(31)), Some(key(68)));
    }
}
