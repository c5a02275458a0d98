//! `holdfast run`: the agent moves this process into a captured scope of its own, and this process
//! becomes the command. So user, terminal, signals and exit status are the command's own.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use super::exit::Failure;
use crate::capture::{self, Destination};
use crate::control::{Client, Request};
use crate::stdio::say;

/// What is left captured of the command.
#[derive(Debug, Default, clap::Args)]
pub struct Narrowed {
    /// Of what the rules capture, capture this alone; may be given several times.
    #[arg(long, value_name = "NET[:PORTS]")]
    only: Vec<Destination>,
    /// Let this go direct, also where --only names it; may be given several times.
    #[arg(long, value_name = "NET[:PORTS]")]
    except: Vec<Destination>,
}

pub fn run(control: &Path, narrowed: &Narrowed, command: &[String]) -> Result<ExitCode, Failure> {
    let texts = |list: &[Destination]| list.iter().map(ToString::to_string).collect();
    Client::connect(control)?.call(&Request::Run {
        only: texts(&narrowed.only),
        except: texts(&narrowed.except),
        // Where there is no proc the agent looks itself.
        netns: capture::own_netns().ok(),
    })?;
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
