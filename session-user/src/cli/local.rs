//! Commands that need no agent, and the agent itself.

use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use clap::Subcommand;
use tracing_subscriber::EnvFilter;

use super::exit::{Exit, Failure};
use crate::agent::Workers;
use crate::config::{Config, ConfigError, duration};
use crate::handshake::Identity;
use crate::pki;
use crate::stdio::print;

/// Where the CA is kept unless said otherwise.
const PKI_DIR: &str = "/etc/holdfast/pki";

/// A private CA.
#[derive(Debug, Subcommand)]
pub enum Pki {
    /// Make a CA for a trust domain.
    Init {
        /// The trust domain, such as fleet.example.
        domain: String,
        /// The CA's folder.
        #[arg(long, default_value = PKI_DIR)]
        dir: PathBuf,
        /// How long the CA is valid.
        #[arg(long, default_value = "3650d", value_parser = duration)]
        validity: Duration,
        /// Replace a CA that exists: every certificate of it becomes worthless.
        #[arg(long)]
        force: bool,
    },
    /// Issue a key and a certificate to a unit.
    Issue {
        /// The unit's name, such as lorry-17.
        name: String,
        /// The CA's folder.
        #[arg(long, default_value = PKI_DIR)]
        dir: PathBuf,
        /// How long the certificate is valid.
        #[arg(long, default_value = "365d", value_parser = duration)]
        validity: Duration,
        /// Where NAME.crt and NAME.key go; the CA's folder if not given.
        #[arg(long)]
        out: Option<PathBuf>,
        /// Replace files that exist.
        #[arg(long)]
        force: bool,
    },
    /// Revoke a unit's certificates; copy crl.pem to the units and reload them.
    Revoke {
        /// The unit's name, a serial number, or a certificate file.
        what: String,
        /// The CA's folder.
        #[arg(long, default_value = PKI_DIR)]
        dir: PathBuf,
    },
}

/// What can be done with a configuration.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check a file: its syntax, its values, and the files that it names.
    Check {
        /// The file.
        file: PathBuf,
    },
    /// Print a configuration with every key and its default.
    Example,
}

impl From<pki::PkiError> for Failure {
    fn from(error: pki::PkiError) -> Self {
        Self::new(Exit::Failed, error.to_string(), "")
    }
}

pub fn pki(command: Pki) -> Result<ExitCode, Failure> {
    let now = SystemTime::now();
    match command {
        Pki::Init {
            domain,
            dir,
            validity,
            force,
        } => {
            pki::init(&dir, &domain, validity, now, force)?;
            print(&format!(
                "made a CA for {domain} in {}\nkeep ca.key where nobody else reads it\n",
                dir.display()
            ));
        }
        Pki::Issue {
            name,
            dir,
            validity,
            out,
            force,
        } => {
            let issued = pki::issue(
                &dir,
                &name,
                validity,
                out.as_deref().unwrap_or(&dir),
                now,
                force,
            )?;
            let (certificate, key) = (issued.certificate.display(), issued.key.display());
            print(&format!(
                "{}  serial {}\n{certificate}\n{key}\n",
                issued.uri, issued.serial
            ));
        }
        Pki::Revoke { what, dir } => {
            let newly = pki::revoke(&dir, &what, now)?;
            if newly.is_empty() {
                print("it was revoked already; crl.pem is made anew\n");
            }
            for serial in newly {
                print(&format!("revoked {serial}\n"));
            }
            print("copy crl.pem to every unit, then `holdfast reload` there\n");
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub fn config(command: ConfigCommand) -> Result<ExitCode, Failure> {
    match command {
        ConfigCommand::Example => print(Config::EXAMPLE),
        ConfigCommand::Check { file } => {
            let config = Config::load(&file)?;
            let identity = Identity::load(&crate::agent::identity_paths(&config)).map_err(|e| {
                ConfigError {
                    file: file.display().to_string(),
                    line: 0,
                    key: "identity".to_owned(),
                    message: e.to_string(),
                }
            })?;
            print(&format!(
                "{}: good; this unit is {}\n",
                file.display(),
                identity.name().uri()
            ));
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub fn agent(path: &Path) -> Result<ExitCode, Failure> {
    let config = Config::load(path)?;
    let filter = EnvFilter::try_new(&config.agent.log).map_err(|e| ConfigError {
        file: path.display().to_string(),
        line: 0,
        key: "agent.log".to_owned(),
        message: format!(
            "{e}: expected a level or a filter, such as \"info\" or \"session_user=debug\""
        ),
    })?;
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(ansi)
        .init();
    // Sessions have a thread for each processor. What attaches, listens and answers commands has threads of its own, so that
    // it holds no session up, nor one of these another.
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
    let workers = Workers::start(processors, || {}).context("sessions have no threads")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)?;
    Ok(runtime.block_on(crate::agent::run(path, config, workers))?)
}
