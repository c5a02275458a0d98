//! A driver of a session that a unit has just made on loopback.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime};

use bytes::BytesMut;
use session_proto::session::Config;
use session_proto::wire::{ConnectionId, Preamble, Reply, ResumeToken, Status};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use super::busy::BusyPoll;
use super::establish::{Request, initiate_over, respond};
use super::{Command, Common, Driver, Responder, Side, TokenBook};
use crate::dial::{AllowList, AllowRule, Caller};
use crate::handshake::{Identity, IdentityPaths};
use crate::link::LinkSnapshot;
use crate::pki;
use crate::policy;
use crate::trace::Trace;
use crate::transport::TransportOptions;

const DOMAIN: &str = "fleet.example";
/// Longer than a handshake takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Nobody resumes.
struct NoTokens;

impl TokenBook for NoTokens {
    fn set(&self, _: [u8; 16], _: Vec<(ResumeToken, u64)>) {}
    fn set_connections(&self, _: [u8; 16], _: Vec<ConnectionId>) {}
}

/// The gateway of a unit, whose targets call the unit `caller` and are those that `to` allows. The unit's end of the
/// transport is open as long as the socket is kept.
pub(super) async fn gateway(caller: &str, to: &str) -> (Box<Driver>, TcpStream) {
    let fleet = tempfile::tempdir().unwrap();
    let dir = fleet.path();
    let now = SystemTime::now();
    pki::init(dir, DOMAIN, pki::CA_VALIDITY, now, false).unwrap();
    let unit = |name: &str| {
        pki::issue(dir, name, pki::UNIT_VALIDITY, dir, now, true).unwrap();
        Arc::new(
            Identity::load(&IdentityPaths {
                certificate: dir.join(format!("{name}.crt")),
                key: dir.join(format!("{name}.key")),
                ca: dir.join("ca.crt"),
                crl: None,
            })
            .unwrap(),
        )
    };
    let (gateway, lorry) = (unit("gateway"), unit("lorry"));

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let remote = listener.local_addr().unwrap();
    let near = TcpStream::connect(remote).await.unwrap();
    let (mut far, _) = listener.accept().await.unwrap();
    let request = Request {
        identity: lorry,
        peer_name: "gateway".to_owned(),
        path: policy::Path {
            link: "lo".to_owned(),
            source: remote.ip(),
            remote,
        },
        dial_timeout: PATIENCE,
        segment: None,
        handshake_timeout: PATIENCE,
        transport: TransportOptions::default(),
        window: None,
        session: Config::default(),
        continues: None,
    };
    let answer = async {
        let mut input = BytesMut::new();
        let used = loop {
            if let Some((_, used)) = Preamble::parse(&input).unwrap() {
                break used;
            }
            far.read_buf(&mut input).await.unwrap();
        };
        let input = input.split_off(used);
        let reply = Reply::new(Status::Ok).encode();
        far.write_all(&reply).await.unwrap();
        let identity = Arc::clone(&gateway);
        let pending = respond(identity, far, input, PATIENCE, Config::default()).await;
        let mut driver = Driver::new(
            pending.unwrap().accept(None),
            common(Arc::clone(&gateway)),
            Side::Responder(Box::new(responder(caller, to))),
        );
        driver.settle();
        driver
    };
    let (made, driver) = tokio::join!(initiate_over(request, near), answer);
    (driver, made.unwrap().stream)
}

fn common(identity: Arc<Identity>) -> Common {
    Common {
        busy_poll: Duration::from_micros(50),
        identity,
        trace: Arc::new(Trace::new(None).unwrap()),
        tokens: Arc::new(NoTokens),
        hold: PATIENCE,
        transport: TransportOptions::default(),
        window: None,
        resume_timeout: PATIENCE,
        reauth_after: 100 * PATIENCE,
        expiry_grace: PATIENCE,
    }
}

fn responder(caller: &str, to: &str) -> Responder {
    let rule = AllowRule {
        peer: caller.to_owned(),
        to: vec![to.to_owned()],
    };
    let caller = Caller {
        name: caller.to_owned(),
        ..Caller::default()
    };
    let (_, links) = watch::channel(no_links(1));
    let allow = AllowList::parse(&[rule]).unwrap();
    Responder::new(caller, Arc::new(allow), PATIENCE, links)
}

fn no_links(version: u64) -> Arc<LinkSnapshot> {
    Arc::new(LinkSnapshot {
        version,
        links: Vec::new(),
        read_at: Instant::now(),
        changes: Vec::new(),
    })
}

/// News that came before anybody waited for it, or while the news before it is acted on, is acted on once, and keeps nothing
/// else waiting.
#[tokio::test]
async fn links_that_have_changed_already_hold_nobody_up() {
    let (mut driver, _near) = gateway("lorry", "127.0.0.0/8:9").await;
    let (change, links) = watch::channel(no_links(1));
    change.send_replace(no_links(2));
    let Side::Responder(responder) = &mut driver.side else {
        panic!("a gateway dials nobody");
    };
    responder.links = links;
    let (orders, mut inbox) = mpsc::channel(1);
    let running = tokio::spawn(async move { driver.run(&mut inbox).await });
    for version in 3..6 {
        let (reply, heard) = oneshot::channel();
        orders.send(Command::Report(reply)).await.unwrap();
        let report = timeout(PATIENCE, heard).await;
        report.expect("it turns round and round").unwrap();
        change.send_replace(no_links(version));
    }
    running.abort();
}

/// In a runtime of one thread, where nothing else would run, nor a socket be heard, if whoever looks did not give way.
#[tokio::test]
async fn a_driver_that_looks_for_news_hears_it() {
    let (mut driver, mut near) = gateway("lorry", "127.0.0.0/8:9").await;
    let (_orders, mut inbox) = mpsc::channel(1);
    // What it begins with.
    while let Some(name) = driver.ready.try_next() {
        driver.handle_ready(name, &mut inbox);
        driver.settle();
    }
    driver.busy = BusyPoll::in_conversation(PATIENCE);
    let looking = tokio::spawn(async move {
        let mut polled = 0;
        let mut next = pin!(driver.next_name());
        let name = poll_fn(|cx| {
            polled += 1;
            next.as_mut().poll(cx)
        });
        (name.await, polled)
    });
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    // Half of a record: news, and nothing to do.
    near.write_all(&[0]).await.unwrap();
    let (name, polled) = timeout(PATIENCE, looking).await.unwrap().unwrap();
    assert!(matches!(name, super::Name::Carrier(_)), "{name:?}");
    // Whoever sleeps is polled when it begins and when it is woken.
    assert!(polled > 2, "{polled}");
}

/// What is always ready would otherwise keep everything else of its thread waiting, such as whoever lets connections in.
#[tokio::test]
async fn a_driver_with_more_to_do_lets_others_have_their_turn() {
    let (mut driver, _near) = gateway("lorry", "127.0.0.0/8:9").await;
    for (moved, gives_way) in [(0, false), (usize::MAX, true), (0, false)] {
        let carrier = driver.carriers.values().next().expect("a transport");
        carrier.source.requeue();
        driver.busy.moved(moved);
        let mut next = pin!(driver.next_name());
        let first = poll_fn(|cx| Poll::Ready(next.as_mut().poll(cx))).await;
        assert_eq!(first.is_pending(), gives_way, "after {moved} bytes");
        if gives_way {
            timeout(PATIENCE, next).await.expect("its turn comes again");
        }
    }
}
