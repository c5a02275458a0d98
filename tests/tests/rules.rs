//! Which rule decides about a connection, what `holdfast run` leaves captured, and what `holdfast explain` tells.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use session_lab::{Lab, TestCgroup, cgroup2_root};
use session_tests::{Mounts, TestBed, eventually, finish, holdfast, holdfast_says, program};

/// Nothing in these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// Says of each `PROTOCOL:PORT` of the target, given as arguments or else as lines, what became of the connection: the
/// address that the server saw, `connected` for UDP, or the error's name. With CALLER_UID it becomes that user first, for
/// whom the way to the interpreter may be closed.
const CALLER: &str = r#"
import errno, os, socket, sys
if "CALLER_UID" in os.environ:
    os.setuid(int(os.environ["CALLER_UID"]))
def call(word):
    protocol, port = word.split(":")
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    s = socket.socket(socket.AF_INET, kind)
    s.settimeout(20)
    try:
        s.connect((sys.argv[1], int(port)))
        return s.recv(100).decode() if protocol == "tcp" else "connected"
    except OSError as e:
        return errno.errorcode.get(e.errno, str(e))
if len(sys.argv) > 2:
    print(*[call(word) for word in sys.argv[2:]])
else:
    print("ready", flush=True)
    for line in sys.stdin:
        print(call(line.strip()), flush=True)
"#;

/// Servers on these ports of the lab's target that tell each client its address.
fn servers(lab: &Lab, ports: &[u16]) -> anyhow::Result<()> {
    for port in ports.iter().copied() {
        let listener = lab
            .server()
            .run(move || TcpListener::bind((Lab::target(false), port)))?;
        std::thread::spawn(move || {
            for mut socket in listener.incoming().map_while(Result::ok) {
                if let Ok(peer) = socket.peer_addr() {
                    // A client that has gone needs no answer.
                    let _ = socket.write_all(peer.ip().to_string().as_bytes());
                }
            }
        });
    }
    Ok(())
}

/// What the caller's words mean: who comes from the address by which the gateway shows its peer was captured.
fn plain(said: &str) -> Vec<String> {
    let one = |word: &str| {
        match word.parse::<IpAddr>() {
            Ok(ip) if ip.is_loopback() => "captured",
            Ok(_) => "direct",
            Err(_) => word,
        }
        .to_owned()
    };
    said.split_whitespace().map(one).collect()
}

fn caller<'a>(target: &'a str, words: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["python3", "-u", "-c", CALLER, target];
    all.extend(words);
    all
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `holdfast run` with these options and this command, in the client's namespace.
fn run(bed: &TestBed, options: &[&str], command: &[&str]) -> anyhow::Result<Output> {
    let mut run = Command::new(program());
    run.arg("--control").arg(bed.bed.client_control());
    run.arg("run").args(options).arg("--").args(command);
    run.stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    finish(bed.bed.lab.client().spawn(run)?, LIMIT)
}

/// What the caller says under `holdfast run` with these options.
fn run_caller(bed: &TestBed, options: &[&str], words: &[&str]) -> anyhow::Result<Vec<String>> {
    let target = Lab::target(false).to_string();
    let output = run(bed, options, &caller(&target, words))?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    Ok(plain(&text(&output.stdout)))
}

/// Rules 1 to 5; the bed's own, which captures all that goes to the target, is the sixth.
const RULES: &str = r#"[[capture]]
action = "refuse"
to = ["198.51.100.0/24"]
ports = ["81"]

[[capture]]
action = "direct"
to = ["0.0.0.0/0"]
ports = ["82", "84"]

[[capture]]
action = "direct"
to = ["198.51.100.0/24"]
ports = ["83"]
uids = ["nobody", "70000-70010"]

# A longer prefix than the second rule has.
[[capture]]
action = "refuse"
to = ["198.51.100.10/32"]
ports = ["84"]

[[capture]]
action = "refuse"
to = ["198.51.100.10/32"]
ports = ["85"]
protocol = "udp"
"#;

