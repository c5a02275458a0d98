//! The key schedule: generations, steps, and which keys are alive.

use super::SealError;
use super::connection::Connection;
use super::keys::{Aead, RecordKey, Secret};
use crate::limits::EPOCHS_LIVE_MAX;
use crate::wire::ResumeToken;

/// Which way records go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the unit that made the session.
    FromInitiator,
    /// From the unit that accepted it.
    FromResponder,
}

impl Direction {
    const fn code(self) -> u8 {
        match self {
            Self::FromInitiator => 0,
            Self::FromResponder => 1,
        }
    }
}

/// A key epoch of one direction: the generation in the upper 16 bits, the step in the lower.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(pub u32);

impl Epoch {
    const fn new(generation: u16, step: u16) -> Self {
        Self((generation as u32) << 16 | step as u32)
    }

    /// Counts the TLS handshakes behind the keys, from 0.
    pub const fn generation(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// Counts the ratchet steps within the generation, from 0.
    pub const fn step(self) -> u16 {
        self.0 as u16
    }
}

/// What a full handshake leaves behind. It lives only until a session has taken its keys and names
/// from it: whoever holds it can derive every key of generation 0.
#[derive(Clone, Debug)]
pub struct SessionSecret {
    aead: Aead,
    root: Secret,
}

impl SessionSecret {
    /// From the TLS exporter's output, whose context already binds both certificates.
    pub fn new(aead: Aead, exporter: &Secret) -> Self {
        Self {
            aead,
            root: exporter.extract(b"holdfast1 generation 0"),
        }
    }

    /// The names that the session has for its whole life.
    pub fn names(&self) -> SessionNames {
        SessionNames {
            id: self.root.expand("session id", &[]),
            resume: self.root.derive("resume", &[]),
        }
    }

    /// Keys to seal with in `direction`.
    pub fn seal_keys(&self, direction: Direction) -> SealKeys {
        let begun = Begun::new(0, self.aead, &self.root, direction);
        SealKeys {
            direction,
            current: begun.first_step(),
            generation: begun.generation,
        }
    }

    /// Keys to open with in `direction`.
    pub fn open_keys(&self, direction: Direction) -> OpenKeys {
        let begun = Begun::new(0, self.aead, &self.root, direction);
        OpenKeys {
            direction,
            live: vec![LiveEpoch {
                step: begun.first_step(),
                end: None,
            }],
            generation: begun.generation,
            next: None,
        }
    }
}

/// The session's names: one for people, and one for each resume. No key can be derived from them.
#[derive(Clone, Debug)]
pub struct SessionNames {
    id: [u8; 16],
    resume: Secret,
}

impl SessionNames {
    /// The session's name: on the wire only inside records, in logs and commands for people.
    pub fn session_id(&self) -> [u8; 16] {
        self.id
    }

    /// The single-use name of the session in the preamble of the dialler's transport `counter`.
    pub fn resume_token(&self, dialler: Direction, counter: u64) -> ResumeToken {
        let mut context = [0; 9];
        context[0] = dialler.code();
        context[1..].copy_from_slice(&counter.to_be_bytes());
        self.resume.expand("token", &context)
    }

    /// What the packets of `direction` are called on the path that `counter` stands for.
    pub fn connection(&self, direction: Direction, counter: u64) -> Connection {
        let mut context = [0; 9];
        context[0] = direction.code();
        context[1..].copy_from_slice(&counter.to_be_bytes());
        Connection::new(&self.resume.expand("connection", &context))
    }
}

/// What is kept of a generation: enough for the one after it, nothing to derive its own keys from.
#[derive(Debug)]
struct Generation {
    number: u16,
    aead: Aead,
    chain: Secret,
}

impl Generation {
    fn following(&self, aead: Aead, exporter: &Secret, direction: Direction) -> Begun {
        let root = exporter.extract(self.chain.expose());
        Begun::new(self.number.wrapping_add(1), aead, &root, direction)
    }
}

/// A generation of which no record has been sealed or opened yet.
#[derive(Debug)]
struct Begun {
    generation: Generation,
    first: Secret,
}

impl Begun {
    fn new(number: u16, aead: Aead, root: &Secret, direction: Direction) -> Self {
        Self {
            generation: Generation {
                number,
                aead,
                chain: root.derive("chain", &[]),
            },
            first: root.derive("direction", &[direction.code()]),
        }
    }

