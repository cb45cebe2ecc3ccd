//! Who is measured: a plain process, container runtimes, our machine, other machines. Programs are recognised by what
//! they answer to `--version`.

use std::env;
use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::instance::{Fault, ask};
use crate::interrupt::Interrupt;
use crate::result::{self, BASE, Skipped};
use crate::site::Site;

/// What a contender is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The workload itself.
    Process,
    /// A container, by a runtime that takes OCI bundles.
    Container,
    /// A machine of ours.
    Vmm,
    /// A machine of QEMU's, of the type microvm.
    Qemu,
    /// A machine of Firecracker's.
    Firecracker,
    /// A machine of Cloud Hypervisor's.
    CloudHypervisor,
}

impl Kind {
    /// Whether it has a kernel of its own.
    pub(crate) fn is_machine(self) -> bool {
        !matches!(self, Self::Process | Self::Container)
    }
}

/// Who is measured.
#[derive(Clone, Debug)]
pub(crate) struct Contender {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) program: PathBuf,
    pub(crate) version: String,
}

impl Contender {
    /// As a result has it.
    pub(crate) fn described(&self) -> result::Contender {
        let program = self.program.display().to_string();
        result::Contender { name: self.name.clone(), program, version: self.version.clone() }
    }

    /// Why it cannot be started here; none where nothing is in its way.
    pub(crate) fn inability(&self, site: &Site) -> Option<String> {
        if !self.kind.is_machine() {
            return None;
        }
        if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
            return Some(format!("/dev/kvm cannot be opened ({error}): `vmm check` says what helps"));
        }
        site.kernel().err().map(str::to_owned)
    }
}

/// A name that is known without a path, its program, and the Debian package of that.
const KNOWN: [(&str, &str, &str); 3] =
    [("crun", "crun", "crun"), ("runc", "runc", "runc"), ("qemu-microvm", "qemu-system-x86_64", "qemu-system-x86")];

/// Finds those that are asked for, and says who is not there. The plain process and our machine always are asked for.
pub(crate) fn find(with: Option<&[String]>, interrupt: &Interrupt) -> Result<(Vec<Contender>, Vec<Skipped>), Fault> {
    let mut found = vec![own_process()];
    let mut skipped = Vec::new();
    let mut take = |name: &str, contender: Result<Contender, String>| match contender {
        Ok(contender) => found.push(contender),
        Err(why) => skipped.push(Skipped { what: name.to_owned(), why }),
    };
    match beside_or_in_path("vmm") {
        Some(vmm) => take("vmm", recognise(&vmm, interrupt)?),
        None => take("vmm", Err("it is neither beside vmm-bench nor in PATH".to_owned())),
    }
    let known: Vec<String> = KNOWN.iter().map(|(name, ..)| (*name).to_owned()).collect();
    for name in with.unwrap_or(&known) {
        take(name, by_name(name, interrupt)?);
    }
    Ok((with_names_of_their_own(found), skipped))
}

fn by_name(name: &str, interrupt: &Interrupt) -> Result<Result<Contender, String>, Fault> {
    if name == BASE {
        return Ok(Ok(own_process()));
    }
    let path = match KNOWN.iter().find(|(known, ..)| *known == name) {
        Some((_, program, package)) => match in_path(program) {
            Some(path) => path,
            None => return Ok(Err(format!("it is not installed (Debian 12: apt install {package})"))),
        },
        None if name == "vmm" => match beside_or_in_path(name) {
            Some(path) => path,
            None => return Ok(Err("it is not there".to_owned())),
        },
        None => PathBuf::from(name),
    };
    recognise(&path, interrupt)
}

fn own_process() -> Contender {
    Contender {
        name: BASE.to_owned(),
        kind: Kind::Process,
        program: PathBuf::from("/proc/self/exe"),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// The same contender twice is a null test.
fn with_names_of_their_own(contenders: Vec<Contender>) -> Vec<Contender> {
    let mut named: Vec<Contender> = Vec::new();
    for contender in contenders {
        let count = named.iter().filter(|other| other.name.trim_end_matches(is_suffix) == contender.name).count();
        let name = if count == 0 { contender.name } else { format!("{}#{}", contender.name, count + 1) };
        named.push(Contender { name, ..contender });
    }
    named
}

fn is_suffix(c: char) -> bool {
    c == '#' || c.is_ascii_digit()
}

/// What a program is.
fn recognise(program: &Path, interrupt: &Interrupt) -> Result<Result<Contender, String>, Fault> {
    let mut command = Command::new(program);
    command.arg("--version");
    let text = match ask(command, Duration::from_secs(10), interrupt) {
        Ok((_, text)) => text,
        Err(Fault::Interrupted) => return Err(Fault::Interrupted),
        Err(Fault::Other(what)) => return Ok(Err(what)),
    };
    Ok(by_version(program, &text))
}

fn by_version(program: &Path, text: &str) -> Result<Contender, String> {
    let first: String = text.lines().next().unwrap_or_default().chars().filter(|c| !c.is_control()).take(200).collect();
    let kinds = [
        ("crun version ", Kind::Container, "crun"),
        ("runc version ", Kind::Container, "runc"),
        ("vmm ", Kind::Vmm, "vmm"),
        ("QEMU emulator version ", Kind::Qemu, "qemu-microvm"),
        ("Firecracker v", Kind::Firecracker, "firecracker"),
        ("cloud-hypervisor v", Kind::CloudHypervisor, "cloud-hypervisor"),
    ];
    let found = kinds.iter().find_map(|(start, kind, name)| Some((first.strip_prefix(start)?, *kind, *name)));
    let (version, kind, name) = found.ok_or_else(|| {
        format!(
            "what {} answers to --version is none of crun, runc, vmm, QEMU, Firecracker, Cloud Hypervisor",
            program.display()
        )
    })?;
    Ok(Contender { name: name.to_owned(), kind, program: program.to_owned(), version: version.trim().to_owned() })
}

fn beside_or_in_path(name: &str) -> Option<PathBuf> {
    let beside = env::current_exe().ok()?.with_file_name(name);
    if beside.is_file() { Some(beside) } else { in_path(name) }
}

/// Where a program is; system programs are found without being in an ordinary user's `PATH`.
pub(crate) fn in_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(system).map(|folder| folder.join(OsStr::new(name))).find(|place| place.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_recognised_by_what_they_say() {
        for (text, name, version) in [
            ("crun version 1.8.1\ncommit: f8a0\n", "crun", "1.8.1"),
            ("QEMU emulator version 7.2.22 (Debian 1:7.2)\n", "qemu-microvm", "7.2.22 (Debian 1:7.2)"),
            ("Firecracker v1.10.1\n", "firecracker", "1.10.1"),
            ("cloud-hypervisor v53.0\n", "cloud-hypervisor", "53.0"),
            ("vmm 0.1.0\n", "vmm", "0.1.0"),
        ] {
            let found = by_version(Path::new("/x"), text).unwrap();
            assert_eq!((found.name.as_str(), found.version.as_str()), (name, version));
        }
        let error = by_version(Path::new("/bin/ls"), "ls (GNU coreutils) 9.1\n").unwrap_err();
        assert!(error.contains("/bin/ls"), "{error}");
    }

    #[test]
    fn the_same_contender_twice_has_two_names() {
        let named = with_names_of_their_own(vec![own_process(), own_process(), own_process()]);
        let names: Vec<&str> = named.iter().map(|contender| contender.name.as_str()).collect();
        assert_eq!(names, ["process", "process#2", "process#3"]);
    }
}
