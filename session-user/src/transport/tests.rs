//! Transport sockets against a real kernel, in the two-link lab.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener as StdListener};
use std::time::Duration;

use session_lab::{Direction, GATEWAY_V4, Lab, LabConfig, LinkName};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    Congestion, DialSpec, TcpInfo, TransportError, TransportOptions, adopt, be_patient, dial,
    listen, tcp_info,
};

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

fn lab() -> Lab {
    Lab::new(&LabConfig::default()).unwrap()
}

/// An echo server for one connection after another, inside the lab's server.
fn echo_server(lab: &Lab) -> SocketAddr {
    let listener = lab
        .server()
        .run(|| StdListener::bind((GATEWAY_V4, 0)).unwrap());
    let addr = listener.local_addr().unwrap();
    // Ends with the process: accept() waits for connections that do not come.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&buffer[..n]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    addr
}

fn over(link: LinkName, remote: SocketAddr) -> DialSpec {
    DialSpec {
        device: Some(link.name().to_owned()),
        source: Some(IpAddr::V4(link.client_v4())),
        remote,
        timeout: PATIENCE,
        segment: None,
        fast_open: false,
    }
}

/// Runs `job` on a runtime inside the lab's client.
fn on_client<T: Send + 'static, F: Future<Output = T>>(
    lab: &Lab,
    job: impl FnOnce() -> F + Send + 'static,
) -> T {
    lab.client().run(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(job())
    })
}

fn error_of(lab: &Lab, spec: DialSpec) -> TransportError {
    on_client(lab, move || async move {
        dial(&spec, &TransportOptions::default()).await.unwrap_err()
    })
}

#[test]
fn two_links_carry_two_connections_to_one_address() {
    let lab = lab();
    let remote = echo_server(&lab);
    on_client(&lab, move || async move {
        let options = TransportOptions {
            notsent_lowat: 77_000,
            congestion: Congestion::Named("reno".to_owned()),
            user_timeout: Duration::from_millis(12_345),
            keepalive_idle: Duration::from_secs(61),
            keepalive_interval: Duration::from_secs(11),
            keepalive_probes: 4,
            fast_open: true,
        };
        let mut both = Vec::new();
        for link in LinkName::ALL {
            both.push((link, dial(&over(link, remote), &options).await.unwrap()));
        }
        for (link, stream) in &mut both {
            stream.write_all(link.name().as_bytes()).await.unwrap();
            let mut back = vec![0; link.name().len()];
            stream.read_exact(&mut back).await.unwrap();
            assert_eq!(back, link.name().as_bytes());

            let local = stream.local_addr().unwrap().ip();
            assert_eq!(local, IpAddr::V4(link.client_v4()));
            let socket = SockRef::from(&*stream);
            let device = socket.device().unwrap().unwrap();
            assert_eq!(device, link.name().as_bytes());
            assert!(socket.tcp_nodelay().unwrap());
            assert_eq!(socket.tcp_notsent_lowat().unwrap(), 77_000);
            // Longer than four keep-alive probes take.
            let idle = Duration::from_secs(61 + 4 * 11);
            assert_eq!(socket.tcp_user_timeout().unwrap(), Some(idle));
            be_patient(stream, false, &options).unwrap();
            let busy = socket.tcp_user_timeout().unwrap();
            assert_eq!(busy, Some(options.user_timeout));
            assert!(socket.keepalive().unwrap());
            let probes_after = socket.tcp_keepalive_time().unwrap();
            assert!(
                (45..=61).contains(&probes_after.as_secs()),
                "{probes_after:?}"
            );
            let interval = socket.tcp_keepalive_interval().unwrap().as_secs();
            assert!([7, 9].contains(&interval), "{interval}");
            assert_eq!(socket.tcp_keepalive_retries().unwrap(), 4);
        }
    });
}

