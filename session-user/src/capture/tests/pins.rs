//! Whose pinned programs are left behind: those of an agent that has ended, and of no other.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::capture::pins::{Orphans, Pins};
use crate::capture::{Filter, cgroup};

/// Runs a test where a BPF file system of its own is mounted, which goes with the thread.
fn with_bpffs(body: impl FnOnce(&Path) + Send + 'static) {
    let place = tempfile::tempdir().unwrap();
    let bpffs = place.path().to_owned();
    let outcome = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).expect("these tests need root");
        mounted(
            None,
            Path::new("/"),
            None,
            MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        );
        mounted(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty());
        body(&bpffs);
    });
    if let Err(panic) = outcome.join() {
        std::panic::resume_unwind(panic);
    }
}

fn mounted(source: Option<&str>, at: &Path, kind: Option<&str>, flags: MsFlags) {
    mount(source, at, kind, flags, None::<&str>).unwrap();
}

/// Where agents pin.
fn folders(bpffs: &Path) -> Vec<PathBuf> {
    let all = fs::read_dir(bpffs.join("holdfast")).into_iter().flatten();
    all.map(|entry| entry.unwrap().path()).collect()
}

/// What an agent pins of one cgroup, but for the programs.
fn pin(bpffs: &Path) -> (Pins, impl Drop) {
    let mut pins = Pins::open(bpffs).unwrap();
    let root = cgroup::cgroup2_root().unwrap();
    let pinned = pins.pin(&root, &Filter::default(), []).unwrap();
    (pins, pinned)
}

#[test]
fn an_agent_that_proc_does_not_show_is_no_orphan() {
    with_bpffs(|bpffs| {
        let (pins, pinned) = pin(bpffs);
        // As it is for an agent in another pid namespace, or where proc hides the processes of others.
        mounted(
            Some("none"),
            Path::new("/proc"),
            Some("tmpfs"),
            MsFlags::empty(),
        );
        let found = Orphans::find(bpffs);
        assert!(found.cgroups().is_empty());
        found.remove();
        assert_eq!(folders(bpffs).len(), 1);
        // In order: nothing is left.
        drop((pinned, pins));
        assert!(!bpffs.join("holdfast").exists());
    });
}

/// A process of that number lives, and is another: this one.
#[test]
fn what_an_agent_with_the_same_process_id_has_left_is_found() {
    with_bpffs(|bpffs| {
        let (pins, pinned) = pin(bpffs);
        let of_old = folders(bpffs).remove(0);
        // What a killed agent does: its descriptor is closed, and nothing is removed.
        let kept = of_old.with_file_name("kept");
        fs::rename(&of_old, &kept).unwrap();
        drop((pinned, pins));
        fs::rename(&kept, &of_old).unwrap();
        let orphans = Orphans::find(bpffs);
        let root = cgroup::cgroup2_root().unwrap();
        assert_eq!(orphans.cgroups(), [(root, Filter::default())]);
        // A second one that starts now takes over nothing.
        assert!(Orphans::find(bpffs).cgroups().is_empty());
        // The new one has pins of its own beside them.
        let (pins, pinned) = pin(bpffs);
        assert_eq!(folders(bpffs).len(), 2);
        orphans.remove();
        let left = folders(bpffs);
        assert!(left.len() == 1 && left[0] != of_old, "{left:?}");
        drop((pinned, pins));
    });
}
