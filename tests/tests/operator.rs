//! What the operator types, what is said to mistakes, and what is left of the host.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use session_lab::{HostState, Lab, LinkName, TestCgroup, cgroup2_root};
use session_tests::{Nginx, TestBed, eventually, finish, holdfast, make_file, program, sha256};
use session_user::pki;

/// Nothing in these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What captured UDP over IPv6 needs.
const ANY_IP: &str = "local fde6:b481:678d:568e::/64 dev lo ";

#[test]
fn the_host_stays_as_it_was() -> anyhow::Result<()> {
    stays_as_it_was("protocol = \"tcp\"\n", false)
}

#[test]
fn the_host_has_one_route_more_while_udp_over_ipv6_is_captured() -> anyhow::Result<()> {
    stays_as_it_was("", true)
}

fn stays_as_it_was(capture_extra: &str, route: bool) -> anyhow::Result<()> {
    let here = HostState::here();
    let mut bed = TestBed::with(|c| {
        c.holdfast = false;
        c.capture_extra = String::from(capture_extra);
    })?;
    let lab_before = HostState::of(bed.bed.lab.client());
    bed.bed.start_agents()?;
    let nginx = Nginx::start(&bed.bed.lab, &bed.path(""))?;
    make_file(&nginx.root.join("file"), 1 << 20)?;
    let url = format!("http://{}:{}/file", Lab::target(false), Nginx::PORT);
    bed.succeed(&["curl", "-sS", "-f", "-o", "/dev/null", &url], LIMIT)?;
    let (during, has_route) = HostState::of(bed.bed.lab.client()).without(ANY_IP);
    ensure!(has_route == route, "the route is there: {has_route}");
    ensure!(
        during == lab_before,
        "the agent changed its host:\n{}",
        lab_before.differences(&during)
    );
    ensure!(
        HostState::here() == here,
        "the lab changed the host:\n{}",
        here.differences(&HostState::here())
    );
    let agent = bed.bed.client_agent.take().context("no agent")?;
    if route {
        // In order: a killed agent leaves it to the next.
        let pid = nix::unistd::Pid::from_raw(i32::try_from(agent.pid())?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        let gone = || !HostState::of(bed.bed.lab.client()).without(ANY_IP).1;
        eventually("the route is gone", LIMIT, gone)?;
    }
    drop(agent);
    let after = HostState::of(bed.bed.lab.client());
    ensure!(
        after == lab_before,
        "the agent left something:\n{}",
        lab_before.differences(&after)
    );
    drop(bed);
    ensure!(
        HostState::here() == here,
        "the lab left something:\n{}",
        here.differences(&HostState::here())
    );
    Ok(())
}

#[test]
fn commands_show_and_steer() -> anyhow::Result<()> {
    let mut bed = TestBed::new()?;
    let control = bed.bed.client_control();
    let json = |arguments: &[&str]| -> anyhow::Result<serde_json::Value> {
        let output = holdfast(&control, arguments)?;
        ensure!(output.status.success(), "{}", err(&output));
        Ok(serde_json::from_slice(&output.stdout)?)
    };
    let status = json(&["status", "--json"])?;
    ensure!(
        status["peers"][0]["state"] == "up" && status["peers"][0]["link"] == "wifi0",
        "{status}"
    );
    ensure!(
        status["identity"] == "spiffe://bench.example/client",
        "{status}"
    );
    let links = json(&["links", "--json"])?;
    let names: Vec<&str> = links
        .as_array()
        .context("no array")?
        .iter()
        .filter_map(|l| l["name"].as_str())
        .collect();
    ensure!(
        names.contains(&"wifi0") && names.contains(&"lte0"),
        "{links}"
    );
    bed.bed.await_standby(LinkName::Lte, LIMIT)?;
    let links = json(&["links", "--json"])?;
    let all = links.as_array().context("no array")?;
    let lte = all
        .iter()
        .find(|l| l["name"] == "lte0")
        .context("no lte0")?;
    // Each minute, from either end, a probe of 52 bytes and its answer.
    ensure!(
        lte["standby"] == "warm"
            && lte["standby_reason"] == "it costs nothing by volume"
            && lte["idle_packets_per_hour"] == 274
            && lte["idle_bytes_per_hour"] == 274 * 52,
        "{lte:#}"
    );
    let text = out(&holdfast(&control, &["links"])?);
    ensure!(
        text.lines()
            .any(|l| l.starts_with("wifi0") && l.contains("in use")),
        "{text}"
    );
    // By hand to the other link, and back.
    ensure!(holdfast(&control, &["handover", "lte0"])?.status.success());
    bed.bed.await_link(LinkName::Lte, LIMIT)?;
    ensure!(holdfast(&control, &["handover", "auto"])?.status.success());
    bed.bed.await_link(LinkName::Wifi, LIMIT)?;
    let refused = holdfast(&control, &["handover", "nolink"])?;
    ensure!(
        refused.status.code() == Some(1) && err(&refused).contains("nolink"),
        "{}",
        err(&refused)
    );
    // A cgroup by path, and not any path.
    let cgroup = TestCgroup::new()?;
    let path = cgroup.path().display().to_string();
    ensure!(holdfast(&control, &["attach", &path])?.status.success());
    let status = json(&["status", "--json"])?;
    ensure!(
        status["capture"]["cgroups"].to_string().contains(&path),
        "{status}"
    );
    ensure!(holdfast(&control, &["detach", &path])?.status.success());
    for bad in ["/nonexistent/cgroup", "/tmp", "/"] {
        let output = holdfast(&control, &["attach", bad])?;
        ensure!(
            output.status.code() == Some(1) && !err(&output).is_empty(),
            "{bad} was accepted"
        );
    }
    Ok(())
}

#[test]
fn run_is_transparent_and_cleans_up() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let nginx = Nginx::start(&bed.bed.lab, &bed.path(""))?;
    let expected = make_file(&nginx.root.join("file"), 1 << 20)?;
    let control = bed.bed.client_control().display().to_string();
    let file = bed.path("out");
    let url = format!("http://{}:{}/file", Lab::target(false), Nginx::PORT);
    let run = |words: &[&str]| -> anyhow::Result<Output> {
        let mut command = Command::new(program());
        command
            .args(["--control", &control, "run", "--"])
            .args(words);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        finish(bed.bed.lab.client().spawn(command)?, LIMIT)
    };
    let before = bed.bed.session().context("no session")?.streams_total;
    let output = run(&["curl", "-sS", "-f", "-o", &file.display().to_string(), &url])?;
    ensure!(output.status.success(), "{}", err(&output));
    ensure!(sha256(&file)? == expected);
    ensure!(
        bed.bed.session().context("no session")?.streams_total == before + 1,
        "it was not captured"
    );
    ensure!(
        run(&["sh", "-c", "exit 7"])?.status.code() == Some(7),
        "the exit status is not the command's"
    );
    ensure!(run(&["/nonexistent/program"])?.status.code() == Some(127));
    ensure!(run(&["/etc/passwd"])?.status.code() == Some(126));
    let scopes = cgroup2_root()?.join("holdfast");
    eventually("the scopes are removed", LIMIT, || {
        fs::read_dir(&scopes).map_or(true, |entries| {
            entries.flatten().all(|e| !e.path().is_dir())
        })
    })
}

