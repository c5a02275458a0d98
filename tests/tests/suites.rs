//! Python's own suites say the same inside `holdfast run` as outside, test by test.

use std::collections::BTreeMap;

use anyhow::{Context, ensure};
use session_tests::suites::{Run, Suite, differences};

/// What runs. Left out are modules and tests that make no connection over IP; they would compare Python with itself.
const SUITES: [Suite; 4] = [
    Suite {
        name: "socket",
        // VSOCK waits for ever where a host has it without a peer. `test_address` expects loopback's own address.
        choice: &[
            "test.test_socket",
            "-VSOCK",
            "-CreateServerTest.test_address",
        ],
    },
    Suite {
        name: "ssl",
        // An address, as HOST is, is never sent as the server's name (RFC 6066, section 3).
        choice: &["test.test_ssl", "-test_get_server_certificate_sni"],
    },
    Suite {
        name: "asyncio",
        choice: &[
            "test.test_asyncio.test_base_events.BaseLoopSockSendfileTests",
            "test.test_asyncio.test_buffered_proto",
            "test.test_asyncio.test_events.EPollEventLoopTests",
            "test.test_asyncio.test_server",
            "test.test_asyncio.test_sock_lowlevel",
            "test.test_asyncio.test_streams",
            "-_pipe",
            "-_pty",
            "-signal",
            "-subprocess",
            // Expects that client and server have the same address.
            "-test_create_server",
        ],
    },
    Suite {
        name: "asyncio with TLS and sendfile",
        choice: &[
            "test.test_asyncio.test_sendfile",
            "test.test_asyncio.test_ssl",
            "test.test_asyncio.test_sslproto",
        ],
    },
];

/// Tests that may end in another way when captured, by module and name, and why no agent can do better.
const LIMITS: [(&str, &str, &str); 5] = [
    (
        "test.test_ssl.",
        ".test_server_accept",
        "the server sees its client under the gateway's address for it; `source_at_the_target` in docs/limits.md",
    ),
    (
        "test.test_asyncio.test_sock_lowlevel.",
        ".test_sock_accept",
        "the same",
    ),
    (
        "test.test_ssl.",
        ".test_preauth_data_to_tls_server",
        "expects a reset to be at the server when close() returns, which no network with a delay does",
    ),
    (
        "test.test_asyncio.test_sock_lowlevel.",
        ".test_sock_client_connect_racing",
        "expects a refusal to be there when the first connect() returns, as it is on loopback alone: where it comes between the next two, the last says ECONNABORTED, natively too",
    ),
    (
        "test.test_asyncio.test_sendfile.",
        ".test_sendfile_close_peer_in_the_middle_of_receiving",
        "expects 256 KiB not to be under way when the server's reset comes back; what a target does not read is felt by its writer after a few hundred kilobytes",
    ),
];

fn pair(suite: Suite) -> anyhow::Result<(Run, Run)> {
    let captured = std::thread::spawn(move || suite.run(true));
    let native = suite.run(false)?;
    let captured = captured.join().ok().context("the captured run panicked")?;
    Ok((native, captured?))
}

fn told(suite: &Suite, run: &Run, how: &str) -> String {
    let mut verdicts: BTreeMap<&str, usize> = BTreeMap::new();
    for outcome in run.tests.values() {
        *verdicts.entry(&outcome.verdict).or_default() += 1;
    }
    let verdicts: Vec<String> = verdicts.iter().map(|(v, n)| format!("{n} {v}")).collect();
    format!(
        "{}, {how}: {} in {:.0} s; {} connects, {} captured, {} streams",
        suite.name,
        verdicts.join(", "),
        run.took.as_secs_f64(),
        run.connects,
        run.captures.captured,
        run.captures.streams
    )
}

fn is_limit(test: &str) -> bool {
    let is =
        |(module, name, _): &(&str, &str, &str)| test.starts_with(module) && test.ends_with(name);
    LIMITS.iter().any(is)
}

fn compare(suite: &Suite, native: &Run, captured: &Run) -> anyhow::Result<()> {
    println!("{}", told(suite, native, "natively"));
    println!("{}", told(suite, captured, "captured"));
    let bad = |verdict: &str| !matches!(verdict, "ok" | "skipped" | "expected failure");
    let broken = native.tests.iter().filter(|(_, o)| bad(&o.verdict));
    // What fails in any case says nothing, and would hide what else is wrong.
    let broken: Vec<String> = broken.map(|(n, o)| format!("{n}: {o:#?}")).collect();
    ensure!(broken.is_empty(), "natively: {}", broken.join("\n"));
    let differ: Vec<String> = differences(native, captured)
        .into_iter()
        .filter(|(name, ..)| !is_limit(name))
        .map(|(name, native, captured)| format!("{name}\n{native:#?}\n{captured:#?}"))
        .collect();
    ensure!(differ.is_empty(), "{}", differ.join("\n"));
    captured.captures.check(suite.name)?;
    ensure!(
        captured.connects == captured.captures.captured,
        "{}: the tests made {} connects, but {} were captured",
        suite.name,
        captured.connects,
        captured.captures.captured
    );
    Ok(())
}

#[test]
fn pythons_suites_as_outside() -> anyhow::Result<()> {
    // Most of them wait most of the time.
    let pairs = SUITES.map(|suite| (suite, std::thread::spawn(move || pair(suite))));
    let mut faults = Vec::new();
    for (suite, pair) in pairs {
        let pair = pair.join().ok().context("a suite's thread panicked")?;
        let compared = pair.and_then(|(native, captured)| compare(&suite, &native, &captured));
        faults.extend(compared.err().map(|e| format!("{}: {e:#}", suite.name)));
    }
    ensure!(faults.is_empty(), "{}", faults.join("\n"));
    Ok(())
}
