//! Real servers on the lab's target addresses, each in a folder of its own.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, ensure};
use session_lab::Lab;

use crate::await_listener;

/// A program in the server's namespace, ended with this value.
pub(crate) struct Daemon(Child);

impl Daemon {
    pub(crate) fn start(lab: &Lab, mut command: Command, log: &Path) -> anyhow::Result<Self> {
        let log = fs::File::create(log)?;
        // In a group of its own, so that nothing that it has started outlives it.
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let name = command.get_program().to_string_lossy().into_owned();
        Ok(Self(
            lab.server()
                .spawn(command)
                .with_context(|| format!("`{name}` cannot be started"))?,
        ))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        use nix::sys::signal::{Signal, kill, killpg};
        use nix::unistd::Pid;
        let Ok(pid) = i32::try_from(self.0.id()).map(Pid::from_raw) else {
            return;
        };
        // SIGTERM first: a server takes its children with it.
        let _ = kill(pid, Signal::SIGTERM);
        for _ in 0..100 {
            if matches!(self.0.try_wait(), Ok(Some(_))) {
                break;
            }
            // A child can be waited for, but not for a limited time.
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        // Most often nobody is left.
        let _ = killpg(pid, Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

pub(crate) fn folder(dir: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let path = dir.join(name);
    fs::create_dir_all(&path)?;
    // Servers that drop their privileges must get in.
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// nginx that serves a folder on both families.
pub struct Nginx {
    _daemon: Daemon,
    /// What it serves.
    pub root: PathBuf,
}

impl Nginx {
    /// Its port.
    pub const PORT: u16 = 8080;

    /// Starts it.
    pub fn start(lab: &Lab, dir: &Path) -> anyhow::Result<Self> {
        let dir = folder(dir, "nginx")?;
        let root = folder(&dir, "root")?;
        let (d, v4, v6, port) = (
            dir.display(),
            Lab::target(false),
            Lab::target(true),
            Self::PORT,
        );
        let temp: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .iter()
            .map(|t| format!("{t}_temp_path {d}/{t};\n"))
            .collect();
        let conf = format!(
            "daemon off;\nuser root;\nworker_processes 1;\npid {d}/pid;\nerror_log {d}/error.log;\nevents {{ worker_connections 2048; }}\n\
             http {{ access_log off; sendfile on; send_timeout 10m; {temp} server {{ listen {v4}:{port}; listen [{v6}]:{port}; root {}; }} }}\n",
            root.display()
        );
        let file = dir.join("nginx.conf");
        fs::write(&file, conf)?;
        let mut command = Command::new("nginx");
        command
            .arg("-c")
            .arg(&file)
            .arg("-e")
            .arg(dir.join("error.log"));
        let daemon = Daemon::start(lab, command, &dir.join("log"))?;
        await_listener(lab.server(), SocketAddr::new(v4, port))?;
        Ok(Self {
            _daemon: daemon,
            root,
        })
    }
}

/// OpenSSH's server with a key for root.
pub struct Sshd {
    _daemon: Daemon,
    key: PathBuf,
    known: PathBuf,
}

impl Sshd {
    /// Its port.
    pub const PORT: u16 = 2222;

    /// Starts it.
    pub fn start(lab: &Lab, dir: &Path) -> anyhow::Result<Self> {
        let dir = folder(dir, "ssh")?;
        let (host_key, key, known) = (dir.join("host"), dir.join("client"), dir.join("known"));
        for path in [&host_key, &key] {
            let status = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(path)
                .status()?;
            ensure!(status.success(), "ssh-keygen failed");
        }
        let public = fs::read_to_string(host_key.with_extension("pub"))?;
        let hosts: String = [Lab::target(false), Lab::target(true)]
            .iter()
            .map(|ip| format!("[{ip}]:{} {public}", Self::PORT))
            .collect();
        fs::write(&known, hosts)?;
        fs::copy(key.with_extension("pub"), dir.join("authorized"))?;
        // Debian's sshd wants this folder for its unprivileged half; its service makes it otherwise.
        fs::create_dir_all("/run/sshd")?;
        let d = dir.display();
        let conf = format!(
            "ListenAddress {v4}\nListenAddress {v6}\nPort {port}\nHostKey {d}/host\nAuthorizedKeysFile {d}/authorized\n\
             PidFile {d}/pid\nUsePAM no\nStrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\n\
             Subsystem sftp internal-sftp\nMaxStartups 100\n",
            v4 = Lab::target(false),
            v6 = Lab::target(true),
            port = Self::PORT
        );
        let file = dir.join("sshd_config");
        fs::write(&file, conf)?;
        let mut command = Command::new("/usr/sbin/sshd");
        command.args(["-D", "-e", "-f"]).arg(&file);
        let daemon = Daemon::start(lab, command, &dir.join("log"))?;
        await_listener(
            lab.server(),
            SocketAddr::new(Lab::target(false), Self::PORT),
        )?;
        Ok(Self {
            _daemon: daemon,
            key,
            known,
        })
    }

    /// Options for `ssh` and `scp`.
    pub fn options(&self) -> Vec<String> {
        let mut out = vec![
            "-F".to_owned(),
            "none".to_owned(),
            "-i".to_owned(),
            self.key.display().to_string(),
        ];
        for option in [
            format!("UserKnownHostsFile={}", self.known.display()),
            "IdentitiesOnly=yes".to_owned(),
            "BatchMode=yes".to_owned(),
            format!("Port={}", Self::PORT),
        ] {
            out.extend(["-o".to_owned(), option]);
        }
        out
    }
}

/// PostgreSQL with an empty database that trusts its lab.
pub struct Postgres {
    _daemon: Daemon,
}

impl Postgres {
    /// Its port.
    pub const PORT: u16 = 5433;

    /// Makes a cluster and starts it, as the user `postgres`: it refuses to run as root.
    pub fn start(lab: &Lab, dir: &Path) -> anyhow::Result<Self> {
        let dir = folder(dir, "postgres")?;
        let bin = fs::read_dir("/usr/lib/postgresql")
            .context("PostgreSQL is not installed: run `cargo xtask setup`")?
            .filter_map(Result::ok)
            .map(|e| e.path().join("bin"))
            .max()
            .context("PostgreSQL has no version installed")?;
        let user =
            nix::unistd::User::from_name("postgres")?.context("there is no user `postgres`")?;
        std::os::unix::fs::chown(&dir, Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
        let data = dir.join("data");
        let as_postgres = |program: PathBuf| {
            let mut command = Command::new("setpriv");
            command
                .args([
                    "--reuid=postgres",
                    "--regid=postgres",
                    "--init-groups",
                    "--",
                ])
                .arg(program);
            command
                .current_dir("/")
                .env("HOME", "/nonexistent")
                .env("LC_ALL", "C.UTF-8");
            command
        };
        let mut initdb = as_postgres(bin.join("initdb"));
        initdb
            .args(["-A", "trust", "-N", "-D"])
            .arg(&data)
            .stdout(Stdio::null());
        ensure!(initdb.status()?.success(), "initdb failed");
        fs::write(
            data.join("pg_hba.conf"),
            "host all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n",
        )?;
        let mut command = as_postgres(bin.join("postgres"));
        let listen = format!(
            "listen_addresses={},{}",
            Lab::target(false),
            Lab::target(true)
        );
        command
            .arg("-D")
            .arg(&data)
            .args(["-c", &listen, "-c", &format!("port={}", Self::PORT)]);
        command.args(["-c", "unix_socket_directories=", "-c", "fsync=off"]);
        let daemon = Daemon::start(lab, command, &dir.join("log"))?;
        await_listener(
            lab.server(),
            SocketAddr::new(Lab::target(false), Self::PORT),
        )?;
        Ok(Self { _daemon: daemon })
    }
}

/// Redis without persistence.
pub struct Redis {
    _daemon: Daemon,
}

impl Redis {
    /// Its port.
    pub const PORT: u16 = 6380;

    /// Starts it.
    pub fn start(lab: &Lab, dir: &Path) -> anyhow::Result<Self> {
        let dir = folder(dir, "redis")?;
        let mut command = Command::new("redis-server");
        command.args([
            "--port",
            &Self::PORT.to_string(),
            "--save",
            "",
            "--appendonly",
            "no",
            "--protected-mode",
            "no",
        ]);
        command
            .args([
                "--bind",
                &Lab::target(false).to_string(),
                &Lab::target(true).to_string(),
            ])
            .arg("--dir")
            .arg(&dir);
        let daemon = Daemon::start(lab, command, &dir.join("log"))?;
        await_listener(
            lab.server(),
            SocketAddr::new(Lab::target(false), Self::PORT),
        )?;
        Ok(Self { _daemon: daemon })
    }
}
