//! The answer to a question about a name, or that the question is for somebody else.
//!
//! | question | answer for a captured name |
//! |---|---|
//! | A | its reserved IPv4 address |
//! | AAAA | its reserved IPv6 address; none on a host where no IPv6 can be captured |
//! | ANY | both (RFC 8482 allows a part) |
//! | PTR of a reserved address | the name; NXDOMAIN if it stands for none |
//! | HTTPS, SVCB and every other type | no data: there may be, but only the peer's resolver knows |
//! | another class, another operation, a zone transfer | REFUSED or NOTIMP |
//!
//! Nothing of a captured name is ever handed on, however odd the question is: what cannot be read cannot be told from
//! one, so it is answered with FORMERR.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use hickory_proto::op::{
    Edns, Header, Message, MessageType, Metadata, OpCode, Query, ResponseCode,
};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};
use ipnet::IpNet;

use super::book::Book;
use super::is_host;
use super::rules::{Decision, NameRules};

/// Largest datagram that is promised to arrive whole, and what we say that we take (DNS flag day 2020).
const PAYLOAD: u16 = 1232;
/// Largest answer to somebody who says nothing of it (RFC 1035, 4.2.1).
const PAYLOAD_MIN: u16 = 512;
/// Bytes of a header (RFC 1035, 4.1.1).
const HEADER_BYTES: usize = 12;

/// What carries a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// Datagrams, which limit an answer's length.
    Udp,
    /// A stream.
    Tcp,
}

/// What is done about a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It is answered with this.
    Answer(Vec<u8>),
    /// It goes on as it is.
    Forward,
    /// It is no question at all.
    Nothing,
}

/// Answers questions about captured names.
#[derive(Clone, Debug)]
pub struct Answers {
    rules: Arc<NameRules>,
    book: Arc<Book>,
    /// Whether connections to IPv6 addresses can be captured.
    ipv6: bool,
}

/// A question that was read.
struct Asked<'a> {
    metadata: Metadata,
    query: Query,
    /// All of it.
    whole: &'a [u8],
    carrier: Carrier,
}

/// What is said about a name.
enum Said {
    Records(Vec<RData>),
    NoSuchName,
    Code(ResponseCode),
}

impl Answers {
    /// Answers by these rules, with addresses of this book.
    pub fn new(rules: Arc<NameRules>, book: Arc<Book>, ipv6: bool) -> Self {
        Self { rules, book, ipv6 }
    }

    /// What is done about `question`, a whole message.
    pub fn reply(&self, question: &[u8], carrier: Carrier, now: Instant) -> Reply {
        let mut decoder = BinDecoder::new(question);
        let Ok(header) = Header::read(&mut decoder) else {
            return Reply::Nothing;
        };
        if header.metadata.message_type == MessageType::Response {
            return Reply::Nothing;
        }
        let query = match header.counts.queries {
            // Such as one for a cookie alone (RFC 7873, 5.4): it names nothing.
            0 => return Reply::Forward,
            1 => Query::read(&mut decoder),
            // RFC 9619.
            _ => return only_code(header.metadata, ResponseCode::FormErr),
        };
        let Ok(query) = query else {
            return only_code(header.metadata, ResponseCode::FormErr);
        };
        let asked = Asked {
            metadata: header.metadata,
            query,
            whole: question,
            carrier,
        };
        let Some(said) = self.say(&asked, now) else {
            return Reply::Forward;
        };
        self.write(&asked, said)
    }

    /// What is said to it; `None` if that is somebody else's to say.
    fn say(&self, asked: &Asked<'_>, now: Instant) -> Option<Said> {
        let name = plain(&asked.query.name);
        let decision = self.rules.decide(&name);
        let address = self.address(&asked.query.name);
        if matches!(decision, Decision::Direct(_)) && address.is_none() {
            return None;
        }
        if asked.metadata.op_code != OpCode::Query {
            return Some(Said::Code(ResponseCode::NotImp));
        }
        let class = asked.query.query_class;
        let transfer = matches!(asked.query.query_type, RecordType::AXFR | RecordType::IXFR);
        if transfer || !matches!(class, DNSClass::IN | DNSClass::ANY) {
            return Some(Said::Code(ResponseCode::Refused));
        }
        Some(match (decision, address) {
            (Decision::Capture(_), _) => self.captured(&name, asked.query.query_type, now),
            (Decision::Direct(_), Some(net)) => self.pointer(net, asked.query.query_type),
            _ => Said::NoSuchName,
        })
    }

    fn captured(&self, name: &str, kind: RecordType, now: Instant) -> Said {
        // The peer is told it as a host's name, and no host is called otherwise.
        if !is_host(name) {
            return Said::NoSuchName;
        }
        let wants4 = matches!(kind, RecordType::A | RecordType::ANY);
        let wants6 = matches!(kind, RecordType::AAAA | RecordType::ANY) && self.ipv6;
        if !wants4 && !wants6 {
            return Said::Records(Vec::new());
        }
        let Some(addresses) = self.book.answer(name, now) else {
            tracing::error!(
                name,
                "no reserved address is free for a name: make [dns] range4 larger, or its ttl shorter"
            );
            return Said::Code(ResponseCode::ServFail);
        };
        let v4 = wants4.then_some(RData::A(A(addresses.v4)));
        let v6 = wants6.then_some(RData::AAAA(AAAA(addresses.v6)));
        Said::Records(v4.into_iter().chain(v6).collect())
    }

