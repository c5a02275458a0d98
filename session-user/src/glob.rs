//! Shell-like patterns for names: `*` is any run of characters (also none), `?` is exactly one.
//!
//! Used for link names and for the names of peers and targets. There are no classes and no
//! escapes: none of these names can hold `*` or `?`.

/// Whether the whole of `text` matches `pattern`, byte by byte and case-sensitively.
///
/// Takes at most `pattern.len() × text.len()` steps: on a mismatch only the last `*` is retried,
/// so that no pattern can make it exponential.
pub fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    let mut retry: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p + 1, t));
                p += 1;
            }
            Some(&c) if c == b'?' || c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match retry {
                Some((after_star, taken)) => {
                    p = after_star;
                    t = taken + 1;
                    retry = Some((after_star, t));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn table() {
        for (pattern, text, expected) in [
            ("", "", true),
            ("", "a", false),
            ("*", "", true),
            ("*", "eth0", true),
            ("eth*", "eth0", true),
            ("eth*", "eth", true),
            ("eth*", "wlan0", false),
            ("*0", "eth0", true),
            ("*0", "eth1", false),
            ("w*n?", "wlan0", true),
            ("w*n?", "wlan", false),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-b-b-d", false),
            ("eth0", "eth0", true),
            ("eth0", "eth01", false),
            ("eth01", "eth0", false),
            ("ETH0", "eth0", false),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} against {text}");
        }
    }

    #[test]
    fn many_stars_stay_cheap() {
        let pattern = "*a".repeat(200);
        let text = "a".repeat(199) + &"b".repeat(2000);
        assert!(!matches(&pattern, &text));
    }
}
