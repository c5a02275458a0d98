//! What is told of a handover: from the moment it is noticed until the streams flow again.
//!
//! One is open at a time. It has begun when something told that the session must move, is *over* when
//! the peer was heard on the new transport, and is told once the streams have had time to go on.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant, SystemTime};

use session_proto::session::{Firsts, Handle, Stats, StreamId};

use super::app::App;
use super::carrier::Path;
use super::report::monotonic_ns;
use super::{Driver, Ended, Side};
use crate::policy::Decision;
use crate::trace::{Handover, Metrics, PathChoice, PathInfo, SessionTrace, Trigger};
use crate::transport::tcp_info;

/// Handovers that a session remembers.
const HANDOVERS_KEPT: usize = 64;
/// Streams are watched for this long after the session went on, for a second gap may follow the first.
const SETTLE: Duration = Duration::from_millis(500);
/// While a stream has got nothing, or a record is not acknowledged, it is looked at again so often,
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// but not for longer than this.
const SETTLE_MAX: Duration = Duration::from_secs(2);
/// A stream that got bytes within this time before counts as active.
const ACTIVE: Duration = Duration::from_secs(1);
/// Gaps that ended so shortly before notice belong to it: where the peer moves, its bytes are the news.
const JUST_NOW: Duration = Duration::from_millis(100);
/// Shorter gaps are not remembered for that.
const GAP_MIN: Duration = Duration::from_millis(5);
/// Gaps remembered.
const GAPS_MAX: usize = 32;
/// What fails so soon after a sleep of the host failed because of it.
const AFTER_SLEEP: Duration = Duration::from_secs(10);

/// A handover that begins.
pub(super) struct Move {
    from: Path,
    trigger: Trigger,
    why: String,
    soft: bool,
    noticed: Instant,
    detection: Option<Duration>,
    /// Dials counted before those that were made for it.
    dials: Option<u64>,
    remark: Option<String>,
}

impl Move {
    pub fn hard(from: &Path, trigger: Trigger, why: &str, noticed: Instant) -> Self {
        Self {
            from: from.clone(),
            trigger,
            why: why.to_owned(),
            soft: false,
            noticed,
            detection: None,
            dials: None,
            remark: None,
        }
    }

    pub fn soft(from: &Path, trigger: Trigger, why: &str) -> Self {
        Self {
            soft: true,
            ..Self::hard(from, trigger, why, Instant::now())
        }
    }

    /// The transport in use did not answer.
    pub fn silent(from: &Path, suspicion: &Suspicion) -> Self {
        let (trigger, why) = if suspicion.slept {
            (
                Trigger::Woke,
                "the host has slept, and it did not answer in time",
            )
        } else {
            (Trigger::Silent, "it did not answer in time")
        };
        Self {
            detection: suspicion.unanswered,
            dials: Some(suspicion.dials),
            remark: suspicion.remark.clone(),
            ..Self::hard(from, trigger, why, suspicion.noticed)
        }
    }

    /// It took from the notice until now to decide.
    pub fn decided_now(mut self) -> Self {
        self.detection = Some(self.noticed.elapsed());
        self
    }
}

/// The active transport does not answer in time.
#[derive(Clone)]
pub(super) struct Suspicion {
    pub noticed: Instant,
    /// The core's counters before anything was sent again.
    pub before: Stats,
    unanswered: Option<Duration>,
    dials: u64,
    slept: bool,
    /// What was found out about its path since.
    remark: Option<String>,
}

/// A gap in what an application's socket got.
#[derive(Clone, Copy)]
struct Gap {
    stream: StreamId,
    from: Instant,
    to: Instant,
}

/// The handover that is not told yet.
struct Open {
    told: Handover,
    noticed: Instant,
    begun: Instant,
    dials: u64,
    /// The new transport.
    on: Option<Handle>,
    over: Option<Instant>,
    look_at: Option<Instant>,
    /// What was found out on the way, each behind a semicolon.
    remarks: String,
    /// Streams that were active before.
    active: BTreeSet<StreamId>,
    stall: Option<Duration>,
}

impl Open {
    fn remark(&mut self, words: &str) {
        self.remarks.push_str("; ");
        self.remarks.push_str(words);
    }

