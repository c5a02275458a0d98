//! The simulator over many seeds, over seeds that once failed, and over worlds broken on purpose.
#![cfg(feature = "sim")]

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use session_proto::sim::{
    self, FEW_FAULTS, Fault, Mutation, NO_FLOWS, NO_MARKS, NO_PACKING, Options, PLAIN_STREAMS,
    Tally,
};

/// Seeds of the test suite; `cargo xtask sim` runs any number.
const SEEDS: u64 = 10_000;

/// A seed from the time of few faults.
const fn few(seed: u64) -> u64 {
    seed | FEW_FAULTS
}

/// A seed from the time of plain streams.
const fn plain(seed: u64) -> u64 {
    seed | PLAIN_STREAMS
}

/// A seed from the time before flows.
const fn without_flows(seed: u64) -> u64 {
    seed | NO_FLOWS
}

/// A seed from the time before urgent bytes, and before anything was packed.
const fn without_marks(seed: u64) -> u64 {
    seed | NO_MARKS | NO_PACKING
}

/// Seeds that failed once, with what was wrong. They stay for ever.
const REGRESSIONS: &[(u64, &str)] = &[
    (
        few(97),
        "a writer was not told that the peer stopped reading",
    ),
    (
        few(118),
        "a closed session kept a deadline that nothing could serve",
    ),
    (
        few(330),
        "a RESUMED whose keys were gone was dropped without a word",
    ),
    (
        few(840),
        "the peer asked for a transport that was just retired",
    ),
    (
        few(2738),
        "a TRANSPORT_CLOSE whose keys were gone was dropped without a word",
    ),
    (
        few(3251),
        "a renewal began before the last one was over at the peer",
    ),
    (
        few(25643),
        "a CLOSE before the session was open was taken for a violation",
    ),
    (
        few(64649),
        "an acknowledgement was lost with its transport and never repeated",
    ),
    (
        plain(43457),
        "an idle session asked on and on: a record was acknowledged while it was being written",
    ),
    (
        plain(2391),
        "records were swallowed by a dialled transport before RESUMED, and nobody noticed",
    ),
    (
        plain(3119),
        "the same, while the first transport still stood",
    ),
    (
        plain(2311),
        "records stayed on a silent transport though the session had moved",
    ),
    (
        plain(9245),
        "the same, after the transport with their copies was lost too",
    ),
    (
        plain(4610),
        "the session moved to a transport that it knew to be silent, and tried no other",
    ),
    (
        plain(9504),
        "a doubt was stuck between two silent transports beside a third that worked",
    ),
    (
        plain(45221),
        "a request that was lost with its transport crossed every later one of the peer",
    ),
    (
        plain(1547),
        "both ends dialled and each followed the other's dial",
    ),
    (
        plain(5839),
        "a dial crossed a move, and each end followed the other",
    ),
    (
        plain(60523),
        "a sleep was taken for a round-trip time, and silence went unnoticed for seconds",
    ),
    (
        without_flows(88216),
        "a record that its transport swallowed was hidden by a later one that came over another",
    ),
    (
        without_flows(193488),
        "a request that crossed a RESUME took the peer to a transport that this end had left",
    ),
    (
        without_marks(15705),
        "a blocked path was asked again with packets that were too large for it, for ever",
    ),
    (
        without_marks(17489),
        "a keep-alive that could not be sealed stayed due",
    ),
    (
        41_238,
        "the end of packing that came behind what follows it was not heeded",
    ),
    (
        196_534,
        "of records on two silent transports the copy was taken back, and the other not looked at",
    ),
];

/// Runs `seeds` on all processors; every failure in the message, with the command that replays it.
fn run_all(seeds: &[u64]) -> Tally {
    let next = AtomicU64::new(0);
    let outcome = Mutex::new((Tally::default(), Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(&seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    let result = sim::run(seed, Options::default());
                    let mut outcome = outcome.lock().unwrap();
                    match result {
                        Ok(tally) => outcome.0 += tally,
                        Err(failure) => outcome.1.push(failure.to_string()),
                    }
                }
            });
        }
    });
    let (tally, failures) = outcome.into_inner().unwrap();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    tally
}

