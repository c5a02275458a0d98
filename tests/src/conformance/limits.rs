//! Differences that applications can tell. `docs/limits.md` gives the reasons at length; a test compares it with this
//! table.

use super::Family;

/// A case that may differ.
pub struct Limit {
    /// The case.
    pub case: &'static str,
    /// In these families.
    pub families: &'static [Family],
}

/// All of them.
pub const LIMITS: &[Limit] = &[
    everywhere("source_at_the_target"),
    everywhere("udp_no_fragments"),
    Limit {
        case: "udp_packet_info",
        families: &[Family::V4, Family::Mapped],
    },
    Limit {
        case: "udp_disconnect",
        families: &[Family::V6],
    },
];

const fn everywhere(case: &'static str) -> Limit {
    Limit {
        case,
        families: &Family::ALL,
    }
}

/// Whether a case may differ.
pub fn is_listed(case: &str, family: Family) -> bool {
    LIMITS
        .iter()
        .any(|l| l.case == case && l.families.contains(&family))
}

#[cfg(test)]
mod tests {
    use super::super::cases;
    use super::*;

    #[test]
    fn the_document_and_the_table_name_the_same_cases() {
        let text = include_str!("../../../docs/limits.md");
        // Each limit has a heading with its case in backticks.
        let mut documented: Vec<&str> = text
            .lines()
            .filter_map(|l| l.strip_prefix("### `")?.split('`').next())
            .collect();
        let mut listed: Vec<&str> = LIMITS.iter().map(|l| l.case).collect();
        documented.sort_unstable();
        listed.sort_unstable();
        assert_eq!(documented, listed);
        for limit in LIMITS {
            let case = cases::all().find(|c| c.name == limit.case);
            let families = case.expect("a limit of no case").families;
            assert!(limit.families.iter().all(|f| families.contains(f)));
        }
    }
}
