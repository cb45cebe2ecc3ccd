//! A disk's half on an I/O thread: takes requests out of the queues, has an engine do them, puts them back.

use std::io::{self, ErrorKind};
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio::{Chain, GuestFault, Handler, RateLimiter, VirtQueue, Watch};
use vmm_sys_util::timerfd::TimerFd;

use super::engine::{Done, Engine};
use super::image::Image;
use super::job::{Job, Op};
use super::request::{self, IOERR, MOST_BYTES, OK, Rules, Status, UNSUPP};

/// What the I/O thread tells us about. Smaller tokens are queues.
const ENGINE: u32 = 1 << 16;
const LIMITER: u32 = ENGINE + 1;
const ROOM: u32 = ENGINE + 2;

/// How often a write is tried again that found the host's disk full.
const FULL_PAUSE: Duration = Duration::from_millis(500);
/// Between two lines in the log about I/O errors.
const LOG_PAUSE: Duration = Duration::from_secs(60);

/// What the driver accepted and the specification asks for.
#[derive(Clone, Debug)]
pub(super) struct Conduct {
    pub(super) name: String,
    pub(super) serial: String,
    pub(super) writable: bool,
    pub(super) write_through: bool,
    pub(super) ignore_flush: bool,
    pub(super) discard: bool,
    pub(super) write_zeroes: bool,
    /// A write that finds the host's disk full waits for room.
    pub(super) wait_for_room: bool,
}

/// An image and the engine that serves it.
pub(super) struct Medium {
    // First, as it waits for what it has when it is dropped.
    pub(super) engine: Engine,
    pub(super) image: Arc<Image>,
}

/// What makes a request wait.
pub(super) struct Timers {
    pub(super) limiter: Option<RateLimiter>,
    /// Runs while a request waits for room on the host's disk.
    pub(super) room: TimerFd,
}

/// The half of a [`Block`](super::Block) that owns its queues.
pub struct BlockHandler {
    // First, as it waits for what it has when it is dropped, and that points into the memory of the chains.
    medium: Medium,
    conduct: Conduct,
    queues: Vec<VirtQueue>,
    slots: Vec<Slot>,
    /// The numbers of slots without a chain.
    free: Vec<u32>,
    limiter: Option<RateLimiter>,
    /// Slots and jobs that wait for room on the host's disk, and the timer by which they are tried again.
    parked: Vec<(u32, Job)>,
    room: TimerFd,
    /// Bytes that the guest can reach.
    capacity: u64,
    errors: Errors,
}

/// A request in flight. A job that is not in the engine waits here for its next use.
#[derive(Default)]
struct Slot {
    chain: Option<Chain>,
    job: Option<Job>,
    queue: usize,
}

impl BlockHandler {
    pub(super) fn new(medium: Medium, conduct: Conduct, queues: Vec<VirtQueue>, timers: Timers, capacity: u64) -> Self {
        let count: u32 = queues.iter().map(|queue| u32::from(queue.size())).sum();
        let slot = || Slot { job: Some(Job::with_capacity(4)), ..Slot::default() };
        let Timers { limiter, room } = timers;
        Self {
            medium,
            conduct,
            queues,
            slots: (0..count).map(|_| slot()).collect(),
            free: (0..count).collect(),
            limiter,
            parked: Vec::new(),
            room,
            capacity,
            errors: Errors::default(),
        }
    }

    /// Finishes what is in flight and gives the queues and the medium back.
    pub(super) fn stop(mut self) -> (Vec<VirtQueue>, Medium) {
        self.finish_all();
        (self.queues, self.medium)
    }

    /// Finishes what is in flight, and goes on with another medium.
    pub(super) fn change_medium(&mut self, medium: Medium) {
        self.finish_all();
        self.capacity = medium.image.size();
        self.medium = medium;
    }

    pub(super) fn set_capacity(&mut self, capacity: u64) {
        self.capacity = capacity;
    }

    /// Waits for what is in flight. What still finds the host's disk full fails.
    fn finish_all(&mut self) {
        let wait_for_room = mem::replace(&mut self.conduct.wait_for_room, false);
        self.retry_parked();
        while self.in_flight() {
            self.medium.engine.wait();
            self.reap();
        }
        self.conduct.wait_for_room = wait_for_room;
        self.signal();
    }

