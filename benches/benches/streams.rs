//! Putting a stream's bytes in order: records as they were sent, and the other way round, which is
//! the worst that two transports can do.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use session_benches::Pair;
use session_proto::seal::Aead;

const RECORDS: usize = 64;
const RECORD_BYTES: usize = 4 * 1024;

/// A server that waits for the records of one batch, just within a stream's first window.
fn batch(reversed: bool) -> (Pair, Vec<Vec<u8>>) {
    let mut pair = Pair::new(Aead::Aes128Gcm);
    let data = [0x5a; RECORD_BYTES];
    for _ in 0..RECORDS {
        assert_eq!(pair.write(&data), 0, "the batch is larger than the window");
    }
    let mut records = pair.client_records();
    assert!(records.len() >= RECORDS);
    if reversed {
        // Space U keeps its order; nothing but space R is ever overtaken.
        records.sort_by_key(|record| record[0] == 0x80);
        let retained = records.partition_point(|record| record[0] != 0x80);
        records[retained..].reverse();
    }
    (pair, records)
}

fn reassembly(c: &mut Criterion) {
    let mut group = c.benchmark_group("reassembly 64 x 4 KiB");
    group.throughput(Throughput::Bytes((RECORDS * RECORD_BYTES) as u64));
    for (name, reversed) in [("in order", false), ("reversed", true)] {
        group.bench_function(name, |b| {
            b.iter_batched(
                || batch(reversed),
                |(mut pair, records)| {
                    pair.server_takes(&records);
                    assert_eq!(pair.read_all(), RECORDS * RECORD_BYTES);
                    pair
                },
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, reassembly);
criterion_main!(benches);
