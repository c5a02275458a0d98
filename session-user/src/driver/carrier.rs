//! Transport sockets.

use std::io::{self, IoSlice};
use std::net::{Shutdown, SocketAddr};
use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use session_proto::Time;
use session_proto::session::{Handle, TransportFault};
use socket2::SockRef;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

use super::handover::{Move, path_info};
use super::input::Input;
use super::links::link_of;
use super::opening::{Opening, had_opened, in_syn};
use super::ready::Source;
use super::{Driver, Name, Side};
use crate::trace::Trigger;
use crate::transport::{
    Losses, Pacing, TcpInfo, adopt, slices_within, tcp_info, write_apart, write_together,
};

/// Reads of one socket in one turn, before the others get theirs.
const READS_PER_TURN: usize = 4;
/// Buffers of one vectored write.
const WRITE_SLICES: usize = 64;

/// While something arrives, the kernel's acknowledgements are looked at so often: whether they go on
/// tells a queue from a hole.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// A transport that has sent less says nothing of what its path takes.
const WINDOW_BYTES: u64 = 256 * 1024;
/// Segments that are guessed at most, where less than the window was under way.
const WINDOW_GUESS: u32 = 256;
/// Paths whose window is remembered.
const WINDOWS_MAX: usize = 64;

/// Where a transport runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    /// The link that it is bound to; for one that the peer dialled, the link that holds our address,
    /// and empty where none does.
    pub link: String,
    /// Our address.
    pub local: SocketAddr,
    /// The peer's address.
    pub remote: SocketAddr,
}

/// One transport's socket.
pub(super) struct Carrier {
    pub socket: TcpStream,
    pub source: Source<Name>,
    pub path: Path,
    pub input: Input,
    /// It ends soon if what it sends is not acknowledged: until then at least. None: it is patient.
    pub impatient_until: Option<Instant>,
    pub since: Instant,
    /// Nobody has answered its SYN yet.
    pub opening: Option<Opening>,
    /// A transport that is not authenticated by then is dropped.
    pub must_be_up_by: Option<Instant>,
    /// The driver's turn in which both ends were authenticated on it.
    pub up_turn: Option<u64>,
    pub bytes_in: u64,
    /// When bytes last came.
    pub heard_at: Instant,
    pub bytes_out: u64,
    /// Segments that the peer's TCP has acknowledged, since when it is no more, and when that was looked at.
    delivered: u32,
    pub acked_since: Instant,
    /// Segments that had come beyond a missing one then.
    out_of_order: u32,
    looked_at: Instant,
    /// When to see whether the peer's TCP still acknowledges.
    pub watch_at: Option<Instant>,
    /// It has fallen silent, and is given up then unless it answers.
    pub doomed_at: Option<Instant>,
    pub pacing: Pacing,
    pub losses: Losses,
    /// The congestion control is the one for bulk.
    pub in_bulk: bool,
    /// Largest segment that it was dialled with, if it was limited.
    pub segment: Option<u16>,
    /// When to see whether the path swallows what was sent on it.
    pub swallow_at: Option<Instant>,
    /// When it fell silent: segments that had come beyond a missing one, and [`Self::bytes_in`].
    pub at_silence: (u32, u64),
}

impl Carrier {
    /// Asks the kernel how the connection is doing.
    pub fn look(&mut self) -> Option<TcpInfo> {
        let info = tcp_info(&self.socket).ok()?;
        self.looked_at = Instant::now();
        // Where all was delivered, answers may wait behind a segment of the peer's that is missing.
        let waiting = info.unacked == 0 && info.out_of_order != self.out_of_order;
        if info.delivered != self.delivered {
            // That was then, however long nobody looked.
            let at = self.looked_at.checked_sub(info.last_ack);
            self.acked_since = at.map_or(self.looked_at, |at| at.max(self.acked_since));
        } else if waiting {
            self.acked_since = self.looked_at;
        }
        self.delivered = info.delivered;
        self.out_of_order = info.out_of_order;
        Some(info)
    }

