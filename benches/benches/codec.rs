//! Packing and unpacking a stream's pieces of 64 KiB, each with what came before as its history: text, and what does not
//! shrink.

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use session_benches::samples;
use session_proto::codec::{Codec, Packer, Unpacker};
use session_proto::limits::STREAM_DATA_BYTES_MAX;

const PIECES: usize = 16;

fn kinds() -> [(&'static str, Vec<u8>); 2] {
    let bytes = PIECES * STREAM_DATA_BYTES_MAX;
    [
        ("log", samples::log(bytes)),
        ("random", samples::random(bytes)),
    ]
}

fn pack(c: &mut Criterion) {
    let mut group = c.benchmark_group("pack 16 x 64 KiB");
    group.sample_size(20);
    for codec in Codec::ALL {
        for (kind, data) in kinds() {
            let mut packer = Packer::new(codec).expect("there is memory");
            group.throughput(Throughput::Bytes(data.len() as u64));
            group.bench_function(BenchmarkId::new(format!("{codec:?}"), kind), |b| {
                b.iter(|| {
                    for piece in data.chunks(STREAM_DATA_BYTES_MAX) {
                        black_box(packer.pack(piece));
                    }
                });
            });
        }
    }
    group.finish();
}

/// The pieces as a packer makes them; none where it gives up.
fn packed(codec: Codec, data: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut packer = Packer::new(codec).expect("there is memory");
    let pieces = data.chunks(STREAM_DATA_BYTES_MAX);
    pieces.map(|p| Some(packer.pack(p)?.to_vec())).collect()
}

fn unpack(c: &mut Criterion) {
    let mut group = c.benchmark_group("unpack 16 x 64 KiB");
    group.sample_size(20);
    for codec in Codec::ALL {
        for (kind, data) in kinds() {
            let Some(pieces) = packed(codec, &data) else {
                continue;
            };
            group.throughput(Throughput::Bytes(data.len() as u64));
            group.bench_function(BenchmarkId::new(format!("{codec:?}"), kind), |b| {
                b.iter_batched_ref(
                    || Unpacker::new(codec).expect("there is memory"),
                    |unpacker| {
                        for piece in &pieces {
                            let plain = unpacker.unpack(piece, STREAM_DATA_BYTES_MAX);
                            black_box(plain.expect("a packer made it"));
                        }
                    },
                    BatchSize::LargeInput,
                );
            });
        }
    }
    group.finish();
}

criterion_group!(benches, pack, unpack);
criterion_main!(benches);
