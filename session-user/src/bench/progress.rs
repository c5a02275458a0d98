//! Long measurements show how far they are.

use std::time::{Duration, Instant};

use crate::stdio::say;
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

/// A bar on standard error; where that is no terminal, nothing.
pub fn progress(label: &str, runs: usize) -> ProgressBar {
    bar(label, runs as u64, "cuts")
}

/// The same of something else than cuts.
pub fn bar(label: &str, length: u64, unit: &str) -> ProgressBar {
    let bar = ProgressBar::new(length);
    let style = format!("{{msg:24}} {{bar:30}} {{pos}}/{{len}} {unit}  {{eta}} left");
    let style = ProgressStyle::with_template(&style);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(label.to_owned());
    bar
}

/// How far a measurement of several plans is, on standard error: a line at the start of each plan.
pub struct Plans {
    all: usize,
    begun: usize,
    runs_left: usize,
    runs_done: usize,
    spent: Duration,
    current: Option<(Instant, usize)>,
}

impl Plans {
    /// Of plans with so many cuts each.
    pub fn new(runs: impl IntoIterator<Item = usize>) -> Self {
        let (all, runs_left) = runs
            .into_iter()
            .fold((0, 0), |(all, left), runs| (all + 1, left + runs));
        Self {
            all,
            begun: 0,
            runs_left,
            runs_done: 0,
            spent: Duration::ZERO,
            current: None,
        }
    }

    /// The next plan has its rows already.
    pub fn skip(&mut self, label: &str, runs: usize) {
        self.end_current();
        self.begun += 1;
        self.runs_left -= runs.min(self.runs_left);
        say(format_args!(
            "plan {} of {}: {label}: measured before",
            self.begun, self.all
        ));
    }

    /// The next plan begins; the one before has ended.
    pub fn begin(&mut self, label: &str, runs: usize) {
        self.end_current();
        self.begun += 1;
        let left = self.left().map_or_else(String::new, |left| {
            format!("; about {} left", HumanDuration(left))
        });
        if self.all > 1 {
            say(format_args!(
                "plan {} of {}: {label}{left}",
                self.begun, self.all
            ));
        }
        self.current = Some((Instant::now(), runs));
    }

    fn end_current(&mut self) {
        if let Some((began, runs)) = self.current.take() {
            self.done(began.elapsed(), runs);
        }
    }

    fn done(&mut self, spent: Duration, runs: usize) {
        self.spent += spent;
        self.runs_done += runs;
        self.runs_left -= runs.min(self.runs_left);
    }

    /// Cuts cost different times in different plans; their mean is what is known.
    fn left(&self) -> Option<Duration> {
        let mean = self.spent.as_secs_f64() / self.runs_done as f64;
        let left = mean * self.runs_left as f64;
        (self.runs_done > 0)
            .then(|| Duration::try_from_secs_f64(left).ok())
            .flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_comes_from_the_plans_done() {
        let mut plans = Plans::new([10, 10, 20, 5]);
        assert_eq!(plans.left(), None);
        plans.done(Duration::from_secs(30), 10);
        assert_eq!(plans.left(), Some(Duration::from_secs(3 * 35)));
        plans.skip("cut bulk", 10);
        assert_eq!(plans.left(), Some(Duration::from_secs(3 * 25)));
        plans.done(Duration::from_secs(90), 20);
        assert_eq!(plans.left(), Some(Duration::from_secs(4 * 5)));
    }
}
