//! Messages over streams: each with its length in front, in two bytes (RFC 1035, 4.2.2).

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::answer::{Carrier, Reply};
use super::resolver::Resolver;
use crate::requests::AppStream;

/// An application that asks nothing for so long is left: resolvers end idle connections sooner (RFC 7766, 6.2.3).
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(300);
/// Time for the last answers of a resolver, and for it to end, once the application asks no more.
const FAREWELL: Duration = Duration::from_secs(30);
/// Time for whoever is written to to take a message.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection to a resolver.
pub(super) type Far = Box<dyn Stream>;

/// A stream of bytes in both directions.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// The next message; `None` at an end in order.
pub(super) async fn read_message(
    from: &mut (impl AsyncRead + Unpin),
) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 2];
    if from.read(&mut length[..1]).await? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut length[1..]).await?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    from.read_exact(&mut message).await?;
    Ok(Some(message))
}

/// Writes a message with its length in front, in one piece; whoever does not read is not waited for long.
pub(super) async fn write_message(
    to: &mut (impl AsyncWrite + Unpin),
    message: &[u8],
) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    let mut framed = Vec::with_capacity(2 + message.len());
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(message);
    timeout(WRITE_TIMEOUT, to.write_all(&framed)).await?
}

/// Carries messages between an application and its resolver until both have ended; answers those about captured names.
///
/// Answers come in any order, as RFC 7766, 6.2.1.1 has them.
pub(super) async fn converse(resolver: &Resolver, near: AppStream, far: Far) -> io::Result<()> {
    let (mut questions, to_app) = tokio::io::split(near.marked()?);
    let (mut from_resolver, mut to_resolver) = tokio::io::split(far);
    let to_app = Mutex::new(to_app);
    let asking = async {
        loop {
            let next = timeout(IDLE_TIMEOUT, read_message(&mut questions)).await;
            let Some(question) = next.map_err(io::Error::from)?? else {
                return to_resolver.shutdown().await;
            };
            match resolver.reply(&question, Carrier::Tcp) {
                Reply::Answer(answer) => write_message(&mut *to_app.lock().await, &answer).await?,
                Reply::Forward => write_message(&mut to_resolver, &question).await?,
                Reply::Nothing => {
                    let what = "what was asked is no question";
                    return Err(io::Error::new(io::ErrorKind::InvalidData, what));
                }
            }
        }
    };
    let answering = async {
        while let Some(answer) = read_message(&mut from_resolver).await? {
            write_message(&mut *to_app.lock().await, &answer).await?;
        }
        to_app.lock().await.shutdown().await
    };
    {
        tokio::pin!(asking, answering);
        tokio::select! {
            asked = &mut asking => {
                asked?;
                timeout(FAREWELL, answering).await??;
            }
            // What is asked still may be answered here, but nobody would hear it.
            answered = &mut answering => {
                answered?;
                asking.await?;
            }
        }
    }
    // Both ended in order: closing it is no reset.
    questions.unsplit(to_app.into_inner()).reset_on_close(false)
}
