//! The host's memory, its limits, and what of the kernel confines or speeds up a machine.

use std::io;

use kv::Size;

use super::Finding;
use super::system::{self, System};

/// What a machine has unless it is told otherwise.
const USUAL_MEMORY: u64 = 512 << 20;
/// A machine with a few disks and networks, and room for its connections.
const ENOUGH_FILES: u64 = 1024;
/// What recent kernels allow every process.
const ENOUGH_LOCKED: u64 = 8 << 20;

pub(super) fn findings(system: &System) -> Vec<Finding> {
    let limits = system.read("/proc/self/limits").unwrap_or_default();
    vec![
        memory(&system.read("/proc/meminfo").unwrap_or_default()),
        overcommit(system),
        huge_pages(system),
        transparent_huge_pages(system),
        files(&limits),
        locked(&limits),
        io_uring(system, system::io_uring()),
        user_namespaces(system, system::user_namespace()),
        landlock(system::landlock_version()),
    ]
}

fn memory(meminfo: &str) -> Finding {
    let (id, subject) = ("memory", "Memory");
    let amount = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
    };
    let (Some(total), Some(available)) = (amount("MemTotal"), amount("MemAvailable")) else {
        return Finding::warn(id, subject, "/proc/meminfo does not tell").cure("mount /proc");
    };
    let seen = format!("{} MiB available of {} MiB", available >> 20, total >> 20);
    if available < USUAL_MEMORY {
        return Finding::warn(id, subject, seen)
            .cure(format!("a machine has {} unless told otherwise: say less, `--mem 128M`", Size(USUAL_MEMORY)));
    }
    Finding::ok(id, subject, seen)
}

/// Guest memory is mapped without reserve, which mode 2 does not grant (Linux, overcommit-accounting).
fn overcommit(system: &System) -> Finding {
    let (id, subject) = ("overcommit", "Overcommit");
    match system.number("/proc/sys/vm/overcommit_memory") {
        Some(2) => {
            Finding::warn(id, subject, "vm.overcommit_memory is 2: all of a guest's memory counts from its start")
                .cure("`sudo sysctl vm.overcommit_memory=0`, or give guests less")
        }
        Some(mode) => Finding::ok(id, subject, format!("vm.overcommit_memory is {mode}: guests use what they touch")),
        None => Finding::warn(id, subject, "vm.overcommit_memory is not to be read").cure("mount /proc"),
    }
}

fn huge_pages(system: &System) -> Finding {
    let (id, subject) = ("hugepages", "Huge pages");
    let mut any = false;
    let pools = [("2M", 2048), ("1G", 1_048_576)].map(|(size, kib)| {
        let pool = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB");
        match (system.number(&format!("{pool}/free_hugepages")), system.number(&format!("{pool}/nr_hugepages"))) {
            (Some(free), Some(all)) => {
                // Pages that others have reserved are free and still not to be had.
                let reserved = system.number(&format!("{pool}/resv_hugepages")).unwrap_or(0);
                let free = free.saturating_sub(reserved);
                any |= free > 0;
                format!("{size}: {free} free of {all}")
            }
            _ => format!("{size}: unknown to this host"),
        }
    });
    let seen = pools.join(", ");
    if any {
        return Finding::ok(id, subject, seen);
    }
    Finding::warn(id, subject, seen)
        .cure("for `--mem SIZE,hugepages=2M` reserve some, here 512M: `sudo sysctl vm.nr_hugepages=256`")
}

fn transparent_huge_pages(system: &System) -> Finding {
    let (id, subject) = ("transparent-hugepages", "Transparent huge pages");
    let file = "/sys/kernel/mm/transparent_hugepage/enabled";
    let modes = system.read(file).unwrap_or_default();
    let mode = modes.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
    match mode {
        Some(mode @ ("always" | "madvise")) => Finding::ok(id, subject, format!("{mode}: guest memory gets them")),
        _ => Finding::warn(id, subject, format!("{}: guest memory gets none", mode.unwrap_or("absent")))
            .cure(format!("`echo madvise | sudo tee {file}`")),
    }
}

/// A line of /proc/self/limits: the soft and the hard limit; `None` in them is unlimited.
fn limit(limits: &str, name: &str) -> Option<(Option<u64>, Option<u64>)> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    let mut words = line.split_whitespace();
    let mut number = || match words.next()? {
        "unlimited" => Some(None),
        word => word.parse().ok().map(Some),
    };
    Some((number()?, number()?))
}

