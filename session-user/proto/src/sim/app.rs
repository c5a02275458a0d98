//! Applications: writers and readers of streams that know what they must get to see.

use std::collections::BTreeSet;

use super::plan::{StreamPlan, differs, fill};
use super::world::{Happening, World};
use super::{Mutation, Side};
use crate::session::{SendBuf, StreamError, StreamId};
use crate::wire::{Mode, Target};

/// How a stream ended for the application at one end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Over {
    /// Both directions came to their end.
    Done,
    /// This application aborted it.
    Aborted,
    /// It was told of a reset.
    Reset,
    /// The target refused: told at the opener, decided at the other end.
    Refused,
}

/// The application at one end of a stream.
#[derive(Clone, Debug)]
pub(super) struct App {
    pub plan: StreamPlan,
    /// At the opener: the peer said so. At the other end: the target is there.
    pub connected: bool,
    pub sent: u64,
    /// Offsets of the urgent bytes that it has sent.
    pub marks: BTreeSet<u64>,
    pub finished: bool,
    pub got: u64,
    pub got_end: bool,
    pub over: Option<Over>,
    /// The session has no such stream any more; the application is yet to be told.
    cut_off: bool,
    readable: bool,
    pub blocked: bool,
    write_pauses: bool,
    read_pauses: bool,
}

impl App {
    fn new(plan: StreamPlan) -> Self {
        Self {
            plan,
            connected: false,
            sent: 0,
            marks: BTreeSet::new(),
            finished: false,
            got: 0,
            got_end: false,
            over: None,
            cut_off: false,
            readable: false,
            blocked: false,
            write_pauses: false,
            read_pauses: false,
        }
    }
}

