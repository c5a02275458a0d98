//! A program run twice, natively and by `holdfast run`, and compared.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::{Captures, TestBed, command, finish, sha256};

/// Nothing takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);
/// Stands for the run's own name in a command, so that the second finds nothing that the first has left at a server.
const RUN: &str = "@RUN@";

/// What is the same both times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// How it ended, in words.
    pub status: String,
    /// What it printed.
    pub out: String,
    /// Its errors.
    pub err: String,
    /// The SHA-256 of each file that it made in its folder.
    pub files: BTreeMap<String, String>,
}

/// One program, or several.
pub struct Both<'a> {
    bed: &'a TestBed,
    datagrams: bool,
}

impl<'a> Both<'a> {
    /// Programs in the client's namespace of this bed.
    pub const fn new(bed: &'a TestBed) -> Self {
        Self {
            bed,
            datagrams: false,
        }
    }

    /// The same for programs that speak UDP: some of it must have been captured each time.
    pub const fn with_datagrams(bed: &'a TestBed) -> Self {
        Self {
            bed,
            datagrams: true,
        }
    }

    /// Runs `script` in a shell, in an empty folder, natively and captured. Fails unless both said and made the same,
    /// and exactly `connects` connects of the second were captured and became streams.
    pub fn same(&self, script: &str, connects: u64) -> anyhow::Result<Said> {
        self.alike(script, connects, |said| said)
    }

    /// [`Self::same`], and the script succeeds.
    pub fn good(&self, script: &str, connects: u64) -> anyhow::Result<Said> {
        let said = self.same(script, connects)?;
        ensure!(
            said.status == "exit status: 0",
            "`{script}` fails natively too: {said:#?}"
        );
        Ok(said)
    }

    /// [`Self::same`], and the script fails and says so, with `words` among what it says.
    pub fn fails(&self, script: &str, connects: u64, words: &str) -> anyhow::Result<Said> {
        let said = self.same(script, connects)?;
        ensure!(
            said.status != "exit status: 0"
                && (said.err.contains(words) || said.out.contains(words)),
            "`{script}` natively too: {said:#?}"
        );
        Ok(said)
    }

    /// [`Self::same`] for a program that also says what differs from run to run: `clean` leaves it out.
    pub fn alike(
        &self,
        script: &str,
        connects: u64,
        clean: impl Fn(Said) -> Said,
    ) -> anyhow::Result<Said> {
        let began = Instant::now();
        let native = clean(self.once(script, false)?);
        let natively = began.elapsed();
        let before = Captures::of(self.bed)?;
        let began = Instant::now();
        let captured = clean(self.once(script, true)?);
        println!("{natively:.1?} and {:.1?}: {script}", began.elapsed());
        let counted = Captures::of(self.bed)?.since(before);
        ensure!(
            native == captured,
            "`{script}`\nnatively: {native:#?}\ncaptured: {captured:#?}\n{}",
            self.bed.bed.last_words()
        );
        counted.check(script)?;
        ensure!(
            self.datagrams == (counted.datagrams > 0),
            "`{script}`: {} times UDP was captured",
            counted.datagrams
        );
        ensure!(
            counted.captured == connects,
            "`{script}`: {} connects were captured, not {connects}",
            counted.captured
        );
        Ok(captured)
    }

    fn once(&self, script: &str, captured: bool) -> anyhow::Result<Said> {
        let name = if captured { "captured" } else { "native" };
        let folder = self.folder(name)?;
        let mut run = if captured {
            let mut run = command(&self.bed.bed.client_control(), &["run", "--"]);
            run.arg("sh");
            run
        } else {
            Command::new("sh")
        };
        run.arg("-c")
            .arg(script.replace(RUN, name))
            .current_dir(&folder)
            .env("LC_ALL", "C.UTF-8")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = self.bed.bed.lab.client().spawn(run)?;
        let output = finish(child, LIMIT).with_context(|| format!("{name}: `{script}`"))?;
        said(&output, &folder, name)
    }

    /// An empty folder for this run.
    fn folder(&self, name: &str) -> anyhow::Result<PathBuf> {
        let folder = self.bed.path(name);
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir(&folder)?;
        Ok(folder)
    }
}

fn said(output: &Output, folder: &Path, name: &str) -> anyhow::Result<Said> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder)?.flatten() {
        let file = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_file() {
            files.insert(file, sha256(&entry.path())?);
        }
    }
    // Its own name may be in what it says.
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace(name, RUN);
    Ok(Said {
        status: output.status.to_string(),
        out: text(&output.stdout),
        err: text(&output.stderr),
        files,
    })
}
