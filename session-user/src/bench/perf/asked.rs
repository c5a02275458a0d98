//! The application with very many connections, as a process that is told what to do.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout};

use anyhow::{Context, ensure};
use serde::de::DeserializeOwned;

use super::super::load::{Opened, Stalls};

/// The application; it ends with this value.
pub struct Asked {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Drop for Asked {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Asked {
    /// Takes over an `app-many` with pipes, and waits until `streams` connections stand: all of them, or it is an error.
    pub fn open(mut child: Child, streams: usize) -> anyhow::Result<(Self, Opened)> {
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (orders, answers) = pipes.context("the application has no pipes")?;
        let mut this = Self {
            child,
            orders,
            answers: BufReader::new(answers),
        };
        let opened: Opened = this.answer()?;
        let trouble = opened.trouble.as_deref().unwrap_or("nothing was said");
        ensure!(
            opened.streams == streams,
            "{} of {streams} connections were made: {trouble}",
            opened.streams
        );
        Ok((this, opened))
    }

    /// Lets every connection ask now and then.
    pub fn begin(&mut self) -> anyhow::Result<()> {
        self.order::<String>("begin").map(drop)
    }

    /// Sends on every connection until nothing more is taken; returns the bytes.
    pub fn flood(&mut self) -> anyhow::Result<u64> {
        self.order("flood")
    }

    /// How long echoes were waited for between two times, in nanoseconds of CLOCK_MONOTONIC.
    pub fn stalls(&mut self, from: u64, to: u64) -> anyhow::Result<Stalls> {
        self.order(&format!("stalls {from} {to}"))
    }

    fn order<T: DeserializeOwned>(&mut self, order: &str) -> anyhow::Result<T> {
        writeln!(self.orders, "{order}")?;
        self.answer()
    }

    fn answer<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the application has ended");
        Ok(serde_json::from_str(&line)?)
    }
}
