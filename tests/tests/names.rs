//! Host names that only the gateway's resolver knows, for applications that ask the client's.

use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use session_lab::{Lab, Netns};
use session_tests::{
    Mounts, Nginx, TestBed, await_listener, command, eventually, finish, holdfast_says, make_file,
    program,
};
use session_user::bench::bed::Running;
use tempfile::TempDir;

/// Nothing in these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);
/// Where each end has its resolver: in namespaces of their own, one address means two.
const RESOLVER: &str = "127.0.0.53";
/// Where the client's agent answers whoever asks.
const OURS: &str = "127.0.0.1";
const OUR_PORT: u16 = 5353;
/// Known at both ends.
const PUBLIC: &str = "www.public.example";
/// Known at the gateway alone, and captured.
const CAPTURED: &str = "db.corp.example";

/// Rules 1 to 4; the bed's own, which captures all that goes to the target, is the fifth.
const RULES: &str = r#"[[capture]]
action = "direct"
names = ["open.corp.example"]

[[capture]]
action = "refuse"
names = ["ads.*"]

[[capture]]
peer = "gateway"
names = ["early.corp.example"]
connect = "early"

[[capture]]
peer = "gateway"
names = ["*.corp.example"]
ports = ["1-9000"]
"#;

/// How libc asks, by resolv.conf.
#[derive(Clone, Copy)]
enum Asks {
    /// Over UDP, as ever.
    Datagrams,
    /// Over TCP.
    Streams,
}

/// Asks over UDP or TCP with a number of its own and shows the whole answer.
const ASKER: &str = r#"
import socket, struct, sys
name, kind = sys.argv[1], int(sys.argv[2])
labels = b"".join(bytes([len(l)]) + l.encode() for l in name.split("."))
message = struct.pack(">HHHHHH", 4711, 0x0100, 1, 0, 0, 1) + labels + b"\0" + struct.pack(">HH", kind, 1)
message += b"\0" + struct.pack(">HHIH", 41, 1232, 0, 0)
if sys.argv[3] == "tcp":
    s = socket.create_connection(("127.0.0.53", 53), 10)
    s.sendall(struct.pack(">H", len(message)) + message)
    f = s.makefile("rb")
    print(f.read(struct.unpack(">H", f.read(2))[0]).hex(), s.getpeername())
else:
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(10)
    s.sendto(message, ("127.0.0.53", 53))
    answer, source = s.recvfrom(4096)
    print(answer.hex(), source)
"#;

/// Connects to an address and says how that ended.
const CALLER: &str = r#"
import errno, socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 20)
    print("connected")
except OSError as e:
    print(errno.errorcode.get(e.errno, str(e)))
"#;

/// Sends a datagram to an address and prints the answer.
const TALKER: &str = r#"
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(20)
s.connect((sys.argv[1], int(sys.argv[2])))
s.send(b"question")
print(s.recv(100).decode())
"#;

/// The bed, both resolvers, and a web server behind the gateway.
struct NameBed {
    bed: TestBed,
    mounts: Mounts,
    nginx: Nginx,
    _resolvers: [Running; 2],
    /// What the client's resolver is asked.
    asked: std::path::PathBuf,
    _dir: TempDir,
}

fn dnsmasq(netns: &Netns, log: &Path, records: &[String]) -> anyhow::Result<Running> {
    let mut command = Command::new("/usr/sbin/dnsmasq");
    command
        .args([
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
        ])
        .args([
            "--bind-interfaces",
            "--no-ping",
            "--log-queries",
            "--pid-file=",
            "--user=root",
        ])
        .arg(format!("--listen-address={RESOLVER}"))
        .arg(format!("--log-facility={}", log.display()))
        .args(records)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let running = Running::new(netns.spawn(command)?, "resolver");
    await_listener(netns, format!("{RESOLVER}:53").parse()?)?;
    Ok(running)
}

/// Words that run others where resolv.conf is ours; `place` is [`Mounts::path`] as an option.
fn inside<'a>(place: &'a str, words: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["nsenter", place];
    all.extend(words);
    all
}

