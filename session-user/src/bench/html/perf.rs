//! The page of `bench perf`.

use super::super::host::Host;
use super::super::perf::{self, Row};
use super::axis::number;
use super::bars::{Bar, Bars};
use super::plot::INK;
use super::tables::{cell, conditions_of, verdict};
use super::{FOOT, Figure, escape, figure, groups, head};

/// What the figures mean.
const METHOD: &str = "\
<p>Each system stands between an application and its server, in a lab of its own of network namespaces on one host. \
A <dfn>pass</dfn> goes over all systems in turn, so that what disturbs the machine for a while disturbs all. A bar is the \
median of the passes, its whisker reaches from the least to the largest. <em>Compared</em> is the median of the passes' own \
ratios. A dotted line is a goal; where it is a ratio, it stands at that part of the other's median. It takes three passes to meet \
or miss one, unless it is of a count.</p>\n";

/// The page of these rows, measured there.
pub fn page(rows: &[Row], host: &Host) -> anyhow::Result<String> {
    let systems = systems(rows);
    // Bars are filled, and whiskers have the colour of letters.
    let style = format!(
        "{}svg [stroke=\"{}\"]{{stroke:var(--ink)}}\n",
        groups::fills(systems.len()),
        groups::hex(INK)
    );
    let mut out = head("Holdfast: performance measured", systems.len(), &style);
    out.push_str(&format!(
        "<header><h1>Performance measured</h1>\n<p class=\"lead\">{}</p></header>\n",
        lead(rows)
    ));
    out.push_str("<section><h2>Conditions</h2>\n");
    out.push_str(&conditions_of(&[(host, rows.len())]));
    out.push_str("</section>\n<section><h2>What is measured</h2>\n");
    out.push_str(METHOD);
    out.push_str(&goals(rows));
    out.push_str("</section>\n");
    for of_measure in rows.chunk_by(|a, b| a.measure == b.measure) {
        out.push_str(&section(of_measure, rows, &systems)?);
    }
    out.push_str(FOOT);
    Ok(out)
}

/// Each once: ours first, the others as they come.
fn systems(rows: &[Row]) -> Vec<&'static str> {
    let mut out: Vec<&'static str> = Vec::new();
    for row in rows {
        if !out.contains(&row.system) {
            out.push(row.system);
        }
    }
    out.sort_by_key(|system| !is_own(system));
    out
}

fn is_own(system: &str) -> bool {
    system.starts_with("holdfast")
}

fn words(measure: &str) -> String {
    measure.replace('_', " ")
}

fn lead(rows: &[Row]) -> String {
    let measures = rows.chunk_by(|a, b| a.measure == b.measure).count();
    let (met, missed) = perf::met_and_missed(rows);
    format!("{measures} measures. Of the goals {met} are met, and {missed} missed.")
}

fn goals(rows: &[Row]) -> String {
    let mut out = String::from(
        "<h3>Goals</h3>\n<div class=\"scroll\"><table><thead><tr><th>Measure</th><th>System</th>\
         <th>Compared with</th><th class=\"n\">Goal</th><th class=\"n\">Measured</th></tr></thead><tbody>\n",
    );
    for row in rows {
        let Some(goal) = row.goal else { continue };
        let measured = if goal.ratio {
            row.ratio.map_or(String::new(), |r| format!("{r:.2} x"))
        } else {
            format!("{} {}", figures(row.value), unit(row))
        };
        let (class, sign) = verdict(row.met);
        out.push_str(&format!(
            "<tr><td>{}</td><td>{}</td><td>{}</td>{}{}</tr>\n",
            escape(&words(row.measure)),
            escape(row.system),
            escape(row.ratio_to.filter(|_| goal.ratio).unwrap_or("")),
            cell("n", &goal.to_string()),
            cell(&format!("n {class}"), &format!("{measured}{sign}")),
        ));
    }
    out.push_str("</tbody></table></div>\n");
    out.push_str(&format!(
        "<p class=\"note\">{}</p>\n",
        escape(perf::IN_WORDS)
    ));
    out
}

/// A ratio has no unit.
fn unit(row: &Row) -> &'static str {
    if row.unit == "1" { "" } else { row.unit }
}