#[test]
fn ordinary_users_run_if_they_may() -> anyhow::Result<()> {
    let bed = TestBed::with(|c| c.client_extra = String::new())?;
    fs::set_permissions(bed.bed.dir(), fs::Permissions::from_mode(0o755))?;
    let control = bed.bed.client_control().display().to_string();
    // The test's own folder may lie where others cannot go: take the binary along.
    let binary = bed.path("holdfast");
    fs::copy(program(), &binary)?;
    let as_user = |user: &str, words: &[&str]| -> anyhow::Result<Output> {
        let mut command = Command::new("setpriv");
        command
            .args([
                &format!("--reuid={user}"),
                "--regid=nogroup",
                "--clear-groups",
                "--",
            ])
            .arg(&binary);
        command.args(["--control", &control]).args(words);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        finish(bed.bed.lab.client().spawn(command)?, LIMIT)
    };
    let output = as_user("nobody", &["run", "--", "id", "-u"])?;
    ensure!(
        output.status.code() == Some(4),
        "an ordinary user was let in: {}",
        err(&output)
    );
    ensure!(
        err(&output).contains("run_users"),
        "no advice: {}",
        err(&output)
    );
    let output = as_user("nobody", &["detach", "x"])?;
    ensure!(output.status.code() == Some(4), "{}", err(&output));
    drop(bed);

    let bed = TestBed::with(|c| c.run_users = vec!["nobody".to_owned()])?;
    fs::set_permissions(bed.bed.dir(), fs::Permissions::from_mode(0o755))?;
    let control = bed.bed.client_control().display().to_string();
    let binary = bed.path("holdfast");
    fs::copy(program(), &binary)?;
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=nobody", "--regid=nogroup", "--clear-groups", "--"])
        .arg(&binary);
    command.args([
        "--control",
        &control,
        "run",
        "--",
        "sh",
        "-c",
        "id -u; cat /proc/self/cgroup",
    ]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let output = finish(bed.bed.lab.client().spawn(command)?, LIMIT)?;
    ensure!(output.status.success(), "{}", err(&output));
    let nobody = nix::unistd::User::from_name("nobody")?
        .context("no user nobody")?
        .uid
        .to_string();
    let text = out(&output);
    ensure!(text.lines().next() == Some(&nobody), "it ran as {text}");
    ensure!(text.contains("/holdfast/run-"), "it ran in {text}");
    Ok(())
}

#[test]
fn mistakes_are_answered_with_what_to_do() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let nowhere = dir.path().join("no.sock");
    let output = holdfast(&nowhere, &["status"])?;
    ensure!(
        output.status.code() == Some(3) && err(&output).contains("is the agent running"),
        "{}",
        err(&output)
    );
    let output = holdfast(&nowhere, &["frobnicate"])?;
    ensure!(output.status.code() == Some(2), "{}", err(&output));
    let file = dir.path().join("bad.toml");
    fs::write(
        &file,
        "[identity]\ncertificate = \"c\"\nkey = \"k\"\nca = \"a\"\n[session]\nhold = \"soon\"\n",
    )?;
    let file = file.display().to_string();
    let output = holdfast(&nowhere, &["config", "check", &file])?;
    let said = err(&output);
    ensure!(
        output.status.code() == Some(5) && said.contains("bad.toml:6: session.hold"),
        "{said}"
    );
    let output = holdfast(&nowhere, &["agent", "--config", &file])?;
    ensure!(output.status.code() == Some(5), "{}", err(&output));
    let output = holdfast(&nowhere, &["config", "example"])?;
    ensure!(output.status.success() && out(&output).contains("[identity]"));
    let output = holdfast(&nowhere, &["doctor", "--json", "--config", &file])?;
    let findings: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(
        findings.as_array().is_some_and(|f| f.len() > 5),
        "{findings}"
    );
    ensure!(
        output.status.code() == Some(6),
        "doctor found nothing wrong"
    );
    Ok(())
}

