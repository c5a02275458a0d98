//! What comes out is what went in; what no packer made ends in an error.

use proptest::prelude::*;

use super::*;

/// A log as services write them.
fn log(lines: usize) -> Vec<u8> {
    let mut out = String::new();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for line in 0..lines {
        seed = seed
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(line as u64);
        out.push_str(&format!(
            "{{\"ts\":\"2026-01-01T00:{:02}:{:02}.{:03}Z\",\"level\":\"{}\",\"path\":\"/api/v1/items/{}\",\"took_us\":{}}}\n",
            line / 60 % 60,
            line % 60,
            seed >> 54,
            ["info", "warn", "debug"][line % 3],
            seed >> 48,
            seed >> 40 & 0xffff,
        ));
    }
    out.into_bytes()
}

/// Text and what does not shrink, in turns, in pieces of the sizes given.
fn pieces(sizes: &[(usize, bool)]) -> Vec<Vec<u8>> {
    let text = log(2_000);
    let mut seed = 7_u64;
    let mut at = 0;
    let mut out = Vec::new();
    for &(size, wordy) in sizes {
        let size = size.clamp(1, STREAM_DATA_BYTES_MAX);
        out.push(if wordy {
            let from = at % (text.len() - STREAM_DATA_BYTES_MAX);
            at += size;
            text[from..from + size].to_vec()
        } else {
            (0..size)
                .map(|_| {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    seed as u8
                })
                .collect()
        });
    }
    out
}

fn codecs() -> impl Strategy<Value = Codec> {
    prop_oneof![Just(Codec::Lz4), Just(Codec::Zstd)]
}

fn methods() -> impl Strategy<Value = Method> {
    (0..Method::ALL.len()).prop_map(|index| Method::ALL[index])
}

#[test]
fn what_came_before_helps() {
    for codec in Codec::ALL {
        let text = log(4_000);
        let (mut together, mut apart) = (0, 0);
        let (mut packer, mut fresh) = (Packer::new(codec).unwrap(), Packer::new(codec).unwrap());
        for piece in text.chunks_exact(1_000) {
            together += packer.pack(piece).unwrap().len();
            fresh.restart();
            apart += fresh.pack(piece).unwrap().len();
        }
        assert!(together * 10 < apart * 9, "{codec:?}: {together} {apart}");
        assert!(together * 2 < text.len(), "{codec:?}: {together}");
    }
}

#[test]
fn a_longer_search_makes_text_shorter_and_takes_no_more_memory() {
    let text = log(8_000);
    let [(fast, most), (thorough, memory)] = [&zstd::FAST[..], &zstd::THOROUGH].map(|parameters| {
        let mut packer = zstd::Packer::new(parameters).unwrap();
        let pieces = text.chunks(12_000);
        let packed: usize = pieces.map(|p| packer.pack(p).unwrap().len()).sum();
        (packed, packer.memory_bytes())
    });
    assert!(thorough * 20 < fast * 19, "{thorough} {fast}");
    assert!(memory <= most, "{memory} {most}");
}

/// A frame of Zstandard with that window, flushed behind each piece.
fn by_zstd(window_log: u32, pieces: &[&[u8]]) -> Vec<Vec<u8>> {
    let mut context = zstd_safe::CCtx::create();
    context
        .set_parameter(zstd_safe::CParameter::WindowLog(window_log))
        .unwrap();
    let mut out = vec![0; 2 * STREAM_DATA_BYTES_MAX];
    let mut pack = |piece: &&[u8]| {
        let mut output = zstd_safe::OutBuffer::around(&mut out[..]);
        let mut input = zstd_safe::InBuffer::around(piece);
        let flush = zstd_safe::zstd_sys::ZSTD_EndDirective::ZSTD_e_flush;
        let left = context.compress_stream2(&mut output, &mut input, flush);
        assert_eq!(left, Ok(0));
        output.as_slice().to_vec()
    };
    pieces.iter().map(&mut pack).collect()
}

