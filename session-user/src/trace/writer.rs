//! The thread that writes the files, so that no session waits for a disk.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, SystemTime};

use super::qlog::{self, About};

/// Records that wait for the thread; more are left out, and counted.
const QUEUE: usize = 1024;
/// Size of a file at which it is renamed and another one begun; of a session the last two are kept.
const FILE_BYTES_MAX: u64 = 8 << 20;
/// Files in the folder; the oldest are removed.
const FILES_MAX: usize = 256;
/// Files open at once; the one that was opened first is closed, and opened again if need be.
const OPEN_MAX: usize = 64;
/// How the files' names end.
const EXTENSION: &str = "sqlog";

enum Message {
    Record(Arc<About>, Vec<u8>),
    Close(Arc<About>),
    Flush(SyncSender<()>),
}

/// The sessions' end of the queue.
#[derive(Debug)]
pub(super) struct Writer {
    queue: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
}

impl Writer {
    /// Starts the thread; it ends with this value.
    pub fn start(dir: PathBuf) -> io::Result<Self> {
        let (queue, messages) = sync_channel(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        let files = Files::new(dir, Arc::clone(&dropped));
        thread::Builder::new()
            .name("qlog".to_owned())
            .spawn(move || files.run(&messages))?;
        Ok(Self { queue, dropped })
    }

    pub fn write(&self, about: &Arc<About>, record: Vec<u8>) {
        self.send(Message::Record(Arc::clone(about), record));
    }

    /// Nothing more comes of the session.
    pub fn close(&self, about: &Arc<About>) {
        self.send(Message::Close(Arc::clone(about)));
    }

    /// Waits until all before is written, at most for `limit`.
    pub fn flush(&self, limit: Duration) {
        let (done, wait) = sync_channel(1);
        self.send(Message::Flush(done));
        // Whatever is not written by then is not worth a longer wait.
        let _ = wait.recv_timeout(limit);
    }

    fn send(&self, message: Message) {
        if let Err(TrySendError::Full(_)) = self.queue.try_send(message)
            && self.dropped.fetch_add(1, Ordering::Relaxed) == 0
        {
            tracing::warn!(
                "[trace] qlog: the disk is too slow: records are left out, and their number is noted"
            );
        }
    }
}

struct Open {
    file: File,
    bytes: u64,
    /// Counts openings.
    order: u64,
}

/// The thread's end: the folder and its files.
struct Files {
    dir: PathBuf,
    open: BTreeMap<String, Open>,
    opened: u64,
    dropped: Arc<AtomicU64>,
    /// An error has been told.
    told: bool,
}

impl Files {
    fn new(dir: PathBuf, dropped: Arc<AtomicU64>) -> Self {
        Self {
            dir,
            open: BTreeMap::new(),
            opened: 0,
            dropped,
            told: false,
        }
    }

    fn run(mut self, messages: &Receiver<Message>) {
        while let Ok(message) = messages.recv() {
            match message {
                Message::Record(about, record) => self.record(&about, &record),
                Message::Close(about) => {
                    self.open.remove(&file_name(&about));
                }
                // Files are not buffered: what came before is written. Who asked may have gone.
                Message::Flush(done) => drop(done.try_send(())),
            }
        }
    }

    fn record(&mut self, about: &About, record: &[u8]) {
        let Err(error) = self.try_record(about, record) else {
            return;
        };
        self.open.remove(&file_name(about));
        if !std::mem::replace(&mut self.told, true) {
            let dir = self.dir.display();
            tracing::warn!(%dir, %error, "[trace] qlog: records cannot be written; this is told once");
        }
    }

    fn try_record(&mut self, about: &About, record: &[u8]) -> io::Result<()> {
        let name = file_name(about);
        let full = |open: &Open| open.bytes + record.len() as u64 > FILE_BYTES_MAX;
        if self.open.get(&name).is_some_and(full) {
            self.open.remove(&name);
            let old = name.replace(EXTENSION, &format!("1.{EXTENSION}"));
            fs::rename(self.dir.join(&name), self.dir.join(old))?;
        }
        if !self.open.contains_key(&name) {
            self.open_file(&name, about)?;
        }
        let Some(open) = self.open.get_mut(&name) else {
            return Ok(());
        };
        let missing = self.dropped.swap(0, Ordering::Relaxed);
        if missing > 0 {
            let at = about.began.elapsed().unwrap_or_default();
            open.write(&qlog::dropped(missing).record(at))?;
        }
        open.write(record)
    }

