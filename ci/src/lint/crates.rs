//! Rules on the workspace: crates use each other one way only, each version stands once, nothing is listed unused.

use std::path::Path;

use anyhow::Context;
use toml::{Table, Value};

use super::Finding;
use super::source::{Source, identifiers};

/// The crates from the bottom to the top: each may use those of the rows before its own.
const ORDER: [&[&str]; 8] = [
    &["kv", "guest"],
    &["memory", "oci", "session"],
    &["kvm", "boot", "bus"],
    &["virtio"],
    &["devices"],
    &["machine"],
    &["api", "bench", "fleet", "sandbox"],
    &["vmm", "xtask"],
];

/// Dependencies that one crate keeps to itself, so that it is the only place to look for what they do.
const OWNED: [(&str, &str); 2] = [("kvm-ioctls", "kvm"), ("kvm-bindings", "kvm")];

/// What a crate must do without although it stands to its left.
const WITHOUT: [(&str, &str); 3] = [("virtio", "kvm"), ("devices", "kvm"), ("machine", "libc")];

/// Crates of which two versions would not understand each other's types.
const SINGLE: [&str; 4] = ["kvm-bindings", "virtio-queue", "vm-memory", "vmm-sys-util"];

pub(super) fn check(root: &Path, sources: &[Source]) -> anyhow::Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let mut used = Vec::new();
    for source in sources.iter().filter(|source| is_member(&source.name)) {
        let manifest = Manifest::read(source)?;
        findings.extend(manifest.check());
        findings.extend(manifest.unused(sources));
        used.extend(manifest.dependencies.into_iter().map(|(name, _)| name));
    }
    let workspace = sources.iter().find(|source| source.name == "Cargo.toml");
    findings.extend(unlisted(workspace.context("The workspace has no Cargo.toml")?, &used)?);
    let lock = std::fs::read_to_string(root.join("Cargo.lock")).context("Cannot read Cargo.lock")?;
    findings.extend(single(&Source::new("Cargo.lock", lock)));
    Ok(findings)
}

/// Whether the file is the manifest of a crate of this workspace; the fuzz targets are a workspace of their own.
fn is_member(name: &str) -> bool {
    match name.split('/').collect::<Vec<_>>()[..] {
        ["Cargo.toml"] | ["ci", "Cargo.toml"] => true,
        [folder, _, file] => folder == "crates" && file == "Cargo.toml",
        _ => false,
    }
}

/// A crate's Cargo.toml.
struct Manifest<'a> {
    source: &'a Source,
    table: Table,
    name: String,
    /// Normal, development, build and platform dependencies.
    dependencies: Vec<(String, Value)>,
}

impl<'a> Manifest<'a> {
    fn read(source: &'a Source) -> anyhow::Result<Self> {
        let table: Table = source.text.parse().with_context(|| format!("{} is not TOML", source.name))?;
        let name = table.get("package").and_then(|package| package.get("name")).and_then(Value::as_str);
        let name = name.with_context(|| format!("{} names no package", source.name))?.to_owned();
        let mut dependencies = Vec::new();
        collect_dependencies(&table, &mut dependencies);
        Ok(Self { source, table, name, dependencies })
    }

    fn check(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        for (dependency, value) in &self.dependencies {
            let entry = value.as_table();
            let inherited = entry.is_some_and(|entry| entry.get("workspace").and_then(Value::as_bool) == Some(true));
            if !inherited {
                let cure = "write the version in the workspace's Cargo.toml and `workspace = true` here";
                findings.push(self.finding(dependency, format!("{dependency} has a version of its own"), cure));
            }
            findings.extend(self.direction(dependency));
        }
        let lints = self.table.get("lints").and_then(|lints| lints.get("workspace")).and_then(Value::as_bool);
        if lints != Some(true) {
            let cure = "add `[lints]` with `workspace = true`";
            findings.push(self.source.finding(1, "the workspace's lints do not hold here", cure));
        }
        if self.table.contains_key("features") {
            let cure = "build everything always; choose at run time";
            findings.push(self.finding("[features]", "a crate with feature flags".to_owned(), cure));
        }
        if rank(&self.name).is_none() {
            let cure = "give it a row in ORDER, ci/src/lint/crates.rs";
            findings.push(self.source.finding(1, format!("the crate {} has no place", self.name), cure));
        }
        findings
    }

