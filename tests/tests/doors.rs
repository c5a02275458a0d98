//! What is not captured comes in through a door, into the same sessions.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use session_lab::{Lab, LinkName};
use session_tests::{Cutter, Nginx, TestBed, eventually, finish, make_file, program, sha256};
use session_user::bench::bed::Running;

/// Nothing in these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// Doors of every kind, those that lead to one target to `target`.
fn doors(target: SocketAddr, unix: &Path) -> String {
    let unix = unix.display();
    let mut text = String::new();
    for (at, what) in [
        ("127.0.0.1:1080".to_owned(), "serve = \"socks5\"".to_owned()),
        ("[::1]:1080".to_owned(), "serve = \"socks5\"".to_owned()),
        ("127.0.0.1:3128".to_owned(), "serve = \"http\"".to_owned()),
        ("127.0.0.1:8000".to_owned(), format!("to = \"{target}\"")),
        ("0.0.0.0:8001".to_owned(), format!("to = \"{target}\"")),
        (format!("{unix}"), format!("to = \"{target}\"")),
    ] {
        text += &format!("[[listen]]\nat = \"{at}\"\npeer = \"gateway\"\n{what}\n");
    }
    text
}

struct DoorBed {
    bed: TestBed,
    nginx: Nginx,
    unix: String,
}

impl DoorBed {
    fn new() -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("holdfast-door-")
            .tempdir()?;
        // The bed makes its own folder; the socket's must be known before.
        let unix = dir.keep().join("door.sock");
        let target = SocketAddr::new(Lab::target(false), Nginx::PORT);
        let text = doors(target, &unix);
        let bed = TestBed::with(|c| c.client_extra = text)?;
        let nginx = Nginx::start(&bed.bed.lab, &bed.path(""))?;
        Ok(Self {
            bed,
            nginx,
            unix: unix.display().to_string(),
        })
    }

    fn url(v6: bool) -> String {
        let target = SocketAddr::new(Lab::target(v6), Nginx::PORT);
        format!("http://{target}/file")
    }

    /// curl in the client's namespace, not captured.
    fn start_curl(&self, words: &[&str]) -> anyhow::Result<Child> {
        let mut command = Command::new("curl");
        command
            .args(["-sS", "-f", "-o", &self.out(), "--max-time", "50"])
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Ok(self.bed.bed.lab.client().spawn(command)?)
    }

    fn curl(&self, words: &[&str]) -> anyhow::Result<Output> {
        finish(self.start_curl(words)?, LIMIT)
    }

    fn out(&self) -> String {
        self.bed.path("out").display().to_string()
    }
}

impl Drop for DoorBed {
    fn drop(&mut self) {
        if let Some(folder) = Path::new(&self.unix).parent() {
            // What is left of it is in the system's folder for such things.
            let _ = fs::remove_dir_all(folder);
        }
    }
}

/// How to fetch a file through each kind of door.
fn ways(unix: &str) -> Vec<(&'static str, Vec<String>)> {
    let own = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
    let (v4, v6) = (DoorBed::url(false), DoorBed::url(true));
    vec![
        ("SOCKS5", own(&["-x", "socks5://127.0.0.1:1080", &v4])),
        ("SOCKS5 to IPv6", own(&["-x", "socks5://[::1]:1080", &v6])),
        (
            "HTTP CONNECT",
            own(&["-p", "-x", "http://127.0.0.1:3128", &v4]),
        ),
        (
            "HTTP CONNECT to IPv6",
            own(&["-p", "-x", "http://127.0.0.1:3128", &v6]),
        ),
        ("a port", own(&["http://127.0.0.1:8000/file"])),
        (
            "a Unix socket",
            own(&["--unix-socket", unix, "http://target/file"]),
        ),
    ]
}