    fn gap(&mut self, gap: Gap) {
        if gap.from <= self.begun && gap.from + ACTIVE >= self.noticed {
            self.active.insert(gap.stream);
        }
        if self.active.contains(&gap.stream) {
            self.stall = self.stall.max(Some(gap.to - gap.from));
        }
    }
}

/// What the driver counts beside the core, and what it tells of handovers.
pub(super) struct Counters {
    pub opened: u64,
    pub closed: u64,
    pub trace: SessionTrace,
    /// The core's counters when the last turn ended.
    pub settled: Stats,
    pub handovers_total: u64,
    /// Those that are over, oldest first.
    past: VecDeque<Handover>,
    open: Option<Open>,
    suspicion: Option<Suspicion>,
    gaps: VecDeque<Gap>,
    /// The policy's latest answer.
    decision: Option<(String, Vec<PathChoice>)>,
    /// Dials that were to find what carries.
    dials: u64,
    /// The same before the latest move to a better path was wanted.
    soft_dials: Option<u64>,
    woke: Option<Instant>,
}

impl Counters {
    pub fn new(trace: SessionTrace) -> Self {
        Self {
            opened: 0,
            closed: 0,
            trace,
            settled: Stats::default(),
            handovers_total: 0,
            past: VecDeque::new(),
            open: None,
            suspicion: None,
            gaps: VecDeque::new(),
            decision: None,
            dials: 0,
            soft_dials: None,
            woke: None,
        }
    }

    pub fn closed(&mut self, app: &App) {
        self.closed += 1;
        tracing::debug!(target = %app.target, tx = app.bytes_read, rx = app.bytes_written, "a stream is over");
    }

    /// A handover begins. One that never got to its end is replaced: the newer cause is the one
    /// that leads somewhere, but the first notice is what the application waits from.
    pub fn begin(&mut self, mut new: Move) {
        let slept = self.woke.is_some_and(|at| at.elapsed() < AFTER_SLEEP);
        if slept && new.trigger == Trigger::TransportFailed {
            new.trigger = Trigger::Woke;
        }
        let noticed_ns = monotonic_ns(new.noticed);
        if let Some(open) = self.open.as_mut().filter(|open| open.over.is_none()) {
            let told = &mut open.told;
            if told.soft && !new.soft {
                told.soft = false;
                told.trigger = new.trigger;
                told.why = new.why;
                told.detection_ms = new.detection.map(millis);
                told.noticed_ns = noticed_ns;
                told.decision = None;
                told.choices.clear();
                open.noticed = new.noticed;
            }
            return;
        }
        self.tell();
        self.handovers_total += 1;
        let soft_dials = self.soft_dials.take();
        let dials = new.dials.or(soft_dials.filter(|_| new.soft));
        let mut open = Open {
            told: self.described(&new, noticed_ns),
            noticed: new.noticed,
            begun: Instant::now(),
            dials: dials.unwrap_or(self.dials),
            on: None,
            over: None,
            look_at: None,
            remarks: String::new(),
            active: BTreeSet::new(),
            stall: None,
        };
        if let Some(words) = &new.remark {
            open.remark(words);
        }
        for gap in &self.gaps {
            if gap.to + JUST_NOW >= new.noticed {
                open.gap(*gap);
            }
        }
        if new.soft
            && let Some((_, choices)) = &self.decision
        {
            open.told.decision = Some(open.told.why.clone());
            open.told.choices.clone_from(choices);
        }
        self.open = Some(open);
    }

    fn described(&self, new: &Move, noticed_ns: u64) -> Handover {
        let when = SystemTime::now()
            .checked_sub(new.noticed.elapsed())
            .and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
        Handover {
            session: self.trace.session().to_owned(),
            peer: self.trace.peer().to_owned(),
            number: self.handovers_total,
            when_s: when.unwrap_or_default().as_secs_f64(),
            soft: new.soft,
            from: path_info(&new.from),
            to: None,
            trigger: new.trigger,
            why: new.why.clone(),
            decision: None,
            choices: Vec::new(),
            detection_ms: new.detection.map(millis),
            resumed_ms: None,
            first_sent_ms: None,
            first_acknowledged_ms: None,
            first_received_ms: None,
            resent_records: 0,
            resent_bytes: 0,
            stall_ms: None,
            warm: None,
            attempts: 0,
            noticed_ns,
            resent_ns: None,
            resumed_ns: None,
        }
    }

