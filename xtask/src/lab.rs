//! The two-link lab, for people.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, bail};
use session_lab::{Lab, LabConfig};

/// Arguments of `lab`.
#[derive(clap::Args)]
pub struct LabArgs {
    /// Where the command runs: client, router or server.
    #[arg(long, default_value = "client")]
    ns: String,
    /// The command; a shell if none is given.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Makes the lab, runs the command in it, and removes it. The namespaces have no names and end
/// with this process, however it ends.
pub fn run(args: &LabArgs) -> anyhow::Result<()> {
    let lab = Lab::new(&LabConfig::default())?;
    let netns = match args.ns.as_str() {
        "client" => lab.client(),
        "router" => lab.router(),
        "server" => lab.server(),
        other => bail!("there is no namespace `{other}`: expected client, router or server"),
    };
    eprintln!(
        "client: wifi0, lte0; server: {}; targets: {}, {}",
        Lab::gateway(false),
        Lab::target(false),
        Lab::target(true)
    );
    for netns in [lab.client(), lab.router(), lab.server()] {
        let fd = std::os::fd::AsRawFd::as_raw_fd(&netns.fd());
        eprintln!(
            "  to enter the {}: nsenter --net=/proc/{}/fd/{fd}",
            netns.name(),
            std::process::id()
        );
    }
    let shell = std::env::var("SHELL").unwrap_or_else(|_| "/bin/sh".to_owned());
    let words = if args.command.is_empty() {
        vec![shell]
    } else {
        args.command.clone()
    };
    let (program, arguments) = words.split_first().context("there is no command")?;
    let mut command = Command::new(program);
    command.args(arguments).process_group(0);
    let mut child = netns
        .spawn(command)
        .with_context(|| format!("`{program}` cannot be started"))?;
    foreground(child.id());
    let status = child.wait()?;
    std::process::exit(status.code().unwrap_or(1))
}

/// Gives the terminal, if there is one, to the command: Ctrl-C is for it.
fn foreground(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
    // Without a terminal there is nothing to give.
    let _ = nix::unistd::tcsetpgrp(std::io::stdin(), pid);
}
