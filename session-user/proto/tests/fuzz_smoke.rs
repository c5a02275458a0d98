//! Fuzzing on the stable toolchain: the committed corpus of `fuzz/corpus`, and changes of it drawn
//! from a seeded generator. A failure prints the input; `cargo fuzz` runs the same functions longer.
#![allow(clippy::disallowed_methods)] // Tests read their corpus and their seed.

mod harness;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;

/// SplitMix64: small, seeded, the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// Values that lengths and numbers go wrong at.
const EDGES: [&[u8]; 8] = [
    &[0],
    &[0xff],
    &[0x3f],
    &[0x40, 0x40],
    &[0x7f, 0xff],
    &[0xbf, 0xff, 0xff, 0xff],
    &[0xff; 8],
    &[0x80; 4],
];

fn mutate(random: &mut Random, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = corpus[random.below(corpus.len())].clone();
    for _ in 0..=random.below(6) {
        let at = random.below(bytes.len() + 1);
        let end = (at + 1 + random.below(12)).min(bytes.len());
        match random.below(7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = random.next() as u8,
            2 => bytes.insert(at, random.next() as u8),
            3 => drop(bytes.drain(at..end)),
            4 => bytes.truncate(at),
            5 => {
                let edge = EDGES[random.below(EDGES.len())];
                bytes.splice(at..at, edge.iter().copied());
            }
            _ => {
                let other = &corpus[random.below(corpus.len())];
                let from = random.below(other.len() + 1);
                bytes.splice(at..at, other[from..].iter().copied());
            }
        }
    }
    bytes.truncate(4096);
    bytes
}

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus")
        .join(target);
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.expect("a folder that can be read").path())
        .collect();
    // The order of a folder is the file system's affair; a seed must mean the same everywhere.
    paths.sort();
    assert!(!paths.is_empty(), "{} is empty", folder.display());
    paths
        .iter()
        .map(|p| std::fs::read(p).expect("a file that can be read"))
        .collect()
}

fn run(target: &str, function: fn(&[u8]), rounds: usize) {
    let corpus = corpus(target);
    let seed = match std::env::var("HOLDFAST_FUZZ_SEED") {
        Ok(text) => text.parse().expect("HOLDFAST_FUZZ_SEED is a number"),
        Err(_) => 1,
    };
    let mut random = Random(seed);
    let changed = std::iter::repeat_with(|| mutate(&mut random, &corpus)).take(rounds);
    for input in corpus.iter().cloned().chain(changed) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| function(&input))) {
            eprintln!("{target} fails with seed {seed} on {}", hex::encode(&input));
            resume_unwind(panic);
        }
    }
}

#[test]
fn preamble() {
    run("preamble", harness::preamble, 400_000);
}

#[test]
fn reply() {
    run("reply", harness::reply, 400_000);
}

#[test]
fn record_header() {
    run("record_header", harness::record_header, 400_000);
}

#[test]
fn frames() {
    run("frames", harness::frames, 400_000);
}

#[test]
fn params() {
    run("params", harness::params, 400_000);
}

#[test]
fn codec() {
    run("codec", harness::codec, 20_000);
}

#[test]
fn session() {
    run("session", harness::session, 80_000);
}

#[test]
fn packet_header() {
    run("packet_header", harness::packet_header, 400_000);
}

#[test]
fn packets() {
    run("packets", harness::packets, 10_000);
}

/// The harness must be able to fail: an attack that changes nothing leaves no fault, one that does
/// leaves one.
#[test]
fn an_attack_reaches_the_session() {
    let mut pair = harness::pair::Pair::established();
    let (client, server) = pair.first_transport();
    pair.client.ping(client, 1);
    let honest = pair.client_bytes(client);
    let mut changed = honest.clone();
    *changed.last_mut().expect("a record") ^= 1;
    assert!(pair.server_takes(server, &changed, 7).is_err());
    assert!(!pair.server.is_ending());
    assert!(pair.server_takes(server, &honest, 7).is_ok());
}
