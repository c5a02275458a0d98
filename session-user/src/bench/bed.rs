//! The test bed of `--lab`: the two-link lab, a CA, two agents, a captured cgroup.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail, ensure};
use session_lab::{Lab, LabConfig, LinkName, Netns, Shape, TestCgroup};

use crate::control::{Client, Request, Response, SessionReport};
use crate::pki;

/// Port that the gateway listens on.
const PORT: u16 = 7843;
/// Time for agents to start and for a session to stand.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// Between two looks at something that has no event to wait for.
const LOOK: Duration = Duration::from_millis(5);

/// The agents' log filter, as HOLDFAST_BENCH_LOG says, to look into what a measurement does.
fn log_filter() -> String {
    std::env::var("HOLDFAST_BENCH_LOG").map_or_else(|_| String::new(), |f| format!("log = {f:?}\n"))
}

/// The local bypass of the client's agent, as HOLDFAST_BENCH_LOCAL_BYPASS says: off, auto or on.
fn local_bypass() -> String {
    let typed = std::env::var("HOLDFAST_BENCH_LOCAL_BYPASS");
    typed.map_or_else(|_| String::new(), |b| format!("local_bypass = {b:?}\n"))
}

/// A program that is ended with this value.
pub struct Running {
    child: Child,
    name: &'static str,
}

