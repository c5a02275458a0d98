//! The command line.
//!
//! 1. clap turns what was typed into [`Cli`]; nothing has happened yet.
//! 2. [`main`] carries it out: commands that look at or steer the agent go over its control
//!    socket, the rest is done here.
//! 3. An error says what happened, where, and what to do next; its kind is the exit code.

mod doctor;
mod exit;
mod explain;
mod handovers;
mod local;
mod remote;
mod run;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub use exit::{Exit, Failure};

use crate::config::{DEFAULT_CONTROL, DEFAULT_PATH};

const EXIT_CODES: &str = "Exit codes: 0 done; 1 failed; 2 wrong usage; 3 the agent is not running; 4 not permitted; \
5 configuration error; 6 a check of `doctor` failed. `run` returns its command's own status (126, 127 if it could \
not be started).";

/// Keeps the sessions of unmodified applications alive while the network under them changes.
#[derive(Debug, Parser)]
#[command(name = "holdfast", version, about, after_help = EXIT_CODES, max_term_width = 100)]
pub struct Cli {
    /// The agent's control socket.
    #[arg(long, global = true, env = "HOLDFAST_CONTROL", default_value = DEFAULT_CONTROL)]
    control: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent in the foreground.
    Agent {
        /// The configuration.
        #[arg(long, default_value = DEFAULT_PATH)]
        config: PathBuf,
    },
    /// Run a command whose connections are captured.
    Run {
        #[command(flatten)]
        narrowed: run::Narrowed,
        /// The command and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Capture the connections that a cgroup's processes make from now on.
    Attach {
        /// Absolute, or relative to the root of cgroup2, such as system.slice/app.service.
        cgroup: PathBuf,
    },
    /// End the capture of a cgroup; what is captured lives on.
    Detach {
        /// As for attach.
        cgroup: PathBuf,
    },
    /// Tell what becomes of a connection, and which rule decides why.
    Explain {
        #[command(flatten)]
        asked: explain::Question,
        #[command(flatten)]
        shown: Shown,
    },
    /// Show what the agent is doing.
    Status(Shown),
    /// Show the links, and why each can be used or not.
    Links(Shown),
    /// Show the sessions, their transports, streams and handovers.
    Sessions(Shown),
    /// Show the units that this one knows, their certificates' names, and by which addresses targets know
    /// them.
    Peers(Shown),
    /// Show the latest handovers: what led to each, how long it took, and what the streams saw of it.
    Handovers {
        /// Those with this peer alone.
        #[arg(long)]
        peer: Option<String>,
        /// How many.
        #[arg(short = 'n', default_value_t = 20)]
        count: usize,
        #[command(flatten)]
        shown: Shown,
    },
    /// Move the sessions to a link, or with `auto` give the choice back to the policy.
    Handover {
        /// The link, or `auto`.
        link: String,
    },
    /// Tell the agent that the host has slept. It notices by itself; this is for sleep hooks of hosts
    /// whose kernel does not say so, as in a container that was frozen.
    Woke,
    /// Have the agent read certificates and the CRL anew (as SIGHUP does).
    Reload,
    /// Make a private CA, issue and revoke identities.
    #[command(subcommand)]
    Pki(local::Pki),
    /// Check or print a configuration.
    #[command(subcommand)]
    Config(local::ConfigCommand),
    /// Tell what this kernel, these privileges and this configuration allow, and what to do.
    Doctor {
        /// The configuration to look at.
        #[arg(long, default_value = DEFAULT_PATH)]
        config: PathBuf,
        #[command(flatten)]
        shown: Shown,
    },
    /// Measure.
    #[command(subcommand)]
    Bench(crate::bench::Bench),
}

/// How an answer is shown.
#[derive(Debug, Clone, Copy, clap::Args)]
struct Shown {
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// Parses the arguments and carries them out.
pub fn main() -> ExitCode {
    match execute(Cli::parse()) {
        Ok(_) if crate::stdio::has_lost() => ExitCode::FAILURE,
        Ok(code) => code,
        Err(failure) => failure.report(),
    }
}

fn execute(cli: Cli) -> Result<ExitCode, Failure> {
    let control = &cli.control;
    match cli.command {
        Command::Agent { config } => local::agent(&config),
        Command::Run { narrowed, command } => run::run(control, &narrowed, &command),
        Command::Attach { cgroup } => remote::attach(control, &cgroup),
        Command::Detach { cgroup } => remote::detach(control, &cgroup),
        Command::Explain { asked, shown } => explain::explain(control, asked, shown.json),
        Command::Status(shown) => remote::status(control, shown.json),
        Command::Links(shown) => remote::links(control, shown.json),
        Command::Sessions(shown) => remote::sessions(control, shown.json),
        Command::Peers(shown) => remote::peers(control, shown.json),
        Command::Handovers { peer, count, shown } => {
            handovers::handovers(control, peer, count, shown.json)
        }
        Command::Handover { link } => remote::handover(control, &link),
        Command::Woke => remote::woke(control),
        Command::Reload => remote::reload(control),
        Command::Pki(command) => local::pki(command),
        Command::Config(command) => local::config(command),
        Command::Doctor { config, shown } => doctor::doctor(&config, control, shown.json),
        Command::Bench(bench) => Ok(crate::bench::run(&bench, control)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_leaves_the_commands_own_options_alone() {
        let cli =
            Cli::try_parse_from(["holdfast", "run", "--", "curl", "--json", "{}", "-v"]).unwrap();
        let Command::Run { command, .. } = cli.command else {
            panic!("not run")
        };
        assert_eq!(command, ["curl", "--json", "{}", "-v"]);
    }

    #[test]
    fn runs_own_options_come_first() {
        let words = "holdfast run --only 10.0.0.0/8 --only [::1]:80 ssh --except x";
        let cli = Cli::try_parse_from(words.split(' ')).unwrap();
        let Command::Run { command, .. } = cli.command else {
            panic!("not run")
        };
        assert_eq!(command, ["ssh", "--except", "x"]);
        let wrong = Cli::try_parse_from(["holdfast", "run", "--only", "x", "--", "true"]);
        let said = wrong.unwrap_err().to_string();
        assert!(said.contains("expected NET[:PORTS]"), "{said}");
    }
}
