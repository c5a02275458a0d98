//! Real client programs that speak UDP say and make the same inside `holdfast run` as outside.

use std::fs;
use std::net::UdpSocket;
use std::time::Duration;

use anyhow::{Context, ensure};
use session_lab::Lab;
use session_tests::{Both, Dns, Iperf, Sshd, TestBed, eventually};

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

/// Asks at the first of three ports that follow each other, and says who answers, before and after it has spoken to him.
const LISTENS: &str = r#"
import socket, sys
host, port = sys.argv[1], int(sys.argv[2])
heard = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
heard.settimeout(10)
heard.sendto(b"who is there?", (host, port))
answers = [heard.recvfrom(100) for _ in range(2)]
for said, who in sorted(answers):
    print(said.decode(), who[0] == host, who[1] - port)
heard.sendto(b"and now?", sorted(answers)[1][1])
said, who = heard.recvfrom(100)
print(said.decode(), who[0] == host, who[1] - port)
"#;

#[test]
fn whoever_may_be_spoken_to_is_heard_and_nobody_else() -> anyhow::Result<()> {
    const FIRST: u16 = 7100;
    // The third port is nobody's whom the client may speak to.
    let allowed = |host: String| format!("{host}:{FIRST}-{}/udp", FIRST + 1);
    let bed = TestBed::with(|c| {
        c.allow = vec![
            allowed(format!("{}/32", Lab::target(false))),
            allowed(format!("[{}]/128", Lab::target(true))),
        ];
    })?;
    for v6 in [false, true] {
        let bind = |port: u16| {
            let at = (Lab::target(v6), port);
            let socket = (bed.bed.lab.server()).run(move || UdpSocket::bind(at))?;
            socket.set_read_timeout(Some(Duration::from_secs(20)))?;
            anyhow::Ok(socket)
        };
        let [target, other, denied] = [FIRST, FIRST + 1, FIRST + 2].map(bind);
        let (target, other, denied) = (target?, other?, denied?);
        let answering = std::thread::spawn(move || {
            let (_, asker) = target.recv_from(&mut [0; 100])?;
            // The first is not heard, or it would be in the place of another.
            denied.send_to(b"a: denied", asker)?;
            other.send_to(b"b: other", asker)?;
            target.send_to(b"a: target", asker)?;
            let (_, again) = other.recv_from(&mut [0; 100])?;
            other.send_to(if again == asker { b"same" } else { b"else" }, again)
        });
        let (host, port) = (Lab::target(v6).to_string(), FIRST.to_string());
        let words = ["python3", "-c", LISTENS, &host, &port];
        let said = bed.succeed(&words, Duration::from_secs(30))?;
        let answered = answering.join().ok().context("the target has panicked")?;
        answered?;
        ensure!(
            said == "a: target True 0\nb: other True 1\nsame True 1\n",
            "{said}\n{}",
            bed.bed.last_words()
        );
    }
    let unheard = || {
        let session = bed.bed.gateway_session();
        session.is_some_and(|s| s.datagrams.unheard == 2)
    };
    eventually(
        "two datagrams are not heard",
        Duration::from_secs(5),
        unheard,
    )
}

/// Asks again and again, by one socket, until there is an answer.
const INSISTS: &str = r#"
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(0.05)
for _ in range(400):
    s.sendto(b"who is there?", (sys.argv[1], int(sys.argv[2])))
    try:
        print(s.recv(100).decode())
        break
    except TimeoutError:
        pass
"#;

#[test]
fn a_socket_keeps_its_port_when_its_only_flow_has_failed() -> anyhow::Result<()> {
    const PORT: u16 = 7110;
    let limit = Duration::from_secs(20);
    let bed = TestBed::new()?;
    let bind = || {
        let at = (Lab::target(false), PORT);
        let socket = (bed.bed.lab.server()).run(move || UdpSocket::bind(at))?;
        socket.set_read_timeout(Some(limit))?;
        anyhow::Ok(socket)
    };
    let target = bind()?;
    let (host, port) = (Lab::target(false).to_string(), PORT.to_string());
    let words = ["python3", "-c", INSISTS, &host, &port];
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| bed.succeed(&words, limit * 2));
        let (_, first) = target.recv_from(&mut [0; 100])?;
        drop(target);
        eventually("the flow has failed", limit, || {
            let session = bed.bed.gateway_session();
            session.is_some_and(|s| s.datagrams.failed > 0)
        })?;
        let target = bind()?;
        let (_, again) = target.recv_from(&mut [0; 100])?;
        target.send_to(b"at last", again)?;
        let said = asking.join().ok().context("the client has panicked")??;
        ensure!(said == "at last\n", "{said}\n{}", bed.bed.last_words());
        ensure!(first == again, "{first} has become {again}");
        Ok(())
    })
}