fn files(limits: &str) -> Finding {
    let (id, subject) = ("open-files", "Open files");
    let Some((soft, hard)) = limit(limits, "Max open files") else {
        return Finding::warn(id, subject, "the limit is not to be read").cure("mount /proc");
    };
    let text = |limit: Option<u64>| limit.map_or_else(|| "unlimited".into(), |limit| limit.to_string());
    let seen = format!("{}, at most {}", text(soft), text(hard));
    if soft.is_some_and(|soft| soft < ENOUGH_FILES) {
        return Finding::warn(id, subject, seen).cure(format!("`ulimit -n {ENOUGH_FILES}`, or LimitNOFILE= in a unit"));
    }
    Finding::ok(id, subject, seen)
}

fn locked(limits: &str) -> Finding {
    let (id, subject) = ("locked-memory", "Locked memory");
    let Some((soft, hard)) = limit(limits, "Max locked memory") else {
        return Finding::warn(id, subject, "the limit is not to be read").cure("mount /proc");
    };
    let text = |limit: Option<u64>| limit.map_or_else(|| "unlimited".into(), |limit| Size(limit).to_string());
    let seen = format!("{}, at most {}", text(soft), text(hard));
    if soft.is_some_and(|soft| soft < ENOUGH_LOCKED) {
        return Finding::warn(id, subject, seen).cure("`ulimit -l unlimited`, or LimitMEMLOCK= in a unit");
    }
    Finding::ok(id, subject, seen)
}

fn io_uring(system: &System, probed: io::Result<()>) -> Finding {
    let (id, subject) = ("io-uring", "io_uring");
    let Err(error) = probed else { return Finding::ok(id, subject, "can be used") };
    let cure = match (error.raw_os_error(), system.number("/proc/sys/kernel/io_uring_disabled")) {
        (Some(libc::ENOSYS), _) => "run a kernel with CONFIG_IO_URING",
        (_, Some(1 | 2)) => "`sudo sysctl kernel.io_uring_disabled=0`",
        _ => "let the seccomp filter of this container or service allow io_uring_setup",
    };
    Finding::warn(id, subject, format!("cannot be used, disks are slower: {error}")).cure(cure)
}

fn user_namespaces(system: &System, probed: io::Result<()>) -> Finding {
    let (id, subject) = ("user-namespaces", "User namespaces");
    let Err(error) = probed else { return Finding::ok(id, subject, "can be made") };
    let is = |path: &str, value| system.number(path) == Some(value);
    let cure = if error.raw_os_error() == Some(libc::EINVAL) {
        "run a kernel with CONFIG_USER_NS"
    } else if is("/proc/sys/user/max_user_namespaces", 0) {
        "`sudo sysctl user.max_user_namespaces=10000`"
    } else if is("/proc/sys/kernel/unprivileged_userns_clone", 0) {
        "`sudo sysctl kernel.unprivileged_userns_clone=1`"
    } else if is("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", 1) {
        "`sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0`"
    } else {
        "leave the chroot or container that forbids them"
    };
    Finding::warn(id, subject, format!("cannot be made, passt cannot confine itself: {error}")).cure(cure)
}