    fn signal(&mut self) {
        for queue in &mut self.queues {
            queue.signal();
        }
    }

    fn in_flight(&self) -> bool {
        self.free.len() < self.slots.len()
    }

    /// Does what a queue has, up to [`MOST_BYTES`] and one request: the rest has another turn, so that neither other
    /// queues nor a reset wait for long.
    fn serve(&mut self, queue: usize) -> Result<(), GuestFault> {
        let mut bytes = 0;
        while let Some(chain) = self.queues[queue].pop()? {
            if bytes > MOST_BYTES {
                self.queues[queue].undo_pop(chain);
                // A full counter, the one error, is a kick too.
                let _ = self.queues[queue].kick().write(1);
                break;
            }
            bytes += chain.readable_len().max(chain.writable_len());
            if let Some(limiter) = &mut self.limiter
                && !limiter.admit(chain.readable_len().max(chain.writable_len()) as u64)
            {
                self.queues[queue].undo_pop(chain);
                break;
            }
            self.begin(queue, chain)?;
        }
        Ok(())
    }

    fn begin(&mut self, queue: usize, mut chain: Chain) -> Result<(), GuestFault> {
        let conduct = &self.conduct;
        let rules = Rules {
            capacity: self.capacity,
            writable: conduct.writable,
            write_through: conduct.write_through,
            ignore_flush: conduct.ignore_flush,
            discard: conduct.discard,
            write_zeroes: conduct.write_zeroes,
            serial: &conduct.serial,
        };
        let tag = self.free.pop().expect("there is a slot for every chain that the queues let out");
        let slot = &mut self.slots[tag as usize];
        let mut job = slot.job.take().expect("a free slot has a job");
        let status = request::parse(&mut chain, &rules, &mut job);
        (slot.chain, slot.queue) = (Some(chain), queue);
        match status {
            Ok(None) => self.run(tag, job),
            Ok(Some(status)) => self.finish(tag, job, status),
            Err(fault) => {
                (slot.chain, slot.job) = (None, Some(job));
                self.free.push(tag);
                return Err(fault);
            }
        }
        Ok(())
    }

    /// Gives a job to the engine, as often as it comes back undone.
    fn run(&mut self, tag: u32, job: Job) {
        let mut next = Some(job);
        while let Some(job) = next {
            next = self.medium.engine.start(tag, job).and_then(|done| self.settle(done));
        }
    }

    /// Takes what the engine has done. A job may go in again, for its rest.
    fn reap(&mut self) {
        loop {
            self.medium.engine.submit();
            let Some(done) = self.medium.engine.finished() else { return };
            self.take(done);
            while let Some(done) = self.medium.engine.finished() {
                self.take(done);
            }
        }
    }

    fn take(&mut self, done: Done) {
        let tag = done.tag;
        if let Some(job) = self.settle(done) {
            self.run(tag, job);
        }
    }

    /// Decides what becomes of a job that has been done. Returns it where there is more to do at once.
    fn settle(&mut self, done: Done) -> Option<Job> {
        let Done { tag, mut job, result } = done;
        let more = result.and_then(|count| match job.op {
            Op::Read | Op::Write | Op::WriteThrough => job.advance(count),
            Op::Punch | Op::Zero if self.conduct.write_through => {
                job.set(Op::Flush, 0, 0);
                Ok(true)
            }
            Op::Flush | Op::Discard | Op::Punch | Op::Zero => Ok(false),
        });
        let error = match more {
            Ok(true) => return Some(job),
            Ok(false) => {
                let wrote = matches!(job.op, Op::Write | Op::WriteThrough);
                if wrote && self.parked.is_empty() {
                    self.errors.room(&self.conduct.name);
                }
                self.finish(tag, job, OK);
                return None;
            }
            Err(error) => error,
        };
        match (error.kind(), job.op) {
            (ErrorKind::Interrupted, _) => return Some(job),
            (ErrorKind::Unsupported, Op::Discard) => self.finish(tag, job, UNSUPP),
            (ErrorKind::Unsupported, Op::Punch) => {
                job.op = Op::Zero;
                return Some(job);
            }
            (ErrorKind::Unsupported, Op::Zero) => {
                job.write_zeros(if self.conduct.write_through { Op::WriteThrough } else { Op::Write });
                return Some(job);
            }
            (ErrorKind::StorageFull | ErrorKind::QuotaExceeded, _) if self.conduct.wait_for_room => self.park(tag, job),
            _ => {
                self.errors.report(&self.conduct.name, &job, &error);
                self.finish(tag, job, IOERR);
            }
        }
        None
    }