    /// A dependency that the crate must not have.
    fn direction(&self, dependency: &str) -> Option<Finding> {
        let backwards = match (rank(&self.name), rank(dependency)) {
            (Some(own), Some(other)) => other >= own,
            _ => false,
        };
        let owner = OWNED.iter().find(|(owned, owner)| *owned == dependency && *owner != self.name);
        let (what, cure) = if backwards {
            ("against the order of the crates", "move what is needed to a crate on the left of both")
        } else if WITHOUT.contains(&(&self.name, dependency)) {
            ("which it must do without", "let its caller hand over what it needs")
        } else if owner.is_some() {
            ("which another crate keeps to itself", "ask that crate (kvm) for a function that says what is wanted")
        } else {
            return None;
        };
        Some(self.finding(dependency, format!("{} uses {dependency}, {what}", self.name), cure))
    }

    /// Dependencies that no file of the crate mentions.
    fn unused(&self, sources: &[Source]) -> Vec<Finding> {
        let folder = self.source.name.trim_end_matches("Cargo.toml");
        let ours = |name: &str| match folder {
            "" => ["src/", "tests/", "benches/", "build.rs"].iter().any(|start| name.starts_with(start)),
            _ => name.starts_with(folder),
        };
        let mentions = |dependency: &str| {
            let word = dependency.replace('-', "_");
            sources.iter().any(|source| ours(&source.name) && identifiers(&source.code).any(|other| other == word))
        };
        let unused = self.dependencies.iter().filter(|(name, _)| !mentions(name));
        unused.map(|(name, _)| self.finding(name, format!("{name} is listed and not used"), "remove it")).collect()
    }

    fn finding(&self, key: &str, what: String, cure: &'static str) -> Finding {
        self.source.finding(line_of(self.source, key), what, cure)
    }
}

/// The row of a crate in `ORDER`.
fn rank(name: &str) -> Option<usize> {
    ORDER.iter().position(|row| row.contains(&name))
}

/// Finds the tables of dependencies of a manifest, those under `[target]` too.
fn collect_dependencies(table: &Table, found: &mut Vec<(String, Value)>) {
    for key in ["dependencies", "dev-dependencies", "build-dependencies"] {
        let entries = table.get(key).and_then(Value::as_table).into_iter().flatten();
        found.extend(entries.map(|(name, value)| (name.clone(), value.clone())));
    }
    for target in table.get("target").and_then(Value::as_table).into_iter().flat_map(Table::values) {
        if let Value::Table(target) = target {
            collect_dependencies(target, found);
        }
    }
}

/// What the workspace lists and no crate uses.
fn unlisted(workspace: &Source, used: &[String]) -> anyhow::Result<Vec<Finding>> {
    let table: Table = workspace.text.parse().context("The workspace's Cargo.toml is not TOML")?;
    let listed = table.get("workspace").and_then(|workspace| workspace.get("dependencies"));
    let listed = listed.and_then(Value::as_table).into_iter().flat_map(Table::keys);
    Ok(listed
        .filter(|name| !used.contains(name))
        .map(|name| workspace.finding(line_of(workspace, name), format!("no crate uses {name}"), "remove it"))
        .collect())
}

/// Crates that the lock file holds in more than one version.
fn single(lock: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for name in SINGLE {
        let line = format!("name = \"{name}\"");
        for (number, _) in (1..).zip(lock.text.lines()).filter(|(_, other)| *other == line).skip(1) {
            let cure = "move all crates that use it to the same version";
            findings.push(lock.finding(number, format!("a second version of {name}"), cure));
        }
    }
    findings
}

