//! What a driver does beside its turns without a task of its own: dials of targets, and waits for those who wait for them.
//!
//! Each connection has one. As a task it would be scheduled at its beginning, and tell of its end through a channel; here it is one more source, which is polled when it was woken.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::task::Poll;

use super::ready::Source;
use super::{Driver, Internal, Name};

/// Which one. No two of a driver have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ChoreId(u64);

struct Chore {
    source: Source<Name>,
    /// What it brings is told to the driver, if there is something.
    work: Pin<Box<dyn Future<Output = Option<Internal>> + Send>>,
}

/// Those under way. They end with the driver.
#[derive(Default)]
pub(super) struct Chores {
    under_way: BTreeMap<ChoreId, Chore>,
    begun: u64,
}

impl Chores {
    /// It is not wanted any more.
    pub fn give_up(&mut self, id: ChoreId) {
        self.under_way.remove(&id);
    }

    pub fn source(&self, id: ChoreId) -> Option<&Source<Name>> {
        Some(&self.under_way.get(&id)?.source)
    }
}

impl Driver {
    /// Begins with `work`, in the next turn. It must not block.
    pub(super) fn begin(
        &mut self,
        work: impl Future<Output = Option<Internal>> + Send + 'static,
    ) -> ChoreId {
        let id = ChoreId(self.chores.begun);
        self.chores.begun += 1;
        let chore = Chore {
            source: self.ready.add(Name::Chore(id)),
            work: Box::pin(work),
        };
        self.chores.under_way.insert(id, chore);
        id
    }

    /// Does nothing else until all are done.
    #[cfg(test)]
    pub async fn finish_chores(&mut self) {
        while !self.chores.under_way.is_empty() {
            let name = std::future::poll_fn(|cx| self.ready.poll_next(cx)).await;
            if let Name::Chore(id) = name {
                self.chore_ready(id);
            }
        }
    }

    pub(super) fn chore_ready(&mut self, id: ChoreId) {
        let Some(chore) = self.chores.under_way.get_mut(&id) else {
            return;
        };
        let polled = chore.work.as_mut().poll(&mut chore.source.context());
        if let Poll::Ready(brought) = polled {
            self.chores.give_up(id);
            if let Some(internal) = brought {
                self.handle_internal(internal);
            }
        }
    }
}
