//! The filters on system calls (seccomp(2)): what they are made of is `resources/seccomp/policy.toml`, and [`enter`] has
//! one hold for a thread.
//!
//! A call that is in no filter raises SIGSYS. The handler writes one line that names the thread and the call, and ends the
//! process. Where violations are only to be reported, it makes the call in the thread's place, by the one instruction that
//! the filters then let everything pass from: the kernel's own log would not tell the thread, and a tracer would have to be
//! there all the time. Each call is then reported once, so that a guest cannot fill the log.
//!
//! Left out on purpose: any architecture but x86-64, and filters that other threads get (TSYNC): main's comes first.
#![allow(unsafe_code, reason = "filters and signal handlers are system calls, with no safe form")]

use std::arch::global_asm;
use std::io;
use std::mem::{offset_of, zeroed};
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use libc::{seccomp_data, sock_filter};

use crate::Mode;

mod policy {
    use libc::sock_filter;

    include!(concat!(env!("OUT_DIR"), "/filters.rs"));
}

/// What the handler does besides writing its line.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stop {
    pub(crate) mode: Mode,
    /// The process's exit code.
    pub(crate) code: i32,
    /// Called before the process ends, in the signal handler.
    pub(crate) last: fn(),
}

static STOP: OnceLock<Stop> = OnceLock::new();

/// What a system call that is stopped does. To be called once, before the first [`enter`].
pub(crate) fn prepare(stop: Stop) -> io::Result<()> {
    // The first holds for all machines of a process.
    let _ = STOP.set(stop);
    let handler: extern "C" fn(libc::c_int, *const libc::siginfo_t, *mut libc::c_void) = on_violation;
    // SAFETY: a sigaction is numbers and an optional function, for which zero is a value.
    let mut action: libc::sigaction = unsafe { zeroed() };
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the action lives across the call, and its handler does only what is allowed in one.
    check(unsafe { libc::sigaction(libc::SIGSYS, &raw const action, null_mut()) })
}

/// From now on no program that is run has more rights than this process.
pub(crate) fn no_new_privileges() -> io::Result<()> {
    // SAFETY: it takes numbers only.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
}

/// Has the filter for this kind of thread hold for the calling thread and all that it starts. Needs `no_new_privs`.
pub(crate) fn enter(kind: &str) -> io::Result<()> {
    let Some(stop) = STOP.get() else { return Ok(()) };
    let (_, filter) =
        policy::FILTERS.iter().find(|(thread, _)| *thread == kind).expect("a kind of thread of the policy");
    let mut program = before(stop.mode);
    program.extend_from_slice(filter);
    install(&program)
}

fn install(program: &[sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: the program and what it points to live across the call, which only reads them.
    check(unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) })
}

/// What stands before each filter: `clone3`, whose arguments no filter can see, is one that this kernel does not have; the C
/// library takes `clone` instead. Signals go to threads of this process, whose number no policy knows. And, in the handler that
/// only reports, everything passes.
fn before(mode: Mode) -> Vec<sock_filter> {
    let clone3 = u32::try_from(libc::SYS_clone3).expect("a small number");
    let no_such_call = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();
    let signal = u32::try_from(libc::SYS_tgkill).expect("a small number");
    let mut program = Vec::new();
    if mode == Mode::Report {
        let instruction = after_call().to_ne_bytes();
        let [low, high] = [0, 4].map(|at| instruction[at..].first_chunk().map_or(0, |word| u32::from_ne_bytes(*word)));
        let pointer = offset_of!(seccomp_data, instruction_pointer);
        program.extend([
            load(pointer),
            unless(low, 3),
            load(pointer + 4),
            unless(high, 1),
            give(libc::SECCOMP_RET_ALLOW),
        ]);
    }
    program.extend([load(offset_of!(seccomp_data, nr)), unless(clone3, 1), give(no_such_call)]);
    let trap = give(libc::SECCOMP_RET_TRAP);
    program.extend([unless(signal, 3), load(offset_of!(seccomp_data, args)), skip_if(std::process::id(), 1), trap]);
    program
}

fn load(offset: usize) -> sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, u32::try_from(offset).expect("a small structure"))
}

/// Goes on if what was loaded is `value`, else skips `count` instructions.
fn unless(value: u32, count: u8) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, count, value)
}

/// Skips `count` instructions if what was loaded is `value`, else goes on.
fn skip_if(value: u32, count: u8) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, count, 0, value)
}

fn give(action: u32) -> sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, action)
}

