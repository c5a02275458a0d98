//! The work whose instructions `cargo xtask bench guard` counts, under valgrind's callgrind: `guard WORK`. What is inside
//! of [`counted`] counts, and nothing of what prepares it. Without a word it names every work, with how many times it is
//! done; the kind of processor comes first, since the AEAD and the C library choose their code by it.
//!
//! Without valgrind this does the same, and measures nothing.

use std::hint::black_box;
use std::process::ExitCode;

use session_benches::{Pair, samples};
use session_proto::codec::{Codec, Packer, Unpacker};
use session_proto::limits::STREAM_DATA_BYTES_MAX;
use session_proto::seal::Aead;
use session_proto::wire::{Ack, Frame, Reader, Space, StreamHeader};

/// Records, questions or frames that are done before the count, so that queues and pools have their sizes.
const WARM_UP: usize = 200;
const SMALL_BYTES: usize = 64;

/// A name, how many times it is done, and how.
type Work = (&'static str, usize, fn(usize));

/// What can be counted.
const WORKS: [Work; 9] = [
    ("bulk-64-kib", 200, bulk),
    ("ask-64-bytes", 1000, ask),
    ("burst-64-bytes", 2000, burst),
    ("pack-lz4-64-kib", 8, |times| pack(Codec::Lz4, times)),
    ("unpack-lz4-64-kib", 8, |times| unpack(Codec::Lz4, times)),
    ("pack-zstd-64-kib", 8, |times| pack(Codec::Zstd, times)),
    ("unpack-zstd-64-kib", 8, |times| unpack(Codec::Zstd, times)),
    ("stream-frame", 1000, stream_frame),
    ("ack-frame-32-ranges", 1000, ack_frame),
];

fn main() -> ExitCode {
    let Some(wanted) = std::env::args().nth(1) else {
        println!("{}", processor());
        for (name, times, _) in WORKS {
            println!("{name} {times}");
        }
        return ExitCode::SUCCESS;
    };
    let Some((_, times, work)) = WORKS.into_iter().find(|(name, ..)| *name == wanted) else {
        eprintln!("guard: there is no work called {wanted}");
        return ExitCode::FAILURE;
    };
    work(times);
    ExitCode::SUCCESS
}

/// What is counted begins and ends here: callgrind knows it by its name.
#[inline(never)]
fn counted(work: &mut dyn FnMut()) {
    work();
}

/// The features that decide which code runs, as this process sees them: valgrind hides some.
fn processor() -> String {
    #[cfg(target_arch = "x86_64")]
    let found = [
        ("aes", is_x86_feature_detected!("aes")),
        ("pclmulqdq", is_x86_feature_detected!("pclmulqdq")),
        ("ssse3", is_x86_feature_detected!("ssse3")),
        ("movbe", is_x86_feature_detected!("movbe")),
        ("avx", is_x86_feature_detected!("avx")),
        ("avx2", is_x86_feature_detected!("avx2")),
        ("bmi2", is_x86_feature_detected!("bmi2")),
        ("vaes", is_x86_feature_detected!("vaes")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let found: [(&str, bool); 0] = [];
    let names = found.iter().filter(|(_, here)| *here);
    let names: Vec<&str> = names.map(|(name, _)| *name).collect();
    format!("{} {}", std::env::consts::ARCH, names.join(" "))
}

/// One stream in bulk: write, seal, frame, open, put in order, read, acknowledge.
fn bulk(times: usize) {
    let mut pair = Pair::new(Aead::Aes128Gcm);
    let data = vec![0x5a; STREAM_DATA_BYTES_MAX];
    pair.deliver(WARM_UP * data.len(), &data);
    counted(&mut || pair.deliver(times * data.len(), &data));
}

/// A question and its answer.
fn ask(times: usize) {
    let mut pair = Pair::new(Aead::Aes128Gcm);
    let data = [0x5a; SMALL_BYTES];
    (0..WARM_UP).for_each(|_| pair.ask(&data));
    counted(&mut || (0..times).for_each(|_| pair.ask(&data)));
}

/// Small records, many in one read.
fn burst(times: usize) {
    let mut pair = Pair::new(Aead::Aes128Gcm);
    let data = [0x5a; SMALL_BYTES];
    pair.deliver(10 * WARM_UP * SMALL_BYTES, &data);
    counted(&mut || pair.deliver(times * SMALL_BYTES, &data));
}

fn pack(codec: Codec, times: usize) {
    let text = samples::log(times * STREAM_DATA_BYTES_MAX);
    let mut packer = Packer::new(codec).expect("there is memory");
    counted(&mut || {
        for piece in text.chunks(STREAM_DATA_BYTES_MAX) {
            black_box(packer.pack(black_box(piece)));
        }
    });
}

fn unpack(codec: Codec, times: usize) {
    let text = samples::log(times * STREAM_DATA_BYTES_MAX);
    let mut packer = Packer::new(codec).expect("there is memory");
    let pieces = text.chunks(STREAM_DATA_BYTES_MAX);
    let packed: Vec<(Vec<u8>, usize)> = pieces
        .map(|p| (packer.pack(p).expect("it packs").to_vec(), p.len()))
        .collect();
    let mut unpacker = Unpacker::new(codec).expect("there is memory");
    counted(&mut || {
        for (piece, bytes) in &packed {
            let plain = unpacker.unpack(black_box(piece), *bytes);
            assert_eq!(plain.map(|p| p.len()), Ok(*bytes));
        }
    });
}

/// A STREAM frame's header is written before its data, and read again.
fn stream_frame(times: usize) {
    let header = StreamHeader {
        id: 8,
        offset: 1 << 33,
        fin: false,
    };
    let data = vec![0x5a; 1024];
    let mut frame = Vec::new();
    Frame::Stream {
        header,
        data: &data,
    }
    .encode(&mut frame);
    let mut room = [0; StreamHeader::BYTES_MAX];
    counted(&mut || {
        for _ in 0..times {
            black_box(black_box(&header).write_before(&mut room, data.len()));
            let read = Frame::parse(&mut Reader::new(black_box(&frame)), Space::Retained);
            assert!(matches!(read, Ok(Some(Frame::Stream { .. }))));
        }
    });
}

/// An acknowledgement of what came with gaps is written and read again.
fn ack_frame(times: usize) {
    let ranges = (0..32).map(|i| 1_000_010 + i * 20..1_000_020 + i * 20);
    let frame = Frame::Ack {
        ack: Ack {
            cumulative: 1_000_000,
            ranges: ranges.collect(),
        },
        delay_us: 900,
    };
    let mut bytes = Vec::with_capacity(1024);
    counted(&mut || {
        for _ in 0..times {
            bytes.clear();
            black_box(&frame).encode(&mut bytes);
            let read = Frame::parse(&mut Reader::new(black_box(&bytes)), Space::Unretained);
            assert!(matches!(read, Ok(Some(Frame::Ack { .. }))));
        }
    });
}
