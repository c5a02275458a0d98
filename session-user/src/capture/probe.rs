//! What this kernel and these privileges allow, in words.

use std::path::Path;

use aya::util::KernelVersion;

use super::{bypass, cgroup, injector::Injector, kernel, privileges};

/// One thing that capture needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// Whether capture can do with what was found.
    pub ok: bool,
    /// What was found.
    pub detail: String,
    /// What to do about it, or could be done; empty if nothing needs doing.
    pub advice: String,
}

impl Check {
    fn new(name: &'static str, found: Result<String, String>, advice: &str) -> Self {
        match found {
            Ok(detail) => Self {
                name,
                ok: true,
                detail,
                advice: String::new(),
            },
            Err(detail) => Self {
                name,
                ok: false,
                detail,
                advice: advice.to_owned(),
            },
        }
    }
}

/// Looks at everything that capture needs. Changes nothing: the programs are loaded and let go.
pub fn probe() -> Vec<Check> {
    vec![
        kernel_version(),
        cgroup2(),
        capabilities(),
        btf(),
        programs(),
        set_retval(),
        raw_packets(),
        namespaces(),
        local_bypass(),
    ]
}

fn kernel_version() -> Check {
    let found = match KernelVersion::current() {
        Ok(version) if version >= KernelVersion::new(5, 15, 0) => Ok(release()),
        Ok(_) => Err(format!("{}, older than 5.15", release())),
        Err(error) => Err(error.to_string()),
    };
    Check::new(
        "kernel",
        found,
        "use Linux 5.15 or later (5.18 for exact refusals)",
    )
}

fn release() -> String {
    cgroup::read("/proc/sys/kernel/osrelease").map_or_else(
        |error| error.to_string(),
        |text| format!("Linux {}", text.trim()),
    )
}

fn cgroup2() -> Check {
    let found = cgroup::cgroup2_root().map(|root| format!("mounted at {}", root.display()));
    Check::new(
        "cgroup v2",
        found.map_err(|error| error.to_string()),
        "mount it: mount -t cgroup2 none /sys/fs/cgroup",
    )
}

fn capabilities() -> Check {
    let missing = privileges::missing();
    let found = if missing.is_empty() {
        Ok("CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON are held".to_owned())
    } else {
        Err(format!("{} missing", missing.join(", ")))
    };
    Check::new(
        "privileges",
        found,
        "run as root, or grant these capabilities (with systemd: AmbientCapabilities=)",
    )
}

fn btf() -> Check {
    let path = "/sys/kernel/btf/vmlinux";
    let found = if Path::new(path).exists() {
        Ok(path.to_owned())
    } else {
        Err(format!("{path} does not exist"))
    };
    Check::new(
        "BTF",
        found,
        "use a kernel built with CONFIG_DEBUG_INFO_BTF=y",
    )
}

fn programs() -> Check {
    let found = kernel::try_load()
        .map(|()| "all programs load".to_owned())
        .map_err(|error| error.to_string());
    Check::new(
        "eBPF programs",
        found,
        "see the reason given; without eBPF no application can be captured here",
    )
}

fn set_retval() -> Check {
    let found = if kernel::has_set_retval() {
        Ok("fail-closed rules refuse with ECONNREFUSED".to_owned())
    } else {
        Err("fail-closed rules refuse with EPERM (bpf_set_retval came with 5.18)".to_owned())
    };
    Check::new(
        "exact refusal",
        found,
        "use Linux 5.18 or later if applications must see ECONNREFUSED",
    )
}

fn raw_packets() -> Check {
    let found = match Injector::open() {
        Ok(_) => Ok("an application's connect() says what its target said".to_owned()),
        Err(error) => Err(format!(
            "connect() succeeds before the target has answered: {error}"
        )),
    };
    Check::new("connect answers", found, "grant CAP_NET_RAW")
}

/// Without these privileges capture works, except in containers: advice, and no failure.
fn namespaces() -> Check {
    let name = "network namespaces";
    let missing = privileges::missing_for_namespaces();
    if missing.is_empty() {
        let reached = "captured processes in other network namespaces are reached";
        return Check::new(name, Ok(reached.to_owned()), "");
    }
    let detail = format!(
        "captured processes in other ones, as in containers, are not reached: {} missing",
        missing.join(", ")
    );
    Check {
        advice: "grant these capabilities if you capture containers".to_owned(),
        ..Check::new(name, Ok(detail), "")
    }
}

/// It is off unless it is asked for, so what keeps it off is no failure.
fn local_bypass() -> Check {
    let name = "local bypass";
    let detail = match bypass::faults() {
        Ok(faults) if faults.is_empty() => {
            "this kernel shows none of its faults: `auto` turns it on".to_owned()
        }
        Ok(faults) => {
            let faults: Vec<String> = faults
                .iter()
                .map(|fault| format!("not so: {} ({})", fault.what, fault.seen))
                .collect();
            format!("`auto` keeps it off; {}", faults.join("; "))
        }
        Err(error) => format!("`auto` keeps it off: {error}"),
    };
    Check::new(name, Ok(detail), "")
}
