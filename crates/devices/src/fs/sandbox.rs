//! What virtiofsd is confined to before it runs: it dies with us, makes no sockets, and sees the host's files read-only
//! where that was asked for, which no option of the C virtiofsd does.
//!
//! A filter keeps it from sockets, and no network namespace does, which the host takes some 14 ms to take apart again
//! (`threat-model.md`).
//!
//! It changes its root to the folder by itself, and gives up every right but those that have to do with files. An
//! ordinary user is root in a user namespace, where nobody but that user exists.
#![allow(unsafe_code, reason = "between fork and exec there are only system calls, which std does not offer")]

use std::ffi::CStr;
use std::io;
use std::mem::size_of;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::ptr::null;

const ROOT: &CStr = c"/";
/// The folder that a command was started in, whatever its name, and even when the C virtiofsd has left it.
pub(super) const FOLDER: &str = "/proc/self/fd/1/.";

/// Confines what `command` starts. Its standard output is [`FOLDER`].
pub(super) fn confine(command: &mut Command, readonly: bool) {
    let parent = std::process::id();
    // SAFETY: it only reads a number of the process's own.
    let user = unsafe { libc::geteuid() };
    // SAFETY: as above.
    let group = unsafe { libc::getegid() };
    let maps = (user != 0).then(|| (format!("0 {user} 1\n"), format!("0 {group} 1\n")));
    let enter = move || {
        let maps = maps.as_ref().map(|(users, groups)| (users.as_str(), groups.as_str()));
        enter(maps, readonly)?;
        keep_folder()?;
        forbid_sockets()?;
        die_with(parent)
    };
    // SAFETY: the closure makes system calls, on texts that were made before; it neither allocates nor takes a lock.
    unsafe { command.pre_exec(enter) };
}

fn enter(maps: Option<(&str, &str)>, readonly: bool) -> io::Result<()> {
    let user = if maps.is_some() { libc::CLONE_NEWUSER } else { 0 };
    // SAFETY: no memory is passed.
    check(unsafe { libc::unshare(user | libc::CLONE_NEWNS) })?;
    if let Some((users, groups)) = maps {
        std::fs::write("/proc/self/setgroups", "deny")?;
        std::fs::write("/proc/self/uid_map", users)?;
        std::fs::write("/proc/self/gid_map", groups)?;
    }
    if readonly {
        // What is mounted on the host from now on must not appear here: it would be writable.
        let private = libc::MS_REC | libc::MS_PRIVATE;
        // SAFETY: a C string that lives for ever; where no text is needed none is given.
        check(unsafe { libc::mount(null(), ROOT.as_ptr(), null(), private, null()) })?;
        make_readonly()?;
    }
    Ok(())
}

/// Every mount of this namespace, and the folder is on one of them.
fn make_readonly() -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the text and the attributes live across the call, and the length is theirs.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            ROOT.as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Opens the working directory as standard output. A descriptor from before would lead past this namespace's mounts,
/// and so past what makes them read-only.
fn keep_folder() -> io::Result<()> {
    // SAFETY: a C string that lives for ever.
    let folder = unsafe { libc::open(c".".as_ptr(), libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC) };
    check(folder)?;
    // SAFETY: no memory is passed; what was standard output is not used any more.
    check(unsafe { libc::dup2(folder, libc::STDOUT_FILENO) })
}

/// Offsets in `seccomp_data` (seccomp(2)).
const CALL: u32 = 0;
const ARCHITECTURE: u32 = 4;
/// `AUDIT_ARCH_X86_64`.
const X86_64: u32 = 0xc000_003e;
/// Numbers from here on are calls of the x32 ABI.
const X32: u32 = 0x4000_0000;

const fn load(offset: u32) -> libc::sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
}

const fn answer(action: u32) -> libc::sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, action)
}

#[expect(clippy::cast_possible_truncation, reason = "codes and numbers of calls are small")]
const fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

const INSTRUCTIONS: u16 = 9;

/// No socket but those that it has, and no ring by which to make one past this filter. It stays for all that virtiofsd becomes.
#[expect(clippy::cast_possible_truncation, reason = "codes and numbers of calls are small")]
static NO_SOCKETS: [libc::sock_filter; INSTRUCTIONS as usize] = [
    load(ARCHITECTURE),
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 6, X86_64),
    load(CALL),
    instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 4, 0, X32),
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 2, 0, libc::SYS_socket as u32),
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, 0, libc::SYS_io_uring_setup as u32),
    answer(libc::SECCOMP_RET_ALLOW),
    answer(libc::SECCOMP_RET_ERRNO | libc::EACCES as u32),
    answer(libc::SECCOMP_RET_KILL_PROCESS),
];

fn forbid_sockets() -> io::Result<()> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    let program = libc::sock_fprog { len: INSTRUCTIONS, filter: (&raw const NO_SOCKETS).cast_mut().cast() };
    // SAFETY: the kernel reads as many instructions as there are, which live for ever, and writes nothing.
    check(unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) })
}

/// A socket that closes ends virtiofsd, too, but only when it has done what it is at.
fn die_with(parent: u32) -> io::Result<()> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })?;
    // SAFETY: it only reads a number of the process's own.
    if unsafe { libc::getppid() }.cast_unsigned() == parent { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