#[test]
fn every_door_leads_to_the_target_and_through_link_cuts() -> anyhow::Result<()> {
    let mut bed = DoorBed::new()?;
    let expected = make_file(&bed.nginx.root.join("file"), 8 << 20)?;
    for (name, words) in ways(&bed.unix) {
        let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
        words.extend(["--limit-rate", "8M"]);
        let mut curl = bed.start_curl(&words)?;
        let mut cutter = Cutter::default();
        let cuts = cutter.until(&mut bed.bed.bed, || !matches!(curl.try_wait(), Ok(None)))?;
        let output = finish(curl, LIMIT)?;
        ensure!(
            output.status.success(),
            "{name}: {}\n{}",
            String::from_utf8_lossy(&output.stderr),
            bed.bed.bed.last_words()
        );
        ensure!(cuts > 0, "{name}: nothing was cut");
        ensure!(
            sha256(Path::new(&bed.out()))? == expected,
            "{name}: the file arrived changed"
        );
    }
    let session = bed.bed.bed.session().context("no session")?;
    ensure!(
        session.streams_total == 6,
        "{} streams for 6 transfers",
        session.streams_total
    );
    Ok(())
}

#[test]
fn clients_hear_what_the_target_said() -> anyhow::Result<()> {
    let bed = DoorBed::new()?;
    let nobody = format!("http://{}/", SocketAddr::new(Lab::target(false), 9));
    let forbidden = "http://192.0.2.77/";
    for (proxy, url, expected) in [
        ("socks5://127.0.0.1:1080", nobody.as_str(), "(5)"),
        ("socks5://127.0.0.1:1080", forbidden, "(2)"),
        (
            "socks5h://127.0.0.1:1080",
            "http://no_such_name.invalid/",
            "(4)",
        ),
        ("http://127.0.0.1:3128", &nobody, "502"),
        ("http://127.0.0.1:3128", forbidden, "403"),
    ] {
        let output = bed.curl(&["-p", "-x", proxy, url])?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success(), "{proxy} to {url} succeeded");
        ensure!(said.contains(expected), "{proxy} to {url} said: {said}");
    }
    let output = bed.curl(&["-x", "http://127.0.0.1:3128", &nobody])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        said.contains("405"),
        "GET through CONNECT's door said: {said}"
    );
    Ok(())
}

#[test]
fn a_name_is_resolved_by_the_gateway() -> anyhow::Result<()> {
    // A name that every resolver knows, and here it is the gateway's own. Programs like curl never ask for it.
    const NAME: &[u8] = b"localhost";
    let text = "[[listen]]\nat = \"127.0.0.1:1080\"\npeer = \"gateway\"\nserve = \"socks5\"\n";
    let bed = TestBed::with(|c| {
        c.allow.push("localhost:*".to_owned());
        c.allow.push("127.0.0.0/8:*".to_owned());
        c.client_extra = text.to_owned();
    })?;
    let server = bed.bed.lab.server();
    let listener = server.run(|| TcpListener::bind("127.0.0.1:0"))?;
    let port = listener.local_addr()?.port();
    let served = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut socket, _) = listener.accept()?;
        socket.write_all(b"from the gateway's localhost")
    });
    let client = bed.bed.lab.client();
    let mut socket = client.run(|| TcpStream::connect("127.0.0.1:1080"))?;
    socket.set_read_timeout(Some(LIMIT))?;
    // RFC 1928: version 5, one method, "no authentication"; then CONNECT to a name.
    socket.write_all(&[5, 1, 0])?;
    let mut method = [0; 2];
    socket.read_exact(&mut method)?;
    ensure!(method == [5, 0], "the door wants a method: {method:?}");
    let name_len = u8::try_from(NAME.len())?;
    let request = [&[5, 1, 0, 3, name_len], NAME, &port.to_be_bytes()].concat();
    socket.write_all(&request)?;
    let mut reply = [0; 10];
    socket.read_exact(&mut reply)?;
    ensure!(
        reply[..2] == [5, 0],
        "the door said {reply:?}\n{}",
        bed.bed.last_words()
    );
    let mut said = String::new();
    socket.read_to_string(&mut said)?;
    ensure!(said == "from the gateway's localhost", "heard: {said}");
    served.join().expect("no panic")?;
    Ok(())
}

