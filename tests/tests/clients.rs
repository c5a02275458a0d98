//! Real client programs say and make the same inside `holdfast run` as outside.

use anyhow::ensure;
use session_lab::Lab;
use session_tests::{Both, Dns, Postgres, Redis, Said, Sshd, TestBed, Web, make_file};

/// Nobody listens here.
const CLOSED: u16 = 9;
/// A host of which the network says that it cannot be reached, IPv4 and IPv6.
const UNREACHABLE: [&str; 2] = ["203.0.113.7", "2001:db8:200::7"];
/// A host whose packets vanish, IPv4 and IPv6.
const SILENT: [&str; 2] = ["203.0.113.8", "2001:db8:200::8"];

/// A bed with hosts that cannot be reached; the network says the same to a client and to a gateway.
fn bed() -> anyhow::Result<TestBed> {
    let bed = TestBed::with(|c| {
        c.allow.push("203.0.113.0/24:*".to_owned());
        c.allow.push("[2001:db8:200::]/64:*".to_owned());
        c.client_extra = String::from(
            "[[capture]]\npeer = \"gateway\"\nto = [\"203.0.113.0/24\", \"2001:db8:200::/64\"]\n",
        );
    })?;
    for (kind, addrs) in [("unreachable", UNREACHABLE), ("blackhole", SILENT)] {
        for addr in addrs {
            bed.bed.lab.router().ip(&["route", "add", kind, addr])?;
        }
    }
    Ok(bed)
}

/// The options of `ssh` and its like, as words of a shell.
fn words(options: &[String]) -> String {
    options.join(" ")
}

#[test]
fn curl_as_outside() -> anyhow::Result<()> {
    let bed = bed()?;
    let web = Web::start(&bed.bed.lab, &bed.path(""))?;
    let sum = make_file(&web.root.join("file"), 20 << 20)?;
    make_file(&bed.path("source"), 20 << 20)?;
    let (source, ca) = (bed.path("source"), web.certificate.clone());
    let (source, ca) = (source.display(), ca.display());
    let both = Both::new(&bed);
    let facts = "-w '%{http_code} %{http_version} %{num_connects} %{remote_ip} %{remote_port} %{size_download} %{size_upload}\\n'";
    for v6 in [false, true] {
        let host = Lab::target(v6);
        let host = if v6 {
            format!("[{host}]")
        } else {
            host.to_string()
        };
        let (http, https) = (
            format!("http://{host}:{}", Web::HTTP),
            format!("https://{host}:{}", Web::HTTPS),
        );
        let got = both.good(&format!("curl -sS -f -o got {facts} {http}/file"), 1)?;
        ensure!(got.files["got"] == sum, "the file arrived changed");
        let up = format!("up/@RUN@-{v6}");
        both.good(&format!("curl -sS -f -T {source} {facts} {http}/{up}"), 1)?;
        both.good(&format!("curl -sS -f -o back {facts} {http}/{up}"), 1)?;
        // What the server refuses while the body is still under way.
        both.good(
            &format!("curl -sS -o page -F f=@{source} {facts} {http}/file"),
            1,
        )?;
        for version in ["--http1.1", "--http2"] {
            let get = format!("curl -sS --cacert {ca} {version} {facts}");
            both.good(&format!("{get} -o got {https}/file"), 1)?;
            both.good(&format!("{get} -o a {https}/file -o b {https}/file"), 1)?;
        }
        both.fails(
            &format!("curl -sS {https}/file"),
            1,
            "SSL certificate problem",
        )?;
        both.good(
            &format!("curl -sS -r 1000-4999 -o part {facts} {http}/file"),
            1,
        )?;
    }
    Ok(())
}

#[test]
fn curl_without_a_server_as_outside() -> anyhow::Result<()> {
    let bed = bed()?;
    let web = Web::start(&bed.bed.lab, &bed.path(""))?;
    make_file(&web.root.join("file"), 1 << 20)?;
    let both = Both::new(&bed);
    let target = Lab::target(false);
    let refused = both.alike(&format!("curl -sS http://{target}:{CLOSED}/"), 1, untimed)?;
    ensure!(refused.status.ends_with(": 7"), "{refused:?}");
    let [none, none6] = UNREACHABLE;
    both.alike(&format!("curl -sS http://{none}/"), 1, untimed)?;
    both.alike(&format!("curl -sS 'http://[{none6}]/'"), 1, untimed)?;
    let [silent, silent6] = SILENT;
    let limit = "--connect-timeout 1";
    let timeout = both.alike(&format!("curl -sS {limit} http://{silent}/"), 1, untimed)?;
    ensure!(timeout.status.ends_with(": 28"), "{timeout:?}");
    // RFC 8305: of a name's addresses the first is dead, in each way.
    let port = Web::HTTP;
    for dead in [silent6, none6, "2001:db8:100::10"] {
        let port = if dead.ends_with("::10") { CLOSED } else { port };
        let resolve = format!("--resolve 'both.example:{port}:[{dead}],{target}'");
        let get = format!(
            "curl -sS -o got -w '%{{remote_ip}}' {resolve} http://both.example:{port}/file"
        );
        both.alike(&get, 2, untimed)?;
    }
    Ok(())
}

