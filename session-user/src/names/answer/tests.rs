use std::time::Duration;

use hickory_proto::rr::rdata::opt::{EdnsCode, EdnsOption};
use proptest::prelude::*;

use super::*;
use crate::capture::{Action, CaptureRule};
use crate::names::Ranges;

const V4: &str = "198.18.0.0/15";

fn answers(ipv6: bool) -> Answers {
    let refuse = CaptureRule {
        names: vec!["ads.example".to_owned()],
        action: Action::Refuse,
        ..CaptureRule::capture(0)
    };
    let capture = CaptureRule {
        names: vec!["*.corp.example".to_owned()],
        ..CaptureRule::capture(0)
    };
    let ranges = Ranges {
        v4: V4.parse().unwrap(),
        v6: "fd00:1:2:3::/64".parse().unwrap(),
    };
    let nowhere = std::path::Path::new("/proc/nowhere");
    let book = Book::open(nowhere, ranges, Duration::from_secs(30)).unwrap();
    let rules = NameRules::new(&[refuse, capture]);
    Answers::new(Arc::new(rules), Arc::new(book), ipv6)
}

fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn reply(answers: &Answers, question: &Message) -> Reply {
    let bytes = question.to_vec().unwrap();
    answers.reply(&bytes, Carrier::Udp, Instant::now())
}

fn answered(answers: &Answers, question: &Message) -> Message {
    match reply(answers, question) {
        Reply::Answer(bytes) => Message::from_vec(&bytes).unwrap(),
        other => panic!("{other:?} to {question:?}"),
    }
}

fn ask(answers: &Answers, name: &str, kind: RecordType) -> Message {
    answered(answers, &question(name, kind))
}

#[test]
fn a_captured_name_has_reserved_addresses() {
    let answers = answers(true);
    let message = ask(&answers, "Db.CORP.example.", RecordType::A);
    let metadata = &message.metadata;
    assert_eq!(metadata.id, 4711);
    assert_eq!(metadata.message_type, MessageType::Response);
    assert_eq!(metadata.response_code, ResponseCode::NoError);
    assert!(metadata.recursion_available && metadata.recursion_desired);
    assert!(!metadata.authentic_data && !metadata.authoritative);
    // As it was asked, also its case (0x20).
    assert_eq!(message.queries[0].name.to_ascii(), "Db.CORP.example.");
    let [record] = &message.answers[..] else {
        panic!("{message:?}")
    };
    assert_eq!(
        (record.name.to_ascii().as_str(), record.ttl),
        ("Db.CORP.example.", 30)
    );
    let RData::A(A(v4)) = record.data else {
        panic!("{record:?}")
    };
    assert_eq!(
        answers.book.name_of(v4.into()).as_deref(),
        Some("db.corp.example")
    );
    let six = ask(&answers, "db.corp.example.", RecordType::AAAA);
    let RData::AAAA(AAAA(v6)) = six.answers[0].data else {
        panic!("{six:?}")
    };
    assert_eq!(
        answers.book.name_of(v6.into()).as_deref(),
        Some("db.corp.example")
    );
    assert_eq!(
        ask(&answers, "db.corp.example.", RecordType::ANY)
            .answers
            .len(),
        2
    );
}

/// The authority says for how long there is nothing.
fn assert_no_data(message: &Message, code: ResponseCode) {
    assert_eq!(message.metadata.response_code, code);
    assert!(message.answers.is_empty());
    let [record] = &message.authorities[..] else {
        panic!("{message:?}")
    };
    let RData::SOA(soa) = &record.data else {
        panic!("{record:?}")
    };
    assert_eq!((record.ttl, soa.minimum), (30, 30));
    assert!(record.name.zone_of(&message.queries[0].name));
}