    /// Ends the connection in order; what is queued in the kernel still goes out.
    pub fn finish(self) {
        // The other end may have gone first: there is nobody left to tell.
        let _ = SockRef::from(&self.socket).shutdown(Shutdown::Both);
    }

    /// Ends the connection at once: its link is gone, and the kernel need not go on trying.
    fn discard(self) {
        let _ = SockRef::from(&self.socket).set_linger(Some(Duration::ZERO));
    }
}

impl Driver {
    pub(super) fn add_carrier(
        &mut self,
        handle: Handle,
        socket: TcpStream,
        input: BytesMut,
        mut path: Path,
    ) {
        if path.link.is_empty() {
            path.link = link_of(&self.side.links(), path.local.ip());
        }
        let pacing = self.first_pacing(&socket, &path);
        let source = self.ready.add(Name::Carrier(handle));
        let must_be_up_by =
            (!self.session.is_up(handle)).then(|| Instant::now() + self.common.resume_timeout);
        let carrier = Carrier {
            socket,
            source,
            input: Input::new(input),
            impatient_until: None,
            since: Instant::now(),
            opening: None,
            must_be_up_by,
            up_turn: None,
            bytes_in: 0,
            heard_at: Instant::now(),
            bytes_out: 0,
            delivered: 0,
            acked_since: Instant::now(),
            out_of_order: 0,
            looked_at: Instant::now(),
            watch_at: None,
            doomed_at: None,
            pacing,
            losses: Losses::default(),
            in_bulk: false,
            segment: self.side.segment(&path.link, path.remote),
            swallow_at: must_be_up_by.and(self.first_look()),
            at_silence: (0, 0),
            path,
        };
        self.carriers.insert(handle, Box::new(carrier));
        self.learn_from_kernel(handle);
    }

    /// The peer dialled a further transport.
    pub(super) fn accept_carrier(&mut self, counter: u64, socket: TcpStream, input: BytesMut) {
        if let Err(error) = self.check_peer() {
            tracing::warn!(%error, "a resume is refused");
            return self.close_for_identity(&error);
        }
        // It was accepted in another runtime, whose thread would have to tell this one of all that comes.
        let socket = match adopt(socket) {
            Ok(socket) => socket,
            Err(error) => return tracing::warn!(%error, "a transport cannot be taken over"),
        };
        let (Ok(local), Ok(remote)) = (socket.local_addr(), socket.peer_addr()) else {
            return;
        };
        match self.session.accept_transport(counter) {
            Ok(handle) => self.add_carrier(
                handle,
                socket,
                input,
                Path {
                    link: String::new(),
                    local,
                    remote,
                },
            ),
            Err(fault) => tracing::info!(%remote, %fault, "a transport is refused"),
        }
    }

    pub(super) fn carrier_ready(&mut self, handle: Handle) {
        for _ in 0..READS_PER_TURN {
            match self.carrier_read(handle) {
                Ok(true) => {}
                Ok(false) => return,
                Err(end) => return self.carrier_failed(handle, &end),
            }
        }
        if let Some(carrier) = self.carriers.get(&handle) {
            carrier.source.requeue();
        }
    }

