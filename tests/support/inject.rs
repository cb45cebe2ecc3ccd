//! Has a thread of a running `vmm` make a system call, as somebody would who has taken it over (ptrace(2)). It is the
//! program that is shipped, and whatever confines it.
#![allow(unsafe_code, reason = "ptrace has no safe form")]

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::ptr::null_mut;

use super::process::Running;
use super::until;

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Made {
    /// It gave this.
    Result(i64),
    /// A signal came instead, which the thread has got: SIGSYS from a filter.
    Signal(i32),
}

/// Has the thread called `thread` make the call `number`. Where an argument is `None` it is the address of `text`. Where the
/// call is made, the thread goes on as if nothing had been.
pub(crate) fn call(vmm: &Running, thread: &str, number: i64, arguments: &[Option<u64>], text: &CStr) -> Made {
    let thread = thread_id(vmm, thread);
    let memory = fs::File::options().read(true).write(true).open(format!("/proc/{thread}/mem")).expect("it runs");
    // SAFETY: registers are numbers, for which zero is a value.
    let mut before: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    until("the thread is in a system call", || {
        stop(thread);
        ptrace(libc::PTRACE_GETREGS, thread, (&raw mut before).cast());
        let mut last = [0; 2];
        memory.read_exact_at(&mut last, before.rip - 2).expect("it is the thread's code");
        let is_in_call = last == SYSCALL;
        if !is_in_call {
            ptrace(libc::PTRACE_DETACH, thread, null_mut());
        }
        is_in_call
    });
    // Below the stack pointer and its red zone nothing is kept.
    let place = before.rsp - 4096;
    memory.write_all_at(text.to_bytes_with_nul(), place).expect("it is the thread's stack");
    let argument = |index: usize| arguments.get(index).map_or(0, |argument| argument.unwrap_or(place));
    let [rdi, rsi, rdx, r10, r8, r9] = [0, 1, 2, 3, 4, 5].map(argument);
    let (rip, rax, orig_rax) = (before.rip - 2, number.cast_unsigned(), u64::MAX);
    let mut injected = libc::user_regs_struct { rip, rax, orig_rax, rdi, rsi, rdx, r10, r8, r9, ..before };
    ptrace(libc::PTRACE_SETREGS, thread, (&raw mut injected).cast());
    ptrace(libc::PTRACE_SINGLESTEP, thread, null_mut());
    match wait(thread).0 {
        libc::SIGTRAP => {
            ptrace(libc::PTRACE_GETREGS, thread, (&raw mut injected).cast());
            ptrace(libc::PTRACE_SETREGS, thread, (&raw mut before).cast());
            ptrace(libc::PTRACE_DETACH, thread, null_mut());
            Made::Result(injected.rax.cast_signed())
        }
        signal => {
            // The step may have its own signal behind this one, which is for us.
            if is_pending(thread, libc::SIGTRAP) {
                ptrace(libc::PTRACE_CONT, thread, number_as_pointer(signal));
                assert_eq!(wait(thread).0, libc::SIGTRAP);
                ptrace(libc::PTRACE_DETACH, thread, null_mut());
            } else {
                ptrace(libc::PTRACE_DETACH, thread, number_as_pointer(signal));
            }
            Made::Signal(signal)
        }
    }
}

/// The instruction.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// Stops a thread where it is. Signals that are on their way to it come first.
fn stop(thread: i32) {
    ptrace(libc::PTRACE_SEIZE, thread, null_mut());
    ptrace(libc::PTRACE_INTERRUPT, thread, null_mut());
    loop {
        match wait(thread) {
            (_, libc::PTRACE_EVENT_STOP) => return,
            (signal, _) => ptrace(libc::PTRACE_CONT, thread, number_as_pointer(signal)),
        }
    }
}

fn is_pending(thread: i32, signal: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).expect("it is traced");
    let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:")).expect("it has signals");
    u64::from_str_radix(pending.trim(), 16).expect("a mask") >> (signal - 1) & 1 == 1
}

fn number_as_pointer(number: i32) -> *mut libc::c_void {
    std::ptr::without_provenance_mut(usize::try_from(number).expect("a signal"))
}

fn thread_id(vmm: &Running, name: &str) -> i32 {
    let tasks = fs::read_dir(format!("/proc/{}/task", vmm.pid().as_raw_nonzero())).expect("it runs");
    let mut tasks = tasks.map(|task| task.expect("it runs").path());
    let found = tasks.find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name));
    let found = found.unwrap_or_else(|| panic!("vmm has no thread {name}"));
    found.file_name().and_then(|id| id.to_str()).and_then(|id| id.parse().ok()).expect("a number")
}

fn ptrace(request: libc::c_uint, thread: i32, data: *mut libc::c_void) {
    // SAFETY: what `data` leads to is what the request reads or writes, and lives across the call.
    let result = unsafe { libc::ptrace(request, thread, null_mut::<libc::c_void>(), data) };
    assert!(result != -1, "ptrace request {request}: {}", io::Error::last_os_error());
}

/// Waits until a traced thread stops. Returns the signal that it stops for, and the event.
fn wait(thread: i32) -> (i32, i32) {
    let mut status = 0;
    // SAFETY: the status lives across the call.
    let waited = unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) };
    assert_eq!(waited, thread, "{}", io::Error::last_os_error());
    assert!(libc::WIFSTOPPED(status), "the thread has ended: {status:#x}");
    (libc::WSTOPSIG(status), status >> 16)
}
