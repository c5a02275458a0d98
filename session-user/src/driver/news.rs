//! What a driver waits for beside sockets: commands, what its own tasks bring, links, requests, packets and time.
//!
//! Each has a source of its own among the sockets', and is asked only when that was woken: nearly all turns are of sockets,
//! and to ask the others in each of them took as long as all else that a turn of a small record does in user space.

use std::pin::Pin;
use std::task::Poll;

use session_proto::wire::close_code;
use tokio::sync::mpsc;

use super::alarm::Alarm;
use super::ready::{ReadySet, Source};
use super::{Command, Driver, Name};

/// What has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A command.
    Command,
    /// What one of the driver's own tasks brings.
    Internal,
    /// The links have changed.
    Links,
    /// The deadline.
    Alarm,
    /// A request of an application, or a datagram of one.
    Request,
    /// A packet that came to one of the unit's sockets.
    Packet,
}

/// Ends when there is something.
pub(super) type Waiting = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A source, and what it waits for.
struct Waiter {
    source: Source<Name>,
    /// None: nothing was asked yet.
    waiting: Option<Waiting>,
    /// It came before anybody waited.
    come: bool,
}

impl Waiter {
    fn new(source: Source<Name>) -> Self {
        Self {
            source,
            waiting: None,
            come: false,
        }
    }

    /// Whether what was waited for has come; then [`Self::wait`] is to be called.
    fn has_come(&mut self) -> bool {
        std::mem::take(&mut self.come) || self.poll()
    }

    fn poll(&mut self) -> bool {
        let Some(waiting) = &mut self.waiting else {
            return false;
        };
        let polled = waiting.as_mut().poll(&mut self.source.context());
        if polled.is_ready() {
            self.waiting = None;
        }
        polled.is_ready()
    }

    /// Waits for the next one.
    fn wait(&mut self, waiting: impl FnOnce() -> Waiting) {
        self.waiting.get_or_insert_with(waiting);
        if self.poll() {
            self.come = true;
            self.source.requeue();
        }
    }
}

/// The sources of what is no socket.
pub(super) struct News {
    commands: Source<Name>,
    internal: Source<Name>,
    packets: Source<Name>,
    rings: Source<Name>,
    alarm: Alarm,
    /// The alarm has rung, and nothing was done about it yet.
    rung: bool,
    links: Waiter,
    requests: Waiter,
}

impl News {
    pub fn new(ready: &ReadySet<Name>) -> Self {
        let first = |kind| ready.add_first(Name::News(kind));
        Self {
            commands: first(Kind::Command),
            internal: first(Kind::Internal),
            links: Waiter::new(first(Kind::Links)),
            // There may always be more of these, and sockets must have their turns.
            rings: ready.add(Name::News(Kind::Alarm)),
            alarm: Alarm::new(),
            rung: false,
            packets: ready.add(Name::News(Kind::Packet)),
            requests: Waiter::new(ready.add(Name::News(Kind::Request))),
        }
    }

    pub fn source(&self, kind: Kind) -> &Source<Name> {
        match kind {
            Kind::Command => &self.commands,
            Kind::Internal => &self.internal,
            Kind::Links => &self.links.source,
            Kind::Alarm => &self.rings,
            Kind::Request => &self.requests.source,
            Kind::Packet => &self.packets,
        }
    }

    fn poll_alarm(&mut self) -> bool {
        let polled = self.alarm.poll_rings(&mut self.rings.context());
        polled.is_ready()
    }

    /// What is waited for of requests has changed.
    pub fn ask_for_requests_anew(&mut self) {
        self.requests.waiting = None;
        self.requests.source.requeue();
    }
}

impl Driver {
    /// The alarm is set to what is to be done next.
    pub(super) fn set_alarm(&mut self) {
        let deadline = self.next_deadline();
        let news = &mut self.news;
        if news.alarm.set(deadline) && news.poll_alarm() {
            // It is past. Sockets have their turns before all the same.
            news.rung = true;
            news.rings.requeue();
        }
    }

    pub(super) fn news_ready(&mut self, kind: Kind, commands: &mut mpsc::Receiver<Command>) {
        match kind {
            Kind::Command => self.command_ready(commands),
            Kind::Internal => self.internal_ready(),
            Kind::Links => self.links_ready(),
            Kind::Alarm => {
                let rung = std::mem::take(&mut self.news.rung);
                if rung || self.news.poll_alarm() {
                    self.handle_deadline();
                }
            }
            Kind::Request => self.requests_ready(),
            Kind::Packet => self.packets_ready(),
        }
    }

    fn command_ready(&mut self, commands: &mut mpsc::Receiver<Command>) {
        let polled = commands.poll_recv(&mut self.news.commands.context());
        match polled {
            Poll::Ready(Some(command)) => {
                self.news.commands.requeue();
                self.handle_command(command);
            }
            Poll::Ready(None) => {
                let now = self.clock.now();
                (self.session).close(now, close_code::SHUTDOWN, "the unit is shutting down");
            }
            Poll::Pending => {}
        }
    }

    fn internal_ready(&mut self) {
        let polled = (self.internal_rx).poll_recv(&mut self.news.internal.context());
        if let Poll::Ready(Some(internal)) = polled {
            self.news.internal.requeue();
            self.handle_internal(*internal);
        }
    }

    fn links_ready(&mut self) {
        if self.news.links.has_come() {
            self.links_changed();
        }
        self.news.links.wait(|| self.side.links_change());
    }

    fn requests_ready(&mut self) {
        self.take_requests();
        self.take_datagrams();
        if let Some(wait) = self.side.requests_come() {
            self.news.requests.waiting = None;
            self.news.requests.wait(|| wait);
        }
    }

    fn packets_ready(&mut self) {
        let polled = self
            .datagrams
            .poll_arrived(&mut self.news.packets.context());
        if let Poll::Ready(inbound) = polled {
            self.news.packets.requeue();
            self.packets_arrived(inbound);
        }
    }
}
