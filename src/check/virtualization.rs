//! KVM itself: its device, its interface, and whether it runs guests on hardware.

use std::arch::x86_64::__cpuid;
use std::time::Duration;

use kvm::{Host, HostError, probe};

use super::Finding;
use super::system::System;

/// Making a machine takes well under a millisecond, unless the trap below is there.
const SLOW_CREATION: Duration = Duration::from_millis(10);

pub(super) fn findings(system: &System) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut creation = None;
    match Host::open(&system.path(Host::DEVICE)) {
        Err(error) => findings.push(refusal(system, error)),
        Ok(host) => {
            findings.push(Finding::ok("kvm-device", "/dev/kvm", "opens, API version 12"));
            findings.push(capabilities(&probe::missing_useful(&host)));
            let probed = probe::run(&host);
            creation = probed.as_ref().ok().map(|probe| probe.creation);
            findings.push(hardware(probed));
        }
    }
    let cpu = system.read("/proc/cpuinfo").unwrap_or_default();
    findings.push(nesting(has_flag(&cpu, "hypervisor"), &hypervisor()));
    findings.push(creation_time(system, creation));
    findings
}

/// Why `/dev/kvm` is no use, with what this host's own files say of the cure.
fn refusal(system: &System, error: HostError) -> Finding {
    let device = |seen: &str| Finding::fail("kvm-device", "/dev/kvm", seen);
    match error {
        HostError::Missing(_) => device("does not exist").cure(cure_for_missing(system)),
        HostError::Denied(_) => device("this user may not open it").cure(system.cure_for_closed(Host::DEVICE)),
        HostError::NotKvm(_) => device("does not speak version 12 of the KVM API")
            .cure("load KVM's own module: `sudo modprobe kvm_intel` or `kvm_amd`"),
        HostError::Unusable { source, .. } => {
            device(&format!("does not open: {source}")).cure("see `sudo dmesg | grep -i kvm` for what KVM says of it")
        }
        HostError::Lacks(name) => {
            Finding::fail("kvm-capabilities", "KVM capabilities", format!("no {name}, which every machine needs"))
                .cure("run Linux 5.10 or later on the host")
        }
    }
}

fn cure_for_missing(system: &System) -> String {
    let cpu = system.read("/proc/cpuinfo").unwrap_or_default();
    let module = if has_flag(&cpu, "svm") { Some("kvm_amd") } else { has_flag(&cpu, "vmx").then_some("kvm_intel") };
    match module {
        Some(module) => format!("load its module: `sudo modprobe {module}`"),
        None if has_flag(&cpu, "hypervisor") => {
            "turn nested virtualisation on for this virtual machine, or `cargo xtask host -- COMMAND`".into()
        }
        None => "turn virtualisation (VT-x, AMD-V) on in the firmware, or `cargo xtask host -- COMMAND`".into(),
    }
}

fn capabilities(missing: &[&str]) -> Finding {
    let (id, subject) = ("kvm-capabilities", "KVM capabilities");
    if missing.is_empty() {
        return Finding::ok(id, subject, "all that are needed or useful");
    }
    Finding::warn(id, subject, format!("all that are needed, but no {}", missing.join(", ")))
        .cure("run a newer kernel on the host")
}

fn hardware(probed: anyhow::Result<probe::Probe>) -> Finding {
    let (id, subject) = ("kvm-hardware", "Hardware virtualization");
    match probed {
        Err(error) => Finding::fail(id, subject, format!("{error:#}"))
            .cure("see `sudo dmesg | grep -i kvm` for what KVM says of it"),
        Ok(probe) if probe.usable() => Finding::ok(id, subject, probe.to_string()),
        Ok(probe) => Finding::fail(id, subject, probe.to_string()).cure(probe::CURE),
    }
}

