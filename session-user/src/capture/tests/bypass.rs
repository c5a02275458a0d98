//! The local bypass with captured applications: what they send arrives whole and in order, and so does its end.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, TcpStream},
    os::fd::AsRawFd as _,
    rc::Rc,
};

use tokio::{io::AsyncReadExt as _, io::AsyncWriteExt as _, sync::mpsc};

use super::harness::{PATIENCE, everything, in_netns, run, scope};
use crate::capture::{Capture, CaptureConfig, Captured, LocalBypass, Scope};
use crate::requests::AppStream;

const TO: [&str; 3] = ["192.0.2.1:80", "[2001:db8::1]:80", "[::ffff:192.0.2.1]:80"];
const BYTES: usize = 3_000_000;

fn capture(bypass: LocalBypass) -> (Capture, Scope) {
    let scope = scope();
    let config = CaptureConfig {
        rules: vec![everything()],
        bypass,
        ..CaptureConfig::default()
    };
    let mut capture = Capture::load(&config).unwrap_or_else(|error| panic!("{error}"));
    capture.attach(scope.path()).unwrap();
    (capture, scope)
}

/// Serves each connection: reads to its end, as a driver does, and tells how many bytes came; none if one was wrong.
fn serve(capture: Rc<Capture>) -> mpsc::UnboundedReceiver<Option<usize>> {
    let (report, reports) = mpsc::unbounded_channel();
    tokio::task::spawn_local(async move {
        while let Ok(captured) = capture.entrance().accept().await {
            let report = report.clone();
            tokio::task::spawn_local(async move {
                let _ = report.send(take(captured).await.unwrap_or(None));
            });
        }
    });
    reports
}

/// Reads to the end, says how much came, and ends in order.
async fn take(captured: Captured) -> io::Result<Option<usize>> {
    let mut stream: AppStream = captured.into_stream().marked()?;
    let (mut all, mut buf) = (0, vec![0; 100_000]);
    let mut right = true;
    loop {
        let n = stream.read(&mut buf).await?;
        if n == 0 {
            break;
        }
        right &= (all..)
            .zip(&buf[..n])
            .all(|(at, byte)| pattern(at) == *byte);
        all += n;
    }
    stream.write_all(&(all as u64).to_le_bytes()).await?;
    stream.reset_on_close(false)?;
    Ok(right.then_some(all))
}

fn pattern(at: usize) -> u8 {
    (at % 251) as u8
}

/// In an application: sends in messages of these sizes by turns, ends its direction, and asks how much came.
fn send(to: &str, sizes: &[usize], bytes: usize) -> io::Result<String> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    send_by(&stream, sizes, bytes)?;
    stream.shutdown(Shutdown::Write)?;
    let mut came = [0; 8];
    stream.read_exact(&mut came)?;
    Ok(u64::from_le_bytes(came).to_string())
}

fn send_by(mut stream: &TcpStream, sizes: &[usize], bytes: usize) -> io::Result<()> {
    let data: Vec<u8> = (0..bytes).map(pattern).collect();
    let (mut rest, mut sizes) = (&data[..], sizes.iter().cycle());
    while !rest.is_empty() {
        let size = sizes.next().map_or(1, |size| (*size).min(rest.len()));
        stream.write_all(&rest[..size])?;
        rest = &rest[size..];
    }
    Ok(())
}

#[test]
fn what_is_sent_past_tcp_arrives_in_order_and_so_does_its_end() {
    in_netns(async || {
        let (capture, scope) = capture(LocalBypass::On);
        let capture = Rc::new(capture);
        let mut reports = serve(capture.clone());
        let kinds: [&[usize]; 4] = [&[64], &[262_144], &[64, 65_536, 1, 3000], &[4096]];
        for (to, sizes) in TO.iter().flat_map(|to| kinds.map(|kind| (*to, kind))) {
            let bytes = if sizes == [64] { 50_000 } else { BYTES };
            let came = run(&scope, move || send(to, sizes, bytes)).await;
            assert_eq!(came, Ok(bytes.to_string()), "{to} {sizes:?}");
            assert_eq!(reports.recv().await, Some(Some(bytes)), "{to} {sizes:?}");
        }
        let counters = capture.counters();
        assert!(counters.bypassed > 0, "{counters:?}");
        assert_eq!(counters.delivered, 12, "{counters:?}");
    });
}

