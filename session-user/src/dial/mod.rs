//! The gateway's side of a stream: may this peer reach that target, and what does the target say.

mod authz;
mod dialer;
mod special;

pub use authz::{AllowList, AllowRule, Denied, RuleError, WhyDenied};
pub use dialer::{DialError, dial_target};
