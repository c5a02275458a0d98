//! The sessions of this unit, by their names: for resumes, for commands, for reports.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use session_proto::wire::{ConnectionId, ResumeToken, close_code};
use tokio::sync::{mpsc, oneshot};

use crate::driver::{Command, Inbound, SessionSnapshot, TokenBook};

/// How long a driver may take to answer a question. It answers between two turns.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Sessions that one identity may hold here at once. Two are normal for a moment, when a unit
/// that lost its session makes a new one.
const SESSIONS_PER_PEER_MAX: usize = 8;

/// One session, as the rest of the agent reaches it.
#[derive(Clone)]
pub struct Entry {
    /// The peer's name.
    pub peer: String,
    /// The peer's start.
    pub instance: [u8; 16],
    /// Whether this unit made it.
    pub initiator: bool,
    /// Its driver.
    pub commands: mpsc::Sender<Command>,
    /// Where its packets go, if this unit accepted it and has UDP.
    pub packets: Option<mpsc::Sender<Inbound>>,
}

impl Entry {
    fn is_driven(&self) -> bool {
        !self.commands.is_closed()
    }
}

#[derive(Default)]
struct Tables {
    sessions: HashMap<[u8; 16], Entry>,
    tokens: HashMap<ResumeToken, ([u8; 16], u64)>,
    /// The tokens of each session, so that they can be taken back.
    named: HashMap<[u8; 16], Vec<ResumeToken>>,
    /// Whose packets come under which name, and the names of each session.
    connections: HashMap<ConnectionId, [u8; 16]>,
    connected: HashMap<[u8; 16], Vec<ConnectionId>>,
}

/// All sessions. Cheap to clone.
#[derive(Clone, Default)]
pub struct Registry {
    tables: Arc<Mutex<Tables>>,
}

impl TokenBook for Registry {
    fn set(&self, session: [u8; 16], tokens: Vec<(ResumeToken, u64)>) {
        let mut tables = self.lock();
        for old in tables.named.remove(&session).unwrap_or_default() {
            tables.tokens.remove(&old);
        }
        if tokens.is_empty() {
            return;
        }
        tables
            .named
            .insert(session, tokens.iter().map(|(token, _)| *token).collect());
        tables.tokens.extend(
            tokens
                .into_iter()
                .map(|(token, counter)| (token, (session, counter))),
        );
    }

    fn set_connections(&self, session: [u8; 16], ids: Vec<ConnectionId>) {
        let mut tables = self.lock();
        for old in tables.connected.remove(&session).unwrap_or_default() {
            tables.connections.remove(&old);
        }
        if ids.is_empty() {
            return;
        }
        tables
            .connections
            .extend(ids.iter().map(|id| (*id, session)));
        tables.connected.insert(session, ids);
    }
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a session.
    pub fn insert(&self, id: [u8; 16], entry: Entry) {
        self.lock().sessions.insert(id, entry);
    }

    /// Removes a session and its names.
    pub fn remove(&self, id: [u8; 16]) {
        self.set(id, Vec::new());
        self.set_connections(id, Vec::new());
        self.lock().sessions.remove(&id);
    }

    /// The session that `token` resumes, and the token's counter. A driver that is gone resumes
    /// nothing: the peer must hear that, not dial for ever.
    pub fn by_token(&self, token: &ResumeToken) -> Option<(Entry, u64)> {
        let tables = self.lock();
        let (id, counter) = tables.tokens.get(token)?;
        let entry = tables.sessions.get(id).filter(|e| e.is_driven())?;
        Some((entry.clone(), *counter))
    }

    /// Where the packets go that are called `id`.
    pub fn by_connection(&self, id: &ConnectionId) -> Option<mpsc::Sender<Inbound>> {
        let tables = self.lock();
        let session = tables.connections.get(id)?;
        tables.sessions.get(session)?.packets.clone()
    }

    /// The session `id`, if it is one with `peer`.
    pub fn of_peer(&self, id: [u8; 16], peer: &str) -> Option<Entry> {
        self.lock()
            .sessions
            .get(&id)
            .filter(|e| e.peer == peer && e.is_driven())
            .cloned()
    }

    /// All sessions.
    pub fn all(&self) -> Vec<([u8; 16], Entry)> {
        self.lock()
            .sessions
            .iter()
            .map(|(id, entry)| (*id, entry.clone()))
            .collect()
    }

    /// Sessions accepted from `peer`, but for `new`. The others are not copied: there may be very many.
    fn others_of(&self, peer: &str, new: [u8; 16]) -> Vec<Entry> {
        let tables = self.lock();
        let others = tables
            .sessions
            .iter()
            .filter(|(id, entry)| **id != new && !entry.initiator && entry.peer == peer);
        others.map(|(_, entry)| entry.clone()).collect()
    }

    /// How many sessions were accepted from peers.
    pub fn accepted(&self) -> usize {
        self.lock()
            .sessions
            .values()
            .filter(|e| !e.initiator && e.is_driven())
            .count()
    }

    /// Ends what a new session of `peer` makes obsolete: sessions of an earlier start of that
    /// unit, and more of this one than a unit can need.
    pub async fn supersede(&self, new: [u8; 16], peer: &str, instance: [u8; 16]) {
        let mut same = 0;
        for entry in self.others_of(peer, new) {
            same += usize::from(entry.instance == instance);
            let (code, reason) = if entry.instance != instance {
                (close_code::NEW_INSTANCE, "the peer was started anew")
            } else if same >= SESSIONS_PER_PEER_MAX {
                (close_code::LIMIT, "too many sessions of one unit")
            } else {
                continue;
            };
            // A driver that has just ended needs no command.
            let _ = entry
                .commands
                .send(Command::Close {
                    code,
                    reason: reason.to_owned(),
                })
                .await;
        }
    }

    /// Tells every driver.
    pub async fn tell_all(&self, command: impl Fn() -> Command) {
        for (_, entry) in self.all() {
            // A driver that has just ended needs no command.
            let _ = entry.commands.send(command()).await;
        }
    }

    /// What every session is doing.
    pub async fn snapshots(&self) -> Vec<SessionSnapshot> {
        let mut out = Vec::new();
        for (_, entry) in self.all() {
            let (reply, answer) = oneshot::channel();
            if entry.commands.send(Command::Report(reply)).await.is_err() {
                continue;
            }
            match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
                Ok(Ok(snapshot)) => out.push(snapshot),
                Ok(Err(_)) => {}
                Err(_) => tracing::warn!(peer = %entry.peer, "a session did not report in time"),
            }
        }
        out.sort_by_key(|s| s.since);
        out
    }
}
