//! What Cargo builds for the other verbs, and where it puts it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// An executable that holds tests.
#[derive(Debug)]
pub(crate) struct Executable {
    /// The crate or the file in `tests/` that it was built from.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    /// The package's directory, in which its tests run.
    pub(crate) directory: PathBuf,
}

/// The release build of the `vmm` command.
pub(crate) fn vmm() -> Result<PathBuf> {
    let artifacts = build(&["build", "--release", "--package", "vmm", "--bin", "vmm"])?;
    let executable = artifacts.into_iter().find_map(|artifact| artifact.executable);
    executable.context("Cargo built no vmm")
}

/// The executables that `vmm` starts for some of its verbs, with their packages.
const COMPANIONS: [(&str, &str); 5] = [
    ("api", "vmm-ctl"),
    ("bench", "vmm-bench"),
    ("fleet", "vmm-fleet"),
    ("oci", "vmm-oci"),
    ("session", "vmm-session"),
];

/// A `vmm` with its companions beside it. Those are of the build for tests: they run no guests, and are many times quicker
/// to build.
pub(crate) fn together(vmm: &Path, all_of_them: bool) -> Result<PathBuf> {
    let target = vmm.parent().and_then(Path::parent).context("Cargo's target folder has no name")?;
    let folder = target.join("together");
    fs::create_dir_all(&folder).with_context(|| format!("Cannot make {}", folder.display()))?;
    let mut all = vec![(vmm.to_owned(), "vmm")];
    for (package, name) in COMPANIONS.into_iter().filter(|(package, _)| all_of_them || *package != HEAVY) {
        let built = build(&["build", "--package", package, "--bin", name])?;
        let executable = built.into_iter().find_map(|artifact| artifact.executable);
        all.push((executable.with_context(|| format!("Cargo built no {name}"))?, name));
    }
    for (executable, name) in all {
        // One that runs is not to be written to: it gets a file of its own.
        let new = folder.join(format!("{name}.{}", std::process::id()));
        fs::copy(&executable, &new).with_context(|| format!("Cannot copy {}", executable.display()))?;
        fs::rename(&new, folder.join(name))?;
    }
    Ok(folder.join("vmm"))
}

/// The guest's agent, as the release build of `vmm` holds it.
pub(crate) fn agent() -> Result<PathBuf> {
    // `build.rs` builds the same in a place of its own.
    let artifacts = build(&["build", "--profile", "agent", "--package", "guest", "--bin", "vmm-agent"])?;
    let executable = artifacts.into_iter().find_map(|artifact| artifact.executable);
    executable.context("Cargo built no agent")
}

/// A package whose libraries, which speak to registries, take minutes to build. Only `cargo xtask test --all` tests it.
pub(crate) const HEAVY: &str = "oci";

/// The workspace's unit tests, and the integration tests that a plain `cargo test` runs.
pub(crate) fn tests(all: bool) -> Result<Vec<Executable>> {
    let selection = ["--workspace", "--exclude", HEAVY];
    test_executables(if all { &selection[..1] } else { &selection })
}

/// The integration tests of a package that a plain `cargo test` leaves alone.
pub(crate) fn integration_tests(package: &str) -> Result<Vec<Executable>> {
    let output = cargo(&["metadata", "--no-deps", "--format-version", "1"])?;
    let metadata: Metadata = serde_json::from_str(&output).context("Cargo's metadata is not understood")?;
    let mut arguments = vec!["--package", package];
    for target in metadata.packages.iter().filter(|found| found.name == package).flat_map(|found| &found.targets) {
        if !target.test && target.kind.iter().any(|kind| kind == "test") {
            arguments.extend(["--test", &target.name]);
        }
    }
    if arguments.len() == 2 { Ok(Vec::new()) } else { test_executables(&arguments) }
}

fn test_executables(selection: &[&str]) -> Result<Vec<Executable>> {
    let artifacts = build(&[&["test", "--no-run"], selection].concat())?;
    let tests = artifacts.into_iter().filter(|artifact| artifact.profile.test);
    Ok(tests
        .filter_map(|artifact| {
            let directory = artifact.manifest_path.parent().map(Path::to_owned)?;
            Some(Executable { name: artifact.target.name, path: artifact.executable?, directory })
        })
        .collect())
}

fn build(arguments: &[&str]) -> Result<Vec<Artifact>> {
    let output = cargo(&[arguments, &["--quiet", "--message-format", "json-render-diagnostics"]].concat())?;
    let messages = output.lines().filter(|line| line.contains(r#""reason":"compiler-artifact""#));
    messages.map(|line| serde_json::from_str(line).context("Cargo's message is not understood")).collect()
}

/// Runs Cargo, whose warnings and errors are for the reader. Returns what it printed.
fn cargo(arguments: &[&str]) -> Result<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("Cannot run cargo")?;
    ensure!(output.status.success(), "cargo {} failed", arguments.join(" "));
    Ok(String::from_utf8(output.stdout)?)
}

#[derive(Deserialize)]
struct Artifact {
    executable: Option<PathBuf>,
    manifest_path: PathBuf,
    profile: Profile,
    target: Target,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
    test: bool,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    targets: Vec<Target>,
}