/// Whether this host is itself a virtual machine, and whose.
fn nesting(nested: bool, hypervisor: &str) -> Finding {
    let (id, subject) = ("nested", "Nested");
    if !nested {
        return Finding::ok(id, subject, "no, this is a physical machine");
    }
    let whose = if hypervisor.is_empty() { "an unnamed hypervisor" } else { hypervisor };
    Finding::ok(id, subject, format!("yes, this is a virtual machine of {whose}"))
        .cure("huge pages make guests faster here: `--mem SIZE,hugepages=2M,prefault`")
}

/// The hypervisor's name for itself, from the CPUID leaf that hypervisors answer.
fn hypervisor() -> String {
    const HYPERVISOR: u32 = 0x4000_0000;
    let leaf = __cpuid(HYPERVISOR);
    let bytes = [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).concat();
    let name = String::from_utf8_lossy(&bytes);
    name.chars().filter(char::is_ascii_graphic).collect()
}

/// From Linux 6.1 on, KVM_CREATE_VM starts a thread for the recovery of large pages and moves it into
/// its creator's cgroups, for which cgroup v2 waits tens of milliseconds, unless either is off.
fn creation_time(system: &System, took: Option<Duration>) -> Finding {
    let (id, subject) = ("kvm-creation", "Making a machine");
    let nx = system.read("/sys/module/kvm/parameters/nx_huge_pages");
    let nx = nx.as_deref().unwrap_or("absent");
    let mounts = system.read("/proc/self/mountinfo").unwrap_or_default();
    let groups = cgroup_v2(&mounts);
    let favour = match groups {
        None => "no cgroup v2",
        Some((_, true)) => "cgroup v2 with favordynmods",
        Some((_, false)) => "cgroup v2 without favordynmods",
    };
    let time = took.map_or_else(String::new, |took| format!("takes {took:.1?}; "));
    let seen = format!("{time}nx_huge_pages is {nx}, {favour}");
    if let (Some((place, false)), true) = (groups, nx != "never" && took.is_some_and(|took| took > SLOW_CREATION)) {
        return Finding::warn(id, subject, seen).cure(format!(
            "`sudo mount -o remount,favordynmods {place}`, or load kvm with nx_huge_pages=never where the processor is \
             not affected or guests are trusted"
        ));
    }
    match took {
        Some(took) if took > SLOW_CREATION => {
            Finding::warn(id, subject, seen).cure("look for what else loads the host, and check again")
        }
        _ => Finding::ok(id, subject, seen),
    }
}

/// Where cgroup v2 is mounted, and whether with `favordynmods` (proc(5), mountinfo).
fn cgroup_v2(mountinfo: &str) -> Option<(&str, bool)> {
    mountinfo.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut fields = kind.split(' ');
        let options = (fields.next()? == "cgroup2").then(|| fields.nth(1)).flatten()?;
        Some((mount.split(' ').nth(4)?, options.split(',').any(|option| option == "favordynmods")))
    })
}

