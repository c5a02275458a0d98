//! The page's tables.

use std::collections::BTreeSet;

use super::super::goals::goal_ms;
use super::super::host::Host;
use super::super::report::{Links, Row};
use super::super::rowfile::Kept;
use super::super::stats::Summary;
use super::axis::number;
use super::escape;
use super::groups::{Group, System};

/// The emulator has been late when it was later than this; so the repetition of runs has it, too.
const LATE_MS: f64 = 1.0;

/// Milliseconds in as many digits as say something.
pub fn ms(value: f64) -> String {
    if value < 100.0 {
        return format!("{value:.1}");
    }
    thousands(value.round() as u64)
}

/// A count with narrow spaces.
pub fn thousands(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

/// A cell of a table.
pub fn cell(class: &str, text: &str) -> String {
    format!("<td class=\"{class}\">{}</td>", escape(text))
}

/// Opens row `i` of the `count` that stand beside one heading, which is HTML and comes with the first.
pub fn open_row(i: usize, count: usize, heading: &str) -> String {
    if i > 0 {
        return "<tr>".to_owned();
    }
    format!("<tr class=\"first\"><th scope=\"rowgroup\" rowspan=\"{count}\">{heading}</th>")
}

/// Rows of figures: directions down, with the systems of each.
pub fn by_direction(
    group: &Group<'_>,
    systems: &[System],
    cells: impl Fn(&Row, &str) -> String,
) -> String {
    let mut out = String::new();
    for direction in group.directions() {
        let rows = group.rows.iter().filter(|r| r.direction == direction);
        let rows: Vec<&&Row> = rows.collect();
        for (i, row) in rows.iter().enumerate() {
            out.push_str(&open_row(i, rows.len(), &escape(direction)));
            let system = systems.iter().find(|s| s.has(row));
            out.push_str(&cells(row, &system.map_or(String::new(), System::label)));
            out.push_str("</tr>\n");
        }
    }
    out
}

/// The class and the sign of a goal that is met or missed.
pub fn verdict(met: Option<bool>) -> (&'static str, &'static str) {
    match met {
        Some(true) => ("good", " \u{2713}"),
        Some(false) => ("bad", " \u{2717}"),
        None => ("", ""),
    }
}

/// Where a scenario's part of the page is, as a link.
pub fn link_to(scenario: &str) -> String {
    format!(
        "<a href=\"#{}\">{}</a>",
        escape(&anchor(scenario)),
        escape(scenario)
    )
}

/// Where and when the rows were measured.
pub fn conditions(kept: &[Kept]) -> String {
    let mut hosts = Vec::new();
    for one in kept {
        if !hosts.contains(&&one.host) {
            hosts.push(&one.host);
        }
    }
    let rows = |host: &Host| kept.iter().filter(|k| k.host == *host).count();
    let hosts: Vec<(&Host, usize)> = hosts.into_iter().map(|h| (h, rows(h))).collect();
    let mut out = conditions_of(&hosts);
    let all = |of: fn(&Row) -> String| {
        let found: BTreeSet<String> = kept.iter().map(|k| of(&k.row)).collect();
        escape(&found.into_iter().collect::<Vec<_>>().join("; "))
    };
    out.push_str(&format!(
        "<p>Links, by round-trip time and rate: {}. Modes: {}. The application sends: {}.</p>\n",
        all(|r| r.links().label()),
        all(|r| r.mode.clone()),
        all(|r| r.pace.clone()),
    ));
    out
}

/// Hosts, with how many rows were measured there.
pub fn conditions_of(hosts: &[(&Host, usize)]) -> String {
    let mut out = String::from(
        "<div class=\"scroll\"><table class=\"words\"><thead><tr><th>Date (UTC)</th><th>Version</th>\
         <th>Kernel</th><th>Processors</th><th>Rows</th><th>Command</th></tr></thead><tbody>\n",
    );
    for (host, rows) in hosts {
        let processors = format!("{} \u{d7} {}", host.processors, host.processor);
        out.push_str(&format!(
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{rows}</td>\
             <td><code>{}</code></td></tr>\n",
            escape(host.date.trim_end_matches('Z').replace('T', " ").as_str()),
            escape(&host.version),
            escape(&host.kernel),
            escape(processors.trim_end_matches([' ', '\u{d7}'])),
            command(&host.command),
        ));
    }
    out.push_str("</tbody></table></div>\n");
    out
}

/// A command line whose arguments are not broken at their hyphens.
fn command(line: &str) -> String {
    let arguments = line.split(' ');
    let spans = arguments.map(|a| format!("<span>{}</span>", escape(a)));
    spans.collect::<Vec<_>>().join(" ")
}

/// The 95th percentile of the stall: scenarios and directions down, systems across.
pub fn summary(groups: &[&Group<'_>], systems: &[System]) -> String {
    let goals = groups
        .iter()
        .any(|g| g.rows.iter().any(|r| goal_ms(&r.key()).is_some()));
    let mut out =
        String::from("<div class=\"scroll\"><table><thead><tr><th>Scenario</th><th>Direction</th>");
    if goals {
        out.push_str("<th class=\"n\">Goal</th>");
    }
    for system in systems {
        out.push_str(&format!("<th class=\"n\">{}</th>", escape(&system.label())));
    }
    out.push_str("</tr></thead><tbody>\n");
    for group in groups {
        let directions = group.directions();
        for (i, direction) in directions.iter().enumerate() {
            out.push_str(&open_row(i, directions.len(), &link_to(group.scenario)));
            out.push_str(&format!("<td>{}</td>", escape(direction)));
            out.push_str(&summary_cells(group, direction, systems, goals));
            out.push_str("</tr>\n");
        }
    }
    out.push_str("</tbody></table></div>\n");
    out
}

fn summary_cells(group: &Group<'_>, direction: &str, systems: &[System], goals: bool) -> String {
    let rows: Vec<&&Row> = group
        .rows
        .iter()
        .filter(|r| r.direction == direction)
        .collect();
    let goal = rows.first().and_then(|r| goal_ms(&r.key()));
    let alive = rows.iter().filter(|r| r.survived);
    let best = alive.map(|r| r.stall_ms.p95).fold(f64::MAX, f64::min);
    let compared = rows.len() > 1;
    let mut out = String::new();
    if goals {
        out.push_str(&cell("n", &goal.map_or(String::new(), number)));
    }
    for system in systems {
        out.push_str(&match rows.iter().find(|r| system.has(r)) {
            None => cell("n none", "\u{2013}"),
            Some(row) if !row.survived => cell("n bad", "died"),
            Some(row) => {
                let p95 = row.stall_ms.p95;
                let mark = goal.filter(|_| system.is_own()).map(|goal| p95 <= goal);
                let (class, sign) = verdict(mark);
                let best = if compared && p95 <= best { "best" } else { "" };
                cell(&format!("n {class} {best}"), &format!("{}{sign}", ms(p95)))
            }
        });
    }
    out
}

/// All figures of a group.
pub fn figures(group: &Group<'_>, systems: &[System]) -> String {
    let bulk = group.pace == "bulk";
    let mut out = String::from(
        "<div class=\"scroll\"><table><thead>\
         <tr><th rowspan=\"2\">Direction</th><th rowspan=\"2\">System</th>\
         <th rowspan=\"2\" class=\"n\">Runs</th><th rowspan=\"2\">Survived</th>\
         <th rowspan=\"2\" class=\"n\">Bytes lost</th><th rowspan=\"2\" class=\"n\">Errors</th>\
         <th colspan=\"4\" class=\"over\">Stall, ms</th>\
         <th rowspan=\"2\" class=\"n\">Control p95, ms</th>\
         <th rowspan=\"2\" class=\"n\">Noticed p95, ms</th>\
         <th rowspan=\"2\" class=\"n\">Goodput, Mbit/s</th>",
    );
    if bulk {
        out.push_str("<th rowspan=\"2\" class=\"n\">Goodput around</th>");
    }
    out.push_str(
        "<th rowspan=\"2\" class=\"n\">Replayed p95, bytes</th>\
         <th rowspan=\"2\" class=\"n\">Late, ms</th>\
         <th rowspan=\"2\" class=\"n\">Repeated</th></tr>\n\
         <tr><th class=\"n\">p50</th><th class=\"n\">p95</th><th class=\"n\">max</th>\
         <th class=\"n\">in run</th></tr>\
         </thead><tbody>\n",
    );
    out.push_str(&by_direction(group, systems, |row, label| {
        figure_cells(row, label, bulk)
    }));
    out.push_str("</tbody></table></div>\n");
    out
}

fn figure_cells(row: &Row, system: &str, bulk: bool) -> String {
    let seen = |s: &Summary, text: String| {
        if s.max > 0.0 {
            text
        } else {
            "\u{2013}".to_owned()
        }
    };
    let bad = |yes: bool| if yes { "n bad" } else { "n" };
    let survived = if row.survived { "yes" } else { "no" };
    let mut out = cell("", system);
    out.push_str(&cell("n", &row.runs.to_string()));
    out.push_str(&cell(if row.survived { "" } else { "bad" }, survived));
    out.push_str(&cell(bad(row.bytes_lost > 0), &lost(row)));
    out.push_str(&cell(bad(row.app_errors > 0), &row.app_errors.to_string()));
    let stall = &row.stall_ms;
    for value in [stall.p50, stall.p95, stall.max] {
        // What is known of a dead connection is how long it was watched.
        let sign = if row.survived { "" } else { "> " };
        out.push_str(&cell("n", &format!("{sign}{}", ms(value))));
    }
    let longest = row.longest_stall_run;
    out.push_str(&cell(
        "n",
        &longest.map_or(String::new(), |n| n.to_string()),
    ));
    let control = &row.control_ms;
    out.push_str(&cell("n", &ms(control.p95)));
    let noticed = &row.detection_ms;
    out.push_str(&cell("n", &seen(noticed, ms(noticed.p95))));
    out.push_str(&cell("n", &format!("{:.1}", row.goodput_mbit)));
    if bulk {
        let around = row.goodput_around.unwrap_or_default();
        let part = format!("{:.0} %", around.p50 * 100.0);
        out.push_str(&cell("n", &seen(&around, part)));
    }
    let replayed = &row.replayed_bytes;
    let bytes = thousands(replayed.p95.round() as u64);
    out.push_str(&cell("n", &seen(replayed, bytes)));
    let late = bad(row.lateness_ms > LATE_MS);
    out.push_str(&cell(late, &format!("{:.2}", row.lateness_ms)));
    out.push_str(&cell("n", &row.repeated.to_string()));
    out
}

fn lost(row: &Row) -> String {
    row.known_lost().map_or_else(|| row.lost(), thousands)
}

/// Where a scenario's part of the page is.
pub fn anchor(scenario: &str) -> String {
    format!("scenario-{scenario}")
}

/// The conditions of a group, in words.
pub fn over(pace: &str, links: Links) -> String {
    format!("{}, round-trip time {}", pace_words(pace), links.label())
}

fn pace_words(pace: &str) -> String {
    if pace == "bulk" {
        return "Bulk, as much as the links take".to_owned();
    }
    format!("{pace} each way")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_the_digits_that_say_something() {
        assert_eq!(ms(4.26), "4.3");
        assert_eq!(ms(345.6), "346");
        assert_eq!(ms(15_987.4), "15\u{202f}987");
        assert_eq!(thousands(1_234_567), "1\u{202f}234\u{202f}567");
        assert_eq!(thousands(999), "999");
    }
}
