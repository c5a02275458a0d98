//! Packed pieces of a stream.
#![no_main]

#[path = "../../session-user/proto/tests/harness/mod.rs"]
#[allow(dead_code)]
mod harness;

libfuzzer_sys::fuzz_target!(|input: &[u8]| harness::codec(input));
