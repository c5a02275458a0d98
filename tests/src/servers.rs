//! Further servers on the lab's target addresses: the web with TLS, HTTP/2 and uploads, DNS, and iperf3's.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::ensure;
use session_lab::Lab;

use crate::await_listener;
use crate::services::{Daemon, folder};

/// nginx that serves a folder and takes uploads, over HTTP/1.1 and, with TLS, HTTP/2.
pub struct Web {
    _daemon: Daemon,
    /// What it serves; uploads go to `up` in it.
    pub root: PathBuf,
    /// Who vouches for it.
    pub certificate: PathBuf,
}

impl Web {
    /// Its port without TLS.
    pub const HTTP: u16 = 8081;
    /// Its port with TLS.
    pub const HTTPS: u16 = 8443;

    /// Starts it.
    pub fn start(lab: &Lab, dir: &Path) -> anyhow::Result<Self> {
        let dir = folder(dir, "web")?;
        let root = folder(&dir, "root")?;
        folder(&root, "up")?;
        let (v4, v6) = (Lab::target(false), Lab::target(true));
        let (certificate, key) = (dir.join("web.crt"), dir.join("web.key"));
        let names = format!("subjectAltName=DNS:web.example,IP:{v4},IP:{v6}");
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt"])
            .args(["ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
            .args(["-subj", "/CN=web.example", "-addext", &names, "-keyout"])
            .arg(&key)
            .arg("-out")
            .arg(&certificate)
            .output()?;
        ensure!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        let d = dir.display();
        let temp: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .iter()
            .map(|t| format!("{t}_temp_path {d}/{t};\n"))
            .collect();
        let (http, https) = (Self::HTTP, Self::HTTPS);
        let conf = format!(
            "daemon off;\nuser root;\nworker_processes 1;\npid {d}/pid;\nerror_log {d}/error.log;\nevents {{ }}\n\
             http {{ access_log off; {temp} client_max_body_size 100m; ssl_certificate {c}; ssl_certificate_key {k};\n\
             server {{ listen {v4}:{http}; listen [{v6}]:{http};\n\
             listen {v4}:{https} ssl http2; listen [{v6}]:{https} ssl http2;\n\
             root {r}; location /up/ {{ dav_methods PUT DELETE; }} }} }}\n",
            c = certificate.display(),
            k = key.display(),
            r = root.display(),
        );
        let file = dir.join("nginx.conf");
        fs::write(&file, conf)?;
        let mut command = Command::new("nginx");
        let errors = dir.join("error.log");
        command.arg("-c").arg(&file).arg("-e").arg(&errors);
        let daemon = Daemon::start(lab, command, &dir.join("log"))?;
        await_listener(lab.server(), SocketAddr::new(v4, Self::HTTPS))?;
        Ok(Self {
            _daemon: daemon,
            root,
            certificate,
        })
    }
}

/// dnsmasq with a few names of its own.
pub struct Dns {
    _daemon: Daemon,
}

impl Dns {
    /// Its port, TCP and UDP.
    pub const PORT: u16 = 5354;

    /// Starts it. It knows `host.example`, A and AAAA, and `long.example`, whose TXT records are too long for a
    /// datagram.
    pub fn start(lab: &Lab, dir: &Path) -> anyhow::Result<Self> {
        let dir = folder(dir, "dns")?;
        let (v4, v6) = (Lab::target(false), Lab::target(true));
        let mut command = Command::new("dnsmasq");
        command
            .args([
                "--keep-in-foreground",
                "--conf-file=/dev/null",
                "--no-resolv",
            ])
            .args([
                "--no-hosts",
                "--bind-interfaces",
                "--user=root",
                "--pid-file=",
            ])
            .args(["--log-facility=-", "--local=/example/"])
            .arg(format!("--port={}", Self::PORT))
            // As large as a client will take; else it cuts off at what passes everywhere.
            .arg("--edns-packet-max=8192")
            .arg(format!("--listen-address={v4}"))
            .arg(format!("--listen-address={v6}"))
            .arg("--host-record=host.example,192.0.2.1,2001:db8::1");
        for n in 0..20 {
            let text = format!("{n:02}").repeat(100);
            command.arg(format!("--txt-record=long.example,{text}"));
        }
        let daemon = Daemon::start(lab, command, &dir.join("log"))?;
        await_listener(lab.server(), SocketAddr::new(v4, Self::PORT))?;
        Ok(Self { _daemon: daemon })
    }
}

/// iperf3's server, one for each family.
pub struct Iperf {
    _daemons: [Daemon; 2],
}

impl Iperf {
    /// Its port, TCP and UDP.
    pub const PORT: u16 = 5202;

    /// Starts it.
    pub fn start(lab: &Lab, dir: &Path) -> anyhow::Result<Self> {
        let dir = folder(dir, "iperf")?;
        let start = |v6| {
            // Bound, or it would answer datagrams from the address that its route has.
            let at = SocketAddr::new(Lab::target(v6), Self::PORT);
            let mut command = Command::new("iperf3");
            command.args(["-s", "-p", &at.port().to_string()]);
            command.args(["-B", &at.ip().to_string()]);
            let daemon = Daemon::start(lab, command, &dir.join(format!("log-{v6}")))?;
            await_listener(lab.server(), at)?;
            anyhow::Ok(daemon)
        };
        Ok(Self {
            _daemons: [start(false)?, start(true)?],
        })
    }
}
