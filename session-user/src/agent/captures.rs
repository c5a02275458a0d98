//! The task that owns the capture: attaches cgroups on request, and listens in network namespaces.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::cgroup_watch::CgroupWatch;
use super::entrance::{ACCEPT_RETRY, Porter, Stranger};
use super::held::{HeldConnections, Waiting};
use super::native::native;
use super::routes::Routes;
use super::surveys::Surveys;
use crate::capture::{
    Capture, CaptureError, Counters, Entered, Explanation, Filter, NamespaceError, Native, Question,
};
use crate::link::LinkSnapshot;

enum Request {
    Attach(PathBuf, Filter, oneshot::Sender<Result<(), CaptureError>>),
    Detach(PathBuf, oneshot::Sender<Result<(), CaptureError>>),
    DetachAll(oneshot::Sender<()>),
    Enter(u32, Option<u64>, oneshot::Sender<Entered>),
    State(oneshot::Sender<State>),
    Explain(
        PathBuf,
        Option<u64>,
        Vec<Question>,
        oneshot::Sender<Explained>,
    ),
}

/// An answer to each question.
type Explained = Result<Vec<Explanation>, CaptureError>;

/// What the capture is doing.
#[derive(Clone, Debug)]
pub struct State {
    /// The captured cgroups.
    pub attached: Vec<PathBuf>,
    /// What the eBPF programs have counted.
    pub counters: Counters,
}

/// The capture's task, as the rest of the agent reaches it. Cheap to clone.
#[derive(Clone)]
pub struct Captures {
    requests: mpsc::Sender<Request>,
}

