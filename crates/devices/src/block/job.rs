//! One piece of work for the host: what a request of the guest's comes down to.
#![allow(unsafe_code, reason = "a job carries addresses of guest memory to another thread")]

use std::io;
use std::sync::atomic::AtomicU64;

use libc::iovec;

/// The most buffers that one system call takes (`IOV_MAX`).
pub(super) const MOST_BUFFERS: usize = 1024;

/// What is done with a range of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// The buffers are filled.
    Read,
    /// The buffers are written.
    Write,
    /// The buffers are written, and on the disk when that is done.
    WriteThrough,
    /// What has been written is on the disk when this is done.
    Flush,
    /// The range may be given back to the host, whatever it reads as afterwards.
    Discard,
    /// The range is given back to the host. It reads as zeros.
    Punch,
    /// The range reads as zeros and stays allocated.
    Zero,
}

/// A job and the memory that it reads or writes. It goes into an engine and comes out of it again.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) op: Op,
    /// Where in the image, in bytes.
    pub(super) offset: u64,
    /// Bytes that are still to be done.
    pub(super) length: u64,
    /// Empty but for reads and writes. The first `done` of them are behind us.
    buffers: Vec<iovec>,
    done: usize,
}

// SAFETY: the buffers are addresses in guest memory, or of constants. Guest memory is mapped for as long as any engine
// has a job (see `Engine`), every thread may access it, and it is only ever accessed by system calls.
unsafe impl Send for Job {}

impl Job {
    /// A job without buffers, which can take `buffers` of them without an allocation.
    pub(super) fn with_capacity(buffers: usize) -> Self {
        Self { op: Op::Flush, offset: 0, length: 0, buffers: Vec::with_capacity(buffers), done: 0 }
    }

    /// Makes this a job of another kind, without buffers.
    pub(super) fn set(&mut self, op: Op, offset: u64, length: u64) {
        (self.op, self.offset, self.length, self.done) = (op, offset, length, 0);
        self.buffers.clear();
    }

    /// Adds memory to read to or write from.
    pub(super) fn extend(&mut self, buffers: impl IntoIterator<Item = iovec>) {
        self.buffers.extend(buffers);
    }

    /// The memory that is still to be read to or written from.
    pub(super) fn buffers(&self) -> &[iovec] {
        &self.buffers[self.done..]
    }

    /// Notes that `count` bytes more are done. Returns whether there is more to do.
    ///
    /// # Errors
    ///
    /// None could be done, or more than there were: the image has become shorter.
    pub(super) fn advance(&mut self, count: u64) -> io::Result<bool> {
        if count == 0 || count > self.length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.length -= count;
        self.offset += count;
        let mut left = usize::try_from(count).unwrap_or(usize::MAX);
        while left > 0 && self.length > 0 {
            let Some(buffer) = self.buffers.get_mut(self.done) else { break };
            let step = left.min(buffer.iov_len);
            buffer.iov_base = buffer.iov_base.wrapping_byte_add(step);
            buffer.iov_len -= step;
            left -= step;
            self.done += usize::from(buffer.iov_len == 0);
        }
        Ok(self.length > 0)
    }

    /// Whether a file that is open with `O_DIRECT` can do this in one go.
    pub(super) fn is_aligned(&self, memory: usize) -> bool {
        let wrong = |buffer: &iovec| !(buffer.iov_base as usize | buffer.iov_len).is_multiple_of(memory);
        !self.buffers().iter().any(wrong)
    }

    /// Turns a job without buffers into a write of zeros, by one of the two kinds of writing.
    pub(super) fn write_zeros(&mut self, op: Op) {
        self.op = op;
        let mut left = usize::try_from(self.length).unwrap_or(usize::MAX);
        while left > 0 && self.buffers.len() < MOST_BUFFERS {
            let step = left.min(size_of::<Zeros>());
            self.buffers.push(iovec { iov_base: ZEROS.0.as_ptr().cast_mut().cast(), iov_len: step });
            left -= step;
        }
    }
}

/// What zeros are written from, where the host knows no better way. Aligned as `O_DIRECT` wants it. Nobody writes to the
/// cells; but what could be written to is no part of the program's file as long as it is zero.
#[repr(align(4096))]
struct Zeros([AtomicU64; (64 << 10) / size_of::<AtomicU64>()]);

static ZEROS: Zeros = Zeros([const { AtomicU64::new(0) }; _]);

/// The longest run of zeros that [`Job::write_zeros`] can do at once, in bytes.
pub(super) const MOST_ZEROS: u64 = 32 << 20;

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    fn job(lengths: &[usize]) -> Job {
        let mut job = Job::with_capacity(lengths.len());
        job.set(Op::Read, 1 << 20, lengths.iter().map(|length| *length as u64).sum());
        job.extend(
            lengths.iter().map(|length| iovec { iov_base: std::ptr::without_provenance_mut(4096), iov_len: *length }),
        );
        job
    }

    fn left(job: &Job) -> Vec<(usize, usize)> {
        job.buffers().iter().map(|buffer| (buffer.iov_base as usize, buffer.iov_len)).collect()
    }

    #[test]
    fn a_job_that_is_done_in_part_goes_on_behind_that_part() {
        let mut job = job(&[512, 1024, 512]);
        assert!(job.advance(100).unwrap());
        assert_eq!(left(&job), [(4196, 412), (4096, 1024), (4096, 512)]);
        assert!(job.advance(412).unwrap());
        assert_eq!(left(&job), [(4096, 1024), (4096, 512)]);
        assert!(job.advance(1030).unwrap());
        assert_eq!((left(&job), job.offset, job.length), (vec![(4102, 506)], (1 << 20) + 1542, 506));
        assert!(!job.advance(506).unwrap());
    }

    #[test]
    fn a_job_of_which_nothing_or_too_much_is_done_has_failed() {
        assert!(job(&[512]).advance(0).is_err());
        assert!(job(&[512]).advance(513).is_err());
    }

    #[test]
    fn zeros_are_written_from_memory_that_is_all_zero_and_aligned() {
        let mut job = Job::with_capacity(0);
        job.set(Op::Zero, 0, MOST_ZEROS);
        job.write_zeros(Op::Write);
        assert_eq!(job.buffers().iter().map(|buffer| buffer.iov_len as u64).sum::<u64>(), MOST_ZEROS);
        assert!(job.is_aligned(4096) && ZEROS.0.iter().all(|cell| cell.load(Ordering::Relaxed) == 0));
    }
}
