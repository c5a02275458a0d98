//! The turns of a driver: see [`super`].

use std::future::poll_fn;
use std::time::Instant;

use session_proto::wire::close_code;
use tokio::sync::mpsc;
use tokio::task::coop::cooperative;

use super::busy::{Heard, Wait};
use super::{Command, Driver, Ended, Name};

/// Ready sources handled in one turn before the others get theirs.
const SOURCES_PER_TURN: usize = 64;

impl Driver {
    /// Drives the session to its end. Boxed, so that the task that waits for it is small.
    pub async fn run(mut self: Box<Self>, commands: &mut mpsc::Receiver<Command>) -> Ended {
        self.settle();
        self.decide();
        loop {
            if let Some(ended) = self.finished() {
                self.part(&ended).await;
                return ended;
            }
            self.set_alarm();
            let name = self.next_name().await;
            self.handle_ready(name, commands);
            self.settle();
        }
    }

    /// The next source that is ready.
    pub(super) async fn next_name(&mut self) -> Name {
        let Self { ready, busy, .. } = self;
        let next = cooperative(poll_fn(|cx| ready.poll_next(cx)));
        if !ready.is_empty() {
            if busy.is_others_turn() {
                busy.let_others();
                tokio::task::yield_now().await;
            }
            return next.await;
        }
        let wait = busy.begin();
        if wait == Wait::Sleep {
            return next.await;
        }
        let began = Instant::now();
        let mut now = began;
        while wait == Wait::Look && ready.is_empty() && busy.may_look(began, now) {
            // The runtime has its other tasks run and looks for news of sockets before this goes on.
            tokio::task::yield_now().await;
            now = Instant::now();
            if ready.is_empty() {
                // And whoever else wants this processor goes first.
                std::thread::yield_now();
                let then = std::mem::replace(&mut now, Instant::now());
                busy.gave_way(then, now);
            }
        }
        let name = next.await;
        self.busy.end(name.heard(), began.elapsed());
        name
    }

    /// Handles sources that became ready, `first` among them.
    pub(super) fn handle_ready(&mut self, first: Name, commands: &mut mpsc::Receiver<Command>) {
        let mut next = Some(first);
        for _ in 0..SOURCES_PER_TURN {
            let Some(name) = next.take() else { break };
            if name.heard() == Heard::Others {
                self.busy.interrupted();
            }
            match name {
                Name::App(id) => self.app_ready(id),
                Name::Carrier(handle) => self.carrier_ready(handle),
                Name::Udp(path) => self.udp_ready(path),
                Name::Flow(id) => self.far_ready(id),
                Name::Group(key) => self.group_ready(key),
                Name::Chore(id) => self.chore_ready(id),
                // What it brings has a turn to itself.
                Name::News(kind) => return self.news_ready(kind, commands),
            }
            if self.busy.is_others_turn() {
                break;
            }
            next = self.ready.try_next();
            if matches!(next, Some(Name::News(_))) {
                break;
            }
        }
        if let Some(name) = next {
            self.put_back(name);
        }
    }

    fn put_back(&self, name: Name) {
        let source = match name {
            Name::App(id) => self.apps.get(&id).map(|a| &a.source),
            Name::Carrier(handle) => self.carriers.get(&handle).map(|c| &c.source),
            Name::Udp(path) => self.datagrams.source_of_path(path),
            Name::Flow(id) => self.datagrams.source_of_flow(id),
            Name::Group(key) => self.datagrams.source_of_group(key),
            Name::Chore(id) => self.chores.source(id),
            Name::News(kind) => Some(self.news.source(kind)),
        };
        if let Some(source) = source {
            source.put_back();
        }
    }

    /// Acts on the session's events and writes what it has, until neither brings anything new.
    pub(super) fn settle(&mut self) {
        self.follow_udp();
        loop {
            while let Some(event) = self.session.poll_event() {
                self.handle_event(event);
            }
            self.settle_flows();
            self.flush_udp();
            self.flush();
            if self
                .session
                .poll_event()
                .map(|event| self.handle_event(event))
                .is_none()
            {
                break;
            }
        }
        self.wake_blocked();
        self.follow_peer();
        self.follow_pair();
        self.note_adrift();
        self.turns += 1;
    }

    fn finished(&mut self) -> Option<Ended> {
        match &self.ended {
            // CLOSE is on its way: wait until the peer has it, or the session gives up.
            Some(Ended::Closed { .. })
                if !self.session.is_closed() && !self.carriers.is_empty() =>
            {
                None
            }
            Some(_) => self.ended.take(),
            None => None,
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let session = [self.session.poll_timeout(), self.session.rest_at()];
        let session = session.into_iter().flatten().min();
        let session = session.map(|t| self.clock.instant(t));
        let carriers = self
            .carriers
            .values()
            .flat_map(|c| {
                [
                    c.must_be_up_by,
                    c.doomed_at,
                    c.swallow_at,
                    c.watch_at,
                    c.input.idle_at(),
                    c.impatient_until,
                ]
            })
            .flatten()
            .min();
        let hold = self.adrift_since.map(|since| since + self.common.hold);
        [
            session,
            carriers,
            hold,
            self.side.deadline(),
            self.reauth_deadline(),
            self.report.look_at(),
            self.datagrams.deadline(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    pub(super) fn handle_deadline(&mut self) {
        let now = Instant::now();
        self.look_for_quiet(now);
        self.vouch();
        self.session.handle_timeout(self.clock.now());
        if self.session.rest(self.clock.now()) {
            self.spare = None;
        }
        self.drop_unauthenticated(now);
        self.drop_swallowed(now);
        self.drop_doomed(now);
        self.tend_idle(now);
        if self
            .adrift_since
            .is_some_and(|since| now >= since + self.common.hold)
        {
            self.session.close(
                self.clock.now(),
                close_code::HOLD_EXPIRED,
                "no transport within the hold time",
            );
        }
        self.side_deadline(now);
        self.reauth_tick(now);
        self.settle_handover(now);
        self.end_brief_flows(now);
        self.end_lingering(now);
    }
}
