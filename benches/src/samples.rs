//! What is packed where packing is measured: the same bytes in every run.

/// A log as services write them, `bytes` of it.
pub fn log(bytes: usize) -> Vec<u8> {
    let mut out = String::with_capacity(bytes + 256);
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for line in 0_u64.. {
        if out.len() >= bytes {
            break;
        }
        seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(line);
        out.push_str(&format!(
            "{{\"ts\":\"2026-01-01T00:{:02}:{:02}.{:03}Z\",\"level\":\"{}\",\"path\":\"/api/v1/items/{}\",\"took_us\":{}}}\n",
            line / 60 % 60,
            line % 60,
            seed >> 54,
            ["info", "warn", "debug"][(line % 3) as usize],
            seed >> 48,
            seed >> 40 & 0xffff,
        ));
    }
    out.truncate(bytes);
    out.into_bytes()
}

/// What does not shrink.
pub fn random(bytes: usize) -> Vec<u8> {
    let mut seed = 7_u64;
    let next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed as u8
    };
    std::iter::repeat_with(next).take(bytes).collect()
}