    /// The policy has answered.
    pub fn decided(&mut self, decision: &Decision) {
        let choices = decision.ordered.iter().map(|choice| PathChoice {
            link: choice.path.link.clone(),
            remote: choice.path.remote,
            reason: choice.reason.clone(),
            demoted: choice.demoted,
            standby: choice.standby.to_string(),
        });
        let choices: Vec<PathChoice> = choices.collect();
        if let Some(open) = &mut self.open
            && open.told.choices.is_empty()
        {
            open.told.choices.clone_from(&choices);
            open.told.decision = Some(match &open.told.to {
                Some(to) if open.told.warm == Some(true) => {
                    format!("the standby on {} took over; {}", to.link, decision.reason)
                }
                _ => decision.reason.clone(),
            });
        }
        self.decision = Some((decision.reason.clone(), choices));
    }

    /// Adds to the reasons of the open handover, or of the one that a silence is about to begin.
    pub fn remark(&mut self, words: &str) {
        match &mut self.open {
            Some(open) if open.over.is_none() || self.suspicion.is_none() => open.remark(words),
            _ => {
                if let Some(suspicion) = &mut self.suspicion {
                    suspicion.remark = Some(words.to_owned());
                }
            }
        }
    }

    /// What carries is dialled; `soft`: beside what carries now.
    pub fn dialling(&mut self, soft: bool) {
        if soft {
            self.soft_dials.get_or_insert(self.dials);
        }
        self.dials += 1;
    }

    /// The host has slept.
    pub fn woke(&mut self) {
        self.woke = Some(Instant::now());
    }

    /// The active transport does not answer in time; the oldest was written so long ago.
    pub fn suspect(&mut self, unanswered: Option<Duration>) {
        self.suspicion = Some(Suspicion {
            unanswered,
            ..self.unsuspecting()
        });
    }

    /// When the active transport fell silent, and the counters then.
    pub fn suspected(&mut self) -> Suspicion {
        let none = self.unsuspecting();
        self.suspicion.take().unwrap_or(none)
    }

    fn unsuspecting(&self) -> Suspicion {
        Suspicion {
            noticed: Instant::now(),
            before: self.settled,
            unanswered: None,
            dials: self.dials,
            slept: self.woke.is_some_and(|at| at.elapsed() < AFTER_SLEEP),
            remark: None,
        }
    }

    /// Whether the handover is over when something comes on `handle`.
    pub fn awaits(&self, handle: Handle) -> bool {
        self.open
            .as_ref()
            .is_some_and(|o| o.on == Some(handle) && o.over.is_none())
    }

    /// New records go to `handle`: what went again to it is the difference of the counters.
    pub fn moved(&mut self, handle: Handle, path: &Path, warm: bool, before: &Stats, now: &Stats) {
        if let Some(open) = self.open.as_mut().filter(|open| open.over.is_none()) {
            open.on = Some(handle);
            let told = &mut open.told;
            told.to = Some(path_info(path));
            told.warm = Some(warm && self.dials == open.dials);
            told.resent_ns = Some(monotonic_ns(Instant::now()));
            told.resent_records += now.records_resent - before.records_resent;
            told.resent_bytes += now.bytes_resent - before.bytes_resent;
        }
    }

    /// The peer was heard on the new transport.
    pub fn up(&mut self) {
        if let Some(open) = self.open.as_mut().filter(|open| open.over.is_none()) {
            let now = Instant::now();
            open.over = Some(now);
            open.look_at = Some(now + SETTLE);
            open.told.attempts = self.dials - open.dials;
            open.told.resumed_ns = Some(monotonic_ns(now));
            open.told.resumed_ms = Some(millis(now.saturating_duration_since(open.noticed)));
        }
    }

    /// An application's socket took bytes; `last`: and had before.
    pub fn wrote(&mut self, stream: StreamId, last: Option<Instant>, now: Instant) {
        let Some(from) = last else { return };
        let gap = Gap {
            stream,
            from,
            to: now,
        };
        if let Some(open) = &mut self.open {
            open.gap(gap);
        }
        if now - from >= GAP_MIN {
            if self.gaps.len() == GAPS_MAX {
                self.gaps.pop_front();
            }
            self.gaps.push_back(gap);
        }
    }

