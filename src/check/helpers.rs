//! The programs that the VMM starts: whether they are there, and their versions.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use super::Finding;
use super::system::System;

/// A program that does not tell its version in this time is not asked further. (An emulated host takes seconds to start
/// one.)
const PATIENCE: Duration = Duration::from_secs(5);
/// No version is longer, in bytes.
const LONGEST_VERSION: u64 = 4096;

/// A program that some feature needs.
struct Helper {
    id: &'static str,
    name: &'static str,
    /// Where distributions put it outside PATH.
    elsewhere: &'static [&'static str],
    /// What there is not without it.
    gives: &'static str,
    package: &'static str,
}

const HELPERS: [Helper; 2] = [
    Helper { id: "passt", name: "passt", elsewhere: &[], gives: "network without root", package: "passt" },
    Helper {
        id: "virtiofsd",
        name: "virtiofsd",
        elsewhere: &devices::fs::ELSEWHERE,
        gives: "shared folders",
        package: "virtiofsd (Debian 12: qemu-system-common)",
    },
];

pub(super) fn findings(system: &System) -> Vec<Finding> {
    let path = std::env::var("PATH").unwrap_or_default();
    HELPERS.iter().map(|helper| finding(system, helper, &path)).collect()
}

fn finding(system: &System, helper: &Helper, path: &str) -> Finding {
    let Some(program) = find(system, helper, path) else {
        return Finding::warn(helper.id, helper.name, format!("not found: no {}", helper.gives))
            .cure(format!("install the package {}", helper.package));
    };
    match version(&program, PATIENCE) {
        Some(version) => Finding::ok(helper.id, helper.name, format!("{version} at {}", program.display())),
        None => Finding::warn(helper.id, helper.name, format!("{} does not tell its version", program.display()))
            .cure(format!("see what `{} --version` says", program.display())),
    }
}

/// In PATH first, as a shell would find it, then where distributions hide it.
fn find(system: &System, helper: &Helper, path: &str) -> Option<PathBuf> {
    // A relative entry would make the answer depend on where one stands.
    let in_path = path.split(':').filter(|folder| folder.starts_with('/'));
    let in_path = in_path.map(|folder| system.path(folder).join(helper.name));
    let elsewhere = helper.elsewhere.iter().map(|place| system.path(place));
    in_path.chain(elsewhere).find(|program| is_program(program))
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// The first line that a program says of its version.
fn version(program: &Path, patience: Duration) -> Option<String> {
    let mut child = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let output = child.stdout.take()?;
    let (sender, receiver) = mpsc::channel();
    // It ends with the program's output, which ends with the program: at the latest when that is
    // killed below. A program that leaves its output to a child of its own is not waited for.
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = output.take(LONGEST_VERSION).read_to_end(&mut bytes);
        let _ = sender.send(bytes);
    });
    let said = receiver.recv_timeout(patience).ok();
    let _ = child.kill();
    let _ = child.wait();
    let said = String::from_utf8_lossy(&said?).into_owned();
    let line = said.lines().map(str::trim).find(|line| !line.is_empty())?;
    // It goes to a terminal, so nothing in it may steer that.
    let line: String = line.chars().filter(|letter| !letter.is_control()).collect();
    Some(line)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Instant;

    use super::*;
    use crate::check::Level;

    fn install(system: &System, place: &str, script: &str) {
        let path = system.path(place);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(&path, script).expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("permissions");
    }

    #[test]
    fn a_program_is_found_in_path_first_and_then_elsewhere() {
        let root = tempfile::tempdir().expect("a folder");
        let system = System::at(root.path());
        let [_, virtiofsd] = &HELPERS;
        let missing = finding(&system, virtiofsd, "/bin:/usr/bin");
        assert_eq!((missing.level, missing.seen.as_str()), (Level::Warn, "not found: no shared folders"));
        install(&system, "/usr/lib/qemu/virtiofsd", "#!/bin/sh\necho hidden 7.2\n");
        let hidden = finding(&system, virtiofsd, "/bin:/usr/bin");
        assert!(hidden.level == Level::Ok && hidden.seen.starts_with("hidden 7.2 at "), "{hidden:?}");
        install(&system, "/usr/bin/virtiofsd", "#!/bin/sh\necho; echo '  in path 1.14'; echo more\n");
        let seen = finding(&system, virtiofsd, ":relative:/bin:/usr/bin").seen;
        assert!(seen.starts_with("in path 1.14 at ") && seen.ends_with("/usr/bin/virtiofsd"), "{seen}");
    }

    #[test]
    fn a_file_that_cannot_be_executed_is_no_program() {
        let root = tempfile::tempdir().expect("a folder");
        let system = System::at(root.path());
        fs::write(system.path("/passt"), "text").expect("a file");
        assert_eq!(find(&system, &HELPERS[0], "/"), None);
    }

    #[test]
    fn a_silent_or_endless_program_is_a_warning_in_bounded_time() {
        let root = tempfile::tempdir().expect("a folder");
        let system = System::at(root.path());
        install(&system, "/bin/passt", "#!/bin/sh\nexit 0\n");
        assert_eq!(finding(&system, &HELPERS[0], "/bin").level, Level::Warn);
        install(&system, "/bin/passt", "#!/bin/sh\nexec sleep 1000\n");
        let started = Instant::now();
        assert_eq!(version(&system.path("/bin/passt"), Duration::from_millis(50)), None);
        assert!(started.elapsed() < Duration::from_secs(100));
    }

    #[test]
    fn a_version_cannot_steer_the_terminal() {
        let root = tempfile::tempdir().expect("a folder");
        let system = System::at(root.path());
        install(&system, "/bin/passt", "#!/bin/sh\nprintf 'passt\\033[2J 1\\n'\n");
        assert!(finding(&system, &HELPERS[0], "/bin").seen.starts_with("passt[2J 1 at "));
    }
}