#[test]
fn a_door_turns_strangers_away() -> anyhow::Result<()> {
    let bed = DoorBed::new()?;
    make_file(&bed.nginx.root.join("file"), 1000)?;
    // From the router, which `from` does not name.
    let mut command = Command::new("curl");
    let client = LinkName::ALL[0].client_v4();
    command
        .args(["-sS", "-f", "--max-time", "10", "-o", "/dev/null"])
        .arg(format!("http://{client}:8001/file"))
        .stderr(Stdio::piped());
    let output = finish(bed.bed.bed.lab.router().spawn(command)?, LIMIT)?;
    ensure!(!output.status.success(), "a stranger came through");
    eventually("the log names the stranger", LIMIT, || {
        bed.bed
            .bed
            .log("client")
            .contains("a client is turned away")
    })?;
    let output = bed.curl(&["http://127.0.0.1:8001/file"])?;
    ensure!(output.status.success(), "this host was turned away");
    let mode = fs::metadata(&bed.unix)?.permissions().mode();
    ensure!(
        mode & 0o777 == 0o600,
        "anyone may use the Unix socket: {mode:o}"
    );
    Ok(())
}

#[test]
fn an_agent_without_any_privilege_serves_its_doors() -> anyhow::Result<()> {
    let mut bed = TestBed::new()?;
    bed.bed.client_agent = None;
    let nginx = Nginx::start(&bed.bed.lab, &bed.path(""))?;
    let expected = make_file(&nginx.root.join("file"), 1 << 20)?;
    let dir = bed.path("unprivileged");
    fs::create_dir(&dir)?;
    for name in ["client.crt", "client.key", "ca.crt", "crl.pem"] {
        fs::copy(bed.path("pki").join(name), dir.join(name))?;
    }
    let d = dir.display();
    let gateway = SocketAddr::new(Lab::gateway(false), 7843);
    let target = SocketAddr::new(Lab::target(false), Nginx::PORT);
    fs::write(
        dir.join("config.toml"),
        format!(
            "[identity]\ncertificate = \"{d}/client.crt\"\nkey = \"{d}/client.key\"\nca = \"{d}/ca.crt\"\n\
             [agent]\ncontrol = \"{d}/control.sock\"\n[[peer]]\nname = \"gateway\"\naddresses = [\"{gateway}\"]\n\
             [[listen]]\nat = \"127.0.0.1:8000\"\npeer = \"gateway\"\nto = \"{target}\"\n"
        ),
    )?;
    let nobody = 65534;
    for path in [dir.clone()].into_iter().chain(
        fs::read_dir(&dir)?
            .map_while(Result::ok)
            .map(|entry| entry.path()),
    ) {
        std::os::unix::fs::chown(path, Some(nobody), Some(nobody))?;
    }
    fs::set_permissions(bed.path(""), fs::Permissions::from_mode(0o711))?;
    let copied = bed.path("holdfast");
    fs::copy(program(), &copied)?;
    let log = fs::File::create(bed.path("unprivileged.log"))?;
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .args(["--bounding-set", "-all", "--inh-caps", "-all"])
        .arg(&copied)
        .arg("agent")
        .arg("--config")
        .arg(dir.join("config.toml"))
        .stdin(Stdio::null())
        .stderr(log);
    let _agent = Running::new(bed.bed.lab.client().spawn(command)?, "unprivileged agent");
    let out = bed.path("out");
    eventually("a transfer through the door", LIMIT, || {
        let mut command = Command::new("curl");
        command
            .args(["-sS", "-f", "--max-time", "10", "-o"])
            .arg(&out)
            .arg("http://127.0.0.1:8000/file");
        let done = bed.bed.lab.client().output(command);
        done.is_ok_and(|output| output.status.success())
    })
    .with_context(|| fs::read_to_string(bed.path("unprivileged.log")).unwrap_or_default())?;
    ensure!(sha256(&out)? == expected, "the file arrived changed");
    Ok(())
}
