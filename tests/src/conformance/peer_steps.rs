//! What the peer does with one connection.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, poll};
use socket2::SockRef;

use super::peer::{Shared, wait_until};
use super::seen::{class, errno_name, pattern, shown};
use super::stream::{around_mark, drain, put, take};
use super::sys;
use super::wire::Step;

/// How long the peer waits for one byte: longer than any case lasts.
const READ_LIMIT: Duration = Duration::from_secs(60);

/// One accepted connection.
pub(super) struct PeerConnection<'a> {
    socket: Option<TcpStream>,
    number: usize,
    /// How often it has waited for go.
    gone: usize,
    shared: &'a Shared,
}

impl<'a> PeerConnection<'a> {
    /// A connection that is the `number`th of its script.
    pub fn new(socket: TcpStream, number: usize, gone: usize, shared: &'a Shared) -> Self {
        // A client that hangs must not keep a thread for ever.
        let _ = socket.set_read_timeout(Some(READ_LIMIT));
        let _ = socket.set_write_timeout(Some(READ_LIMIT));
        Self {
            socket: Some(socket),
            number,
            gone,
            shared,
        }
    }

    /// Takes the steps, until one ends the connection or the case ends.
    pub fn run(mut self, steps: &[Step]) {
        for step in steps {
            if matches!(step, Step::Go) {
                self.gone += 1;
                if !self.shared.await_go(self.gone) {
                    return;
                }
                continue;
            }
            let Some(socket) = &self.socket else { return };
            if let Some(line) = act(socket, step) {
                self.shared.say(self.number, line);
            }
            if matches!(step, Step::Reset | Step::Close) {
                self.socket = None;
            }
        }
    }
}

fn act(socket: &TcpStream, step: &Step) -> Option<String> {
    match step {
        Step::Read(bytes) => Some(format!("read {}", take(socket, *bytes))),
        Step::ReadToEnd => Some(format!("read {}", drain(socket))),
        Step::ReadSlowly(piece, pause) => Some(read_slowly(socket, *piece, *pause)),
        Step::Send(bytes) => failed("send", put(socket, &pattern(0, *bytes))),
        Step::Say(bytes) => failed("send", put(socket, bytes)),
        Step::SayUrgent(bytes) => {
            let sent = sys::send(socket, bytes, libc::MSG_OOB | libc::MSG_NOSIGNAL);
            failed("send urgent", sent.map(|_| ()))
        }
        Step::ReadUrgent => Some(read_urgent(socket)),
        Step::ReadAroundMark => Some(around_mark(socket).unwrap_or_else(|e| errno_name(&e))),
        Step::Echo => failed("echo", echo(socket)),
        Step::SendUntilError => Some(send_until_error(socket)),
        Step::AwaitUnread(bytes) => {
            let there = wait_until(|| unread(socket) >= *bytes);
            (!there).then(|| format!("only {} bytes came", unread(socket)))
        }
        Step::ShutdownWrite => failed("shutdown", socket.shutdown(std::net::Shutdown::Write)),
        Step::Reset => failed(
            "linger",
            SockRef::from(socket).set_linger(Some(Duration::ZERO)),
        ),
        Step::Source => Some(format!("comes from {}", source(socket))),
        Step::Close | Step::Go => None,
    }
}

/// A line only for what did not work.
fn failed(what: &str, result: std::io::Result<()>) -> Option<String> {
    result.err().map(|e| format!("{what}: {}", errno_name(&e)))
}

/// FIONREAD.
pub(super) fn unread(socket: impl AsFd) -> usize {
    sys::ioctl_int(socket, libc::FIONREAD).map_or(0, |n| n as usize)
}

fn read_slowly(socket: &TcpStream, piece: usize, pause: u64) -> String {
    use sha2::{Digest, Sha256};
    let (mut hash, mut length) = (Sha256::new(), 0);
    let mut chunk = vec![0; piece];
    loop {
        match sys::recv(socket, &mut chunk, 0) {
            Ok(0) => {
                let all = super::seen::finished(length, hash);
                return format!("read {all}, then the end");
            }
            Ok(n) => {
                hash.update(&chunk[..n]);
                length += n;
            }
            Err(error) => return format!("read {length} bytes, then {}", errno_name(&error)),
        }
        // To be slow is what this step is for.
        std::thread::sleep(Duration::from_millis(pause));
    }
}

fn read_urgent(socket: &TcpStream) -> String {
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLPRI)];
    // A failure shows as nothing that is urgent.
    let _ = poll(&mut fds, 2000u16);
    let mut byte = [0; 1];
    let result = sys::recv(socket, &mut byte, libc::MSG_OOB);
    match result {
        Ok(1) => format!("urgent {:?}", char::from(byte[0])),
        other => format!("urgent {}", shown(&other)),
    }
}

fn echo(socket: &TcpStream) -> std::io::Result<()> {
    let mut chunk = vec![0; 64 * 1024];
    loop {
        let n = sys::recv(socket, &mut chunk, 0)?;
        if n == 0 {
            return Ok(());
        }
        put(socket, &chunk[..n])?;
    }
}

fn send_until_error(socket: &TcpStream) -> String {
    loop {
        if let Err(error) = sys::send(socket, &[7; 100], libc::MSG_NOSIGNAL) {
            return format!("send {}", errno_name(&error));
        }
        // Gives the answer to what was sent time to come.
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn source(socket: &TcpStream) -> String {
    let addr = socket.peer_addr().map(|a: SocketAddr| class(a.ip()));
    addr.unwrap_or_else(|e| errno_name(&e))
}