const STREAMS: &str = "[[stream]]\nports = [\"80-89\"]\nlinks = \"redundant\"\n";

fn ruled() -> anyhow::Result<TestBed> {
    let bed = TestBed::with(|c| {
        c.capture_before = RULES.into();
        c.client_extra = STREAMS.into();
    })?;
    servers(&bed.bed.lab, &[81, 82, 83, 84, 85, 86])?;
    Ok(bed)
}

fn status(bed: &TestBed) -> anyhow::Result<serde_json::Value> {
    let said = holdfast_says(&bed.bed.client_control(), &["status", "--json"])?;
    Ok(serde_json::from_str(&said)?)
}

/// `holdfast explain` with these arguments, for the bed's cgroup.
fn explain(bed: &TestBed, arguments: &[&str]) -> anyhow::Result<serde_json::Value> {
    let cgroup = bed.bed.cgroup.path().display().to_string();
    let mut all = vec!["explain", "--json", "--cgroup", &cgroup];
    all.extend(arguments);
    let said = holdfast_says(&bed.bed.client_control(), &all)?;
    Ok(serde_json::from_str(&said)?)
}

#[test]
fn the_first_rule_that_matches_decides() -> anyhow::Result<()> {
    let bed = ruled()?;
    let target = Lab::target(false).to_string();
    let words = [
        "tcp:81", "tcp:82", "tcp:83", "tcp:84", "tcp:85", "tcp:86", "udp:81", "udp:84", "udp:85",
        "udp:86",
    ];
    let refused = "ECONNREFUSED";
    let as_root = [
        refused,
        "direct",
        "captured",
        "direct",
        "captured",
        "captured",
        refused,
        "connected",
        refused,
        "connected",
    ];
    let seen = plain(&bed.succeed(&caller(&target, &words), LIMIT)?);
    ensure!(seen == as_root, "{seen:?}\n{}", bed.bed.last_words());
    ensure!(
        status(&bed)?["capture"]["refused"] == 3,
        "{}",
        status(&bed)?
    );
    // The same as somebody whom the third rule names, and as one who is in its range.
    for uid in ["65534", "70001", "70011"] {
        let user = format!("CALLER_UID={uid}");
        let mut command = vec!["env", &user];
        command.extend(caller(&target, &words));
        let mut expected = as_root;
        if uid != "70011" {
            expected[2] = "direct";
        }
        let seen = plain(&bed.succeed(&command, LIMIT)?);
        ensure!(seen == expected, "{uid}: {seen:?}");
        // What is explained is what has happened.
        for (word, seen) in words.iter().zip(&seen) {
            let (protocol, port) = word.split_once(':').context("a word")?;
            let to = format!("{target}:{port}");
            let report = explain(&bed, &[&to, "--uid", uid, "--protocol", protocol])?;
            let expected = match seen.as_str() {
                "captured" => "capture",
                "ECONNREFUSED" => "refuse",
                // A UDP socket that is connected does not say to whom: this one is the last rule's.
                "connected" if *word == "udp:86" => "capture",
                _ => "direct",
            };
            ensure!(
                report["targets"][0]["verdict"] == expected,
                "{word}: {report:#}"
            );
        }
    }
    Ok(())
}

