//! A KVM that says of one capability that it lacks it: seccomp(2) answers in its place.
#![allow(unsafe_code, reason = "a filter has to be installed between fork and exec")]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// `KVM_CHECK_EXTENSION` (linux/kvm.h).
const CHECK_EXTENSION: u32 = 0xae03;

/// Where a filter finds the system call and the low halves of its second and third argument (`struct seccomp_data`).
const CALL: u32 = 0;
const REQUEST: u32 = 24;
const ARGUMENT: u32 = 32;

/// Has every `KVM_CHECK_EXTENSION` for `capability` that the command makes return 0.
pub(crate) fn hide_capability(command: &mut Command, capability: u32) {
    let ioctl = u32::try_from(libc::SYS_ioctl).expect("a small number");
    let filter = [
        load(CALL),
        skip_unless(ioctl, 5),
        load(REQUEST),
        skip_unless(CHECK_EXTENSION, 3),
        load(ARGUMENT),
        skip_unless(capability, 1),
        // Error number 0: the call returns 0.
        instruction(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ERRNO),
        instruction(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    // SAFETY: between fork and exec the closure makes only two system calls, and it allocates nothing.
    unsafe { command.pre_exec(move || install(&filter)) };
}

fn install(filter: &[libc::sock_filter]) -> io::Result<()> {
    let length = u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len: length, filter: filter.as_ptr().cast_mut() };
    // SAFETY: this prctl takes numbers only.
    let no_new_privileges = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    // SAFETY: the program and what it points to are valid for the call, which only reads them.
    let installed = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    if no_new_privileges == 0 && installed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn load(offset: u32) -> libc::sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, offset)
}

/// Goes on with the next instruction if what was loaded is `value`, else skips `count` of them.
fn skip_unless(value: u32, count: u8) -> libc::sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, count, value)
}

fn instruction(code: u32, if_false: u8, operand: u32) -> libc::sock_filter {
    let code = u16::try_from(code).expect("instruction codes have 16 bits");
    libc::sock_filter { code, jt: 0, jf: if_false, k: operand }
}