#[test]
fn off_is_off() {
    in_netns(async || {
        let (capture, scope) = capture(LocalBypass::Off);
        let capture = Rc::new(capture);
        let mut reports = serve(capture.clone());
        let came = run(&scope, || send(TO[0], &[65_536], BYTES)).await;
        assert_eq!(came, Ok(BYTES.to_string()));
        assert_eq!(reports.recv().await, Some(Some(BYTES)));
        let counters = capture.counters();
        assert_eq!((counters.bypassed, counters.not_bypassed), (0, 0));
    });
}

/// Nobody reads: the application is held back, and finds that out as with TCP.
#[test]
fn who_is_not_read_is_held_back() {
    in_netns(async || {
        let (capture, scope) = capture(LocalBypass::On);
        let capture = Rc::new(capture);
        let accepting = capture.clone();
        let kept = tokio::task::spawn_local(async move { accepting.entrance().accept().await });
        let taken = run(&scope, || {
            let mut stream = TcpStream::connect(TO[0])?;
            stream.set_nonblocking(true)?;
            let (data, mut taken) = (vec![0; 65_536], 0_u64);
            loop {
                match stream.write(&data) {
                    Ok(n) => taken += n as u64,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
                if taken > 1 << 28 {
                    break;
                }
            }
            Ok(taken.to_string())
        })
        .await;
        let taken: u64 = taken.unwrap().parse().unwrap();
        assert!(taken < 1 << 28, "{taken} bytes");
        drop(kept.await.unwrap().unwrap());
    });
}

/// The agent aborts while the application sends, past TCP or by it: a reset, as ever.
#[test]
fn an_abort_of_the_agent_is_a_reset() {
    in_netns(async || {
        let (capture, scope) = capture(LocalBypass::On);
        let capture = Rc::new(capture);
        let accepting = capture.clone();
        tokio::task::spawn_local(async move {
            while let Ok(captured) = accepting.entrance().accept().await {
                let Ok(mut stream) = captured.into_stream().marked() else {
                    return;
                };
                // Some bytes, so that there are more: and then it is dropped.
                let _ = stream.read_exact(&mut vec![0; 300_000]).await;
            }
        });
        for sizes in [&[100_usize][..], &[65_536]] {
            let end = run(&scope, move || {
                let stream = TcpStream::connect(TO[0])?;
                send_by(&stream, sizes, 1 << 27)?;
                Ok("all was taken".to_owned())
            });
            let end = end.await.unwrap_err();
            assert!(end == "ECONNRESET" || end == "EPIPE", "{end}");
        }
    });
}

/// A message that is sent without a copy is reported as TCP does, for its socket is left alone.
#[test]
fn a_socket_that_asked_for_zero_copy_goes_by_tcp() {
    in_netns(async || {
        let (capture, scope) = capture(LocalBypass::On);
        let capture = Rc::new(capture);
        let mut reports = serve(capture.clone());
        let came = run(&scope, || {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
            let on = 1_i32;
            // SAFETY: a live descriptor, and a number with its length.
            let done = unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    libc::SOL_SOCKET,
                    libc::SO_ZEROCOPY,
                    (&raw const on).cast(),
                    4,
                )
            };
            if done != 0 {
                return Err(io::Error::last_os_error());
            }
            let to: std::net::SocketAddr = TO[0].parse().map_err(io::Error::other)?;
            socket.connect(&to.into())?;
            send_by(&socket.into(), &[65_536], BYTES)?;
            Ok("sent".to_owned())
        });
        assert_eq!(came.await, Ok("sent".to_owned()));
        assert_eq!(reports.recv().await, Some(Some(BYTES)));
        let counters = capture.counters();
        assert_eq!((counters.bypassed, counters.not_bypassed), (0, 0));
    });
}
