//! `holdfast bench`.

pub mod app;
pub mod pattern;

use std::process::ExitCode;

/// What can be measured.
#[derive(Debug, clap::Subcommand)]
pub enum Bench {}

/// Measures.
pub fn run(bench: Bench) -> anyhow::Result<ExitCode> {
    match bench {}
}
