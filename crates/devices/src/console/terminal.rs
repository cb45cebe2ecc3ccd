//! The terminal that the VM was started from: raw while its keys go to the guest, and put back on every way out.
//!
//! Ways out are: dropping [`Terminal`], `exit`, a panic, and every signal that ends a process and can be caught. Only
//! SIGKILL leaves a raw terminal behind (`stty sane` mends it). Output modes stay as they are, so that our own messages
//! look right on the same screen.
//!
//! Job control: nothing is changed or read while the process is in the background, as the terminal is the shell's then.
//! A lock on the open terminal keeps a second VM from taking the keys away from the first.
#![allow(unsafe_code, reason = "signal handlers, and what a signal handler may call")]

use std::fs::File;
use std::mem::zeroed;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Once, OnceLock};

use anyhow::Context as _;

use super::channel::Channel;
use super::sys;

/// A terminal on standard input.
pub(super) struct Terminal {
    file: File,
    /// The open file is ours alone, so a lock on it ends with this process.
    lockable: bool,
    /// The modes from before, while it is raw.
    before: Option<libc::termios>,
    warned: bool,
}

impl Terminal {
    /// Prepares to use the terminal that `input` reads. It becomes raw by [`Self::claim`].
    pub(super) fn new(input: &Channel) -> anyhow::Result<Self> {
        let file = input.file().try_clone().context("Cannot duplicate the terminal's descriptor")?;
        // In the background, reading the terminal or changing it fails from now on, and does not stop the whole VM.
        sys::ignore_signal(libc::SIGTTIN);
        sys::ignore_signal(libc::SIGTTOU);
        Ok(Self { file, lockable: input.is_own(), before: None, warned: false })
    }

    /// Columns and rows, if it says so.
    pub(super) fn size(&self) -> Option<(u16, u16)> {
        sys::window_size(self.file.as_fd())
    }

    /// Whether keys go to the guest.
    pub(super) fn is_raw(&self) -> bool {
        self.before.is_some()
    }

    /// Makes the terminal raw, or raw again, if it is ours to use now. Returns whether it is.
    pub(super) fn claim(&mut self) -> bool {
        if !sys::in_foreground(self.file.as_fd()) {
            self.forget();
            return false;
        }
        if self.before.is_none() {
            if self.lockable && matches!(self.file.try_lock(), Err(std::fs::TryLockError::WouldBlock)) {
                self.warn_once("Another VM has this terminal's keys: they do not reach this guest until that one ends");
                return false;
            }
            self.before = sys::modes(self.file.as_fd()).ok();
        }
        let Some(before) = self.before else { return false };
        restore_at_every_end();
        // A signal handler may look at this at any time, so it is never freed: a few bytes for each SIGCONT.
        let saved = Box::leak(Box::new(Saved { terminal: self.file.as_raw_fd(), modes: before }));
        SAVED.store(saved, Ordering::Release);
        if let Err(error) = sys::set_modes(self.file.as_fd(), &raw(&before)) {
            self.warn_once(&format!("Cannot make the terminal raw: {error}"));
            self.forget();
        }
        self.is_raw()
    }

    fn warn_once(&mut self, warning: &str) {
        if !std::mem::replace(&mut self.warned, true) {
            log::warn!("{warning}");
        }
    }

    /// Whether the keys belong to another process now.
    pub(super) fn lost_foreground(&self) -> bool {
        !sys::in_foreground(self.file.as_fd())
    }

    /// Puts the terminal back.
    pub(super) fn release(&mut self) {
        if self.before.is_some() {
            restore();
            self.forget();
        }
    }

