//! The latest handovers, as a table.

use std::path::Path;
use std::process::ExitCode;

use time::OffsetDateTime;
use time::macros::format_description;

use super::exit::Failure;
use super::remote::{ask, json, unexpected};
use super::table::{Table, bytes};
use crate::control::{Request, Response};
use crate::stdio::print;
use crate::trace::Handover;

const HEADING: [&str; 11] = [
    "TIME (UTC)",
    "PEER",
    "FROM -> TO",
    "KIND",
    "TRIGGER",
    "DETECTED",
    "RESUMED",
    "UP",
    "DOWN",
    "RESENT",
    "STALL",
];

pub fn handovers(
    control: &Path,
    peer: Option<String>,
    count: usize,
    as_json: bool,
) -> Result<ExitCode, Failure> {
    let Response::Handovers(handovers) = ask(control, &Request::Handovers { peer, count })? else {
        return Err(unexpected());
    };
    if as_json {
        return json(&handovers);
    }
    if handovers.is_empty() {
        print("no handovers\n");
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&HEADING);
    for handover in &handovers {
        table.row(row(handover));
    }
    print(&table.render());
    Ok(ExitCode::SUCCESS)
}

fn row(h: &Handover) -> Vec<String> {
    let link = |name: &str| if name.is_empty() { "?" } else { name }.to_owned();
    let to = h.to.as_ref().map_or("none".to_owned(), |to| link(&to.link));
    let kind = match (h.soft, h.warm) {
        (true, _) => "soft",
        (false, Some(true)) => "hard, warm",
        (false, _) => "hard",
    };
    vec![
        at(h.when_s),
        h.peer.clone(),
        format!("{} -> {to}", link(&h.from.link)),
        kind.to_owned(),
        h.trigger.to_string(),
        took(h.detection_ms),
        took(h.resumed_ms),
        took(h.first_acknowledged_ms),
        took(h.first_received_ms),
        bytes(h.resent_bytes),
        took(h.stall_ms),
    ]
}

/// Nothing for a time that there is none of; the table shows a dash.
fn took(ms: Option<f64>) -> String {
    ms.map(|ms| format!("{ms:.1} ms")).unwrap_or_default()
}

fn at(seconds: f64) -> String {
    let format =
        format_description!("[year]-[month]-[day] [hour]:[minute]:[second].[subsecond digits:3]");
    // A double has no more digits than that.
    let nanos = (seconds * 1e6).round() as i128 * 1000;
    OffsetDateTime::from_unix_timestamp_nanos(nanos)
        .ok()
        .and_then(|time| time.format(format).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_for_people_and_gaps_stay_gaps() {
        assert_eq!(at(1_700_000_000.25), "2023-11-14 22:13:20.250");
        assert_eq!(took(Some(1.26)), "1.3 ms");
        assert_eq!(took(None), "");
    }
}
