//! `holdfast run`: the agent moves this process into a captured scope of its own, and this process
//! becomes the command. So user, terminal, signals and exit status are the command's own.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use super::exit::Failure;
use crate::control::{Client, Request};
use crate::stdio::say;

pub fn run(control: &Path, command: &[String]) -> Result<ExitCode, Failure> {
    Client::connect(control)?.call(&Request::Run)?;
    let Some((program, arguments)) = command.split_first() else {
        return Ok(ExitCode::from(2));
    };
    // Only returns if it fails.
    let error = Command::new(program).args(arguments).exec();
    say(format_args!("holdfast: {program}: {error}"));
    // As a shell has it (POSIX.1-2024, Shell Command Language, 2.8.2).
    Ok(ExitCode::from(
        if error.kind() == std::io::ErrorKind::NotFound {
            127
        } else {
            126
        },
    ))
}