impl NameBed {
    fn new(asks: Asks) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("holdfast-names-")
            .tempdir()?;
        let resolv_conf = dir.path().join("resolv.conf");
        let options = match asks {
            Asks::Datagrams => "",
            Asks::Streams => "options use-vc\n",
        };
        fs::write(&resolv_conf, format!("nameserver {RESOLVER}\n{options}"))?;
        let mounts = Mounts::over(&[(&resolv_conf, Path::new("/etc/resolv.conf"))])?;
        let program = mounts.inside(&program())?;
        let state = dir.path().join("state");
        let bed = TestBed::with(|c| {
            c.program = program;
            c.allow.push("*.corp.example:*".to_owned());
            c.capture_before = RULES.into();
            c.client_extra = format!(
                "[dns]\nlisten = [\"{OURS}:{OUR_PORT}\"]\nstate = \"{}\"\nttl = \"20s\"\n",
                state.display()
            );
        })?;
        let nginx = Nginx::start(&bed.bed.lab, &bed.path(""))?;
        let asked = dir.path().join("asked");
        let public = format!("--host-record={PUBLIC},203.0.113.7,2001:db8:7::7,300");
        let alias = "--cname=alias.public.example,www.public.example,200".to_owned();
        let open = "--host-record=open.corp.example,203.0.113.8".to_owned();
        let local = "--local=/example/".to_owned();
        let target = Lab::target(false);
        let corp = ["db", "early"].map(|n| format!("--host-record={n}.corp.example,{target}"));
        let resolvers = [
            dnsmasq(
                bed.bed.lab.client(),
                &asked,
                &[public, alias, open, local.clone()],
            )?,
            dnsmasq(
                bed.bed.lab.server(),
                &dir.path().join("server"),
                &[corp[0].clone(), corp[1].clone(), local],
            )?,
        ];
        Ok(Self {
            bed,
            mounts,
            nginx,
            _resolvers: resolvers,
            asked,
            _dir: dir,
        })
    }

    /// Runs a program, captured.
    fn run(&self, words: &[&str]) -> anyhow::Result<Output> {
        let path = format!("--mount={}", self.mounts.path());
        self.bed.run(&inside(&path, words), LIMIT)
    }

    fn says(&self, words: &[&str]) -> anyhow::Result<String> {
        let output = self.run(words)?;
        ensure!(
            output.status.success(),
            "{words:?}: {} {}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr),
            self.bed.bed.last_words()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The same of a program that is not captured.
    fn says_outside(&self, words: &[&str]) -> anyhow::Result<Output> {
        let path = format!("--mount={}", self.mounts.path());
        let all = inside(&path, words);
        let mut command = Command::new(all[0]);
        command
            .args(&all[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        finish(self.bed.bed.lab.client().spawn(command)?, LIMIT)
    }

    /// Questions about `name` that the client's resolver has heard.
    fn heard(&self, name: &str) -> usize {
        let log = fs::read_to_string(&self.asked).unwrap_or_default();
        log.lines()
            .filter(|l| l.contains("query[") && l.contains(name))
            .count()
    }

    fn address(&self, name: &str) -> anyhow::Result<IpAddr> {
        let said = self.says(&["getent", "ahostsv4", name])?;
        let first = said.split_whitespace().next().context("no address")?;
        Ok(first.parse()?)
    }

    fn call(&self, to: IpAddr, port: u16) -> anyhow::Result<String> {
        let (ip, port) = (to.to_string(), port.to_string());
        Ok(self
            .says(&["python3", "-c", CALLER, &ip, &port])?
            .trim()
            .to_owned())
    }

    fn explain(&self, to: &str) -> anyhow::Result<serde_json::Value> {
        let cgroup = self.bed.bed.cgroup.path().display().to_string();
        let words = ["explain", "--json", "--cgroup", &cgroup, to];
        let said = holdfast_says(&self.bed.bed.client_control(), &words)?;
        Ok(serde_json::from_str(&said)?)
    }
}

fn is_reserved(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V4(ip) if ip.octets()[0] == 198 && ip.octets()[1] & 0xfe == 18)
}

#[test]
fn a_captured_name_is_resolved_by_the_peer() -> anyhow::Result<()> {
    resolved_by_the_peer(Asks::Datagrams)
}

#[test]
fn a_captured_name_that_is_asked_for_over_tcp_is_resolved_by_the_peer() -> anyhow::Result<()> {
    resolved_by_the_peer(Asks::Streams)
}

fn resolved_by_the_peer(asks: Asks) -> anyhow::Result<()> {
    let bed = NameBed::new(asks)?;
    make_file(&bed.nginx.root.join("file"), 1 << 20)?;
    let outside = bed.says_outside(&["getent", "ahosts", CAPTURED])?;
    ensure!(
        !outside.status.success(),
        "the client's own resolver knows it"
    );
    ensure!(bed.heard(CAPTURED) > 0, "it was not asked at all");
    let before = bed.heard(CAPTURED);
    for name in [CAPTURED, "early.corp.example", "DB.Corp.Example"] {
        let url = format!("http://{name}:{}/file", Nginx::PORT);
        for family in ["-4", "-6"] {
            let words = [
                "curl",
                "-sS",
                "-f",
                family,
                "--max-time",
                "30",
                "-o",
                "/dev/null",
                "-w",
                "%{size_download} %{remote_ip}",
                &url,
            ];
            let said = bed.says(&words)?;
            ensure!(said.starts_with("1048576 "), "{name} {family}: {said}");
            let at: IpAddr = said.split(' ').nth(1).context("no address")?.parse()?;
            ensure!(is_reserved(at) || at.is_ipv6(), "{name} {family}: {said}");
        }
    }
    ensure!(
        bed.heard(CAPTURED) == before,
        "the client's resolver was asked"
    );

    // What the peer does not know fails as an address that nobody has; what no rule captures is refused.
    let missing = bed.address("missing.corp.example")?;
    ensure!(is_reserved(missing), "{missing}");
    ensure!(bed.call(missing, 80)? == "EHOSTUNREACH");
    let known = bed.address(CAPTURED)?;
    ensure!(bed.call(known, Nginx::PORT)? == "connected");
    ensure!(bed.call(known, 9001)? == "ECONNREFUSED");
    ensure!(bed.call("198.18.0.0".parse()?, 80)? == "EHOSTUNREACH");
    ensure!(
        !bed.run(&["getent", "ahosts", "ads.corp.example"])?
            .status
            .success()
    );
    ensure!(
        bed.heard("ads.corp.example") == 0,
        "a refused name was asked for"
    );

    // Whoever asks the agent over UDP, and for the name of an address.
    let port = OUR_PORT.to_string();
    let server = format!("@{OURS}");
    let dig = |words: &[&str]| -> anyhow::Result<String> {
        let mut all = vec![
            "dig",
            server.as_str(),
            "-p",
            port.as_str(),
            "+short",
            "+tries=1",
        ];
        all.extend(words);
        let output = bed.says_outside(&all)?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    ensure!(
        dig(&[CAPTURED])? == known.to_string(),
        "{}",
        dig(&[CAPTURED])?
    );
    ensure!(dig(&["+tcp", CAPTURED])? == known.to_string());
    ensure!(dig(&["-x", &known.to_string()])? == format!("{CAPTURED}."));
    ensure!(dig(&["HTTPS", CAPTURED])?.is_empty());
    ensure!(dig(&[PUBLIC])? == "203.0.113.7");
    ensure!(dig(&["+tcp", "alias.public.example"])?.ends_with("203.0.113.7"));
    Ok(())
}

#[test]
fn other_questions_have_the_answers_that_they_would_have() -> anyhow::Result<()> {
    let bed = NameBed::new(Asks::Datagrams)?;
    for name in [
        PUBLIC,
        "alias.public.example",
        "missing.public.example",
        "open.corp.example",
    ] {
        for (kind, over) in [
            ("1", "tcp"),
            ("1", "udp"),
            ("28", "udp"),
            ("65", "tcp"),
            ("16", "udp"),
        ] {
            let words = ["python3", "-c", ASKER, name, kind, over];
            let captured = bed.says(&words)?;
            let output = bed.says_outside(&words)?;
            let outside = String::from_utf8_lossy(&output.stdout).into_owned();
            ensure!(
                output.status.success() && captured == outside,
                "{name} {kind}: {captured} and {outside}"
            );
            ensure!(captured.contains(RESOLVER), "{captured}");
        }
    }
    // A resolver that is not there refuses, as it would.
    ensure!(bed.call("127.0.0.54".parse()?, 53)? == "ECONNREFUSED");
    Ok(())
}

#[test]
fn without_the_agent_captured_names_lead_nowhere() -> anyhow::Result<()> {
    let mut bed = NameBed::new(Asks::Datagrams)?;
    let known = bed.address(CAPTURED)?;
    let agent = bed.bed.bed.client_agent.take().context("no agent")?;
    kill(Pid::from_raw(i32::try_from(agent.pid())?), Signal::SIGKILL)?;
    ensure!(bed.call(known, Nginx::PORT)? == "ECONNREFUSED");
    let said = bed.says(&["getent", "ahostsv4", PUBLIC])?;
    ensure!(said.starts_with("203.0.113.7"), "{said}");
    ensure!(!bed.run(&["getent", "ahosts", CAPTURED])?.status.success());
    drop(agent);
    // The next one gives it the same address, and takes connections to it.
    bed.bed.bed.start_client()?;
    bed.bed.bed.await_session()?;
    ensure!(bed.call(known, Nginx::PORT)? == "connected" || bed.address(CAPTURED)? == known);
    ensure!(bed.address(CAPTURED)? == known, "it has another address");
    eventually("the name is connected to again", LIMIT, || {
        bed.call(known, Nginx::PORT)
            .is_ok_and(|said| said == "connected")
    })
}

#[test]
fn names_are_explained() -> anyhow::Result<()> {
    let bed = NameBed::new(Asks::Datagrams)?;
    let port = Nginx::PORT;
    let told = bed.explain(&format!("{CAPTURED}:{port}"))?;
    ensure!(
        told["name"]["verdict"] == "capture" && told["name"]["rule"]["number"] == 4,
        "{told}"
    );
    let target = &told["targets"][0];
    ensure!(
        target["name"] == CAPTURED && target["verdict"] == "capture",
        "{told}"
    );
    ensure!(
        target["rule"]["number"] == 4 && target["peer"]["name"] == "gateway",
        "{told}"
    );
    ensure!(target["agent_dead"] == "refuse", "{told}");
    // It is the address that an application is told, and the address tells the name.
    let known = bed.address(CAPTURED)?;
    let address = SocketAddr::new(known, port).to_string();
    ensure!(target["address"] == address.as_str(), "{told}");
    let told = bed.explain(&address)?;
    ensure!(told["targets"][0]["name"] == CAPTURED, "{told}");
    let told = bed.explain(&format!("{CAPTURED}:9001"))?;
    ensure!(told["targets"][0]["verdict"] == "refuse", "{told}");
    let told = bed.explain("ads.corp.example:80")?;
    ensure!(told["name"]["verdict"] == "refuse", "{told}");
    let told = bed.explain("198.18.0.0:80")?;
    ensure!(told["targets"][0]["verdict"] == "refuse", "{told}");
    let told = bed.explain(&format!("{RESOLVER}:53"))?;
    ensure!(told["targets"][0]["verdict"] == "capture", "{told}");
    Ok(())
}

/// A resolver that is not reached from there, for a question about a captured name is never asked of it.
#[test]
fn a_name_leads_out_of_a_namespace_without_any_network() -> anyhow::Result<()> {
    const PORT: u16 = 7009;
    let bed = NameBed::new(Asks::Datagrams)?;
    make_file(&bed.nginx.root.join("file"), 1 << 20)?;
    let server = (bed.bed.bed.lab.server()).run(|| UdpSocket::bind((Lab::target(false), PORT)))?;
    server.set_read_timeout(Some(LIMIT))?;
    let inside = Netns::new("box")?;
    let start = |words: &[&str]| {
        let all = [&["run", "--"], words].concat();
        let mut command = command(&bed.bed.bed.client_control(), &all);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        inside.spawn(command)
    };
    let printed = |child| -> anyhow::Result<String> {
        let output = finish(child, LIMIT)?;
        let words = bed.bed.bed.last_words();
        ensure!(output.status.success(), "{output:?}\n{words}");
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let dig = ["dig", "@198.51.100.53", "+short", "+tries=1", CAPTURED];
    let known = printed(start(&dig)?)?;
    ensure!(is_reserved(known.parse()?), "{known}");
    let url = format!("http://{known}:{}/file", Nginx::PORT);
    let curl = [
        "curl",
        "-sS",
        "-f",
        "-o",
        "/dev/null",
        "-w",
        "%{size_download}",
        &url,
    ];
    ensure!(printed(start(&curl)?)? == "1048576");
    let talker = start(&["python3", "-c", TALKER, &known, &PORT.to_string()])?;
    let mut question = [0; 100];
    let (len, from) = server.recv_from(&mut question)?;
    ensure!(question[..len] == *b"question");
    server.send_to(b"answer", from)?;
    ensure!(printed(talker)? == "answer");
    Ok(())
}

/// Asks at a port of a name, without a connection; says who answers: the address that stands for the name, or others.
const DATAGRAMS: &str = r#"
import socket, sys
to = socket.getaddrinfo(sys.argv[1], int(sys.argv[2]), socket.AF_INET, socket.SOCK_DGRAM)[0][4]
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(10)
s.sendto(b"who is there?", to)
for said, who in sorted(s.recvfrom(100) for _ in range(2)):
    print(said.decode(), "the name's" if who == to else "%s:%d" % who)
"#;

#[test]
fn datagrams_to_a_captured_name_are_answered_under_its_address() -> anyhow::Result<()> {
    const PORT: u16 = 7200;
    let bed = NameBed::new(Asks::Datagrams)?;
    let bind = |port: u16| {
        let at = (Lab::target(false), port);
        let socket = (bed.bed.bed.lab.server()).run(move || UdpSocket::bind(at))?;
        socket.set_read_timeout(Some(LIMIT))?;
        anyhow::Ok(socket)
    };
    let (target, other) = (bind(PORT)?, bind(PORT + 1)?);
    let other_at = other.local_addr()?;
    let answering = std::thread::spawn(move || {
        let (_, asker) = target.recv_from(&mut [0; 100])?;
        other.send_to(b"other:", asker)?;
        target.send_to(b"target:", asker)
    });
    let port = PORT.to_string();
    let said = bed.says(&["python3", "-c", DATAGRAMS, CAPTURED, &port])?;
    let answered = answering.join().ok().context("the target has panicked")?;
    answered?;
    ensure!(
        said == format!("other: {other_at}\ntarget: the name's\n"),
        "{said}"
    );
    Ok(())
}

/// Asks one target under two names by one socket, and says under which each answer came.
const BOTH: &str = r#"
import socket, sys
port = int(sys.argv[1])
names = {socket.gethostbyname(name): name for name in sys.argv[2:]}
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(10)
for turn in ("first", "again"):
    for address, name in names.items():
        s.sendto(f"{turn} {name}".encode(), (address, port))
    for said, who in sorted(s.recvfrom(100) for _ in names):
        print(said.decode(), names[who[0]])
"#;

#[test]
fn two_names_of_one_target_are_answered_under_their_own_addresses() -> anyhow::Result<()> {
    const PORT: u16 = 7300;
    const OTHER: &str = "early.corp.example";
    let bed = NameBed::new(Asks::Datagrams)?;
    let at = (Lab::target(false), PORT);
    let target = (bed.bed.bed.lab.server()).run(move || UdpSocket::bind(at))?;
    target.set_read_timeout(Some(LIMIT))?;
    let echoing = std::thread::spawn(move || {
        let mut buffer = [0; 100];
        for _ in 0..4 {
            let (length, asker) = target.recv_from(&mut buffer)?;
            target.send_to(&buffer[..length], asker)?;
        }
        std::io::Result::Ok(())
    });
    let said = bed.says(&["python3", "-c", BOTH, &PORT.to_string(), CAPTURED, OTHER])?;
    echoing.join().ok().context("the target has panicked")??;
    let right: String = (["first", "again"].iter())
        .flat_map(|turn| [CAPTURED, OTHER].map(|name| format!("{turn} {name} {name}\n")))
        .collect();
    ensure!(said == right, "{said}");
    Ok(())
}