/// Without the milliseconds of curl's messages.
fn untimed(mut said: Said) -> Said {
    let word = |(before, word): (&str, &str)| match before {
        "after" if word.parse::<u32>().is_ok() => "N".to_owned(),
        _ => word.to_owned(),
    };
    let words: Vec<&str> = said.err.split(' ').collect();
    let before = std::iter::once("").chain(words.iter().copied());
    let clean: Vec<String> = before.zip(words.iter().copied()).map(word).collect();
    said.err = clean.join(" ");
    said
}

#[test]
fn ssh_as_outside() -> anyhow::Result<()> {
    let bed = bed()?;
    let sshd = Sshd::start(&bed.bed.lab, &bed.path(""))?;
    let web = Web::start(&bed.bed.lab, &bed.path(""))?;
    make_file(&web.root.join("file"), 5 << 20)?;
    make_file(&bed.path("source"), 20 << 20)?;
    let source = bed.path("source");
    let (source, options) = (source.display(), words(&sshd.options()));
    let both = Both::new(&bed);
    let target = Lab::target(false);
    let to = format!("root@{target}");
    let ssh = format!("ssh {options}");
    both.fails(
        &format!("{ssh} {to} 'echo out; echo err >&2; exit 7'"),
        1,
        "err",
    )?;
    both.same(&format!("{ssh} {to} 'kill -9 $$'"), 1)?;
    both.good(&format!("{ssh} {to} sha256sum < {source}"), 1)?;
    both.good(&format!("{ssh} {to} cat < {source} > back"), 1)?;
    // The reader goes away in the middle.
    both.good(
        &format!("{ssh} {to} 'yes | head -c 5000000' | head -c 1000"),
        1,
    )?;
    let folder = bed.path("up");
    std::fs::create_dir(&folder)?;
    let up = folder.display();
    both.good(
        &format!("scp -q {options} {source} {to}:{up}/@RUN@-scp && sha256sum < {up}/@RUN@-scp"),
        1,
    )?;
    both.good(&format!("scp -q {options} {to}:{source} got"), 1)?;
    let batch = format!(
        "put {source} {up}/@RUN@-sftp\\nget {up}/@RUN@-sftp got\\nls -1 {up}/@RUN@-sftp\\n"
    );
    both.good(
        &format!("printf '{batch}' | sftp -q -b - {options} {to}"),
        1,
    )?;
    // A local forward: its own end is on loopback, which is never captured; the far end is the server's.
    let (forward, url) = (
        format!("127.0.0.1:2200:{target}:{}", Web::HTTP),
        "http://127.0.0.1:2200/file",
    );
    let control = "-o ExitOnForwardFailure=yes -M -S ctl";
    both.good(
        &format!("{ssh} {control} -f -N -L {forward} {to} >log 2>&1 && curl -sS -o got {url}; curl -sS -o again {url}; {ssh} -S ctl -O exit {to}"),
        1,
    )?;
    // One that the server lets in by no means; one where nobody listens; one that says nothing.
    both.fails(
        &format!("{ssh} -o PubkeyAuthentication=no {to} true"),
        1,
        "Permission denied",
    )?;
    both.fails(
        &format!("ssh -F none -o BatchMode=yes -p {CLOSED} {to} true"),
        1,
        "Connection refused",
    )?;
    let [silent, _] = SILENT;
    both.fails(
        &format!("ssh -F none -o BatchMode=yes -o ConnectTimeout=1 root@{silent} true"),
        1,
        "timed out",
    )?;
    Ok(())
}

