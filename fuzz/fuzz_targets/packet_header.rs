//! The front of a packet of the UDP transport.
#![no_main]

#[path = "../../session-user/proto/tests/harness/mod.rs"]
#[allow(dead_code)]
mod harness;

libfuzzer_sys::fuzz_target!(|input: &[u8]| harness::packet_header(input));