    /// Leaves the terminal as it is: it is not ours any more.
    pub(super) fn forget(&mut self) {
        if self.before.take().is_some() {
            SAVED.store(std::ptr::null_mut(), Ordering::Release);
            if self.lockable {
                // Nothing follows from an error: the lock ends with the descriptor.
                let _ = self.file.unlock();
            }
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.release();
    }
}

/// Modes under which every byte passes at once and unchanged on its way in.
pub(super) fn raw(modes: &libc::termios) -> libc::termios {
    let mut raw = *modes;
    raw.c_iflag &= !(libc::IGNBRK | libc::BRKINT | libc::PARMRK | libc::ISTRIP);
    raw.c_iflag &= !(libc::INLCR | libc::IGNCR | libc::ICRNL | libc::IXON);
    raw.c_lflag &= !(libc::ECHO | libc::ECHONL | libc::ICANON | libc::ISIG | libc::IEXTEN);
    raw.c_cflag = raw.c_cflag & !(libc::CSIZE | libc::PARENB) | libc::CS8;
    raw.c_cc[libc::VMIN] = 1;
    raw.c_cc[libc::VTIME] = 0;
    raw
}

/// What the handlers put back. Null while there is nothing to do.
static SAVED: AtomicPtr<Saved> = AtomicPtr::new(std::ptr::null_mut());

struct Saved {
    terminal: RawFd,
    modes: libc::termios,
}

/// Signals that end a process unless they are caught, as far as they are sent by others or by our own faults.
const FATAL: [libc::c_int; 13] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGABRT,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGSEGV,
    libc::SIGSYS,
    libc::SIGTERM,
    libc::SIGXCPU,
    libc::SIGXFSZ,
];

/// What std does on a fault, which is to report a stack overflow.
static ON_FAULT: OnceLock<Vec<(libc::c_int, libc::sigaction)>> = OnceLock::new();

/// Puts the terminal back. It may run in a signal handler, so it only loads, compares and makes system calls.
pub fn restore() {
    // SAFETY: the pointer is null, or leads to a Saved that is never freed.
    let saved = unsafe { SAVED.load(Ordering::Acquire).as_ref() };
    if let Some(saved) = saved {
        // SAFETY: while SAVED is set, its owner keeps the descriptor open.
        let terminal = unsafe { BorrowedFd::borrow_raw(saved.terminal) };
        // In the background the shell has set what it needs.
        if sys::in_foreground(terminal) {
            // There is nobody to tell about an error, and the process ends.
            let _ = sys::set_modes(terminal, &saved.modes);
        }
    }
}

fn restore_at_every_end() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore();
            hook(panic);
        }));
        // SAFETY: the function has the type that atexit wants, and is always there.
        unsafe { libc::atexit(at_exit) };
        let replaced = FATAL.iter().filter_map(|signal| catch(*signal)).collect();
        // The only setter is this one.
        let _ = ON_FAULT.set(replaced);
    });
}

/// Catches `signal`, unless it is ignored or somebody catches it already. Returns what std did about a fault.
fn catch(signal: libc::c_int) -> Option<(libc::c_int, libc::sigaction)> {
    // SAFETY: a sigaction is numbers and an optional function, for which zero is a value.
    let (mut action, mut before): (libc::sigaction, libc::sigaction) = unsafe { zeroed() };
    // SAFETY: `before` lives across the call, which changes nothing.
    unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut before) };
    let faults_of_std = [libc::SIGSEGV, libc::SIGBUS].contains(&signal) && before.sa_sigaction != libc::SIG_IGN;
    if before.sa_sigaction != libc::SIG_DFL && !faults_of_std {
        return None;
    }
    let handler: extern "C" fn(libc::c_int, *const libc::siginfo_t, *const libc::c_void) = on_fatal_signal;
    action.sa_sigaction = handler as libc::sighandler_t;
    // Std gives each thread a second stack, on which the handler runs even when the first has overflowed.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the action lives across the call, and its handler does only what is allowed in one.
    unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
    faults_of_std.then_some((signal, before))
}

extern "C" fn at_exit() {
    restore();
}

extern "C" fn on_fatal_signal(signal: libc::c_int, info: *const libc::siginfo_t, _context: *const libc::c_void) {
    restore();
    // SAFETY: the kernel passes a valid siginfo with SA_SIGINFO.
    let raised_by_kernel = unsafe { &*info }.si_code > 0;
    let before = ON_FAULT.get().and_then(|all| all.iter().find(|(other, _)| *other == signal));
    if let Some((_, before)) = before.filter(|_| raised_by_kernel) {
        // The faulting instruction runs again when this returns, now into std's own handler.
        // SAFETY: the action came from sigaction and lives across the call.
        unsafe { libc::sigaction(signal, before, std::ptr::null_mut()) };
        return;
    }
    // SAFETY: no handler is installed, and both calls are allowed in one.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
    // It waits until this handler returns, and ends the process then.
    // SAFETY: no memory is passed.
    unsafe { libc::raise(signal) };
}

#[cfg(test)]
mod tests;