impl World<'_> {
    fn app(&mut self, side: Side, id: StreamId) -> Option<&mut App> {
        let app = self.hosts[side as usize].apps.get_mut(&id)?;
        app.over.is_none().then_some(app)
    }

    fn end(&mut self, side: Side, id: StreamId, over: Over) {
        self.trace(|| format!("{side:?} stream {id} is over: {over:?}"));
        if let Some(app) = self.app(side, id) {
            app.over = Some(over);
        }
    }

    /// Opens as many of the wanted streams as the peer allows.
    pub fn open_wanted(&mut self, side: Side) {
        while self.hosts[side as usize].wanted > 0 {
            let opened = self.hosts[side as usize]
                .apps
                .keys()
                .filter(|id| Side::opener(**id) == side)
                .count() as u64;
            let expected = opened * 2 + side as u64;
            let target = self.script.target(expected);
            let service = self.script.stream(expected).service;
            let Some(session) = self.session(side) else {
                return;
            };
            match session.open_with(target, service) {
                Ok(id) if id == expected => {
                    self.host(side).wanted -= 1;
                    let plan = self.script.stream(id);
                    self.host(side).apps.insert(id, App::new(plan));
                    self.check.tally.streams += 1;
                    self.check.tally.redundant += u64::from(service.mode == Mode::Redundant);
                    self.check.tally.bonded += u64::from(service.mode == Mode::Bonded);
                    if plan.early {
                        self.write(side, id);
                    }
                }
                Ok(id) => return self.fail(format!("{side:?}: stream {id} instead of {expected}")),
                Err(StreamError::TooMany | StreamError::NotOpen) => return,
                Err(error) => return self.fail(format!("{side:?}: open: {error}")),
            }
        }
    }

    pub fn stream_opened(&mut self, side: Side, id: StreamId, target: &Target) {
        let opener = side.other();
        let known = self.hosts[opener as usize].apps.contains_key(&id)
            || self.hosts[opener as usize].session.is_none()
            || self.hosts[opener as usize].ended.is_some();
        if Side::opener(id) != opener || !known {
            return self.fail(format!("{side:?}: stream {id} was opened by nobody"));
        }
        if *target != self.script.target(id) {
            return self.fail(format!("{side:?}: stream {id} goes to {target}"));
        }
        let plan = self.script.stream(id);
        if self.host(side).apps.insert(id, App::new(plan)).is_some() {
            return self.fail(format!("{side:?}: stream {id} was opened twice"));
        }
        self.after(plan.connect, Happening::Target { id });
    }

    /// The target of stream `id` has been dialled.
    pub fn target_dialled(&mut self, id: StreamId) {
        let side = Side::opener(id).other();
        let Some(app) = self.app(side, id) else {
            return;
        };
        let refuse = app.plan.refuse;
        app.connected = true;
        let Some(session) = self.session(side) else {
            return;
        };
        if let Some(errno) = refuse {
            session.refuse(id, errno);
            self.end(side, id, Over::Refused);
        } else {
            session.connected(id);
            self.read(side, id);
            self.write(side, id);
        }
    }

    pub fn stream_connected(&mut self, side: Side, id: StreamId) {
        if self.script.stream(id).refuse.is_some() || Side::opener(id) != side {
            return self.fail(format!("{side:?}: stream {id} cannot be connected"));
        }
        if let Some(app) = self.app(side, id) {
            app.connected = true;
            self.write(side, id);
        }
    }

    pub fn stream_refused(&mut self, side: Side, id: StreamId, errno: u64) {
        if self.script.stream(id).refuse != Some(errno) || Side::opener(id) != side {
            return self.fail(format!(
                "{side:?}: stream {id} was refused with errno {errno}"
            ));
        }
        self.end(side, id, Over::Refused);
    }

    pub fn stream_reset(&mut self, side: Side, id: StreamId) {
        let peer = self.hosts[side.other() as usize]
            .apps
            .get(&id)
            .and_then(|a| a.over);
        let host = &self.hosts[side.other() as usize];
        let gone = host.session.is_none() || host.ended.is_some();
        if !gone && !matches!(peer, Some(Over::Aborted | Over::Refused)) {
            return self.fail(format!(
                "{side:?}: stream {id} was reset, its peer is {peer:?}"
            ));
        }
        match self.hosts[side as usize].apps.get(&id).map(|a| a.over) {
            Some(None) => self.end(side, id, Over::Reset),
            // It aborted while the event was in the queue.
            Some(Some(Over::Aborted)) => {}
            _ => self.fail(format!("{side:?}: a reset of stream {id}, which is over")),
        }
    }

    pub fn writable(&mut self, side: Side) {
        let blocked: Vec<StreamId> = (self.hosts[side as usize].apps.iter())
            .filter(|(_, a)| a.blocked && a.over.is_none())
            .map(|(&id, _)| id)
            .collect();
        for id in blocked {
            self.write(side, id);
        }
    }

    pub fn readable(&mut self, side: Side, id: StreamId) {
        match self.app(side, id) {
            Some(app) => app.readable = true,
            // It was aborted between the event and its handling.
            None => return,
        }
        self.read(side, id);
    }

    /// A pause is over.
    pub fn tick(&mut self, side: Side, id: StreamId, write: bool) {
        let Some(app) = self.app(side, id) else {
            return;
        };
        if write {
            app.write_pauses = false;
            self.write(side, id);
        } else {
            app.read_pauses = false;
            self.read(side, id);
        }
    }

    /// Aborts the stream if its plan says so by now. True if it did.
    fn aborts(&mut self, side: Side, id: StreamId) -> bool {
        let Some(app) = self.app(side, id) else {
            return true;
        };
        let moved = app.sent + app.got;
        if app.plan.habits[side as usize]
            .abort_after
            .is_none_or(|n| moved < n)
        {
            return false;
        }
        if let Some(session) = self.session(side) {
            session.abort(id, 104);
        }
        self.end(side, id, Over::Aborted);
        true
    }

    /// Writes what the application has and the session takes.
    fn write(&mut self, side: Side, id: StreamId) {
        let (seed, now) = (self.script.pattern_seed(), self.now);
        let opener = Side::opener(id) == side;
        loop {
            if self.aborts(side, id) {
                return;
            }
            let host = &mut self.hosts[side as usize];
            let (Some(app), Some(session)) = (host.apps.get_mut(&id), &mut host.session) else {
                return;
            };
            let habits = app.plan.habits[side as usize];
            if app.finished || app.write_pauses || !(app.connected || (opener && app.plan.early)) {
                return;
            }
            app.blocked = false;
            let cheat = self.mutation == Some(Mutation::EarlyEnd) && app.sent > 0;
            let left = if cheat { 0 } else { habits.total - app.sent };
            if left == 0 {
                if habits.end_after_peer && !app.got_end {
                    return;
                }
                app.finished = true;
                let outcome = session.finish(id);
                return match outcome {
                    Ok(()) => self.done_if_so(side, id),
                    // The news of its end stands in the queue behind this event, or behind what the peer sent before
                    // it aborted, and must come.
                    Err(StreamError::Gone | StreamError::Finished) => app.cut_off = true,
                    Err(error) => self.fail(format!("{side:?}: finish {id}: {error}")),
                };
            }
            let capacity = session.capacity(id);
            if capacity == 0 {
                app.blocked = true;
                return;
            }
            let n = left.min(habits.chunk).min(capacity as u64) as usize;
            let mut data = vec![0; n];
            fill(seed, id, side, app.sent, &mut data);
            let written = if self.script.is_urgent(id, side, app.sent) {
                app.marks.insert(app.sent);
                self.check.tally.marks += 1;
                session.write_urgent(now, id, &data)
            } else {
                session.write(now, id, SendBuf::copy_of(&data))
            };
            app.sent += n as u64;
            if let Err(error) = written {
                return self.fail(format!("{side:?}: write {id}: {error}"));
            }
            if !habits.write_pause.is_zero() {
                app.write_pauses = true;
                let pause = if self.calm {
                    habits.write_pause / 8
                } else {
                    habits.write_pause
                };
                return self.after(
                    pause,
                    Happening::Tick {
                        side,
                        id,
                        write: true,
                    },
                );
            }
        }
    }

    /// Reads what the session has and the application takes.
    fn read(&mut self, side: Side, id: StreamId) {
        loop {
            if self.aborts(side, id) {
                return;
            }
            let Some(app) = self.app(side, id) else {
                return;
            };
            if !app.readable || app.read_pauses || !app.connected && Side::opener(id) != side {
                return;
            }
            let habits = app.plan.habits[side as usize];
            if self.take(side, id, habits.gulp) {
                let Some(session) = self.session(side) else {
                    return;
                };
                let ended = session.take_end(id) && self.mutation != Some(Mutation::LostEnd);
                let Some(app) = self.app(side, id) else {
                    return;
                };
                app.readable = false;
                if ended {
                    app.got_end = true;
                    self.check_ended(side, id);
                    self.write(side, id);
                    self.done_if_so(side, id);
                }
                return;
            }
            let Some(session) = self.session(side) else {
                return;
            };
            session.leave_rest(id);
            if !habits.read_pause.is_zero() {
                let pause = if self.calm {
                    habits.read_pause / 8
                } else {
                    habits.read_pause
                };
                if let Some(app) = self.app(side, id) {
                    app.read_pauses = true;
                }
                return self.after(
                    pause,
                    Happening::Tick {
                        side,
                        id,
                        write: false,
                    },
                );
            }
        }
    }

    /// Takes at most `gulp` bytes; true if nothing is left.
    fn take(&mut self, side: Side, id: StreamId, gulp: u64) -> bool {
        let seed = self.script.pattern_seed();
        let mut left = gulp;
        while left > 0 {
            let host = &mut self.hosts[side as usize];
            let (Some(app), Some(session)) = (host.apps.get_mut(&id), &mut host.session) else {
                return true;
            };
            let Some(data) = session.peek(id) else {
                return true;
            };
            let urgent = session.is_urgent(id);
            let come = session.has_come(id);
            let n = left.min(data.len() as u64) as usize;
            let mut data = data.slice(..n);
            if self.mutation == Some(Mutation::WrongByte) {
                let mut wrong = data.to_vec();
                wrong[n / 2] ^= 1;
                data = wrong.into();
            }
            session.consume(id, n);
            left -= n as u64;
            if self.mutation == Some(Mutation::LostBytes) && app.got > 0 {
                continue;
            }
            let from = app.got;
            let wrong = differs(seed, id, side.other(), from, &data);
            app.got += n as u64;
            self.check.tally.bytes += n as u64;
            if self.mutation == Some(Mutation::InventedByte) {
                app.got += 1;
            }
            let got = app.got;
            if let Some(at) = wrong {
                self.fail(format!(
                    "{side:?}: wrong byte at offset {at} of stream {id}"
                ));
                return true;
            }
            self.check_prefix(side, id, got);
            self.check_marks(side, id, from..from + n as u64, urgent, come);
        }
        self.session(side).is_none_or(|s| s.peek(id).is_none())
    }

    fn done_if_so(&mut self, side: Side, id: StreamId) {
        if self
            .app(side, id)
            .is_some_and(|a| a.finished && !a.cut_off && a.got_end)
        {
            let cheat = self.mutation == Some(Mutation::OneSidedEnd) && side == Side::Responder;
            self.end(side, id, if cheat { Over::Reset } else { Over::Done });
        }
    }
}