impl Running {
    /// Takes a program over.
    pub fn new(child: Child, name: &'static str) -> Self {
        Self { child, name }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs; its last words are in its log.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the {} has ended: {status}", self.name),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the bed is made of.
#[derive(Clone, Debug)]
pub struct BedConfig {
    /// The `holdfast` program.
    pub program: PathBuf,
    /// Whether the transports run over IPv6.
    pub v6: bool,
    /// Whether there are agents at all.
    pub holdfast: bool,
    /// What the client may reach; by default every port of the lab's targets.
    pub allow: Vec<String>,
    /// Who may use `holdfast run`.
    pub run_users: Vec<String>,
    /// Further lines of the client's configuration.
    pub client_extra: String,
    /// Further lines of the gateway's configuration.
    pub gateway_extra: String,
    /// Further lines of the client's `[[capture]]`.
    pub capture_extra: String,
    /// `[[capture]]` rules of the client before the one that captures everything to the lab's targets.
    pub capture_before: String,
    /// Further lines of the gateway's `[accept]`.
    pub accept_extra: String,
    /// Whether the server has a second link, and the client's agent knows the gateway's address on it.
    pub second_gateway: bool,
    /// What each link does to packets while nothing happens to them.
    pub shapes: [Shape; 2],
}

impl BedConfig {
    /// The usual bed, with `program` as agent.
    pub fn new(program: PathBuf) -> Self {
        let allow = vec![
            format!("{}/32:*", Lab::target(false)),
            format!("[{}]/128:*", Lab::target(true)),
        ];
        Self {
            program,
            v6: false,
            holdfast: true,
            allow,
            run_users: Vec::new(),
            client_extra: String::new(),
            gateway_extra: String::new(),
            capture_extra: String::new(),
            capture_before: String::new(),
            accept_extra: String::new(),
            second_gateway: false,
            shapes: [Shape::default(); 2],
        }
    }
}

/// Two agents in the lab, with a session between them.
pub struct Bed {
    dir: PathBuf,
    config: BedConfig,
    /// Programs in it are captured.
    pub cgroup: TestCgroup,
    /// The agent of the client.
    pub client_agent: Option<Running>,
    /// The agent of the server.
    pub gateway_agent: Option<Running>,
    /// Where the client's agent is, so that it can be frozen.
    agent_cgroup: TestCgroup,
    /// The lab; last, so that the agents end first.
    pub lab: Lab,
}

/// This very program.
pub fn own_program() -> anyhow::Result<PathBuf> {
    std::env::current_exe().context("this program's own file cannot be found")
}

impl Bed {
    /// Makes lab, identities, agents and session; without agents, the lab alone.
    pub fn new(dir: &Path, config: BedConfig) -> anyhow::Result<Self> {
        let lab = Lab::new(&LabConfig {
            second_server_link: config.second_gateway,
            ..LabConfig::default()
        })?;
        let cgroup = TestCgroup::new()?;
        let mut bed = Self {
            dir: dir.to_owned(),
            config,
            cgroup,
            client_agent: None,
            gateway_agent: None,
            agent_cgroup: TestCgroup::new()?,
            lab,
        };
        // Before anything runs over them: agents learn the round-trip time.
        if bed.config.shapes != [Shape::default(); 2] {
            for (link, shape) in LinkName::ALL.into_iter().zip(bed.config.shapes) {
                bed.lab.shape(link, session_lab::Direction::Both, shape)?;
            }
        }
        if bed.config.holdfast {
            bed.start_agents()?;
        }
        Ok(bed)
    }

    /// Makes identities, starts both agents, and waits for their session.
    pub fn start_agents(&mut self) -> anyhow::Result<()> {
        self.make_identities()?;
        self.start_gateway()?;
        self.start_client()?;
        self.await_session()
    }

    /// Makes a CA, both identities and both configurations.
    pub fn make_identities(&self) -> anyhow::Result<()> {
        let now = SystemTime::now();
        let hour = Duration::from_secs(3600);
        let ca = self.dir.join("pki");
        pki::init(&ca, "bench.example", hour, now, true)?;
        for unit in ["client", "gateway"] {
            pki::issue(&ca, unit, hour, &ca, now, true)?;
        }
        fs::write(self.dir.join("gateway.toml"), self.gateway_config())?;
        fs::write(self.dir.join("client.toml"), self.client_config())?;
        Ok(())
    }

    /// Starts the gateway's agent (again).
    pub fn start_gateway(&mut self) -> anyhow::Result<()> {
        self.gateway_agent =
            Some(self.agent(self.lab.server(), "gateway agent", "gateway.toml", None)?);
        Ok(())
    }

    /// Starts the client's agent (again).
    pub fn start_client(&mut self) -> anyhow::Result<()> {
        let cgroup = Some(&self.agent_cgroup);
        self.client_agent =
            Some(self.agent(self.lab.client(), "client agent", "client.toml", cgroup)?);
        Ok(())
    }

    /// Starts a program in the client's namespace, captured.
    pub fn spawn_captured(&self, mut command: Command) -> std::io::Result<Child> {
        self.cgroup
            .enter(&mut command)
            .map_err(std::io::Error::other)?;
        self.lab.client().spawn(command)
    }

    /// What `link` does to packets while nothing happens to it.
    pub fn shape(&self, link: LinkName) -> Shape {
        self.config.shapes[link as usize]
    }

    /// The folder of identities, configurations and logs.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What an agent has logged: `client` or `gateway`.
    pub fn log(&self, unit: &str) -> String {
        fs::read_to_string(self.dir.join(format!("{unit}.toml.log"))).unwrap_or_default()
    }

    fn identity(&self, unit: &str) -> String {
        let pki = self.dir.join("pki");
        let pki = pki.display();
        format!(
            "[identity]\ncertificate = \"{pki}/{unit}.crt\"\nkey = \"{pki}/{unit}.key\"\nca = \"{pki}/ca.crt\"\ncrl = \"{pki}/crl.pem\"\n"
        )
    }

    fn gateway_config(&self) -> String {
        let control = self.dir.join("gateway.sock");
        let to: Vec<String> = self
            .config
            .allow
            .iter()
            .map(|t| format!("\"{t}\""))
            .collect();
        format!(
            "{}[agent]\ncontrol = \"{}\"\n{}[accept]\nlisten = [\"0.0.0.0:{PORT}\", \"[::]:{PORT}\"]\nstate = \"{}/gateway\"\n{}\
             [[accept.allow]]\npeer = \"client\"\nto = [{}]\n{}",
            self.identity("gateway"),
            control.display(),
            log_filter(),
            self.dir.display(),
            self.config.accept_extra,
            to.join(", "),
            self.config.gateway_extra
        )
    }

    fn client_config(&self) -> String {
        let control = self.client_control();
        let v6 = self.config.v6;
        let mut gateways = vec![SocketAddr::new(Lab::gateway(v6), PORT)];
        if self.config.second_gateway {
            gateways.push(SocketAddr::new(Lab::second_gateway(v6), PORT));
        }
        let gateways: Vec<String> = gateways.iter().map(|g| format!("\"{g}\"")).collect();
        let gateways = gateways.join(", ");
        let [wifi, lte] = LinkName::ALL.map(LinkName::name);
        let users: Vec<String> = self
            .config
            .run_users
            .iter()
            .map(|u| format!("\"{u}\""))
            .collect();
        let users = users.join(", ");
        format!(
            "{}[agent]\ncontrol = \"{}\"\n{}capture_cgroups = [\"{}\"]\nrun_users = [{users}]\n{}[[peer]]\nname = \"gateway\"\naddresses = [{gateways}]\n\
             {}[[capture]]\npeer = \"gateway\"\nto = [\"{}\", \"{}\"]\n{}[links]\nprefer = [\"{wifi}\", \"{lte}\"]\n{}",
            self.identity("client"),
            control.display(),
            log_filter(),
            self.cgroup.path().display(),
            local_bypass(),
            self.config.capture_before,
            Lab::target(false),
            Lab::target(true),
            self.config.capture_extra,
            self.config.client_extra
        )
    }

    /// The client agent's control socket.
    pub fn client_control(&self) -> PathBuf {
        self.dir.join("client.sock")
    }

    fn agent(
        &self,
        netns: &Netns,
        name: &'static str,
        config: &str,
        cgroup: Option<&TestCgroup>,
    ) -> anyhow::Result<Running> {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.join(format!("{config}.log")))?;
        let mut command = Command::new(&self.config.program);
        command
            .arg("agent")
            .arg("--config")
            .arg(self.dir.join(config));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        if let Some(cgroup) = cgroup {
            cgroup.enter(&mut command)?;
        }
        let child = netns
            .spawn(command)
            .with_context(|| format!("the {name} cannot be started"))?;
        Ok(Running { child, name })
    }

    /// Freezes the client's agent, or lets it go on.
    pub fn freeze(&self, frozen: bool) -> anyhow::Result<()> {
        let path = self.agent_cgroup.path();
        fs::write(path.join("cgroup.freeze"), if frozen { "1" } else { "0" })?;
        let state = format!("frozen {}", u8::from(frozen));
        let deadline = Instant::now() + START_TIMEOUT;
        while !fs::read_to_string(path.join("cgroup.events"))?.contains(&state) {
            ensure!(
                Instant::now() < deadline,
                "the agent's cgroup does not obey"
            );
            // The file can be polled for changes, but not by its content.
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Asks the client's agent to do something.
    pub fn command(&self, request: &Request) -> anyhow::Result<()> {
        Client::connect(&self.client_control())?.call(request)?;
        Ok(())
    }

    /// What an agent said last.
    pub fn last_words(&self) -> String {
        ["gateway.toml.log", "client.toml.log"]
            .iter()
            .map(|file| {
                let text = fs::read_to_string(self.dir.join(file)).unwrap_or_default();
                let lines: Vec<&str> = text.lines().rev().take(8).collect();
                format!(
                    "{file}:\n  {}\n",
                    lines.into_iter().rev().collect::<Vec<_>>().join("\n  ")
                )
            })
            .collect()
    }

    /// Waits until the session stands.
    pub fn await_session(&mut self) -> anyhow::Result<()> {
        let up = self.wait(START_TIMEOUT, |s| {
            s.transports.iter().any(|t| t.active && t.up)
        });
        up.with_context(|| format!("no session stands\n{}", self.last_words()))
    }

    /// The client's session, if there is one.
    pub fn session(&self) -> Option<SessionReport> {
        session_at(&self.client_control(), "initiator")
    }

    /// The gateway's session, if there is one.
    pub fn gateway_session(&self) -> Option<SessionReport> {
        session_at(&self.dir.join("gateway.sock"), "responder")
    }

    /// Waits until the session is as `good` says.
    pub fn wait(
        &mut self,
        limit: Duration,
        good: impl Fn(&SessionReport) -> bool,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            if self.session().is_some_and(|s| good(&s)) {
                return Ok(());
            }
            for agent in [&mut self.client_agent, &mut self.gateway_agent]
                .into_iter()
                .flatten()
            {
                agent.check()?;
            }
            ensure!(Instant::now() < deadline, "it took longer than {limit:?}");
            // The control socket answers questions and tells nothing by itself.
            std::thread::sleep(LOOK);
        }
    }

    /// Waits until a standby stands on `link`.
    pub fn await_standby(&mut self, link: LinkName, limit: Duration) -> anyhow::Result<()> {
        let ready = |s: &SessionReport| {
            s.transports
                .iter()
                .any(|t| !t.active && t.up && t.link == link.name())
        };
        self.wait(limit, ready)
            .with_context(|| format!("no standby on {}\n{}", link.name(), self.last_words()))
    }

    /// Waits until `link` carries the session.
    pub fn await_link(&mut self, link: LinkName, limit: Duration) -> anyhow::Result<()> {
        let carries = |s: &SessionReport| {
            s.transports
                .iter()
                .any(|t| t.active && t.up && t.link == link.name())
        };
        self.wait(limit, carries).with_context(|| {
            format!(
                "the session does not move to {}\n{}",
                link.name(),
                self.last_words()
            )
        })
    }
}

/// The session of the agent at `control` in which it has this role.
fn session_at(control: &Path, role: &str) -> Option<SessionReport> {
    let Ok(Response::Sessions(sessions)) = Client::connect(control).ok()?.call(&Request::Sessions)
    else {
        return None;
    };
    sessions.into_iter().find(|s| s.role == role)
}
