//! Application sockets: between them and the session nothing is queued but the session's own
//! buffers, so back-pressure is the kernel's.

use std::io::{self, IoSlice};
use std::net::{Shutdown, SocketAddr};
use std::task::Poll;
use std::time::Instant;

use super::lanes::OwnLanes;
use super::ready::Source;
use super::{Driver, Name};
use crate::requests::{AppStream, Taken};
use session_proto::session::{Lack, SendBuf, StreamId, own_lane};
use session_proto::wire::Target;

/// Reads of one socket in one turn, before the others get theirs.
const READS_PER_TURN: usize = 4;
/// Smallest and largest read, in bytes.
const CHUNK_MIN: usize = 4 * 1024;
const CHUNK_MAX: usize = session_proto::limits::STREAM_DATA_BYTES_MAX;
/// What an application may say to a peer that has aborted, before it is reset though it has not read all.
const DISCARDED_MAX: usize = 256 * 1024;
/// What an application on this host may have said that is not read, in bytes: several of the largest reads. The kernel's
/// own buffer begins with little, and grows to megabytes (`net.ipv4.tcp_rmem`) while it is read fast; an application whose
/// target then stops reading would notice that only after as much.
const UNREAD_MAX: usize = 512 * 1024;
/// Streams that go on at once when there is room; the others do while some is left.
const WOKEN_AT_ONCE: usize = 16;
/// Buffers of one vectored write.
const WRITE_SLICES: usize = 16;

/// One application socket, or one to a target.
pub(super) struct App {
    pub socket: AppStream,
    pub source: Source<Name>,
    /// What the stream leads to, for reports.
    pub target: Target,
    /// The application's (or our own) end, for reports.
    pub local: Option<SocketAddr>,
    /// Whether the target is known to be connected.
    pub connected: bool,
    /// The lane that it asks for to itself; counted in [`Driver::own_lanes`].
    lane: Option<u64>,
    /// How much the next read asks for: it follows the flow.
    chunk: usize,
    read_closed: bool,
    write_closed: bool,
    /// In [`Driver::blocked`], or without credit of its own.
    blocked: bool,
    /// It has sent something since it last waited.
    had_its_turn: bool,
    /// Bytes that it sent after the peer had aborted the stream.
    discarded: usize,
    pub bytes_read: u64,
    pub bytes_written: u64,
    /// When its socket last took bytes.
    pub written_at: Option<Instant>,
}

impl App {
    pub fn new(
        socket: AppStream,
        source: Source<Name>,
        target: Target,
        connected: bool,
        lane: Option<u64>,
    ) -> Self {
        let local = socket.peer_addr();
        Self {
            socket,
            source,
            target,
            local,
            connected,
            lane,
            chunk: CHUNK_MIN,
            read_closed: false,
            write_closed: false,
            blocked: false,
            had_its_turn: false,
            discarded: 0,
            bytes_read: 0,
            bytes_written: 0,
            written_at: None,
        }
    }

    /// The socket has nothing to read: its waker is told when that changes, unless it just has.
    fn step_when_dry(&self) -> Step {
        let polled = self.socket.poll_read_ready(&mut self.source.context());
        if polled.is_pending() {
            Step::Wait
        } else {
            Step::Again
        }
    }

    /// Once much was read, which was `before` the latest read, the kernel's buffer does not grow on.
    fn bound_once(&self, before: u64) {
        let passed = before < UNREAD_MAX as u64 && self.bytes_read >= UNREAD_MAX as u64;
        if passed && let Err(error) = self.socket.bound_unread(UNREAD_MAX) {
            tracing::debug!(%error, "an application socket's buffer could not be bounded");
        }
    }

    /// Both directions ended in order: from here a close is a close, not a reset.
    fn finish(self) {
        if let Err(error) = self.socket.reset_on_close(false) {
            tracing::debug!(%error, "an application socket could not be closed in order");
        }
    }
}

/// What to do after one attempt to read.
enum Step {
    Again,
    Wait,
    Gone,
}

impl Driver {
    pub(super) fn add_app(
        &mut self,
        id: StreamId,
        socket: AppStream,
        target: Target,
        connected: bool,
    ) {
        if let Err(error) = socket.bound_unsent() {
            tracing::debug!(%error, "an application socket's queue could not be bounded");
        }
        match socket.marked() {
            Ok(socket) => {
                let source = self.ready.add(Name::App(id));
                let service = self.session.service(id);
                let lane = service.filter(|s| s.own_lane).map(|_| own_lane(id));
                if let Some(lane) = lane {
                    self.own_lanes.add(lane);
                }
                let app = App::new(socket, source, target, connected, lane);
                self.apps.insert(id, app);
            }
            Err(error) => {
                tracing::warn!(stream = id, %target, %error, "a connection is not carried");
                let errno = error.raw_os_error().unwrap_or(libc::ECONNRESET);
                self.session.abort(id, errno.unsigned_abs().into());
                self.lanes_may_go();
            }
        }
    }

