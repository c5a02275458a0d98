//! The Holdfast agent.
pub mod capture;
