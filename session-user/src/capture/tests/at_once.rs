//! An application that speaks as soon as it may, while the kernel still finishes the handshake on the agent's processor.

use std::{
    io::{self, BufRead as _, BufReader},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use socket2::{Domain, Socket, Type};

use super::elsewhere::Agent;
use super::harness::{App, everything, in_netns};

/// Of so many several were reset, while what an application says did not wait for the agent's end.
const CONNECTIONS: usize = 10_000;
/// On a busy machine it is fewer.
const TIME: Duration = Duration::from_secs(20);

#[test]
fn an_application_that_speaks_at_once_is_not_reset() {
    in_netns(|| async {
        let (agents, applications) = two_processors().expect("the processors of this thread");
        pin(agents).expect("it is one of them");
        let (_agent, scope) = Agent::start(&[everything()]);
        let app = App::start(&scope, move || {
            pin(applications)?;
            let end = Instant::now() + TIME;
            for number in (0..CONNECTIONS).take_while(|_| Instant::now() < end) {
                speak_at_once()
                    .map_err(|error| io::Error::other(format!("connection {number}: {error}")))?;
            }
            Ok("all were answered".to_owned())
        });
        assert_eq!(app.result().await.as_deref(), Ok("all were answered"));
    });
}

/// Connects, tries to send until it may, and reads the greeting.
fn speak_at_once() -> io::Result<()> {
    let to: SocketAddr = "192.0.2.7:7".parse().map_err(io::Error::other)?;
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
    if let Err(error) = socket.connect(&to.into())
        && error.raw_os_error() != Some(libc::EINPROGRESS)
    {
        return Err(error);
    }
    // It ends with the kernel's time for connect(), at the latest.
    while let Err(error) = socket.send(b"a question") {
        let waits = [io::ErrorKind::WouldBlock, io::ErrorKind::NotConnected];
        if !waits.contains(&error.kind()) {
            return Err(error);
        }
    }
    socket.set_nonblocking(false)?;
    let mut line = String::new();
    BufReader::new(TcpStream::from(socket)).read_line(&mut line)?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

/// Two that this thread may run on; the same twice where there is one, and nothing can race.
fn two_processors() -> nix::Result<(usize, usize)> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let mut them = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu) == Ok(true));
    let one = them.next().unwrap_or(0);
    Ok((one, them.next().unwrap_or(one)))
}

fn pin(processor: usize) -> nix::Result<()> {
    let mut only = CpuSet::new();
    only.set(processor)?;
    sched_setaffinity(Pid::from_raw(0), &only)
}
