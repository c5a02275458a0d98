//! Capture against the real kernel; see `harness`.
#[test]
fn loads() {
    super::kernel::try_load().unwrap_or_else(|error| panic!("{error}"));
}
