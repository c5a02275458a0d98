//! Where cgroup v2 is mounted, and what a path given by the operator means there.

use std::{
    ffi::OsString,
    fs,
    os::unix::ffi::OsStringExt as _,
    path::{Component, Path, PathBuf},
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::CaptureError;

/// Where the cgroup v2 hierarchy is mounted: often /sys/fs/cgroup, or /sys/fs/cgroup/unified beside v1 controllers.
pub fn cgroup2_root() -> Result<PathBuf, CaptureError> {
    let mounts = read("/proc/self/mountinfo")?;
    find_mount(&mounts).ok_or(CaptureError::NoCgroup2)
}

/// The directory of a cgroup given as an absolute path, or relative to the hierarchy's root (`user.slice/foo`, also
/// with a leading slash, as /proc/PID/cgroup writes it).
///
/// Refuses what does not exist, what is not a cgroup v2 directory, and the root cgroup.
pub fn resolve(path: impl AsRef<Path>) -> Result<PathBuf, CaptureError> {
    resolve_in(&cgroup2_root()?, path.as_ref())
}

/// As [`resolve`], for looking only: the root cgroup is allowed.
pub fn folder(path: impl AsRef<Path>) -> Result<PathBuf, CaptureError> {
    match resolve(path) {
        Err(CaptureError::RootCgroup { .. }) => cgroup2_root(),
        other => other,
    }
}

/// The cgroup that a process lives in, possibly the root.
pub fn of_process(pid: u32) -> Result<PathBuf, CaptureError> {
    let root = cgroup2_root()?;
    let table = read(format!("/proc/{pid}/cgroup"))?;
    Ok(own_in(&root, &table))
}

/// The path below the hierarchy's root of a cgroup's folder, with a slash in front, as /proc/PID/cgroup writes it.
pub fn below_root(folder: &Path) -> Result<String, CaptureError> {
    let below = folder.strip_prefix(cgroup2_root()?).unwrap_or(folder);
    Ok(format!("/{}", below.display()))
}

/// The path below the hierarchy's root of the cgroup with an id, as [`super::Captured`] has it; `None` if it
/// is gone.
pub fn name_of(id: u64) -> Option<String> {
    super::cgroup_id::name_of(id)
}

/// The path that a cgroup has or had, whether it exists or not.
pub(super) fn named(path: &Path) -> Result<PathBuf, CaptureError> {
    let root = cgroup2_root()?;
    if path.starts_with(&root) {
        Ok(path.to_owned())
    } else {
        Ok(below(&root, path))
    }
}

/// The cgroup that this process lives in, possibly the root.
pub fn own() -> Result<PathBuf, CaptureError> {
    let root = cgroup2_root()?;
    let name = read("/proc/self/cgroup")?;
    Ok(own_in(&root, &name))
}

fn own_in(root: &Path, table: &str) -> PathBuf {
    let name = table
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .unwrap_or("/");
    let relative = Path::new(name.trim_start_matches('/'));
    // Outside of this cgroup namespace the kernel writes "/../x": the visible root covers it.
    let visible = relative
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    let own = root.join(relative);
    if visible && own.is_dir() {
        own
    } else {
        root.to_owned()
    }
}

fn resolve_in(root: &Path, path: &Path) -> Result<PathBuf, CaptureError> {
    let found = if path.is_absolute() && path.exists() {
        path.to_owned()
    } else {
        below(root, path)
    };
    let missing = || CaptureError::MissingCgroup {
        path: path.to_owned(),
        root: root.to_owned(),
    };
    let found = found.canonicalize().map_err(|_| missing())?;
    let is_cgroup = found.is_dir()
        && statfs(&found).is_ok_and(|stat| stat.filesystem_type() == CGROUP2_SUPER_MAGIC);
    if !is_cgroup {
        return Err(CaptureError::NotCgroup2 {
            path: path.to_owned(),
            root: root.to_owned(),
        });
    }
    let is_root = root.canonicalize().is_ok_and(|root| root == found);
    // The root is also known by what it lacks, wherever else it is mounted.
    if is_root || !found.join("cgroup.type").exists() {
        return Err(CaptureError::RootCgroup {
            path: path.to_owned(),
        });
    }
    Ok(found)
}

/// A path as /proc/PID/cgroup writes it, below the mount point.
fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

pub(super) fn read(path: impl AsRef<Path>) -> Result<String, CaptureError> {
    let path = path.as_ref();
    fs::read_to_string(path).map_err(|source| CaptureError::Cgroup {
        what: "read",
        path: path.to_owned(),
        source,
    })
}

/// The first mount of type cgroup2, preferring one that shows the whole hierarchy. proc(5), /proc/PID/mountinfo.
fn find_mount(mountinfo: &str) -> Option<PathBuf> {
    let mounts: Vec<(&str, PathBuf)> = mountinfo.lines().filter_map(cgroup2_mount).collect();
    let whole = mounts
        .iter()
        .find(|(root, _)| *root == "/")
        .or(mounts.first());
    whole.map(|(_, point)| point.clone())
}

/// Root within the hierarchy and mount point of one line, if it is a cgroup2 mount.
fn cgroup2_mount(line: &str) -> Option<(&str, PathBuf)> {
    let (mount, filesystem) = line.split_once(" - ")?;
    if filesystem.split(' ').next()? != "cgroup2" {
        return None;
    }
    let mut fields = mount.split(' ').skip(3);
    let root = fields.next()?;
    Some((root, unescape(fields.next()?)))
}

/// Undoes the kernel's octal escapes of blanks and backslashes.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail
            .get(..3)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if first == b'\\' => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
40 31 0:38 /part /mnt/part rw shared:7 - cgroup2 cgroup2 rw
41 31 0:38 / /sys/fs/cgroup/uni\\040fied rw,relatime - cgroup2 cgroup2 rw
";

    #[test]
    fn the_mount_is_found_beside_v1() {
        assert_eq!(
            find_mount(HYBRID),
            Some(PathBuf::from("/sys/fs/cgroup/uni fied"))
        );
        assert_eq!(
            find_mount("31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\nrubbish\n"),
            None
        );
    }

    #[test]
    fn our_own_cgroup_falls_back_to_the_visible_root() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("unit")).unwrap();
        assert_eq!(
            own_in(root.path(), "1:cpu:/x\n0::/unit\n"),
            root.path().join("unit")
        );
        assert_eq!(own_in(root.path(), "0::/../elsewhere\n"), root.path());
        assert_eq!(own_in(root.path(), "1:cpu:/x\n"), root.path());
    }

    #[test]
    fn wrong_paths_are_told_apart() {
        let root = cgroup2_root().unwrap();
        assert!(matches!(
            resolve("no/such/cgroup"),
            Err(CaptureError::MissingCgroup { .. })
        ));
        assert!(matches!(
            resolve("/tmp"),
            Err(CaptureError::NotCgroup2 { .. })
        ));
        assert!(matches!(
            resolve(&root),
            Err(CaptureError::RootCgroup { .. })
        ));
        assert!(matches!(
            resolve("/etc/passwd"),
            Err(CaptureError::NotCgroup2 { .. })
        ));
        assert!(matches!(
            resolve("../../../tmp"),
            Err(CaptureError::NotCgroup2 { .. } | CaptureError::MissingCgroup { .. })
        ));
    }
}
