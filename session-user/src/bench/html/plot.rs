//! One plot as SVG, to stand inside the page.

use plotters::coord::ranged1d::Ranged;
use plotters::prelude::{ChartBuilder, IntoDrawingArea, LineSeries, PathElement, SVGBackend};
use plotters::style::{Color, IntoFont, RGBColor, ShapeStyle};

use super::axis::Axis;

/// Drawn at twice the size that it is looked at: the library's coordinates are whole numbers.
const SIZE: (u32, u32) = (1120, 540);
/// Height of letters in these coordinates.
const LETTERS: u32 = 25;
/// Width of lines in them.
const LINE: u32 = 4;
const LINE_STRONG: u32 = 7;

/// Colours that the page's style sheet replaces, for light and for dark.
pub const INK: RGBColor = RGBColor(1, 1, 1);
pub const GRID: RGBColor = RGBColor(2, 2, 2);
pub const MARK: RGBColor = RGBColor(3, 3, 3);

/// A line of a plot.
#[derive(Clone, Debug)]
pub struct Line {
    /// Its colour.
    pub colour: RGBColor,
    /// Wider than the others.
    pub strong: bool,
    /// Its points, in the axes' values.
    pub points: Vec<(f64, f64)>,
}

/// What is drawn.
#[derive(Clone, Debug)]
pub struct Plot {
    /// Across.
    pub x: Axis,
    /// Upwards.
    pub y: Axis,
    /// Under the x axis.
    pub x_title: String,
    /// Values of x that are marked with a line from bottom to top.
    pub marks: Vec<f64>,
    /// The last is on top.
    pub lines: Vec<Line>,
    /// What it shows, for those who do not see it.
    pub title: String,
}

impl Plot {
    /// As an element of the page.
    pub fn svg(&self) -> anyhow::Result<String> {
        let mut text = String::new();
        self.draw(SVGBackend::with_string(&mut text, SIZE))?;
        Ok(svg_element(&text, SIZE, &self.title))
    }

    fn draw(&self, backend: SVGBackend<'_>) -> anyhow::Result<()> {
        let root = backend.into_drawing_area();
        let letters = ("sans-serif", LETTERS).into_font().color(&INK);
        let mut chart = ChartBuilder::on(&root)
            .margin(16)
            .margin_right(44)
            .x_label_area_size(70)
            .y_label_area_size(108)
            .build_cartesian_2d(self.x.clone(), self.y.clone())?;
        chart
            .configure_mesh()
            .axis_style(GRID.stroke_width(2))
            .bold_line_style(GRID.stroke_width(1))
            .x_desc(&self.x_title)
            .axis_desc_style(letters.clone())
            .label_style(letters)
            .draw()?;
        let height = self.y.range();
        for &mark in &self.marks {
            let ends = vec![(mark, height.start), (mark, height.end)];
            chart.draw_series([PathElement::new(ends, MARK.stroke_width(3))])?;
        }
        for line in &self.lines {
            chart.draw_series(LineSeries::new(line.points.iter().copied(), style(line)))?;
        }
        root.present()?;
        Ok(())
    }
}

/// A file of its own as an element of the page, which is HTML: the file's name space is not wanted, nor its fixed size.
pub fn svg_element(file: &str, size: (u32, u32), title: &str) -> String {
    let inside = file.split_once('>').map_or("", |(_, inside)| inside);
    format!(
        "<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">{inside}",
        size.0,
        size.1,
        super::escape(title)
    )
}

fn style(line: &Line) -> ShapeStyle {
    line.colour
        .stroke_width(if line.strong { LINE_STRONG } else { LINE })
}

/// The points that a line needs to look the same: those left out are within `tolerance` of it in y.
pub fn simplify(points: &[(f64, f64)], tolerance: f64) -> Vec<(f64, f64)> {
    let Some(last) = points.len().checked_sub(1) else {
        return Vec::new();
    };
    let mut keep = vec![false; points.len()];
    keep[0] = true;
    keep[last] = true;
    let mut spans = vec![(0, last)];
    while let Some((from, to)) = spans.pop() {
        let (a, b) = (points[from], points[to]);
        let slope = (b.1 - a.1) / (b.0 - a.0);
        let away = |i: &usize| (points[*i].1 - a.1 - slope * (points[*i].0 - a.0)).abs();
        let farthest = (from + 1..to).max_by(|i, j| away(i).total_cmp(&away(j)));
        if let Some(i) = farthest.filter(|i| away(i) > tolerance) {
            keep[i] = true;
            spans.extend([(from, i), (i, to)]);
        }
    }
    points
        .iter()
        .zip(keep)
        .filter_map(|(point, keep)| keep.then_some(*point))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn straight_parts_need_their_ends_alone() {
        let points: Vec<(f64, f64)> = (0..100)
            .map(|x| (f64::from(x), f64::from(x.clamp(20, 60))))
            .collect();
        let few = simplify(&points, 0.1);
        assert_eq!(few, [(0.0, 20.0), (20.0, 20.0), (60.0, 60.0), (99.0, 60.0)]);
        assert!(simplify(&[], 0.1).is_empty());
        assert_eq!(simplify(&points[..1], 0.1).len(), 1);
    }

    #[test]
    fn a_plot_is_one_element_without_a_name_space() -> anyhow::Result<()> {
        let plot = Plot {
            x: Axis::linear(-100.0, 300.0),
            y: Axis::linear(0.0, 10.0),
            x_title: "ms".to_owned(),
            marks: vec![0.0],
            lines: vec![Line {
                colour: RGBColor(0, 114, 178),
                strong: true,
                points: vec![(-100.0, 0.0), (300.0, 10.0)],
            }],
            title: "a <plot>".to_owned(),
        };
        let svg = plot.svg()?;
        assert!(svg.starts_with("<svg viewBox"));
        assert!(svg.trim_end().ends_with("</svg>"));
        assert!(svg.contains("a &lt;plot&gt;"));
        assert!(svg.contains("#0072B2"));
        assert!(!svg.contains("://"));
        Ok(())
    }
}