    pub(super) fn app_ready(&mut self, id: StreamId) {
        self.app_write(id);
        self.app_read(id);
        self.app_watch(id);
    }

    /// A socket that has ended its direction may still be reset.
    fn app_watch(&mut self, id: StreamId) {
        let half_closed = |a: &&mut App| a.read_closed && !a.write_closed;
        let Some(app) = self.apps.get_mut(&id).filter(half_closed) else {
            return;
        };
        if let Poll::Ready(error) = app.socket.poll_error(&mut app.source.context()) {
            self.app_failed(id, &error);
        }
    }

    /// The socket takes no more. What the application had sent before comes first, as far as there is room for it.
    fn app_write_failed(&mut self, id: StreamId, error: &io::Error) {
        while self.apps.get(&id).is_some_and(|app| !app.read_closed)
            && matches!(self.app_read_once(id), Step::Again)
        {}
        if self.apps.contains_key(&id) {
            self.app_failed(id, error);
        }
    }

    fn app_read(&mut self, id: StreamId) {
        for _ in 0..READS_PER_TURN {
            match self.app_read_once(id) {
                Step::Again => {}
                Step::Wait | Step::Gone => return,
            }
        }
        if let Some(app) = self.apps.get(&id) {
            app.source.requeue();
        }
    }

    fn app_read_once(&mut self, id: StreamId) -> Step {
        let Some(app) = self
            .apps
            .get_mut(&id)
            .filter(|a| !a.read_closed && !a.blocked)
        else {
            return Step::Gone;
        };
        let capacity = self.session.capacity(id);
        if capacity == 0 && self.session.is_aborted(id) {
            return self.app_discard(id);
        }
        if capacity == 0 {
            app.blocked = true;
            // Whatever it waits for, it sends nothing meanwhile.
            let sent = std::mem::take(&mut app.had_its_turn);
            let way = match self.session.lack(id) {
                // It is told by itself, as of its end: what the others wait for comes often, and there may be very many
                // that wait for readers that are stuck.
                Lack::OwnCredit | Lack::Ended => return Step::Wait,
                Lack::Common => None,
                Lack::Queue(way) => Some(way),
            };
            let small = self.session.sends_little(id);
            self.blocked.wait(id, way, small, sent);
            return Step::Wait;
        }
        let want = app.chunk.min(capacity);
        let mut buf = self
            .spare
            .take()
            .filter(|b| b.room() >= want)
            .unwrap_or_else(|| self.session.send_buf(want));
        match app.socket.try_read(&mut buf.unfilled(want)) {
            Ok(Taken { bytes: 0, .. }) => {
                app.read_closed = true;
                // The stream may be gone already; then there is nothing to end.
                let _ = self.session.finish(id);
                self.app_finish_if_done(id);
                Step::Gone
            }
            Ok(Taken { bytes, urgent }) => {
                let before = app.bytes_read;
                app.bytes_read += bytes as u64;
                self.busy.moved(bytes);
                app.bound_once(before);
                app.had_its_turn = true;
                app.chunk = next_chunk(app.chunk, bytes, want);
                self.send(id, buf, urgent)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.spare = Some(buf);
                // What it had to say is said: what comes next has not had its turn.
                app.had_its_turn = false;
                app.step_when_dry()
            }
            Err(error) => {
                self.app_failed(id, &error);
                Step::Gone
            }
        }
    }

