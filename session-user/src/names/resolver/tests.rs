use std::path::Path;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::super::stream::{read_message, write_message};
use super::*;
use crate::capture::CaptureRule;
use crate::names::{Book, Listening, NameRules, Place, Ranges};

fn resolver() -> Resolver {
    let capture = CaptureRule {
        names: vec!["*.corp.example".to_owned()],
        ..CaptureRule::capture(0)
    };
    let ranges = Ranges {
        v4: "198.18.0.0/15".parse().unwrap(),
        v6: "fd00:1:2:3::/64".parse().unwrap(),
    };
    let book = Book::open(Path::new("/proc/nowhere"), ranges, Duration::from_secs(30)).unwrap();
    let rules = NameRules::new(&[capture]);
    Resolver::new(Answers::new(Arc::new(rules), Arc::new(book), true))
}

fn question(name: &str) -> Vec<u8> {
    let mut message = Message::new(77, MessageType::Query, OpCode::Query);
    let name = Name::from_ascii(name).unwrap();
    message.add_query(Query::query(name, RecordType::A));
    message.to_vec().unwrap()
}

/// What the resolver of these tests says to everything: odd on purpose, for it must come through as it is.
fn said_to(question: &[u8]) -> Vec<u8> {
    let mut answer = question.to_vec();
    answer[2] |= 0x80;
    answer.extend_from_slice(b"odd bytes behind it");
    answer
}

fn is_reserved(answer: &[u8]) -> bool {
    let message = Message::from_vec(answer).unwrap();
    assert_eq!(message.metadata.response_code, ResponseCode::NoError);
    matches!(message.answers[0].data, RData::A(a) if a.0.octets()[0] == 198)
}

/// A resolver over UDP that tells what it was asked. It says something wrong first.
async fn upstream_udp() -> (SocketAddr, mpsc::Receiver<Vec<u8>>) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    let (heard, seen) = mpsc::channel(16);
    tokio::spawn(async move {
        let mut buffer = vec![0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let question = buffer[..length].to_vec();
            let mut late = said_to(&question);
            late[0] ^= 0xff;
            socket.send_to(&late, from).await.unwrap();
            socket.send_to(&said_to(&question), from).await.unwrap();
            if heard.send(question).await.is_err() {
                return;
            }
        }
    });
    (at, seen)
}

/// A resolver over TCP that answers one connection's questions until it ends.
async fn upstream_tcp() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            while let Ok(Some(question)) = read_message(&mut socket).await {
                write_message(&mut socket, &said_to(&question))
                    .await
                    .unwrap();
            }
        }
    });
    at
}

#[tokio::test]
async fn what_is_not_captured_goes_on_and_comes_back_as_it_is() {
    let resolver = resolver();
    let (at, mut seen) = upstream_udp().await;
    let asked = question("www.example.");
    let answer = resolver.answer(&asked, at, &Way::Direct).await;
    assert_eq!(answer, Ok(Some(said_to(&asked))));
    assert_eq!(seen.recv().await, Some(asked));
    let answer = resolver
        .answer(&question("db.corp.example."), at, &Way::Direct)
        .await;
    assert!(is_reserved(&answer.unwrap().unwrap()));
    assert!(seen.try_recv().is_err(), "nobody else hears of it");
}

#[tokio::test]
async fn a_resolver_that_is_not_there_refuses() {
    let free = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let at = free.local_addr().unwrap();
    drop(free);
    let answer = resolver()
        .answer(&question("www.example."), at, &Way::Direct)
        .await;
    assert_eq!(answer, Err(libc::ECONNREFUSED));
}

#[tokio::test]
async fn a_peer_carries_what_its_rule_captures() {
    let queue = Arc::new(RequestQueue::default());
    let way = Way::Peer(Arc::clone(&queue));
    let at: SocketAddr = "192.0.2.53:53".parse().unwrap();
    let asked = question("www.example.");
    let resolver = resolver();
    let asking = resolver.answer(&asked, at, &way);
    let carrying = async {
        queue.flows.available().await;
        let Some(FlowInput::Datagram(flow, data, _)) = queue.flows.pop() else {
            panic!("no datagram")
        };
        assert_eq!(
            (flow.target.to_string(), &data[..]),
            (at.to_string(), &asked[..])
        );
        flow.end().deliver(&said_to(&data));
    };
    let (answer, ()) = tokio::join!(asking, carrying);
    assert_eq!(answer, Ok(Some(said_to(&asked))));
    assert!(matches!(queue.flows.pop(), Some(FlowInput::Closed(_))));
}

/// Both ends of an application's connection.
async fn connection() -> (TcpStream, AppStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let app = TcpStream::connect(listener.local_addr().unwrap())
        .await
        .unwrap();
    let near = AppStream::from(listener.accept().await.unwrap().0);
    near.reset_on_close(true).unwrap();
    (app, near)
}

