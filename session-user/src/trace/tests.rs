//! The form of the files, and the bound of the ring.

use super::*;

fn path(link: &str) -> PathInfo {
    PathInfo {
        link: link.to_owned(),
        local: "10.0.0.2:40000".parse().unwrap(),
        remote: "[2001:db8::1]:7843".parse().unwrap(),
    }
}

fn handover(peer: &str, number: u64) -> Handover {
    Handover {
        session: "00ff".to_owned(),
        peer: peer.to_owned(),
        number,
        when_s: 1.5,
        soft: false,
        from: path("wlan0"),
        to: None,
        trigger: Trigger::LinkLost,
        why: "words with a \u{1e} and a \n".to_owned(),
        decision: None,
        choices: Vec::new(),
        detection_ms: Some(0.25),
        resumed_ms: None,
        first_sent_ms: None,
        first_acknowledged_ms: None,
        first_received_ms: None,
        resent_records: 3,
        resent_bytes: 4000,
        stall_ms: None,
        warm: None,
        attempts: 0,
        noticed_ns: 17,
        resent_ns: None,
        resumed_ns: None,
    }
}

#[test]
fn the_ring_is_bounded_and_the_oldest_go_first() {
    let trace = Trace::new(None).unwrap();
    for number in 0..HANDOVERS_KEPT as u64 + 10 {
        let peer = if number % 2 == 0 { "even" } else { "odd" };
        trace.keep(handover(peer, number));
    }
    let all = trace.handovers(None, usize::MAX);
    assert_eq!(all.len(), HANDOVERS_KEPT);
    assert_eq!(all[0].number, 10);
    let odd: Vec<u64> = trace
        .handovers(Some("odd"), 2)
        .iter()
        .map(|h| h.number)
        .collect();
    let last = HANDOVERS_KEPT as u64 + 9;
    assert_eq!(odd, [last - 2, last]);
    assert!(trace.handovers(Some("nobody"), 5).is_empty());
}

#[test]
fn a_file_is_a_json_text_sequence() {
    let dir = tempfile::tempdir().unwrap();
    let trace = Arc::new(Trace::new(Some(dir.path().join("qlog"))).unwrap());
    let first = (path("").local, path("").remote);
    let session = SessionTrace::begin(Arc::clone(&trace), [0xab; 16], "gateway", false, first);
    session.path_up(0, &path("wlan0"));
    let metrics = Metrics {
        rtt: Duration::from_micros(1500),
        rtt_variance: Duration::from_micros(10),
        window: 14_480,
        in_flight: 0,
    };
    session.metrics(0, &metrics);
    session.handover(&handover("gateway", 1));
    session.path_ended(0, "the link is lost");
    session.closed(Some(0), "over", true);
    trace.flush(Duration::from_secs(10));

    let name = format!("{}-server.sqlog", "ab".repeat(16));
    let bytes = std::fs::read(dir.path().join("qlog").join(name)).unwrap();
    assert_eq!(bytes.first(), Some(&0x1e));
    let mut records = Vec::new();
    for record in bytes[1..].split(|b| *b == 0x1e) {
        let end = record.iter().position(|b| *b == b'\n');
        assert_eq!(end, Some(record.len() - 1));
        let value: serde_json::Value = serde_json::from_slice(record).unwrap();
        records.push(value);
    }
    let header = &records[0];
    assert_eq!(header["qlog_format"], "JSON-SEQ");
    assert_eq!(header["trace"]["vantage_point"]["type"], "server");
    let common = &header["trace"]["common_fields"];
    assert_eq!(common["time_format"], "relative");
    assert!(common["reference_time"].as_f64().unwrap() > 1.7e12);
    let names: Vec<&str> = records[1..]
        .iter()
        .map(|r| r["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        [
            "connectivity:connection_started",
            "connectivity:path_assigned",
            "recovery:metrics_updated",
            "holdfast:handover",
            "holdfast:path_ended",
            "connectivity:connection_closed"
        ]
    );
    let times: Vec<f64> = records[1..]
        .iter()
        .map(|r| r["time"].as_f64().unwrap())
        .collect();
    assert!(times.is_sorted(), "{times:?}");
    let told = &records[4]["data"];
    assert_eq!(told["trigger"], "link-lost");
    assert_eq!(told["detection_ms"], 0.25);
    assert!(told["stall_ms"].is_null() && told["to"].is_null());
    let again: Handover = serde_json::from_value(told.clone()).unwrap();
    assert_eq!(again, handover("gateway", 1));
    assert_eq!(trace.handovers(None, 9), [again]);
}
