//! Namespaces of a process's own (namespaces(7)).
#![allow(unsafe_code, reason = "to leave a namespace is unsafe where threads share what they have; here is one thread")]

use std::fs;

use anyhow::Context as _;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::UnshareFlags;

use crate::process::Failed;

/// From now on, this process's children are in a PID namespace of their own, of which the first is PID 1. An ordinary
/// user becomes root, of nothing but this and what its children make.
pub(crate) fn prepare() -> anyhow::Result<()> {
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    let mut flags = UnshareFlags::NEWPID;
    if !user.is_root() {
        flags |= UnshareFlags::NEWUSER;
    }
    unshare(flags)
        .map_err(|error| Failed(format!("cannot make namespaces ({error}): see `vmm check`, or start it as root")))?;
    if !user.is_root() {
        let maps =
            [("setgroups", "deny".to_owned()), ("uid_map", format!("0 {user} 1")), ("gid_map", format!("0 {group} 1"))];
        for (file, map) in maps {
            fs::write(format!("/proc/self/{file}"), map).with_context(|| format!("cannot write {file}"))?;
        }
    }
    Ok(())
}

/// Gives PID 1 its own mounts, network and IPC.
pub(crate) fn enter() -> anyhow::Result<()> {
    unshare(UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC)
        .map_err(|error| Failed(format!("cannot make namespaces ({error}): see `vmm check`")))?;
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .context("cannot make the mounts private")?;
    // In a container whose /proc is partly hidden a new one is refused; the old one shows us, too.
    let _ = mount("proc", "/proc", "proc", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, None);
    Ok(())
}

fn unshare(flags: UnshareFlags) -> rustix::io::Result<()> {
    // SAFETY: this process has one thread, and no descriptors are unshared.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}
