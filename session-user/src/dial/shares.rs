//! What peers share: a limit for all of them, and one for each, so that no peer takes what the others need.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

/// Something of which there is so much.
#[derive(Debug)]
pub(super) struct Shares {
    all: Arc<Semaphore>,
    each: usize,
    /// Of those who have some of it, or wait for it.
    peers: Mutex<BTreeMap<String, Weak<Semaphore>>>,
}

/// One of what is shared. Dropping it gives it back.
#[derive(Debug)]
pub struct Share {
    _of_peer: OwnedSemaphorePermit,
    _of_all: OwnedSemaphorePermit,
}

impl Shares {
    /// `all` in sum, `each` for one peer.
    pub fn new(all: usize, each: usize) -> Self {
        Self {
            all: Arc::new(Semaphore::new(all.min(Semaphore::MAX_PERMITS))),
            each: each.min(Semaphore::MAX_PERMITS),
            peers: Mutex::default(),
        }
    }

    /// Waits for one, in the peer's own row first. Cancel-safe. Fails never, as nobody closes the rows.
    pub async fn acquire(&self, peer: &str) -> Result<Share, AcquireError> {
        let of_peer = self.of(peer).acquire_owned().await?;
        let of_all = Arc::clone(&self.all).acquire_owned().await?;
        Ok(Share {
            _of_peer: of_peer,
            _of_all: of_all,
        })
    }

    /// One, if there is one now.
    pub fn try_acquire(&self, peer: &str) -> Option<Share> {
        let of_peer = self.of(peer).try_acquire_owned().ok()?;
        let of_all = Arc::clone(&self.all).try_acquire_owned().ok()?;
        Some(Share {
            _of_peer: of_peer,
            _of_all: of_all,
        })
    }

    /// All that `peer` may have, and nobody else's: whoever tests need not wait for each other.
    #[cfg(test)]
    pub fn exhaust(&self, peer: &str) -> Vec<OwnedSemaphorePermit> {
        let row = self.of(peer);
        std::iter::from_fn(|| Arc::clone(&row).try_acquire_owned().ok()).collect()
    }

    fn of(&self, peer: &str) -> Arc<Semaphore> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = peers.get(peer).and_then(Weak::upgrade) {
            return known;
        }
        peers.retain(|_, row| row.strong_count() > 0);
        let row = Arc::new(Semaphore::new(self.each));
        peers.insert(peer.to_owned(), Arc::downgrade(&row));
        row
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;

    #[tokio::test]
    async fn a_peer_that_has_its_share_waits_and_others_do_not() {
        let shares = Shares::new(3, 2);
        let mut greedy = Vec::new();
        for _ in 0..2 {
            greedy.push(shares.acquire("greedy").await.unwrap());
        }
        let mut waiting = Box::pin(shares.acquire("greedy"));
        assert!(waiting.as_mut().now_or_never().is_none());
        let other = shares.acquire("other").await.unwrap();
        greedy.pop();
        assert!(waiting.as_mut().now_or_never().is_some());
        assert!(shares.try_acquire("third").is_some());
        drop((greedy, other, waiting));
        assert!(shares.try_acquire("third").is_some());
        let _third = shares.acquire("third").await.unwrap();
        assert_eq!(shares.peers.lock().unwrap().len(), 1);
    }
}
