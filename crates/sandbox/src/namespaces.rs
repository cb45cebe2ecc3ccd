//! Namespaces (namespaces(7)): IPC objects, a host name and mounts of the process's own, and where that is asked for, a
//! network without interfaces; for an ordinary user in a user namespace, in which nobody but that user exists.
//!
//! Left out on purpose: a PID namespace, which only a child can be in. The process that the user started would have to
//! stay beside the machine's, for its terminal, its signals and its exit code. What it would keep away (signals, ptrace,
//! other processes' /proc) is kept away by the filters, by Landlock, and by the lack of capabilities.
#![allow(unsafe_code, reason = "unshare and mount have no safe form")]

use std::fs;
use std::io;
use std::ptr::null;

/// Enters new namespaces, of the network only where that is said. The process has one thread. Returns what the host
/// did not let it have.
pub(crate) fn enter(network: bool) -> Vec<String> {
    let mut missing = Vec::new();
    // SAFETY: it only reads a number of the process's own.
    let (user, group) = (unsafe { libc::geteuid() }, unsafe { libc::getegid() });
    if user != 0
        && let Err(error) = enter_user(user, group)
    {
        return vec![format!("no user namespace, and so none of the others ({error})")];
    }
    let network = if network { libc::CLONE_NEWNET } else { 0 };
    let kinds = [(network, "network"), (libc::CLONE_NEWIPC, "IPC"), (libc::CLONE_NEWUTS, "host name")];
    // All at once costs the least; one by one tells which there is not.
    if unshare(kinds.iter().fold(libc::CLONE_NEWNS, |all, (flag, _)| all | flag)).is_err() {
        for (flag, name) in kinds.into_iter().chain([(libc::CLONE_NEWNS, "mount")]).filter(|(flag, _)| *flag != 0) {
            if let Err(error) = unshare(flag) {
                missing.push(format!("no {name} namespace ({error})"));
            }
        }
    }
    // Nothing that is mounted here is seen outside.
    let private = libc::MS_REC | libc::MS_PRIVATE;
    // SAFETY: a C string that lives for ever; where no text is needed none is given.
    if unsafe { libc::mount(null(), c"/".as_ptr(), null(), private, null()) } == -1 {
        missing.push(format!("mounts are those of the host ({})", io::Error::last_os_error()));
    }
    missing
}

/// In it the user has the same number as before, and whatever is somebody else's is nobody's.
fn enter_user(user: u32, group: u32) -> io::Result<()> {
    unshare(libc::CLONE_NEWUSER)?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("{user} {user} 1\n"))?;
    fs::write("/proc/self/gid_map", format!("{group} {group} 1\n"))
}

fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: it takes a number, and this is the only thread.
    if unsafe { libc::unshare(flags) } == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
