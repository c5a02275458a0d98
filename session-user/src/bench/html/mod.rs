//! A measurement as one page for a browser. It stands alone: style and plots are inside, no script,
//! nothing is loaded from elsewhere.

mod axis;
mod bars;
mod figures;
mod groups;
mod perf;
mod plot;
mod steady;
mod tables;

use std::path::Path;

use anyhow::ensure;

use super::goals;
use super::report::{Row, RowError};
use super::rowfile::Kept;
use figures::Figure;
use groups::{Group, System};
use plot::{GRID, INK, MARK};

pub use perf::page as perf_page;

/// The page's style.
const STYLE: &str = include_str!("page.css");

/// The end of a page.
const FOOT: &str = "</main></body></html>\n";

/// What the figures mean.
const METHOD: &str = "\
<p>An ordinary program with ordinary sockets talks to a server while its link is struck again and \
again. The receiver of each direction writes down when bytes arrive, on the host's monotonic clock. \
The <dfn>stall</dfn> of a run is the longest gap in the bytes delivered to the application in the time \
from the strike until the session has moved and some round trips more. <dfn>Control</dfn> is the same \
in an equal time before, when nothing happens: what the machine itself does to the figures. \
<em>Download</em> and <em>upload</em> are measured at the client and at the server, <em>echo</em> at \
the client, there and back.</p>\n\
<p>Percentiles are by nearest rank. <em>Bytes lost</em> counts those that were sent and did not arrive, \
or arrived wrong; <em>errors</em> are those that the application saw. <em>Noticed</em> is the time from \
the strike until the agent knew; only Holdfast tells it. <em>Goodput around</em> is what was delivered \
in the second around the strike, as a part of the second before. The links' delay and rate are \
emulated: <em>late</em> is how late the emulator's packets were at worst (99th percentile of a run), and \
a run in which it was later than 1 ms is <em>repeated</em>.</p>\n";

/// The page of these rows.
pub fn page(kept: &[Kept]) -> anyhow::Result<String> {
    let rows: Vec<&Row> = kept.iter().map(|k| &k.row).collect();
    let systems = groups::systems(&rows);
    let groups = groups::groups(&rows, &systems);
    let mut out = head("Holdfast: handovers measured", systems.len(), "");
    out.push_str("<header><h1>Handovers measured</h1>\n");
    out.push_str(&format!(
        "<p class=\"lead\">{}</p></header>\n",
        lead(&rows, &systems, &groups)
    ));
    out.push_str("<section><h2>Conditions</h2>\n");
    out.push_str(&tables::conditions(kept));
    out.push_str("</section>\n<section><h2>What is measured</h2>\n");
    out.push_str(METHOD);
    out.push_str("</section>\n");
    out.push_str(&summaries(&groups, &systems));
    out.push_str(&steady::summary(&groups, &systems));
    for scenario in groups.chunk_by(|a, b| a.scenario == b.scenario) {
        out.push_str(&section(scenario, &systems)?);
    }
    out.push_str(FOOT);
    Ok(out)
}

/// Fails if a page could not be written there.
pub fn check_folder(page: &Path) -> anyhow::Result<()> {
    let folder = page.parent().filter(|f| !f.as_os_str().is_empty());
    if let Some(folder) = folder {
        ensure!(
            folder.is_dir(),
            "{}: there is no such folder",
            folder.display()
        );
    }
    Ok(())
}

/// The beginning of a page with lines of so many systems; `more` is for its style sheet.
fn head(title: &str, systems: usize, more: &str) -> String {
    let (light, dark) = groups::rules(systems);
    let [ink, grid, mark] = [INK, GRID, MARK].map(groups::hex);
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{title}</title>\n<style>\n{STYLE}\
         svg [fill=\"{ink}\"]{{fill:var(--soft)}}\n\
         svg [stroke=\"{grid}\"]{{stroke:var(--line)}}\n\
         svg [stroke=\"{mark}\"]{{stroke:var(--soft);stroke-dasharray:2 8;stroke-linecap:round}}\n\
         {light}@media (prefers-color-scheme:dark){{\n{dark}}}\n\
         {more}</style></head>\n<body><main>\n"
    )
}

