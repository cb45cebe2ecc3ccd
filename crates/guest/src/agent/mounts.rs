//! What is mounted: what every program expects, what the host wants, and the root that all of it ends up in.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use guest::request::{Mount, MountFlag};
use rustix::fs::Access;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_move, mount_remount, unmount};

use super::log;
use super::root::{Root, path_of};

/// Where the new root is mounted.
const NEW_ROOT: &str = "/newroot";

/// Target, file system, options; in this order. All of them are moved to the new root.
const SYSTEM: [(&str, &str, &str); 6] = [
    ("/proc", "proc", ""),
    ("/sys", "sysfs", ""),
    ("/dev", "devtmpfs", "mode=755"),
    ("/dev/pts", "devpts", "mode=620,gid=5,ptmxmode=666"),
    ("/dev/shm", "tmpfs", "mode=1777"),
    ("/run", "tmpfs", "mode=755"),
];

/// Those of [`SYSTEM`] that take the others along when they are moved. `/proc` is needed to the last.
const MOVED: [&str; 4] = ["/sys", "/dev", "/run", "/proc"];

/// Links in `/dev` that shells and others expect.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Mounts what every program expects.
///
/// # Errors
///
/// A sentence that names what could not be mounted.
pub(crate) fn system() -> Result<(), String> {
    for (target, fstype, data) in SYSTEM {
        let flags = match target {
            "/proc" | "/sys" => MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
            "/dev" | "/dev/pts" => MountFlags::NOSUID | MountFlags::NOEXEC,
            _ => MountFlags::NOSUID | MountFlags::NODEV,
        };
        let made = fs::create_dir_all(target).and_then(|()| mount_at(fstype, Path::new(target), fstype, flags, data));
        match made {
            // The kernel mounts /dev itself if it was built so.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            made => made.map_err(|error| format!("Cannot mount {fstype} at {target}: {error}"))?,
        }
    }
    for (target, link) in LINKS {
        // One that is there already is as good.
        let _ = symlink(target, link);
    }
    Ok(())
}

/// Mounts what the host wants. Returns whether there is a new root among it.
///
/// # Errors
///
/// A sentence that names what could not be mounted.
pub(crate) fn all(mounts: &[Mount]) -> Result<bool, String> {
    for wanted in mounts {
        one(wanted).map_err(|error| {
            let Mount { source, target, fstype, .. } = wanted;
            format!("Cannot mount {source} at {target} ({fstype}): {error}")
        })?;
    }
    Ok(mounts.iter().any(|mount| mount.target == NEW_ROOT))
}

fn one(wanted: &Mount) -> io::Result<()> {
    let has = |flag| wanted.flags.contains(&flag);
    let mut flags = MountFlags::empty();
    for (flag, bit) in [
        (MountFlag::Ro, MountFlags::RDONLY),
        (MountFlag::Nosuid, MountFlags::NOSUID),
        (MountFlag::Nodev, MountFlags::NODEV),
        (MountFlag::Noexec, MountFlags::NOEXEC),
    ] {
        flags.set(bit, has(flag));
    }
    if !has(MountFlag::Bind) {
        for option in wanted.data.split(',').filter(|_| wanted.fstype == "overlay") {
            if let Some(("upperdir" | "workdir", folder)) = option.split_once('=') {
                fs::create_dir_all(folder)?;
            }
        }
        let target = place(&wanted.target, true)?;
        return mount_at(&wanted.source, &path_of(&target), &wanted.fstype, flags, &wanted.data);
    }
    let source = match in_new_root(&wanted.source) {
        Some(path) => path_of(&Root::open(Path::new(NEW_ROOT))?.find(path)?),
        None => PathBuf::from(&wanted.source),
    };
    let target = place(&wanted.target, fs::metadata(&source)?.is_dir())?;
    mount_bind(&source, path_of(&target))?;
    if flags.is_empty() {
        return Ok(());
    }
    // What was opened before is below what is there now.
    let target = place(&wanted.target, true)?;
    Ok(mount_remount(path_of(&target), MountFlags::BIND | flags, "")?)
}

