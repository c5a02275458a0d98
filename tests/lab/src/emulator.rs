//! What networks do to packets: delay, jitter, loss, rate, reordering, and a small MTU that
//! nobody is told of.
//!
//! Packets that the router forwards wait in the kernel (NFQUEUE) until they are due; this needs no
//! queueing discipline that a kernel may lack. Each direction of each link has its own shape, which
//! can be changed while packets are under way.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::EventFd;
use nix::sys::time::TimeSpec;

use crate::nfqueue::{Queues, Waiting};

/// What one direction of a link does to packets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// How long each packet is under way.
    pub delay: Duration,
    /// Up to this much is added at random; the order is kept.
    pub jitter: Duration,
    /// Part of the packets that is lost, 0 to 1.
    pub loss: f64,
    /// Part of the packets that is not delayed, and so overtakes the others, 0 to 1.
    pub reorder: f64,
    /// Mbit/s, if limited.
    pub rate_mbit: Option<f64>,
    /// How long the queue before the limited rate may become; what comes beyond is lost.
    pub backlog: Duration,
    /// Packets larger than this many bytes (from the IP header on) vanish without a word.
    pub mtu: Option<usize>,
    /// Nothing comes through.
    pub hole: Hole,
}

/// Where a direction swallows everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hole {
    /// Nowhere.
    #[default]
    None,
    /// At its beginning: what is under way still arrives.
    Entry,
    /// At its end: what is under way does not.
    Exit,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: 0.0,
            reorder: 0.0,
            rate_mbit: None,
            backlog: Duration::from_millis(50),
            mtu: None,
            hole: Hole::None,
        }
    }
}

/// How late packets were let go, in steps of [`LATENESS_STEP`]; the last holds all beyond.
const LATENESS_STEPS: usize = 200;
const LATENESS_STEP: Duration = Duration::from_micros(50);

/// What the emulator and its owner share.
struct Shared {
    shapes: Mutex<Vec<Shape>>,
    lateness: Vec<AtomicU64>,
    ending: AtomicBool,
}

impl Shared {
    fn shapes(&self) -> MutexGuard<'_, Vec<Shape>> {
        self.shapes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread that holds packets back. Dropping it lets go of what it holds.
pub(crate) struct Emulator {
    shared: Arc<Shared>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Emulator {
    /// Takes over queues 0 to `queues` - 1. `start` runs the job on a thread of the right namespace.
    pub fn start(
        queues: u16,
        start: impl FnOnce(Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            shapes: Mutex::new(vec![Shape::default(); usize::from(queues)]),
            lateness: (0..=LATENESS_STEPS).map(|_| AtomicU64::new(0)).collect(),
            ending: AtomicBool::new(false),
        });
        let wake = Arc::new(EventFd::new()?);
        let (woken, theirs) = (Arc::clone(&wake), Arc::clone(&shared));
        let (ready, made) = std::sync::mpsc::channel();
        let job = move || {
            let numbers: Vec<u16> = (0..queues).collect();
            let opened = Queues::open(&numbers);
            let result = opened.as_ref().map(|_| ()).map_err(|e| e.kind());
            // Whoever started the thread waits for this.
            let _ = ready.send(result);
            if let Ok(queues) = opened {
                let lines = numbers.iter().map(|&n| Line::new(n)).collect();
                Worker {
                    shared: theirs,
                    queues,
                    lines,
                    due: BinaryHeap::new(),
                    number: 0,
                }
                .run(&woken);
            }
        };
        let thread = start(Box::new(job))?;
        made.recv().map_err(io::Error::other)??;
        Ok(Self {
            shared,
            wake,
            thread: Some(thread),
        })
    }

    /// Gives a queue another shape, for the packets to come.
    pub fn shape(&self, queue: u16, shape: Shape) {
        self.shared.shapes()[usize::from(queue)] = shape;
    }

    /// Opens or closes a hole in a queue; it concerns packets under way, too.
    pub fn hole(&self, queue: u16, hole: Hole) {
        self.shared.shapes()[usize::from(queue)].hole = hole;
    }

