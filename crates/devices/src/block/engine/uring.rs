//! The kernel as engine, by io_uring: one system call submits a batch, and completions are read from memory.
//!
//! The ring's own descriptor is readable while there are completions, so no eventfd is signalled for each of them. What
//! the page cache holds is done during the submission, and can be taken right after it.
#![allow(unsafe_code, reason = "the submission queue takes addresses that must stay valid")]

use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::Arc;

use io_uring::squeue::Entry;
use io_uring::{IoUring, opcode, types};

use super::{Done, execute};
use crate::block::image::Image;
use crate::block::job::{Job, Op};
use crate::block::raw::Raw;
use crate::block::sys;

/// The file is the first and only one that the ring knows.
const FILE: types::Fixed = types::Fixed(0);
/// A batch larger than this takes several system calls.
const MOST_IN_A_BATCH: u32 = 256;

/// A ring and the jobs that the kernel has.
pub(in crate::block) struct Uring {
    ring: IoUring,
    image: Arc<Image>,
    /// By tag.
    jobs: Vec<Option<Job>>,
    /// Jobs in the ring, whether submitted or done.
    count: usize,
    unsubmitted: usize,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Uring with {} jobs", self.count)
    }
}

impl Uring {
    pub(super) fn new(image: &Arc<Image>, depth: u32) -> io::Result<Self> {
        let file = &raw(image)?.file;
        let batch = depth.clamp(1, MOST_IN_A_BATCH);
        let mut builder = IoUring::builder();
        builder.setup_clamp().setup_cqsize(depth.max(batch));
        // Kernels from 5.19 on need not interrupt this thread to tell it of a completion: it soon makes a system call.
        let modern = builder.clone().setup_coop_taskrun().build(batch);
        let ring = modern.or_else(|_| builder.build(batch))?;
        if !ring.params().is_feature_nodrop() || !ring.params().is_feature_submit_stable() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        let jobs = (0..depth).map(|_| None).collect();
        Ok(Self { ring, image: image.clone(), jobs, count: 0, unsubmitted: 0 })
    }

    pub(super) fn start(&mut self, tag: u32, job: Job) -> Option<Done> {
        match &*self.image {
            Image::Raw(raw) if raw.is_aligned(&job) => {}
            _ => return Some(execute(&self.image, tag, job)),
        }
        let entry = entry(&job).user_data(tag.into());
        let place = &mut self.jobs[tag as usize];
        assert!(place.is_none(), "a tag stands for one job");
        // The buffers' list does not move with the job.
        *place = Some(job);
        // SAFETY: the list of buffers stays until the job is given back, which is after its completion, and the memory
        // behind them as long as the job (see `Engine`). The file is registered.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.submit(0);
        }
        self.count += 1;
        self.unsubmitted += 1;
        None
    }

    /// Submits what was started, and waits for `completions`.
    pub(super) fn submit(&mut self, completions: usize) {
        while self.unsubmitted > 0 || completions > 0 {
            match self.ring.submit_and_wait(completions) {
                Ok(submitted) => {
                    self.unsubmitted = self.unsubmitted.saturating_sub(submitted);
                    if completions > 0 {
                        return;
                    }
                }
                // The kernel is short of memory, or a signal came.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::EINTR)) => {
                    std::thread::yield_now();
                }
                Err(error) => panic!("io_uring takes what we submit, but said: {error}"),
            }
        }
    }

    pub(super) fn finished(&mut self) -> Option<Done> {
        if self.count == 0 {
            return None;
        }
        let completion = self.ring.completion().next()?;
        let tag = u32::try_from(completion.user_data()).ok()?;
        let job = self.jobs.get_mut(tag as usize)?.take()?;
        self.count -= 1;
        let result = u64::try_from(completion.result())
            .map_err(|_| io::Error::from_raw_os_error(completion.result().saturating_neg()));
        Some(Done { tag, job, result })
    }

    pub(super) fn wait(&mut self) {
        if self.count > 0 {
            self.submit(1);
        }
    }

    pub(super) fn descriptor(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        while self.count > 0 {
            self.wait();
            while self.finished().is_some() {}
        }
    }
}

fn raw(image: &Image) -> io::Result<&Raw> {
    match image {
        Image::Raw(raw) => Ok(raw),
        Image::Qcow2(_) => Err(io::ErrorKind::Unsupported.into()),
    }
}

fn entry(job: &Job) -> Entry {
    let buffers = job.buffers().as_ptr();
    let count = u32::try_from(job.buffers().len()).expect("a job has at most 1024 buffers");
    match job.op {
        Op::Read => opcode::Readv::new(FILE, buffers, count).offset(job.offset).build(),
        Op::Write => opcode::Writev::new(FILE, buffers, count).offset(job.offset).build(),
        Op::WriteThrough => {
            opcode::Writev::new(FILE, buffers, count).offset(job.offset).rw_flags(libc::RWF_DSYNC).build()
        }
        Op::Flush => opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build(),
        Op::Discard | Op::Punch | Op::Zero => {
            opcode::Fallocate::new(FILE, job.length).offset(job.offset).mode(sys::allocate_mode(job.op)).build()
        }
    }
}