/// A probe or two may be lost, with all else, for as long as a link is silent.
#[test]
fn an_idle_transport_outlives_a_lost_keep_alive() {
    let lab = lab();
    let remote = echo_server(&lab);
    let options = TransportOptions {
        user_timeout: Duration::from_millis(500),
        keepalive_idle: Duration::from_secs(1),
        keepalive_interval: Duration::from_secs(1),
        keepalive_probes: 10,
        ..TransportOptions::default()
    };
    let dialled = options.clone();
    let (idle, busy) = on_client(&lab, move || async move {
        let spec = over(LinkName::Lte, remote);
        let idle = dial(&spec, &dialled).await.unwrap();
        let busy = dial(&spec, &dialled).await.unwrap();
        be_patient(&busy, false, &dialled).unwrap();
        (idle.into_std().unwrap(), busy.into_std().unwrap())
    });
    lab.blackhole(LinkName::Lte, Direction::Down).unwrap();
    on_client(&lab, move || async move {
        let mut busy = tokio::net::TcpStream::from_std(busy).unwrap();
        let ended = tokio::time::timeout(PATIENCE, busy.read_u8()).await;
        let error = ended.expect("it ends by itself").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    });
    // By now the other has lost as many.
    lab.unblackhole(LinkName::Lte).unwrap();
    on_client(&lab, move || async move {
        let mut idle = tokio::net::TcpStream::from_std(idle).unwrap();
        idle.write_all(b"a").await.unwrap();
        assert_eq!(idle.read_u8().await.unwrap(), b'a');
    });
}

#[test]
fn keep_alives_of_many_are_spread() {
    let options = TransportOptions::default();
    // As good as drawn: an odd factor goes over all of them.
    let drawn = |n: u32| n.wrapping_mul(2_654_435_761).to_ne_bytes();
    let times = |of: fn(&TransportOptions, [u8; 4]) -> Duration| -> Vec<u64> {
        (0..1000)
            .map(|n| of(&options, drawn(n)).as_secs())
            .collect()
    };
    let idle = times(TransportOptions::keepalive_idle_of_one);
    assert!(idle.iter().all(|s| (45..=60).contains(s)));
    for second in 45..60 {
        let at_once = idle.iter().filter(|s| **s == second).count();
        assert!(at_once < 200, "{at_once} of 1000 after {second} s");
    }
    let again = times(TransportOptions::keepalive_interval_of_one);
    let seven = again.iter().filter(|s| **s == 7).count();
    let nine = again.iter().filter(|s| **s == 9).count();
    assert!(
        seven + nine == 1000 && seven.abs_diff(nine) < 100,
        "{seven}"
    );
    let often = TransportOptions {
        keepalive_idle: Duration::from_secs(1),
        keepalive_interval: Duration::from_secs(1),
        ..options
    };
    let second = Duration::from_secs(1);
    assert_eq!(often.keepalive_idle_of_one([255; 4]), second);
    assert_eq!(often.keepalive_interval_of_one([0; 4]), second);
}

#[test]
fn the_kernel_tells_what_it_measured() {
    let lab = lab();
    let remote = echo_server(&lab);
    let info: TcpInfo = on_client(&lab, move || async move {
        let spec = over(LinkName::Wifi, remote);
        let mut stream = dial(&spec, &TransportOptions::default()).await.unwrap();
        let mut back = [0; 4];
        for _ in 0..10 {
            stream.write_all(b"ping").await.unwrap();
            stream.read_exact(&mut back).await.unwrap();
        }
        tcp_info(&stream).unwrap()
    });
    assert!(info.rtt > Duration::ZERO && info.rtt < PATIENCE, "{info:?}");
    assert!(info.snd_mss >= 536 && info.snd_mss <= 1460, "{info:?}");
    assert!(info.snd_cwnd >= 1, "{info:?}");
    assert_eq!(info.retransmits, 0, "{info:?}");
}

#[test]
fn a_refusal_is_told_from_silence() {
    let lab = lab();
    let nobody = SocketAddr::from((GATEWAY_V4, 9));
    let error = error_of(&lab, over(LinkName::Wifi, nobody));
    assert!(error.is_refused(), "{error}");
    let words = error.to_string();
    assert!(words.contains("10.10.9.2:9 over wifi0"), "{words}");

    lab.blackhole(LinkName::Wifi, Direction::Down).unwrap();
    let spec = DialSpec {
        timeout: Duration::from_millis(200),
        segment: None,
        ..over(LinkName::Wifi, nobody)
    };
    let error = error_of(&lab, spec);
    assert!(matches!(error, TransportError::Timeout { .. }), "{error}");
    assert!(!error.is_refused());
    // The other link knows nothing of it.
    assert!(error_of(&lab, over(LinkName::Lte, nobody)).is_refused());
}

