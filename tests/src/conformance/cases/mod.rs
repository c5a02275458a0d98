//! The cases.

mod attempts;
mod binding;
mod calls;
mod connect;
mod data;
mod ends;
mod handing;
mod many;
mod names;
mod options;
mod readiness;
mod resets;
mod udp;
mod udp_calls;
mod udp_strangers;
mod urgent;

use super::Case;

/// All cases in the order in which they run, with what they are about.
pub const GROUPS: &[(&str, &[Case])] = &[
    ("Connecting", connect::CASES),
    ("Attempts that fail", attempts::CASES),
    ("Binding before connecting", binding::CASES),
    ("Names", names::CASES),
    ("Options", options::CASES),
    ("Ends", ends::CASES),
    ("Resets", resets::CASES),
    ("Readiness", readiness::CASES),
    ("Data", data::CASES),
    ("System calls", calls::CASES),
    ("Urgent data", urgent::CASES),
    ("Handing sockets on", handing::CASES),
    ("Many at once", many::CASES),
    ("UDP", udp::CASES),
    ("UDP with others than the target", udp_strangers::CASES),
    ("UDP system calls", udp_calls::CASES),
];

/// All cases.
pub fn all() -> impl Iterator<Item = &'static Case> {
    GROUPS.iter().flat_map(|(_, cases)| cases.iter())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn there_are_enough_and_no_two_have_one_name() {
        let names: HashSet<&str> = all().map(|c| c.name).collect();
        assert_eq!(names.len(), all().count());
        assert!(names.len() >= 80, "{}", names.len());
        assert!(all().all(|c| !c.families.is_empty() && !c.what.is_empty()));
    }
}