    /// True: there may be more to read.
    fn carrier_read(&mut self, handle: Handle) -> Result<bool, CarrierEnd> {
        let Some(carrier) = self.carriers.get_mut(&handle) else {
            return Ok(false);
        };
        // Bytes that came with the preamble, or with the handshake, are here before the first read.
        if carrier.bytes_in == 0 && !carrier.input.bytes.is_empty() {
            carrier.bytes_in = carrier.input.bytes.len() as u64;
            self.session
                .handle_bytes(self.clock.now(), handle, &mut carrier.input.bytes)?;
        }
        let room = carrier.input.make_room(&mut self.session);
        // A read that was not full says as much as one more that would find nothing: the next one waits for news.
        let reading = pin!(carrier.socket.read_buf(&mut carrier.input.bytes));
        match reading.poll(&mut carrier.source.context()) {
            Poll::Ready(Ok(0)) => Err(CarrierEnd::Eof),
            Poll::Ready(Ok(n)) => {
                let now = Instant::now();
                carrier.bytes_in += n as u64;
                self.busy.moved(n);
                carrier.heard_at = now;
                carrier.input.filled(n, room);
                if carrier.opening.is_some() {
                    self.opened(handle);
                }
                let Some(carrier) = self.carriers.get_mut(&handle) else {
                    return Ok(false);
                };
                self.session
                    .handle_bytes(self.clock.now(), handle, &mut carrier.input.bytes)?;
                // Hand over before more is read, so that buffers come back.
                while let Some(event) = self.session.poll_event() {
                    self.handle_event(event);
                }
                self.heard(handle);
                // What came has gone on its way: nobody waits for this.
                if let Some(carrier) = self.carriers.get_mut(&handle)
                    && now.saturating_duration_since(carrier.looked_at) >= LOOK_EVERY
                {
                    carrier.look();
                }
                Ok(true)
            }
            Poll::Ready(Err(error)) => Err(CarrierEnd::Io(error)),
            Poll::Pending => {
                carrier.input.rests(Instant::now);
                Ok(false)
            }
        }
    }

    /// Transports that have been idle give back what they read into, as applications do, and are patient.
    pub(super) fn tend_idle(&mut self, now: Instant) {
        for carrier in self.carriers.values_mut() {
            if carrier.input.give_back(now) {
                self.spare = None;
            }
            carrier.calm_down(now, &self.common.transport);
        }
    }

    /// Writes what the session has for every transport.
    pub(super) fn flush(&mut self) {
        // The list is kept for the next turn: this is done after every one.
        let mut handles = std::mem::take(&mut self.flushing);
        handles.clear();
        handles.extend(self.carriers.keys());
        let mut now = self.clock.now();
        for &handle in &handles {
            match self.flush_one(now, handle) {
                // It takes its time.
                Ok(true) => now = self.clock.now(),
                Ok(false) => {}
                Err(error) => self.carrier_failed(handle, &CarrierEnd::Io(error)),
            }
        }
        self.flushing = handles;
    }

