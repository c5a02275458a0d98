//! Permissions, and a real socket with well-behaved and other clients.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::unistd::{Gid, Group, Uid, User};
use tempfile::TempDir;

use super::{
    Asked, Client, ClientError, ControlError, ControlHandler, Credentials, ErrorCode, Permissions,
    Request, Response, listen, serve,
};

/// Debian's `nobody`, who is no member of anything.
fn nobody() -> Credentials {
    let user = User::from_name("nobody").unwrap().unwrap();
    Credentials {
        pid: 1,
        uid: user.uid.as_raw(),
        gid: user.gid.as_raw(),
    }
}

fn every_handover() -> Request {
    Request::Handovers {
        peer: None,
        count: 9,
    }
}

fn run() -> Request {
    Request::Run {
        only: vec![],
        except: vec![],
        netns: None,
    }
}

fn explain() -> Request {
    Request::Explain(Asked {
        name: None,
        targets: vec!["192.0.2.1:80".parse().unwrap()],
        protocol: Default::default(),
        cgroup: None,
        uid: None,
    })
}

fn every_request() -> [Request; 11] {
    let cgroup = PathBuf::from("a");
    [
        Request::Status,
        Request::Links,
        Request::Sessions,
        every_handover(),
        Request::Handover {
            link: "auto".to_owned(),
        },
        Request::Attach {
            cgroup: cgroup.clone(),
        },
        Request::Detach { cgroup },
        run(),
        explain(),
        Request::Woke,
        Request::Reload,
    ]
}

fn allowed(permissions: &Permissions, who: &Credentials) -> Vec<Request> {
    let all = every_request().into_iter();
    all.filter(|r| permissions.check(r, who).is_ok()).collect()
}

#[test]
fn root_and_the_agents_own_user_may_do_everything() {
    let mut who = nobody();
    for uid in [0, Uid::effective().as_raw()] {
        who.uid = uid;
        assert_eq!(allowed(&Permissions::default(), &who), every_request());
    }
}

#[test]
fn a_stranger_may_do_nothing_and_hears_what_would_help() {
    let stranger = nobody();
    let permissions = Permissions::default();
    assert_eq!(allowed(&permissions, &stranger), []);
    let error = permissions.check(&run(), &stranger).unwrap_err();
    assert_eq!(error.code, ErrorCode::NotPermitted);
    assert!(error.advice.contains("run_users"), "{}", error.advice);
    let error = permissions.check(&Request::Reload, &stranger).unwrap_err();
    assert!(error.advice.contains("control_group"), "{}", error.advice);
    let permissions = Permissions {
        control_group: Some("operators".to_owned()),
        ..Permissions::default()
    };
    let error = permissions.check(&Request::Reload, &stranger).unwrap_err();
    assert!(error.advice.contains("`operators`"), "{}", error.advice);
}

#[test]
fn run_users_run_and_look_and_do_no_more() {
    let permissions = Permissions {
        run_users: vec!["nobody".to_owned()],
        ..Permissions::default()
    };
    let expected = [
        Request::Status,
        Request::Links,
        Request::Sessions,
        every_handover(),
        run(),
        explain(),
    ];
    assert_eq!(allowed(&permissions, &nobody()), expected);
    let another = Credentials {
        uid: User::from_name("daemon").unwrap().unwrap().uid.as_raw(),
        ..nobody()
    };
    assert_eq!(allowed(&permissions, &another), []);
}

#[test]
fn members_of_the_control_group_may_do_everything() {
    let group = Group::from_gid(Gid::from_raw(nobody().gid))
        .unwrap()
        .unwrap();
    let permissions = Permissions {
        control_group: Some(group.name),
        ..Permissions::default()
    };
    assert_eq!(allowed(&permissions, &nobody()), every_request());
    let another = Credentials {
        uid: User::from_name("daemon").unwrap().unwrap().uid.as_raw(),
        gid: Group::from_name("daemon").unwrap().unwrap().gid.as_raw(),
        ..nobody()
    };
    assert_eq!(allowed(&permissions, &another), []);
    let missing = Permissions {
        control_group: Some("no-such-group".to_owned()),
        ..Permissions::default()
    };
    assert_eq!(allowed(&missing, &nobody()), []);
}

