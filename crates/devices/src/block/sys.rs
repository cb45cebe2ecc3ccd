//! The few system calls that disks need and std does not offer.
#![allow(unsafe_code, reason = "system calls by libc; each is one call with its arguments checked by the types here")]

use std::fs::File;
use std::io;
use std::mem::zeroed;
use std::os::fd::AsRawFd;

use super::job::{Job, MOST_BUFFERS, Op};

/// Does one job at once, as far as it goes. Returns the bytes that were read or written.
pub(super) fn execute(file: &File, job: &Job) -> io::Result<u64> {
    match job.op {
        Op::Read => read(file, job),
        Op::Write => write(file, job, 0),
        Op::WriteThrough => write(file, job, libc::RWF_DSYNC),
        Op::Flush => file.sync_data().map(|()| 0),
        Op::Discard | Op::Punch | Op::Zero => allocate(file, job),
    }
}

fn read(file: &File, job: &Job) -> io::Result<u64> {
    let (buffers, offset) = (job.buffers(), position(job.offset)?);
    // SAFETY: the buffers are guest memory that is mapped for as long as the job exists; the kernel checks the rest.
    count(unsafe { libc::preadv(file.as_raw_fd(), buffers.as_ptr(), length(buffers), offset) })
}

fn write(file: &File, job: &Job, flags: libc::c_int) -> io::Result<u64> {
    let (fd, buffers, offset) = (file.as_raw_fd(), job.buffers(), position(job.offset)?);
    if flags == 0 {
        // SAFETY: as in `read`.
        return count(unsafe { libc::pwritev(fd, buffers.as_ptr(), length(buffers), offset) });
    }
    // SAFETY: as in `read`.
    count(unsafe { libc::pwritev2(fd, buffers.as_ptr(), length(buffers), offset, flags) })
}

fn allocate(file: &File, job: &Job) -> io::Result<u64> {
    let (mode, offset, length) = (allocate_mode(job.op), position(job.offset)?, position(job.length)?);
    // SAFETY: no memory is passed.
    count(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, length) } as isize)
}

/// What `fallocate` is told for the two ways to make a range of zeros.
pub(super) fn allocate_mode(op: Op) -> libc::c_int {
    let zero = if op == Op::Zero { libc::FALLOC_FL_ZERO_RANGE } else { libc::FALLOC_FL_PUNCH_HOLE };
    zero | libc::FALLOC_FL_KEEP_SIZE
}

/// Whether the file system can give ranges back, found by giving back one that is not there.
pub(super) fn can_punch(file: &File, size: u64) -> bool {
    let mut job = Job::with_capacity(0);
    job.set(Op::Punch, size, 4096);
    allocate(file, &job).is_ok()
}

/// A lock on the whole file that goes with its last descriptor: for one writer, or any number of readers. OFD locks are
/// what other VMMs respect, too.
pub(crate) fn lock(file: &File, exclusive: bool) -> io::Result<()> {
    set_lock(file, if exclusive { libc::F_WRLCK } else { libc::F_RDLCK })
}

/// Makes room on the host for all of a file, so that none is missing later.
pub(crate) fn reserve(file: &File, size: u64) -> io::Result<()> {
    let size = libc::off_t::try_from(size).map_err(io::Error::other)?;
    // SAFETY: no memory is passed.
    match unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives the lock back, before the last descriptor goes: the kernel may hold one for a while after io_uring has ended.
pub(super) fn unlock(file: &File) {
    // A file without locks has none to give back.
    let _ = set_lock(file, libc::F_UNLCK);
}

fn set_lock(file: &File, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: a flock is plain numbers, for which zero is a value: the whole file, and no process.
    let mut lock: libc::flock = unsafe { zeroed() };
    lock.l_type = libc::c_short::try_from(kind).expect("the kinds of lock are small");
    // SAFETY: `lock` lives across the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sets those flags of an open file that can still be changed.
pub(super) fn set_flags(file: &File, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: no memory is passed.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether a descriptor can be read from, and whether it can be written to.
pub(super) fn access(file: &File) -> io::Result<(bool, bool)> {
    // SAFETY: no memory is passed.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) } {
        -1 => Err(io::Error::last_os_error()),
        // Which has no file behind it that could be used.
        flags if flags & libc::O_PATH != 0 => Ok((false, false)),
        flags => {
            let mode = flags & libc::O_ACCMODE;
            Ok((mode != libc::O_WRONLY, mode != libc::O_RDONLY))
        }
    }
}

/// What `O_DIRECT` asks for: the alignment in memory and in the file. Where the kernel does not say, one page is right.
pub(super) fn direct_alignment(file: &File) -> (u32, u32) {
    // SAFETY: a statx is plain numbers, for which zero is a value.
    let mut found: libc::statx = unsafe { zeroed() };
    let (fd, flags) = (file.as_raw_fd(), libc::AT_EMPTY_PATH);
    // SAFETY: the path is an empty C string, and `found` lives across the call.
    let result = unsafe { libc::statx(fd, c"".as_ptr(), flags, libc::STATX_DIOALIGN, &raw mut found) };
    let said = result == 0 && found.stx_mask & libc::STATX_DIOALIGN != 0 && found.stx_dio_offset_align != 0;
    if said { (found.stx_dio_mem_align, found.stx_dio_offset_align) } else { (4096, 4096) }
}

/// Whether the file lies in memory, so that no access to it ever waits for a disk.
pub(super) fn in_memory(file: &File) -> bool {
    // SAFETY: a statfs is plain numbers, for which zero is a value.
    let mut found: libc::statfs = unsafe { zeroed() };
    // SAFETY: `found` lives across the call.
    let result = unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut found) };
    const RAMFS_MAGIC: libc::c_long = 0x8584_58f6;
    result == 0 && matches!(found.f_type, libc::TMPFS_MAGIC | RAMFS_MAGIC)
}

/// Copies `bytes` into the buffers of `job`, from the first on.
pub(super) fn scatter(mut bytes: &[u8], job: &Job) {
    for buffer in job.buffers() {
        let (now, later) = bytes.split_at(buffer.iov_len.min(bytes.len()));
        // SAFETY: the buffer is guest memory, mapped for as long as the job exists and in no Rust object; `now` is not
        // longer. That the guest may write to it at the same time concerns what it reads there and nothing else.
        unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), buffer.iov_base.cast(), now.len()) };
        bytes = later;
    }
}

/// Fills `bytes` from the buffers of `job`, from the first on.
pub(super) fn gather(job: &Job, mut bytes: &mut [u8]) {
    for buffer in job.buffers() {
        let (now, later) = bytes.split_at_mut(buffer.iov_len.min(bytes.len()));
        // SAFETY: as in `scatter`.
        unsafe { std::ptr::copy_nonoverlapping(buffer.iov_base.cast::<u8>(), now.as_mut_ptr(), now.len()) };
        bytes = later;
    }
}

/// Has the process go on where a limit on file sizes would kill it; the write fails instead.
pub(super) fn ignore_file_size_signal() {
    // SAFETY: no handler is installed, and the signal is one that can be ignored.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

fn length(buffers: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(buffers.len().min(MOST_BUFFERS)).expect("1024 fits")
}

fn position(bytes: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn count(result: libc::ssize_t) -> io::Result<u64> {
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}
