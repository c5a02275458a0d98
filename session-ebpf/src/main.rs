//! Holdfast's eBPF programs: capture of TCP connections and of UDP by cgroup.
//!
//! How a connection travels:
//! 1. `connect`: a captured application calls `connect()`; the destination matches a policy, is stored with the
//!    socket, and is rewritten to the agent's listener on loopback.
//! 2. `sockops::app_ops`: the SYN is about to be built, the local port is known: the destination is filed under the
//!    connection's addresses in `HANDSHAKES`.
//! 3. `gate`: the SYN is held and the agent told of it; it lets it through when the target has answered, or answers
//!    in the target's place.
//! 4. `sockops::agent_ops`: the agent's side is established: the destination moves into the accepted socket, where
//!    the agent reads it.
//! 5. `peername`: the application asks for its peer and is told the original destination.
//! 6. `bypass`, where it is on: what the application sends goes straight to the agent's socket.
//!
//! How a datagram travels:
//! 1. `connect` or `datagrams`: the destination matches a policy (`udp`), has an id, and is replaced by the address that
//!    stands for the id, which leads to the agent's socket on loopback.
//! 2. `fence`: it is marked as a captured application's, and does not leave loopback. Where the agent is not there yet,
//!    in a network namespace that it has only now been told of, the datagram is given to it through a ring.
//! 3. The agent reads the id and finds the destination in `UDP_DESTINATIONS`. It answers from the id's address.
//! 4. `datagrams`: the application receives the answer, and sees the destination's own address as its source.
//!
//! Nothing else on the host is touched.
#![no_std]
#![no_main]
// A call that is not inlined costs the verifier its knowledge of contexts and map values.
#![allow(clippy::inline_always)]
// Inline assembly for BPF; the toolchain is built for unstable features anyway, because aya-ebpf needs them.
#![feature(asm_experimental_arch)]

mod access;
mod bypass;
mod connect;
mod ctx;
mod datagrams;
mod fence;
mod gate;
mod maps;
mod multipath;
mod object;
mod ops;
mod peername;
mod rules;
mod sockname;
mod sockops;
mod sockopt;
mod taken;
mod udp;
