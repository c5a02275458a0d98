//! What becomes of a connection: the capture's answer, with what the rest of the agent knows.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use session_proto::wire::Target;

use super::commands::{Shared, capture_failed};
use super::reports::{mode_word, peer_report};
use super::service_rules;
use crate::capture::{Explanation, Protocol, Question, Survey, cgroup};
use crate::control::{
    Asked, ControlError, Credentials, ErrorCode, ExplainReport, PassedReport, RuleReport,
    ServiceReport, TARGETS_MAX, TargetReport,
};
use crate::driver::SessionSnapshot;

const ELSEWHERE: &str = "this command is in another network namespace than the agent, which listens there as soon as \
                         it hears of a captured process in it";
const ALL_ELSEWHERE: &str = "its processes are in another network namespace than the agent, which listens there as soon \
                             as it hears of them";
const MIXED: &str =
    "its processes are in several network namespaces: what is said is of the agent's own";

/// The number of the network namespace that is asked about, and what is to be known about that. Without a number it is
/// the agent's own: what cannot be read is not claimed to be another.
fn netns_of(asked: &Asked, folder: &Path, who: Credentials) -> (Option<u64>, Option<String>) {
    if asked.cgroup.is_none() {
        let link = format!("/proc/{}/ns/net", who.pid);
        return (fs::metadata(link).ok().map(|data| data.ino()), None);
    }
    let found = Survey::of(folder).look().namespaces();
    match found.as_slice() {
        [] => (None, None),
        [one] => (Some(*one), None),
        _ => (None, Some(MIXED.to_owned())),
    }
}

impl Shared {
    /// Answers [`crate::control::Request::Explain`].
    pub(super) async fn explain(
        &self,
        asked: &Asked,
        who: Credentials,
    ) -> Result<ExplainReport, ControlError> {
        let captures = self.capture()?;
        if asked.targets.is_empty() || asked.targets.len() > TARGETS_MAX {
            let message = format!("1 to {TARGETS_MAX} addresses can be asked about at once");
            return Err(ControlError::new(ErrorCode::Invalid, message, ""));
        }
        let folder = match &asked.cgroup {
            Some(path) => cgroup::folder(path),
            None => cgroup::of_process(who.pid),
        };
        let failed = |error| capture_failed(super::captures::Error::Capture(error));
        let folder = folder.map_err(failed)?;
        let name = cgroup::below_root(&folder).map_err(failed)?;
        let uid = asked.uid.unwrap_or(who.uid);
        let question = |to: &SocketAddr| Question {
            to: SocketAddr::new(to.ip().to_canonical(), to.port()),
            uid,
            protocol: asked.protocol,
        };
        let questions: Vec<Question> = asked.targets.iter().map(question).collect();
        let (netns, note) = netns_of(asked, &folder, who);
        let answers = captures.explain(&folder, netns, questions.clone()).await;
        let answers = answers.map_err(capture_failed)?;
        let sessions = self.registry.snapshots().await;
        let targets = questions.iter().zip(&answers);
        let targets =
            targets.map(|(question, answer)| self.target(question, answer, &name, &sessions));
        let first = answers.first();
        Ok(ExplainReport {
            protocol: asked.protocol,
            uid,
            attachment: first.and_then(|answer| answer.attachment.clone()),
            filter: first.and_then(|answer| Some(answer.filter.as_ref()?.0.clone())),
            note: note.or_else(|| {
                let nobody = !first?.listens;
                let all = asked.cgroup.is_some();
                nobody.then(|| if all { ALL_ELSEWHERE } else { ELSEWHERE }.to_owned())
            }),
            targets: targets.collect(),
            cgroup: name,
        })
    }

    fn target(
        &self,
        question: &Question,
        answer: &Explanation,
        cgroup: &str,
        sessions: &[SessionSnapshot],
    ) -> TargetReport {
        let rule = answer.rule.and_then(|position| {
            let capture = self.config.captures.get(position)?;
            Some(RuleReport {
                number: position + 1,
                file: self.file.clone(),
                line: capture.line,
                says: capture.rule.to_string(),
            })
        });
        let passed = answer.passed.iter().filter_map(|(position, why)| {
            Some(PassedReport {
                number: position + 1,
                line: self.config.captures.get(*position)?.line,
                why: why.clone(),
            })
        });
        let peer = answer.peer.and_then(|index| self.peers.get(index as usize));
        let streams = answer.peer.is_some() && question.protocol == Protocol::Tcp;
        TargetReport {
            address: question.to,
            verdict: answer.verdict,
            reason: answer.reason.clone(),
            agent_dead: answer.agent_dead,
            rule,
            passed: passed.collect(),
            filter_keeps: answer.filter.as_ref().map(|(_, keeps)| *keeps),
            peer: peer.map(|peer| peer_report(peer, sessions)),
            stream: streams.then(|| self.service(question.to, cgroup)),
        }
    }

    /// How a stream from `cgroup` uses the links, as the driver chooses it.
    fn service(&self, to: SocketAddr, cgroup: &str) -> ServiceReport {
        let rules = service_rules(&self.config);
        let below_root = cgroup.trim_start_matches('/').to_owned();
        let found = rules.find(&Target::Addr(to), || Some(below_root));
        let service = found.map_or(rules.default, |position| rules.rules[position].service);
        let line = found.and_then(|position| Some(self.config.streams.get(position)?.line));
        ServiceReport {
            number: found.map(|position| position + 1),
            line,
            links: mode_word(service.mode).to_owned(),
            own_lane: service.own_lane,
        }
    }
}
