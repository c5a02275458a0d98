//! An allocator that counts what some threads ask of it, and remembers where the first calls came from. For tests alone:
//! `#[global_allocator] static ALLOCATOR: Counting = Counting;`

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Origins that are remembered.
const ORIGINS_MAX: usize = 8;

thread_local! {
    /// Who counts what this thread allocates.
    static WATCH: Cell<Option<&'static Watch>> = const { Cell::new(None) };
}

/// The system's allocator, counted on threads that are watched.
#[derive(Debug)]
pub struct Counting;

/// A count of what threads allocate while it is on.
#[derive(Debug, Default)]
pub struct Watch {
    on: AtomicBool,
    count: AtomicU64,
    origins: Mutex<Vec<Backtrace>>,
}

/// What was asked for.
#[derive(Debug)]
pub struct Counted {
    /// Allocations, those that made one larger included.
    pub count: u64,
    origins: Vec<Backtrace>,
}

impl Counted {
    /// Fails with the first origins if there were more allocations than `most`.
    pub fn assert_at_most(&self, most: u64) {
        let origins: String = self.origins.iter().map(own_lines).collect();
        assert!(
            self.count <= most,
            "{} allocations, at most {most} expected; the first of them from{origins}",
            self.count
        );
    }
}

/// The lines of a backtrace that are this repository's.
fn own_lines(origin: &Backtrace) -> String {
    let text = origin.to_string();
    let own = |line: &&str| line.contains("/session-user/") || line.contains("./src/");
    let lines = text.lines().filter(own).map(str::trim);
    lines.fold("\n".to_owned(), |all, line| format!("{all}\n  {line}"))
}

impl Watch {
    /// A count of no thread yet. It lives as long as the process, since a thread may.
    pub fn new() -> &'static Self {
        Box::leak(Box::default())
    }

    /// What this thread allocates from now on counts, while it is on.
    pub fn join(&'static self) {
        WATCH.set(Some(self));
    }

    /// Counts what the watched threads allocate while `work` goes on.
    pub fn during(&self, work: impl FnOnce()) -> Counted {
        self.count.store(0, Ordering::SeqCst);
        self.on.store(true, Ordering::SeqCst);
        work();
        self.on.store(false, Ordering::SeqCst);
        let mut origins = self.origins.lock().unwrap_or_else(PoisonError::into_inner);
        Counted {
            count: self.count.load(Ordering::SeqCst),
            origins: std::mem::take(&mut *origins),
        }
    }

    fn note(&self) {
        if !self.on.load(Ordering::Relaxed) {
            return;
        }
        let before = self.count.fetch_add(1, Ordering::Relaxed);
        if before < ORIGINS_MAX as u64 {
            let origin = Backtrace::force_capture();
            let mut origins = self.origins.lock().unwrap_or_else(PoisonError::into_inner);
            origins.push(origin);
        }
    }
}

/// Counts what `work` allocates on this thread.
pub fn counted(work: impl FnOnce()) -> Counted {
    let watch = Watch::new();
    watch.join();
    let counted = watch.during(work);
    WATCH.set(None);
    counted
}

fn note() {
    // A thread that ends has no such value any more, and nothing is counted then. What a note allocates is not noted.
    let watch = WATCH.try_with(Cell::take).ok().flatten();
    if let Some(watch) = watch {
        watch.note();
        WATCH.set(Some(watch));
    }
}

// SAFETY: every call goes on to the system's allocator as it came. What `note` itself allocates comes here again, and
// is not noted, as the thread has no watch meanwhile.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on; `pointer` came from the same allocator.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note();
        // SAFETY: the caller's promise is passed on; `pointer` came from the same allocator.
        unsafe { System.realloc(pointer, layout, size) }
    }
}
