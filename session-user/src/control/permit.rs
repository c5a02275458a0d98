//! Who may ask what.

use nix::unistd::{Gid, Group, Uid, User};

use super::types::{ControlError, ErrorCode, Request};

/// Who is at the other end, as the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The process.
    pub pid: u32,
    /// Its effective user.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
}

/// Who is permitted beside root and the agent's own user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Permissions {
    /// Members may do everything.
    pub control_group: Option<String>,
    /// These may use `run`.
    pub run_users: Vec<String>,
}

impl Permissions {
    /// Whether `who` may ask `request`.
    pub fn check(&self, request: &Request, who: &Credentials) -> Result<(), ControlError> {
        let everything =
            who.uid == 0 || who.uid == Uid::effective().as_raw() || self.in_control_group(who);
        let run = matches!(request, Request::Run { .. }) && self.is_run_user(who.uid);
        if everything || run || (request.only_looks() && self.is_run_user(who.uid)) {
            return Ok(());
        }
        let advice = match (&self.control_group, request) {
            (_, Request::Run { .. }) => {
                "ask the administrator to add you to `run_users` in [agent]".to_owned()
            }
            (Some(group), _) => format!("become root, or a member of the group `{group}`"),
            (None, _) => "become root, or have `control_group` set in [agent]".to_owned(),
        };
        Err(ControlError::new(
            ErrorCode::NotPermitted,
            format!("user {} may not do this", who.uid),
            advice,
        ))
    }

    fn in_control_group(&self, who: &Credentials) -> bool {
        let Some(group) = self
            .control_group
            .as_deref()
            .and_then(|name| Group::from_name(name).ok().flatten())
        else {
            return false;
        };
        if group.gid == Gid::from_raw(who.gid) {
            return true;
        }
        let user = User::from_uid(Uid::from_raw(who.uid)).ok().flatten();
        user.is_some_and(|u| u.gid == group.gid || group.mem.contains(&u.name))
    }

    fn is_run_user(&self, uid: u32) -> bool {
        let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
        user.is_some_and(|u| self.run_users.contains(&u.name))
    }
}
