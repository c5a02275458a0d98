//! The two-link lab: a client with two links, a network between, and a server, all in network
//! namespaces that nobody else can see.
//!
//! The namespaces have no names: a thread of this process holds each one, and every program in it
//! is a child that the kernel ends together with that thread. So whatever ends the process, be it
//! SIGKILL, leaves nothing behind. The host's own network is not touched.

mod cgroup;
mod emulator;
mod flags;
mod host;
mod netns;
mod nfqueue;
mod server;
mod shaping;
mod topology;

pub use cgroup::{TestCgroup, cgroup2_root};
pub use emulator::Shape;
pub use host::HostState;
pub use netns::Netns;
pub use server::{GATEWAY_V4, GATEWAY_V6, SECOND_V4, SECOND_V6, TARGET_V4, TARGET_V6};
pub use topology::{Direction, Lab, LabConfig, LinkName};
