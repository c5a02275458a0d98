//! The whole core without sockets: write, seal, one copy in place of the network, open, put in
//! order, deliver, acknowledge, free.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use session_benches::Pair;
use session_proto::seal::Aead;

fn throughput(c: &mut Criterion) {
    let mut group = c.benchmark_group("core loop-back");
    group.sample_size(20);
    for (kib, total_kib) in [(64, 8192), (1, 1024)] {
        let data = vec![0x5a; kib * 1024];
        let total = total_kib * 1024;
        group.throughput(Throughput::Bytes(total as u64));
        let id = BenchmarkId::from_parameter(format!("writes of {kib} KiB"));
        group.bench_function(id, |b| {
            let mut pair = Pair::new(Aead::Aes128Gcm);
            b.iter(|| pair.deliver(total, &data));
        });
    }
    group.finish();
}

/// A question and its answer, each a record, with the acknowledgements that they take.
fn questions(c: &mut Criterion) {
    let mut group = c.benchmark_group("core question and answer");
    group.throughput(Throughput::Elements(1));
    for bytes in [64, 1024] {
        let data = vec![0x5a; bytes];
        group.bench_function(format!("{bytes} bytes"), |b| {
            let mut pair = Pair::new(Aead::Aes128Gcm);
            b.iter(|| pair.ask(&data));
        });
    }
    group.finish();
}

criterion_group!(benches, throughput, questions);
criterion_main!(benches);
