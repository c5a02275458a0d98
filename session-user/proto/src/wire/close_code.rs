//! Codes of CLOSE and TRANSPORT_CLOSE.

/// Nothing is wrong: orderly end.
pub const NO_ERROR: u64 = 0;
/// A fault of this unit.
pub const INTERNAL: u64 = 1;
/// The peer sent what the specification forbids.
pub const PROTOCOL_VIOLATION: u64 = 2;
/// The peer exceeded its credit.
pub const FLOW_CONTROL: u64 = 3;
/// A certificate of the session has expired.
pub const CERTIFICATE_EXPIRED: u64 = 4;
/// A certificate of the session has been revoked.
pub const CERTIFICATE_REVOKED: u64 = 5;
/// The unit was started anew; sessions of its earlier instance are gone.
pub const NEW_INSTANCE: u64 = 6;
/// The hold time passed without a transport.
pub const HOLD_EXPIRED: u64 = 7;
/// The unit is shutting down.
pub const SHUTDOWN: u64 = 8;
/// A limit of this unit is reached.
pub const LIMIT: u64 = 9;
/// The peer no longer knows the session.
pub const UNKNOWN_SESSION: u64 = 10;
/// The in-band renewal of keys and certificates failed.
pub const REAUTH_FAILED: u64 = 11;
