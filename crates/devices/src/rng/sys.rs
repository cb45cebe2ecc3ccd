//! The system call behind the entropy device.
#![allow(unsafe_code, reason = "std has no random bytes, and none that go straight to guest memory")]

use std::io;

use virtio::{Chain, GuestFault};

/// Waits for the host's first entropy.
pub(super) fn wait_for_entropy() -> io::Result<()> {
    let mut byte = [0u8];
    loop {
        // SAFETY: the pointer and the length are one array's.
        let n = unsafe { libc::getrandom(byte.as_mut_ptr().cast(), byte.len(), 0) };
        if n > 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Fills the first `length` bytes of the chain's room. Returns how many were filled: fewer only if the host fails, and
/// then the error is the thread's last.
pub(super) fn fill(chain: &mut Chain, length: usize) -> Result<usize, GuestFault> {
    let mut filled = 0;
    for piece in chain.writable_range(0..length)? {
        let mut done = 0;
        while done < piece.len() {
            let (to, left) = (piece.address().wrapping_add(done), piece.len() - done);
            // SAFETY: the piece is guest memory, mapped for as long as the chain exists and in no Rust object, and the
            // rest of it has `left` bytes.
            let n = unsafe { libc::getrandom(to.cast(), left, 0) };
            match usize::try_from(n) {
                Ok(n) => done += n,
                // Requests of more than 256 bytes can be interrupted by a signal.
                Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Ok(filled + done),
            }
        }
        filled += done;
    }
    Ok(filled)
}
