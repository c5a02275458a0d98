//! The Holdfast agent.

pub mod dial;
pub mod glob;
pub mod link;
pub mod policy;
