//! The key schedule: generations, steps, and which keys are alive.

use super::SealError;
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

/// What a full handshake leaves behind: the secret of generation 0 and what hangs on it for the
/// whole life of the session.
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

    /// The session's name: on the wire only inside records, in logs and commands for people.
    pub fn session_id(&self) -> [u8; 16] {
        self.root.expand("session id", &[])
    }

    /// The single-use name of the session in the preamble of the dialler's transport `counter`.
    pub fn resume_token(&self, dialler: Direction, counter: u64) -> ResumeToken {
        let mut context = [0; 9];
        context[0] = dialler.code();
        context[1..].copy_from_slice(&counter.to_be_bytes());
        self.root.derive("resume", &[]).expand("token", &context)
    }

    /// Keys to seal with in `direction`.
    pub fn seal_keys(&self, direction: Direction) -> SealKeys {
        let generation = Generation {
            number: 0,
            aead: self.aead,
            root: self.root.clone(),
        };
        let current = generation.first_step(direction);
        SealKeys {
            direction,
            generation,
            current,
        }
    }

    /// Keys to open with in `direction`.
    pub fn open_keys(&self, direction: Direction) -> OpenKeys {
        let generation = Generation {
            number: 0,
            aead: self.aead,
            root: self.root.clone(),
        };
        let first = generation.first_step(direction);
        OpenKeys {
            direction,
            generation,
            next: None,
            live: vec![LiveEpoch {
                step: first,
                end: None,
            }],
        }
    }
}

#[derive(Clone, Debug)]
struct Generation {
    number: u16,
    aead: Aead,
    root: Secret,
}

impl Generation {
    fn first_step(&self, direction: Direction) -> Step {
        let secret = self.root.derive("direction", &[direction.code()]);
        Step::new(self.aead, Epoch::new(self.number, 0), secret)
    }

    fn following(&self, aead: Aead, exporter: &Secret) -> Self {
        let chain: [u8; 32] = self.root.expand("chain", &[]);
        Self {
            number: self.number.wrapping_add(1),
            aead,
            root: exporter.extract(&chain),
        }
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
        RecordKey::new(self.aead, &self.secret, "u", &transport.to_be_bytes())
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

    /// The key of space R.
    pub fn retained(&self) -> &RecordKey {
        &self.current.retained
    }

    /// The key of space U on `transport`, in the current epoch.
    pub fn transport_key(&self, transport: u64) -> RecordKey {
        self.current.transport_key(transport)
    }

    /// Goes to the next step; the old key is wiped.
    pub fn ratchet(&mut self) {
        self.current = self.current.following();
    }

    /// Goes to the next generation with the exporter of an in-band handshake; old keys are wiped.
    pub fn advance_generation(&mut self, aead: Aead, exporter: &Secret) {
        self.generation = self.generation.following(aead, exporter);
        self.current = self.generation.first_step(self.direction);
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
    next: Option<Generation>,
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
        self.next = Some(self.generation.following(aead, exporter));
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
        if let Some(live) = self.live.iter().find(|l| l.step.epoch == epoch) {
            return open_with(&live.step, transport, header, number, sealed);
        }
        let newest = self.newest();
        if epoch < newest {
            return Err(SealError::Retired(epoch));
        }
        let steps = self.steps_to(epoch)?;
        let reached = steps.last().ok_or(SealError::Unexpected(epoch))?;
        let len = open_with(reached, transport, header, number, sealed)?;
        if epoch.generation() != newest.generation() {
            if let Some(next) = self.next.take() {
                self.generation = next;
            }
        }
        self.live
            .extend(steps.into_iter().map(|step| LiveEpoch { step, end: None }));
        Ok(len)
    }

    /// The epochs between the newest and `epoch`, which must be close ahead.
    fn steps_to(&self, epoch: Epoch) -> Result<Vec<Step>, SealError> {
        let newest = self.live.last().ok_or(SealError::Unexpected(epoch))?;
        let mut steps = Vec::new();
        if epoch.generation() != newest.step.epoch.generation() {
            let next = self
                .next
                .as_ref()
                .filter(|n| n.number == epoch.generation());
            steps.push(
                next.ok_or(SealError::Unexpected(epoch))?
                    .first_step(self.direction),
            );
        } else {
            steps.push(newest.step.following());
        }
        while let Some(last) = steps.last().filter(|s| s.epoch < epoch) {
            if self.live.len() + steps.len() >= EPOCHS_LIVE_MAX {
                break;
            }
            steps.push(last.following());
        }
        let reached = steps.last().is_some_and(|s| s.epoch == epoch);
        if reached && self.live.len() + steps.len() <= EPOCHS_LIVE_MAX {
            Ok(steps)
        } else {
            Err(SealError::Unexpected(epoch))
        }
    }

    /// The key of space U on `transport` in `epoch`, while that epoch is alive.
    pub fn transport_key(&self, epoch: Epoch, transport: u64) -> Option<RecordKey> {
        let live = self.live.iter().find(|l| l.step.epoch == epoch)?;
        Some(live.step.transport_key(transport))
    }

    /// Whether `epoch` has keys.
    pub fn is_live(&self, epoch: Epoch) -> bool {
        self.live.iter().any(|l| l.step.epoch == epoch)
    }

    /// The sender said that numbers from `first` on are of `next` or later, in a record of the epoch before.
    pub fn announce(&mut self, next: Epoch, first: u64) {
        if let Some(before) = self.live.iter_mut().rev().find(|l| l.step.epoch < next) {
            before.end = Some(first);
        }
    }

    /// Wipes the keys of epochs of which every number below `cumulative` has arrived.
    /// True if any were wiped.
    pub fn retire(&mut self, cumulative: u64) -> bool {
        let before = self.live.len();
        let newest = self.newest();
        self.live
            .retain(|l| l.step.epoch == newest || l.end.is_none_or(|end| end > cumulative));
        self.live.len() != before
    }
}

fn open_with(
    step: &Step,
    transport: Option<u64>,
    header: &[u8; crate::limits::RECORD_HEADER_BYTES],
    number: u64,
    sealed: &mut [u8],
) -> Result<usize, SealError> {
    match transport {
        None => step.retained.open(header, number, sealed),
        // A key schedule per record would be dear: the caller keeps the key that
        // `OpenKeys::transport_key` gives once a record of an epoch has been opened this way.
        Some(id) => step.transport_key(id).open(header, number, sealed),
    }
}
