//! Real programs live through at least ten hard cuts of the link that they use, byte for byte.

use std::io::{BufRead, BufReader, Write};
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, ensure};
use session_lab::Lab;
use session_tests::{
    CUTS, Cutter, Nginx, Postgres, Redis, Sshd, TestBed, finish, make_file, sha256,
};

/// Nothing in these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(180);

fn url(v6: bool, name: &str) -> String {
    format!(
        "http://{}/{name}",
        std::net::SocketAddr::new(Lab::target(v6), Nginx::PORT)
    )
}

/// Cuts until every child has ended, and at least [`CUTS`] times.
fn cut_while_running(
    bed: &mut TestBed,
    children: Vec<Child>,
) -> anyhow::Result<Vec<std::process::Output>> {
    let waiting: Vec<_> = children
        .into_iter()
        .map(|c| std::thread::spawn(move || finish(c, LIMIT)))
        .collect();
    let mut cutter = Cutter::default();
    let cuts = cutter.until(&mut bed.bed, || {
        waiting.iter().all(std::thread::JoinHandle::is_finished)
    })?;
    ensure!(
        cuts >= CUTS,
        "only {cuts} cuts happened while the program ran"
    );
    waiting
        .into_iter()
        .map(|w| {
            w.join()
                .map_err(|_| anyhow::anyhow!("a waiting thread panicked"))?
        })
        .collect()
}

fn good(output: &std::process::Output) -> anyhow::Result<String> {
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    ensure!(output.status.success(), "{}\n{out}\n{err}", output.status);
    Ok(out.into_owned())
}

/// 256 MiB, slow enough for ten cuts.
fn curl_from_nginx(v6: bool) -> anyhow::Result<()> {
    let mut bed = TestBed::with(|c| c.v6 = v6)?;
    let nginx = Nginx::start(&bed.bed.lab, &bed.path(""))?;
    let expected = make_file(&nginx.root.join("file"), 256 << 20)?;
    let out = bed.path("out");
    let curl = bed.start(&[
        "curl",
        "-sS",
        "-f",
        "--limit-rate",
        "28M",
        "-o",
        &out.display().to_string(),
        &url(v6, "file"),
    ])?;
    for output in cut_while_running(&mut bed, vec![curl])? {
        good(&output)?;
    }
    ensure!(sha256(&out)? == expected, "the file arrived changed");
    Ok(())
}

#[test]
fn curl_downloads_from_nginx_over_ipv4() -> anyhow::Result<()> {
    curl_from_nginx(false)
}

#[test]
fn curl_downloads_from_nginx_over_ipv6() -> anyhow::Result<()> {
    curl_from_nginx(true)
}

#[test]
fn two_hundred_curls_at_once() -> anyhow::Result<()> {
    let mut bed = TestBed::new()?;
    let nginx = Nginx::start(&bed.bed.lab, &bed.path(""))?;
    let expected = make_file(&nginx.root.join("file"), 1 << 20)?;
    let mut curls = Vec::new();
    for n in 0..200 {
        let out = bed.path(&format!("out-{n}")).display().to_string();
        let rate = format!("{}k", 100 + n % 20);
        curls.push(bed.start(&[
            "curl",
            "-sS",
            "-f",
            "--limit-rate",
            &rate,
            "-o",
            &out,
            &url(n % 2 == 1, "file"),
        ])?);
    }
    for output in cut_while_running(&mut bed, curls)? {
        good(&output)?;
    }
    for n in 0..200 {
        ensure!(
            sha256(&bed.path(&format!("out-{n}")))? == expected,
            "file {n} arrived changed"
        );
    }
    Ok(())
}

#[test]
fn scp_uploads_a_file() -> anyhow::Result<()> {
    let mut bed = TestBed::new()?;
    let sshd = Sshd::start(&bed.bed.lab, &bed.path(""))?;
    let (source, sink) = (bed.path("source"), bed.path("sink"));
    let expected = make_file(&source, 64 << 20)?;
    let mut words = vec![
        "scp".to_owned(),
        "-q".to_owned(),
        "-l".to_owned(),
        "60000".to_owned(),
    ];
    words.extend(sshd.options());
    words.extend([
        source.display().to_string(),
        format!("root@{}:{}", Lab::target(false), sink.display()),
    ]);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let scp = bed.start(&words)?;
    for output in cut_while_running(&mut bed, vec![scp])? {
        good(&output)?;
    }
    ensure!(sha256(&sink)? == expected, "the file arrived changed");
    Ok(())
}