#[test]
fn explain_tells_the_rule_and_the_reasons() -> anyhow::Result<()> {
    let bed = ruled()?;
    let target = Lab::target(false).to_string();
    let control = bed.bed.client_control();
    let cgroup = bed.bed.cgroup.path().display().to_string();
    let config = bed.path("client.toml");
    let lines = fs::read_to_string(&config)?;
    let rule_lines: Vec<usize> = (lines.lines().enumerate())
        .filter(|(_, line)| *line == "[[capture]]")
        .map(|(at, _)| at + 1)
        .collect();

    let report = explain(&bed, &[&format!("{target}:86")])?;
    let told = &report["targets"][0];
    ensure!(report["target"] == format!("{target}:86") && report["resolved"] == false);
    ensure!(
        report["protocol"] == "tcp" && report["uid"] == 0,
        "{report:#}"
    );
    ensure!(report["attachment"] == cgroup, "{report:#}");
    ensure!(
        told["verdict"] == "capture" && told["agent_dead"] == "direct",
        "{told:#}"
    );
    ensure!(
        told["rule"]["number"] == 6
            && told["rule"]["line"] == rule_lines[5]
            && told["rule"]["file"] == config.display().to_string(),
        "{told:#}"
    );
    let passed = told["passed"].as_array().context("no array")?;
    let why = |n: usize| passed[n]["why"].as_str().unwrap_or_default().to_owned();
    ensure!(
        passed.len() == 5 && passed[2]["line"] == rule_lines[2],
        "{told:#}"
    );
    ensure!(
        why(0) == "port 86 is not in 81" && why(4) == "it is for udp alone",
        "{told:#}"
    );
    ensure!(
        told["peer"]["name"] == "gateway" && told["peer"]["state"] == "up",
        "{told:#}"
    );
    ensure!(
        told["stream"]["number"] == 1 && told["stream"]["links"] == "redundant",
        "{told:#}"
    );
    // Not captured at all, though a rule would.
    let elsewhere = TestCgroup::new()?;
    let path = elsewhere.path().display().to_string();
    let to = format!("{target}:86");
    let said = holdfast_says(&control, &["explain", &to, "--cgroup", &path])?;
    ensure!(
        said.contains("verdict   direct: its cgroup is not captured")
            && said.contains("cgroup    not captured"),
        "{said}"
    );
    // For people: from inside the cgroup, so that it is the caller's own.
    let program = program().display().to_string();
    let control_text = control.display().to_string();
    let to = format!("{target}:83");
    let command = [
        &program,
        "--control",
        &control_text,
        "explain",
        &to,
        "--uid",
        "nobody",
    ];
    let said = bed.succeed(&command, LIMIT)?;
    let place = format!("({}:{})", config.display(), rule_lines[2]);
    for expected in [
        "verdict   direct: its rule lets it go\n",
        "rule      3  direct to 198.51.100.0/24 ports 83 uids 65534, 70000-70010",
        &place,
        "not     1  port 83 is not in 81  (line ",
        &format!("captured by the attachment to {cgroup}"),
    ] {
        ensure!(said.contains(expected), "`{expected}` is not in\n{said}");
    }
    ensure!(!said.contains("note:"), "{said}");
    // A name, a v4-mapped address, and mistakes.
    let said = holdfast_says(&control, &["explain", "localhost:80"])?;
    // From the host's namespace, not the client's.
    ensure!(
        said.contains("note: this command is in another network namespace"),
        "{said}"
    );
    ensure!(
        said.starts_with("localhost was resolved by this host to ")
            && said.contains("127.0.0.1:80"),
        "{said}"
    );
    let mapped = explain(&bed, &[&format!("[::ffff:{target}]:81")])?;
    ensure!(mapped["targets"][0]["verdict"] == "refuse", "{mapped:#}");
    for (arguments, code, words) in [
        (vec!["explain", "198.51.100.10"], 2, "is not HOST:PORT"),
        (
            vec!["explain", "198.51.100.10:80", "--protocol", "sctp"],
            2,
            "expected tcp or udp",
        ),
        (
            vec!["explain", "198.51.100.10:80", "--uid", "no-such-user"],
            2,
            "is no user",
        ),
        (
            vec!["explain", "198.51.100.10:80", "--cgroup", "no/such"],
            1,
            "does not exist",
        ),
        (
            vec!["explain", "no-such-name.invalid:80"],
            1,
            "no-such-name.invalid",
        ),
    ] {
        let output = holdfast(&control, &arguments)?;
        let said = text(&output.stderr);
        ensure!(
            output.status.code() == Some(code) && said.contains(words),
            "{arguments:?}: {said}"
        );
    }
    let nowhere = holdfast(&bed.path("no.sock"), &["explain", "198.51.100.10:80"])?;
    ensure!(nowhere.status.code() == Some(3));
    Ok(())
}

