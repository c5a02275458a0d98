//! Two units and everybody else who might call.

mod files;
mod refusals;
mod renewal;
mod success;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::BytesMut;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::{HandshakeError, Identity, IdentityPaths, Outcome, Tail, accept, connect};
use crate::pki;

const DOMAIN: &str = "fleet.example";
/// Longer than any handshake takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// Smaller than any flight, so that nothing works only because it came in one piece.
const PIPE_BYTES: usize = 700;

/// A CA and its units.
struct Fleet {
    dir: TempDir,
}

impl Fleet {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        pki::init(dir.path(), DOMAIN, pki::CA_VALIDITY, now, false).unwrap();
        Self { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn paths(&self, name: &str) -> IdentityPaths {
        // Slashes of a name are not those of a path.
        let name = name.replace('/', "_");
        let file = |suffix: &str| self.path().join(format!("{name}.{suffix}"));
        IdentityPaths {
            certificate: file("crt"),
            key: file("key"),
            ca: self.path().join("ca.crt"),
            crl: Some(self.path().join("crl.pem")),
        }
    }

    /// Issues at `now` for `validity`.
    fn issue(&self, name: &str, now: SystemTime, validity: Duration) -> IdentityPaths {
        pki::issue(self.path(), name, validity, self.path(), now, true).unwrap();
        self.paths(name)
    }

    /// A unit whose certificate is good.
    fn unit(&self, name: &str) -> Arc<Identity> {
        load(&self.issue(name, SystemTime::now(), pki::UNIT_VALIDITY))
    }

    fn revoke(&self, name: &str) {
        pki::revoke(self.path(), name, SystemTime::now()).unwrap();
    }
}

fn load(paths: &IdentityPaths) -> Arc<Identity> {
    Arc::new(Identity::load(paths).unwrap())
}

/// What came of the client's end, after it has read what the server said about its certificate.
type ClientEnd = Result<Outcome, HandshakeError>;

/// A whole handshake; both ends write a byte of our own afterwards and expect the other's.
fn shake(client: &Arc<Identity>, server: &Arc<Identity>, name: &str) -> (ClientEnd, ServerEnd) {
    let (client, server, name) = (Arc::clone(client), Arc::clone(server), name.to_owned());
    block_on(async move {
        let (near, far) = duplex(PIPE_BYTES);
        tokio::join!(client_end(near, client, name), server_end(far, server))
    })
}

type ServerEnd = Result<Outcome, HandshakeError>;

async fn client_end(mut near: DuplexStream, identity: Arc<Identity>, name: String) -> ClientEnd {
    let mut input = BytesMut::new();
    let (outcome, mut tail) = connect(&mut near, &mut input, &identity, &name).await?;
    // The server may have refused meanwhile: then nobody listens.
    let _ = near.write_all(&[0x81]).await;
    first_own_byte(&mut near, &mut input, &mut tail).await?;
    Ok(outcome)
}

/// Reads past alerts to the first byte that is not TLS's.
async fn first_own_byte(
    stream: &mut DuplexStream,
    input: &mut BytesMut,
    tail: &mut Tail,
) -> Result<u8, HandshakeError> {
    loop {
        if !tail.take_alerts(input)?
            && let Some(byte) = input.first()
        {
            return Ok(*byte);
        }
        if stream.read_buf(input).await? == 0 {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        }
    }
}

async fn server_end(mut far: DuplexStream, identity: Arc<Identity>) -> ServerEnd {
    let mut input = BytesMut::new();
    let outcome = accept(&mut far, &mut input, &identity).await?;
    far.write_all(&[0x80]).await?;
    if input.is_empty() {
        far.read_buf(&mut input).await?;
    }
    assert_eq!(input.first(), Some(&0x81));
    Ok(outcome)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let limited = async { tokio::time::timeout(PATIENCE, future).await };
    runtime.block_on(limited).expect("it hangs")
}

fn ago(seconds: u64) -> SystemTime {
    SystemTime::now() - Duration::from_secs(seconds)
}

fn ahead(seconds: u64) -> SystemTime {
    SystemTime::now() + Duration::from_secs(seconds)
}

fn pem_file(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}