#[test]
fn every_seed_holds() {
    let tally = run_all(&(0..SEEDS).collect::<Vec<_>>());
    // What the seeds are for must happen in them, or they prove nothing.
    for (what, count) in [
        ("streams", tally.streams),
        ("resumes", tally.resumes),
        ("records resent", tally.resent),
        ("key epochs", tally.rekeys),
        ("renewals", tally.renewals),
        ("silences", tally.silences),
        ("rejoins", tally.rejoins),
        ("copies", tally.copies),
        ("replays", tally.replays),
        ("watched records", tally.watched),
        ("agreements", tally.agreements),
        ("doubts", tally.hedges),
        ("redundant streams", tally.redundant),
        ("bonded streams", tally.bonded),
        ("records doubled", tally.doubled),
        ("lanes", tally.lanes),
        ("urgent bytes", tally.marks),
        ("urgent bytes seen", tally.marks_seen),
        ("bytes packed", tally.packed),
        ("faults soon after something else", tally.triggered),
        ("flows", tally.flows),
        ("datagrams", tally.datagrams),
        ("packets", tally.packets),
        ("forged packets", tally.forged),
        ("datagrams in parts", tally.parts),
        ("changes of the preferred path", tally.preferences),
        ("proofs that datagrams arrive", tally.proofs),
    ] {
        assert!(count > SEEDS / 10, "only {count} {what} in {SEEDS} seeds");
    }
    for (fault, name) in Fault::ALL {
        let count = tally.faults[fault as usize];
        assert!(count > SEEDS / 20, "only {count} {name} in {SEEDS} seeds");
    }
    for (what, count) in [
        ("NATs that gave another address", tally.rebinds),
        ("addresses adopted", tally.adopted),
        ("datagrams lost in parts", tally.incomplete),
        ("copies of datagrams dropped", tally.repeated),
    ] {
        assert!(count > SEEDS / 50, "only {count} {what} in {SEEDS} seeds");
    }
    // A path is given up after a while only, and runs are short.
    let blocked = tally.blocked;
    assert!(blocked > SEEDS / 250, "only {blocked} paths were blocked");
    // Few of these come while such streams are open.
    let half_dead = tally.half_dead;
    assert!(
        half_dead > SEEDS / 25,
        "only {half_dead} losses and MTU holes under redundant or bonded streams"
    );
    // These need a standby and a hole in the right place.
    let guesses = tally.guesses;
    assert!(
        guesses > SEEDS / 25,
        "only {guesses} moves away from silence"
    );
}

#[test]
fn seeds_that_failed_once_hold() {
    run_all(
        &REGRESSIONS
            .iter()
            .map(|(seed, _)| *seed)
            .collect::<Vec<_>>(),
    );
}

#[test]
fn a_seed_gives_the_same_run_again() {
    for seed in 0..20 {
        let mut traces = [Vec::new(), Vec::new()];
        for trace in &mut traces {
            let mut keep = |line: &str| trace.push(line.to_owned());
            let options = Options {
                trace: Some(&mut keep),
                mutation: None,
            };
            sim::run(seed, options).unwrap();
        }
        assert!(!traces[0].is_empty());
        assert_eq!(traces[0], traces[1], "seed {seed}");
    }
}

/// A world with `mutation` must fail within a few seeds, for one of the reasons in `expected` and
/// for no other. The same seeds hold without it: `every_seed_holds` runs them.
fn is_caught(mutation: Mutation, expected: &[&str]) {
    is_caught_within(40, mutation, expected);
}

fn is_caught_within(seeds: u64, mutation: Mutation, expected: &[&str]) -> Vec<String> {
    let mut failures = Vec::new();
    for seed in 0..seeds {
        let options = Options {
            trace: None,
            mutation: Some(mutation),
        };
        if let Err(failure) = sim::run(seed, options) {
            let as_expected = expected.iter().any(|e| failure.what.contains(e));
            assert!(
                as_expected,
                "{mutation:?} was taken for something else: {failure}"
            );
            failures.push(failure.what);
        }
    }
    assert!(!failures.is_empty(), "nobody noticed {mutation:?}");
    failures
}