    /// The peer takes no more, and the application has not read so far as to know: what it says meanwhile is lost, as
    /// what is on its way to somebody who resets. If it only ever writes it is told by a reset at once.
    fn app_discard(&mut self, id: StreamId) -> Step {
        let Some(app) = self.apps.get_mut(&id) else {
            return Step::Gone;
        };
        let mut scratch = [0_u8; CHUNK_MIN];
        match app.socket.try_read(&mut &mut scratch[..]) {
            Ok(Taken { bytes: 0, .. }) => {
                app.read_closed = true;
                Step::Gone
            }
            Ok(Taken { bytes, .. }) => {
                app.discarded += bytes;
                if app.discarded > DISCARDED_MAX {
                    self.session
                        .abort(id, libc::ECONNRESET.unsigned_abs().into());
                    self.app_reset(id);
                    return Step::Gone;
                }
                Step::Again
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => app.step_when_dry(),
            Err(error) => {
                self.app_failed(id, &error);
                Step::Gone
            }
        }
    }

    /// What was read goes out; its first byte may be urgent.
    fn send(&mut self, id: StreamId, buf: SendBuf, urgent: bool) -> Step {
        let now = self.clock.now();
        // A few bytes must not pin a large buffer until the peer acknowledges them.
        let result = if urgent {
            let result = self.session.write_urgent(now, id, buf.data());
            self.spare = Some(buf.cleared());
            result
        } else if buf.is_mostly_empty() {
            let copy = self.session.send_copy(buf.data());
            let result = self.session.write(now, id, copy);
            self.spare = Some(buf.cleared());
            result
        } else {
            self.session.write(now, id, buf)
        };
        self.session.write_took(|| self.clock.now().since(now));
        self.keep_spare();
        match result {
            Ok(()) => Step::Again,
            Err(error) => {
                // Capacity was asked for just before: only a stream that ended meanwhile gets here.
                tracing::debug!(stream = id, %error, "bytes of an ended stream are dropped");
                self.session
                    .abort(id, libc::ECONNRESET.unsigned_abs().into());
                self.app_reset(id);
                Step::Gone
            }
        }
    }

    /// What went out packed leaves the buffer that it was read into.
    fn keep_spare(&mut self) {
        if let Some(left) = self.session.reuse_buffer()
            && left.room() > self.spare.as_ref().map_or(0, SendBuf::room)
        {
            self.spare = Some(left);
        }
    }

    /// Hands what the session has for `id` to its socket.
    pub(super) fn app_write(&mut self, id: StreamId) {
        let Some(app) = self.apps.get_mut(&id).filter(|a| !a.write_closed) else {
            return;
        };
        loop {
            let urgent = self.session.is_urgent(id);
            let mut slices = [IoSlice::new(&[]); WRITE_SLICES];
            let mut filled = 0;
            for (slot, bytes) in slices.iter_mut().zip(self.session.readable(id)) {
                *slot = IoSlice::new(bytes);
                filled += 1;
            }
            if filled == 0 {
                break;
            }
            let written = match slices[0].first() {
                Some(byte) if urgent => app.socket.try_write_urgent(*byte),
                _ => app.socket.try_write_vectored(&slices[..filled]),
            };
            match written {
                Ok(n) => {
                    app.bytes_written += n as u64;
                    let now = Instant::now();
                    self.report.wrote(id, app.written_at.replace(now), now);
                    self.session.consume(id, n);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if app
                        .socket
                        .poll_write_ready(&mut app.source.context())
                        .is_pending()
                    {
                        self.session.leave_rest(id);
                        return;
                    }
                }
                Err(error) => return self.app_write_failed(id, &error),
            }
        }
        if self.session.take_end(id) {
            app.write_closed = true;
            // Where the other direction has ended as well the socket is closed now, which says the same.
            if !app.read_closed
                && let Err(error) = app.socket.shutdown(Shutdown::Write)
            {
                return self.app_failed(id, &error);
            }
            self.app_finish_if_done(id);
        }
    }

    fn app_finish_if_done(&mut self, id: StreamId) {
        if self
            .apps
            .get(&id)
            .is_some_and(|a| a.read_closed && a.write_closed)
            && let Some(app) = self.remove_app(id)
        {
            self.report.closed(&app);
            app.finish();
            self.lanes_may_go();
        }
    }

    /// The application aborted its socket: so does the peer.
    fn app_failed(&mut self, id: StreamId, error: &io::Error) {
        let errno = error.raw_os_error().unwrap_or(libc::ECONNRESET);
        tracing::debug!(stream = id, %error, "an application socket failed");
        self.session.abort(id, errno.unsigned_abs().into());
        self.app_reset(id);
    }

    /// Closes the socket of `id` with a reset: it carries SO_LINGER {1, 0} since it was made.
    pub(super) fn app_reset(&mut self, id: StreamId) {
        if let Some(app) = self.remove_app(id) {
            self.report.closed(&app);
            self.lanes_may_go();
        }
    }

    fn remove_app(&mut self, id: StreamId) -> Option<App> {
        let app = self.apps.remove(&id)?;
        if let Some(lane) = app.lane {
            self.own_lanes.remove(lane);
        }
        Some(app)
    }

    pub(super) fn reset_all_apps(&mut self) {
        for (_, app) in std::mem::take(&mut self.apps) {
            self.report.closed(&app);
        }
        self.own_lanes = OwnLanes::default();
        self.awaiting.clear();
        self.blocked.clear();
    }

    /// Credit of one stream came in.
    pub(super) fn unblock_one(&mut self, id: StreamId) {
        if let Some(app) = self.apps.get_mut(&id) {
            app.blocked = false;
            app.source.requeue();
        }
    }

    /// Lets some of the streams go on that wait for room, if there is some.
    pub(super) fn wake_blocked(&mut self) {
        let mut woken = 0;
        while woken < WOKEN_AT_ONCE
            && let Some(id) = self.blocked.next()
        {
            if let Some(app) = self.apps.get_mut(&id) {
                app.blocked = false;
                app.had_its_turn = false;
                app.source.requeue();
                woken += 1;
            }
        }
    }
}

/// Reads grow while they come back full and shrink when they come back nearly empty.
fn next_chunk(chunk: usize, got: usize, asked: usize) -> usize {
    if got == chunk {
        (chunk * 4).min(CHUNK_MAX)
    } else if got * 8 < asked {
        (chunk / 2).max(CHUNK_MIN)
    } else {
        chunk
    }
}