#[test]
fn a_link_that_leads_nowhere_is_the_links_fault() {
    let lab = lab();
    let remote = echo_server(&lab);
    let no_device = DialSpec {
        device: Some("nosuch0".to_owned()),
        ..over(LinkName::Wifi, remote)
    };
    let no_address = DialSpec {
        source: Some(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 99))),
        ..over(LinkName::Wifi, remote)
    };
    for spec in [no_device, no_address] {
        let error = error_of(&lab, spec);
        assert!(matches!(error, TransportError::Link { .. }), "{error}");
    }
    lab.client()
        .ip(&["route", "del", "default", "dev", "lte0"])
        .unwrap();
    let error = error_of(&lab, over(LinkName::Lte, remote));
    assert!(matches!(error, TransportError::Link { .. }), "{error}");
    lab.cut(LinkName::Wifi).unwrap();
    let error = error_of(&lab, over(LinkName::Wifi, remote));
    assert!(matches!(error, TransportError::Link { .. }), "{error}");
}

/// One connection after another over LTE: `(opening, syn_data)` of each, with fast open at both ends.
fn fast_opened(lab: &Lab, count: usize) -> Vec<(bool, bool)> {
    let (port, bound) = std::sync::mpsc::channel();
    // Ends with the process, as the echo server.
    let _ = lab.server().thread(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let listener = listen(SocketAddr::new(GATEWAY_V4.into(), 0), true).unwrap();
            port.send(listener.local_addr().unwrap()).unwrap();
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut word = [0; 4];
                if stream.read_exact(&mut word).await.is_ok() {
                    let _ = stream.write_all(&word).await;
                }
            }
        });
    });
    let remote = bound.recv().unwrap();
    on_client(lab, move || async move {
        let mut seen = Vec::new();
        for _ in 0..count {
            let spec = DialSpec {
                fast_open: true,
                ..over(LinkName::Lte, remote)
            };
            let mut stream = dial(&spec, &TransportOptions::default()).await.unwrap();
            let opening = tcp_info(&stream).unwrap().is_opening();
            stream.write_all(b"ping").await.unwrap();
            let mut back = [0; 4];
            stream.read_exact(&mut back).await.unwrap();
            assert_eq!(&back, b"ping");
            let info = tcp_info(&stream).unwrap();
            assert!(!info.is_opening());
            seen.push((opening, info.syn_data));
        }
        seen
    })
}

#[test]
fn the_first_write_goes_in_the_syn_once_the_peer_is_known() {
    // The first connection brings the cookie.
    let seen = fast_opened(&lab(), 3);
    assert_eq!(seen, [(false, false), (true, true), (true, true)]);
}

#[test]
fn a_host_that_turned_fast_open_off_is_dialled_as_ever() {
    let lab = lab();
    lab.server().sysctl("net/ipv4/tcp_fastopen", "1").unwrap();
    assert_eq!(fast_opened(&lab, 2), [(false, false); 2]);
    lab.server().sysctl("net/ipv4/tcp_fastopen", "3").unwrap();
    lab.client().sysctl("net/ipv4/tcp_fastopen", "2").unwrap();
    assert_eq!(fast_opened(&lab, 2), [(false, false); 2]);
}

#[test]
fn both_families_listen_on_one_port() {
    let lab = lab();
    on_client(&lab, || async {
        let v4 = listen("0.0.0.0:0".parse().unwrap(), true).unwrap();
        let port = v4.local_addr().unwrap().port();
        let v6 = listen(SocketAddr::new("::".parse().unwrap(), port), true).unwrap();
        for (address, listener) in [("127.0.0.1", &v4), ("::1", &v6)] {
            let to = SocketAddr::new(address.parse().unwrap(), port);
            let (dialled, accepted) =
                tokio::join!(tokio::net::TcpStream::connect(to), listener.accept());
            let from = accepted.unwrap().1;
            assert_eq!(dialled.unwrap().local_addr().unwrap(), from);
        }
        let taken = listen(SocketAddr::new("::".parse().unwrap(), port), true).unwrap_err();
        assert_eq!(taken.kind(), std::io::ErrorKind::AddrInUse);
    });
}

#[test]
fn an_adopted_connection_needs_its_old_runtime_no_more() {
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    };
    let (old, new) = (runtime(), runtime());
    let (near, mut far) = old.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let far = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (listener.accept().await.unwrap().0, far)
    });
    let mut near = new.block_on(async { adopt(near).unwrap() });
    drop(old);
    for word in [*b"some", *b"more"] {
        let mut read = [0; 4];
        new.block_on(async {
            let say = async { far.write_all(&word).unwrap() };
            let (heard, ()) = tokio::join!(near.read_exact(&mut read), say);
            heard.unwrap();
        });
        assert_eq!(read, word);
    }
}
