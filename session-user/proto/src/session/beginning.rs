//! How one direction of a stream begins, and whether that is HTTP or TLS.
//!
//! In a request or an answer of HTTP, what an attacker chose may stand beside a secret; what TLS carries does not
//! shrink. An application may write its first line in pieces, so they are put together.

/// Longest method of the IANA registry (`BASELINE-CONTROL`, `UPDATEREDIRECTREF`), and some more.
const METHOD_BYTES_MAX: usize = 20;
/// So many bytes show a request: a method, a space, and the beginning of its target.
const SHOWN_BYTES: usize = METHOD_BYTES_MAX + 8;

/// The first bytes of one direction, as far as they have come in order.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Beginning {
    bytes: [u8; SHOWN_BYTES],
    len: usize,
}

impl Beginning {
    /// `data` stands at `offset`. What comes beyond a gap says nothing.
    pub fn add(&mut self, offset: u64, data: &[u8]) {
        if offset != self.len as u64 {
            return;
        }
        let room = &mut self.bytes[self.len..];
        let taken = room.len().min(data.len());
        room[..taken].copy_from_slice(&data[..taken]);
        self.len += taken;
    }

    /// Whether this is how a client or a server of HTTP or TLS begins.
    pub fn is_web(&self) -> bool {
        let data = &self.bytes[..self.len];
        is_tls(data) || is_http(data)
    }
}

/// A record of any version of TLS (RFC 8446 section 5.1): change_cipher_spec, alert, handshake or application data.
fn is_tls(data: &[u8]) -> bool {
    matches!(data, [20..=23, 3, 0..=4, ..])
}

/// An answer; a request with a path, an address or `*` (RFC 9112 section 3.2), whatever its method; CONNECT; or
/// HTTP/2's preface, which looks like a request (RFC 9113 section 3.4).
fn is_http(data: &[u8]) -> bool {
    let Some(space) = data.iter().position(|byte| *byte == b' ') else {
        return data.starts_with(b"HTTP/");
    };
    let (method, target) = (&data[..space], &data[space + 1..]);
    if method.starts_with(b"HTTP/") || method == b"CONNECT" {
        return true;
    }
    let is_method = |byte: &u8| byte.is_ascii_uppercase() || *byte == b'-';
    let names = (1..=METHOD_BYTES_MAX).contains(&method.len()) && method.iter().all(is_method);
    let leads = |to: &[u8]| {
        target
            .get(..to.len())
            .is_some_and(|t| t.eq_ignore_ascii_case(to))
    };
    names && (leads(b"/") || leads(b"*") || leads(b"http:") || leads(b"https:"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written in pieces of this size.
    fn begins(data: &[u8], piece: usize) -> bool {
        let mut beginning = Beginning::default();
        let mut offset = 0;
        for part in data.chunks(piece) {
            beginning.add(offset, part);
            offset += part.len() as u64;
        }
        beginning.is_web()
    }

    #[test]
    fn http_and_tls_are_known_however_they_are_written() {
        for start in [
            &b"GET / HTTP/1.1\r\nHost: example.org\r\n"[..],
            b"PROPFIND /dav HTTP/1.1\r\n",
            b"VERSION-CONTROL /svn HTTP/1.1\r\n",
            b"UPDATEREDIRECTREF /a HTTP/1.1\r\n",
            b"POST http://example.org/ HTTP/1.1\r\n",
            b"OPTIONS * HTTP/1.1\r\n",
            b"CONNECT example.org:443 HTTP/1.1\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n",
            b"HTTP/1.0 404\r\n",
            &[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3],
            &[22, 3, 3, 0, 122, 2, 0, 0, 118],
            &[23, 3, 3, 0, 19],
            &[21, 3, 3, 0, 2, 2, 40],
        ] {
            for piece in [1, 2, 3, 5, 1_000] {
                assert!(begins(start, piece), "{start:?} in pieces of {piece}");
            }
        }
    }

    #[test]
    fn others_are_not_taken_for_them() {
        for start in [
            &b"SSH-2.0-OpenSSH_9.2\r\n"[..],
            b"{\"ts\":\"2026-01-01\"}",
            b"USER anonymous\r\n",
            b"* OK IMAP4rev1\r\n",
            b"A",
            b"",
            &[22, 9, 1],
            &[24, 3, 3, 0, 2],
        ] {
            assert!(!begins(start, 1_000), "{start:?}");
        }
    }

    #[test]
    fn what_comes_beyond_a_gap_says_nothing() {
        let mut beginning = Beginning::default();
        beginning.add(7, b"GET / HTTP/1.1\r\n");
        assert!(!beginning.is_web());
        beginning.add(0, b"binary GET / HTTP/1.1\r\n and so on");
        assert!(!beginning.is_web());
    }
}