    fn finish(&mut self, tag: u32, job: Job, status: Status) {
        let slot = &mut self.slots[tag as usize];
        slot.job = Some(job);
        self.free.push(tag);
        let Some(mut chain) = slot.chain.take() else { return };
        let length = chain.writable_len();
        // Neither can fail: `parse` has seen room for the status, and a chain is less than 4 GiB long. The whole length
        // counts as written, or a driver that copies no more than that would not see its status.
        let written = u32::try_from(length).unwrap_or(u32::MAX);
        let _ = chain.write_at(length.saturating_sub(1), &[status]);
        self.queues[slot.queue].push(chain, written);
    }

    /// Keeps a request until there is room for it on the host's disk.
    fn park(&mut self, tag: u32, job: Job) {
        if self.parked.is_empty() {
            self.errors.full(&self.conduct.name);
            // Without a timer there is nobody who would try again.
            if let Err(error) = self.room.reset(FULL_PAUSE, None).map_err(io::Error::from) {
                self.errors.report(&self.conduct.name, &job, &error);
                return self.finish(tag, job, IOERR);
            }
        }
        self.parked.push((tag, job));
    }

    fn retry_parked(&mut self) {
        for (tag, job) in mem::take(&mut self.parked) {
            self.run(tag, job);
        }
        self.reap();
    }
}

impl Handler for BlockHandler {
    fn watch(&mut self, watch: &mut Watch<'_>) -> io::Result<()> {
        for (token, queue) in (0..).zip(&self.queues) {
            watch.add(queue, token)?;
        }
        if let Some(limiter) = &self.limiter {
            watch.add(limiter, LIMITER)?;
        }
        watch.add(&self.room, ROOM)?;
        self.medium.engine.descriptor().map_or(Ok(()), |descriptor| watch.add(&Descriptor(descriptor), ENGINE))
    }

    fn ready(&mut self, token: u32, _: &mut Watch<'_>) -> Result<(), GuestFault> {
        match token {
            ENGINE => self.reap(),
            ROOM => {
                // The descriptor is ready, so this does not wait.
                let _ = self.room.wait();
                self.retry_parked();
            }
            LIMITER => {
                if let Some(limiter) = &mut self.limiter {
                    limiter.refilled();
                }
                for queue in 0..self.queues.len() {
                    self.serve(queue)?;
                }
            }
            queue => {
                let queue = queue as usize;
                if let Some(queue) = self.queues.get_mut(queue) {
                    queue.kicked();
                }
                self.serve(queue)?;
            }
        }
        self.reap();
        self.signal();
        Ok(())
    }
}

/// A descriptor that stays open for as long as the engine that it belongs to.
struct Descriptor(RawFd);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

/// What went wrong, said now and then.
#[derive(Default)]
struct Errors {
    /// Since the last line in the log.
    count: u64,
    reported: Option<Instant>,
    /// The log has said that the host's disk is full, and not yet that it is no more.
    full: bool,
    /// When it said so last: a guest that frees and writes in turns cannot have it said each time.
    said_full: Option<Instant>,
}

impl Errors {
    fn full(&mut self, name: &str) {
        if !self.full && self.said_full.is_none_or(|last| last.elapsed() >= LOG_PAUSE) {
            log::warn!("The host has no room for what {name} writes: its requests wait for some");
            (self.full, self.said_full) = (true, Some(Instant::now()));
        }
    }

    fn room(&mut self, name: &str) {
        if mem::take(&mut self.full) {
            log::info!("The host has room again for what {name} writes");
        }
    }

    fn report(&mut self, name: &str, job: &Job, error: &io::Error) {
        self.count = self.count.saturating_add(1);
        if self.reported.is_none_or(|last| last.elapsed() >= LOG_PAUSE) {
            let (op, offset) = (job.op, job.offset);
            log::warn!(
                "{name}: {op:?} at byte {offset} failed (errors since the last such line: {}): {error}",
                self.count
            );
            self.reported = Some(Instant::now());
            self.count = 0;
        }
    }
}