    fn first_step(&self) -> Step {
        let epoch = Epoch::new(self.generation.number, 0);
        Step::new(self.generation.aead, epoch, self.first.clone())
    }
}

/// The secret and keys of one epoch.
#[derive(Debug)]
struct Step {
    aead: Aead,
    epoch: Epoch,
    secret: Secret,
    retained: RecordKey,
}

impl Step {
    fn new(aead: Aead, epoch: Epoch, secret: Secret) -> Self {
        let retained = RecordKey::new(aead, &secret, "r", &[]);
        Self {
            aead,
            epoch,
            secret,
            retained,
        }
    }

    fn following(&self) -> Self {
        let epoch = Epoch::new(self.epoch.generation(), self.epoch.step().wrapping_add(1));
        Self::new(self.aead, epoch, self.secret.derive("rekey", &[]))
    }

    fn transport_key(&self, transport: u64) -> RecordKey {
        RecordKey::of_small(self.aead, &self.secret, "u", &transport.to_be_bytes())
    }

    fn datagram_key(&self) -> RecordKey {
        RecordKey::of_small(self.aead, &self.secret, "d", &[])
    }
}

/// The sender's keys of one direction: always exactly one epoch, since a sender keeps ciphertext only.
#[derive(Debug)]
pub struct SealKeys {
    direction: Direction,
    generation: Generation,
    current: Step,
}

impl SealKeys {
    /// The epoch that the next record is sealed in.
    pub fn epoch(&self) -> Epoch {
        self.current.epoch
    }

    /// The epoch that [`Self::ratchet`] leads to; `None` at the end of a generation's steps.
    pub fn next_step(&self) -> Option<Epoch> {
        let step = self.current.epoch.step().checked_add(1)?;
        Some(Epoch::new(self.current.epoch.generation(), step))
    }

    /// The epoch that [`Self::advance_generation`] leads to.
    pub fn next_generation(&self) -> Epoch {
        Epoch::new(self.generation.number.wrapping_add(1), 0)
    }

    /// The AEAD that it is sealed with.
    pub fn aead(&self) -> Aead {
        self.current.aead
    }

    /// The key of space R.
    pub fn retained(&self) -> &RecordKey {
        &self.current.retained
    }

    /// The key of space U on `transport`, in the current epoch.
    pub fn transport_key(&self, transport: u64) -> RecordKey {
        self.current.transport_key(transport)
    }

    /// The key of space D in the current epoch.
    pub fn datagram_key(&self) -> RecordKey {
        self.current.datagram_key()
    }

    /// Goes to the next step; the old key is dropped, its secret wiped.
    pub fn ratchet(&mut self) {
        self.current = self.current.following();
    }

    /// Goes to the next generation with the exporter of an in-band handshake; old keys are dropped.
    pub fn advance_generation(&mut self, aead: Aead, exporter: &Secret) {
        let begun = self.generation.following(aead, exporter, self.direction);
        self.current = begun.first_step();
        self.generation = begun.generation;
    }
}

#[derive(Debug)]
struct LiveEpoch {
    step: Step,
    /// First number of space R that is not of this epoch, once the sender has said it.
    end: Option<u64>,
}

/// The receiver's keys of one direction: the epochs whose records may still arrive.
#[derive(Debug)]
pub struct OpenKeys {
    direction: Direction,
    generation: Generation,
    /// The generation agreed in band that the sender has not begun to use.
    next: Option<Begun>,
    /// Ascending, never empty, at most [`EPOCHS_LIVE_MAX`].
    live: Vec<LiveEpoch>,
}

impl OpenKeys {
    /// How many epochs have keys.
    pub fn live(&self) -> usize {
        self.live.len()
    }

    /// The newest epoch seen.
    pub fn newest(&self) -> Epoch {
        self.live.last().map_or(Epoch(0), |l| l.step.epoch)
    }

    /// Agrees the next generation; its keys are used from its first authentic record on.
    pub fn install_generation(&mut self, aead: Aead, exporter: &Secret) {
        self.next = Some(self.generation.following(aead, exporter, self.direction));
    }

    /// Opens a record of space R, or of space U on `transport`, in place; returns the length of
    /// the plaintext. A new epoch is taken over only if the record proves to be authentic.
    pub fn open(
        &mut self,
        epoch: Epoch,
        transport: Option<u64>,
        header: &[u8; crate::limits::RECORD_HEADER_BYTES],
        number: u64,
        sealed: &mut [u8],
    ) -> Result<usize, SealError> {
        self.open_by(epoch, |step| match transport {
            None => step.retained.open(header, number, sealed),
            // A key schedule per record would be dear: the caller keeps the key that
            // `OpenKeys::transport_key` gives once a record of an epoch has been opened this way.
            Some(id) => step.transport_key(id).open(header, number, sealed),
        })
    }

