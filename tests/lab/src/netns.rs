//! One network namespace, held by a thread.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;

use anyhow::{Context, bail};
use nix::sched::{CloneFlags, unshare};

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace without a name. It ends with this value, and everything in it too.
pub struct Netns {
    name: &'static str,
    file: File,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Netns {
    /// Makes a namespace whose loopback is up. `name` is for messages only.
    pub fn new(name: &'static str) -> anyhow::Result<Self> {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let (ready, made) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name(format!("netns-{name}"))
            .spawn(move || {
                let file = unshare(CloneFlags::CLONE_NEWNET)
                    .map_err(io::Error::from)
                    .and_then(|()| File::open("/proc/thread-self/ns/net"));
                let good = file.is_ok();
                // The maker waits for this answer, so it is there to hear it.
                let _ = ready.send(file);
                if good {
                    for job in inbox {
                        job();
                    }
                }
            })?;
        let file = made.recv()?.with_context(|| {
            format!("the namespace `{name}` cannot be made: the lab needs root (CAP_SYS_ADMIN)")
        })?;
        let this = Self {
            name,
            file,
            jobs: Some(jobs),
            thread: Some(thread),
        };
        this.ip(&["link", "set", "lo", "up"])?;
        Ok(this)
    }

    /// The namespace, for setns(2).
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Its name in messages.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Runs `job` on the thread that is inside, and waits for it. Sockets that it makes stay in
    /// the namespace wherever they go.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        let job: Job = Box::new(move || {
            // The caller waits below, so it is there to hear it.
            let _ = done.send(job());
        });
        let sent = self.jobs.as_ref().map(|jobs| jobs.send(job));
        assert!(
            matches!(sent, Some(Ok(()))),
            "the thread of namespace `{}` has died",
            self.name
        );
        result
            .recv()
            .unwrap_or_else(|_| panic!("a job in namespace `{}` panicked", self.name))
    }

    /// Starts a thread of its own inside.
    pub fn thread<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<JoinHandle<T>> {
        let file = self.file.try_clone()?;
        Ok(std::thread::spawn(move || {
            nix::sched::setns(file, CloneFlags::CLONE_NEWNET)
                .expect("the namespace is held by its own thread");
            job()
        }))
    }

    /// Starts a program inside. The kernel kills it when this namespace's thread ends.
    pub fn spawn(&self, mut command: Command) -> io::Result<Child> {
        // SAFETY: prctl(PR_SET_PDEATHSIG) is async-signal-safe and touches no memory.
        unsafe {
            command.pre_exec(|| {
                nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
                    .map_err(io::Error::from)
            });
        }
        self.run(move || command.spawn())
    }

    /// Runs a program inside to its end and takes what it prints.
    pub fn output(&self, mut command: Command) -> io::Result<Output> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        self.spawn(command)?.wait_with_output()
    }

    /// Runs a program inside; its failure is an error with what it said.
    pub fn exec(&self, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(program);
        command.args(arguments);
        let output = self
            .output(command)
            .with_context(|| format!("`{program}` cannot be started"))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!(
                "in namespace `{}`: {program} {}: {}",
                self.name,
                arguments.join(" "),
                said.trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// `ip` with these arguments.
    pub fn ip(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.exec("ip", arguments)
    }

    /// Sets a sysctl of the namespace, such as `net/ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) -> anyhow::Result<()> {
        let (path, value) = (format!("/proc/sys/{key}"), value.to_owned());
        let shown = path.clone();
        self.run(move || std::fs::write(path, value))
            .with_context(|| format!("{shown} cannot be set"))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // A job that panicked has been reported where it was waited for.
            let _ = thread.join();
        }
    }
}
