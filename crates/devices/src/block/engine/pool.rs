//! A few threads that make the system calls, for hosts without io_uring and images that are more than a file.
//!
//! The locks are between the I/O thread and these threads; each is held for a moment, and taken once a batch.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Done, execute};
use crate::block::image::Image;
use crate::block::job::Job;

/// So many requests wait for a disk at once.
const THREADS: usize = 4;

/// The threads, and what has not been handed to them.
#[derive(Debug)]
pub(in crate::block) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    started: Vec<(u32, Job)>,
    finished: Vec<Done>,
    /// Jobs that are in here, whether begun or done.
    count: usize,
}

#[derive(Debug)]
struct Shared {
    image: Arc<Image>,
    work: Mutex<Work>,
    more_work: Condvar,
    done: Mutex<Vec<Done>>,
    more_done: Condvar,
    event: EventFd,
}

#[derive(Debug)]
struct Work {
    jobs: VecDeque<(u32, Job)>,
    closed: bool,
}

impl Pool {
    pub(super) fn new(image: &Arc<Image>, depth: u32) -> io::Result<Self> {
        let depth = depth as usize;
        let shared = Arc::new(Shared {
            image: image.clone(),
            work: Mutex::new(Work { jobs: VecDeque::with_capacity(depth), closed: false }),
            more_work: Condvar::new(),
            done: Mutex::new(Vec::with_capacity(depth)),
            more_done: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let (started, finished) = (Vec::with_capacity(depth), Vec::with_capacity(depth));
        let mut pool = Self { shared, threads: Vec::new(), started, finished, count: 0 };
        for _ in 0..THREADS {
            let shared = pool.shared.clone();
            pool.threads.push(thread::Builder::new().name("disk".into()).spawn(move || shared.run())?);
        }
        Ok(pool)
    }

    pub(super) fn start(&mut self, tag: u32, job: Job) {
        self.count += 1;
        self.started.push((tag, job));
    }

    pub(super) fn submit(&mut self) {
        let count = self.started.len();
        if count == 0 {
            return;
        }
        lock(&self.shared.work).jobs.extend(self.started.drain(..));
        if count == 1 {
            self.shared.more_work.notify_one();
        } else {
            self.shared.more_work.notify_all();
        }
    }

    pub(super) fn finished(&mut self) -> Option<Done> {
        if self.finished.is_empty() && self.count > 0 {
            // First the event, so that one which comes after we have looked is seen.
            let _ = self.shared.event.read();
            std::mem::swap(&mut *lock(&self.shared.done), &mut self.finished);
        }
        let done = self.finished.pop()?;
        self.count -= 1;
        Some(done)
    }

    pub(super) fn wait(&mut self) {
        self.submit();
        if self.count == 0 || !self.finished.is_empty() {
            return;
        }
        let mut done = lock(&self.shared.done);
        while done.is_empty() {
            done = self.shared.more_done.wait(done).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn descriptor(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.work).closed = true;
        self.shared.more_work.notify_all();
        for thread in self.threads.drain(..) {
            thread.join().expect("a thread of a disk does not panic");
        }
    }
}

impl Shared {
    /// What each thread does until there is no more work.
    fn run(&self) {
        let mut work = lock(&self.work);
        loop {
            if let Some((tag, job)) = work.jobs.pop_front() {
                drop(work);
                self.report(execute(&self.image, tag, job));
                work = lock(&self.work);
            } else if work.closed {
                return;
            } else {
                work = self.more_work.wait(work).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn report(&self, done: Done) {
        let mut list = lock(&self.done);
        list.push(done);
        let first = list.len() == 1;
        drop(list);
        if first {
            self.more_done.notify_one();
            // It can only fail when its counter is full, and then it is readable anyway.
            let _ = self.event.write(1);
        }
    }
}

/// A thread that panicked has already ended the process in a release build.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
