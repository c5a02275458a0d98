//! What runs consisted of: the proof that what they are for did happen in them.

use std::time::Duration;

/// What a run consisted of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Steps of virtual time.
    pub steps: u64,
    /// Events of both sessions.
    pub events: u64,
    /// Application bytes delivered.
    pub bytes: u64,
    /// Bytes given to wires.
    pub wire_bytes: u64,
    /// Streams opened.
    pub streams: u64,
    /// Transports authenticated after the first.
    pub resumes: u64,
    /// Generations of keys begun.
    pub renewals: u64,
    /// Transports that fell silent.
    pub silences: u64,
    /// Moves to a transport that answered while the active one was silent.
    pub guesses: u64,
    /// Full handshakes that asked for the session.
    pub rejoins: u64,
    /// Copies of records inserted.
    pub copies: u64,
    /// Connections made by the attacker.
    pub replays: u64,
    /// Records scheduled again on another transport.
    pub resent: u64,
    /// Records that went out on two transports because their stream asked for it.
    pub doubled: u64,
    /// Bytes of streams that were packed, and what became of them.
    pub packed: u64,
    /// See `packed`.
    pub packed_to: u64,
    /// Streams opened that ask for redundant transport.
    pub redundant: u64,
    /// The same for bonded.
    pub bonded: u64,
    /// Lanes dialled.
    pub lanes: u64,
    /// Urgent bytes sent, and seen as such.
    pub marks: u64,
    /// See `marks`.
    pub marks_seen: u64,
    /// Losses and MTU holes that began while a redundant or bonded stream was open.
    pub half_dead: u64,
    /// Key epochs begun.
    pub rekeys: u64,
    /// Faults of the link, the host or the driver, by [`Fault`].
    pub faults: [u64; Fault::ALL.len()],
    /// Faults that followed soon upon something else.
    pub triggered: u64,
    /// Records that were watched while a link worked all the time.
    pub watched: u64,
    /// Moves of both ends at once that had to end in agreement.
    pub agreements: u64,
    /// Doubts in which the bytes sent twice were counted.
    pub hedges: u64,
    /// Flows opened.
    pub flows: u64,
    /// Datagrams sent, and delivered.
    pub datagrams: u64,
    /// See `datagrams`.
    pub arrived: u64,
    /// Packets of the UDP transport.
    pub packets: u64,
    /// Packets of an attacker.
    pub forged: u64,
    /// Packets with a part of a datagram.
    pub parts: u64,
    /// Datagrams of which a part was lost.
    pub incomplete: u64,
    /// Copies of datagrams that were dropped.
    pub repeated: u64,
    /// Times that the initiator preferred another path.
    pub preferences: u64,
    /// Addresses that a NAT or a new socket replaced.
    pub rebinds: u64,
    /// Addresses that a responder validated and adopted.
    pub adopted: u64,
    /// Paths that were found to be blocked.
    pub blocked: u64,
    /// Flows on which datagrams went both ways once all was calm.
    pub proofs: u64,
    /// The longest interruption of a conversation while one link worked.
    pub longest_gap: Duration,
}

/// What else can happen to transports than that they die and both ends hear of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A link loses packets.
    Loss,
    /// A link passes small segments only.
    SmallMtu,
    /// A NAT forgets connections.
    NatForgets,
    /// An address is replaced.
    AddressGone,
    /// A host sleeps and wakes.
    Sleep,
    /// Both ends lose all transports at once.
    BothLose,
    /// Both ends move at once.
    BothMove,
    /// A link goes down and up, many times.
    Flap,
    /// An end learns late, several at once, perhaps in the wrong order.
    LateDriver,
    /// A driver takes a transport for silent, rightly or not.
    Suspicion,
}

impl Fault {
    /// All of them, with their names.
    pub const ALL: [(Self, &'static str); 10] = [
        (Self::Loss, "losses"),
        (Self::SmallMtu, "MTU holes"),
        (Self::NatForgets, "NATs that forgot"),
        (Self::AddressGone, "addresses replaced"),
        (Self::Sleep, "sleeps"),
        (Self::BothLose, "losses at both ends"),
        (Self::BothMove, "moves at both ends"),
        (Self::Flap, "flaps"),
        (Self::LateDriver, "late drivers"),
        (Self::Suspicion, "suspicions"),
    ];
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.steps += other.steps;
        self.events += other.events;
        self.bytes += other.bytes;
        self.wire_bytes += other.wire_bytes;
        self.streams += other.streams;
        self.resumes += other.resumes;
        self.renewals += other.renewals;
        self.silences += other.silences;
        self.guesses += other.guesses;
        self.rejoins += other.rejoins;
        self.copies += other.copies;
        self.replays += other.replays;
        self.resent += other.resent;
        self.doubled += other.doubled;
        self.packed += other.packed;
        self.packed_to += other.packed_to;
        self.redundant += other.redundant;
        self.bonded += other.bonded;
        self.lanes += other.lanes;
        self.marks += other.marks;
        self.marks_seen += other.marks_seen;
        self.half_dead += other.half_dead;
        self.rekeys += other.rekeys;
        for (sum, more) in self.faults.iter_mut().zip(other.faults) {
            *sum += more;
        }
        self.triggered += other.triggered;
        self.watched += other.watched;
        self.agreements += other.agreements;
        self.hedges += other.hedges;
        self.flows += other.flows;
        self.datagrams += other.datagrams;
        self.arrived += other.arrived;
        self.packets += other.packets;
        self.forged += other.forged;
        self.parts += other.parts;
        self.incomplete += other.incomplete;
        self.repeated += other.repeated;
        self.preferences += other.preferences;
        self.rebinds += other.rebinds;
        self.adopted += other.adopted;
        self.blocked += other.blocked;
        self.proofs += other.proofs;
        self.longest_gap = self.longest_gap.max(other.longest_gap);
    }
}
