//! Which of a driver's many sockets can be read or written.
//!
//! One task owns a session and all its sockets, so that nothing is handed between tasks or locked
//! per record. Each socket gets a waker of its own that remembers its name; the task is woken once
//! and asks for the names.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;

/// Names of sources that may have become ready, in the order in which they did.
#[derive(Debug)]
pub struct ReadySet<T> {
    shared: Arc<Shared<T>>,
}

#[derive(Debug)]
struct Shared<T> {
    queue: Mutex<VecDeque<Arc<Entry<T>>>>,
    task: AtomicWaker,
}

impl<T> Shared<T> {
    fn queue(&self) -> MutexGuard<'_, VecDeque<Arc<Entry<T>>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Entry<T> {
    name: T,
    /// It comes before those that are queued already.
    first: bool,
    queued: AtomicBool,
    shared: Arc<Shared<T>>,
}

impl<T> Entry<T> {
    /// False: it was queued already.
    fn enqueue(self: &Arc<Self>, first: bool) -> bool {
        if self.queued.swap(true, Ordering::AcqRel) {
            return false;
        }
        let mut queue = self.shared.queue();
        if first {
            queue.push_front(Arc::clone(self));
        } else {
            queue.push_back(Arc::clone(self));
        }
        true
    }

    fn wake_task(self: &Arc<Self>) {
        if self.enqueue(self.first) {
            self.shared.task.wake();
        }
    }
}

impl<T: Send + Sync> Wake for Entry<T> {
    fn wake(self: Arc<Self>) {
        self.wake_task();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.wake_task();
    }
}

/// A source's place in a [`ReadySet`].
#[derive(Debug, Clone)]
pub struct Source<T> {
    entry: Arc<Entry<T>>,
    waker: Waker,
}

impl<T: Send + Sync + 'static> Source<T> {
    /// A context whose waker names this source: poll the socket with it to be told.
    pub fn context(&self) -> Context<'_> {
        Context::from_waker(&self.waker)
    }

    /// Puts the source in the queue, behind those that are ready: there is more to do for it. For the task that asks for
    /// names next: it is not woken.
    pub fn requeue(&self) {
        self.entry.enqueue(self.entry.first);
    }

    /// Puts the source back in front of all that are ready: its name was taken, and nothing was done about it.
    pub fn put_back(&self) {
        self.entry.enqueue(true);
    }
}

impl<T: Copy + Send + Sync + 'static> ReadySet<T> {
    /// An empty set.
    pub fn new() -> Self {
        Self {
            shared: Arc::new(Shared {
                queue: Mutex::default(),
                task: AtomicWaker::new(),
            }),
        }
    }

    /// Adds a source, which is ready at first: poll it to find out. For the task that asks for names next: it is not woken.
    pub fn add(&self, name: T) -> Source<T> {
        self.add_entry(name, false)
    }

    /// The same for one that always comes before the others.
    pub fn add_first(&self, name: T) -> Source<T> {
        self.add_entry(name, true)
    }

    fn add_entry(&self, name: T, first: bool) -> Source<T> {
        let entry = Arc::new(Entry {
            name,
            first,
            queued: AtomicBool::new(false),
            shared: Arc::clone(&self.shared),
        });
        let waker = Waker::from(Arc::clone(&entry));
        entry.enqueue(first);
        Source { entry, waker }
    }

    /// The next ready source. A source that became ready again meanwhile comes again.
    pub fn poll_next(&self, cx: &mut Context<'_>) -> Poll<T> {
        self.shared.task.register(cx.waker());
        match self.try_next() {
            Some(name) => Poll::Ready(name),
            None => Poll::Pending,
        }
    }

    /// [`Self::poll_next`] without waiting.
    pub fn try_next(&self) -> Option<T> {
        let entry = self.shared.queue().pop_front()?;
        // Cleared before the source is polled: a wake during the poll must not be lost.
        entry.queued.store(false, Ordering::Release);
        Some(entry.name)
    }

    /// How many sources are queued.
    pub fn len(&self) -> usize {
        self.shared.queue().len()
    }

    /// Whether no source is queued.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T: Copy + Send + Sync + 'static> Default for ReadySet<T> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    #[tokio::test]
    async fn each_wake_names_its_source_once() {
        let set = ReadySet::new();
        let one = set.add(1);
        let two = set.add(2);
        assert_eq!(set.try_next(), Some(1));
        assert_eq!(set.try_next(), Some(2));
        assert_eq!(set.try_next(), None);
        two.context().waker().wake_by_ref();
        two.context().waker().wake_by_ref();
        one.requeue();
        assert_eq!(poll_fn(|cx| set.poll_next(cx)).await, 2);
        assert_eq!(poll_fn(|cx| set.poll_next(cx)).await, 1);
        assert_eq!(set.try_next(), None);
    }

    #[tokio::test]
    async fn one_that_comes_first_comes_before_those_that_wait_already() {
        let set = ReadySet::new();
        let _sockets = [set.add(1), set.add(2)];
        let first = set.add_first(0);
        assert_eq!(set.try_next(), Some(0));
        assert_eq!(set.try_next(), Some(1));
        first.context().waker().wake_by_ref();
        assert_eq!(poll_fn(|cx| set.poll_next(cx)).await, 0);
        assert_eq!(poll_fn(|cx| set.poll_next(cx)).await, 2);
    }

    #[tokio::test]
    async fn one_that_is_put_back_keeps_its_place() {
        let set = ReadySet::new();
        let (busy, other, third) = (set.add(1), set.add(2), set.add(3));
        assert_eq!(set.try_next(), Some(1));
        busy.requeue();
        assert_eq!(set.try_next(), Some(2));
        other.put_back();
        assert_eq!(set.try_next(), Some(2));
        assert_eq!(set.try_next(), Some(3));
        third.put_back();
        assert_eq!(set.try_next(), Some(3));
        assert_eq!(set.try_next(), Some(1));
    }

    #[tokio::test]
    async fn a_wake_from_another_thread_reaches_the_waiting_task() {
        let set = ReadySet::new();
        let source = set.add(7);
        assert_eq!(set.try_next(), Some(7));
        let thread = std::thread::spawn(move || source.context().waker().wake_by_ref());
        assert_eq!(poll_fn(|cx| set.poll_next(cx)).await, 7);
        thread.join().unwrap();
    }
}