#[test]
fn run_narrows_what_is_captured_of_one_command() -> anyhow::Result<()> {
    let bed = ruled()?;
    servers(&bed.bed.lab, &[87, 88])?;
    let words = ["tcp:81", "tcp:82", "tcp:85", "tcp:86", "tcp:87", "tcp:88"];
    let refused = "ECONNREFUSED";
    let seen = run_caller(&bed, &[], &words)?;
    let all = [
        refused, "direct", "captured", "captured", "captured", "captured",
    ];
    ensure!(seen == all, "{seen:?}");
    let options = [
        "--only",
        "198.51.100.0/24:80-87",
        "--except",
        "198.51.100.10:86",
    ];
    let narrowed = [
        refused, "direct", "captured", "direct", "captured", "direct",
    ];
    let seen = run_caller(&bed, &options, &words)?;
    ensure!(seen == narrowed, "{seen:?}");
    let seen = run_caller(&bed, &["--except", "198.51.100.10"], &words)?;
    ensure!(seen[2..] == ["direct"; 4], "{seen:?}");
    // In a cgroup inside of the scope, as a command that manages its own children makes.
    let target = Lab::target(false).to_string();
    let root = cgroup2_root()?.display().to_string();
    let script = r#"root=$1; shift; cg=$root$(sed -n 's/^0:://p' /proc/self/cgroup)/inner
        mkdir "$cg" && echo $$ > "$cg/cgroup.procs" && exec "$@""#;
    let mut command = vec!["sh", "-c", script, "sh", &root];
    command.extend(caller(&target, &words));
    let output = run(&bed, &options, &command)?;
    let seen = plain(&text(&output.stdout));
    ensure!(seen == narrowed, "{seen:?} {}", text(&output.stderr));
    // The command can ask about itself.
    let control = bed.bed.client_control().display().to_string();
    let program = program().display().to_string();
    let to = format!("{target}:86");
    let ask = [&program, "--control", &control, "explain", &to, "--json"];
    let output = run(&bed, &options, &ask)?;
    let report: serde_json::Value =
        serde_json::from_slice(&output.stdout).with_context(|| text(&output.stderr))?;
    ensure!(
        report["filter"] == "--only 198.51.100.0/24:80-87 --except 198.51.100.10/32:86"
            && report["targets"][0]["filter_keeps"] == false
            && report["targets"][0]["verdict"] == "direct"
            && report["targets"][0]["rule"]["number"] == 6,
        "{report:#}"
    );
    // Mistakes.
    let wrong = run(&bed, &["--only", "db.internal"], &["true"])?;
    ensure!(wrong.status.code() == Some(2) && text(&wrong.stderr).contains("expected NET[:PORTS]"));
    let many: Vec<String> = (0..49)
        .flat_map(|n| ["--only".to_owned(), format!("10.0.0.{n}")])
        .collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let wrong = run(&bed, &many, &["true"])?;
    ensure!(
        wrong.status.code() == Some(1) && text(&wrong.stderr).contains("at most 48"),
        "{}",
        text(&wrong.stderr)
    );
    let scopes = cgroup2_root()?.join("holdfast");
    eventually("the scopes are removed", LIMIT, || {
        fs::read_dir(&scopes).map_or(true, |entries| {
            entries.flatten().all(|e| !e.path().is_dir())
        })
    })
}

