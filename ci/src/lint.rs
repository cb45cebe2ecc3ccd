//! `cargo xtask lint`: formatting, clippy with warnings denied, and the rules of the house that neither of them knows.
//!
//! | module | what it looks at |
//! |---|---|
//! | [`text`] | one file: length, header, left-overs, names of tests, `unsafe` without a reason, shared locks |
//! | [`devices`] | words: who names a device |
//! | [`crates`] | the workspace: which crate uses which, versions that stand once |
//! | [`figures`] | README's figures, which are those on record |
//! | [`links`] | Markdown links that lead nowhere |
//!
//! Each violation is one line, `file:line: what — cure`. Left out on purpose: what clippy checks already (length of
//! functions, number of arguments, SAFETY comments, truncating casts).

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};

use crate::build;

mod crates;
mod devices;
mod figures;
mod links;
mod source;
mod text;

use source::Source;

/// What `cargo xtask lint` takes.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Have clippy see the packages, too, that only `cargo xtask test --all` builds.
    #[arg(long)]
    all: bool,
}

/// Checks everything, and fails after the last check if one of them found something.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let root = root()?;
    let findings = rules(&root)?;
    for finding in &findings {
        println!("{finding}");
    }
    let mut failed = Vec::new();
    if !findings.is_empty() {
        failed.push(format!("{} violation(s) of the house rules", findings.len()));
    }
    let left_out: &[&str] = if args.all { &[] } else { &["--exclude", build::HEAVY] };
    if !args.all {
        println!("not seen by clippy (--all has it): {}", build::HEAVY);
    }
    // Those tests with `test = false` are not among all targets.
    for (name, arguments, clippy) in [
        ("formatting (cure: cargo fmt --all)", &["fmt", "--all", "--check"][..], false),
        ("clippy", &["clippy", "--workspace", "--all-targets"][..], true),
        ("clippy of the integration tests", &["clippy", "--workspace", "--test", "*"][..], true),
    ] {
        let mut command = Command::new(cargo());
        command.args(arguments).current_dir(&root);
        if clippy {
            command.args(left_out).args(["--", "-D", "warnings"]);
        }
        if !command.status().with_context(|| format!("Cannot run cargo {}", arguments[0]))?.success() {
            failed.push(name.to_owned());
        }
    }
    ensure!(failed.is_empty(), "The lint found trouble: {}.", failed.join(", "));
    Ok(())
}

/// One violation. It is printed as `file:line: what — cure`.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    file: String,
    line: usize,
    what: String,
    cure: &'static str,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {} — {}", self.file, self.line, self.what, self.cure)
    }
}

/// Runs the rules that need no compiler.
fn rules(root: &Path) -> anyhow::Result<Vec<Finding>> {
    let sources = sources(root)?;
    let mut findings = Vec::new();
    for source in &sources {
        findings.extend(text::check(source));
        findings.extend(devices::check(source));
        findings.extend(figures::check(source));
        findings.extend(links::check(source, root));
    }
    findings.extend(crates::check(root, &sources)?);
    findings.sort_by(|a, b| (&a.file, a.line).cmp(&(&b.file, b.line)));
    Ok(findings)
}

/// Every text file that git knows or would add: what is ignored is not ours.
fn sources(root: &Path) -> anyhow::Result<Vec<Source>> {
    let output = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .context("Cannot run git, which lists the files to check; install it")?;
    if !output.status.success() {
        bail!("git ls-files failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let names = String::from_utf8(output.stdout).context("A file's name is not UTF-8")?;
    let mut sources = Vec::new();
    for name in names.split('\0').filter(|name| !name.is_empty()) {
        let path = root.join(name);
        // Deleted but still in the index, or a link: nothing to read.
        if !path.symlink_metadata().is_ok_and(|metadata| metadata.is_file()) {
            continue;
        }
        let bytes = std::fs::read(&path).with_context(|| format!("Cannot read {name}"))?;
        if let Ok(text) = String::from_utf8(bytes) {
            sources.push(Source::new(name, text));
        }
    }
    Ok(sources)
}

/// The workspace's folder.
fn root() -> anyhow::Result<PathBuf> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = manifest.parent().context("The xtask crate has no folder above it")?;
    Ok(root.to_owned())
}

/// The cargo that runs us, so that the toolchain is the same.
fn cargo() -> std::ffi::OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}