#[test]
fn a_wrong_byte_is_caught() {
    is_caught(Mutation::WrongByte, &["wrong byte at offset"]);
}

#[test]
fn lost_bytes_are_caught() {
    is_caught(
        Mutation::LostBytes,
        &["wrong byte at offset", "ended after"],
    );
}

#[test]
fn an_invented_byte_is_caught() {
    is_caught(
        Mutation::InventedByte,
        &["were delivered", "wrong byte at offset", "ended after"],
    );
}

#[test]
fn a_forgotten_record_is_caught() {
    is_caught(Mutation::ForgottenRecord, &["let go of record"]);
}

#[test]
fn a_lost_end_is_caught() {
    is_caught(
        Mutation::LostEnd,
        &["nothing more will ever happen", "not drained"],
    );
}

#[test]
fn an_early_end_is_caught() {
    is_caught(Mutation::EarlyEnd, &["ended after"]);
}

#[test]
fn a_one_sided_end_is_caught() {
    is_caught(Mutation::OneSidedEnd, &["it ended as"]);
}

#[test]
fn hoarding_is_caught() {
    is_caught(Mutation::Hoarding, &["its budget is"]);
}

#[test]
fn an_ignored_timer_is_caught() {
    is_caught(Mutation::IgnoredTimer, &["going round in circles"]);
}

#[test]
fn restlessness_is_caught() {
    is_caught(Mutation::Restless, &["does not come to rest"]);
}

#[test]
fn a_stray_close_is_caught() {
    is_caught(Mutation::StrayClose, &["though nobody asked"]);
}

#[test]
fn a_stray_fault_is_caught() {
    is_caught(Mutation::StrayFault, &["honest bytes"]);
}

#[test]
fn a_deaf_standby_is_caught() {
    // Without any fault of other links it only keeps a run from its end.
    let failures = is_caught_within(
        400,
        Mutation::DeafStandby,
        &[
            "though one link works",
            "not drained",
            "nothing more will ever happen",
            "the ends do not agree",
        ],
    );
    let noticed = |what: &String| what.contains("though one link works");
    assert!(failures.iter().any(noticed), "{failures:?}");
}

#[test]
fn ends_of_two_minds_are_caught() {
    is_caught(Mutation::TwoMinds, &["the ends do not agree"]);
}

#[test]
fn a_lavish_doubt_is_caught() {
    is_caught_within(
        400,
        Mutation::LavishDoubt,
        &["bytes on two transports in doubt"],
    );
}

#[test]
fn a_wrong_datagram_is_caught() {
    is_caught(Mutation::WrongDatagram, &["not what was sent"]);
}

#[test]
fn a_datagram_of_another_source_is_caught() {
    is_caught(Mutation::WrongSource, &["came as"]);
}

#[test]
fn a_datagram_that_comes_twice_is_caught() {
    is_caught(Mutation::TwiceDelivered, &["came twice"]);
}

#[test]
fn an_invented_datagram_is_caught() {
    is_caught(Mutation::InventedDatagram, &["nobody sent"]);
}

#[test]
fn lavish_answers_to_strangers_are_caught() {
    is_caught(Mutation::LavishAnswer, &["bytes for"]);
}

#[test]
fn a_moved_address_is_caught() {
    is_caught(Mutation::StolenAddress, &["sends to a stranger"]);
}

#[test]
fn deaf_flows_are_caught() {
    is_caught(
        Mutation::DeafFlows,
        &["no datagram arrives", "nothing more will ever happen"],
    );
}

#[test]
fn hoarded_datagrams_are_caught() {
    is_caught(Mutation::HoardedDatagrams, &["bytes of datagrams"]);
}

#[test]
fn a_lost_mark_is_caught() {
    is_caught(Mutation::LostMark, &["was lost"]);
}

#[test]
fn a_stray_mark_is_caught() {
    is_caught(Mutation::StrayMark, &["nobody said so"]);
}

#[test]
fn a_conversation_that_nobody_hears_is_caught() {
    // Few runs have one that lasts for longer than it may be interrupted.
    let failures = is_caught_within(
        400,
        Mutation::DeafConversation,
        &["a conversation is interrupted"],
    );
    assert!(failures.len() > 1, "a single run has such a conversation");
}
