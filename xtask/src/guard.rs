//! `bench guard`: how many instructions the core takes for what it does most, next to what it took when the figures in
//! the repository were written. Unlike a time, a count hardly depends on what else the machine does.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use crate::sh;

/// The figures, in the repository.
const KEPT: &str = "benches/guard.toml";
const HEAD: &str = "\
# Instructions of the core for one record, question, piece or frame, as `cargo xtask bench guard` counts them.
# `cargo xtask bench guard --update` writes this file anew: where a change is meant, or for another compiler.
";
/// A count above what is kept by more than this part fails. Runs of one program, whatever their environment, differ by
/// less than a ten-thousandth; the rest is for what a change elsewhere does to what the compiler inlines. (The crates that
/// are counted are compiled in one unit each, for the same reason.)
const RISE_MAX: f64 = 0.03;
/// The function whose inside counts. With crate and hash around it, in whatever way the symbol is written.
const COUNTED: &str = "*guard*counted*";

/// Figures, and what they hold for.
#[derive(Debug, Serialize, Deserialize)]
struct Figures {
    /// As it calls itself.
    compiler: String,
    valgrind: String,
    /// What valgrind shows of it.
    processor: String,
    /// By work.
    instructions: BTreeMap<String, f64>,
}

impl Figures {
    /// In what `kept` is not comparable with these.
    fn differs(&self, kept: &Self) -> Option<String> {
        let pairs = [
            (&self.compiler, &kept.compiler),
            (&self.valgrind, &kept.valgrind),
            (&self.processor, &kept.processor),
        ];
        let others = pairs.into_iter().filter(|(mine, theirs)| mine != theirs);
        let said = |(mine, theirs)| format!("`{mine}` here, `{theirs}` in {KEPT}");
        let said: Vec<String> = others.map(said).collect();
        (!said.is_empty()).then(|| said.join("; "))
    }
}

/// One line of the report.
#[derive(Debug, Serialize)]
struct Line<'a> {
    work: &'a str,
    /// For one time.
    instructions: f64,
    /// The same in the repository, where it is comparable.
    kept: Option<f64>,
    ratio: Option<f64>,
    /// None where there is nothing to compare with.
    risen: Option<bool>,
}

impl Line<'_> {
    /// For people.
    fn text(&self) -> String {
        let compared = match (self.ratio, self.risen) {
            (Some(ratio), Some(true)) => format!("{ratio:.4} x, RISEN"),
            (Some(ratio), _) => format!("{ratio:.4} x"),
            _ => String::from("NOT COMPARED"),
        };
        format!("{:<22} {:>12.1}  {compared}", self.work, self.instructions)
    }
}

/// Counts, compares and prints; fails if a count has risen. `update` writes the figures instead. Returns why nothing was
/// compared, where that is so.
pub fn run(root: &Path, update: bool, json: bool) -> anyhow::Result<Option<String>> {
    let counted = count(root)?;
    let path = root.join(KEPT);
    if update {
        fs::write(&path, format!("{HEAD}{}", toml::to_string(&counted)?))?;
    }
    let text = fs::read_to_string(&path).with_context(|| format!("{KEPT} cannot be read"))?;
    let kept: Figures = toml::from_str(&text).with_context(|| format!("{KEPT} is not right"))?;
    let differs = counted.differs(&kept);
    let lines = lines(&counted, &kept, differs.is_none());
    print(&lines, json)?;
    if let Some(differs) = &differs {
        eprintln!("guard: NOT COMPARED: {differs}");
    }
    let risen = lines.iter().filter(|l| l.risen == Some(true));
    let risen: Vec<&str> = risen.map(|l| l.work).collect();
    if !risen.is_empty() {
        bail!(
            "more than {:.0} % above {KEPT}: {}",
            RISE_MAX * 100.0,
            risen.join(", ")
        );
    }
    Ok(differs)
}

fn lines<'a>(counted: &'a Figures, kept: &Figures, comparable: bool) -> Vec<Line<'a>> {
    let line = |(work, &instructions): (&'a String, &f64)| {
        let kept = kept.instructions.get(work).copied();
        let kept = kept.filter(|_| comparable);
        let ratio = kept.map(|kept| instructions / kept);
        Line {
            work,
            instructions,
            kept,
            ratio,
            risen: ratio.map(|ratio| ratio > 1.0 + RISE_MAX),
        }
    };
    counted.instructions.iter().map(line).collect()
}

fn print(lines: &[Line<'_>], json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(lines)?);
        return Ok(());
    }
    for line in lines {
        println!("{}", line.text());
    }
    Ok(())
}