#[test]
fn an_unpacker_keeps_what_it_says_at_most() {
    let text = log(4_000);
    let pieces: Vec<&[u8]> = text.chunks(STREAM_DATA_BYTES_MAX).collect();
    let mut unpacker = zstd::Unpacker::new().unwrap();
    for (packed, piece) in by_zstd(WINDOW_LOG, &pieces).iter().zip(pieces) {
        assert_eq!(unpacker.unpack(packed, piece.len()).unwrap(), piece);
        assert!(unpacker.memory_bytes() <= UNPACKER_BYTES_MAX);
    }
}

#[test]
fn a_frame_that_wants_a_larger_window_is_refused() {
    let packed = &by_zstd(WINDOW_LOG + 1, &[&[b'a'; 4096]])[0];
    let mut unpacker = Unpacker::new(Codec::Zstd).unwrap();
    let refused = Err(CodecError::Corrupt(Codec::Zstd));
    assert_eq!(unpacker.unpack(packed, 4096), refused);
}

#[test]
fn a_piece_that_hides_more_than_it_says_is_refused() {
    for codec in Codec::ALL {
        let piece = vec![b'a'; STREAM_DATA_BYTES_MAX];
        let mut packer = Packer::new(codec).unwrap();
        let packed = packer.pack(&piece).unwrap();
        for said in [1, 100, piece.len() - 1] {
            let mut unpacker = Unpacker::new(codec).unwrap();
            assert!(unpacker.unpack(packed, said).is_err(), "{codec:?} {said}");
        }
        let mut unpacker = Unpacker::new(codec).unwrap();
        assert!(unpacker.unpack(packed, piece.len() + 1).is_err());
    }
}

proptest! {
    #[test]
    fn pieces_come_back(
        method in methods(),
        sizes in proptest::collection::vec((1usize..70_000, any::<bool>()), 1..40),
        small in proptest::collection::vec(1usize..200, 0..40),
    ) {
        let mut sizes = sizes;
        sizes.extend(small.into_iter().map(|size| (size, true)));
        let (mut packer, mut unpacker) = (Packer::new(method).unwrap(), Unpacker::new(method.codec()).unwrap());
        for piece in pieces(&sizes) {
            if let Some(packed) = packer.pack(&piece) {
                prop_assert_eq!(unpacker.unpack(packed, piece.len()).unwrap(), piece);
            } else {
                packer.restart();
                unpacker.restart();
            }
        }
    }

    #[test]
    fn garbage_does_no_harm(
        codec in codecs(),
        pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..600), 1..8),
        plain_bytes in 1usize..=STREAM_DATA_BYTES_MAX,
    ) {
        let mut unpacker = Unpacker::new(codec).unwrap();
        for piece in &pieces {
            if let Ok(plain) = unpacker.unpack(piece, plain_bytes) {
                prop_assert_eq!(plain.len(), plain_bytes);
            }
        }
    }

    #[test]
    fn damage_does_no_harm(
        codec in codecs(),
        changes in proptest::collection::vec((any::<usize>(), any::<u8>(), any::<bool>()), 1..12),
        more in -3isize..4,
    ) {
        let text = log(400);
        let (mut packer, mut unpacker) = (Packer::new(codec).unwrap(), Unpacker::new(codec).unwrap());
        for (i, piece) in text.chunks(3_000).enumerate() {
            let mut packed = packer.pack(piece).unwrap().to_vec();
            if i > 0 {
                for &(at, value, cut) in &changes {
                    let at = at % packed.len();
                    packed[at] = value;
                    if cut && at > 0 {
                        packed.truncate(at);
                    }
                }
            }
            let said = piece.len().saturating_add_signed(if i > 0 { more } else { 0 }).max(1);
            match unpacker.unpack(&packed, said) {
                Ok(plain) => prop_assert_eq!(plain.len(), said),
                Err(_) => unpacker.restart(),
            }
        }
    }
}
