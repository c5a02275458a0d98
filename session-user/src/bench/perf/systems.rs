//! What the application's bytes go through: programs of others, set up for speed.
//!
//! Each is a pair of programs, as Holdfast is: one on the client's host, where the application connects, and one on the
//! server's.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;

use anyhow::Context;

use super::super::bed::own_program;
use super::super::peers::{
    Against, Host, Peer, SERVER_NAME, Site, Way, ask, not_installed, path_of,
};

/// Where the near program listens, on loopback.
const NEAR_PORT: u16 = 7002;
/// Where the far one does.
const FAR_PORT: u16 = 7001;
/// Sixteen bytes in base64: both ends are ours, so any key serves.
const SHADOWSOCKS_KEY: &str = "AAECAwQFBgcICQoLDA0ODw==";

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum System {
    /// Nothing in between.
    Direct,
    /// Two plain copying programs on tokio: what two hops cost at least.
    Proxy,
    /// The same with splice(2), so that nothing is copied to them.
    Splice,
    /// Holdfast, with capture.
    Holdfast,
    /// The same with `connect = "early"`. It goes with the other.
    #[value(skip)]
    Early,
    /// A pair of stunnel with TLS 1.3.
    Stunnel,
    /// A pair of HAProxy with TLS 1.3.
    Haproxy,
    /// shadowsocks-rust with 2022-blake3-aes-128-gcm.
    Shadowsocks,
    /// OpenSSH's port forwarding.
    Ssh,
    /// A tunnel over QUIC (quinn).
    Quic,
    /// A tunnel of wireguard-go.
    Wireguard,
    /// A tunnel of OpenVPN.
    Openvpn,
}

impl System {
    /// All of them, in the order of reports.
    pub const ALL: [Self; 12] = [
        Self::Direct,
        Self::Proxy,
        Self::Splice,
        Self::Holdfast,
        Self::Early,
        Self::Stunnel,
        Self::Haproxy,
        Self::Shadowsocks,
        Self::Ssh,
        Self::Quic,
        Self::Wireguard,
        Self::Openvpn,
    ];

    /// As on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Proxy => "proxy",
            Self::Splice => "splice",
            Self::Holdfast => "holdfast",
            Self::Early => "holdfast, early",
            Self::Stunnel => "stunnel",
            Self::Haproxy => "haproxy",
            Self::Shadowsocks => "shadowsocks",
            Self::Ssh => "ssh",
            Self::Quic => "quic",
            Self::Wireguard => "wireguard",
            Self::Openvpn => "openvpn",
        }
    }

    /// Whether it is ours.
    pub const fn is_own(self) -> bool {
        matches!(self, Self::Holdfast | Self::Early)
    }

    /// Whether it encrypts, and is another's.
    pub const fn is_rival(self) -> bool {
        !self.is_own() && !matches!(self, Self::Direct | Self::Proxy | Self::Splice)
    }

    /// Whether it is one of the others that relay connections by programs in user space over TCP, and encrypt.
    pub const fn is_relay(self) -> bool {
        matches!(
            self,
            Self::Stunnel | Self::Haproxy | Self::Shadowsocks | Self::Ssh
        )
    }

    /// The programs in between; None where there are none, or they are ours.
    pub fn peer(self) -> Option<Box<dyn Peer>> {
        Some(match self {
            Self::Direct | Self::Holdfast | Self::Early => return None,
            Self::Proxy => Box::new(Proxy { splices: false }),
            Self::Splice => Box::new(Proxy { splices: true }),
            Self::Stunnel => Box::new(Stunnel),
            Self::Haproxy => Box::new(Haproxy),
            Self::Shadowsocks => Box::new(Shadowsocks),
            Self::Ssh => Box::new(Ssh),
            Self::Quic => return Against::Quic.peer(),
            Self::Wireguard => return Against::Wireguard.peer(),
            Self::Openvpn => return Against::Openvpn.peer(),
        })
    }
}

/// Where the application connects to.
fn near() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, NEAR_PORT))
}