/// An agent without privileges says which ones it needs.
#[test]
fn missing_privileges_are_named() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    fs::set_permissions(bed.bed.dir(), fs::Permissions::from_mode(0o777))?;
    for name in ["client.crt", "client.key", "ca.crt", "crl.pem"] {
        let path = bed.path("pki").join(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
    }
    fs::set_permissions(bed.path("pki"), fs::Permissions::from_mode(0o755))?;
    let binary = bed.path("holdfast");
    fs::copy(program(), &binary)?;
    let config = fs::read_to_string(bed.path("client.toml"))?.replace("client.sock", "other.sock");
    fs::write(bed.path("other.toml"), config)?;
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=nobody", "--regid=nogroup", "--clear-groups", "--"])
        .arg(&binary);
    command
        .arg("agent")
        .arg("--config")
        .arg(bed.path("other.toml"));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let output = finish(bed.bed.lab.client().spawn(command)?, LIMIT)?;
    let said = err(&output);
    ensure!(
        !output.status.success() && said.contains("CAP_"),
        "it said: {said}"
    );
    Ok(())
}

/// What records are sealed with is what the processor of both ends, which is the same here, is good at.
#[test]
fn doctor_says_which_aead_sessions_have() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let doctor = holdfast(&bed.bed.client_control(), &["doctor", "--json"])?;
    let findings: Vec<serde_json::Value> = serde_json::from_slice(&doctor.stdout)?;
    let aead = findings.iter().find(|f| f["name"] == "AEAD");
    let aead = aead.and_then(|f| f["detail"].as_str()?.split(',').next());
    let aead = aead.context("doctor says nothing of it")?;
    ensure!(
        ["AES-128-GCM", "ChaCha20-Poly1305"].contains(&aead),
        "{aead}"
    );
    for control in [bed.bed.client_control(), bed.path("gateway.sock")] {
        eventually("a session has it", LIMIT, || {
            let said = holdfast(&control, &["sessions"]).map(|o| out(&o));
            said.is_ok_and(|said| said.contains(&format!("  up  {aead}  age ")))
        })?;
    }
    Ok(())
}

