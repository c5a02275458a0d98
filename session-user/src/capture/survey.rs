//! Which network namespaces the processes of captured cgroups are in.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use session_ebpf_common::Native;

use super::namespace::Probes;
use super::netns::link_of;

/// A thread that was found in a network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resident {
    /// The thread.
    pub tid: u32,
    /// The cgroup that it is in.
    pub cgroup: PathBuf,
}

/// What is to be looked at. To be looked at by a thread that may take its time: a cgroup can have many processes.
#[derive(Clone, Debug)]
pub struct Survey {
    /// The captured cgroups.
    pub(super) cgroups: Vec<PathBuf>,
    /// The namespaces that were open when it began: the others are not to be closed for what it has not seen.
    pub(super) open: Vec<u64>,
    /// What asks the other namespaces for their routes, by cookie.
    pub(super) probes: Vec<(u64, Arc<Probes>)>,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Surveyed {
    /// One thread for each namespace, by the namespace's number.
    pub(super) residents: BTreeMap<u64, Resident>,
    /// A thread whose namespace the agent may not see, and why, if there is any.
    pub(super) hidden: Option<(Resident, io::ErrorKind)>,
    /// As in [`Survey`].
    pub(super) open: Vec<u64>,
    /// What connections in the other namespaces would have, by cookie.
    pub(super) natives: Vec<(u64, Native)>,
}

impl Surveyed {
    /// Numbers of the namespaces in which somebody was found.
    pub fn namespaces(&self) -> Vec<u64> {
        self.residents.keys().copied().collect()
    }
}

impl Survey {
    /// Of one cgroup and those below it, only to know.
    pub fn of(cgroup: &Path) -> Self {
        Self {
            cgroups: vec![cgroup.to_owned()],
            open: Vec::new(),
            probes: Vec::new(),
        }
    }

    /// Looks at every thread of the cgroups and of those below them: threads of one process may be in different
    /// namespaces.
    pub fn look(self) -> Surveyed {
        let natives = self.probes.iter();
        let natives = natives.map(|(cookie, probes)| (*cookie, probes.native()));
        let mut found = Surveyed {
            open: self.open,
            natives: natives.collect(),
            ..Surveyed::default()
        };
        for cgroup in &self.cgroups {
            look_in(cgroup, &mut found);
        }
        found
    }
}

fn look_in(cgroup: &Path, found: &mut Surveyed) {
    // Not cgroup.procs, which cannot be read in threaded cgroups (the kernel's cgroup-v2.rst).
    let threads = fs::read_to_string(cgroup.join("cgroup.threads")).unwrap_or_default();
    for tid in threads.lines().filter_map(|line| line.parse::<u32>().ok()) {
        note(tid, cgroup, found);
    }
    // A cgroup that goes meanwhile has no threads.
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            look_in(&entry.path(), found);
        }
    }
}

fn note(tid: u32, cgroup: &Path, found: &mut Surveyed) {
    let resident = || Resident {
        tid,
        cgroup: cgroup.to_owned(),
    };
    match fs::metadata(link_of(tid)) {
        Ok(data) => {
            found.residents.entry(data.ino()).or_insert_with(resident);
        }
        // It has ended, or is of another pid namespace (0).
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
        Err(error) => {
            found
                .hidden
                .get_or_insert_with(|| (resident(), error.kind()));
        }
    }
}
