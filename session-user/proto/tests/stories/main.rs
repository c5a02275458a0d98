//! The plain stories of two sessions, one promise each.

mod handover;
mod modes;
mod pair;
mod session;
mod silence;