#[test]
fn other_types_have_no_data() {
    let answers = answers(false);
    for kind in [
        RecordType::AAAA,
        RecordType::HTTPS,
        RecordType::SVCB,
        RecordType::MX,
        RecordType::TXT,
        RecordType::CNAME,
        RecordType::SRV,
        RecordType::Unknown(65_280),
    ] {
        assert_no_data(
            &ask(&answers, "db.corp.example.", kind),
            ResponseCode::NoError,
        );
    }
    let any = ask(&answers, "db.corp.example.", RecordType::ANY);
    assert_eq!(any.answers.len(), 1, "no IPv6 can be captured");
}

#[test]
fn a_refused_name_does_not_exist() {
    let answers = answers(true);
    for kind in [RecordType::A, RecordType::HTTPS] {
        assert_no_data(&ask(&answers, "ads.example.", kind), ResponseCode::NXDomain);
    }
    // No host is called so, and the peer would not look it up.
    let odd = Name::from_labels([b"a b".as_slice(), b"corp", b"example"]).unwrap();
    let mut message = Message::new(1, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(odd, RecordType::A));
    assert_no_data(&answered(&answers, &message), ResponseCode::NXDomain);
}

#[test]
fn other_names_are_handed_on() {
    let answers = answers(true);
    for name in ["corp.example.", "example.", "xcorp.example.", "."] {
        assert_eq!(
            reply(&answers, &question(name, RecordType::A)),
            Reply::Forward,
            "{name}"
        );
    }
    let mut update = Message::new(1, MessageType::Query, OpCode::Update);
    let zone = Name::from_ascii("example.").unwrap();
    update.add_query(Query::query(zone, RecordType::SOA));
    assert_eq!(reply(&answers, &update), Reply::Forward);
    let without = Message::new(1, MessageType::Query, OpCode::Query);
    assert_eq!(reply(&answers, &without), Reply::Forward);
}

#[test]
fn nothing_else_about_a_captured_name_is_handed_on() {
    let answers = answers(true);
    let mut update = question("x.corp.example.", RecordType::SOA);
    update.metadata.op_code = OpCode::Update;
    let mut chaos = question("x.corp.example.", RecordType::TXT);
    chaos.queries[0].query_class = DNSClass::CH;
    let mut two = question("www.example.", RecordType::A);
    two.add_query(question("x.corp.example.", RecordType::A).queries[0].clone());
    for (message, code) in [
        (update, ResponseCode::NotImp),
        (chaos, ResponseCode::Refused),
        (
            question("x.corp.example.", RecordType::AXFR),
            ResponseCode::Refused,
        ),
        (two, ResponseCode::FormErr),
    ] {
        assert_eq!(answered(&answers, &message).metadata.response_code, code);
    }
}

#[test]
fn reserved_addresses_tell_their_names() {
    let answers = answers(true);
    let message = ask(&answers, "db.corp.example.", RecordType::A);
    let RData::A(A(v4)) = message.answers[0].data else {
        panic!("{message:?}")
    };
    let reverse = |ip: IpAddr| Name::from(ip).to_ascii();
    let pointer = ask(&answers, &reverse(v4.into()), RecordType::PTR);
    assert_eq!(
        pointer.answers[0].data,
        RData::PTR(PTR(Name::from_ascii("db.corp.example.").unwrap()))
    );
    assert_no_data(
        &ask(&answers, &reverse(v4.into()), RecordType::A),
        ResponseCode::NoError,
    );
    let none = ask(&answers, "0.0.19.198.in-addr.arpa.", RecordType::PTR);
    assert_no_data(&none, ResponseCode::NXDomain);
    let part = ask(&answers, "1.19.198.in-addr.arpa.", RecordType::PTR);
    assert_no_data(&part, ResponseCode::NoError);
    let other = question("1.2.0.192.in-addr.arpa.", RecordType::PTR);
    assert_eq!(reply(&answers, &other), Reply::Forward);
}