/// The line that begins with `key`.
fn line_of(source: &Source, key: &str) -> usize {
    let begins =
        |line: &str| line.strip_prefix(key).is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '.', '=']));
    source.text.lines().position(begins).map_or(1, |at| at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(name: &str, rest: &str) -> Source {
        let text = format!("[package]\nname = \"{name}\"\n[lints]\nworkspace = true\n{rest}");
        Source::new(&format!("crates/{name}/Cargo.toml"), text)
    }

    fn found(name: &str, rest: &str) -> Vec<String> {
        let source = manifest(name, rest);
        Manifest::read(&source).unwrap().check().iter().map(ToString::to_string).collect()
    }

    fn assert_one(found: &[String], part: &str) {
        assert!(matches!(found, [one] if one.contains(part)), "{found:?} is not one {part}");
    }

    #[test]
    fn a_crate_may_use_what_stands_to_its_left() {
        let rest = "[dependencies]\nkvm.workspace = true\nanyhow = { workspace = true }\n";
        assert_eq!(found("machine", rest), Vec::<String>::new());
    }

    #[test]
    fn a_crate_that_uses_one_of_its_row_or_to_its_right_is_found() {
        assert_one(&found("bus", "[dependencies]\nboot.workspace = true\n"), "Cargo.toml:6: bus uses boot, against");
        let target = "[target.'cfg(unix)'.dev-dependencies]\ndevices.workspace = true\n";
        assert_one(&found("kvm", target), "kvm uses devices, against");
    }

    #[test]
    fn devices_never_call_kvm_and_machine_never_calls_libc() {
        assert_one(&found("devices", "[dependencies]\nkvm.workspace = true\n"), "devices uses kvm, which it must");
        assert_one(&found("machine", "[dependencies]\nlibc.workspace = true\n"), "machine uses libc, which it must");
    }

    #[test]
    fn only_the_kvm_crate_has_the_bindings() {
        let rest = "[dependencies]\nkvm-ioctls.workspace = true\n";
        assert_eq!(found("kvm", rest), Vec::<String>::new());
        assert_one(&found("machine", rest), "machine uses kvm-ioctls, which another crate keeps");
    }

    #[test]
    fn a_version_in_a_member_is_found() {
        assert_one(&found("kv", "[dependencies]\nserde = \"1\"\n"), "crates/kv/Cargo.toml:6: serde has a version");
        assert_one(&found("kv", "[build-dependencies]\ncc = { version = \"1\" }\n"), "cc has a version");
    }

    #[test]
    fn missing_lints_and_feature_flags_and_unknown_crates_are_found() {
        let source = Source::new("crates/kv/Cargo.toml", "[package]\nname = \"kv\"\n".to_owned());
        assert_one(
            &Manifest::read(&source).unwrap().check().iter().map(ToString::to_string).collect::<Vec<_>>(),
            "lints",
        );
        assert_one(&found("kv", "[features]\na = []\n"), "Cargo.toml:5: a crate with feature flags");
        assert_one(&found("new", ""), "the crate new has no place");
    }

    #[test]
    fn a_dependency_that_no_file_mentions_is_found() {
        let manifest = manifest("kv", "[dependencies]\nserde.workspace = true\nvm-memory.workspace = true\n");
        let code = Source::new("crates/kv/src/lib.rs", "//! serde\nuse vm_memory::Bytes;\n".to_owned());
        let other = Source::new("crates/kvm/src/lib.rs", "use serde::de;\n".to_owned());
        let found = Manifest::read(&manifest).unwrap().unused(&[code, other]);
        assert_one(&found.iter().map(ToString::to_string).collect::<Vec<_>>(), ":6: serde is listed and not used");
    }

    #[test]
    fn a_workspace_dependency_without_a_user_is_found() {
        let text = "[workspace.dependencies]\nanyhow = \"1\"\nlog = \"0.4\"\n".to_owned();
        let found = unlisted(&Source::new("Cargo.toml", text), &["log".to_owned()]).unwrap();
        assert_one(&found.iter().map(ToString::to_string).collect::<Vec<_>>(), "Cargo.toml:2: no crate uses anyhow");
    }

    #[test]
    fn two_versions_in_the_lock_file_are_found_where_types_cross() {
        let package = |name: &str| format!("[[package]]\nname = \"{name}\"\n");
        let lock = |names: &[&str]| {
            let text: String = names.iter().map(|name| package(name)).collect();
            single(&Source::new("Cargo.lock", text)).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_one(&lock(&["vm-memory", "syn", "vm-memory"]), "Cargo.lock:6: a second version of vm-memory");
        assert_eq!(lock(&["vm-memory", "syn", "syn", "kvm-bindings"]), Vec::<String>::new());
    }

    #[test]
    fn members_are_the_root_ci_and_the_crates_but_not_the_fuzz_targets() {
        assert!(is_member("Cargo.toml") && is_member("ci/Cargo.toml") && is_member("crates/kv/Cargo.toml"));
        assert!(!is_member("tests/fuzz/Cargo.toml") && !is_member("crates/kv/Cargo.lock"));
    }
}
