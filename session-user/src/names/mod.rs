//! Host names: which are captured, what is answered to questions about them, and which address stands for which.
//!
//! A captured name is answered with addresses of ranges that are reserved for that. When an application connects to
//! one, the name is found by the address, and the peer resolves it. So the peer's resolver decides what a name means,
//! and no other ever hears of it.
//!
//! - `rules` decides about names, `book` knows their addresses, `answer` writes answers;
//! - `resolver` takes the questions of captured applications, `listener` those that come to a port.

mod answer;
mod book;
mod listener;
mod resolver;
mod rules;
mod stream;

pub use answer::{Answers, Carrier, Reply};
pub use book::{Addresses, Book, BookError, Lease, Ranges};
pub use listener::{ListenError, Listening, Place};
pub use resolver::{Conversation, Resolver, Way};
pub use rules::{Decision, NameRules, Way as NameWay};

/// Whether a name, in lower case, is one that a host can have: the peer is told no other.
fn is_host(name: &str) -> bool {
    let of_host = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    (1..=253).contains(&name.len()) && name.bytes().all(of_host)
}
