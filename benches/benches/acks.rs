//! What an acknowledgement costs the sender: opening it, freeing what it covers, and telling what that means for the path.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use session_benches::Pair;
use session_proto::seal::Aead;

const RECORDS: usize = 64;
const RECORD_BYTES: usize = 4 * 1024;

/// A client that waits for the acknowledgement of one batch, and that acknowledgement. `gaps`: every second record has
/// not come.
fn batch(gaps: bool) -> (Pair, Vec<u8>) {
    let mut pair = Pair::new(Aead::Aes128Gcm);
    let data = [0x5a; RECORD_BYTES];
    for _ in 0..RECORDS {
        assert_eq!(pair.write(&data), 0, "the batch is larger than the window");
    }
    let mut records = pair.client_records();
    if gaps {
        let mut number = 0;
        records.retain(|_| {
            number += 1;
            number % 2 == 0
        });
    }
    pair.server_takes(&records);
    let answer = pair.server_records().concat();
    assert!(!answer.is_empty(), "no acknowledgement");
    (pair, answer)
}

fn acknowledgement(c: &mut Criterion) {
    let mut group = c.benchmark_group("acknowledgement of 64 records");
    group.throughput(Throughput::Elements(RECORDS as u64));
    for (name, gaps) in [("in order", false), ("every second", true)] {
        group.bench_function(name, |b| {
            b.iter_batched(
                || batch(gaps),
                |(mut pair, answer)| {
                    let before = pair.client.session.retained_bytes();
                    pair.client_takes(&answer);
                    assert!(pair.client.session.retained_bytes() < before);
                    pair
                },
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, acknowledgement);
criterion_main!(benches);
