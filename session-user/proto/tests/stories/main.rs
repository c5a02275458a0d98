//! The plain stories of two sessions, one promise each.

mod crowd;
mod flow_features;
mod flows;
mod gaps;
mod handover;
mod modes;
mod net;
mod packing;
mod pair;
mod room;
mod session;
mod silence;
mod urgent;
