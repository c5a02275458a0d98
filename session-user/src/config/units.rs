//! Durations and sizes as people write them.

use std::time::Duration;

/// `"100ms"`, `"30s"`, `"5m"`, `"24h"`, `"7d"`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let expected = || {
        format!(
            "`{text}` is not a duration: expected a number with ms, s, m, h or d, such as \"30s\""
        )
    };
    let (number, unit) = split(text).ok_or_else(expected)?;
    let millis = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(expected()),
    };
    number
        .checked_mul(millis)
        .map(Duration::from_millis)
        .ok_or_else(expected)
}

/// `"100us"`, `"1ms"`.
pub fn short_duration(text: &str) -> Option<Duration> {
    match split(text)? {
        (micros, "us") => Some(Duration::from_micros(micros)),
        (millis, "ms") => Some(Duration::from_millis(millis)),
        _ => None,
    }
}

/// `"4096"`, `"128KiB"`, `"64MiB"`, `"1GiB"`.
pub fn size(text: &str) -> Result<usize, String> {
    let expected = || {
        format!("`{text}` is not a size: expected a number with KiB, MiB or GiB, such as \"64MiB\"")
    };
    let (number, unit) = split(text).ok_or_else(expected)?;
    let bytes = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return Err(expected()),
    };
    number
        .checked_mul(bytes)
        .and_then(|n| usize::try_from(n).ok())
        .ok_or_else(expected)
}

fn split(text: &str) -> Option<(u64, &str)> {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    Some((number.parse().ok()?, unit.trim_start()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        assert_eq!(duration("100ms"), Ok(Duration::from_millis(100)));
        assert_eq!(duration("24h"), Ok(Duration::from_secs(86_400)));
        assert_eq!(short_duration("50us"), Some(Duration::from_micros(50)));
        assert_eq!(short_duration("2ms"), Some(Duration::from_millis(2)));
        assert_eq!(short_duration("1s"), None);
        assert_eq!(size("64MiB"), Ok(64 << 20));
        assert_eq!(size("4096"), Ok(4096));
        for bad in [
            "",
            "s",
            "10",
            "10 weeks",
            "-1s",
            "99999999999999999999s",
            "18446744073709551615h",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        for bad in ["", "MiB", "1.5MiB", "10MB", "18446744073709551615GiB"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