/// Opens the place of a mount, which is made where it is missing.
fn place(target: &str, is_folder: bool) -> io::Result<std::os::fd::OwnedFd> {
    let (root, path) = match in_new_root(target) {
        Some(path) => {
            fs::create_dir_all(NEW_ROOT)?;
            (Root::open(Path::new(NEW_ROOT))?, path)
        }
        None => (Root::open(Path::new("/"))?, Path::new(target)),
    };
    if is_folder { root.folder(path) } else { root.file(path) }
}

/// The rest of a path in the new root.
fn in_new_root(path: &str) -> Option<&Path> {
    Path::new(path).strip_prefix(NEW_ROOT).ok()
}

fn mount_at(source: &str, target: &Path, fstype: &str, flags: MountFlags, data: &str) -> io::Result<()> {
    let data = CString::new(data)?;
    Ok(mount(source, target, fstype, flags, data.as_c_str())?)
}

/// Makes the new root the root of this process, and so of all to come.
///
/// # Errors
///
/// A sentence that says what is missing.
pub(crate) fn enter_new_root() -> Result<(), String> {
    let root = Root::open(Path::new(NEW_ROOT)).map_err(|error| format!("Cannot open the new root: {error}"))?;
    for target in MOVED {
        let moved = root.folder(Path::new(target)).and_then(|place| Ok(mount_move(target, path_of(&place))?));
        moved.map_err(|error| format!("Cannot move {target} to the new root, which needs a folder for it: {error}"))?;
    }
    let enter = || -> io::Result<()> {
        std::env::set_current_dir(NEW_ROOT)?;
        mount_move(".", "/")?;
        rustix::process::chroot(".")?;
        std::env::set_current_dir("/")
    };
    enter().map_err(|error| format!("Cannot make the new root the root: {error}"))?;
    if let Err(error) = make_tmp() {
        log(&format!("/tmp cannot be written to: {error}"));
    }
    Ok(())
}

/// Sees to it that programs can write to `/tmp`.
fn make_tmp() -> io::Result<()> {
    match fs::create_dir("/tmp") {
        Ok(()) => return fs::set_permissions("/tmp", fs::Permissions::from_mode(0o1777)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    match rustix::fs::access("/tmp", Access::WRITE_OK) {
        Err(rustix::io::Errno::ROFS) => {
            mount_at("tmpfs", Path::new("/tmp"), "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, "mode=1777")
        }
        found => Ok(found?),
    }
}

/// Unmounts what nobody uses any more, and makes the rest read-only, so that nothing is lost.
pub(crate) fn unmount_all() {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let targets: Vec<String> = mounts.lines().filter_map(|line| line.split(' ').nth(1).map(unescape)).collect();
    for target in targets.iter().rev() {
        if unmount(target.as_str(), UnmountFlags::empty()).is_err() {
            let _ = mount_remount(target.as_str(), MountFlags::RDONLY, "");
        }
    }
}

/// A path of `/proc/self/mounts`, in which white space stands as an octal number (`\040`).
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut result = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if byte.is_ascii() => {
                result.push(byte.into());
                result.push_str(&part[3..]);
            }
            _ => {
                result.push('\\');
                result.push_str(part);
            }
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_in_the_list_of_mounts_are_read_as_they_are() {
        assert_eq!(unescape("/mnt/a\\040b\\134c"), "/mnt/a b\\c");
        assert_eq!(unescape("/plain"), "/plain");
        assert_eq!(unescape("/odd\\9é\\04"), "/odd\\9é\\04");
    }

    #[test]
    fn only_what_is_below_the_new_root_is_in_it() {
        assert_eq!(in_new_root("/newroot"), Some(Path::new("")));
        assert_eq!(in_new_root("/newroot/etc/x"), Some(Path::new("etc/x")));
        assert_eq!(in_new_root("/newroots"), None);
        assert_eq!(in_new_root("/lower"), None);
    }
}
