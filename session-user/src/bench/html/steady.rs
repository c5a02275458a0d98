//! What both links carry together while nothing happens.

use super::super::goals::{TOGETHER_IN_WORDS, Together};
use super::super::report::Row;
use super::escape;
use super::groups::{Group, System};
use super::tables::{by_direction, cell, link_to, open_row, over, thousands, verdict};

/// The name of the scenario in rows.
pub const SCENARIO: &str = "steady";

fn mbit(value: f64) -> String {
    format!("{value:.1}")
}

/// The goodput of the groups in which nothing happens; empty if there are none.
pub fn summary(groups: &[Group<'_>], systems: &[System]) -> String {
    let groups: Vec<&Group<'_>> = groups.iter().filter(|g| g.scenario == SCENARIO).collect();
    if groups.is_empty() {
        return String::new();
    }
    let mut out = String::from("<section><h2>Both links together, goodput in Mbit/s</h2>\n");
    for group in groups {
        let has_rows = |s: &&System| group.rows.iter().any(|r| s.has(r));
        let systems: Vec<&System> = systems.iter().filter(has_rows).collect();
        out.push_str(&format!(
            "<h3>{}</h3>\n<div class=\"scroll\"><table><thead><tr><th>Scenario</th><th>Direction</th>\
             <th class=\"n\">Goal</th>",
            escape(&over(group.pace, group.links))
        ));
        for system in &systems {
            out.push_str(&format!("<th class=\"n\">{}</th>", escape(&system.label())));
        }
        out.push_str("</tr></thead><tbody>\n");
        let directions = group.directions();
        for (i, direction) in directions.iter().enumerate() {
            out.push_str(&open_row(i, directions.len(), &link_to(group.scenario)));
            out.push_str(&format!("<td>{}</td>", escape(direction)));
            out.push_str(&summary_cells(group, direction, &systems));
            out.push_str("</tr>\n");
        }
        out.push_str("</tbody></table></div>\n");
    }
    out.push_str(&format!(
        "<p class=\"note\">Bold: the most. \u{2713} and \u{2717}: within the goal, or not. {}</p>\n</section>\n",
        escape(TOGETHER_IN_WORDS)
    ));
    out
}

fn summary_cells(group: &Group<'_>, direction: &str, systems: &[&System]) -> String {
    let rows = group.rows.iter().filter(|r| r.direction == direction);
    let rows: Vec<&&Row> = rows.collect();
    let goal = rows.iter().find_map(|r| Together::of(&r.key()));
    let best = rows.iter().map(|r| r.goodput_mbit).fold(0.0, f64::max);
    let mut out = cell("n", &goal.map_or(String::new(), |g| mbit(g.goodput_mbit)));
    for system in systems {
        out.push_str(&match rows.iter().find(|r| system.has(r)) {
            None => cell("n none", "\u{2013}"),
            Some(row) if !row.survived => cell("n bad", "died"),
            Some(row) => {
                let (class, sign) = verdict(Together::of(&row.key()).map(|g| g.is_carried(row)));
                let best = if rows.len() > 1 && row.goodput_mbit >= best {
                    "best"
                } else {
                    ""
                };
                let text = format!("{}{sign}", mbit(row.goodput_mbit));
                cell(&format!("n {class} {best}"), &text)
            }
        });
    }
    out
}

/// All figures of a group in which nothing happens.
pub fn figures(group: &Group<'_>, systems: &[System]) -> String {
    let mut out = String::from(
        "<div class=\"scroll\"><table><thead>\
         <tr><th rowspan=\"2\">Direction</th><th rowspan=\"2\">System</th>\
         <th rowspan=\"2\" class=\"n\">Runs</th><th rowspan=\"2\">Survived</th>\
         <th rowspan=\"2\" class=\"n\">Bytes lost</th>\
         <th colspan=\"4\" class=\"over\">Goodput, Mbit/s</th>\
         <th rowspan=\"2\" class=\"n\">Held beyond gaps, bytes</th>\
         <th rowspan=\"2\" class=\"n\">Longest gap, ms</th>\
         <th rowspan=\"2\" class=\"n\">Late, ms</th></tr>\n\
         <tr><th class=\"n\">all runs</th><th class=\"n\">p50</th><th class=\"n\">p5</th>\
         <th class=\"n\">min</th></tr></thead><tbody>\n",
    );
    out.push_str(&by_direction(group, systems, figure_cells));
    out.push_str("</tbody></table></div>\n");
    out
}

fn figure_cells(row: &Row, system: &str) -> String {
    let goal = Together::of(&row.key());
    let bad = |yes: bool| if yes { "n bad" } else { "n" };
    let survived = if row.survived { "yes" } else { "no" };
    let mut out = cell("", system);
    out.push_str(&cell("n", &row.runs.to_string()));
    out.push_str(&cell(if row.survived { "" } else { "bad" }, survived));
    out.push_str(&cell(bad(row.bytes_lost > 0), &row.lost()));
    let (class, sign) = verdict(goal.map(|g| g.is_carried(row)));
    let text = format!("{}{sign}", mbit(row.goodput_mbit));
    out.push_str(&cell(&format!("n {class}"), &text));
    let runs = row.goodput_run_mbit.unwrap_or_default();
    for value in [runs.p50, runs.p5, runs.min] {
        out.push_str(&cell("n", &mbit(value)));
    }
    let (class, sign) = verdict(goal.and_then(|g| g.is_held(row)));
    let held = row.reorder_bytes_max.map(thousands);
    let held = held.map_or_else(|| "\u{2013}".to_owned(), |held| format!("{held}{sign}"));
    out.push_str(&cell(&format!("n {class}"), &held));
    out.push_str(&cell("n", &mbit(row.stall_ms.max)));
    out.push_str(&cell("n", &format!("{:.2}", row.lateness_ms)));
    out
}
