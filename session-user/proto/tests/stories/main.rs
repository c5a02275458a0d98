//! The plain stories of two sessions, one promise each.

mod handover;
mod pair;
mod session;
mod silence;
