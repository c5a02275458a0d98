//! Stalls from arrival times, and their distribution.

use serde::{Deserialize, Serialize};

/// A distribution; the name of the field that holds it ends with the unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Median.
    pub p50: f64,
    /// 95th percentile, by nearest rank.
    pub p95: f64,
    /// Largest.
    pub max: f64,
}

impl Summary {
    /// Of `values`; zero if there are none.
    pub fn of(values: &[f64]) -> Self {
        let sorted = sorted(values);
        Self {
            p50: ranked(&sorted, 0.5),
            p95: ranked(&sorted, 0.95),
            max: sorted.last().copied().unwrap_or(0.0),
        }
    }
}

/// A distribution of what should be much; the name of the field that holds it ends with the unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lows {
    /// Median.
    pub p50: f64,
    /// 5th percentile, by nearest rank.
    pub p5: f64,
    /// Least.
    pub min: f64,
}

impl Lows {
    /// Of `values`; zero if there are none.
    pub fn of(values: &[f64]) -> Self {
        let sorted = sorted(values);
        Self {
            p50: ranked(&sorted, 0.5),
            p5: ranked(&sorted, 0.05),
            min: sorted.first().copied().unwrap_or(0.0),
        }
    }
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The percentile `p` by nearest rank; zero of nothing.
fn ranked(sorted: &[f64], p: f64) -> f64 {
    let n = (p * sorted.len() as f64).ceil() as usize;
    sorted.get(n.saturating_sub(1)).copied().unwrap_or(0.0)
}

/// The empirical distribution: for each value, in order, the part of the values that are not above it.
pub fn ecdf(values: &[f64]) -> Vec<(f64, f64)> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let all = sorted.len() as f64;
    let mut out: Vec<(f64, f64)> = Vec::new();
    for (below, value) in sorted.into_iter().enumerate() {
        let part = (below + 1) as f64 / all;
        match out.last_mut() {
            Some(last) if last.0 >= value => last.1 = part,
            _ => out.push((value, part)),
        }
    }
    out
}

/// A histogram for people: one line for each bucket, in powers of two of milliseconds.
pub fn histogram(values: &[f64]) -> String {
    const BAR: usize = 40;
    let bucket = |v: f64| (0..20).find(|b| v < f64::from(1u32 << b)).unwrap_or(20);
    let mut counts = [0usize; 21];
    for &v in values {
        counts[bucket(v)] += 1;
    }
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    let (Some(first), Some(last)) = (
        counts.iter().position(|c| *c > 0),
        counts.iter().rposition(|c| *c > 0),
    ) else {
        return String::new();
    };
    let mut out = String::new();
    for (b, count) in counts.iter().enumerate().take(last + 1).skip(first) {
        let bar = "#".repeat((count * BAR).div_ceil(most));
        out.push_str(&format!("  < {:>6} ms {count:>5}  {bar}\n", 1u32 << b));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(
            Summary::of(&values),
            Summary {
                p50: 50.0,
                p95: 95.0,
                max: 100.0
            }
        );
        assert_eq!(Summary::of(&[]), Summary::default());
        let lows = Lows {
            p50: 50.0,
            p5: 5.0,
            min: 1.0,
        };
        assert_eq!(Lows::of(&values), lows);
        assert_eq!(Lows::of(&[]), Lows::default());
    }

    #[test]
    fn the_distribution_steps_at_each_value() {
        assert_eq!(
            ecdf(&[3.0, 1.0, 2.0, 2.0]),
            [(1.0, 0.25), (2.0, 0.75), (3.0, 1.0)]
        );
        assert_eq!(ecdf(&[]), []);
    }
}
