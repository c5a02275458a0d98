//! Reading and writing as both ends do, with the end in words.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::seen::{errno_name, finished, poll_names};
use super::sys;

/// Bytes of one read or write.
const CHUNK: usize = 64 * 1024;

/// Reads at most `limit` bytes and says what came and how it ended, if it ended before.
pub fn take(fd: impl AsFd, limit: usize) -> String {
    let (mut hash, mut length) = (Sha256::new(), 0);
    let mut chunk = vec![0; CHUNK.min(limit)];
    while length < limit {
        let room = chunk.len().min(limit - length);
        match sys::recv(&fd, &mut chunk[..room], 0) {
            Ok(0) => return format!("{}, then the end", finished(length, hash)),
            Ok(n) => {
                hash.update(&chunk[..n]);
                length += n;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                return format!("{}, then {}", finished(length, hash), errno_name(&error));
            }
        }
    }
    finished(length, hash)
}

/// Reads to the end.
pub fn drain(fd: impl AsFd) -> String {
    take(fd, usize::MAX)
}

/// Waits for urgent data, then reads to the end: how much came before the mark, and what behind it.
pub fn around_mark(fd: impl AsFd) -> io::Result<String> {
    let events = sys::poll(&fd, sys::PollFlags::POLLPRI, Duration::from_secs(4))?;
    let told = poll_names(events);
    let mut before = 0;
    let mut chunk = [0; 4096];
    while sys::ioctl_int(&fd, sys::SIOCATMARK)? == 0 {
        match sys::recv(&fd, &mut chunk, 0)? {
            0 => return Ok(format!("{told}, {before} bytes and no mark")),
            n => before += n,
        }
    }
    Ok(format!("{told}, {before} bytes, the mark, {}", drain(&fd)))
}

/// How a connection ended, whatever came before.
pub fn end(fd: impl AsFd) -> String {
    let said = drain(fd);
    said.rsplit(", then ").next().unwrap_or("").to_owned()
}

/// Writes all of it.
pub fn put(fd: impl AsFd, bytes: &[u8]) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let n = sys::send(&fd, &rest[..rest.len().min(CHUNK * 16)], libc::MSG_NOSIGNAL)?;
        rest = &rest[n..];
    }
    Ok(())
}
