//! Frames to bytes and back: what each record costs beside its sealing.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use session_proto::wire::{Ack, Frame, Reader, Space, StreamHeader};

const HEADER: StreamHeader = StreamHeader {
    id: 8,
    offset: 1 << 33,
    fin: false,
};

fn ack(ranges: u64) -> Frame<'static> {
    let ranges = (0..ranges).map(|i| 1_000_010 + i * 20..1_000_020 + i * 20);
    Frame::Ack {
        ack: Ack {
            cumulative: 1_000_000,
            ranges: ranges.collect(),
        },
        delay_us: 900,
    }
}

fn stream(c: &mut Criterion) {
    let data = vec![0x5a; 16 * 1024];
    let frame = Frame::Stream {
        header: HEADER,
        data: &data,
    };
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    let mut group = c.benchmark_group("wire/stream 16 KiB");
    group.throughput(Throughput::Elements(1));
    group.bench_function("header before data", |b| {
        let mut room = [0; StreamHeader::BYTES_MAX];
        b.iter(|| black_box(HEADER).write_before(black_box(&mut room), data.len()));
    });
    group.bench_function("parse", |b| {
        b.iter(|| Frame::parse(&mut Reader::new(black_box(&bytes)), Space::Retained));
    });
    group.finish();
}

fn acknowledgement(c: &mut Criterion) {
    for ranges in [0, 32] {
        let frame = ack(ranges);
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        let mut group = c.benchmark_group(format!("wire/ack {ranges} ranges"));
        group.throughput(Throughput::Elements(1));
        group.bench_function("encode", |b| {
            let mut out = Vec::with_capacity(1024);
            b.iter(|| {
                out.clear();
                black_box(&frame).encode(&mut out);
                black_box(out.len())
            });
        });
        group.bench_function("parse", |b| {
            b.iter(|| Frame::parse(&mut Reader::new(black_box(&bytes)), Space::Unretained));
        });
        group.finish();
    }
}

criterion_group!(benches, stream, acknowledgement);
criterion_main!(benches);
