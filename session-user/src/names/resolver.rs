//! Answers questions of captured applications, and hands on what is not about captured names.
//!
//! A question that goes on goes to the resolver that it was for, byte for byte, and so does its answer back: from the
//! agent's own socket, which is not captured, or through a peer, if a rule captures what goes to that resolver.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use session_proto::wire::Target;
use tokio::net::{TcpStream, UdpSocket, UnixStream};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use super::answer::{Answers, Carrier, Reply, belongs};
use super::stream::{Far, converse};
use crate::requests::{
    Answer, AppEnd, AppFlow, AppStream, Asker, FlowEnd, FlowInput, FlowQueue, RequestQueue,
    StreamRequest, Supply,
};

/// Questions by UDP that wait for a resolver's answer, at most; each takes a socket. Beyond it they are dropped, and
/// asked again by whoever asked.
const WAITING_MAX: usize = 1024;
/// Connections to resolvers, at most. Beyond it they are refused.
const STREAMS_MAX: usize = 1024;
/// How long a resolver is waited for. Resolvers of libc ask again after 5 s, from where they asked before.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for a resolver to accept a connection: what a connect() has on Linux (127 s).
const CONNECT_TIMEOUT: Duration = Duration::from_secs(127);
/// Largest message (RFC 1035, 4.2.2).
pub(super) const MESSAGE_MAX: usize = 65_535;

/// The way to a resolver.
#[derive(Clone, Debug)]
pub enum Way {
    /// From this host.
    Direct,
    /// Through the peer with this queue.
    Peer(Arc<RequestQueue>),
}

/// A connection of an application to a resolver.
#[derive(Debug)]
pub struct Conversation {
    /// The resolver.
    pub resolver: SocketAddr,
    /// The way to it.
    pub way: Way,
    /// The application's end, for logs.
    pub app: AppEnd,
    /// Id of the application's cgroup.
    pub cgroup: u64,
    /// The application's socket, or who waits for the resolver to accept.
    pub supply: Supply,
}

/// Answers and hands on. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Resolver {
    answers: Answers,
    waiting: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    /// Where conversations are held, whoever brings them.
    runtime: Handle,
}

impl Resolver {
    /// One that answers so, and holds conversations in the runtime that this is called in.
    pub fn new(answers: Answers) -> Self {
        Self {
            answers,
            waiting: Arc::new(Semaphore::new(WAITING_MAX)),
            streams: Arc::new(Semaphore::new(STREAMS_MAX)),
            runtime: Handle::current(),
        }
    }

    /// What is said to a question by itself, before anybody else is asked.
    pub fn reply(&self, question: &[u8], carrier: Carrier) -> Reply {
        self.answers.reply(question, carrier, Instant::now())
    }

    /// The answer to a question by UDP that was for `resolver`; `None` if there is none in time. An error is the
    /// errno that an application's own socket would have seen, such as ECONNREFUSED.
    pub async fn answer(
        &self,
        question: &[u8],
        resolver: SocketAddr,
        way: &Way,
    ) -> Result<Option<Vec<u8>>, i32> {
        match self.reply(question, Carrier::Udp) {
            Reply::Answer(answer) => Ok(Some(answer)),
            Reply::Nothing => Ok(None),
            Reply::Forward => self.forward(question, resolver, way).await,
        }
    }

    /// As [`Self::answer`], of what is known to be for somebody else.
    pub(super) async fn forward(
        &self,
        question: &[u8],
        resolver: SocketAddr,
        way: &Way,
    ) -> Result<Option<Vec<u8>>, i32> {
        let Ok(_permit) = self.waiting.try_acquire() else {
            tracing::debug!(%resolver, "too many questions wait for answers: one is dropped");
            return Ok(None);
        };
        let answered = async {
            match way {
                Way::Direct => ask_directly(question, resolver).await.map_err(errno),
                Way::Peer(queue) => ask_through(question, resolver, queue).await,
            }
        };
        match timeout(ANSWER_TIMEOUT, answered).await {
            Ok(answer) => answer.map(Some),
            Err(_) => Ok(None),
        }
    }

    /// Answers the datagrams of a queue to which captured questions are pushed, each by its flow's end; `way` leads to
    /// the resolvers that they are for. Runs until it is dropped.
    pub async fn serve_datagrams(self, questions: Arc<FlowQueue>, way: Way) {
        loop {
            questions.available().await;
            // Whose flow has ended is not waited for: its answer goes nowhere, as late ones do.
            while let Some(input) = questions.pop() {
                if let FlowInput::Datagram(flow, question, _) = input
                    && let Target::Addr(resolver) = flow.target
                {
                    let (asking, way) = (self.clone(), way.clone());
                    tokio::spawn(async move {
                        match asking.answer(&question, resolver, &way).await {
                            Ok(Some(answer)) => flow.end().deliver(&answer),
                            Ok(None) => {}
                            Err(errno) => flow.end().failed(errno),
                        }
                    });
                }
            }
        }
    }

