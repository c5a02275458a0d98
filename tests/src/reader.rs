//! An application that reads for ever, and a server that lets it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, ensure};
use session_lab::Lab;

use crate::{TestBed, finish};

/// A Python program that connects, reads to the end or the error, and says which it was.
const READER: &str = r#"
import socket, sys
n = 0
try:
    s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
    s.sendall(b"go\n")
    while True:
        d = s.recv(65536)
        if not d:
            print("end", n)
            break
        n += len(d)
        if n == len(d):
            print("first", flush=True)
except OSError as e:
    print("error", e.errno, n)
"#;

/// A server in the lab that sends for ever, slowly.
pub fn endless(lab: &Lab) -> anyhow::Result<SocketAddr> {
    let listener = lab
        .server()
        .run(|| TcpListener::bind((Lab::target(false), 0)))?;
    let addr = listener.local_addr()?;
    std::thread::spawn(move || {
        for socket in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut socket = socket;
                let _ = socket.read(&mut [0; 16]);
                while socket.write_all(&[7; 1000]).is_ok() {
                    // Slowly, as it says.
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
        }
    });
    Ok(addr)
}

/// Starts the program above, captured, towards `to`.
pub fn reader(bed: &TestBed, to: SocketAddr) -> anyhow::Result<Child> {
    bed.start(&[
        "python3",
        "-u",
        "-c",
        READER,
        &to.ip().to_string(),
        &to.port().to_string(),
    ])
}

/// Waits until the reader has got its first bytes.
pub fn begun(child: &mut Child) -> anyhow::Result<()> {
    let out = child.stdout.as_mut().context("no output")?;
    let mut first = [0; 6];
    out.read_exact(&mut first)?;
    ensure!(
        &first == b"first\n",
        "the reader said {:?}",
        String::from_utf8_lossy(&first)
    );
    Ok(())
}

/// What the reader said when it ended: `end` or `error`, with errno and bytes.
pub fn said(child: Child, limit: Duration) -> anyhow::Result<String> {
    let output = finish(child, limit)?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
