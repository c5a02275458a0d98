//! What a case asks of the peer program: one JSON object a line, over a connection that is not captured.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// A request.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// Listen, and do as the script says with each connection.
    Tcp(Tcp),
    /// Open UDP sockets.
    Udp(Udp),
    /// Let the steps [`Step::Go`] of a script pass, once more.
    Go(u32),
    /// Say what the connections of a script have seen, when they have ended.
    Report(u32),
    /// Send a datagram from the first socket of a UDP script.
    SendTo {
        /// The script.
        script: u32,
        /// Where to.
        to: SocketAddr,
        /// What.
        bytes: Vec<u8>,
    },
}

/// An answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The script's name, and the ports that it is behind.
    Ports(u32, Vec<u16>),
    /// Done.
    Done,
    /// The notes of each connection, in the order of their acceptance.
    Report(Vec<Vec<String>>),
    /// It cannot be done.
    Error(String),
}

/// How the peer listens.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Tcp {
    /// IPv6 or IPv4.
    pub v6: bool,
    /// What is done with each connection, in order.
    pub steps: Vec<Step>,
    /// How many connections are accepted.
    pub connections: usize,
    /// listen(2)'s backlog.
    pub backlog: i32,
    /// Accept only after a [`Ask::Go`].
    pub accept_on_go: bool,
    /// Fill the backlog with connections of its own, which are closed before the first is accepted.
    pub full: bool,
    /// Whether data in a SYN is taken.
    pub fast_open: bool,
    /// SO_RCVBUF of what is accepted.
    pub receive_buffer: Option<usize>,
    /// Echo to any number of connections, without steps.
    pub many: bool,
}

/// One thing that the peer does with a connection. Each leaves a line in the report, if there is anything to
/// say.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Read so many bytes.
    Read(usize),
    /// Read until the end or an error.
    ReadToEnd,
    /// Read to the end in pieces of so many bytes, with so many milliseconds between.
    ReadSlowly(usize, u64),
    /// Send so many bytes of the pattern.
    Send(usize),
    /// Send these bytes.
    Say(Vec<u8>),
    /// Send these bytes as urgent.
    SayUrgent(Vec<u8>),
    /// Wait for urgent data and read it out of band.
    ReadUrgent,
    /// Wait for urgent data, then read to the end, and say where the mark was.
    ReadAroundMark,
    /// Send back what comes, until the end.
    Echo,
    /// Send until it fails.
    SendUntilError,
    /// Wait until so many bytes are there to be read.
    AwaitUnread(usize),
    /// End our direction.
    ShutdownWrite,
    /// Close with a reset.
    Reset,
    /// Close.
    Close,
    /// Wait for the case to say go.
    Go,
    /// Say what kind of address the connection comes from.
    Source,
}

/// How the peer's UDP sockets behave.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Udp {
    /// IPv6 or IPv4.
    pub v6: bool,
    /// How many sockets, each with a port of its own.
    pub sockets: usize,
    /// What they do with a datagram.
    pub how: UdpHow,
}

/// What a UDP socket of the peer does with a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UdpHow {
    /// Sends it back.
    Echo,
    /// Sends it back with the type of service that it came with.
    EchoService,
    /// Answers with its length, its hash and its type of service.
    Describe,
    /// Sends it back from another port first, then from its own.
    StrangerFirst,
    /// Answers with the address that it came from.
    Whence,
    /// Answers from a new port, which sends back what comes there.
    NewPort,
    /// Answers with as many bytes of the pattern as the datagram's text says.
    Grow,
    /// Keeps quiet.
    Quiet,
}
