//! Aligned columns, as `ip` and `ss` print them.

/// Rows of text under a heading.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with this heading.
    pub fn new(heading: &[&str]) -> Self {
        Self {
            rows: vec![heading.iter().map(|h| (*h).to_owned()).collect()],
        }
    }

    /// Adds a row; missing values show as `-`.
    pub fn row(&mut self, cells: Vec<String>) {
        let dash = |c: String| if c.is_empty() { "-".to_owned() } else { c };
        self.rows.push(cells.into_iter().map(dash).collect());
    }

    /// The table as text.
    pub fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |i: usize| {
            self.rows
                .iter()
                .filter_map(|r| r.get(i))
                .map(|c| c.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut out = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&format!("{cell:width$}  "));
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

/// `1.2 MB`, `37 B`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{n} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// `3d4h`, `5m12s`, `9s`.
pub fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_gaps_show() {
        let mut table = Table::new(&["LINK", "STATE", "WHY"]);
        table.row(vec![
            "wifi0".into(),
            "usable".into(),
            "first in prefer".into(),
        ]);
        table.row(vec!["lte0".into(), String::new(), "no carrier".into()]);
        assert_eq!(
            table.render(),
            "LINK   STATE   WHY\nwifi0  usable  first in prefer\nlte0   -       no carrier\n"
        );
    }

    #[test]
    fn numbers_are_humane() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1_234_567), "1.2 MB");
        assert_eq!(age(59), "59s");
        assert_eq!(age(90_061), "1d1h");
    }
}
