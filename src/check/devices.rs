//! The device files that networks and vsock need, and the right to make a tap.

use std::io;

use super::Finding;
use super::system::System;

/// capabilities(7)
const CAP_NET_ADMIN: u32 = 12;

pub(super) fn findings(system: &System) -> Vec<Finding> {
    vec![
        tap(system),
        vhost(system, "vhost-net", "/dev/vhost-net", "vhost_net", "networks are slower"),
        vhost(system, "vhost-vsock", "/dev/vhost-vsock", "vhost_vsock", "vsock goes through a Unix socket"),
    ]
}

fn tap(system: &System) -> Finding {
    const DEVICE: &str = "/dev/net/tun";
    let (id, subject) = ("tap", "Tap interfaces");
    if let Err(error) = system.opens(DEVICE) {
        return closed(system, Finding::warn(id, subject, ""), DEVICE, "tun", &error);
    }
    let status = system.read("/proc/self/status").unwrap_or_default();
    if has_capability(&status, CAP_NET_ADMIN) {
        return Finding::ok(id, subject, "can be made (CAP_NET_ADMIN)");
    }
    Finding::warn(id, subject, "can be used where they are this user's, not made: no CAP_NET_ADMIN")
        .cure("`sudo ip tuntap add tap0 mode tap user $USER`, or a network by passt, which needs no tap")
}

fn vhost(system: &System, id: &'static str, device: &'static str, module: &str, without: &str) -> Finding {
    match system.opens(device) {
        Ok(()) => Finding::ok(id, device, "opens"),
        Err(error) => {
            let mut finding = closed(system, Finding::warn(id, device, ""), device, module, &error);
            finding.seen += &format!(", so {without}");
            finding
        }
    }
}

/// Why a device does not open, and what opens it.
fn closed(system: &System, finding: Finding, device: &str, module: &str, error: &io::Error) -> Finding {
    let (seen, cure) = match error.kind() {
        io::ErrorKind::NotFound => (format!("{device} does not exist"), format!("`sudo modprobe {module}`")),
        io::ErrorKind::PermissionDenied => (format!("this user may not open {device}"), system.cure_for_closed(device)),
        // The device file outlives its module, or is a container's.
        _ => (format!("{device} does not open: {error}"), format!("`sudo modprobe {module}`")),
    };
    Finding { seen, ..finding }.cure(cure)
}

/// Whether a process has a capability now (proc(5), status, `CapEff`).
fn has_capability(status: &str, capability: u32) -> bool {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let set = line.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok());
    set.is_some_and(|set| set & 1 << capability != 0)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::check::Level;

    #[test]
    fn a_tap_needs_the_device_and_the_right() {
        let root = tempfile::tempdir().expect("a folder");
        let system = System::at(root.path());
        let missing = tap(&system);
        assert_eq!(missing.seen, "/dev/net/tun does not exist");
        assert_eq!(missing.cure.as_deref(), Some("`sudo modprobe tun`"));
        fs::create_dir_all(system.path("/dev/net")).expect("a folder");
        fs::write(system.path("/dev/net/tun"), "").expect("a file");
        assert_eq!(tap(&system).level, Level::Warn);
        assert!(tap(&system).seen.contains("no CAP_NET_ADMIN"));
        fs::create_dir_all(system.path("/proc/self")).expect("a folder");
        fs::write(system.path("/proc/self/status"), "CapEff:\t0000000000001000\n").expect("a file");
        assert_eq!(tap(&system).level, Level::Ok);
    }

    #[test]
    fn a_missing_vhost_device_is_a_warning_with_its_module() {
        let root = tempfile::tempdir().expect("a folder");
        let system = System::at(root.path());
        let finding = &findings(&system)[1];
        assert_eq!((finding.id, finding.level), ("vhost-net", Level::Warn));
        assert_eq!(finding.seen, "/dev/vhost-net does not exist, so networks are slower");
        assert_eq!(finding.cure.as_deref(), Some("`sudo modprobe vhost_net`"));
    }

    #[test]
    fn a_closed_device_is_opened_by_its_group_or_an_access_list() {
        let root = tempfile::tempdir().expect("a folder");
        let system = System::at(root.path());
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let finding = closed(&system, Finding::warn("x", "X", ""), "/dev/x", "x", &denied);
        assert_eq!(finding.seen, "this user may not open /dev/x");
        assert!(finding.cure.is_some_and(|cure| cure.contains("setfacl")));
    }

    #[test]
    fn capabilities_are_a_hexadecimal_set() {
        assert!(has_capability("Name:\tx\nCapEff:\t000001ffffffffff\n", CAP_NET_ADMIN));
        assert!(!has_capability("CapEff:\t0000000000000000\n", CAP_NET_ADMIN));
        assert!(!has_capability("CapPrm:\t000001ffffffffff\n", CAP_NET_ADMIN));
        assert!(!has_capability("CapEff:\tnonsense\n", CAP_NET_ADMIN));
    }
}