    /// How late packets were let go since the last call: the 99th percentile. 10 ms stands for
    /// anything above.
    pub fn lateness_p99(&self) -> Duration {
        let counts: Vec<u64> = self
            .shared
            .lateness
            .iter()
            .map(|c| c.swap(0, Ordering::Relaxed))
            .collect();
        let beyond: u64 = counts.iter().sum::<u64>() / 100;
        let mut above = 0;
        for (step, count) in counts.iter().enumerate().rev() {
            above += count;
            if above > beyond {
                return LATENESS_STEP * u32::try_from(step).unwrap_or(u32::MAX);
            }
        }
        Duration::ZERO
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Release);
        // The counter cannot overflow: it is written once.
        let _ = self.wake.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed already.
            let _ = thread.join();
        }
    }
}

/// One direction of one link.
struct Line {
    random: Random,
    /// When the limited rate is free again.
    free_at: Option<Instant>,
    /// When the latest packet is due: the order is kept.
    last_due: Option<Instant>,
}

impl Line {
    fn new(number: u16) -> Self {
        Self {
            random: Random(0x9e37_79b9_7f4a_7c15 ^ u64::from(number) << 32),
            free_at: None,
            last_due: None,
        }
    }

    /// When a packet that comes `now` is due; `None`: it is lost.
    fn due(&mut self, shape: &Shape, bytes: usize, now: Instant) -> Option<Instant> {
        if shape.mtu.is_some_and(|mtu| bytes > mtu) || self.random.one_in(shape.loss) {
            return None;
        }
        let mut out = now;
        if let Some(rate) = shape.rate_mbit {
            let begins = self.free_at.map_or(now, |free| free.max(now));
            if begins > now + shape.backlog {
                return None;
            }
            out = begins + Duration::from_secs_f64(bytes as f64 * 8.0 / (rate * 1e6));
            self.free_at = Some(out);
        }
        if self.random.one_in(shape.reorder) {
            return Some(out);
        }
        let jitter = shape.jitter.mul_f64(self.random.fraction());
        let due = out + shape.delay + jitter;
        let due = self.last_due.map_or(due, |last| last.max(due));
        self.last_due = Some(due);
        Some(due)
    }
}

/// xorshift64*: the same packets meet the same fate in every run.
struct Random(u64);

impl Random {
    fn fraction(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11;
        high as f64 / (1u64 << 53) as f64
    }

    fn one_in(&mut self, part: f64) -> bool {
        part > 0.0 && self.fraction() < part
    }
}

struct Worker {
    shared: Arc<Shared>,
    queues: Queues,
    lines: Vec<Line>,
    due: BinaryHeap<Reverse<Held>>,
    number: u64,
}

/// A packet that is held: ordered by time, then by arrival.
struct Held {
    at: Instant,
    number: u64,
    packet: Waiting,
}

impl PartialEq for Held {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for Held {}

impl PartialOrd for Held {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Held {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

impl Worker {
    fn run(mut self, woken: &EventFd) {
        while !self.shared.ending.load(Ordering::Acquire) {
            let wait = self.due.peek().map(|Reverse(held)| {
                TimeSpec::from(held.at.saturating_duration_since(Instant::now()))
            });
            let mut fds = [
                PollFd::new(self.queues.as_fd(), PollFlags::POLLIN),
                PollFd::new(woken.as_fd(), PollFlags::POLLIN),
            ];
            // EINTR leads to another turn, as a timeout does.
            let _ = ppoll(&mut fds, wait, None);
            if self.take().and_then(|()| self.release()).is_err() {
                // Without the socket the kernel drops what is queued: the links are dead, and
                // whoever measures sees it.
                return;
            }
        }
        for Reverse(held) in self.due.drain() {
            // The namespace may be going as well.
            let _ = self.queues.decide(held.packet, true);
        }
    }