/// As many digits as say something.
fn figures(value: f64) -> String {
    if value >= 100.0 {
        return number(value.round());
    }
    number((value * 100.0).round() / 100.0)
}

/// One measure: its plot, and its rows. `all` has what they are compared with.
fn section(rows: &[Row], all: &[Row], systems: &[&str]) -> anyhow::Result<String> {
    let Some(first) = rows.first() else {
        return Ok(String::new());
    };
    let title = words(first.measure);
    let bars = Bars {
        bars: bars(rows, systems),
        goals: rows.iter().filter_map(|row| goal_at(row, all)).collect(),
        unit: unit(first).to_owned(),
        title: title.clone(),
    };
    let plot = Figure {
        title: match unit(first) {
            "" => title.clone(),
            unit => format!("{title}, {unit}"),
        },
        note: String::new(),
        svg: Some(bars.svg()?),
    };
    let mut out = format!(
        "<section><h2>{}</h2>\n<div class=\"pair\">\n",
        escape(&title)
    );
    out.push_str(&figure(&plot));
    out.push_str(&table(rows));
    out.push_str("</div>\n</section>\n");
    Ok(out)
}

/// One for each system: several rows of one differ in what it is compared with.
fn bars(rows: &[Row], systems: &[&str]) -> Vec<Bar> {
    let mut bars: Vec<Bar> = Vec::new();
    for row in rows {
        if bars.iter().any(|bar| bar.name == row.system) {
            continue;
        }
        let number = systems.iter().position(|s| *s == row.system).unwrap_or(0);
        bars.push(Bar {
            name: row.system.to_owned(),
            colour: groups::colour(number),
            value: row.value,
            range: (row.min, row.max),
        });
    }
    bars
}

/// Where the goal of a row stands among the values; none where what it is compared with has no row.
fn goal_at(row: &Row, all: &[Row]) -> Option<f64> {
    let goal = row.goal?;
    if !goal.ratio {
        return Some(goal.bound.number());
    }
    let other = perf::compared_with(row, all)?;
    Some(goal.bound.number() * other.value)
}

fn table(rows: &[Row]) -> String {
    let mut out = String::from(
        "<div class=\"scroll\"><table><thead><tr><th>System</th><th class=\"n\">Median</th>\
         <th class=\"n\">Least</th><th class=\"n\">Largest</th><th class=\"n\">Passes</th><th>Compared</th>\
         <th>Goal</th></tr></thead><tbody>\n",
    );
    for row in rows {
        let compared = match (row.ratio, row.ratio_to) {
            (Some(ratio), Some(to)) => format!("{ratio:.2} x {to}"),
            _ => String::new(),
        };
        let (class, sign) = verdict(row.met);
        let goal = row.goal.map_or(String::new(), |g| format!("{g}{sign}"));
        let name = if is_own(row.system) { "best" } else { "" };
        out.push_str(&format!(
            "<tr>{}{}{}{}{}{}{}</tr>\n",
            cell(name, row.system),
            cell("n", &figures(row.value)),
            cell("n", &figures(row.min)),
            cell("n", &figures(row.max)),
            cell("n", &row.runs.to_string()),
            cell("", &compared),
            cell(class, &goal),
        ));
    }
    out.push_str("</tbody></table></div>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_a_plot_of_each_measure_and_loads_nothing() -> anyhow::Result<()> {
        let mut rows = perf::tests::rows();
        rows.sort_by_key(|row| row.measure);
        let page = page(&rows, &Host::default())?;
        for part in [
            "goodput, MB/s",
            "slowest of 16 to mean",
            "at least 0.95 x \u{2713}",
            "at least 0.7 \u{2717}",
            "1 are met, and 1 missed",
            "0.97 x proxy",
        ] {
            assert!(page.contains(part), "{part}");
        }
        for loads in [
            "http://", "https://", "src=", "url(", "@import", "<script", "<link",
        ] {
            assert!(!page.contains(loads), "{loads}");
        }
        assert_eq!(page.matches("<svg").count(), 2);
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        Ok(())
    }

    #[test]
    fn a_goal_stands_where_the_other_is() {
        let rows = perf::tests::rows();
        let at: Vec<Option<f64>> = rows.iter().map(|row| goal_at(row, &rows)).collect();
        assert_eq!(at, [Some(95.0), None, Some(0.7)]);
    }
}
