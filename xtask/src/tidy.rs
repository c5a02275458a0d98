//! The repository's own rules, as checks.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::bail;

/// Longer files are usually two ideas. Tests at the end of a file do not count.
const LINES_MAX: usize = 600;

/// Modules of session-user in the order in which they may be imported: each may import only what
/// stands in an earlier group (or, within the last ones, what is below it).
const ADAPTERS: [&str; 6] = ["capture", "transport", "link", "dial", "handshake", "pki"];
/// What an adapter may import beside itself.
const BELOW_ADAPTERS: [&str; 3] = ["glob", "remembered", "requests"];
/// `pki` writes what `handshake` reads: names have one form.
const ALLOWED: [(&str, &str); 1] = [("pki", "handshake")];
/// What `config` checks by those who use it.
const BELOW_CONFIG: [&str; 3] = ["door", "dial", "capture"];
const ABOVE_DRIVER: [&str; 4] = ["agent", "cli", "bench", "control"];

/// Checks every rule and names every break.
pub fn run(root: &Path) -> anyhow::Result<()> {
    let mut breaks = Vec::new();
    for path in sources(root) {
        let text = fs::read_to_string(&path)?;
        let shown = path
            .strip_prefix(root)
            .unwrap_or(&path)
            .display()
            .to_string();
        let mut wrong = |line: usize, what: &str| breaks.push(format!("{shown}:{line}: {what}"));
        check_length(&text, &mut wrong);
        check_words(&shown, &text, &mut wrong);
        if !shown.ends_with("xtask/src/tidy.rs") {
            check_unsafe(&text, &mut wrong);
        }
        check_layers(&shown, &text, &mut wrong);
        check_core(&shown, &text, &mut wrong);
    }
    check_documents(root, &mut breaks)?;
    if breaks.is_empty() {
        eprintln!("tidy: every rule is kept");
        return Ok(());
    }
    bail!("{} rules are broken:\n{}", breaks.len(), breaks.join("\n"))
}

fn sources(root: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for folder in [
        "session-ebpf",
        "session-user",
        "xtask",
        "tests",
        "benches",
        "fuzz",
    ] {
        walk(&root.join(folder), &mut out);
    }
    out.sort();
    out
}

