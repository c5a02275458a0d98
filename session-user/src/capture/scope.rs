//! A cgroup of our own, made for one command and removed when the command and its descendants are gone.

use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use tokio::io::{Interest, unix::AsyncFd};

use super::{CaptureError, cgroup};

/// A cgroup made by us. Dropping it removes it if it is empty; a populated one stays until its processes end.
#[derive(Debug)]
pub struct Scope {
    path: PathBuf,
}

impl Scope {
    /// Makes the cgroup `name` below `parent` (a directory of the hierarchy; its root is allowed here).
    pub fn create(parent: &Path, name: &str) -> Result<Self, CaptureError> {
        if !is_name(name) {
            return Err(CaptureError::BadName {
                name: name.to_owned(),
            });
        }
        let path = parent.join(name);
        fs::create_dir(&path).map_err(failed("create", &path))?;
        let scope = Self { path };
        // A plain directory would take processes' ids as text and capture nothing.
        if scope.path.join("cgroup.procs").exists() {
            return Ok(scope);
        }
        Err(CaptureError::NotCgroup2 {
            path: scope.path.clone(),
            root: cgroup::cgroup2_root()?,
        })
    }

    /// The cgroup's directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves a process into the cgroup. Sockets that it has already stay with the cgroup in which they were made.
    pub fn add_pid(&self, pid: u32) -> Result<(), CaptureError> {
        let procs = self.path.join("cgroup.procs");
        fs::write(&procs, pid.to_string()).map_err(failed("write a process id to", &procs))
    }

    /// Whether a live process is in the cgroup or below it.
    pub fn populated(&self) -> Result<bool, CaptureError> {
        let events = self.path.join("cgroup.events");
        let text = fs::read_to_string(&events).map_err(failed("read", &events))?;
        Ok(is_populated(&text))
    }

    /// Returns when no live process is left in the cgroup or below it. Cancel-safe; needs a tokio runtime.
    pub async fn wait_empty(&self) -> Result<(), CaptureError> {
        let path = self.path.join("cgroup.events");
        let failed = failed("watch", &path);
        let file = File::open(&path).map_err(&failed)?;
        // SAFETY: a `File` keeps its descriptor for its whole life, and the registration owns the file.
        let watch = unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) };
        let watch = watch.map_err(|error| failed(error.into_parts().1))?;
        loop {
            // Reading arms the next notification, so a change after this line is never missed.
            if !is_populated(&read_at_start(watch.get_ref()).map_err(&failed)?) {
                return Ok(());
            }
            watch
                .ready(Interest::PRIORITY)
                .await
                .map_err(&failed)?
                .clear_ready();
        }
    }

    /// Removes the cgroup and the empty ones that its processes may have made below it.
    pub fn remove(self) -> Result<(), CaptureError> {
        remove_tree(&self.path).map_err(failed("remove", &self.path))
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        // Nobody is left to be told; a populated cgroup refuses, which is right.
        let _ = remove_tree(&self.path);
    }
}

fn failed<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> CaptureError + 'a {
    move |source| match source.kind() {
        ErrorKind::NotFound if what == "create" => CaptureError::MissingCgroup {
            path: path.parent().unwrap_or(path).to_owned(),
            root: PathBuf::from("/"),
        },
        _ => CaptureError::Cgroup {
            what,
            path: path.to_owned(),
            source,
        },
    }
}

fn is_name(name: &str) -> bool {
    let safe = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.@:".contains(&byte);
    !name.is_empty()
        && name.len() <= 200
        && name.bytes().all(safe)
        && !name.starts_with('.')
        && !name.starts_with("cgroup.")
}

/// A line `populated 1` in cgroup.events; see the kernel's cgroup-v2.rst.
fn is_populated(events: &str) -> bool {
    events.lines().any(|line| line == "populated 1")
}

fn read_at_start(file: &File) -> io::Result<String> {
    // Two short lines today; room for many more.
    let mut buffer = [0_u8; 1024];
    let len = file.read_at(&mut buffer, 0)?;
    Ok(String::from_utf8_lossy(&buffer[..len]).into_owned())
}

fn remove_tree(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use std::{process::Command, time::Duration};

    use super::*;

    fn scope(name: &str) -> Scope {
        let root = cgroup::cgroup2_root().unwrap();
        Scope::create(
            &root,
            &format!("holdfast-test-{name}-{}", std::process::id()),
        )
        .unwrap()
    }

    #[test]
    fn bad_names_and_parents_are_refused() {
        let root = cgroup::cgroup2_root().unwrap();
        for name in ["", "a/b", "..", ".hidden", "cgroup.procs", "a b"] {
            assert!(
                matches!(
                    Scope::create(&root, name),
                    Err(CaptureError::BadName { .. })
                ),
                "{name}"
            );
        }
        assert!(matches!(
            Scope::create(&root.join("none"), "x"),
            Err(CaptureError::MissingCgroup { .. })
        ));
        let plain = tempfile::tempdir().unwrap();
        assert!(matches!(
            Scope::create(plain.path(), "x"),
            Err(CaptureError::NotCgroup2 { .. })
        ));
        assert!(
            !plain.path().join("x").exists(),
            "what was made by mistake is removed"
        );
    }

    #[test]
    fn a_scope_is_seen_by_resolve_and_removed() {
        let scope = scope("resolve");
        let path = scope.path().to_owned();
        assert_eq!(cgroup::resolve(&path).unwrap(), path);
        assert_eq!(cgroup::resolve(path.file_name().unwrap()).unwrap(), path);
        fs::create_dir(path.join("child")).unwrap();
        scope.remove().unwrap();
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn emptiness_is_noticed() {
        let scope = scope("empty");
        scope.wait_empty().await.unwrap();
        let mut child =
            crate::capture::tests::harness::quiet(|| Command::new("sleep").arg("60").spawn())
                .unwrap();
        scope.add_pid(child.id()).unwrap();
        assert!(scope.populated().unwrap());
        let early = tokio::time::timeout(Duration::from_millis(50), scope.wait_empty()).await;
        assert!(early.is_err(), "the command still runs");
        child.kill().unwrap();
        child.wait().unwrap();
        tokio::time::timeout(Duration::from_secs(20), scope.wait_empty())
            .await
            .expect("notified")
            .unwrap();
        assert!(!scope.populated().unwrap());
        scope.remove().unwrap();
    }
}
