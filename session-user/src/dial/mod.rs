//! The gateway's side of a stream: may this peer reach that target, and what does the target say.

mod authz;
mod dialer;
mod peer_addresses;
mod special;

pub use authz::{AllowList, AllowRule, Denied, RuleError, WhyDenied};
pub use dialer::{Caller, DialError, dial_target};
pub use peer_addresses::{BookError, PeerAddresses, SeenAs};
