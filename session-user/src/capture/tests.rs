//! Capture against the real kernel: each test has a network namespace, a cgroup and a small agent of its own.

mod at_once;
mod bypass;
mod datagram_ends;
mod datagrams;
mod datagrams_elsewhere;
mod decisions;
mod elsewhere;
mod flows;
pub(super) mod harness;
mod lifecycle;
mod names;
mod namespaces;
mod others;
mod pins;
mod rules;
mod strangers;
