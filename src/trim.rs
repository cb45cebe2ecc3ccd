//! Gives back the memory of what ran only once: the code that read the command line and loaded the kernel.
//!
//! Reading one page of a program maps sixteen of them, so after the start most of it is resident, and most of that
//! never runs again. Dropping those mappings costs one fault for each piece that does run again; the pages stay in the
//! page cache, where all machines share them.
#![allow(unsafe_code, reason = "madvise and dl_iterate_phdr have no safe form")]

use std::ffi::c_void;

const PAGE: u64 = 4096;

/// Drops the mappings of this program's code and constants.
pub(crate) fn drop_startup_pages() {
    // SAFETY: the callback is called with valid headers and keeps nothing of them.
    unsafe { libc::dl_iterate_phdr(Some(drop_segments), std::ptr::null_mut()) };
}

/// Drops the read-only segments of one loaded object; a static program is the only one.
extern "C" fn drop_segments(info: *mut libc::dl_phdr_info, _: usize, _: *mut c_void) -> libc::c_int {
    // SAFETY: the C library passes a valid description for the length of this call.
    let object = unsafe { &*info };
    // SAFETY: it says so of its own headers.
    let headers = unsafe { std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into()) };
    let read_only = |header: &&libc::Elf64_Phdr| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0;
    for header in headers.iter().filter(read_only) {
        let start = object.dlpi_addr + header.p_vaddr;
        let first = start / PAGE * PAGE;
        let length = usize::try_from(start + header.p_memsz - first).expect("a segment of this process");
        // SAFETY: the pages are clean copies of the file's, since nothing can write to them: the next access reads
        // them from there again. A failure leaves them where they are.
        unsafe { libc::madvise(first as *mut c_void, length, libc::MADV_DONTNEED) };
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_read_the_same_after_their_pages_were_dropped() {
        static TEXT: &str = "a constant that is nowhere else in this program";
        let before = TEXT.to_owned();
        drop_startup_pages();
        assert_eq!(TEXT, before);
    }
}