fn instruction(code: u32, if_true: u8, if_false: u8, operand: u32) -> sock_filter {
    let code = u16::try_from(code).expect("instruction codes have 16 bits");
    sock_filter { code, jt: if_true, jf: if_false, k: operand }
}

// A system call with its number and six arguments from a list. The filters know the address behind its instruction.
global_asm!(
    ".pushsection .text.vmm_sandbox_call, \"ax\", @progbits",
    ".globl vmm_sandbox_call",
    "vmm_sandbox_call:",
    "mov rax, [rdi]",
    "mov rsi, [rdi + 16]",
    "mov rdx, [rdi + 24]",
    "mov r10, [rdi + 32]",
    "mov r8, [rdi + 40]",
    "mov r9, [rdi + 48]",
    "mov rdi, [rdi + 8]",
    "syscall",
    ".globl vmm_sandbox_after_call",
    "vmm_sandbox_after_call:",
    "ret",
    ".popsection",
);

unsafe extern "C" {
    fn vmm_sandbox_call(list: *const [i64; 7]) -> i64;
    fn vmm_sandbox_after_call();
}

fn after_call() -> u64 {
    (vmm_sandbox_after_call as *const ()).addr() as u64
}

/// The handler. It may only load, compare and make system calls.
extern "C" fn on_violation(_signal: libc::c_int, _info: *const libc::siginfo_t, context: *mut libc::c_void) {
    let Some(stop) = STOP.get() else { return };
    // SAFETY: the kernel passes a valid context with SA_SIGINFO, which nobody else has.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let get = |register: libc::c_int| registers[usize::try_from(register).unwrap_or(0)];
    let call = get(libc::REG_RAX);
    if stop.mode != Mode::Report {
        report("stopped", call, CURE);
        (stop.last)();
        // SAFETY: it takes a number, and may be called in a handler.
        unsafe { libc::_exit(stop.code) }
    }
    if is_new(call) {
        report("would stop", call, "");
    }
    let arguments = [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX, libc::REG_R10, libc::REG_R8, libc::REG_R9].map(get);
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: it is the call that this thread was about to make, with its own arguments.
    let result = unsafe { vmm_sandbox_call(&[call, a, b, c, d, e, f]) };
    registers[usize::try_from(libc::REG_RAX).unwrap_or(0)] = result;
}

const CURE: &str =
    ": it never needs that; if it was not tampered with, tell its makers, and say --sandbox report meanwhile";

/// Whether a call has not been reported yet. Those with numbers that no kernel knows count as one.
fn is_new(call: i64) -> bool {
    static SEEN: [AtomicU64; 8] = [const { AtomicU64::new(0) }; 8];
    let number = usize::try_from(call).unwrap_or(usize::MAX).min(511);
    SEEN[number / 64].fetch_or(1 << (number % 64), Ordering::Relaxed) >> (number % 64) & 1 == 0
}

/// Writes the line with one call, so that no other line comes between its parts.
fn report(did: &str, call: i64, end: &str) {
    let mut thread = [0u8; 16];
    // SAFETY: the kernel writes 16 bytes at most, a zero among them.
    unsafe { libc::prctl(libc::PR_GET_NAME, thread.as_mut_ptr()) };
    let thread = thread.split(|byte| *byte == 0).next().unwrap_or_default();
    let mut digits = [0; 20];
    let number = decimal(call.unsigned_abs(), &mut digits);
    let name =
        usize::try_from(call).ok().and_then(|call| policy::NAMES.split(' ').nth(call)).filter(|name| !name.is_empty());
    let name = name.unwrap_or("that has no name");
    let words: [&[u8]; 10] = [
        b"vmm: the sandbox ",
        did.as_bytes(),
        b" thread ",
        thread,
        b" at system call ",
        name.as_bytes(),
        b" (",
        number,
        b")",
        end.as_bytes(),
    ];
    let mut line = [0; 400];
    let mut length = 0;
    for byte in words.into_iter().flatten().take(line.len() - 1).chain(b"\n") {
        // What was tampered with may have any name.
        line[length] = if byte.is_ascii_control() && *byte != b'\n' { b'?' } else { *byte };
        length += 1;
    }
    // SAFETY: the line is that long.
    unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), length) };
}

fn decimal(mut number: u64, digits: &mut [u8; 20]) -> &[u8] {
    let mut start = digits.len();
    loop {
        start -= 1;
        digits[start] = b"0123456789"[usize::try_from(number % 10).unwrap_or(0)];
        number /= 10;
        if number == 0 {
            return &digits[start..];
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