fn lead(rows: &[&Row], systems: &[System], groups: &[Group<'_>]) -> String {
    let struck = rows.iter().filter(|r| r.scenario != steady::SCENARIO);
    let runs: usize = struck.map(|r| r.runs).sum();
    let scenarios = groups.chunk_by(|a, b| a.scenario == b.scenario).count();
    let own: Vec<&&Row> = rows.iter().filter(|r| r.system == "holdfast").collect();
    let lost: Option<u64> = own.iter().map(|r| r.known_lost()).sum();
    let lost = lost.map_or_else(|| "an unknown number of".to_owned(), |n| n.to_string());
    let errors: usize = own.iter().map(|r| r.app_errors).sum();
    let plural = |n: usize, word: &str| format!("{n} {word}{}", if n == 1 { "" } else { "s" });
    let mut out = format!(
        "{}, {}, {} in all.",
        plural(scenarios, "scenario"),
        plural(systems.len(), "system"),
        plural(runs, "stall"),
    );
    if !own.is_empty() {
        out.push_str(&format!(
            " Through Holdfast {lost} bytes were lost, and the application saw {errors} errors."
        ));
    }
    out
}

/// A table of stalls for each pace and kind of links, where something happens to them.
fn summaries(groups: &[Group<'_>], systems: &[System]) -> String {
    let groups: Vec<&Group<'_>> = (groups.iter())
        .filter(|g| g.scenario != steady::SCENARIO)
        .collect();
    if groups.is_empty() {
        return String::new();
    }
    let mut kinds = Vec::new();
    for group in &groups {
        if !kinds.contains(&(group.pace, group.links)) {
            kinds.push((group.pace, group.links));
        }
    }
    let mut out = String::from("<section><h2>Stall, 95th percentile in ms</h2>\n");
    for (pace, links) in kinds {
        let of_kind: Vec<&Group<'_>> = groups
            .iter()
            .copied()
            .filter(|g| (g.pace, g.links) == (pace, links))
            .collect();
        let seen = |s: &&System| of_kind.iter().any(|g| g.rows.iter().any(|r| s.has(r)));
        let systems: Vec<System> = systems.iter().filter(seen).cloned().collect();
        out.push_str(&format!(
            "<h3>{}</h3>\n",
            escape(&tables::over(pace, links))
        ));
        out.push_str(&tables::summary(&of_kind, &systems));
    }
    out.push_str(&format!(
        "<p class=\"note\">Bold: the shortest. \u{2713} and \u{2717}: Holdfast within its goal, or not. {}</p>\n</section>\n",
        escape(goals::IN_WORDS)
    ));
    out
}

fn section(groups: &[Group<'_>], systems: &[System]) -> anyhow::Result<String> {
    let scenario = groups.first().map_or("", |g| g.scenario);
    let mut out = format!(
        "<section id=\"{}\"><h2>{}</h2>\n",
        escape(&tables::anchor(scenario)),
        escape(scenario)
    );
    let words = groups::scenario_words(scenario);
    if !words.is_empty() {
        let lead = if scenario == steady::SCENARIO {
            ""
        } else {
            "What happens to the link in use: "
        };
        out.push_str(&format!("<p>{lead}<em>{}.</em></p>\n", escape(&words)));
    }
    for group in groups {
        let over = tables::over(group.pace, group.links);
        out.push_str(&format!("<h3>{}</h3>\n", escape(&over)));
        if scenario == steady::SCENARIO {
            out.push_str(&steady::figures(group, systems));
            out.push_str(&errors(group));
            continue;
        }
        out.push_str(&legend(group, systems));
        for direction in group.directions() {
            let row = group.rows.iter().find(|r| r.direction == direction);
            let goal = row.and_then(|r| goals::goal_ms(&r.key()));
            out.push_str(&format!(
                "<h4>{}</h4>\n<div class=\"pair\">\n",
                escape(direction)
            ));
            out.push_str(&figure(&figures::series(group, direction, systems)?));
            out.push_str(&figure(&figures::stalls(group, direction, systems, goal)?));
            out.push_str("</div>\n");
        }
        out.push_str(&tables::figures(group, systems));
        out.push_str(&errors(group));
    }
    out.push_str("</section>\n");
    Ok(out)
}

fn legend(group: &Group<'_>, systems: &[System]) -> String {
    let mut out = String::from("<ul class=\"legend\">");
    for (number, system) in systems.iter().enumerate() {
        if !group.rows.iter().any(|r| system.has(r)) {
            continue;
        }
        let width = if system.is_own() { 7 } else { 4 };
        out.push_str(&format!(
            "<li><svg viewBox=\"0 0 72 16\" aria-hidden=\"true\"><line x1=\"0\" y1=\"8\" x2=\"72\" y2=\"8\" \
             stroke=\"{}\" stroke-width=\"{width}\"/></svg>{}</li>",
            groups::hex(groups::colour(number)),
            escape(&system.label())
        ));
    }
    out.push_str("</ul>\n");
    out
}

fn figure(figure: &Figure) -> String {
    let plot = figure
        .svg
        .as_deref()
        .unwrap_or("<p class=\"nothing\">Nothing was recorded.</p>");
    format!(
        "<figure><figcaption>{}</figcaption>{plot}<p class=\"note\">{}</p></figure>\n",
        escape(&figure.title),
        escape(&figure.note)
    )
}

fn errors(group: &Group<'_>) -> String {
    let mut out = String::new();
    for row in &group.rows {
        let mut seen: Vec<&RowError> = row.errors.iter().collect();
        seen.sort_by_key(|error| (&error.text, error.run));
        seen.dedup();
        for same in seen.chunk_by(|a, b| a.text == b.text) {
            let runs: Vec<String> = (same.iter())
                .filter_map(|error| Some(error.run?.to_string()))
                .collect();
            let when = match runs.as_slice() {
                [] => String::new(),
                [run] => format!(" (run {run})"),
                runs => format!(" (runs {})", runs.join(", ")),
            };
            out.push_str(&format!(
                "<li>{} {} {}: {}{when}</li>\n",
                escape(&row.system),
                escape(&row.mode),
                escape(&row.direction),
                escape(&same[0].text)
            ));
        }
    }
    if out.is_empty() {
        return out;
    }
    format!(
        "<details><summary>Errors that the application saw</summary><ul>\n{out}</ul></details>\n"
    )
}

/// Text as HTML, in an element or an attribute.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::host::Host;
    use super::super::report::tests::{row, steady};
    use super::*;

    fn timed_out(run: usize) -> RowError {
        RowError {
            run: Some(run),
            text: "timed out".to_owned(),
        }
    }

    #[test]
    fn what_both_links_carry_has_a_table_of_its_own() -> anyhow::Result<()> {
        let rows = [
            steady("holdfast", "bonded", &[44.0, 46.0]),
            steady("mptcp", "single", &[30.0]),
        ];
        let page = page(&rows.map(kept))?;
        for part in [
            "45.0 \u{2713}",
            "700\u{202f}000 \u{2713}",
            "20 + 30 Mbit/s",
            "Nothing happens",
        ] {
            assert!(page.contains(part), "{part}");
        }
        assert!(!page.contains("<figure>") && !page.contains("95th percentile in ms"));
        Ok(())
    }

    fn kept(row: Row) -> Kept {
        Kept {
            row,
            host: Host {
                kernel: "6.18.0".to_owned(),
                command: "holdfast bench handover --lab".to_owned(),
                ..Host::default()
            },
        }
    }

    #[test]
    fn the_page_has_every_system_and_loads_nothing() -> anyhow::Result<()> {
        let mut all = Vec::new();
        for system in ["holdfast", "mptcp-backup", "a<b>"] {
            for direction in ["download", "upload", "echo"] {
                all.push(kept(row(system, "cut", direction)));
            }
        }
        let mut died = row("tcp", "cut", "download");
        died.survived = false;
        died.errors = [2, 5].map(timed_out).to_vec();
        all.push(kept(died));
        let mut other = row("holdfast", "tomorrow", "echo");
        other.mode = "redundant".to_owned();
        all.push(kept(other));
        let page = page(&all)?;
        for part in [
            "mptcp-backup",
            "a&lt;b&gt;",
            ">tcp<",
            "holdfast redundant",
            "tomorrow",
            "6.18.0",
            "<span>handover</span> <span>--lab</span>",
            "timed out (runs 2, 5)",
            "died",
        ] {
            assert!(page.contains(part), "{part}");
        }
        for loads in [
            "http://", "https://", "src=", "url(", "@import", "<script", "<link", "a<b>",
        ] {
            assert!(!page.contains(loads), "{loads}");
        }
        // Four directions' worth of rows, two plots each; one swatch for each system of each group.
        let plots = page.matches("role=\"img\"").count();
        assert_eq!(plots, 8);
        assert_eq!(page.matches("<svg").count(), plots + 5);
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        Ok(())
    }
}