/// The capture's task has ended: the agent is going down.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The capture said no.
    #[error("{0}")]
    Capture(#[from] CaptureError),
    /// A process is where nothing can be captured.
    #[error("{0}")]
    Namespace(#[from] Arc<NamespaceError>),
    /// There is no capture any more.
    #[error("the agent is shutting down")]
    Gone,
}

impl Captures {
    /// Starts the task among `tasks`, and with it the one that lets connections in, which the runtime `entrance` runs:
    /// the one that the capture was loaded for. Captured sockets go where the routes say; a flow of theirs without a
    /// datagram for `flow_idle` is over.
    pub fn start(
        mut capture: Capture,
        routes: Routes,
        links: watch::Receiver<Arc<LinkSnapshot>>,
        flow_idle: Duration,
        entrance: &Handle,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let (requests, inbox) = mpsc::channel(16);
        let (strangers, announced) = mpsc::channel(1);
        let held = HeldConnections::default();
        let porch = Porch {
            announced,
            waiting: held.waiting(),
            changed: Arc::default(),
        };
        let porter = Porter {
            gate: capture.take_gate(),
            entrance: capture.entrance(),
            held,
            routes: routes.clone(),
            strangers,
            changed: Arc::clone(&porch.changed),
        };
        tasks.spawn_on(porter.run(), entrance);
        tasks.spawn(serve(capture, routes, links, flow_idle, inbox, porch));
        Self { requests }
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.requests
            .send(request(reply))
            .await
            .map_err(|_| Error::Gone)?;
        answer.await.map_err(|_| Error::Gone)
    }

    /// Captures `cgroup` from now on: of what the rules say, what `filter` keeps.
    pub async fn attach(&self, cgroup: &Path, filter: &Filter) -> Result<(), Error> {
        let (cgroup, filter) = (cgroup.to_owned(), filter.clone());
        let attach = |reply| Request::Attach(cgroup, filter, reply);
        Ok(self.ask(attach).await??)
    }

    /// Ends the capture of `cgroup`.
    pub async fn detach(&self, cgroup: &Path) -> Result<(), Error> {
        let cgroup = cgroup.to_owned();
        Ok(self.ask(|reply| Request::Detach(cgroup, reply)).await??)
    }

    /// Ends the capture of every cgroup: new connections go direct.
    pub async fn detach_all(&self) -> Result<(), Error> {
        self.ask(Request::DetachAll).await
    }

    /// Has connections of a process captured in the network namespace that it is in, from the first one on. `netns`: its
    /// number, as the process says.
    pub async fn enter(&self, pid: u32, netns: Option<u64>) -> Result<(), Error> {
        let enter = |reply| Request::Enter(pid, netns, reply);
        Ok(self.ask(enter).await??)
    }

    /// What becomes of connections that a process in `cgroup` (a folder) and in the network namespace with the number
    /// `netns` makes now, and why; without a number, in the agent's.
    pub async fn explain(
        &self,
        cgroup: &Path,
        netns: Option<u64>,
        questions: Vec<Question>,
    ) -> Result<Vec<Explanation>, Error> {
        let cgroup = cgroup.to_owned();
        let explain = |reply| Request::Explain(cgroup, netns, questions, reply);
        Ok(self.ask(explain).await??)
    }

    /// What it is doing.
    pub async fn state(&self) -> Result<State, Error> {
        self.ask(Request::State).await
    }
}

/// What the task has to do with the one that lets connections in.
struct Porch {
    announced: mpsc::Receiver<Stranger>,
    waiting: Waiting,
    /// To be told when listeners have come or gone.
    changed: Arc<Notify>,
}

async fn serve(
    mut capture: Capture,
    routes: Routes,
    mut links: watch::Receiver<Arc<LinkSnapshot>>,
    flow_idle: Duration,
    mut inbox: mpsc::Receiver<Request>,
    mut porch: Porch,
) {
    let watch = CgroupWatch::new();
    if let Err(error) = &watch {
        tracing::warn!(%error, "a service that is restarted must be attached again by hand");
    }
    let watch = watch.ok();
    // A task of its own, so that bulk delays no connection. It ends with this one.
    let mut datagrams = JoinSet::new();
    if let Some(taken) = capture.take_datagrams() {
        datagrams.spawn(taken.run(routes.clone(), flow_idle));
    }
    links.mark_changed();
    let mut native = Native::default();
    let mut surveys = Surveys::default();
    loop {
        tokio::select! {
            request = inbox.recv() => match request {
                Some(request) => if apply(&mut capture, request) {
                    look_after(&mut capture, watch.as_ref());
                    surveys.want();
                }
                None => return,
            },
            Some((newcomer, done)) = porch.announced.recv() => {
                if capture.welcome(&newcomer) {
                    surveys.want();
                }
                // Whoever waits goes with the agent.
                let _ = done.send(());
            }
            seen = links.changed() => match seen {
                Ok(()) => tell_native(&mut capture, &mut native, &links.borrow_and_update()),
                // The monitor ends with the agent.
                Err(_) => return,
            },
            () = changed(watch.as_ref()) => {
                look_after(&mut capture, watch.as_ref());
                surveys.want();
            }
            departed = capture.departed() => {
                capture.forget_departed(departed);
                surveys.want();
            }
            found = surveys.next(&capture) => {
                if capture.settle(&found, &porch.waiting.namespaces()) {
                    surveys.want();
                }
                porch.changed.notify_one();
            }
            opened = capture.opened() => {
                capture.take_in(opened);
                surveys.want();
                porch.changed.notify_one();
            }
        }
    }
}

/// Tells the programs what a connection would have without capture, if that has changed.
fn tell_native(capture: &mut Capture, known: &mut Native, links: &LinkSnapshot) {
    let native = native(links);
    if native == *known {
        return;
    }
    match capture.set_native(&native) {
        Ok(()) => *known = native,
        Err(error) => {
            tracing::warn!(%error, "captured applications may be told an old address as theirs");
        }
    }
}

/// Attaches to cgroups that were made anew. The folders are watched first, so that none is missed
/// in between.
fn look_after(capture: &mut Capture, watch: Option<&CgroupWatch>) {
    let Some(watch) = watch else { return };
    if let Err(error) = watch.look_after(&capture.attached()) {
        tracing::warn!(%error, "captured cgroups cannot be watched: attach a service again after its restart");
    }
    for cgroup in capture.reattach() {
        tracing::info!(cgroup = %cgroup.display(), "a captured cgroup was made anew and is captured again");
    }
}

async fn changed(watch: Option<&CgroupWatch>) {
    let told = match watch {
        Some(watch) => watch.changed().await,
        None => std::future::pending().await,
    };
    if let Err(error) = told {
        tracing::warn!(%error, "the watch of captured cgroups failed");
        tokio::time::sleep(ACCEPT_RETRY).await;
    }
}

/// Does what is asked; returns whether it changed what is captured.
fn apply(capture: &mut Capture, request: Request) -> bool {
    let changes = !matches!(request, Request::State(_) | Request::Explain(..));
    // Whoever asked may have gone; what was asked is done all the same.
    match request {
        Request::Attach(cgroup, filter, reply) => {
            drop(reply.send(capture.attach_filtered(&cgroup, &filter)));
        }
        Request::Detach(cgroup, reply) => drop(reply.send(capture.detach(&cgroup))),
        Request::DetachAll(reply) => {
            for cgroup in capture.attached() {
                if let Err(error) = capture.detach(&cgroup) {
                    tracing::warn!(cgroup = %cgroup.display(), %error, "a cgroup could not be detached");
                }
            }
            let _ = reply.send(());
        }
        Request::Enter(pid, netns, reply) => capture.enter(pid, netns, reply),
        Request::Explain(cgroup, netns, questions, reply) => {
            let explain = |question| capture.explain(&cgroup, netns, question);
            drop(reply.send(questions.iter().map(explain).collect()));
        }
        Request::State(reply) => {
            drop(reply.send(State {
                attached: capture.attached(),
                counters: capture.counters(),
            }));
        }
    }
    changes
}
