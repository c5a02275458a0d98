//! Long measurements show how far they are.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar on standard error; where that is no terminal, nothing.
pub fn progress(label: &str, runs: usize) -> ProgressBar {
    let bar = ProgressBar::new(runs as u64);
    let style = ProgressStyle::with_template("{msg:24} {bar:30} {pos}/{len} cuts  {eta} left");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(label.to_owned());
    bar
}
