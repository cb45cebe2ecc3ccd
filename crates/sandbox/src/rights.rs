//! The rights of the process over the host: capabilities (capabilities(7)) and resource limits (setrlimit(2)).
#![allow(unsafe_code, reason = "capset, prctl and setrlimit have no safe form")]

use std::io;

/// `_LINUX_CAPABILITY_VERSION_3`.
const VERSION: u32 = 0x2008_0522;
/// More than any kernel has.
const MOST_CAPABILITIES: libc::c_ulong = 64;

/// `struct __user_cap_header_struct`.
#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// `struct __user_cap_data_struct`, which stands twice: for the low and the high half.
#[repr(C)]
#[derive(Clone, Copy)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// `CAP_NET_ADMIN`, which opens and makes taps.
const NET_ADMIN: u32 = 12;

/// Gives up all capabilities, for good: what is run later has none either. With `keep_network`, this process itself keeps
/// the one over interfaces, if it has it.
pub(crate) fn drop_capabilities(keep_network: bool) -> io::Result<()> {
    let mut header = Header { version: VERSION, pid: 0 };
    let mut data = [Data { effective: 0, permitted: 0, inheritable: 0 }; 2];
    // SAFETY: both live across the call, and have the layout of this version.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) })?;
    for capability in 0..MOST_CAPABILITIES {
        // The first that the kernel does not have is an error, and so is any for who may not; nothing is lost by that,
        // since without new privileges the set that this bounds has no use.
        // SAFETY: it takes numbers only.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } == -1 {
            break;
        }
    }
    // SAFETY: it takes numbers only. Kernels before 4.3 have no ambient capabilities, and fail harmlessly.
    unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) };
    let kept = if keep_network { data[0].permitted & 1 << NET_ADMIN } else { 0 };
    let data = [
        Data { effective: kept, permitted: kept, inheritable: 0 },
        Data { effective: 0, permitted: 0, inheritable: 0 },
    ];
    // SAFETY: both live across the call, and have the layout of this version.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })
}

/// No core, which would hold the guest's memory, and no processes beside the threads there are, by this process's doing.
pub(crate) fn limit_resources() -> io::Result<()> {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit lives across the call.
    check(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) }.into())
}

/// Has all threads share one heap, which the data path takes nothing from. For more than one the C library opens files: when
/// a thread asks for the ninth, to count the host's processors, and when one becomes smaller, to learn how memory is
/// overcommitted.
pub(crate) fn share_heap() {
    // SAFETY: it takes numbers, and this is the only thread. If it fails, a machine with many threads is stopped.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
