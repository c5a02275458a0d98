//! Measurements of the program itself, and the rows that they print.

use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::{finish, program};

/// Runs `holdfast bench` with these words and `--json`; returns its rows.
pub fn measured(words: &[&str], limit: Duration) -> anyhow::Result<Vec<Value>> {
    let child = Command::new(program())
        .arg("bench")
        .args(words)
        .arg("--json")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    rows(&finish(child, limit)?)
}

/// The rows of a measurement that has ended, and ended well.
pub fn rows(output: &Output) -> anyhow::Result<Vec<Value>> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", output.status);
    serde_json::from_slice(&output.stdout).with_context(|| said.into_owned())
}
