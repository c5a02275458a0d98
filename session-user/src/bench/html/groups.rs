//! Which rows stand together, and how each system looks.

use plotters::style::RGBColor;

use super::super::app::Direction;
use super::super::report::{Links, Row};
use super::super::scenario::Scenario;

/// Colours that people with any colour vision tell apart (Okabe and Ito), on white; the style sheet
/// has a lighter one of each for dark.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(90, 90, 90),
];
const COLOURS_DARK: [&str; 7] = [
    "#5AB0F0", "#FF8A4A", "#2BD3A0", "#EFA6CC", "#A8DCFA", "#F7BF45", "#C8C8C8",
];
/// A second sign beside the colour. With seven colours, each pair comes again after 28 systems.
const DASHES: [&str; 4] = ["none", "18 9", "5 7", "22 7 5 7"];

/// A system in one of its modes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct System {
    /// As in the rows.
    pub name: String,
    /// As in the rows.
    pub mode: String,
}

impl System {
    /// For a legend: the mode is told where it is not the usual one.
    pub fn label(&self) -> String {
        if self.mode == "single" {
            return self.name.clone();
        }
        format!("{} {}", self.name, self.mode)
    }

    /// Whether it is what all others are compared with.
    pub fn is_own(&self) -> bool {
        self.name == "holdfast"
    }

    /// Whether a row is of it.
    pub fn has(&self, row: &Row) -> bool {
        self.name == row.system && self.mode == row.mode
    }
}

/// All systems of the rows: Holdfast first, the others as they come.
pub fn systems(rows: &[&Row]) -> Vec<System> {
    let mut out: Vec<System> = Vec::new();
    for row in rows {
        if !out.iter().any(|s| s.has(row)) {
            out.push(System {
                name: row.system.clone(),
                mode: row.mode.clone(),
            });
        }
    }
    out.sort_by_key(|s| !s.is_own());
    out
}

/// The colour of the system with this number. It is one of its own, so that a style sheet can find it.
pub fn colour(number: usize) -> RGBColor {
    let RGBColor(r, g, b) = COLOURS[number % COLOURS.len()];
    let again = (number / COLOURS.len()).min(9) as u8;
    RGBColor(r, g - again, b)
}

/// As in the SVG.
pub fn hex(colour: RGBColor) -> String {
    let RGBColor(r, g, b) = colour;
    format!("#{r:02X}{g:02X}{b:02X}")
}

/// Style sheet rules for the lines of so many systems: for light, and for dark.
pub fn rules(systems: usize) -> (String, String) {
    let (mut light, mut dark) = (String::new(), String::new());
    for number in 0..systems {
        let hex = hex(colour(number));
        let dash = DASHES[number % DASHES.len()];
        light.push_str(&format!(
            "svg [stroke=\"{hex}\"]{{stroke-dasharray:{dash}}}\n"
        ));
        let lighter = COLOURS_DARK[number % COLOURS_DARK.len()];
        dark.push_str(&format!("svg [stroke=\"{hex}\"]{{stroke:{lighter}}}\n"));
    }
    (light, dark)
}

/// The same for what is filled with their colours.
pub fn fills(systems: usize) -> String {
    let mut dark = String::new();
    for number in 0..systems {
        let lighter = COLOURS_DARK[number % COLOURS_DARK.len()];
        dark.push_str(&format!(
            "svg [fill=\"{}\"]{{fill:{lighter}}}\n",
            hex(colour(number))
        ));
    }
    format!("@media (prefers-color-scheme:dark){{\n{dark}}}\n")
}

/// Rows of one scenario, pace and kind of links: what can be compared.
#[derive(Clone, Debug)]
pub struct Group<'a> {
    /// What happened.
    pub scenario: &'a str,
    /// How much was sent.
    pub pace: &'a str,
    /// Over what.
    pub links: Links,
    /// In the order of directions, and in that the order of systems.
    pub rows: Vec<&'a Row>,
}

impl<'a> Group<'a> {
    /// The directions that there are rows of, in the order of reports.
    pub fn directions(&self) -> Vec<&'a str> {
        let mut out: Vec<&str> = self.rows.iter().map(|r| r.direction.as_str()).collect();
        out.dedup();
        out
    }
}

/// The groups in the order of a report: scenario, then links, then pace.
pub fn groups<'a>(rows: &[&'a Row], systems: &[System]) -> Vec<Group<'a>> {
    let mut rows = rows.to_vec();
    rows.sort_by_key(|row| {
        let system = systems.iter().position(|s| s.has(row));
        let bulk = row.pace == "bulk";
        (
            scenario_order(&row.scenario),
            &row.scenario,
            bulk,
            &row.pace,
            row.links(),
            direction_order(&row.direction),
            system,
        )
    });
    rows.chunk_by(|a, b| a.scenario == b.scenario && a.pace == b.pace && a.links() == b.links())
        .map(|rows| Group {
            scenario: &rows[0].scenario,
            pace: &rows[0].pace,
            links: rows[0].links(),
            rows: rows.to_vec(),
        })
        .collect()
}

fn scenario_order(name: &str) -> usize {
    let known = Scenario::EACH.iter().position(|s| s.name() == name);
    known.unwrap_or(Scenario::EACH.len())
}

fn direction_order(name: &str) -> usize {
    let known = Direction::ALL.iter().position(|d| d.name() == name);
    known.unwrap_or(Direction::ALL.len())
}

/// What happens in a scenario, in words; empty for one that this version does not know.
pub fn scenario_words(name: &str) -> String {
    Scenario::EACH
        .into_iter()
        .find(|s| s.name() == name)
        .and_then(|s| clap::ValueEnum::to_possible_value(&s))
        .and_then(|v| v.get_help().map(ToString::to_string))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::super::report::tests::row;
    use super::*;

    #[test]
    fn rows_are_grouped_by_what_can_be_compared() {
        let mut bulk = row("holdfast", "cut", "download");
        bulk.pace = "bulk".to_owned();
        bulk.rate_mbit = Some(50);
        let all = [
            row("tcp", "cut", "upload"),
            row("holdfast", "soft", "upload"),
            row("holdfast", "cut", "upload"),
            bulk,
            row("tcp", "cut", "download"),
            row("holdfast", "cut", "download"),
        ];
        let rows: Vec<&Row> = all.iter().collect();
        let systems = systems(&rows);
        assert_eq!(systems[0].label(), "holdfast");
        let groups = groups(&rows, &systems);
        let found: Vec<(&str, &str, usize)> = groups
            .iter()
            .map(|g| (g.scenario, g.pace, g.rows.len()))
            .collect();
        assert_eq!(
            found,
            [
                ("cut", "1 kB/ms", 4),
                ("cut", "bulk", 1),
                ("soft", "1 kB/ms", 1)
            ]
        );
        assert_eq!(groups[0].directions(), ["download", "upload"]);
        let order: Vec<&str> = groups[0].rows.iter().map(|r| r.system.as_str()).collect();
        assert_eq!(order, ["holdfast", "tcp", "holdfast", "tcp"]);
    }

    #[test]
    fn every_system_has_a_look_of_its_own() {
        let colours: std::collections::BTreeSet<String> = (0..28).map(|n| hex(colour(n))).collect();
        assert_eq!(colours.len(), 28);
    }

    #[test]
    fn scenarios_are_told_in_words() {
        assert!(scenario_words("cut").contains("standby"));
        assert_eq!(scenario_words("tomorrow"), "");
    }
}
