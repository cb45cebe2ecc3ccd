//! The host that is looked at: files below a root, and the few system calls that tell what no file
//! does. With another root, tests see other hosts' files.
#![allow(unsafe_code, reason = "these system calls have no safe form")]

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::ptr;

/// No file that is looked at is nearly as long.
const LONGEST_FILE: u64 = 1 << 20;

pub(super) struct System {
    root: PathBuf,
}

impl System {
    pub(super) fn real() -> Self {
        Self::at(Path::new("/"))
    }

    pub(super) fn at(root: &Path) -> Self {
        Self { root: root.into() }
    }

    /// Where an absolute path lies below the root.
    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// A file's text without the space round it, if it can be read.
    pub(super) fn read(&self, path: &str) -> Option<String> {
        let mut bytes = Vec::new();
        let file = File::open(self.path(path)).ok()?;
        file.take(LONGEST_FILE).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// A file's text as a number.
    pub(super) fn number(&self, path: &str) -> Option<u64> {
        self.read(path)?.parse().ok()
    }

    /// Whether a device opens for reading and writing.
    pub(super) fn opens(&self, device: &str) -> io::Result<()> {
        OpenOptions::new().read(true).write(true).open(self.path(device)).map(drop)
    }

    /// What lets this user open a device that is closed to them.
    pub(super) fn cure_for_closed(&self, device: &str) -> String {
        let groups = self.read("/etc/group").unwrap_or_default();
        let metadata = std::fs::metadata(self.path(device));
        let opening = metadata.ok().and_then(|metadata| opening_group(&metadata, &groups));
        match opening {
            Some(group) => format!("join its group: `sudo usermod -aG {group} $USER`, then log in again"),
            None => format!("let this user open it: `sudo setfacl -m u:$USER:rw {device}`"),
        }
    }
}

/// The group whose members may open a device, unless that is root's own.
fn opening_group(metadata: &Metadata, groups: &str) -> Option<String> {
    const GROUP_READ_WRITE: u32 = 0o060;
    let opens = metadata.mode() & GROUP_READ_WRITE == GROUP_READ_WRITE && metadata.gid() != 0;
    opens.then(|| group_name(groups, metadata.gid())).flatten()
}

/// The name of a group in /etc/group (group(5)).
fn group_name(groups: &str, gid: u32) -> Option<String> {
    let gid = gid.to_string();
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == gid).then(|| name.to_owned())
    })
}

/// The version of Landlock's interface (landlock_create_ruleset(2)).
pub(super) fn landlock_version() -> io::Result<i64> {
    const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
    let nothing = ptr::null::<u8>();
    // SAFETY: with this flag the call takes no attributes, and only returns a number.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0_usize, LANDLOCK_CREATE_RULESET_VERSION) };
    if version < 0 { Err(io::Error::last_os_error()) } else { Ok(version) }
}

/// Whether io_uring may be used (io_uring_setup(2)).
pub(super) fn io_uring() -> io::Result<()> {
    // SAFETY: the null pointer for its parameters makes the call end with EFAULT where it is
    // allowed at all, before it makes anything.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1_u32, ptr::null::<u8>()) };
    let error = io::Error::last_os_error();
    if result < 0 && error.raw_os_error() != Some(libc::EFAULT) { Err(error) } else { Ok(()) }
}

/// Whether this user can make a user namespace; tried in a child, for there is no way back out.
pub(super) fn user_namespace() -> io::Result<()> {
    // SAFETY: the child calls nothing but the two system calls below, so it does not matter what
    // other threads held when it was forked.
    let child = unsafe { libc::fork() };
    match child {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: takes a number and changes this child alone.
            let result = unsafe { libc::unshare(libc::CLONE_NEWUSER) };
            let errno = if result == 0 { 0 } else { io::Error::last_os_error().raw_os_error().unwrap_or(libc::EPERM) };
            // SAFETY: ends the child at once, without the parent's clean-up.
            unsafe { libc::_exit(errno) }
        }
        child => {
            let mut status = 0;
            // SAFETY: `child` is ours and not yet waited for; `status` outlives the call.
            while unsafe { libc::waitpid(child, &raw mut status, 0) } < 0 {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            match libc::WEXITSTATUS(status) {
                0 if libc::WIFEXITED(status) => Ok(()),
                0 => Err(io::Error::from_raw_os_error(libc::EPERM)),
                errno => Err(io::Error::from_raw_os_error(errno)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_found_by_its_number() {
        let groups = "root:x:0:\nbroken\nkvm:x:106:ann,bob\nnetdev:x:107:";
        assert_eq!(group_name(groups, 106).as_deref(), Some("kvm"));
        assert_eq!(group_name(groups, 108), None);
    }

    #[test]
    fn a_device_that_no_group_opens_needs_an_access_list() {
        let root = tempfile::tempdir().expect("a folder");
        let system = System::at(root.path());
        assert!(system.cure_for_closed("/dev/kvm").contains("setfacl -m u:$USER:rw /dev/kvm"));
        assert_eq!(system.opens("/dev/kvm").expect_err("nothing").kind(), io::ErrorKind::NotFound);
    }
}