    fn take(&mut self) -> io::Result<()> {
        let shapes = self.shared.shapes().clone();
        let now = Instant::now();
        let mut lost = Vec::new();
        let Self {
            queues,
            lines,
            due,
            number,
            ..
        } = self;
        queues.receive(|packet| {
            let line = usize::from(packet.queue);
            let (Some(line), Some(shape)) = (lines.get_mut(line), shapes.get(line)) else {
                return;
            };
            let arrives = line.due(shape, packet.bytes, now);
            match arrives.filter(|_| shape.hole != Hole::Entry) {
                Some(at) => {
                    *number += 1;
                    due.push(Reverse(Held {
                        at,
                        number: *number,
                        packet,
                    }));
                }
                None => lost.push(packet),
            }
        })?;
        for packet in lost {
            self.queues.decide(packet, false)?;
        }
        Ok(())
    }

    fn release(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let shapes = self.shared.shapes().clone();
        while let Some(Reverse(held)) = self.due.peek()
            && held.at <= now
        {
            let late = now.duration_since(held.at).as_micros() / LATENESS_STEP.as_micros();
            let step = usize::try_from(late)
                .unwrap_or(LATENESS_STEPS)
                .min(LATENESS_STEPS);
            self.shared.lateness[step].fetch_add(1, Ordering::Relaxed);
            if let Some(Reverse(held)) = self.due.pop() {
                let shape = shapes.get(usize::from(held.packet.queue));
                let passes = shape.is_none_or(|s| s.hole != Hole::Exit);
                self.queues.decide(held.packet, passes)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_millis(1);

    fn dues(shape: Shape, packets: usize, bytes: usize) -> Vec<Option<Duration>> {
        let mut line = Line::new(0);
        let start = Instant::now();
        let mut due = |i: usize| line.due(&shape, bytes, start + NOW * i as u32);
        (0..packets)
            .map(|i| due(i).map(|at| at.duration_since(start + NOW * i as u32)))
            .collect()
    }

    #[test]
    fn a_plain_line_holds_nothing_back() {
        assert!(
            dues(Shape::default(), 50, 1500)
                .iter()
                .all(|d| *d == Some(Duration::ZERO))
        );
    }

    #[test]
    fn delay_and_jitter_keep_the_order() {
        let shape = Shape {
            delay: Duration::from_millis(20),
            jitter: Duration::from_millis(5),
            ..Shape::default()
        };
        let all = dues(shape, 1000, 100);
        let at: Vec<Duration> = all
            .iter()
            .enumerate()
            .map(|(i, d)| d.unwrap() + NOW * i as u32)
            .collect();
        assert!(at.is_sorted());
        assert!(all.iter().all(|d| d.unwrap() >= shape.delay));
        assert!(
            all.iter()
                .any(|d| d.unwrap() > shape.delay + Duration::from_millis(3))
        );
    }

    #[test]
    fn loss_is_as_large_as_asked() {
        let lost = dues(
            Shape {
                loss: 0.3,
                ..Shape::default()
            },
            10_000,
            100,
        );
        let lost = lost.iter().filter(|d| d.is_none()).count();
        assert!((2_800..3_200).contains(&lost), "{lost}");
    }

    #[test]
    fn a_rate_queues_and_then_drops() {
        // 12,000 bits each millisecond over 6 Mbit/s: half of it does not fit.
        let shape = Shape {
            rate_mbit: Some(6.0),
            backlog: Duration::from_millis(30),
            ..Shape::default()
        };
        let all = dues(shape, 1000, 1500);
        let passed: Vec<Duration> = all.iter().flatten().copied().collect();
        assert!((500..560).contains(&passed.len()), "{}", passed.len());
        assert!(passed.iter().all(|d| *d <= Duration::from_millis(33)));
    }

    #[test]
    fn large_packets_vanish_where_the_mtu_is_small() {
        let shape = Shape {
            mtu: Some(1280),
            ..Shape::default()
        };
        assert!(dues(shape, 1, 1281)[0].is_none());
        assert!(dues(shape, 1, 1280)[0].is_some());
    }

    #[test]
    fn some_packets_overtake() {
        let shape = Shape {
            delay: Duration::from_millis(20),
            reorder: 0.1,
            ..Shape::default()
        };
        let early = dues(shape, 1000, 100);
        let early = early.iter().filter(|d| **d == Some(Duration::ZERO)).count();
        assert!((60..140).contains(&early), "{early}");
    }
}
