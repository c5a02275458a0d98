//! The gateway's side of streams and flows: may this peer reach that target, and what does the target say.

mod authz;
mod dialer;
mod flows;
mod peer_addresses;
mod shares;
mod special;

pub use authz::{AllowList, AllowRule, Denied, Protocol, RuleError, WhyDenied};
pub use dialer::{Caller, DialError, dial_target};
#[cfg(test)]
pub use flows::exhaust;
pub use flows::{FlowOpened, FlowRoute, FlowSocket, open_flow, open_shared, resolve_flow};
pub use peer_addresses::{BookError, PeerAddresses, SeenAs};
pub use shares::Share;
