//! What the performance of the session core is watched with: criterion's benches in `benches/`, the tests that nothing is
//! allocated for each record in `tests/` and in the system tests, and `examples/guard.rs`, whose instructions `cargo xtask bench guard` counts.

pub mod counting;
mod pair;
pub mod samples;

pub use pair::{End, Pair};
