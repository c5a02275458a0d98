//! Runs the simulator over many seeds, or one seed with a trace.
//!
//! `cargo run --release -p session-proto --features sim --example sim -- --seeds 100000`

// The runner is not the core: it measures and waits in real time.
#![allow(clippy::disallowed_methods)]

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use session_proto::sim::{self, Failure, Fault, Options, Tally};

const USAGE: &str = "usage: sim [--seeds N] [--from S] [--jobs J] | --seed X [--trace]

  --seeds N   run N seeds (default 2000)
  --from S    begin with seed S (default 0)
  --jobs J    on J threads (default: one for each processor)
  --seed X    run seed X alone
  --trace     and print what happens in it";

/// Failures that are printed in full; the last line counts them all.
const FAILURES_SHOWN: usize = 20;

struct Arguments {
    first: u64,
    seeds: u64,
    jobs: u64,
    trace: bool,
}

fn arguments() -> Result<Arguments, String> {
    let processors = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let mut out = Arguments {
        first: 0,
        seeds: 2000,
        jobs: processors,
        trace: false,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || {
            let value = args.next().ok_or(format!("{arg} needs a number"))?;
            value
                .parse::<u64>()
                .map_err(|_| format!("{arg}: {value} is not a number"))
        };
        match arg.as_str() {
            "--seeds" => out.seeds = number()?,
            "--from" => out.first = number()?,
            "--jobs" => out.jobs = number()?.max(1),
            "--seed" => (out.first, out.seeds) = (number()?, 1),
            "--trace" => out.trace = true,
            _ => return Err(format!("{arg} is not known")),
        }
    }
    if out.trace && out.seeds != 1 {
        return Err("--trace needs --seed: one run at a time".to_owned());
    }
    Ok(out)
}

/// What all threads add to.
#[derive(Default)]
struct Outcome {
    tally: Tally,
    failures: Vec<Failure>,
    failed: u64,
}

fn run_all(args: &Arguments) -> Outcome {
    let next = AtomicU64::new(0);
    let outcome = Mutex::new(Outcome::default());
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..args.jobs {
            scope.spawn(|| work(args, &next, &outcome));
        }
        let mut told = Instant::now();
        while next.load(Ordering::Relaxed) < args.seeds {
            // Only to tell how far it is: the work is done by the other threads.
            std::thread::sleep(Duration::from_millis(20));
            if told.elapsed() > Duration::from_secs(5) {
                told = Instant::now();
                let done = next.load(Ordering::Relaxed).min(args.seeds);
                let failed = outcome.lock().map_or(0, |o| o.failed);
                eprintln!(
                    "{done} of {} seeds begun, {failed} failed, {:.0} s",
                    args.seeds,
                    begun.elapsed().as_secs_f64()
                );
            }
        }
    });
    outcome.into_inner().unwrap_or_default()
}

fn work(args: &Arguments, next: &AtomicU64, outcome: &Mutex<Outcome>) {
    loop {
        let index = next.fetch_add(1, Ordering::Relaxed);
        if index >= args.seeds {
            return;
        }
        let seed = args.first.wrapping_add(index);
        let result = run_one(seed, args.trace);
        let Ok(mut outcome) = outcome.lock() else {
            return;
        };
        match result {
            Ok(tally) => outcome.tally += tally,
            Err(failure) => {
                outcome.failed += 1;
                if outcome.failures.len() < FAILURES_SHOWN {
                    eprintln!("{failure}");
                    outcome.failures.push(failure);
                }
            }
        }
    }
}

/// A panic of the core is a failure like any other.
fn run_one(seed: u64, trace: bool) -> Result<Tally, Failure> {
    let outcome = std::panic::catch_unwind(|| {
        let mut print = |line: &str| println!("{line}");
        let options = Options {
            trace: trace.then_some(&mut print as &mut dyn FnMut(&str)),
            ..Options::default()
        };
        sim::run(seed, options)
    });
    outcome.unwrap_or_else(|_| {
        Err(Failure {
            seed,
            at: session_proto::Time::ZERO,
            what: "a panic (its message is above)".to_owned(),
        })
    })
}

/// Processor time of this process so far, from `/proc` (clock ticks are 10 ms on Linux).
fn cpu() -> Option<Duration> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(Duration::from_millis((user + system) * 10))
}

fn main() -> ExitCode {
    let args = match arguments() {
        Ok(args) => args,
        Err(error) => {
            eprintln!("{error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let outcome = run_all(&args);
    if let Some(cpu) = cpu() {
        let mean = cpu.as_secs_f64() * 1e3 / args.seeds.max(1) as f64;
        eprintln!(
            "{:.1} s of processor time, {mean:.2} ms for each seed",
            cpu.as_secs_f64()
        );
    }
    let t = outcome.tally;
    eprintln!(
        "{} steps, {} streams, {} bytes delivered, {} on wires, {} resumes, {} records resent, {} key epochs, \
         {} renewals, {} rejoins, {} copies, {} replays",
        t.steps,
        t.streams,
        t.bytes,
        t.wire_bytes,
        t.resumes,
        t.resent,
        t.rekeys,
        t.renewals,
        t.rejoins,
        t.copies,
        t.replays
    );
    eprintln!(
        "{} redundant and {} bonded streams, {} records doubled, {} lanes, {} losses and MTU holes under such streams, \
         {} urgent bytes sent and {} seen, {} bytes packed to {}",
        t.redundant,
        t.bonded,
        t.doubled,
        t.lanes,
        t.half_dead,
        t.marks,
        t.marks_seen,
        t.packed,
        t.packed_to
    );
    let faults =
        (Fault::ALL.iter()).map(|(fault, name)| format!("{} {name}", t.faults[*fault as usize]));
    eprintln!(
        "{}; {} faults soon after something else",
        faults.collect::<Vec<_>>().join(", "),
        t.triggered
    );
    eprintln!(
        "{} silences, {} moves away from it, {} doubts, {} marks watched on a link that works, {} agreements",
        t.silences, t.guesses, t.hedges, t.watched, t.agreements
    );
    eprintln!(
        "{} flows, {} datagrams sent and {} delivered, {} packets, {} of them forged, {} parts, {} datagrams incomplete, \
         {} copies dropped, {} paths preferred, {} addresses replaced, {} adopted, {} paths blocked, {} proofs, \
         conversations interrupted for {} ms at most",
        t.flows,
        t.datagrams,
        t.arrived,
        t.packets,
        t.forged,
        t.parts,
        t.incomplete,
        t.repeated,
        t.preferences,
        t.rebinds,
        t.adopted,
        t.blocked,
        t.proofs,
        t.longest_gap.as_millis()
    );
    println!("seeds {} failures {}", args.seeds, outcome.failed);
    if outcome.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
