//! Filters of single commands (`holdfast run --only`, `--except`), as the kernel holds them.
//!
//! A filter has a number and belongs to the cgroup of one scope. It narrows what the rules capture: for each prefix that
//! it mentions, a table has the ports that are left out and those that are kept.

/// Scopes that may have a filter at once.
pub const FILTERS_MAX: u32 = 512;
/// Prefixes of all filters, per address family.
pub const FILTER_PREFIXES_MAX: u32 = 65_536;
/// Port ranges that one filter may have for one prefix.
pub const FILTER_RANGES_MAX: usize = 16;
/// Levels below the root of the cgroup hierarchy at which a scope is looked for.
pub const FILTER_LEVELS: i32 = 16;

/// A port range of a filter.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FilterRange {
    /// First port of the range.
    pub first: u16,
    /// Last port of the range, included.
    pub last: u16,
    /// 1 if such connections stay captured, 0 if they go direct.
    pub keep: u32,
}

/// What a filter says about a prefix: the first range that holds the port decides.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FilterPolicy {
    /// How many of `ranges` are in use.
    pub count: u32,
    /// [`FilterRange::keep`] of all other ports.
    pub otherwise: u32,
    /// The ranges in order of precedence.
    pub ranges: [FilterRange; FILTER_RANGES_MAX],
}

impl FilterPolicy {
    /// Whether connections to `port` stay captured.
    #[inline(always)]
    pub fn keeps(&self, port: u16) -> bool {
        let port = i32::from(port);
        for position in 0..FILTER_RANGES_MAX {
            if position as u32 >= self.count {
                break;
            }
            let range = &self.ranges[position];
            // One branch for both ends, as in `PortRule::holds`.
            if (port - i32::from(range.first)) | (i32::from(range.last) - port) >= 0 {
                return range.keep != 0;
            }
        }
        self.otherwise != 0
    }
}