/// Builds the program and counts each of its works.
fn count(root: &Path) -> anyhow::Result<Figures> {
    let program = build(root)?;
    let program = program.display().to_string();
    let compiler = first_line(root, "rustc", &["--version"])?;
    let valgrind = first_line(root, "valgrind", &["--version"])?;
    let list = output(root, "valgrind", &["--tool=none", "--quiet", &program])?;
    let mut list = list.lines();
    let processor = list.next().context("the program names no processor")?;
    let mut instructions = BTreeMap::new();
    for work in list {
        let (name, times) = work.split_once(' ').context("a work without times")?;
        let all = instructions_of(root, &program, name)?;
        let one = all as f64 / times.parse::<f64>()?;
        instructions.insert(name.to_owned(), (one * 10.0).round() / 10.0);
    }
    Ok(Figures {
        compiler,
        valgrind,
        processor: processor.trim().to_owned(),
        instructions,
    })
}

fn build(root: &Path) -> anyhow::Result<PathBuf> {
    let words = [
        "build",
        "--release",
        "--locked",
        "--package",
        "session-benches",
        "--example",
        "guard",
    ];
    sh::run(&mut sh::command(root, "cargo", &words))?;
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    Ok(target.join("release/examples/guard"))
}

/// What callgrind counts of one work.
fn instructions_of(root: &Path, program: &str, work: &str) -> anyhow::Result<u64> {
    let out = tempfile::NamedTempFile::new()?;
    let words = [
        "--tool=callgrind",
        "--quiet",
        &format!("--toggle-collect={COUNTED}"),
        &format!("--callgrind-out-file={}", out.path().display()),
        program,
        work,
    ];
    output(root, "valgrind", &words)?;
    let text = fs::read_to_string(out.path())?;
    let totals = text.lines().find_map(|l| l.strip_prefix("totals:"));
    let totals = totals.and_then(|t| t.trim().parse().ok());
    totals
        .filter(|&t| t > 0)
        .with_context(|| format!("callgrind counted nothing of {work}"))
}

fn first_line(root: &Path, program: &str, words: &[&str]) -> anyhow::Result<String> {
    let text = output(root, program, words)?;
    let line = text.lines().next();
    line.map(str::to_owned)
        .with_context(|| format!("{program} says nothing"))
}

fn output(root: &Path, program: &str, words: &[&str]) -> anyhow::Result<String> {
    let (done, text) = sh::output(&mut sh::command(root, program, words))?;
    if !done {
        bail!("{program} failed");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(compiler: &str, bulk: f64) -> Figures {
        Figures {
            compiler: compiler.to_owned(),
            valgrind: "valgrind-3".to_owned(),
            processor: "x86_64 aes".to_owned(),
            instructions: BTreeMap::from([("bulk".to_owned(), bulk)]),
        }
    }

    #[test]
    fn a_rise_is_told_and_a_fall_is_not() {
        let kept = figures("rustc 1", 100.0);
        for (bulk, risen) in [(103.5, true), (102.5, false), (50.0, false)] {
            let counted = figures("rustc 1", bulk);
            assert_eq!(lines(&counted, &kept, true)[0].risen, Some(risen), "{bulk}");
        }
    }

    #[test]
    fn another_compiler_is_not_compared_with() {
        let (counted, kept) = (figures("rustc 2", 200.0), figures("rustc 1", 100.0));
        let differs = counted.differs(&kept).unwrap_or_default();
        assert!(differs.contains("rustc 2") && differs.contains("rustc 1"));
        assert!(!differs.contains("valgrind-3"));
        let older = Figures {
            valgrind: "valgrind-2".to_owned(),
            ..figures("rustc 1", 100.0)
        };
        let both = counted.differs(&older).unwrap_or_default();
        assert!(both.contains("rustc 2") && both.contains("valgrind-2"));
        let line = &lines(&counted, &kept, false)[0];
        assert_eq!((line.kept, line.risen), (None, None));
        assert!(line.text().ends_with("NOT COMPARED"));
        assert!(kept.differs(&kept).is_none());
        let text = lines(&kept, &kept, true)[0].text();
        assert!(text.ends_with("1.0000 x"), "{text}");
    }

    #[test]
    fn the_figures_of_the_repository_can_be_read() -> anyhow::Result<()> {
        let text = fs::read_to_string(crate::root().join(KEPT))?;
        let kept: Figures = toml::from_str(&text)?;
        assert!(kept.instructions.values().all(|n| *n > 0.0));
        Ok(())
    }
}