/// Does nothing, and says who asked.
struct Echo;

impl ControlHandler for Echo {
    fn permissions(&self) -> Permissions {
        Permissions::default()
    }

    async fn handle(&self, request: Request, who: Credentials) -> Result<Response, ControlError> {
        match request {
            Request::Reload => Ok(Response::Done(format!("pid {}", who.pid))),
            _ => Err(ControlError::new(ErrorCode::Failed, "no", "")),
        }
    }
}

struct Agent {
    dir: TempDir,
    runtime: tokio::runtime::Runtime,
}

impl Agent {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let this = Self { dir, runtime };
        let listener = this
            .runtime
            .block_on(async { listen(&this.path(), None) })
            .unwrap();
        this.runtime.spawn(serve(listener, Arc::new(Echo)));
        this
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("sub/control.sock")
    }

    /// Sends `bytes` and reads a line; empty at the end of the connection.
    fn raw(&self, bytes: &[u8]) -> (UnixStream, String) {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        stream.write_all(bytes).unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        (stream, line)
    }
}

fn listen_error(path: &Path) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime
        .block_on(async { listen(path, None) })
        .unwrap_err()
        .to_string()
}

#[test]
fn requests_are_answered_one_after_another() {
    let agent = Agent::start();
    let mut client = Client::connect(&agent.path()).unwrap();
    for _ in 0..3 {
        let Response::Done(words) = client.call(&Request::Reload).unwrap() else {
            panic!("another answer");
        };
        assert_eq!(words, format!("pid {}", std::process::id()));
    }
    let error = client.call(&Request::Status).unwrap_err();
    assert!(matches!(error, ClientError::Refused(e) if e.message == "no"));
    let mode = std::fs::metadata(agent.path())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o666);
}

#[test]
fn what_cannot_be_understood_is_said_and_harms_nobody_else() {
    let agent = Agent::start();
    for garbage in [
        &b"garbage\n"[..],
        b"{}\n",
        b"\xff\xfe\n",
        b"\"dance\"\n",
        b"\n",
    ] {
        let (mut stream, line) = agent.raw(garbage);
        assert!(
            line.contains("cannot be understood") && line.contains("same version"),
            "{garbage:?}: {line}"
        );
        // The connection is still good.
        stream.write_all(b"\"reload\"\n").unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        assert!(line.contains("pid"), "{line}");
    }
    // Half a line and goodbye.
    let mut stream = UnixStream::connect(agent.path()).unwrap();
    stream.write_all(b"\"rel").unwrap();
    drop(stream);
    let (_, line) = agent.raw(b"\"reload\"\n");
    assert!(line.contains("pid"), "{line}");
}

#[test]
fn an_endless_line_is_cut_off() {
    let agent = Agent::start();
    let mut stream = UnixStream::connect(agent.path()).unwrap();
    // The agent may hang up before all of it is written.
    let _ = stream.write_all(&vec![b'x'; 1 << 20]);
    let mut line = String::new();
    let read = BufReader::new(&stream).read_line(&mut line);
    assert!(read.is_err() || line.contains("too long"), "{line}");
    let mut client = Client::connect(&agent.path()).unwrap();
    assert!(client.call(&Request::Reload).is_ok());
}

#[test]
fn a_live_agents_socket_is_left_alone_and_a_dead_ones_replaced() {
    let agent = Agent::start();
    let words = listen_error(&agent.path());
    let pid = format!("pid {}", std::process::id());
    assert!(
        words.contains("already running") && words.contains(&pid),
        "{words}"
    );
    assert!(Client::connect(&agent.path()).is_ok());

    let Agent { dir, runtime } = agent;
    runtime.shutdown_timeout(std::time::Duration::from_secs(10));
    let path = dir.path().join("sub/control.sock");
    let error = Client::connect(&path).map(|_| ()).unwrap_err();
    assert!(matches!(error, ClientError::NotRunning { .. }), "{error}");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _listener = runtime.block_on(async { listen(&path, None) }).unwrap();
    assert!(Client::connect(&path).is_ok());
}

#[test]
fn a_file_in_the_way_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control.sock");
    std::fs::write(&path, "precious").unwrap();
    let words = listen_error(&path);
    assert!(words.contains("not a socket"), "{words}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}
