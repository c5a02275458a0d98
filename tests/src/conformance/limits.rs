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

/// What differs as well where the client's agent has `local_bypass = "on"`, in every family.
pub const WITH_BYPASS: &[&str] = &[
    "end_shutdown_read",
    "reset_blocked_read",
    "full_duplex",
    "reset_after_data",
    "reset_ours_by_unread",
    "reset_ours_at_exit",
    "epoll_level",
    "epoll_edge",
    "epoll_one_shot",
    "receive_low_water",
    "peek",
    "wait_all",
    "dont_wait",
    "discard",
    "unread_count",
    "zero_length",
    "vectors",
    "cork",
    "zero_copy",
    "uring",
    "receive_message",
    "urgent_sent_stream",
    "urgent_sent_byte",
    "urgent_inline",
    "urgent_sent_mark",
    "urgent_none",
];

const fn everywhere(case: &'static str) -> Limit {
    Limit {
        case,
        families: &Family::ALL,
    }
}

/// Whether a case may differ; `bypass`: with the local bypass.
pub fn is_listed(case: &str, family: Family, bypass: bool) -> bool {
    let with_bypass = bypass && WITH_BYPASS.contains(&case);
    let always = LIMITS
        .iter()
        .any(|l| l.case == case && l.families.contains(&family));
    always || with_bypass
}

#[cfg(test)]
mod tests {
    use super::super::cases;
    use super::*;

    const BYPASS_HEADING: &str = "\n## Only with `local_bypass = \"on\"`\n";

    #[test]
    fn the_document_and_the_table_name_the_same_cases() {
        let text = include_str!("../../../docs/limits.md");
        // Each limit has a heading with its case in backticks.
        let mut documented: Vec<&str> = text
            .lines()
            .filter_map(|l| l.strip_prefix("### `")?.split('`').next())
            .collect();
        let mut listed: Vec<&str> = LIMITS.iter().map(|l| l.case).collect();
        let bypass = text.split_once(BYPASS_HEADING).expect("its heading").1;
        let bypass = bypass.split("\n## ").next().unwrap_or_default();
        // Between backticks.
        let named: Vec<&str> = bypass.split('`').skip(1).step_by(2).collect();
        for case in WITH_BYPASS {
            assert!(named.contains(case), "{case}");
            assert!(cases::all().any(|c| c.name == *case), "{case}");
        }
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