fn walk(folder: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            if path
                .file_name()
                .is_none_or(|n| n != "target" && n != "corpus")
            {
                walk(&path, out);
            }
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

type Wrong<'a> = dyn FnMut(usize, &str) + 'a;

fn check_length(text: &str, wrong: &mut Wrong<'_>) {
    let code = text
        .split("#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or(text);
    let lines = code.lines().count();
    if lines > LINES_MAX {
        wrong(
            lines,
            &format!("{lines} lines: split it (at most {LINES_MAX})"),
        );
    }
}

/// The words are put together here so that this file does not break its own rule.
fn check_words(file: &str, text: &str, wrong: &mut Wrong<'_>) {
    let banned = [
        (["to", "do!("].concat(), "unfinished code"),
        (["#[ig", "nore"].concat(), "a test that does not run"),
        (["/ro", "ot/"].concat(), "a path of somebody's machine"),
        (["/ho", "me/"].concat(), "a path of somebody's machine"),
    ];
    if file.starts_with("xtask/src/tidy.rs") {
        return;
    }
    for (number, line) in text.lines().enumerate() {
        for (word, what) in &banned {
            if line.contains(word.as_str()) {
                wrong(number + 1, what);
            }
        }
    }
}

/// clippy checks blocks; this checks that the reason is there for every kind of `unsafe`.
fn check_unsafe(text: &str, wrong: &mut Wrong<'_>) {
    let lines: Vec<&str> = text.lines().collect();
    for (number, line) in lines.iter().enumerate() {
        let code = line.split("//").next().unwrap_or("");
        let opens = code.contains("unsafe {") || code.contains("unsafe impl");
        if !opens {
            continue;
        }
        let near = lines[number.saturating_sub(8)..=number]
            .iter()
            .any(|l| l.contains("SAFETY"));
        if !near {
            wrong(number + 1, "`unsafe` without a SAFETY line");
        }
    }
}

fn check_layers(file: &str, text: &str, wrong: &mut Wrong<'_>) {
    let Some(inside) = file.strip_prefix("session-user/src/") else {
        return;
    };
    // Tests stand outside of the layers: they build whole worlds.
    if inside.contains("tests") {
        return;
    }
    let module = inside.split(['/', '.']).next().unwrap_or("");
    let code = text
        .split("#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or(text);
    for (number, line) in code.lines().enumerate() {
        for used in imports(line) {
            if used == module {
                continue;
            }
            let adapter_to_adapter = ADAPTERS.contains(&module)
                && !BELOW_ADAPTERS.contains(&used.as_str())
                && !ALLOWED.contains(&(module, used.as_str()));
            let upward = module == "driver" && ABOVE_DRIVER.contains(&used.as_str());
            let config_up = module == "config" && !BELOW_CONFIG.contains(&used.as_str());
            if adapter_to_adapter || upward || config_up {
                wrong(number + 1, &format!("`{module}` may not import `{used}`"));
            }
        }
    }
}

/// The modules named as `crate::NAME` in a line of code.
fn imports(line: &str) -> Vec<String> {
    let code = line.split("//").next().unwrap_or("");
    let mut out = Vec::new();
    for part in code.split("crate::").skip(1) {
        let name: String = part
            .chars()
            .take_while(|c| c.is_ascii_lowercase() || *c == '_' || c.is_ascii_digit())
            .collect();
        if !name.is_empty() {
            out.push(name);
        }
    }
    out
}

/// The core knows no clock, no socket, no file. clippy's `disallowed_*` says the same for calls.
fn check_core(file: &str, text: &str, wrong: &mut Wrong<'_>) {
    if !file.starts_with("session-user/proto/src/") {
        return;
    }
    for (number, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or("");
        for banned in [
            "std::time::Instant",
            "SystemTime",
            "std::fs",
            "std::net::Tcp",
            "std::net::Udp",
            "tokio",
            "std::thread",
            "std::env",
        ] {
            if code.contains(banned) {
                wrong(number + 1, &format!("the core may not use {banned}"));
            }
        }
    }
}

/// Links between documents lead somewhere.
fn check_documents(root: &Path, breaks: &mut Vec<String>) -> anyhow::Result<()> {
    let mut documents: Vec<PathBuf> = [
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    ]
    .iter()
    .map(|d| root.join(d))
    .collect();
    for entry in fs::read_dir(root.join("docs"))?.flatten() {
        documents.push(entry.path());
    }
    for path in documents
        .iter()
        .filter(|p| p.extension().is_some_and(|e| e == "md"))
    {
        let text = fs::read_to_string(path)?;
        let folder = path.parent().unwrap_or(root);
        for target in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            let file = target.split('#').next().unwrap_or("");
            if file.is_empty() || target.contains("://") || folder.join(file).exists() {
                continue;
            }
            let shown = path.strip_prefix(root).unwrap_or(path).display();
            breaks.push(format!("{shown}: the link to {target} leads nowhere"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(file: &str, text: &str) -> Vec<String> {
        let mut out = Vec::new();
        let mut wrong = |line: usize, what: &str| out.push(format!("{line}: {what}"));
        check_layers(file, text, &mut wrong);
        check_unsafe(text, &mut wrong);
        check_core(file, text, &mut wrong);
        out
    }

    #[test]
    fn layers_are_told_apart() {
        assert_eq!(
            told("session-user/src/link/mod.rs", "use crate::policy::Path;\n").len(),
            1
        );
        assert_eq!(
            told(
                "session-user/src/capture/mod.rs",
                "use crate::capture::x;\nuse crate::glob;\n"
            )
            .len(),
            0
        );
        assert_eq!(
            told(
                "session-user/src/driver/mod.rs",
                "use crate::agent::Agent;\n"
            )
            .len(),
            1
        );
        assert_eq!(
            told(
                "session-user/src/agent/mod.rs",
                "use crate::driver::Driver;\n"
            )
            .len(),
            0
        );
    }

    #[test]
    fn unsafe_and_clocks_are_found() {
        assert_eq!(told("a.rs", "fn f() { unsafe { g() } }\n").len(), 1);
        assert_eq!(
            told("a.rs", "// SAFETY: g is sound.\nunsafe { g() }\n").len(),
            0
        );
        assert_eq!(
            told(
                "session-user/proto/src/x.rs",
                "let t = std::time::Instant::now();\n"
            )
            .len(),
            1
        );
    }
}
