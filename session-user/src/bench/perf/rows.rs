//! Figures of several passes, as rows.

use serde::Serialize;

use super::goals::Goal;
use super::names::Name;

/// One figure of one system.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// What was measured.
    pub measure: &'static str,
    /// Through what.
    pub system: &'static str,
    /// The median of the passes.
    pub value: f64,
    /// Of `value`, `min` and `max`.
    pub unit: &'static str,
    /// The system, or the measure of the same system, that it is compared with; none where there is nothing.
    pub ratio_to: Option<&'static str>,
    /// The median of the passes' own ratios, since what disturbs a pass disturbs both.
    pub ratio: Option<f64>,
    /// Passes, or where a pass measures several times, all of these; where there is a ratio, those that are compared.
    pub runs: usize,
    /// The least of them.
    pub min: f64,
    /// The largest of them.
    pub max: f64,
    /// What it is to be; none where nothing is promised.
    pub goal: Option<Goal>,
    /// Whether it is; none without a goal, where there is nothing to compare with, and after too few passes.
    pub met: Option<bool>,
}

/// The passes of one measure through one system.
#[derive(Clone, Debug)]
pub struct Figures {
    /// What was measured.
    pub measure: &'static str,
    /// Through what.
    pub system: &'static str,
    /// Of the values.
    pub unit: &'static str,
    /// One for each pass.
    pub values: Vec<f64>,
}

impl Figures {
    /// Figures without a pass.
    pub const fn new(name: Name, system: &'static str) -> Self {
        Self {
            measure: name.0,
            system,
            unit: name.1,
            values: Vec::new(),
        }
    }

    /// The same with these values.
    pub fn of(name: Name, system: &'static str, values: Vec<f64>) -> Self {
        Self {
            values,
            ..Self::new(name, system)
        }
    }

    /// The row, compared pass by pass with `other`, which is called `to`.
    pub fn row(&self, other: Option<(&'static str, &Self)>) -> Row {
        let ratios = other.map(|(_, other)| {
            let pairs = self.values.iter().zip(&other.values);
            pairs
                .map(|(mine, theirs)| mine / theirs)
                .collect::<Vec<_>>()
        });
        Row {
            measure: self.measure,
            system: self.system,
            value: median(&self.values),
            unit: self.unit,
            ratio_to: other.map(|(to, _)| to),
            ratio: ratios.as_deref().map(median).filter(|r| r.is_finite()),
            runs: ratios.as_ref().map_or(self.values.len(), Vec::len),
            min: self.values.iter().copied().fold(f64::INFINITY, f64::min),
            max: self.values.iter().copied().fold(0.0, f64::max),
            goal: None,
            met: None,
        }
    }

    /// The median.
    pub fn median(&self) -> f64 {
        median(&self.values)
    }
}

/// The median; of an even number of values the mean of the two in the middle; NaN of nothing.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    match sorted[..] {
        [] => f64::NAN,
        _ if sorted.len().is_multiple_of(2) => f64::midpoint(sorted[half - 1], sorted[half]),
        _ => sorted[half],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(system: &'static str, values: &[f64]) -> Figures {
        Figures {
            measure: "goodput",
            system,
            unit: "MB/s",
            values: values.to_vec(),
        }
    }

    #[test]
    fn passes_are_compared_with_their_own() {
        // The last pass is disturbed, and both with it.
        let (mine, theirs) = (
            figures("mine", &[90.0, 99.0, 45.0]),
            figures("theirs", &[100.0, 110.0, 50.0]),
        );
        let row = mine.row(Some(("theirs", &theirs)));
        assert_eq!((row.value, row.min, row.max), (90.0, 45.0, 99.0));
        assert_eq!(row.ratio, Some(0.9));
        assert_eq!(row.ratio_to, Some("theirs"));
        assert_eq!(mine.row(None).ratio, None);
    }

    #[test]
    fn two_in_the_middle_count_alike() {
        for (values, expected) in [
            (&[5.0][..], 5.0),
            (&[4.0, 1.0], 2.5),
            (&[9.0, 1.0, 2.0], 2.0),
            (&[8.0, 1.0, 100.0, 2.0], 5.0),
        ] {
            let row = figures("mine", values).row(Some(("one", &figures("one", &[1.0; 4]))));
            assert_eq!((row.value, row.ratio), (expected, Some(expected)));
        }
        assert!(figures("mine", &[]).median().is_nan());
    }

    #[test]
    fn a_ratio_to_nothing_is_none() {
        let row = figures("mine", &[1.0]).row(Some(("none", &figures("none", &[0.0]))));
        assert_eq!(row.ratio, None);
    }
}
