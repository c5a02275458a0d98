//! The whole core without sockets: write, seal, one copy in place of the network, open, put in
//! order, deliver, acknowledge, free.

mod pair;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pair::Pair;
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

criterion_group!(benches, throughput);
criterion_main!(benches);