/// Whether /proc/cpuinfo lists a processor flag.
fn has_flag(cpuinfo: &str, flag: &str) -> bool {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|line| line.split_whitespace().any(|word| word == flag))
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

    #[test]
    fn a_missing_device_is_cured_by_what_the_processor_offers() {
        for (flags, cure) in [
            ("fpu svm", "modprobe kvm_amd"),
            ("fpu vmx", "modprobe kvm_intel"),
            ("fpu hypervisor", "nested virtualisation on"),
            ("fpu", "firmware"),
        ] {
            let (_root, system) = system(&[("/proc/cpuinfo", &format!("vendor_id: x\nflags\t\t: {flags}\n"))]);
            let findings = findings(&system);
            assert_eq!((findings[0].id, findings[0].level), ("kvm-device", Level::Fail));
            assert!(findings[0].cure.as_deref().is_some_and(|text| text.contains(cure)), "{findings:?}");
        }
    }

    #[test]
    fn a_device_that_is_not_kvm_fails() {
        let (_root, system) = system(&[("/dev/kvm", "")]);
        let findings = findings(&system);
        assert_eq!(findings[0].level, Level::Fail);
        assert!(findings[0].seen.contains("version 12"), "{findings:?}");
    }

    #[test]
    fn a_missing_capability_fails_and_a_useful_one_warns() {
        let (_root, system) = system(&[]);
        let finding = refusal(&system, HostError::Lacks("KVM_CAP_IRQFD"));
        assert_eq!((finding.id, finding.level), ("kvm-capabilities", Level::Fail));
        assert!(finding.seen.contains("KVM_CAP_IRQFD"));
        assert_eq!(capabilities(&["KVM_CAP_X"]).level, Level::Warn);
        assert_eq!(capabilities(&[]).level, Level::Ok);
    }

    #[test]
    fn what_the_tiny_guest_executes_decides_and_its_time_does_not() {
        let mut probe = probe::Probe { lacking: vec![], creation: Duration::ZERO, pace: Duration::from_secs(1) };
        assert_eq!(hardware(Ok(probe.clone())).level, Level::Ok);
        probe.lacking.push(probe::Lacking { instruction: "xrstor", outcome: "a triple fault".into() });
        let finding = hardware(Ok(probe));
        assert_eq!(finding.level, Level::Fail);
        assert!(finding.seen.contains("xrstor (a triple fault)"));
        assert_eq!(hardware(Err(anyhow::anyhow!("KVM makes no virtual machine"))).level, Level::Fail);
    }

    #[test]
    fn the_outer_hypervisor_is_named() {
        assert!(nesting(true, "KVMKVMKVM").seen.contains("of KVMKVMKVM"));
        assert!(nesting(true, "").seen.contains("an unnamed hypervisor"));
        assert!(nesting(false, "").seen.contains("physical"));
    }

    #[test]
    fn slow_creation_is_cured_where_cgroups_make_it_slow() {
        let mounts = |options: &str| {
            format!("1 2 0:3 / /x rw - tmpfs t rw\n30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 {options}")
        };
        let nx = "/sys/module/kvm/parameters/nx_huge_pages";
        let slow = Some(SLOW_CREATION * 2);
        let (_root, trapped) = system(&[(nx, "Y\n"), ("/proc/self/mountinfo", &mounts("rw,nsdelegate"))]);
        let finding = creation_time(&trapped, slow);
        assert_eq!(finding.level, Level::Warn);
        assert!(finding.cure.is_some_and(|cure| cure.contains("remount,favordynmods /sys/fs/cgroup`")));
        assert_eq!(creation_time(&trapped, Some(SLOW_CREATION / 20)).level, Level::Ok);
        assert_eq!(creation_time(&trapped, None).seen, "nx_huge_pages is Y, cgroup v2 without favordynmods");
        let (_root, cured) = system(&[(nx, "never"), ("/proc/self/mountinfo", &mounts("rw,favordynmods"))]);
        let finding = creation_time(&cured, slow);
        assert!(finding.seen.ends_with("nx_huge_pages is never, cgroup v2 with favordynmods"), "{finding:?}");
        assert!(finding.cure.is_some_and(|cure| !cure.contains("favordynmods")));
    }

    #[test]
    fn cgroups_are_read_from_mountinfo_by_file_system_type() {
        assert_eq!(cgroup_v2(""), None);
        assert_eq!(cgroup_v2("1 2 0:3 / /cgroup2 rw - tmpfs favordynmods rw"), None);
        assert_eq!(cgroup_v2("1 2 0:3 / /a rw shared:4 - cgroup2 none rw,favordynmods"), Some(("/a", true)));
        assert_eq!(cgroup_v2("1 2 0:3 / /b rw - cgroup2 none rw"), Some(("/b", false)));
        assert_eq!(cgroup_v2("short - cgroup2 none rw"), None);
    }

    #[test]
    fn a_processor_flag_is_a_whole_word() {
        assert!(has_flag("model\t: svm\nflags\t\t: fpu vmx\n", "vmx"));
        assert!(!has_flag("model\t: svm\nflags\t\t: fpu vmx_x svm_lock\n", "svm"));
    }
}
