//! Gives back the memory of what ran only once: the code that read the command line and loaded the kernel, and the stack
//! that it needed.
//!
//! Reading one page of a program maps sixteen of them, so after the start most of it is resident, and most of that
//! never runs again. Dropping those mappings costs one fault for each piece that does run again; the pages stay in the
//! page cache, where all machines share them.
#![allow(unsafe_code, reason = "madvise and dl_iterate_phdr have no safe form")]

use std::ffi::c_void;

const PAGE: usize = 4096;

/// How far below the caller's frame the stack is kept: more than what is called from here needs.
const KEPT_STACK: usize = 16 << 10;
/// How much of the stack below that is dropped. Linux keeps a MiB below a stack free of other mappings.
const DROPPED_STACK: usize = 256 << 10;

/// Drops the mappings of this program's code and constants, and the main thread's stack below the caller. It is to be
/// called on the main thread, or on one whose stack has room for what is dropped.
pub(crate) fn drop_startup_pages() {
    // SAFETY: it takes a number; only free memory of the heap is given back, which all threads share.
    unsafe { libc::malloc_trim(0) };
    // SAFETY: the callback is called with valid headers and keeps nothing of them.
    unsafe { libc::dl_iterate_phdr(Some(drop_segments), std::ptr::null_mut()) };
    drop_unused_stack();
}

#[inline(never)]
fn drop_unused_stack() {
    let frame = 0u8;
    let end = (&raw const frame).addr().saturating_sub(KEPT_STACK) / PAGE * PAGE;
    let start = end.saturating_sub(DROPPED_STACK);
    // SAFETY: below the stack pointer nothing is kept, and signal handlers that run later find zeros there. What of the
    // range is not mapped is left out, and makes the call fail at no harm.
    unsafe { libc::madvise(start as *mut c_void, end - start, libc::MADV_DONTNEED) };
}

/// Drops the read-only segments of one loaded object; a static program is the only one.
extern "C" fn drop_segments(info: *mut libc::dl_phdr_info, _: usize, _: *mut c_void) -> libc::c_int {
    // SAFETY: the C library passes a valid description for the length of this call.
    let object = unsafe { &*info };
    // SAFETY: it says so of its own headers.
    let headers = unsafe { std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into()) };
    let read_only = |header: &&libc::Elf64_Phdr| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0;
    for header in headers.iter().filter(read_only) {
        let inside = |address: u64| usize::try_from(address).expect("a segment of this process");
        let start = inside(object.dlpi_addr + header.p_vaddr);
        let first = start / PAGE * PAGE;
        let length = start + inside(header.p_memsz) - first;
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

    #[test]
    fn what_is_above_the_caller_on_the_stack_stays() {
        let before = std::hint::black_box([7u8; 64 << 10]);
        drop_unused_stack();
        assert_eq!(std::hint::black_box(before), [7; 64 << 10]);
    }
}