    fn open_file(&mut self, name: &str, about: &About) -> io::Result<()> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)?;
        if self.open.len() >= OPEN_MAX {
            let first = self.open.iter().min_by_key(|(_, open)| open.order);
            if let Some(first) = first.map(|(name, _)| name.clone()) {
                self.open.remove(&first);
            }
        }
        self.make_room()?;
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(self.dir.join(name))?;
        self.opened += 1;
        let mut open = Open {
            bytes: file.metadata()?.len(),
            file,
            order: self.opened,
        };
        if open.bytes == 0 {
            open.write(&about.header())?;
        }
        self.open.insert(name.to_owned(), open);
        Ok(())
    }

    /// Removes the oldest files until another one fits.
    fn make_room(&self) -> io::Result<()> {
        let mut found: Vec<(SystemTime, PathBuf)> = fs::read_dir(&self.dir)?
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|e| e == EXTENSION))
            .filter(|path| !self.is_open(path))
            .filter_map(|path| Some((fs::symlink_metadata(&path).ok()?.modified().ok()?, path)))
            .collect();
        found.sort();
        let room = FILES_MAX.saturating_sub(self.open.len() + 1);
        let surplus = found.len().saturating_sub(room);
        for (_, path) in found.into_iter().take(surplus) {
            fs::remove_file(path)?;
        }
        Ok(())
    }

    fn is_open(&self, path: &Path) -> bool {
        let name = path.file_name().and_then(|n| n.to_str());
        name.is_some_and(|name| self.open.contains_key(name))
    }
}

impl Open {
    /// One write for one record: whoever reads meanwhile sees whole records.
    fn write(&mut self, record: &[u8]) -> io::Result<()> {
        self.file.write_all(record)?;
        self.bytes += record.len() as u64;
        Ok(())
    }
}

/// The name of a session's file. Both ends may write to one folder.
fn file_name(about: &About) -> String {
    format!("{}-{}.{EXTENSION}", about.session, about.side())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn about(session: &str) -> About {
        About {
            session: session.to_owned(),
            peer: "gateway".to_owned(),
            initiator: true,
            began: SystemTime::now(),
        }
    }

    fn files(dir: &Path) -> Files {
        Files::new(dir.join("qlog"), Arc::default())
    }

    #[test]
    fn a_full_file_is_renamed_and_two_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = files(dir.path());
        let about = about("ab");
        let record = vec![b'x'; 1 << 20];
        for _ in 0..30 {
            files.try_record(&about, &record).unwrap();
        }
        let names: Vec<PathBuf> = fs::read_dir(&files.dir)
            .unwrap()
            .flatten()
            .map(|e| e.path())
            .collect();
        assert_eq!(names.len(), 2, "{names:?}");
        for path in names {
            let found = fs::metadata(&path).unwrap();
            assert!(found.len() <= FILE_BYTES_MAX, "{path:?}");
            assert_eq!(found.permissions().mode() & 0o777, 0o600);
            assert!(fs::read(&path).unwrap().starts_with(&[0x1e, b'{']));
        }
        let mode = fs::metadata(&files.dir).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }

    #[test]
    fn the_folder_and_the_descriptors_stay_within_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = files(dir.path());
        for session in 0..FILES_MAX + 40 {
            let about = about(&format!("{session:04x}"));
            files.try_record(&about, b"\x1e{}\n").unwrap();
        }
        assert_eq!(fs::read_dir(&files.dir).unwrap().count(), FILES_MAX);
        assert_eq!(files.open.len(), OPEN_MAX);
        // One whose file was closed meanwhile goes on in it, without a second header.
        let earlier = about(&format!("{:04x}", FILES_MAX + 40 - OPEN_MAX - 1));
        files.try_record(&earlier, b"\x1e{}\n").unwrap();
        let text = fs::read_to_string(files.dir.join(file_name(&earlier))).unwrap();
        assert_eq!(text.split('\u{1e}').count(), 1 + 3);
    }

    #[test]
    fn what_finds_no_room_is_counted_and_told() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = files(dir.path());
        files.dropped.store(7, Ordering::Relaxed);
        files.try_record(&about("ab"), b"\x1e{}\n").unwrap();
        let text = fs::read_to_string(files.dir.join(file_name(&about("ab")))).unwrap();
        assert!(text.contains("7 records"), "{text}");
        assert_eq!(files.dropped.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_folder_that_cannot_be_made_hurts_nobody() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("qlog"), "in the way").unwrap();
        let mut files = files(dir.path());
        files.record(&about("ab"), b"\x1e{}\n");
        files.record(&about("ab"), b"\x1e{}\n");
        assert!(files.told && files.open.is_empty());
    }
}
