//! Sealing and opening one record in place, for each AEAD and record size.

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use session_proto::limits::{RECORD_HEADER_BYTES, TAG_BYTES};
use session_proto::seal::{Aead, Direction, Secret, SessionSecret};
use session_proto::wire::{RecordHeader, Space};

const AEADS: [Aead; 3] = [Aead::Aes128Gcm, Aead::Aes256Gcm, Aead::ChaCha20Poly1305];
const SIZES_KIB: [usize; 4] = [1, 4, 16, 64];

fn header(data_bytes: usize) -> [u8; RECORD_HEADER_BYTES] {
    RecordHeader {
        space: Space::Retained,
        payload_bytes: data_bytes + TAG_BYTES,
        epoch: 0,
        number: 7,
    }
    .encode()
}

fn seal(c: &mut Criterion) {
    let mut group = c.benchmark_group("seal");
    for aead in AEADS {
        let secret = SessionSecret::new(aead, &Secret::new([1; 32]));
        let keys = secret.seal_keys(Direction::FromInitiator);
        for kib in SIZES_KIB {
            let mut data = vec![0x5a; kib * 1024];
            let header = header(data.len());
            let mut number = 0;
            group.throughput(Throughput::Bytes(data.len() as u64));
            group.bench_function(
                BenchmarkId::new(format!("{aead:?}"), format!("{kib} KiB")),
                |b| {
                    b.iter(|| {
                        number += 1;
                        keys.retained().seal(&header, number, &mut data)
                    });
                },
            );
        }
    }
    group.finish();
}

fn open(c: &mut Criterion) {
    let mut group = c.benchmark_group("open");
    for aead in AEADS {
        let secret = SessionSecret::new(aead, &Secret::new([1; 32]));
        let sealer = secret.seal_keys(Direction::FromInitiator);
        let mut opener = secret.open_keys(Direction::FromInitiator);
        for kib in SIZES_KIB {
            let mut record = vec![0x5a; kib * 1024];
            let header = header(record.len());
            let tag = sealer.retained().seal(&header, 7, &mut record);
            record.extend_from_slice(&tag);
            group.throughput(Throughput::Bytes(kib as u64 * 1024));
            group.bench_function(
                BenchmarkId::new(format!("{aead:?}"), format!("{kib} KiB")),
                |b| {
                    b.iter_batched_ref(
                        || record.clone(),
                        |sealed| {
                            opener
                                .open(sealer.epoch(), None, &header, 7, sealed)
                                .expect("it was sealed with these keys")
                        },
                        BatchSize::SmallInput,
                    );
                },
            );
        }
    }
    group.finish();
}

criterion_group!(benches, seal, open);
criterion_main!(benches);