#[test]
fn edns_is_answered_in_kind() {
    let answers = answers(true);
    let mut message = question("db.corp.example.", RecordType::A);
    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    edns.set_version(0);
    edns.set_dnssec_ok(true);
    let cookie = EdnsOption::Unknown(10, vec![1; 8]);
    edns.options_mut().insert(cookie);
    message.set_edns(edns);
    message.metadata.checking_disabled = true;
    let answer = answered(&answers, &message);
    let ours = answer.edns.as_ref().unwrap();
    assert_eq!((ours.version(), ours.max_payload()), (0, PAYLOAD));
    assert!(ours.flags().dnssec_ok && ours.option(EdnsCode::Cookie).is_none());
    assert!(answer.metadata.checking_disabled && !answer.metadata.authentic_data);
    message.edns.as_mut().unwrap().set_version(1);
    let answer = answered(&answers, &message);
    // The number has two names (RFC 6895, 2.3).
    assert_eq!(u16::from(answer.metadata.response_code), 16);
    assert!(answer.answers.is_empty());
    let plain = ask(&answers, "db.corp.example.", RecordType::A);
    assert!(plain.edns.is_none(), "nobody spoke of it");
}

#[test]
fn what_is_no_question_gets_no_answer_and_what_cannot_be_read_is_no_leak() {
    let answers = answers(true);
    let told = |bytes: &[u8]| answers.reply(bytes, Carrier::Udp, Instant::now());
    assert_eq!(told(&[]), Reply::Nothing);
    assert_eq!(told(&[0; 11]), Reply::Nothing);
    let mut answer = question("www.example.", RecordType::A);
    answer.metadata.message_type = MessageType::Response;
    assert_eq!(told(&answer.to_vec().unwrap()), Reply::Nothing);
    let whole = question("x.corp.example.", RecordType::A).to_vec().unwrap();
    for cut in HEADER_BYTES..whole.len() {
        let Reply::Answer(bytes) = told(&whole[..cut]) else {
            panic!("cut at {cut}")
        };
        let message = Message::from_vec(&bytes).unwrap();
        assert_eq!(message.metadata.response_code, ResponseCode::FormErr);
        assert_eq!(message.metadata.id, 4711);
    }
    // A name that points to itself.
    let mut loops = whole[..HEADER_BYTES].to_vec();
    loops.extend_from_slice(&[0xc0, 0x0c, 0, 1, 0, 1]);
    assert!(matches!(told(&loops), Reply::Answer(_)));
}

#[test]
fn an_answer_belongs_to_its_question() {
    let question = question("www.example.", RecordType::A).to_vec().unwrap();
    let mut answer = question.clone();
    assert!(!belongs(&answer, &question), "an echo is no answer");
    answer[2] |= 0x80;
    assert!(belongs(&answer, &question));
    answer[1] ^= 1;
    assert!(!belongs(&answer, &question));
    assert!(!belongs(&[], &question));
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let answers = answers(true);
        if let Reply::Answer(answer) = answers.reply(&bytes, Carrier::Udp, Instant::now()) {
            prop_assert!(answer.len() <= usize::from(PAYLOAD));
            prop_assert!(Message::from_vec(&answer).is_ok());
        }
    }

    #[test]
    fn whatever_is_done_to_a_question_it_does_not_leak(
        at in 0_usize..HEADER_BYTES,
        bit in 0_u8..8,
        label in "[a-zA-Z0-9_]{1,20}",
    ) {
        let answers = answers(true);
        let name = format!("{label}.corp.example.");
        let mut bytes = question(&name, RecordType::A).to_vec().unwrap();
        // The number of questions is spared: without it there is none.
        if !(4..6).contains(&at) {
            bytes[at] ^= 1 << bit;
        }
        let reply = answers.reply(&bytes, Carrier::Udp, Instant::now());
        prop_assert_ne!(reply, Reply::Forward);
    }

    #[test]
    fn long_names_are_answered_within_the_limit(labels in prop::collection::vec("[a-z]{1,60}", 1..4)) {
        let answers = answers(true);
        let name = format!("{}.corp.example.", labels.join("."));
        let message = ask(&answers, &name, RecordType::ANY);
        prop_assert_eq!(message.answers.len(), 2);
        prop_assert!(message.to_vec().unwrap().len() <= usize::from(PAYLOAD_MIN));
    }
}