/// Where the far program listens.
fn far(site: &Site<'_>) -> SocketAddr {
    SocketAddr::new(site.gateway(), FAR_PORT)
}

/// Starts both programs, the far one first, and waits until they listen.
fn pair(site: &Site<'_>, names: [&'static str; 2], commands: [Command; 2]) -> anyhow::Result<Way> {
    let mut way = Way::to(near());
    let [far_command, near_command] = commands;
    way.at_server
        .push(site.start(Host::Server, names[0], far_command)?);
    site.await_listener(Host::Server, names[0], far(site))?;
    way.at_client
        .push(site.start(Host::Client, names[1], near_command)?);
    site.await_listener(Host::Client, names[1], near())?;
    Ok(way)
}

/// A certificate and its key, in one file as servers want it, and the certificate alone.
fn certificate(site: &Site<'_>) -> anyhow::Result<[String; 2]> {
    let made = rcgen::generate_simple_self_signed([SERVER_NAME.to_owned()])
        .context("no certificate can be made")?;
    let (both, alone) = (site.dir.join("both.pem"), site.dir.join("cert.pem"));
    let cert = made.cert.pem();
    fs::write(&both, format!("{cert}{}", made.signing_key.serialize_pem()))?;
    fs::write(&alone, cert)?;
    Ok([both, alone].map(|path| path.display().to_string()))
}

/// A file of the set-up.
fn write(site: &Site<'_>, name: &str, text: &str) -> anyhow::Result<String> {
    let path = site.dir.join(name);
    fs::write(&path, text)?;
    Ok(path.display().to_string())
}

struct Proxy {
    splices: bool,
}

impl Peer for Proxy {
    fn name(&self) -> &'static str {
        let system = if self.splices {
            System::Splice
        } else {
            System::Proxy
        };
        system.name()
    }

    fn start(&self, site: &Site<'_>) -> anyhow::Result<Way> {
        let command = |listen: SocketAddr, to: SocketAddr| {
            let mut command = Command::new(own_program()?);
            command.args(["bench", "app-proxy"]);
            command.args(["--listen", &listen.to_string(), "--to", &to.to_string()]);
            command.args(self.splices.then_some("--splice"));
            anyhow::Ok(command)
        };
        let commands = [
            command(far(site), site.server)?,
            command(near(), far(site))?,
        ];
        pair(site, ["far-proxy", "near-proxy"], commands)
    }
}

struct Stunnel;

impl Peer for Stunnel {
    fn name(&self) -> &'static str {
        System::Stunnel.name()
    }

    fn missing(&self) -> Option<String> {
        not_installed(&["stunnel4"])
    }

    fn start(&self, site: &Site<'_>) -> anyhow::Result<Way> {
        let [both, alone] = certificate(site)?;
        let common = "foreground = yes\npid =\nsocket = l:TCP_NODELAY=1\nsocket = r:TCP_NODELAY=1\nsslVersionMin = TLSv1.3\n";
        let server = format!(
            "{common}cert = {both}\n[far]\naccept = {}\nconnect = {}\n",
            far(site),
            site.server
        );
        let client = format!(
            "{common}[near]\nclient = yes\naccept = {}\nconnect = {}\nCAfile = {alone}\nverifyPeer = yes\n",
            near(),
            far(site)
        );
        let command = |file: String| {
            let mut command = Command::new("stunnel4");
            command.arg(file);
            command
        };
        let commands = [
            command(write(site, "far.conf", &server)?),
            command(write(site, "near.conf", &client)?),
        ];
        pair(site, ["far-stunnel", "near-stunnel"], commands)
    }
}

struct Haproxy;

