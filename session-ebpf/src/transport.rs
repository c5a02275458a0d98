//! Holdfast's eBPF program for the agent's own transports: how much each may send before the first answer.
//!
//! A connection starts with ten segments in flight (RFC 6928), so what is unacknowledged at a handover would trickle out
//! over several round trips. The agent knows what the path took last time, and says so here. The window can be set only
//! before the first data, so it is done when the connection is established; Linux, `bpf_sol_tcp_setsockopt` in
//! net/core/filter.c.
#![no_std]
#![no_main]
// As in the other programs: what is not inlined costs the verifier its knowledge.
#![allow(clippy::inline_always)]

mod access;
mod object;
mod ops;

mod windows;
