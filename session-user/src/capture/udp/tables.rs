//! The UDP sockets of one network namespace, as the kernel lists them: proc(5), /proc/net/udp and udp6.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::FileExt as _;

use session_ebpf_common::id_of;

use super::super::gate::words;

/// Bytes that are read at once: what the kernel fills in one call.
const CHUNK: usize = 1 << 16;

/// The lists of a network namespace. They are opened inside, and tell of it wherever they are read.
#[derive(Debug)]
pub struct Tables {
    v4: io::Result<File>,
    v6: io::Result<File>,
}

impl Tables {
    /// Opens those of the network namespace that this thread is in. What cannot be opened fails when it is read.
    pub fn open() -> Self {
        let open = |name| File::open(format!("/proc/thread-self/net/{name}"));
        Self {
            v4: open("udp"),
            v6: open("udp6"),
        }
    }

    /// Both ends of all IPv6 sockets, v4-mapped ones included.
    pub fn ends6(&self) -> io::Result<Vec<(SocketAddr, SocketAddr)>> {
        Ok(text(&self.v6)?.lines().filter_map(ends).collect())
    }

    /// Ids of the destinations that sockets are connected to. A connected socket may be silent for as long as it likes.
    pub fn connected(&self) -> io::Result<HashSet<u32>> {
        let mut found = HashSet::new();
        for table in [&self.v4, &self.v6] {
            let text = text(table)?;
            let remotes = text.lines().filter_map(ends);
            found.extend(remotes.filter_map(|(_, remote)| id_of(&words(remote.ip()))));
        }
        Ok(found)
    }
}

/// The whole of a list as it is now; nothing on a kernel without IPv6.
fn text(file: &io::Result<File>) -> io::Result<String> {
    let file = match file {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(io::Error::new(error.kind(), error.to_string())),
    };
    let mut text = Vec::new();
    let mut chunk = vec![0; CHUNK];
    loop {
        // By offsets, and not where the last reader has stopped: there may be two.
        match file.read_at(&mut chunk, text.len() as u64) {
            Ok(0) => return String::from_utf8(text).map_err(io::Error::other),
            Ok(count) => text.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The local and the remote end in a line of /proc/net/udp or udp6 (`udp4_format_sock` in the kernel's net/ipv4/udp.c).
fn ends(line: &str) -> Option<(SocketAddr, SocketAddr)> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    Some((end(fields.next()?)?, end(fields.next()?)?))
}

/// Words as this host stores them, in hexadecimal, and a port.
fn end(field: &str) -> Option<SocketAddr> {
    let (addr, port) = field.split_once(':')?;
    let word = |at: usize| u32::from_str_radix(addr.get(at * 8..at * 8 + 8)?, 16).ok();
    let ip: IpAddr = match addr.len() {
        8 => IpAddr::V4(word(0)?.to_ne_bytes().into()),
        32 => {
            let mut bytes = [0; 16];
            for (at, chunk) in bytes.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(at)?.to_ne_bytes());
            }
            IpAddr::V6(bytes.into())
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connected_socket_is_seen() {
        let tables = Tables::open();
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect("127.128.18.52:9").unwrap();
        assert!(tables.connected().unwrap().contains(&0x1234));
        drop(socket);
        assert!(!tables.connected().unwrap().contains(&0x1234));
    }

    #[test]
    fn lists_of_many_sockets_are_read_whole() {
        let tables = Tables::open();
        // More than the kernel tells at once.
        let sockets: Vec<_> = (0..100)
            .map(|number| {
                let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
                let to = std::net::Ipv4Addr::from(0x7f90_0000 + number);
                socket.connect((to, 9)).unwrap();
                socket
            })
            .collect();
        let connected = tables.connected().unwrap();
        let missing = (0..100).find(|number| !connected.contains(&(0x0010_0000 + number)));
        assert_eq!(missing, None);
        drop(sockets);
    }

    #[test]
    fn lines_that_are_none_are_passed_over() {
        let head = "   sl  local_address rem_address   st tx_queue";
        assert_eq!(ends(head), None);
        assert_eq!(ends(""), None);
        let v6 =
            "  1: 00000000000000000000000001000000:C350 B80D0120000000000000000001000000:0035 07";
        if cfg!(target_endian = "little") {
            let (local, remote) = ends(v6).unwrap();
            assert_eq!(local, "[::1]:50000".parse().unwrap());
            assert_eq!(remote, "[2001:db8::1]:53".parse().unwrap());
        }
    }
}