#[test]
fn an_interactive_ssh_session_goes_on() -> anyhow::Result<()> {
    let mut bed = TestBed::new()?;
    let sshd = Sshd::start(&bed.bed.lab, &bed.path(""))?;
    let mut words = vec!["ssh".to_owned(), "-tt".to_owned()];
    words.extend(sshd.options());
    words.extend([
        format!("root@{}", Lab::target(false)),
        "stty -echo; echo ready; while read l; do echo \"got $l\"; done".to_owned(),
    ]);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let mut ssh = bed.start(&words)?;
    let mut keyboard = ssh.stdin.take().context("ssh has no input")?;
    let mut screen = BufReader::new(ssh.stdout.take().context("ssh has no output")?);
    let (told, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        while screen.read_line(&mut line).is_ok_and(|n| n > 0) {
            if told.send(std::mem::take(&mut line)).is_err() {
                return;
            }
        }
    });
    // Until the terminal's own echo is off, what is typed would show twice.
    while lines
        .recv_timeout(LIMIT)
        .context("ssh does not begin")?
        .trim()
        != "ready"
    {}
    let mut typed = 0;
    let mut cutter = Cutter::default();
    while cutter.cuts() < CUTS {
        // Half of the keystrokes are under way while the link goes.
        for _ in 0..20 {
            typed += 1;
            writeln!(keyboard, "line {typed}")?;
        }
        cutter.once(&mut bed.bed)?;
    }
    for n in 1..=typed {
        let line = lines.recv_timeout(LIMIT).context("ssh says nothing more")?;
        ensure!(
            line.trim() == format!("got line {n}"),
            "expected line {n}, got {line:?}"
        );
    }
    drop(keyboard);
    ssh.kill()?;
    ssh.wait()?;
    Ok(())
}

#[test]
fn psql_and_pgbench_run_on() -> anyhow::Result<()> {
    let mut bed = TestBed::new()?;
    let _postgres = Postgres::start(&bed.bed.lab, &bed.path(""))?;
    let (host, port) = (Lab::target(false).to_string(), Postgres::PORT.to_string());
    let address = ["-h", &host, "-p", &port, "-U", "postgres"];
    let init: Vec<&str> = ["pgbench", "-i", "-q", "-s", "1"]
        .into_iter()
        .chain(address)
        .chain(["postgres"])
        .collect();
    bed.succeed(&init, LIMIT)?;
    let run = ["pgbench", "-c", "4", "-T", "12", "-n"];
    let pgbench = bed.start(
        &run.into_iter()
            .chain(address)
            .chain(["postgres"])
            .collect::<Vec<_>>(),
    )?;
    let sql = "select sum(length(repeat('x', 1000) || n)) from generate_series(1, 200000) n; select pg_sleep(10); select 'end', count(*) from pgbench_accounts";
    let psql = bed.start(
        &["psql", "-At", "-c", sql]
            .into_iter()
            .chain(address)
            .collect::<Vec<_>>(),
    )?;
    let outputs = cut_while_running(&mut bed, vec![pgbench, psql])?;
    let said = good(&outputs[0])?;
    ensure!(
        said.contains("number of failed transactions: 0") || !said.contains("failed"),
        "{said}"
    );
    ensure!(
        good(&outputs[1])?.contains("end|100000"),
        "psql answered something else"
    );
    Ok(())
}

#[test]
fn redis_cli_counts_on() -> anyhow::Result<()> {
    let mut bed = TestBed::new()?;
    let _redis = Redis::start(&bed.bed.lab, &bed.path(""))?;
    let (host, port) = (Lab::target(true).to_string(), Redis::PORT.to_string());
    let cli = [
        "redis-cli",
        "-h",
        &host,
        "-p",
        &port,
        "-r",
        "2400",
        "-i",
        "0.005",
        "incr",
        "counter",
    ];
    let child = bed.start(&cli)?;
    let outputs = cut_while_running(&mut bed, vec![child])?;
    let said = good(&outputs[0])?;
    let numbers: Vec<u64> = said.lines().filter_map(|l| l.trim().parse().ok()).collect();
    ensure!(
        numbers == (1..=2400).collect::<Vec<u64>>(),
        "an answer is missing or came twice"
    );
    Ok(())
}