async fn asks_both(app: &mut TcpStream) {
    for _ in 0..2 {
        write_message(app, &question("www.example.")).await.unwrap();
        let answer = read_message(app).await.unwrap().unwrap();
        assert_eq!(answer, said_to(&question("www.example.")));
        write_message(app, &question("db.corp.example."))
            .await
            .unwrap();
        assert!(is_reserved(&read_message(app).await.unwrap().unwrap()));
    }
}

#[tokio::test]
async fn a_connection_carries_both_kinds_of_questions_and_ends_in_order() {
    let (mut app, near) = connection().await;
    resolver().serve(Conversation {
        resolver: upstream_tcp().await,
        way: Way::Direct,
        app: "a test".to_owned().into(),
        cgroup: 0,
        supply: Supply::Connected(near),
    });
    asks_both(&mut app).await;
    app.shutdown().await.unwrap();
    let mut rest = Vec::new();
    assert_eq!(
        app.read_to_end(&mut rest).await.unwrap(),
        0,
        "an end, not a reset"
    );
}

#[tokio::test]
async fn who_waits_is_told_what_the_resolver_says() {
    let serve = |resolver_at, way| {
        let (asker, answer) = Asker::new();
        resolver().serve(Conversation {
            resolver: resolver_at,
            way,
            app: "a test".to_owned().into(),
            cgroup: 0,
            supply: Supply::Waiting(asker),
        });
        answer
    };
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let nobody = free.local_addr().unwrap();
    drop(free);
    let answer = serve(nobody, Way::Direct).await.unwrap();
    assert!(
        matches!(answer, Answer::Refused(libc::ECONNREFUSED)),
        "{answer:?}"
    );

    let Answer::Connected(seat) = serve(upstream_tcp().await, Way::Direct).await.unwrap() else {
        panic!("it is connected")
    };
    let (mut app, near) = connection().await;
    seat.send(near).unwrap();
    asks_both(&mut app).await;

    // The same through a peer, whose driver is played here.
    let queue = Arc::new(RequestQueue::default());
    let at: SocketAddr = "192.0.2.53:53".parse().unwrap();
    let answer = serve(at, Way::Peer(Arc::clone(&queue)));
    queue.available().await;
    let request = queue.pop().unwrap();
    assert_eq!(request.target, Target::Addr(at));
    let Supply::Waiting(driver) = request.supply else {
        panic!("it waits")
    };
    let upstream = upstream_tcp().await;
    tokio::spawn(async move {
        let mut stream = driver.connected().await.unwrap();
        let mut target = TcpStream::connect(upstream).await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut stream, &mut target).await;
    });
    let Answer::Connected(seat) = answer.await.unwrap() else {
        panic!("it is connected")
    };
    let (mut app, near) = connection().await;
    seat.send(near).unwrap();
    asks_both(&mut app).await;
}

#[tokio::test]
async fn a_port_answers_over_udp_and_tcp() {
    let dir = tempfile::tempdir().unwrap();
    let (upstream, _seen) = upstream_udp().await;
    let free = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let at = free.local_addr().unwrap();
    drop(free);
    let place = |at, upstream| Place {
        at,
        from: Vec::new(),
        upstream,
        resolv_conf: dir.path().join("resolv.conf"),
    };
    let _listening = Listening::open([place(at, vec![at, upstream])], &resolver()).unwrap();
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.connect(at).await.unwrap();
    let mut buffer = vec![0; 2048];
    client.send(&question("www.example.")).await.unwrap();
    let length = client.recv(&mut buffer).await.unwrap();
    assert_eq!(buffer[..length], said_to(&question("www.example.")));
    client.send(&question("db.corp.example.")).await.unwrap();
    let length = client.recv(&mut buffer).await.unwrap();
    assert!(is_reserved(&buffer[..length]));
    let mut client = TcpStream::connect(at).await.unwrap();
    write_message(&mut client, &question("db.corp.example."))
        .await
        .unwrap();
    assert!(is_reserved(
        &read_message(&mut client).await.unwrap().unwrap()
    ));
}

#[tokio::test]
async fn captured_datagrams_are_answered_by_their_flow() {
    let (at, _seen) = upstream_udp().await;
    let questions = Arc::new(FlowQueue::default());
    let serving = resolver().serve_datagrams(Arc::clone(&questions), Way::Direct);
    let serving = tokio::spawn(serving);
    let (answered, mut answers) = mpsc::channel(4);
    let end = Box::new(OneAnswer(answered));
    let flow = Arc::new(AppFlow::new(
        Target::Addr(at),
        "a test".to_owned(),
        None,
        end,
    ));
    questions.push(&flow, question("www.example.").into());
    let answer = answers.recv().await.unwrap();
    assert_eq!(answer, Ok(said_to(&question("www.example."))));
    questions.push(&flow, question("db.corp.example.").into());
    assert!(is_reserved(&answers.recv().await.unwrap().unwrap()));
    serving.abort();
}
