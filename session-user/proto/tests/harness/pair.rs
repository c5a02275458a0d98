//! Two sessions and the bytes between them.

use std::io::IoSlice;

use bytes::BytesMut;
use session_proto::Time;
use session_proto::seal::{Aead, Secret, SessionSecret};
use session_proto::session::{Config, Event, Handle, Session, TransportFault};
use session_proto::wire::Preamble;

/// The only point in time: nothing here depends on its passing but acknowledgements, for which
/// [`Pair::settle`] goes on to [`LATER`].
pub const NOW: Time = Time::from_nanos(1_000_000_000);
/// When every acknowledgement is due.
pub const LATER: Time = Time::from_nanos(2_000_000_000);

/// An initiator and a responder.
pub struct Pair {
    pub client: Session,
    pub server: Session,
    first: (Handle, Handle),
}

/// All bytes that `session` has for `handle`.
fn drain(session: &mut Session, now: Time, handle: Handle) -> Vec<u8> {
    let mut out = Vec::new();
    while session.prepare(now, handle) {
        let mut slices = [IoSlice::new(&[]); 16];
        let filled = session.slices(handle, &mut slices);
        let len: usize = slices[..filled].iter().map(|s| s.len()).sum();
        out.extend(slices[..filled].iter().flat_map(|s| s.iter().copied()));
        session.transmitted(now, handle, len);
    }
    out
}

fn take(
    session: &mut Session,
    handle: Handle,
    bytes: &[u8],
    reads: usize,
) -> Result<(), TransportFault> {
    let mut input = BytesMut::new();
    for read in bytes.chunks(reads) {
        input.extend_from_slice(read);
        session.handle_bytes(NOW, handle, &mut input)?;
    }
    Ok(())
}

impl Pair {
    /// Both open, on one transport.
    pub fn established() -> Self {
        Self::with_config(&Config::default())
    }

    /// The same with limits of its own.
    pub fn with_config(config: &Config) -> Self {
        let secret = || SessionSecret::new(Aead::Aes128Gcm, &Secret::new([3; 32]));
        let (client, client_wire) = Session::initiate(NOW, config.clone(), secret(), None);
        let (server, server_wire) = Session::respond(NOW, config.clone(), secret());
        let mut pair = Self {
            client,
            server,
            first: (client_wire, server_wire),
        };
        let hello = pair.client_bytes(client_wire);
        pair.server_takes(server_wire, &hello, usize::MAX)
            .expect("HELLO is taken");
        assert!(matches!(pair.server.poll_event(), Some(Event::Hello(_))));
        pair.server.accept(None);
        let accept = pair.server_bytes(server_wire);
        pair.client_takes(client_wire, &accept, usize::MAX)
            .expect("ACCEPT is taken");
        assert!(matches!(pair.client.poll_event(), Some(Event::Accepted(_))));
        pair
    }

    pub fn first_transport(&self) -> (Handle, Handle) {
        self.first
    }

    pub fn client_bytes(&mut self, handle: Handle) -> Vec<u8> {
        drain(&mut self.client, NOW, handle)
    }

    pub fn server_bytes(&mut self, handle: Handle) -> Vec<u8> {
        drain(&mut self.server, NOW, handle)
    }

    pub fn client_takes(
        &mut self,
        handle: Handle,
        bytes: &[u8],
        reads: usize,
    ) -> Result<(), TransportFault> {
        take(&mut self.client, handle, bytes, reads)
    }

    /// The server's driver takes the preamble off, as it must before there is a session to ask.
    pub fn server_takes(
        &mut self,
        handle: Handle,
        bytes: &[u8],
        reads: usize,
    ) -> Result<(), TransportFault> {
        take(&mut self.server, handle, bytes, reads)
    }

    /// The transport is gone at both ends.
    pub fn lose(&mut self, client: Handle, server: Handle) {
        self.client.transport_lost(client);
        self.server.transport_lost(server);
    }

    /// The client dials; the server recognises the token. Its preamble has been taken off.
    pub fn dial(&mut self) -> (Handle, Handle) {
        let counter = self.client.next_counter();
        let client = self.client.dial(false).expect("the session is open");
        let known = self.server.expected_tokens();
        let (token, _) = known
            .iter()
            .find(|(_, c)| *c == counter)
            .expect("within the window");
        let mut slices = [IoSlice::new(&[]); 1];
        assert!(self.client.prepare(NOW, client));
        assert_eq!(self.client.slices(client, &mut slices), 1);
        let (preamble, used) = Preamble::parse(&slices[0])
            .expect("well-formed")
            .expect("whole");
        assert_eq!(super::token_of(&preamble), Some(*token));
        self.client.transmitted(NOW, client, used);
        let server = self
            .server
            .accept_transport(counter)
            .expect("a new counter");
        (client, server)
    }

    /// Carries bytes both ways until neither has any.
    pub fn settle(&mut self, client: Handle, server: Handle) {
        loop {
            let up = drain(&mut self.client, LATER, client);
            self.server_takes(server, &up, usize::MAX)
                .expect("honest bytes");
            let down = drain(&mut self.server, LATER, server);
            self.client_takes(client, &down, usize::MAX)
                .expect("honest bytes");
            if up.is_empty() && down.is_empty() {
                return;
            }
        }
    }
}