    /// The part of the reserved ranges whose reverse name it is.
    fn address(&self, name: &Name) -> Option<IpNet> {
        let net = name.parse_arpa_name().ok()?;
        let ranges = self.book.ranges().networks();
        ranges
            .iter()
            .any(|range| range.contains(&net))
            .then_some(net)
    }

    fn pointer(&self, net: IpNet, kind: RecordType) -> Said {
        if net.prefix_len() < net.max_prefix_len() {
            // There may be names below it.
            return Said::Records(Vec::new());
        }
        let ip: IpAddr = net.addr();
        let name = self.book.name_of(ip);
        let name = name.and_then(|name| Name::from_ascii(format!("{name}.")).ok());
        match name {
            None => Said::NoSuchName,
            Some(name) if matches!(kind, RecordType::PTR | RecordType::ANY) => {
                Said::Records(vec![RData::PTR(PTR(name))])
            }
            Some(_) => Said::Records(Vec::new()),
        }
    }

    fn write(&self, asked: &Asked<'_>, said: Said) -> Reply {
        let Ok(whole) = Message::from_vec(asked.whole) else {
            return only_code(asked.metadata, ResponseCode::FormErr);
        };
        let mut answer = Message::response(asked.metadata.id, asked.metadata.op_code);
        answer.metadata = Metadata::response_from_request(&asked.metadata);
        answer.metadata.recursion_available = true;
        answer.add_query(asked.query.clone());
        let limit = whole.edns.as_ref().map_or(PAYLOAD_MIN, Edns::max_payload);
        let limit = limit.clamp(PAYLOAD_MIN, PAYLOAD);
        let unknown_version = whole.edns.as_ref().is_some_and(|edns| edns.version() > 0);
        if let Some(edns) = &whole.edns {
            let mut ours = Edns::new();
            ours.set_version(0);
            ours.set_max_payload(PAYLOAD);
            ours.set_dnssec_ok(edns.flags().dnssec_ok);
            answer.set_edns(ours);
        }
        let said = if unknown_version {
            Said::Code(ResponseCode::BADVERS)
        } else {
            said
        };
        self.fill(&mut answer, &asked.query.name, said);
        let written = match answer.to_vec() {
            Ok(bytes) if asked.carrier == Carrier::Udp && bytes.len() > usize::from(limit) => {
                answer.truncate().to_vec()
            }
            written => written,
        };
        match written {
            Ok(bytes) => Reply::Answer(bytes),
            Err(error) => {
                tracing::error!(%error, "an answer could not be written");
                only_code(asked.metadata, ResponseCode::ServFail)
            }
        }
    }

    fn fill(&self, answer: &mut Message, name: &Name, said: Said) {
        let ttl = self.book.ttl().as_secs().try_into().unwrap_or(u32::MAX);
        let records = match said {
            Said::Records(records) => records,
            Said::NoSuchName => {
                answer.metadata.response_code = ResponseCode::NXDomain;
                Vec::new()
            }
            Said::Code(code) => {
                answer.metadata.response_code = code;
                if let Some(edns) = &mut answer.edns {
                    edns.set_rcode_high(code.high());
                }
                return;
            }
        };
        if records.is_empty() {
            answer.add_authority(start_of_authority(name, ttl));
        }
        for data in records {
            answer.add_answer(Record::from_rdata(name.clone(), ttl, data));
        }
    }
}

/// Says for how long it may be remembered that there is nothing (RFC 2308, 5).
fn start_of_authority(name: &Name, ttl: u32) -> Record {
    let ours = |text: &str| Name::from_ascii(text).unwrap_or_else(|_| Name::root());
    let data = SOA::new(
        ours("holdfast.invalid."),
        ours("hostmaster.holdfast.invalid."),
        1,
        3600,
        600,
        86_400,
        ttl,
    );
    Record::from_rdata(name.base_name(), ttl, RData::SOA(data))
}

/// A name as rules and the book have it: in lower case, without the dot at its end. Bytes that no host's name has are
/// escaped.
fn plain(name: &Name) -> String {
    let mut text = name.to_lowercase().to_ascii();
    if text.ends_with('.') {
        text.pop();
    }
    text
}

/// An answer without anything but the header.
fn only_code(asked: Metadata, code: ResponseCode) -> Reply {
    let mut answer = Message::response(asked.id, asked.op_code);
    answer.metadata = Metadata::response_from_request(&asked);
    answer.metadata.recursion_available = true;
    answer.metadata.response_code = code;
    match answer.to_vec() {
        Ok(bytes) => Reply::Answer(bytes),
        Err(_) => Reply::Nothing,
    }
}

/// Whether `answer` is one to `question`: it bears its number and says that it is an answer. What a socket receives
/// that is connected to the resolver is the resolver's, but may be late for an earlier question.
pub(super) fn belongs(answer: &[u8], question: &[u8]) -> bool {
    answer.len() >= HEADER_BYTES
        && question.len() >= HEADER_BYTES
        && answer[..2] == question[..2]
        && answer[2] & 0x80 != 0
}

#[cfg(test)]
mod tests;