    /// The same for a packet of space D, of whose key the caller has none yet:
    /// [`Self::datagram_key`] gives it afterwards.
    pub fn open_datagram(
        &mut self,
        epoch: Epoch,
        header: &[u8; crate::limits::PACKET_HEADER_BYTES],
        number: u64,
        sealed: &mut [u8],
    ) -> Result<usize, SealError> {
        self.open_by(epoch, |step| {
            step.datagram_key().open(header, number, sealed)
        })
    }

    fn open_by(
        &mut self,
        epoch: Epoch,
        with: impl FnOnce(&Step) -> Result<usize, SealError>,
    ) -> Result<usize, SealError> {
        let at = (self.live.iter())
            .rposition(|l| l.step.epoch <= epoch)
            .ok_or(SealError::Retired(epoch))?;
        if self.live[at].step.epoch == epoch {
            return with(&self.live[at].step);
        }
        let steps = self.steps_behind(at, epoch)?;
        let reached = steps.last().ok_or(SealError::Unexpected(epoch))?;
        let len = with(reached)?;
        self.adopt(at, steps);
        Ok(len)
    }

    /// The epochs that follow the live one at `at`, up to `epoch`, which must be close. Another
    /// live one may follow already: records of the next generation can overtake the last steps of
    /// this one when they travel on two transports.
    fn steps_behind(&self, at: usize, epoch: Epoch) -> Result<Vec<Step>, SealError> {
        let base = &self.live[at].step;
        let room = EPOCHS_LIVE_MAX.saturating_sub(self.live.len());
        let first = if epoch.generation() == base.epoch.generation() {
            base.following()
        } else {
            let next = self
                .next
                .as_ref()
                .filter(|n| at + 1 == self.live.len() && n.generation.number == epoch.generation());
            next.ok_or(SealError::Unexpected(epoch))?.first_step()
        };
        let mut steps = vec![first];
        while steps.len() < room {
            let Some(last) = steps.last().filter(|s| s.epoch < epoch) else {
                break;
            };
            steps.push(last.following());
        }
        let reached = steps.last().is_some_and(|s| s.epoch == epoch);
        if reached && steps.len() <= room {
            Ok(steps)
        } else {
            Err(SealError::Unexpected(epoch))
        }
    }

    /// Takes `steps` over behind the live epoch at `at`.
    fn adopt(&mut self, at: usize, steps: Vec<Step>) {
        let begins = |s: &Step| s.epoch.generation() != self.generation.number;
        if at + 1 == self.live.len()
            && steps.first().is_some_and(begins)
            && let Some(next) = self.next.take()
        {
            self.generation = next.generation;
        }
        let behind = self.live.split_off(at + 1);
        let fresh = steps.into_iter().map(|step| LiveEpoch { step, end: None });
        self.live.extend(fresh);
        self.live.extend(behind);
    }

    /// The key of space U on `transport` in `epoch`, while that epoch is alive.
    pub fn transport_key(&self, epoch: Epoch, transport: u64) -> Option<RecordKey> {
        let live = self.live.iter().find(|l| l.step.epoch == epoch)?;
        Some(live.step.transport_key(transport))
    }

    /// The key of space D in `epoch`, while that epoch is alive.
    pub fn datagram_key(&self, epoch: Epoch) -> Option<RecordKey> {
        let live = self.live.iter().find(|l| l.step.epoch == epoch)?;
        Some(live.step.datagram_key())
    }

    /// Whether `epoch` has keys.
    pub fn is_live(&self, epoch: Epoch) -> bool {
        self.live.iter().any(|l| l.step.epoch == epoch)
    }

    /// The sender said, in a record of the epoch before, that numbers from `first` on are of
    /// `next` or later. The step is taken at once: when the last old record has arrived, the old
    /// key must not be needed to derive the new one.
    pub fn announce(&mut self, next: Epoch, first: u64) {
        let Some(at) = self.live.iter().rposition(|l| l.step.epoch < next) else {
            return;
        };
        self.live[at].end = Some(first);
        if !self.is_live(next)
            && let Ok(steps) = self.steps_behind(at, next)
        {
            self.adopt(at, steps);
        }
    }

    /// Drops the keys of epochs whose last number is below `cumulative`, so that all have arrived.
    /// True if any were wiped.
    pub fn retire(&mut self, cumulative: u64) -> bool {
        let before = self.live.len();
        let newest = self.newest();
        self.live
            .retain(|l| l.step.epoch == newest || l.end.is_none_or(|end| end > cumulative));
        self.live.len() != before
    }
}