    /// When the open handover is to be looked at again.
    pub fn look_at(&self) -> Option<Instant> {
        self.open.as_ref()?.look_at
    }

    /// Tells the open handover as it stands.
    pub fn tell(&mut self) {
        let Some(mut open) = self.open.take() else {
            return;
        };
        open.told.stall_ms = open.stall.map(millis);
        if !open.remarks.is_empty() {
            let decision = open.told.decision.take().unwrap_or_default();
            let all = format!("{decision}{}", open.remarks);
            open.told.decision = Some(all.trim_start_matches("; ").to_owned());
        }
        self.trace.handover(&open.told);
        if self.past.len() == HANDOVERS_KEPT {
            self.past.pop_front();
        }
        self.past.push_back(open.told);
    }

    /// The latest handovers, oldest first, the open one as the last.
    pub fn handovers(&self) -> Vec<Handover> {
        let open = self.open.iter().map(|open| &open.told);
        self.past.iter().chain(open).cloned().collect()
    }
}

impl Driver {
    /// Notes what came first on the new transport of the open handover: it may not live long.
    pub(super) fn note_firsts(&mut self) {
        let Some((handle, noticed)) =
            (self.report.open.as_ref()).and_then(|o| Some((o.on?, o.noticed)))
        else {
            return;
        };
        let firsts: Firsts = self.session.firsts(handle);
        let since = |time: Option<session_proto::Time>| {
            let at = self.clock.instant(time?);
            Some(millis(at.saturating_duration_since(noticed)))
        };
        if let Some(open) = &mut self.report.open {
            let told = &mut open.told;
            told.first_sent_ms = told.first_sent_ms.or(since(firsts.sent));
            told.first_acknowledged_ms = told.first_acknowledged_ms.or(since(firsts.acknowledged));
            told.first_received_ms = told.first_received_ms.or(since(firsts.received));
        }
    }

    /// Tells the open handover once the streams have had their time.
    pub(super) fn settle_handover(&mut self, now: Instant) {
        if self.report.look_at().is_none_or(|at| now < at) {
            return;
        }
        self.note_firsts();
        let Some(open) = &mut self.report.open else {
            return;
        };
        let waits = |app: &App| {
            app.written_at
                .is_some_and(|at| at <= open.begun && at + ACTIVE >= open.noticed)
        };
        let unanswered =
            open.told.first_sent_ms.is_some() && open.told.first_acknowledged_ms.is_none();
        let waiting = unanswered || self.apps.values().any(waits);
        if waiting && open.over.is_some_and(|at| now < at + SETTLE_MAX) {
            open.look_at = Some(now + LOOK_AGAIN);
            return;
        }
        let carrier = open.on.and_then(|h| Some((h, self.carriers.get(&h)?)));
        if let Some((handle, carrier)) = carrier
            && let Ok(info) = tcp_info(&carrier.socket)
        {
            let metrics = Metrics {
                rtt: info.rtt,
                rtt_variance: info.rttvar,
                window: u64::from(info.snd_cwnd) * u64::from(info.snd_mss),
                in_flight: u64::from(info.unacked) * u64::from(info.snd_mss),
            };
            self.report.trace.metrics(handle.as_u64(), &metrics);
        }
        self.report.tell();
    }

    /// The session is over: whatever is open ends with it.
    pub(super) fn tell_end(&mut self, ended: &Ended) {
        self.note_firsts();
        self.report.tell();
        let (code, reason, by_peer) = match ended {
            Ended::Closed {
                code,
                reason,
                by_peer,
            } => (Some(*code), reason.as_str(), *by_peer),
            Ended::Replaced(_) => (None, "the peer no longer knows the session", true),
            Ended::PeerGone => (None, "the peer is gone", false),
        };
        self.report.trace.closed(code, reason, by_peer);
    }

    /// Why a soft move is made: `to` was chosen by hand, or it is preferred.
    pub(super) fn soft_trigger(&self, to: &str) -> Trigger {
        match &self.side {
            Side::Initiator(i) if i.config.policy.manual.as_deref() == Some(to) => Trigger::ByHand,
            _ => Trigger::PreferredLink,
        }
    }
}

pub(super) fn path_info(path: &Path) -> PathInfo {
    PathInfo {
        link: path.link.clone(),
        local: path.local,
        remote: path.remote,
    }
}

fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
