//! What can go wrong with capture, by whose fault it is and with what to do next.

use std::{io, net::SocketAddr, path::PathBuf};

use aya::{EbpfError, maps::MapError, programs::ProgramError};
use thiserror::Error;

use super::privileges;

/// Failure of a capture operation.
#[derive(Debug, Error)]
pub enum CaptureError {
    /// The kernel refused for lack of privileges.
    #[error(
        "{what}: permission denied; {}; start the agent as root or grant CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON \
         (with systemd: AmbientCapabilities=)",
        describe_missing(.missing)
    )]
    Privileges {
        /// What was tried.
        what: String,
        /// Capabilities that this process lacks.
        missing: Vec<&'static str>,
    },
    /// The kernel lacks a feature that capture needs.
    #[error(
        "{what}: this kernel cannot do it: {detail}; capture needs Linux 5.15 or later with CONFIG_CGROUP_BPF and BTF"
    )]
    Kernel {
        /// What was tried.
        what: String,
        /// The kernel's words.
        detail: String,
    },
    /// No memory for maps or programs.
    #[error(
        "{what}: out of locked memory; raise the memory limit of the agent's cgroup or its RLIMIT_MEMLOCK"
    )]
    Memory {
        /// What was tried.
        what: String,
    },
    /// Another failure of the eBPF machinery.
    #[error("{what}: {}", chain(.source.as_ref()))]
    Ebpf {
        /// What was tried.
        what: String,
        /// The library's error.
        source: Box<EbpfError>,
    },
    /// Programs cannot be pinned there.
    #[error(
        "{} is not a BPF file system, which `when_agent_dead = \"refuse\"` needs to outlive the agent; \
         mount one: mount -t bpf bpf {}", .path.display(), .path.display()
    )]
    NoBpffs {
        /// Where one was expected.
        path: PathBuf,
    },
    /// No cgroup v2 hierarchy is mounted.
    #[error(
        "no cgroup v2 hierarchy in /proc/self/mountinfo; mount one: mount -t cgroup2 none /sys/fs/cgroup"
    )]
    NoCgroup2,
    /// The cgroup does not exist.
    #[error("cgroup {} does not exist (looked below {}); `systemd-cgls` lists those that do", .path.display(), .root.display())]
    MissingCgroup {
        /// What was asked for.
        path: PathBuf,
        /// Where cgroup v2 is mounted.
        root: PathBuf,
    },
    /// The path is there but is no cgroup v2 directory.
    #[error("{} is not a cgroup v2 directory; cgroup v2 is mounted at {}", .path.display(), .root.display())]
    NotCgroup2 {
        /// What was asked for.
        path: PathBuf,
        /// Where cgroup v2 is mounted.
        root: PathBuf,
    },
    /// The root cgroup was asked for.
    #[error("{} is the root cgroup: capturing it would capture the whole host; name a slice, a service or a scope", .path.display())]
    RootCgroup {
        /// What was asked for.
        path: PathBuf,
    },
    /// The cgroup is already captured.
    #[error("cgroup {} is already captured", .path.display())]
    AlreadyAttached {
        /// The cgroup.
        path: PathBuf,
    },
    /// The cgroup is not captured.
    #[error("cgroup {} is not captured; `holdfast status` lists those that are", .path.display())]
    NotAttached {
        /// The cgroup.
        path: PathBuf,
    },
    /// A name that cannot be a cgroup's.
    #[error(
        "`{name}` cannot name a cgroup: use letters, digits, '-', '_', '.' and '@', not starting with '.' or \"cgroup.\""
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// A file operation on a cgroup failed.
    #[error("cannot {what} {}: {source}", .path.display())]
    Cgroup {
        /// What was tried, as a verb.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A listener could not be opened.
    #[error(
        "cannot listen on {addr} for captured connections: {source}; is the loopback interface up?"
    )]
    Listener {
        /// The address.
        addr: SocketAddr,
        /// The system's error.
        source: io::Error,
    },
    /// The capture rules are contradictory or too many.
    #[error(transparent)]
    Rules(#[from] super::policy::RuleError),
    /// The filter of a command is too large, or there are too many.
    #[error(transparent)]
    Filter(#[from] super::filter::FilterError),
    /// There is no tokio runtime to drive the listeners.
    #[error("cannot {what}: {source}")]
    Runtime {
        /// What was tried.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

fn describe_missing(missing: &[&str]) -> String {
    if missing.is_empty() {
        return "the needed capabilities are held, so a seccomp filter, a lockdown mode or a user namespace forbids it".into();
    }
    format!("this process lacks {}", missing.join(", "))
}

impl CaptureError {
    /// Says what an eBPF error means to the operator.
    pub(super) fn ebpf(what: impl Into<String>, error: impl Into<EbpfError>) -> Self {
        let (what, error) = (what.into(), error.into());
        match os_error(&error) {
            Some(libc::EPERM | libc::EACCES) if !is_verifier_rejection(&error) => {
                Self::Privileges {
                    what,
                    missing: privileges::missing(),
                }
            }
            Some(libc::ENOMEM) => Self::Memory { what },
            Some(libc::EINVAL | libc::ENOTSUP | libc::ENOSYS | libc::ENOENT | libc::EACCES) => {
                Self::Kernel {
                    what,
                    detail: chain(&error),
                }
            }
            _ => Self::Ebpf {
                what,
                source: Box::new(error),
            },
        }
    }

    /// As [`CaptureError::ebpf`], for an operation on a map.
    pub(super) fn map(what: impl Into<String>, error: MapError) -> Self {
        Self::ebpf(what, EbpfError::MapError(error))
    }

    /// As [`CaptureError::ebpf`], for an operation on a program.
    pub(super) fn program(what: impl Into<String>, error: ProgramError) -> Self {
        Self::ebpf(what, EbpfError::ProgramError(error))
    }
}

/// The verifier says EACCES too, but then it has written a log that says why.
fn is_verifier_rejection(error: &EbpfError) -> bool {
    match error {
        EbpfError::ProgramError(ProgramError::LoadError { verifier_log, .. }) => {
            !verifier_log.to_string().trim().is_empty()
        }
        _ => false,
    }
}

/// The first errno in a chain of errors.
fn os_error(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut current = Some(error);
    while let Some(error) = current {
        if let Some(code) = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::raw_os_error)
        {
            return Some(code);
        }
        current = error.source();
    }
    None
}

/// A chain of errors in one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut current = error.source();
    while let Some(error) = current {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        current = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_error(errno: i32, log: &str) -> EbpfError {
        EbpfError::MapError(MapError::CreateError {
            name: log.into(),
            io_error: io::Error::from_raw_os_error(errno),
        })
    }

    #[test]
    fn a_refusal_names_the_capabilities() {
        let error = CaptureError::ebpf("loading", load_error(libc::EPERM, "M"));
        assert!(matches!(error, CaptureError::Privileges { .. }), "{error}");
        let error = CaptureError::Privileges {
            what: "loading".into(),
            missing: vec!["CAP_BPF"],
        };
        assert!(error.to_string().contains("lacks CAP_BPF"), "{error}");
    }

    #[test]
    fn a_missing_feature_is_the_kernels_fault() {
        let error = CaptureError::ebpf("loading", load_error(libc::EINVAL, "SK"));
        assert!(matches!(error, CaptureError::Kernel { .. }), "{error}");
        assert!(error.to_string().contains("5.15"), "{error}");
        assert!(error.to_string().contains("Invalid argument"), "{error}");
    }

    #[test]
    fn no_memory_is_told_apart() {
        assert!(matches!(
            CaptureError::ebpf("x", load_error(libc::ENOMEM, "M")),
            CaptureError::Memory { .. }
        ));
    }
}