/// Revocation closes a live session at a reload, and the unit cannot come back.
#[test]
fn a_revoked_unit_is_closed_and_stays_out() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let serials = pki::revoke(&bed.path("pki"), "client", SystemTime::now())?;
    ensure!(
        serials.len() == 1,
        "one certificate was issued to the client"
    );
    let reloaded = holdfast(&bed.path("gateway.sock"), &["reload"])?;
    ensure!(reloaded.status.success(), "{}", err(&reloaded));
    eventually("the gateway closes the session", LIMIT, || {
        bed.bed.log("gateway").contains("revoked")
    })?;
    eventually("the client is told why it stays out", LIMIT, || {
        let status = holdfast(&bed.bed.client_control(), &["status"])
            .map(|o| out(&o))
            .unwrap_or_default();
        status.contains("connecting") && status.contains("revoked")
    })?;
    let sessions = out(&holdfast(&bed.path("gateway.sock"), &["sessions"])?);
    ensure!(sessions.trim() == "no sessions", "{sessions}");
    Ok(())
}

/// A service manager removes a service's cgroup at a restart and makes another one, and its slice's
/// as well if nothing else was in it.
#[test]
fn a_restarted_service_is_captured_again() -> anyhow::Result<()> {
    let bed = TestBed::new()?;
    let control = bed.bed.client_control();
    let nginx = Nginx::start(&bed.bed.lab, &bed.path(""))?;
    make_file(&nginx.root.join("file"), 1 << 10)?;
    let url = format!("http://{}:{}/file", Lab::target(false), Nginx::PORT);
    let tree = TestCgroup::new()?;
    let slice = tree.path().join("app.slice");
    let service = slice.join("app.service");
    let start = || fs::create_dir(&slice).and_then(|()| fs::create_dir(&service));
    let captured = || -> anyhow::Result<u64> {
        let status = holdfast(&control, &["status", "--json"])?;
        let status: serde_json::Value = serde_json::from_slice(&status.stdout)?;
        status["capture"]["captured4"]
            .as_u64()
            .context("no counter")
    };
    start()?;
    let path = service.display().to_string();
    ensure!(holdfast(&control, &["attach", &path])?.status.success());
    for restart in 1..=3 {
        fs::remove_dir(&service)?;
        fs::remove_dir(&slice)?;
        start()?;
        eventually("the agent notices", LIMIT, || {
            bed.bed.log("client").matches("is captured again").count() == restart
        })?;
        let before = captured()?;
        let script = format!("echo 0 > {path}/cgroup.procs && exec curl -sS -f -o /dev/null {url}");
        let mut command = Command::new("sh");
        command.args(["-c", &script]);
        let output = bed.bed.lab.client().output(command)?;
        ensure!(output.status.success(), "{}", err(&output));
        ensure!(captured()? == before + 1, "restart {restart} escaped");
        eventually("the service's cgroup is empty", LIMIT, || {
            fs::read_to_string(service.join("cgroup.events"))
                .is_ok_and(|e| e.contains("populated 0"))
        })?;
    }
    ensure!(holdfast(&control, &["detach", &path])?.status.success());
    fs::remove_dir(&service)?;
    fs::remove_dir(&slice)?;
    Ok(())
}
