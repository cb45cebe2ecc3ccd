//! The files that a process may open from here on (landlock(7)), and no TCP, where the host's Landlock knows of it.
//!
//! What is open stays open. Rules are for what there is: what a process makes is made in a folder that it may make it in.
//! Left out on purpose: connecting to Unix sockets, which no version so far can refuse by their path.
#![allow(unsafe_code, reason = "Landlock's system calls have no safe form")]

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::size_of_val;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::ptr::null;

/// `LANDLOCK_ACCESS_FS_…` (linux/landlock.h).
mod right {
    pub(super) const WRITE_FILE: u64 = 1 << 1;
    pub(super) const READ_FILE: u64 = 1 << 2;
    pub(super) const READ_DIR: u64 = 1 << 3;
    pub(super) const REMOVE_DIR: u64 = 1 << 4;
    pub(super) const REMOVE_FILE: u64 = 1 << 5;
    pub(super) const MAKE_DIR: u64 = 1 << 7;
    pub(super) const MAKE_REG: u64 = 1 << 8;
    pub(super) const MAKE_SOCK: u64 = 1 << 9;
    pub(super) const MAKE_SYM: u64 = 1 << 12;
    pub(super) const TRUNCATE: u64 = 1 << 14;
    pub(super) const IOCTL_DEV: u64 = 1 << 15;
    /// Those that a file can have; the others are a folder's.
    pub(super) const OF_FILES: u64 = 1 | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV;
}

/// What may be done with a path, or with all that is below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To read it.
    Read,
    /// To read and to write it.
    Write,
    /// To make, read, write and remove files and links in this folder.
    Make,
    /// To make sockets in this folder, and to remove what is there.
    Sockets,
    /// To remove folders from this folder.
    RemoveFolders,
}

impl Access {
    fn rights(self) -> u64 {
        use right::*;
        match self {
            Self::Read => READ_FILE | READ_DIR,
            Self::Write => Self::Read.rights() | WRITE_FILE | TRUNCATE | IOCTL_DEV,
            Self::Make => Self::Write.rights() | REMOVE_FILE | MAKE_REG | MAKE_SOCK | MAKE_SYM | MAKE_DIR,
            Self::Sockets => REMOVE_FILE | MAKE_SOCK | MAKE_SYM,
            Self::RemoveFolders => REMOVE_DIR,
        }
    }
}

/// `struct landlock_ruleset_attr`, of which older kernels know the beginning.
#[repr(C)]
struct Ruleset {
    files: u64,
    network: u64,
    scoped: u64,
}

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct Beneath {
    rights: u64,
    parent: i32,
}

const CREATE_VERSION: u32 = 1;
const RULE_PATH_BENEATH: u32 = 1;

/// Has the calling thread, and all that it starts, open nothing but `files`. One that is not there has no rule. Returns the
/// version of the host's Landlock. Needs `no_new_privs`.
pub(crate) fn enter(files: &[(PathBuf, Access)]) -> io::Result<u32> {
    let version = version()?;
    let (all, network, scoped) = handled(version);
    let attributes = Ruleset { files: all, network, scoped };
    let size = match version {
        0..4 => size_of_val(&attributes.files),
        4..6 => 2 * size_of_val(&attributes.files),
        _ => size_of_val(&attributes),
    };
    // SAFETY: the attributes live across the call, and are at least that long.
    let ruleset = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attributes, size, 0) };
    let ruleset = i32::try_from(check(ruleset)?).map_err(io::Error::other)?;
    // SAFETY: the descriptor was just made and nobody else has it.
    let ruleset = unsafe { OwnedFd::from_raw_fd(ruleset) };
    for (path, access) in files {
        let Ok(file) = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path) else { continue };
        allow(&ruleset, &file, access.rights() & all)?;
    }
    // SAFETY: it takes numbers only.
    check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) })?;
    Ok(version)
}

fn allow(ruleset: &OwnedFd, file: &File, rights: u64) -> io::Result<()> {
    let rights = if file.metadata()?.is_dir() { rights } else { rights & right::OF_FILES };
    if rights == 0 {
        return Ok(());
    }
    let rule = Beneath { rights, parent: file.as_raw_fd() };
    let rule = &raw const rule;
    // SAFETY: the rule lives across the call, and its kind is the one that is named.
    let added = unsafe { libc::syscall(libc::SYS_landlock_add_rule, ruleset.as_raw_fd(), RULE_PATH_BENEATH, rule, 0) };
    check(added).map(drop)
}

/// What a version can forbid: of files, of TCP, and of other processes (their signals and abstract sockets).
fn handled(version: u32) -> (u64, u64, u64) {
    let files = match version {
        1 => 13,
        2 => 14,
        3..5 => 15,
        _ => 16,
    };
    ((1 << files) - 1, if version >= 4 { 3 } else { 0 }, if version >= 6 { 3 } else { 0 })
}

/// The version of the host's Landlock.
pub(crate) fn version() -> io::Result<u32> {
    let nothing = null::<u8>();
    // SAFETY: with this flag the call takes no attributes, and only returns a number.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0usize, CREATE_VERSION) };
    u32::try_from(check(version)?).map_err(io::Error::other)
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
