//! Threads that drive sessions, each with a runtime of its own.
//!
//! A session stays on one thread with all its sockets. So no other thread has to tell it what these have, and it may look
//! for that itself before the thread sleeps (`driver/busy.rs`): in a runtime of several threads another one may be the one
//! that looks.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use tokio::runtime::{Builder, Handle};
use tokio::sync::{mpsc, oneshot};

/// The threads; they end when this is dropped, and what runs there ends with them.
pub struct Workers {
    places: Places,
    threads: Vec<Thread>,
    ended: mpsc::UnboundedReceiver<()>,
}

struct Thread {
    /// Dropped: the thread is to end.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Tells that a thread has ended, however it did.
struct Ended(mpsc::UnboundedSender<()>);

impl Drop for Ended {
    fn drop(&mut self) {
        // Nobody listens where it was told to end.
        let _ = self.0.send(());
    }
}

/// Where sessions may go. Cheap to clone.
#[derive(Clone)]
pub struct Places {
    workers: Arc<[Worker]>,
}

struct Worker {
    runtime: Handle,
    /// How many [`Place`]s are taken here.
    taken: Arc<AtomicUsize>,
}

/// A place on one of the threads, given back when it is dropped.
pub struct Place {
    runtime: Handle,
    taken: Arc<AtomicUsize>,
}

impl Workers {
    /// Starts `count` threads, at least one; each begins with `on_start`. An error is the system's: no threads, or no descriptors. Not from within a
    /// runtime, where a runtime whose thread cannot be started must not be dropped.
    pub fn start(count: usize, on_start: impl Fn() + Clone + Send + 'static) -> io::Result<Self> {
        let mut threads: Vec<Thread> = Vec::new();
        let (end, ended) = mpsc::unbounded_channel();
        let mut workers = Vec::new();
        for index in 0..count.max(1) {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            workers.push(Worker {
                runtime: runtime.handle().clone(),
                taken: Arc::default(),
            });
            let (stop, stopped) = oneshot::channel();
            let told = Ended(end.clone());
            let on_start = on_start.clone();
            let thread = std::thread::Builder::new()
                .name(format!("sessions-{index}"))
                .spawn(move || {
                    let _told = told;
                    on_start();
                    // An error says that the sender is gone, which is what is waited for.
                    let _ = runtime.block_on(stopped);
                    runtime.shutdown_background();
                })?;
            threads.push(Thread {
                stop: Some(stop),
                thread: Some(thread),
            });
        }
        Ok(Self {
            places: Places {
                workers: workers.into(),
            },
            threads,
            ended,
        })
    }

    /// Ready once a thread has ended, which it does only by a fault: nothing is driven there any more.
    pub async fn failed(&mut self) {
        // There is a sender in each thread.
        let _ = self.ended.recv().await;
    }

    /// Where sessions may go.
    pub fn places(&self) -> Places {
        self.places.clone()
    }
}

impl Drop for Workers {
    /// Tells all before it waits for any.
    fn drop(&mut self) {
        for thread in &mut self.threads {
            drop(thread.stop.take());
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        drop(self.stop.take());
        // A panic was printed where it happened.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Places {
    /// The runtime of the thread where the first session goes.
    pub fn first(&self) -> &Handle {
        &self.workers[0].runtime
    }

    /// A place on the thread where the fewest are taken.
    pub fn take(&self) -> Place {
        let fewest = self
            .workers
            .iter()
            .min_by_key(|worker| worker.taken.load(Ordering::Relaxed));
        // There is at least one.
        let worker = fewest.unwrap_or(&self.workers[0]);
        worker.taken.fetch_add(1, Ordering::Relaxed);
        Place {
            runtime: worker.runtime.clone(),
            taken: Arc::clone(&worker.taken),
        }
    }
}

impl Place {
    /// The runtime of its thread.
    pub fn runtime(&self) -> &Handle {
        &self.runtime
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name_of_thread(place: &Place) -> String {
        let name = place
            .runtime()
            .spawn(async { std::thread::current().name().map(str::to_owned) });
        Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(name)
            .unwrap()
            .unwrap()
    }

    #[test]
    fn places_are_taken_where_the_fewest_are() {
        let workers = Workers::start(3, || {}).unwrap();
        let places = workers.places();
        let taken: Vec<Place> = (0..6).map(|_| places.take()).collect();
        let names: Vec<String> = taken.iter().map(name_of_thread).collect();
        let on = |index: usize| {
            names
                .iter()
                .filter(|n| **n == format!("sessions-{index}"))
                .count()
        };
        assert_eq!([on(0), on(1), on(2)], [2, 2, 2]);
        let second = names[1].clone();
        let left: Vec<Place> = taken
            .into_iter()
            .zip(&names)
            .filter_map(|(place, name)| (*name != second).then_some(place))
            .collect();
        assert_eq!(name_of_thread(&places.take()), second);
        drop(left);
    }

    #[test]
    fn a_thread_that_fails_is_told_of() {
        let own = Builder::new_current_thread().enable_all().build().unwrap();
        let mut workers = Workers::start(2, || {}).unwrap();
        let soon = std::time::Duration::from_millis(50);
        let none = own.block_on(async { tokio::time::timeout(soon, workers.failed()).await });
        assert!(none.is_err());
        let mut workers = Workers::start(2, || {
            let here = std::thread::current();
            assert_ne!(here.name(), Some("sessions-1"), "as a fault does");
        })
        .unwrap();
        own.block_on(workers.failed());
    }

    #[test]
    fn what_runs_ends_with_the_threads() {
        struct Ends(std::sync::mpsc::Sender<()>);
        impl Drop for Ends {
            fn drop(&mut self) {
                self.0.send(()).unwrap();
            }
        }
        let workers = Workers::start(2, || {}).unwrap();
        let place = workers.places().take();
        let (ends, ended) = std::sync::mpsc::channel();
        let ends = Ends(ends);
        place.runtime().spawn(async move {
            let _ends = ends;
            std::future::pending::<()>().await;
        });
        drop(workers);
        ended.try_recv().unwrap();
    }
}
