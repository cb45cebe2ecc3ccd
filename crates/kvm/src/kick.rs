//! Gets a virtual processor out of the guest, from another thread, without losing a kick.
//!
//! KVM_RUN returns at once when `immediate_exit` is set in the shared `kvm_run` page, and returns
//! with EINTR when a signal arrives. The kicker sets the flag and then sends the signal: whether
//! the processor is about to enter the guest or already in it, it comes out. It clears the flag
//! itself before it looks at why it was kicked (KVM API, 5, `immediate_exit`).
#![allow(unsafe_code, reason = "the page is shared with the kernel, and signals have no safe form")]

use std::io;
use std::os::fd::RawFd;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::exit::Exit;

/// The `kvm_run` page of one processor, mapped a second time so that it outlives the first.
#[derive(Debug)]
pub(crate) struct RunPage {
    address: *mut kvm_run,
    length: usize,
}

// SAFETY: the only accesses are to one byte, atomically, and to fields of the last exit, which
// only the processor's own thread asks for.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    pub(crate) fn map(vcpu: RawFd, length: usize) -> io::Result<Arc<Self>> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping of KVM's own page at an address of the kernel's choice.
        let address = unsafe { libc::mmap(null_mut(), length, protection, libc::MAP_SHARED, vcpu, 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Arc::new(Self { address: address.cast(), length }))
    }

    pub(crate) fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the page is mapped for as long as `self`, and the field is one aligned byte.
        let byte = unsafe { &raw mut (*self.address).immediate_exit };
        // SAFETY: nobody but the kernel and this module touches the byte.
        unsafe { AtomicU8::from_ptr(byte) }
    }

    /// Bytes of one element of the port access that KVM_RUN just returned for.
    pub(crate) fn port_width(&self) -> u8 {
        // SAFETY: the page is mapped, and the field lies in it.
        let field = unsafe { &raw const (*self.address).__bindgen_anon_1.io.size };
        // SAFETY: it is one byte, which the kernel wrote before KVM_RUN returned, on this thread.
        unsafe { field.read_volatile() }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no reference into it outlives `self`.
        unsafe { libc::munmap(self.address.cast(), self.length) };
    }
}

/// Kicks one processor out of the guest.
#[derive(Clone, Debug)]
pub struct Kicker {
    page: Arc<RunPage>,
}

impl Kicker {
    pub(crate) fn new(page: Arc<RunPage>) -> Self {
        Self { page }
    }

    /// Makes the processor that `thread` runs leave the guest. What it is to do then has been
    /// stored where it will look.
    pub fn kick<T>(&self, thread: &std::thread::JoinHandle<T>) {
        self.page.immediate_exit().store(1, Ordering::SeqCst);
        // A thread that has ended needs no kick, and says so.
        let _ = thread.kill(SIGRTMIN());
    }
}

impl RunPage {
    /// Takes the kick back, on the processor's thread and before that looks at its orders.
    pub(crate) fn kicked(&self) -> Exit<'static> {
        self.immediate_exit().store(0, Ordering::SeqCst);
        Exit::Kicked
    }
}

/// Installs the handler of the signal that [`Kicker::kick`] sends. It does nothing: that a signal
/// is handled at all is what makes KVM_RUN return.
pub fn install_kick_handler() -> anyhow::Result<()> {
    extern "C" fn handler(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), handler)
        .map_err(|error| anyhow::anyhow!("Cannot handle the signal that stops processors: {error}"))
}