#[test]
fn psql_as_outside() -> anyhow::Result<()> {
    let bed = bed()?;
    let _postgres = Postgres::start(&bed.bed.lab, &bed.path(""))?;
    let both = Both::new(&bed);
    let target = Lab::target(false);
    let at = |host: &str, port: u16| format!("psql -X -At -h {host} -p {port} -U postgres");
    let psql = at(&target.to_string(), Postgres::PORT);
    both.good(
        &format!("{psql} -c 'select generate_series(1, 100000)' > rows"),
        1,
    )?;
    both.fails(
        &format!("{psql} -c 'select 1/0'; {psql} -c 'select nothing'"),
        2,
        "division by zero",
    )?;
    let table = "create temp table t (n int, x text)";
    let fill = "insert into t select n, repeat(md5(n::text), 32) from generate_series(1, 10000) n";
    let script = format!(
        "{psql} -q -c '{table}' -c '{fill}' -c '\\copy t to out' -c 'truncate t' -c '\\copy t from out' -c 'select count(*), sum(length(x)), md5(string_agg(x, null order by n)) from t'"
    );
    let copied = both.good(&script, 1)?;
    ensure!(copied.out.starts_with("10000|10240000|"), "{copied:?}");
    // The request to cancel is a connection of its own.
    both.fails(
        // In the foreground it signals psql alone; otherwise its group as well, and psql may ask twice.
        &format!("timeout --foreground --preserve-status -s INT 1 {psql} -c 'select pg_sleep(50)'"),
        2,
        "canceling statement due to user request",
    )?;
    both.fails(
        &format!("{psql} -c 'set statement_timeout = 300' -c 'select pg_sleep(50)'"),
        1,
        "canceling statement due to statement timeout",
    )?;
    // The server ends the connection.
    both.fails(
        &format!("{psql} -c 'select pg_terminate_backend(pg_backend_pid())'"),
        1,
        "terminating connection",
    )?;
    let refused = at(&target.to_string(), CLOSED);
    both.fails(&refused, 1, "Connection refused")?;
    let [none, _] = UNREACHABLE;
    both.fails(&at(none, 5432), 1, "No route to host")?;
    // libpq goes from address to address.
    both.good(
        &at(&format!("{target},{}", Lab::target(true)), Postgres::PORT)
            .replace("-At", "-At -c 'select 5'"),
        1,
    )?;
    both.good(
        &format!(
            "psql -X -At 'host={none},{target} port=5432,{} user=postgres' -c 'select 6'",
            Postgres::PORT
        ),
        2,
    )?;
    Ok(())
}

#[test]
fn redis_benchmark_as_outside() -> anyhow::Result<()> {
    let bed = bed()?;
    let _redis = Redis::start(&bed.bed.lab, &bed.path(""))?;
    let both = Both::new(&bed);
    for (v6, pipeline) in [(false, 1), (false, 16), (true, 16)] {
        let at = format!("-h {} -p {}", Lab::target(v6), Redis::PORT);
        let count = "info commandstats | grep -oE 'cmdstat_(set|get):calls=[0-9]+'";
        // Names, not rates; what the server has counted says that each request came once.
        let script = format!(
            "redis-cli {at} config resetstat; redis-benchmark {at} -c 50 -n 20000 -P {pipeline} -d 100 -t set,get --csv | cut -d, -f1; redis-cli {at} {count}"
        );
        let said = both.good(&script, 2 + REDIS_CONNECTS)?;
        ensure!(said.out.contains("cmdstat_set:calls=20000"), "{said:?}");
    }
    // It tries again by itself.
    both.fails(
        &format!("redis-cli -h {} -p {CLOSED} ping", Lab::target(false)),
        2,
        "Connection refused",
    )?;
    Ok(())
}

/// Fifty clients for each of two tests, and a look at the server's configuration.
const REDIS_CONNECTS: u64 = 101;

#[test]
fn dig_over_tcp_as_outside() -> anyhow::Result<()> {
    let bed = bed()?;
    let _dns = Dns::start(&bed.bed.lab, &bed.path(""))?;
    let both = Both::new(&bed);
    for v6 in [false, true] {
        let server = Lab::target(v6);
        let dig = format!("dig @{server} -p {} +tcp +tries=1", Dns::PORT);
        let answer = "+noall +answer";
        both.good(
            &format!("{dig} {answer} host.example A host.example AAAA"),
            2,
        )?;
        both.good(
            &format!("{dig} +keepopen {answer} host.example A {answer} host.example AAAA"),
            1,
        )?;
        let long = both.good(&format!("{dig} {answer} long.example TXT"), 1)?;
        ensure!(long.out.lines().count() == 20, "{long:?}");
        both.good(
            &format!("{dig} +short nothing.example; {dig} +short -x 192.0.2.1"),
            2,
        )?;
        both.fails(
            &format!("dig @{server} -p {CLOSED} +tcp +tries=1 host.example"),
            1,
            "connection refused",
        )?;
    }
    Ok(())
}
