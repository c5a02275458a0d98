//! Real client programs that speak UDP say and make the same inside `holdfast run` as outside.

use std::fs;

use anyhow::ensure;
use session_lab::Lab;
use session_tests::{Both, Dns, Iperf, Sshd, TestBed};

/// Nobody listens here.
const CLOSED: u16 = 9;

#[test]
fn dig_as_outside() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let _dns = Dns::start(&bed.bed.lab, &bed.path(""))?;
    let both = Both::with_datagrams(&bed);
    for v6 in [false, true] {
        let server = Lab::target(v6);
        let dig = format!("dig @{server} -p {} +tries=1 +time=3", Dns::PORT);
        let answer = "+noall +answer";
        let known = both.good(
            &format!("{dig} {answer} host.example A host.example AAAA"),
            0,
        )?;
        ensure!(known.out.lines().count() == 2, "{known:?}");
        // Too long for a datagram: it asks again over TCP.
        let long = both.good(&format!("{dig} {answer} long.example TXT"), 1)?;
        ensure!(long.out.lines().count() == 20, "{long:?}");
        both.good(
            &format!("{dig} +short nothing.example; {dig} +short -x 192.0.2.1"),
            0,
        )?;
        // More than one segment in one datagram, and the answer in many fragments of IP.
        both.good(
            &format!("{dig} {answer} +bufsize=8000 +ignore long.example TXT"),
            0,
        )?;
        let closed = format!("dig @{server} -p {CLOSED} +tries=1 +time=3 host.example");
        both.fails(&closed, 0, "refused")?;
    }
    Ok(())
}

/// What is not a rate or a time: how many datagrams of which size, and whether more than one in a hundred was lost.
const FACTS: &str = r#"python3 -c '
import json, sys
said = json.load(sys.stdin)
test, total = said["start"]["test_start"], said["end"]["sum"]
print(test["protocol"], test["num_streams"], test["blksize"], test["reverse"])
print("enough" if total["packets"] > 500 else total["packets"], "arrive" if total["lost_percent"] < 1 else total)
'"#;

#[test]
fn iperf3_as_outside() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let _iperf = Iperf::start(&bed.bed.lab, &bed.path(""))?;
    let both = Both::with_datagrams(&bed);
    for v6 in [false, true] {
        let run = format!(
            "iperf3 -u -c {} -p {} -b 10M -l 1200 -t 1 --json",
            Lab::target(v6),
            Iperf::PORT
        );
        for how in ["", "-R", "-P 3"] {
            // One connection steers.
            let said = both.good(&format!("{run} {how} | {FACTS}"), 1)?;
            ensure!(said.out.contains("enough arrive"), "{said:?}");
        }
    }
    Ok(())
}

#[test]
fn mosh_as_outside() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let sshd = Sshd::start(&bed.bed.lab, &bed.path(""))?;
    let both = Both::with_datagrams(&bed);
    let ssh = format!("ssh {}", sshd.options().join(" "));
    let (typed, remote, start) = (bed.path("typed"), bed.path("remote"), bed.path("start"));
    // What is typed goes up, what is shown comes down.
    fs::write(
        &remote,
        format!(
            "printf 'shown-%s\\n' here; read line; echo \"$line\" > {}\n",
            typed.display()
        ),
    )?;
    fs::write(
        &start,
        format!(
            "stty rows 24 cols 80; exec mosh --predict=never --ssh='{ssh}' root@{} -- sh {}\n",
            Lab::target(false),
            remote.display()
        ),
    )?;
    // The keyboard waits until there is something on the screen.
    let keyboard =
        "until grep -qs shown-here screen; do sleep 0.05; done; echo typed-here; sleep 1";
    let script = format!(
        "rm -f {typed}; touch screen; ({keyboard}) | TERM=xterm timeout 30 script -qefc 'sh {start}' screen > log; echo $?; grep -c shown-here screen; cat {typed}; rm screen log",
        typed = typed.display(),
        start = start.display(),
    );
    let said = both.good(&script, 1)?;
    ensure!(said.out == "0\n1\ntyped-here\n", "{said:?}");
    Ok(())
}
