//! One value of each system as a bar, with the least and the largest of the passes, and goals as lines.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged};
use plotters::prelude::{ChartBuilder, IntoDrawingArea, PathElement, Rectangle, SVGBackend};
use plotters::style::{Color, IntoFont, RGBColor};

use super::axis::Axis;
use super::plot::{GRID, INK, MARK, svg_element};

/// Drawn at twice the size that it is looked at, as the other plots.
const WIDTH: u32 = 1120;
const BAR_HEIGHT: u32 = 52;
/// Of what stands under the bars, and above.
const BESIDE_HEIGHT: u32 = 112;
const LETTERS: u32 = 25;
/// Half of a bar's part of its row, and half of the height of a whisker's ends.
const BAR: f64 = 0.32;
const WHISKER: f64 = 0.14;

/// One bar.
#[derive(Clone, Debug)]
pub struct Bar {
    /// Before it.
    pub name: String,
    /// Its colour.
    pub colour: RGBColor,
    /// Its length.
    pub value: f64,
    /// Where its whisker begins and ends.
    pub range: (f64, f64),
}

/// What is drawn, the first bar on top.
#[derive(Clone, Debug)]
pub struct Bars {
    /// The bars.
    pub bars: Vec<Bar>,
    /// Values that are marked with a line from top to bottom.
    pub goals: Vec<f64>,
    /// Under the axis.
    pub unit: String,
    /// What it shows, for those who do not see it.
    pub title: String,
}

/// The axis of the bars' names: each has a row of height 1.
#[derive(Clone, Copy)]
struct Rows(usize);

impl Ranged for Rows {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (bottom, top): (i32, i32)) -> i32 {
        top + (value / self.0 as f64 * f64::from(bottom - top)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() {
            return Vec::new();
        }
        (0..self.0).map(|row| row as f64 + 0.5).collect()
    }

    fn range(&self) -> Range<f64> {
        0.0..self.0 as f64
    }
}

impl plotters::coord::ranged1d::ValueFormatter<f64> for Rows {}

impl Bars {
    /// As an element of the page.
    pub fn svg(&self) -> anyhow::Result<String> {
        let size = (
            WIDTH,
            BESIDE_HEIGHT + BAR_HEIGHT * self.bars.len().max(1) as u32,
        );
        let mut text = String::new();
        self.draw(SVGBackend::with_string(&mut text, size))?;
        Ok(svg_element(&text, size, &self.title))
    }

    fn draw(&self, backend: SVGBackend<'_>) -> anyhow::Result<()> {
        let root = backend.into_drawing_area();
        let letters = ("sans-serif", LETTERS).into_font().color(&INK);
        let ends = self.bars.iter().map(|b| b.range.1.max(b.value));
        let most = ends.chain(self.goals.iter().copied()).fold(0.0, f64::max);
        let rows = self.bars.len();
        let mut chart = ChartBuilder::on(&root)
            .margin(12)
            .margin_right(44)
            .x_label_area_size(70)
            .y_label_area_size(240)
            .build_cartesian_2d(Axis::linear(0.0, most * 1.05), Rows(rows.max(1)))?;
        let name = |at: &f64| {
            let bar = self.bars.get(*at as usize);
            bar.map_or(String::new(), |bar| bar.name.clone())
        };
        chart
            .configure_mesh()
            .disable_y_mesh()
            .axis_style(GRID.stroke_width(2))
            .bold_line_style(GRID.stroke_width(1))
            .y_label_formatter(&name)
            .x_desc(&self.unit)
            .axis_desc_style(letters.clone())
            .label_style(letters)
            .draw()?;
        for (row, bar) in self.bars.iter().enumerate() {
            let middle = row as f64 + 0.5;
            let corners = [(0.0, middle - BAR), (bar.value, middle + BAR)];
            chart.draw_series([Rectangle::new(corners, bar.colour.filled())])?;
            chart.draw_series(whisker(bar, middle))?;
        }
        for &goal in &self.goals {
            let ends = vec![(goal, 0.0), (goal, rows as f64)];
            chart.draw_series([PathElement::new(ends, MARK.stroke_width(4))])?;
        }
        root.present()?;
        Ok(())
    }
}

/// A line from the least to the largest, with an end at each.
fn whisker(bar: &Bar, middle: f64) -> [PathElement<(f64, f64)>; 3] {
    let (least, most) = bar.range;
    let end = |at| vec![(at, middle - WHISKER), (at, middle + WHISKER)];
    let between = vec![(least, middle), (most, middle)];
    [between, end(least), end(most)].map(|line| PathElement::new(line, INK.stroke_width(3)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bar_is_on_top_and_the_whisker_on_it() -> anyhow::Result<()> {
        assert_eq!(Rows(4).map(&0.0, (400, 100)), 100);
        assert_eq!(Rows(4).map(&4.0, (400, 100)), 400);
        let bar = |name: &str, value| Bar {
            name: name.to_owned(),
            colour: RGBColor(0, 114, 178),
            value,
            range: (value - 1.0, value + 1.0),
        };
        let bars = Bars {
            bars: vec![bar("first", 5.0), bar("a <second>", 7.0)],
            goals: vec![6.0],
            unit: "MB/s".to_owned(),
            title: "goodput".to_owned(),
        };
        let svg = bars.svg()?;
        assert!(svg.starts_with("<svg viewBox") && svg.trim_end().ends_with("</svg>"));
        for part in ["#0072B2", "#030303", "first", "a &lt;second&gt;", "MB/s"] {
            assert!(svg.contains(part), "{part}");
        }
        assert!(!svg.contains("://"));
        assert_eq!(svg.matches("<rect").count(), 2);
        Ok(())
    }
}