    /// Serves a connection in a task of its own.
    pub fn serve(&self, conversation: Conversation) {
        // Dropped, a connection is reset, and one that waits is refused.
        let Ok(permit) = Arc::clone(&self.streams).try_acquire_owned() else {
            tracing::warn!(resolver = %conversation.resolver, "too many connections to resolvers: one is refused");
            return;
        };
        let resolver = self.clone();
        self.runtime.spawn(async move {
            let _permit = permit;
            resolver.meet(conversation).await;
        });
    }

    async fn meet(&self, conversation: Conversation) {
        let Conversation {
            resolver,
            way,
            app,
            cgroup,
            supply,
        } = conversation;
        let dialled = dial(resolver, &way, &app, cgroup);
        let (near, far) = match supply {
            Supply::Connected(near) => match dialled.await {
                Ok(far) => (near, far),
                Err(errno) => {
                    tracing::debug!(%resolver, %app, errno, "a resolver takes no connection");
                    return;
                }
            },
            Supply::Waiting(mut asker) => {
                let dialled = tokio::select! {
                    dialled = dialled => dialled,
                    () = asker.gone() => return,
                };
                match dialled {
                    Ok(far) => match asker.connected().await {
                        Some(near) => (near, far),
                        None => return,
                    },
                    Err(errno) => return asker.refused(errno),
                }
            }
        };
        if let Err(error) = converse(self, near, far).await {
            tracing::debug!(%resolver, %app, %error, "a connection to a resolver has failed");
        }
    }
}

fn errno(error: io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

async fn ask_directly(question: &[u8], resolver: SocketAddr) -> io::Result<Vec<u8>> {
    let any: IpAddr = match resolver {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // A socket and with it a port of its own for each question: what comes from elsewhere is not received.
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
    socket.connect(resolver).await?;
    socket.send(question).await?;
    let mut buffer = vec![0; MESSAGE_MAX];
    loop {
        let received = socket.recv(&mut buffer).await?;
        if belongs(&buffer[..received], question) {
            buffer.truncate(received);
            return Ok(buffer);
        }
    }
}

/// The end of a flow that carries one question.
struct OneAnswer(mpsc::Sender<Result<Vec<u8>, i32>>);

impl FlowEnd for OneAnswer {
    fn deliver(&self, data: &[u8]) {
        // What does not fit is one more than anybody asked for.
        let _ = self.0.try_send(Ok(data.to_vec()));
    }

    fn failed(&self, errno: i32) {
        let _ = self.0.try_send(Err(errno));
    }
}

async fn ask_through(
    question: &[u8],
    resolver: SocketAddr,
    queue: &RequestQueue,
) -> Result<Vec<u8>, i32> {
    let (answered, mut answers) = mpsc::channel(4);
    let app = "a question about a name".to_owned();
    let end = Box::new(OneAnswer(answered));
    let flow = Arc::new(AppFlow::new(Target::Addr(resolver), app, None, end));
    /// Ends the flow however the question ends.
    struct Closing<'a>(&'a RequestQueue, &'a Arc<AppFlow>);
    impl Drop for Closing<'_> {
        fn drop(&mut self) {
            self.0.flows.close(self.1);
        }
    }
    let _closing = Closing(queue, &flow);
    queue.flows.push(&flow, Bytes::copy_from_slice(question));
    loop {
        // It ends with the flow, which is held here.
        let answer = answers.recv().await.ok_or(libc::EHOSTUNREACH)??;
        if belongs(&answer, question) {
            return Ok(answer);
        }
    }
}

async fn dial(resolver: SocketAddr, way: &Way, app: &AppEnd, cgroup: u64) -> Result<Far, i32> {
    match way {
        Way::Direct => {
            let connected = timeout(CONNECT_TIMEOUT, TcpStream::connect(resolver)).await;
            let socket = connected.map_err(|_| libc::ETIMEDOUT)?.map_err(errno)?;
            // Best effort: small messages that wait for nothing.
            let _ = socket.set_nodelay(true);
            Ok(Box::new(socket))
        }
        Way::Peer(queue) => {
            let (asker, answer) = Asker::new();
            let request = StreamRequest {
                target: Target::Addr(resolver),
                app: app.clone(),
                cgroup: Some(cgroup),
                supply: Supply::Waiting(asker),
            };
            queue.push(request).map_err(|_| libc::EHOSTUNREACH)?;
            // Without an answer the session has ended.
            match answer.await.map_err(|_| libc::EHOSTUNREACH)? {
                Answer::Refused(errno) => Err(errno),
                Answer::Connected(seat) => {
                    let (ours, theirs) = UnixStream::pair().map_err(errno)?;
                    // If nobody takes it, the session has ended, and our end sees that.
                    drop(seat.send(AppStream::from(theirs)));
                    Ok(Box::new(ours))
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
