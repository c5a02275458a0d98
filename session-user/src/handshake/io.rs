//! The handshake over a socket, which afterwards belongs to our own records.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::error::HandshakeError;
use super::identity::Identity;
use super::tls::{Outcome, TlsDriver, TlsState, begins_tls, record_bytes};

/// How long a refused peer is listened to, so that the alert reaches it before a reset could.
const REFUSAL_LINGER: Duration = Duration::from_secs(1);
/// Bytes of a refused peer that are read and dropped, at most.
const REFUSAL_BYTES_MAX: usize = 256 * 1024;

/// The client's end of TLS after the handshake: the server may still refuse its certificate.
pub struct Tail {
    tls: TlsDriver,
}

impl Tail {
    /// Takes TLS records, which can only be alerts, from the front of `input`. True: the front is
    /// part of a TLS record, and more must be read before anything else can be said.
    pub fn take_alerts(&mut self, input: &mut BytesMut) -> Result<bool, HandshakeError> {
        while input.first().is_some_and(|b| begins_tls(*b)) {
            let Some(len) = record_bytes(input)? else {
                return Ok(true);
            };
            let record = input.split_to(len);
            self.tls.feed_record(&record)?;
        }
        Ok(false)
    }
}

/// Runs the client's handshake with the unit called `peer`. `input` holds what was read from
/// `stream` and not used; afterwards, what follows the handshake.
pub async fn connect<S>(
    stream: &mut S,
    input: &mut BytesMut,
    identity: &Arc<Identity>,
    peer: &str,
) -> Result<(Outcome, Tail), HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut tls = TlsDriver::client(identity, peer)?;
    let result = run(&mut tls, stream, input).await;
    let outcome = result.and_then(|()| tls.outcome());
    if outcome.is_err() {
        refuse(&mut tls, stream).await;
    }
    Ok((outcome?, Tail { tls }))
}

/// Runs the server's handshake, likewise.
pub async fn accept<S>(
    stream: &mut S,
    input: &mut BytesMut,
    identity: &Arc<Identity>,
) -> Result<Outcome, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut tls = TlsDriver::server(identity)?;
    let result = run(&mut tls, stream, input).await;
    let outcome = result.and_then(|()| tls.outcome());
    if outcome.is_err() {
        refuse(&mut tls, stream).await;
    }
    outcome
}

async fn run<S>(
    tls: &mut TlsDriver,
    stream: &mut S,
    input: &mut BytesMut,
) -> Result<(), HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        let output = tls.take_output();
        stream.write_all(&output).await?;
        if tls.state() == TlsState::Complete {
            return Ok(());
        }
        match record_bytes(input)? {
            // One record at a time: what follows the last one is not TLS's.
            Some(len) => {
                let record = input.split_to(len);
                tls.feed_record(&record)?;
            }
            None => {
                if stream.read_buf(input).await? == 0 {
                    return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                }
            }
        }
    }
}

/// Sends the alert and reads on until the peer has gone: closing with unread bytes would reset the
/// connection, and the alert could be lost.
async fn refuse<S>(tls: &mut TlsDriver, stream: &mut S)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let alert = tls.take_output();
    let told = async {
        stream.write_all(&alert).await?;
        stream.shutdown().await?;
        let mut dropped = BytesMut::with_capacity(4096);
        let mut total = 0;
        while total < REFUSAL_BYTES_MAX {
            let n = stream.read_buf(&mut dropped).await?;
            if n == 0 {
                break;
            }
            total += n;
            dropped.advance(dropped.len());
        }
        Ok::<_, io::Error>(())
    };
    // The peer is refused whether or not it hears why.
    let _ = tokio::time::timeout(REFUSAL_LINGER, told).await;
}