fn landlock(version: io::Result<i64>) -> Finding {
    let (id, subject) = ("landlock", "Landlock");
    match version {
        Ok(version) => Finding::ok(id, subject, format!("version {version}")),
        Err(error) => {
            let cure = match error.raw_os_error() {
                Some(libc::EOPNOTSUPP) => "boot the host with `landlock` in its lsm= list",
                Some(libc::ENOSYS) => "run Linux 5.13 or later with CONFIG_SECURITY_LANDLOCK",
                _ => "let the seccomp filter of this container or service allow landlock_create_ruleset",
            };
            Finding::warn(id, subject, format!("cannot be used, the VMM is confined less: {error}")).cure(cure)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::check::Level;

    fn system(files: &[(&str, &str)]) -> (tempfile::TempDir, System) {
        let root = tempfile::tempdir().expect("a folder");
        let system = System::at(root.path());
        for (path, text) in files {
            let path = system.path(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            fs::write(path, text).expect("a file");
        }
        (root, system)
    }

    fn failed<T>(errno: i32) -> io::Result<T> {
        Err(io::Error::from_raw_os_error(errno))
    }

    #[test]
    fn memory_is_read_from_meminfo() {
        let text = "MemTotal:        4194304 kB\nMemFree:  1 kB\nMemAvailable:    1048576 kB\n";
        assert_eq!(memory(text), Finding::ok("memory", "Memory", "1024 MiB available of 4096 MiB"));
        assert_eq!(memory(&text.replace("1048576", "1024")).level, Level::Warn);
        for broken in [
            "",
            "MemTotal: 1 kB",
            "MemTotal: x kB\nMemAvailable: 1 kB",
            "MemTotal:\nMemAvailable:",
            "MemTotal: 1 kB\nMemAvailable: 18446744073709551615 kB",
        ] {
            assert!(memory(broken).seen.contains("does not tell"), "{broken}");
        }
    }

    #[test]
    fn strict_overcommit_is_a_warning() {
        let path = "/proc/sys/vm/overcommit_memory";
        assert_eq!(overcommit(&system(&[(path, "2\n")]).1).level, Level::Warn);
        assert_eq!(overcommit(&system(&[]).1).level, Level::Warn);
        let (_root, usual) = system(&[(path, "0\n")]);
        assert_eq!(overcommit(&usual).level, Level::Ok);
    }

    #[test]
    fn reserved_huge_pages_do_not_count_as_free() {
        let pool = "/sys/kernel/mm/hugepages/hugepages-2048kB";
        let files = |reserved| {
            [("free_hugepages", "10"), ("nr_hugepages", "20"), ("resv_hugepages", reserved)]
                .map(|(name, text)| (format!("{pool}/{name}"), text))
        };
        for (reserved, level, seen) in [
            ("4", Level::Ok, "2M: 6 free of 20, 1G: unknown to this host"),
            ("10", Level::Warn, "2M: 0 free of 20, 1G: unknown to this host"),
        ] {
            let files = files(reserved);
            let files: Vec<_> = files.iter().map(|(path, text)| (path.as_str(), *text)).collect();
            let (_root, system) = system(&files);
            let finding = huge_pages(&system);
            assert_eq!((finding.level, finding.seen.as_str()), (level, seen));
        }
    }

    #[test]
    fn the_mode_of_transparent_huge_pages_is_the_one_in_brackets() {
        let path = "/sys/kernel/mm/transparent_hugepage/enabled";
        for (text, level) in [
            ("[always] madvise never", Level::Ok),
            ("always [madvise] never", Level::Ok),
            ("always madvise [never]", Level::Warn),
            ("", Level::Warn),
        ] {
            let (_root, system) = system(&[(path, text)]);
            assert_eq!(transparent_huge_pages(&system).level, level, "{text}");
        }
    }

    #[test]
    fn limits_are_read_from_proc() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max open files            1024                 unlimited            files     \n\
                    Max locked memory         65536                8388608              bytes     \n";
        assert_eq!(limit(text, "Max open files"), Some((Some(1024), None)));
        assert_eq!(limit(text, "Max nothing"), None);
        assert_eq!(limit("Max open files", "Max open files"), None);
        assert_eq!(files(text), Finding::ok("open-files", "Open files", "1024, at most unlimited"));
        assert_eq!(files(&text.replace("1024", "256")).level, Level::Warn);
        assert_eq!(locked(text).seen, "64K, at most 8M");
        assert_eq!(locked(text).level, Level::Warn);
        assert_eq!(locked(&text.replace("65536", "unlimited")).level, Level::Ok);
        assert_eq!((files("").level, locked("").level), (Level::Warn, Level::Warn));
    }

    #[test]
    fn why_io_uring_is_closed_decides_the_cure() {
        let (_root, disabled) = system(&[("/proc/sys/kernel/io_uring_disabled", "2")]);
        let cure = |system: &System, errno| io_uring(system, failed(errno)).cure.expect("a cure");
        assert!(cure(&disabled, libc::EPERM).contains("sysctl"));
        assert!(cure(&disabled, libc::ENOSYS).contains("CONFIG_IO_URING"));
        let (_root, filtered) = system(&[]);
        assert!(cure(&filtered, libc::EPERM).contains("seccomp"));
        assert_eq!(io_uring(&filtered, Ok(())).level, Level::Ok);
    }

    #[test]
    fn why_user_namespaces_are_closed_decides_the_cure() {
        for (path, value, says) in [
            ("/proc/sys/user/max_user_namespaces", "0", "max_user_namespaces"),
            ("/proc/sys/kernel/unprivileged_userns_clone", "0", "unprivileged_userns_clone"),
            ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "apparmor"),
            ("/etc/hostname", "x", "chroot"),
        ] {
            let (_root, system) = system(&[(path, value)]);
            let finding = user_namespaces(&system, failed(libc::EPERM));
            assert!(finding.cure.is_some_and(|cure| cure.contains(says)), "{path}");
        }
        let (_root, system) = system(&[]);
        assert!(user_namespaces(&system, failed(libc::EINVAL)).cure.is_some_and(|cure| cure.contains("CONFIG")));
        assert_eq!(user_namespaces(&system, Ok(())).level, Level::Ok);
    }

    #[test]
    fn landlock_tells_its_version_or_why_it_has_none() {
        assert_eq!(landlock(Ok(4)), Finding::ok("landlock", "Landlock", "version 4"));
        assert!(landlock(failed(libc::EOPNOTSUPP)).cure.is_some_and(|cure| cure.contains("lsm=")));
        assert!(landlock(failed(libc::ENOSYS)).cure.is_some_and(|cure| cure.contains("5.13")));
    }
}