    /// True: the socket took something.
    fn flush_one(&mut self, now: Time, handle: Handle) -> io::Result<bool> {
        let mut taken_any = false;
        while self.session.prepare(now, handle) {
            let Some(carrier) = self.carriers.get_mut(&handle) else {
                return Ok(taken_any);
            };
            let mut slices = [IoSlice::new(&[]); WRITE_SLICES];
            let filled = self.session.slices(handle, &mut slices);
            let filled = &slices[..filled];
            carrier.lose_patience(&self.common.transport);
            let in_syn_now = carrier.opening.is_some() && carrier.bytes_out == 0;
            let taken = match carrier.pacing.write_bytes() {
                _ if in_syn_now => carrier.socket.try_write(&in_syn(filled)),
                Some(most) => write_apart(&carrier.socket, &filled[..slices_within(filled, most)]),
                None => write_together(&carrier.socket, filled),
            };
            match taken {
                Ok(n) => {
                    taken_any = true;
                    carrier.bytes_out += n as u64;
                    self.session.transmitted(now, handle, n);
                    self.pace(handle);
                    self.watch(handle);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if carrier
                        .socket
                        .poll_write_ready(&mut carrier.source.context())
                        .is_pending()
                    {
                        return Ok(taken_any);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(taken_any)
    }

    pub(super) fn carrier_failed(&mut self, handle: Handle, end: &CarrierEnd) {
        if matches!(end, CarrierEnd::Eof) && self.session.is_parting(handle) {
            return self.transport_done(handle);
        }
        let Some(mut carrier) = self.carriers.remove(&handle) else {
            return;
        };
        let opening = carrier.opening.take().filter(|_| !had_opened(end));
        tracing::info!(link = %carrier.path.link, remote = %carrier.path.remote, %end, "a transport ended");
        let path = carrier.path.clone();
        let was_active = self.session.active() == Some(handle);
        let was_up = self.session.is_up(handle);
        let before = self.session.stats();
        carrier.discard();
        self.report
            .trace
            .path_ended(handle.as_u64(), &end.to_string());
        self.session.transport_lost(handle);
        match opening {
            Some(opening) => self.opening_failed(&path, &opening, was_active, end, &before),
            None => self.after_loss(&path, was_active, was_up, end, &before),
        }
    }

    /// What each path has under way tells what the next transport over it may send at once.
    pub(super) fn remember_windows(&mut self) {
        let carrying = self
            .carriers
            .iter()
            .filter(|(_, c)| c.bytes_out > WINDOW_BYTES);
        for (_, carrier) in carrying {
            let Ok(info) = tcp_info(&carrier.socket) else {
                continue;
            };
            // The window that it has, or twice what an application that sent less had under way: small
            // segments count as much as full ones.
            let segments = info.snd_cwnd.max((info.unacked * 2).min(WINDOW_GUESS));
            let path = &carrier.path;
            match &mut self.side {
                Side::Initiator(initiator) => {
                    let key = (path.link.clone(), path.remote.ip());
                    if initiator.windows.len() < WINDOWS_MAX || initiator.windows.contains_key(&key)
                    {
                        initiator.windows.insert(key, segments);
                    }
                }
                Side::Responder(_) => {
                    if let Some(window) = &self.common.window {
                        window.learnt(path.local.ip(), path.remote.ip(), segments);
                    }
                }
            }
        }
    }

    /// A link is gone: so is every transport on it.
    pub(super) fn drop_carrier(&mut self, handle: Handle, why: &str) {
        if self.session.active() == Some(handle) {
            self.remember_windows();
        }
        if let Some(carrier) = self.carriers.remove(&handle) {
            self.report.trace.path_ended(handle.as_u64(), why);
            carrier.discard();
        }
        self.session.transport_lost(handle);
    }

    pub(super) fn transport_done(&mut self, handle: Handle) {
        if let Some(carrier) = self.carriers.remove(&handle) {
            if self.carrying == Some(handle) && !self.session.is_ending() {
                let (trigger, now) = (Trigger::PeerMoved, Instant::now());
                let cause = Move::hard(&carrier.path, trigger, "the peer gave it up", now);
                self.report.begin(cause);
            }
            tracing::debug!(link = %carrier.path.link, remote = %carrier.path.remote, "a transport was closed in order");
            self.report
                .trace
                .path_ended(handle.as_u64(), "closed in order");
            carrier.finish();
        }
        self.session.transport_lost(handle);
    }

    /// Something came on `handle`.
    fn heard(&mut self, handle: Handle) {
        if self.report.awaits(handle) && self.session.is_up(handle) {
            self.report.up();
        }
        self.note_firsts();
    }

    /// Both ends are authenticated on `handle`.
    pub(super) fn stands(&mut self, handle: Handle) {
        if let Some(carrier) = self.carriers.get_mut(&handle) {
            carrier.up_turn = Some(self.turns);
            let path = path_info(&carrier.path);
            self.report.trace.path_up(handle.as_u64(), &path);
        }
    }

    /// A transport whose other end does not authenticate in time is of no use.
    pub(super) fn drop_unauthenticated(&mut self, now: Instant) {
        let late: Vec<Handle> = self
            .carriers
            .iter()
            .filter(|(_, c)| c.must_be_up_by.is_some_and(|t| now >= t))
            .map(|(&h, _)| h)
            .collect();
        for handle in late {
            let opens = (self.carriers.get(&handle)).is_some_and(|c| c.opening.is_some());
            if opens && self.opened(handle) {
                // It stands since: now it has the time of one that was dialled in the usual way.
                continue;
            }
            self.carrier_failed(handle, &CarrierEnd::Late);
        }
    }
}

/// Why a transport ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum CarrierEnd {
    #[error("the peer closed the connection")]
    Eof,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Fault(#[from] TransportFault),
    #[error("it was not authenticated in time")]
    Late,
    #[error("large packets vanish on its path")]
    Swallowed,
}
