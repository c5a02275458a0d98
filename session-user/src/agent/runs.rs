//! The scopes that `holdfast run` makes: a cgroup for one command and what it starts.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::task::JoinSet;

use super::captures::Captures;
use crate::capture::{Filter, Scope, cgroup};

/// The scopes that stand.
#[derive(Default)]
pub(super) struct Runs {
    number: AtomicU64,
    watchers: Arc<Mutex<JoinSet<()>>>,
}

impl Runs {
    /// Removes the empty scopes of agents that were killed: they had no time to do it.
    pub fn remove_stale() {
        let Ok(root) = cgroup::cgroup2_root() else {
            return;
        };
        for entry in std::fs::read_dir(scopes_folder(&root))
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = entry.file_name().to_string_lossy().into_owned();
            let pid = name
                .strip_prefix("run-")
                .and_then(|rest| rest.split('-').next());
            if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                // Fails for a scope with processes, which is left to them.
                let _ = std::fs::remove_dir(entry.path());
            }
        }
    }

    /// Makes a scope, captures in it what `filter` keeps, also in the network namespace that `pid` is
    /// in (`netns`, if it has told its number), and moves `pid` into it. The scope is removed when its
    /// last process has ended, and its filter with it.
    pub async fn begin(
        &self,
        captures: &Captures,
        (pid, netns): (u32, Option<u64>),
        filter: &Filter,
    ) -> Result<PathBuf, String> {
        let folder = scopes_folder(&cgroup::cgroup2_root().map_err(|e| e.to_string())?);
        std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let name = format!("run-{}-{number}.scope", std::process::id());
        let scope = Scope::create(&folder, &name).map_err(|e| e.to_string())?;
        let path = scope.path().to_owned();
        let ready = async {
            let attached = captures.attach(&path, filter).await;
            attached.map_err(|e| e.to_string())?;
            let entered = captures.enter(pid, netns).await;
            entered.map_err(|e| e.to_string())?;
            scope.add_pid(pid).map_err(|e| e.to_string())
        };
        if let Err(error) = ready.await {
            end(captures, scope).await;
            return Err(error);
        }
        let captures = captures.clone();
        let mut watchers = self.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        while watchers.try_join_next().is_some() {}
        watchers.spawn(async move {
            if let Err(error) = scope.wait_empty().await {
                tracing::warn!(scope = %scope.path().display(), %error, "a scope cannot be watched");
            }
            end(&captures, scope).await;
        });
        Ok(path)
    }

    /// Stops watching: commands that still run keep their scope, which captures nothing any more.
    pub async fn remove_all(&self) {
        let mut watchers =
            std::mem::take(&mut *self.watchers.lock().unwrap_or_else(PoisonError::into_inner));
        watchers.abort_all();
        while watchers.join_next().await.is_some() {}
        if let Ok(root) = cgroup::cgroup2_root() {
            let folder = scopes_folder(&root);
            // Another agent may have scopes there as well.
            let ours = format!("run-{}-", std::process::id());
            for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
                if entry.file_name().to_string_lossy().starts_with(&ours) {
                    // Fails for a scope with processes, which is left to them.
                    let _ = std::fs::remove_dir(entry.path());
                }
            }
            let _ = std::fs::remove_dir(&folder);
        }
    }
}

async fn end(captures: &Captures, scope: Scope) {
    let path = scope.path().to_owned();
    if let Err(error) = captures.detach(&path).await {
        tracing::debug!(scope = %path.display(), %error, "a scope could not be detached");
    }
    if let Err(error) = scope.remove() {
        tracing::warn!(scope = %path.display(), %error, "a scope could not be removed");
    }
}

/// The folder of the scopes that `holdfast run` makes, below the root of cgroup2.
fn scopes_folder(root: &Path) -> PathBuf {
    root.join("holdfast")
}
