//! HTTP CONNECT (RFC 9110, section 9.3.6): the client says where it wants to go, and hears what became of it.

use bytes::BytesMut;
use session_proto::wire::Target;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::OwnedSemaphorePermit;

use super::{Door, NEGOTIATION_TIMEOUT, Unmet, seat};
use crate::requests::{Answer, AppStream};

/// Longest head of a request, in bytes, and most header fields in it.
const HEAD_BYTES_MAX: usize = 16 * 1024;
const FIELDS_MAX: usize = 64;

pub(super) async fn serve<S>(
    door: &Door,
    name: String,
    mut socket: S,
    permit: OwnedSemaphorePermit,
) -> Result<(), Unmet>
where
    S: AsyncRead + AsyncWrite + Unpin + Into<AppStream>,
{
    let mut input = BytesMut::new();
    let head = tokio::time::timeout(NEGOTIATION_TIMEOUT, head(&mut socket, &mut input)).await;
    let (status, why) = match head.map_err(|_| Unmet::Timeout)?? {
        Ok(target) => match door.ask(name, target, permit).await {
            Some(Answer::Connected(to)) => {
                socket.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
                // A client may send on before it has our answer.
                return seat(to, socket.into().behind(input.freeze()));
            }
            Some(Answer::Refused(errno)) => (
                status(errno),
                std::io::Error::from_raw_os_error(errno).to_string(),
            ),
            None => (
                "503 Service Unavailable",
                "there is no session with the peer".to_owned(),
            ),
        },
        Err((status, why)) => (status, why.to_owned()),
    };
    let body = format!("holdfast: {why}\n");
    // RFC 9110, 15.5.6: what is allowed belongs to a 405, and does no harm elsewhere.
    let answer = format!(
        "HTTP/1.1 {status}\r\nAllow: CONNECT\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    socket.write_all(answer.as_bytes()).await?;
    socket.shutdown().await?;
    Err(Unmet::Protocol(why))
}

type Head = Result<Target, (&'static str, &'static str)>;

/// Reads a request's head and leaves in `input` what came behind it: the target, or a status and what is wrong.
async fn head(
    socket: &mut (impl AsyncRead + Unpin),
    input: &mut BytesMut,
) -> std::io::Result<Head> {
    loop {
        if let Some((head, bytes)) = parse(input) {
            drop(input.split_to(bytes));
            return Ok(head);
        }
        if input.len() >= HEAD_BYTES_MAX {
            return Ok(Err((
                "431 Request Header Fields Too Large",
                "the head of the request is too long",
            )));
        }
        if socket.read_buf(input).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// What a request asks for, and how long its head is; `None` while that is not whole.
fn parse(input: &[u8]) -> Option<(Head, usize)> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(input) {
        Ok(httparse::Status::Partial) => None,
        Ok(httparse::Status::Complete(bytes)) => Some((asked(&request), bytes)),
        Err(_) => Some((Err(("400 Bad Request", "this is no HTTP/1 request")), 0)),
    }
}

fn asked(request: &httparse::Request<'_, '_>) -> Head {
    if request.method != Some("CONNECT") {
        return Err((
            "405 Method Not Allowed",
            "only CONNECT is served: use it for http:// as well (curl -p)",
        ));
    }
    let target = request.path.and_then(|path| path.parse().ok());
    target.ok_or(("400 Bad Request", "CONNECT takes HOST:PORT"))
}

/// What a gateway says of an error behind it (RFC 9110, 15.5 and 15.6).
fn status(errno: i32) -> &'static str {
    match errno {
        libc::EACCES => "403 Forbidden",
        libc::ETIMEDOUT => "504 Gateway Timeout",
        _ => "502 Bad Gateway",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn asked_in(text: &str) -> Option<(Head, usize)> {
        parse(text.as_bytes())
    }

    #[test]
    fn connect_is_understood_and_what_follows_is_left() {
        let head = "CONNECT db.example:5432 HTTP/1.1\r\nHost: db.example:5432\r\n\r\n";
        let target = Target::Name("db.example".to_owned(), 5432);
        assert_eq!(asked_in(head), Some((Ok(target.clone()), head.len())));
        let more = format!("{head}\x16\x03\x01");
        assert_eq!(asked_in(&more), Some((Ok(target), head.len())));
        assert_eq!(asked_in(&head[..head.len() - 1]), None);
    }

    #[test]
    fn everything_else_is_refused_with_a_reason() {
        let status = |text| match asked_in(text) {
            Some((Err((status, _)), _)) => status,
            other => panic!("{other:?}"),
        };
        assert!(status("GET http://a.example/ HTTP/1.1\r\n\r\n").starts_with("405"));
        assert!(status("CONNECT a.example HTTP/1.1\r\n\r\n").starts_with("400"));
        assert!(status("\x05\x01\x00 what is this\r\n\r\n").starts_with("400"));
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            parse(&bytes);
        }
    }
}
