//! An axis: its range, its ticks, linear or logarithmic.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};

/// Steps of ticks within a power of ten.
const STEPS: [f64; 4] = [1.0, 2.0, 5.0, 10.0];
/// Ticks that fit under a plot of our width.
const TICKS_MAX: f64 = 6.0;
/// Rounding must not lose the tick at the end of a range.
const SLACK: f64 = 1e-9;

/// One axis of a plot.
#[derive(Clone, Debug)]
pub struct Axis {
    from: f64,
    to: f64,
    log: bool,
    label: fn(f64) -> String,
}

impl Axis {
    /// From `from` to `to`; wider if that is no range.
    pub fn linear(from: f64, to: f64) -> Self {
        let to = if to > from { to } else { from + 1.0 };
        Self {
            from,
            to,
            log: false,
            label: number,
        }
    }

    /// The same by orders of magnitude; both ends above zero.
    pub fn log(from: f64, to: f64) -> Self {
        let from = from.max(1e-3);
        let to = if to > from { to } else { from * 10.0 };
        Self {
            log: true,
            ..Self::linear(from, to)
        }
    }

    /// With these words at its ticks.
    pub fn labelled(self, label: fn(f64) -> String) -> Self {
        Self { label, ..self }
    }

    /// Its right or upper end.
    pub fn end(&self) -> f64 {
        self.to
    }

    /// Where a value stands: 0 at one end, 1 at the other. What is outside stands at the edge.
    fn part(&self, value: f64) -> f64 {
        let scale = |v: f64| if self.log { v.log10() } else { v };
        let value = scale(value.clamp(self.from, self.to));
        (value - scale(self.from)) / (scale(self.to) - scale(self.from))
    }

    /// Round values.
    fn ticks(&self) -> Vec<f64> {
        if self.log {
            self.log_ticks()
        } else {
            self.linear_ticks()
        }
    }

    fn linear_ticks(&self) -> Vec<f64> {
        let rough = (self.to - self.from) / TICKS_MAX;
        let power = 10f64.powf(rough.log10().floor());
        let step = STEPS
            .into_iter()
            .map(|s| s * power)
            .find(|s| *s >= rough - SLACK)
            .unwrap_or(rough);
        let first = (self.from / step - SLACK).ceil() as i64;
        let last = (self.to / step + SLACK).floor() as i64;
        (first..=last).map(|i| i as f64 * step).collect()
    }

    fn log_ticks(&self) -> Vec<f64> {
        let decades = (self.to / self.from).log10();
        // As many steps in each power of ten as there is room for.
        let steps = if decades > 3.0 {
            &STEPS[..1]
        } else {
            &STEPS[..3]
        };
        let first = self.from.log10().floor() as i32;
        let last = self.to.log10().ceil() as i32;
        let within = |v: &f64| *v >= self.from - SLACK && *v <= self.to + SLACK;
        (first..=last)
            .flat_map(|power| steps.iter().map(move |s| s * 10f64.powi(power)))
            .filter(within)
            .collect()
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (first, last): (i32, i32)) -> i32 {
        first + (self.part(*value) * f64::from(last - first)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() {
            return Vec::new();
        }
        self.ticks()
    }

    fn range(&self) -> Range<f64> {
        self.from..self.to
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        (self.label)(*value)
    }
}

/// A value in as few digits as it needs.
pub fn number(value: f64) -> String {
    let rounded = (value * 1e3).round() / 1e3;
    // There is no minus zero on an axis.
    format!("{}", rounded + 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(axis: &Axis) -> Vec<f64> {
        let values = axis.ticks().into_iter();
        values.map(|v| (v * 1e6).round() / 1e6).collect()
    }

    #[test]
    fn ticks_stand_at_round_values() {
        assert_eq!(
            values(&Axis::linear(-100.0, 900.0)),
            [0.0, 200.0, 400.0, 600.0, 800.0]
        );
        assert_eq!(
            values(&Axis::linear(40.0, 45.0)),
            [40.0, 41.0, 42.0, 43.0, 44.0, 45.0]
        );
        assert_eq!(
            values(&Axis::log(3.0, 120.0)),
            [5.0, 10.0, 20.0, 50.0, 100.0]
        );
        assert_eq!(
            values(&Axis::log(0.8, 20_000.0)),
            [1.0, 10.0, 100.0, 1000.0, 10_000.0]
        );
    }

    #[test]
    fn what_is_outside_stands_at_the_edge() {
        let axis = Axis::log(1.0, 100.0);
        assert_eq!(axis.map(&0.0, (100, 300)), 100);
        assert_eq!(axis.map(&10.0, (100, 300)), 200);
        assert_eq!(axis.map(&1e6, (100, 300)), 300);
        assert_eq!(axis.map(&10.0, (300, 100)), 200);
        assert!(Axis::linear(5.0, 5.0).end() > 5.0);
    }

    #[test]
    fn labels_are_short() {
        assert_eq!(number(-0.0), "0");
        assert_eq!(number(0.30000000000000004), "0.3");
        let axis = Axis::linear(0.0, 1.0).labelled(|v| format!("{} %", number(v * 100.0)));
        assert_eq!(axis.format_ext(&0.2), "20 %");
    }
}