impl Peer for Haproxy {
    fn name(&self) -> &'static str {
        System::Haproxy.name()
    }

    fn missing(&self) -> Option<String> {
        not_installed(&["haproxy"])
    }

    fn start(&self, site: &Site<'_>) -> anyhow::Result<Way> {
        let [both, alone] = certificate(site)?;
        let common = "global\n maxconn 4096\n ssl-default-bind-options ssl-min-ver TLSv1.3\n\
             defaults\n mode tcp\n timeout connect 5s\n timeout client 1h\n timeout server 1h\n option splice-auto\n";
        let server = format!(
            "{common}listen far\n bind {} ssl crt {both}\n server target {}\n",
            far(site),
            site.server
        );
        let client = format!(
            "{common}listen near\n bind {}\n server far {} ssl verify required ca-file {alone} verifyhost {SERVER_NAME}\n",
            near(),
            far(site)
        );
        let command = |file: String| {
            let mut command = Command::new(path_of("haproxy"));
            command.args(["-db", "-f", &file]);
            command
        };
        let commands = [
            command(write(site, "far.cfg", &server)?),
            command(write(site, "near.cfg", &client)?),
        ];
        pair(site, ["far-haproxy", "near-haproxy"], commands)
    }
}

struct Shadowsocks;

impl Peer for Shadowsocks {
    fn name(&self) -> &'static str {
        System::Shadowsocks.name()
    }

    fn missing(&self) -> Option<String> {
        not_installed(&["ssserver", "sslocal"])
    }

    fn start(&self, site: &Site<'_>) -> anyhow::Result<Way> {
        let command = |program: &str, arguments: &[&str]| {
            let mut command = Command::new(path_of(program));
            command.args(arguments);
            command.args(["--tcp-no-delay", "--server-addr", &far(site).to_string()]);
            command.args(["--encrypt-method", "2022-blake3-aes-128-gcm"]);
            command.args(["--password", SHADOWSOCKS_KEY]);
            command
        };
        let (near, target) = (near().to_string(), site.server.to_string());
        let tunnel = [
            "--protocol",
            "tunnel",
            "--local-addr",
            &near,
            "--forward-addr",
            &target,
        ];
        let commands = [command("ssserver", &[]), command("sslocal", &tunnel)];
        pair(site, ["ssserver", "sslocal"], commands)
    }
}

struct Ssh;

impl Peer for Ssh {
    fn name(&self) -> &'static str {
        System::Ssh.name()
    }

    fn missing(&self) -> Option<String> {
        not_installed(&["ssh", "sshd", "ssh-keygen"])
    }

    fn start(&self, site: &Site<'_>) -> anyhow::Result<Way> {
        for name in ["host", "user"] {
            let path = site.dir.join(name).display().to_string();
            let words = ["-q", "-t", "ed25519", "-N", "", "-f", &path];
            ask("ssh-keygen", &words, "")?;
        }
        let far = far(site);
        let file = |name: &str| site.dir.join(name).display().to_string();
        fs::copy(file("user.pub"), file("authorized"))?;
        let public = fs::read_to_string(file("host.pub"))?;
        fs::write(
            file("known"),
            format!("[{}]:{} {public}", far.ip(), far.port()),
        )?;
        // Debian's sshd wants this folder for its unprivileged half; its service makes it otherwise.
        fs::create_dir_all("/run/sshd")?;
        let config = format!(
            "ListenAddress {far}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nUsePAM no\nStrictModes no\n\
             PermitRootLogin yes\nPasswordAuthentication no\n",
            file("host"),
            file("authorized")
        );
        let mut server = Command::new("/usr/sbin/sshd");
        server.args(["-D", "-e", "-f", &write(site, "sshd_config", &config)?]);
        let mut client = Command::new("ssh");
        client.args([
            "-F",
            "none",
            "-N",
            "-i",
            &file("user"),
            "-p",
            &far.port().to_string(),
        ]);
        let known = format!("UserKnownHostsFile={}", file("known"));
        for option in [known.as_str(), "IdentitiesOnly=yes", "BatchMode=yes"] {
            client.args(["-o", option]);
        }
        let forward = format!("{}:{}", near(), site.server);
        client.args(["-L", &forward, &format!("root@{}", far.ip())]);
        pair(site, ["sshd", "ssh"], [server, client])
    }
}