#[test]
fn users_who_may_run_may_narrow_and_ask() -> anyhow::Result<()> {
    let bed = TestBed::with(|c| c.run_users = vec!["nobody".to_owned()])?;
    servers(&bed.bed.lab, &[81, 82])?;
    fs::set_permissions(bed.bed.dir(), fs::Permissions::from_mode(0o755))?;
    // The test's own program may lie where others cannot go.
    let binary = bed.path("holdfast");
    fs::copy(program(), &binary)?;
    let target = Lab::target(false).to_string();
    let as_user = |user: &str, arguments: &[&str]| -> anyhow::Result<Output> {
        let mut command = Command::new("setpriv");
        let reuid = format!("--reuid={user}");
        command.args([&reuid, "--regid=nogroup", "--clear-groups", "--"]);
        command
            .arg(&binary)
            .arg("--control")
            .arg(bed.bed.client_control());
        command.args(arguments).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        finish(bed.bed.lab.client().spawn(command)?, LIMIT)
    };
    let to = format!("{target}:81");
    let mut words = vec!["run", "--only", &to, "--"];
    words.extend(caller(&target, &["tcp:81", "tcp:82"]));
    let output = as_user("nobody", &words)?;
    let seen = plain(&text(&output.stdout));
    ensure!(
        seen == ["captured", "direct"],
        "{seen:?} {}",
        text(&output.stderr)
    );
    let output = as_user("nobody", &["explain", &to, "--json"])?;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(report["uid"] == 65534, "{report:#}");
    for arguments in [&words[..], &["explain", &to]] {
        let output = as_user("daemon", arguments)?;
        ensure!(output.status.code() == Some(4), "{}", text(&output.stderr));
    }
    Ok(())
}

/// A program that goes on while agents come and go, and says what becomes of its connections.
struct Talker {
    child: std::process::Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Talker {
    fn start(bed: &TestBed, options: &[&str]) -> anyhow::Result<Self> {
        let mut command = Command::new(program());
        command.arg("--control").arg(bed.bed.client_control());
        let target = Lab::target(false).to_string();
        command
            .arg("run")
            .args(options)
            .arg("--")
            .args(caller(&target, &[]));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = bed.bed.lab.client().spawn(command)?;
        let lines = BufReader::new(child.stdout.take().context("no output")?);
        let mut this = Self { child, lines };
        ensure!(this.line()? == "ready");
        Ok(this)
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.lines.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    fn call(&mut self, word: &str) -> anyhow::Result<String> {
        let input = self.child.stdin.as_mut().context("no input")?;
        writeln!(input, "{word}")?;
        Ok(plain(&self.line()?).join(" "))
    }
}

impl Drop for Talker {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A refusal, and the filter of a command that goes on, outlive an agent that is killed.
#[test]
fn refusals_and_filters_outlive_a_killed_agent() -> anyhow::Result<()> {
    let mounts = Mounts::new()?;
    let inside = mounts.inside(&program())?;
    let mut bed = TestBed::with(|c| {
        c.program = inside.clone();
        c.capture_before = RULES.into();
    })?;
    servers(&bed.bed.lab, &[81, 82, 85, 86])?;
    let mut talker = Talker::start(&bed, &["--only", "198.51.100.10:85"])?;
    let mut calls = |bed: &TestBed| -> anyhow::Result<[String; 3]> {
        let mut call = |word| talker.call(word).with_context(|| bed.bed.last_words());
        Ok([call("tcp:81")?, call("tcp:85")?, call("tcp:86")?])
    };
    let refused = "ECONNREFUSED";
    ensure!(calls(&bed)? == [refused, "captured", "direct"]);
    let to = SocketAddr::new(Lab::target(false), 81).to_string();
    ensure!(explain(&bed, &[&to])?["targets"][0]["agent_dead"] == "refuse");
    let agent = bed.bed.client_agent.take().context("no agent")?;
    kill(agent.pid())?;
    drop(agent);
    ensure!(calls(&bed)? == [refused, "direct", "direct"]);
    bed.bed.start_client()?;
    bed.bed.await_session()?;
    ensure!(
        calls(&bed)? == [refused, "captured", "direct"],
        "{}",
        bed.bed.log("client")
    );
    Ok(())
}

fn kill(pid: u32) -> anyhow::Result<()> {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid)?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)?;
    let process = Path::new("/proc").join(pid.to_string());
    eventually("the agent is dead", LIMIT, || {
        fs::read_to_string(process.join("stat")).map_or(true, |stat| stat.contains(") Z "))
    })
}
