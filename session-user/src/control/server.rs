//! The agent's end.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::Group;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::REQUEST_BYTES_MAX;
use super::permit::{Credentials, Permissions};
use super::types::{ControlError, ErrorCode, Request, Response};

/// A client that has nothing to say for this long is cut off.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Wait after `accept()` failed for want of descriptors or memory.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// What the agent does with requests.
pub trait ControlHandler: Send + Sync + 'static {
    /// Who may ask what.
    fn permissions(&self) -> Permissions;

    /// Carries out a permitted request.
    fn handle(
        &self,
        request: Request,
        who: Credentials,
    ) -> impl Future<Output = Result<Response, ControlError>> + Send;
}

/// Takes the socket at `path`. That of a dead agent is replaced; that of a live one is an error.
pub fn listen(path: &Path, group: Option<&str>) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    if let Ok(found) = fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "something that is not a socket is in the way",
            ));
        }
        if let Ok(stream) = std::os::unix::net::UnixStream::connect(path) {
            let pid =
                nix::sys::socket::getsockopt(&stream, nix::sys::socket::sockopt::PeerCredentials)
                    .map(|c| c.pid());
            let pid = pid.map_or_else(|_| "unknown".to_owned(), |p| p.to_string());
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                format!("an agent is already running, pid {pid}"),
            ));
        }
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    // Everybody may connect and is then judged by what the kernel says of him: a mode would keep
    // the configured run_users out.
    if let Some(name) = group
        && !matches!(Group::from_name(name), Ok(Some(_)))
    {
        tracing::warn!(
            group = name,
            "the control_group of [agent] does not exist on this host: only root may command the agent"
        );
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

/// Serves until the task is aborted.
pub async fn serve<H: ControlHandler>(listener: UnixListener, handler: Arc<H>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let handler = Arc::clone(&handler);
                tokio::spawn(async move {
                    if let Err(error) = converse(stream, &*handler).await {
                        tracing::debug!(%error, "a control connection ended");
                    }
                });
            }
            Err(error) => {
                tracing::error!(%error, "the control socket cannot accept");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

async fn converse<H: ControlHandler>(mut stream: UnixStream, handler: &H) -> io::Result<()> {
    let cred = stream.peer_cred()?;
    let pid = cred.pid().and_then(|p| u32::try_from(p).ok()).unwrap_or(0);
    let who = Credentials {
        pid,
        uid: cred.uid(),
        gid: cred.gid(),
    };
    let (read, mut write) = stream.split();
    let mut read = BufReader::new(read);
    loop {
        let mut line = Vec::new();
        let mut limited = (&mut read).take(REQUEST_BYTES_MAX as u64 + 1);
        let n = tokio::time::timeout(IDLE_TIMEOUT, limited.read_until(b'\n', &mut line)).await??;
        if n == 0 {
            return Ok(());
        }
        let too_long = line.len() > REQUEST_BYTES_MAX;
        let response = if too_long {
            Err(invalid("the request is too long"))
        } else {
            answer(&line, handler, who).await
        };
        let mut out = serde_json::to_vec(&response.unwrap_or_else(Response::Error))?;
        out.push(b'\n');
        write.write_all(&out).await?;
        if too_long {
            return Ok(());
        }
    }
}

fn invalid(message: impl Into<String>) -> ControlError {
    ControlError::new(
        ErrorCode::Invalid,
        message,
        "is the command of the same version as the agent?",
    )
}

async fn answer<H: ControlHandler>(
    line: &[u8],
    handler: &H,
    who: Credentials,
) -> Result<Response, ControlError> {
    let request: Request = serde_json::from_slice(line)
        .map_err(|e| invalid(format!("the request cannot be understood: {e}")))?;
    handler.permissions().check(&request, &who)?;
    handler.handle(request, who).await
}
