//! A balloon's half on an I/O thread.

use std::io;
use std::mem;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use memory::Ram;
use virtio::{Chain, GuestFault, Handler, VirtQueue, Watch};
use vmm_sys_util::timerfd::TimerFd;

use super::{PAGE, Statistics};

/// The most pages in one request: four times what Linux sends, and a bound on how long one takes.
const MOST_PAGES: usize = 1024;
/// The size of a page's number in a request.
const NUMBER: usize = 4;

/// What the I/O thread tells us about.
const INFLATE: u32 = 0;
const DEFLATE: u32 = 1;
const STATISTICS: u32 = 2;
const REPORTS: u32 = 3;
const TIMER: u32 = 4;

/// The queues that the driver set up.
pub(super) struct Queues {
    pub(super) inflate: VirtQueue,
    pub(super) deflate: VirtQueue,
    pub(super) statistics: Option<VirtQueue>,
    pub(super) reports: Option<VirtQueue>,
}

/// The half of a [`Balloon`](super::Balloon) that owns its queues.
pub struct BalloonHandler {
    name: String,
    memory: Arc<Ram>,
    queues: Queues,
    /// The driver's buffer for statistics, which it fills again when it is given back.
    held: Option<Chain>,
    timer: Option<TimerFd>,
    statistics: Statistics,
    /// Scratch: what a request to inflate holds.
    raw: Box<[u8; MOST_PAGES * NUMBER]>,
    pages: Vec<u32>,
    /// The log has said that the host takes no memory back.
    warned: bool,
}

impl BalloonHandler {
    pub(super) fn new(name: String, memory: Arc<Ram>, queues: Queues, timer: Option<TimerFd>) -> Self {
        Self {
            name,
            memory,
            queues,
            held: None,
            timer,
            statistics: Statistics::default(),
            raw: Box::new([0; MOST_PAGES * NUMBER]),
            pages: Vec::with_capacity(MOST_PAGES),
            warned: false,
        }
    }

    /// The guest's last report on its memory.
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// Asks for reports that often from now on, if the driver makes any.
    pub(super) fn set_interval(&mut self, seconds: u32) -> io::Result<()> {
        let interval = Duration::from_secs(seconds.into());
        self.timer.as_mut().map_or(Ok(()), |timer| Ok(timer.reset(interval, Some(interval))?))
    }

    pub(super) fn stop(mut self) -> Vec<VirtQueue> {
        if let (Some(queue), Some(chain)) = (&mut self.queues.statistics, self.held.take()) {
            queue.undo_pop(chain);
        }
        let Queues { inflate, deflate, statistics, reports } = self.queues;
        [inflate, deflate].into_iter().chain(statistics).chain(reports).collect()
    }

    fn inflate(&mut self) -> Result<(), GuestFault> {
        while let Some(chain) = self.queues.inflate.pop()? {
            self.read_pages(&chain)?;
            // The driver may name them in any order; a system call for each would be slow.
            self.pages.sort_unstable();
            let mut run: Range<u64> = 0..0;
            for at in 0..self.pages.len() {
                let start = u64::from(self.pages[at]) * PAGE;
                if start > run.end || run.is_empty() {
                    self.discard(mem::replace(&mut run, start..start))?;
                }
                run.end = start + PAGE;
            }
            self.discard(run)?;
            self.queues.inflate.push(chain, 0);
        }
        self.queues.inflate.signal();
        Ok(())
    }

    fn read_pages(&mut self, chain: &Chain) -> Result<(), GuestFault> {
        let length = chain.readable_len();
        let Some(raw) = self.raw.get_mut(..length).filter(|raw| raw.len().is_multiple_of(NUMBER)) else {
            return Err(GuestFault::new(format!("a request to inflate has {length} bytes of page numbers")));
        };
        chain.read_at(0, raw)?;
        let number = |raw: &[u8]| raw.iter().rev().fold(0, |number, byte| number << 8 | u32::from(*byte));
        self.pages.clear();
        self.pages.extend(raw.chunks_exact(NUMBER).map(number));
        Ok(())
    }

    fn discard(&mut self, range: Range<u64>) -> Result<(), GuestFault> {
        if range.is_empty() {
            return Ok(());
        }
        let result = memory::discard(&self.memory, range.clone());
        self.check(result, || format!("a balloon of pages at {:#x}..{:#x} is not in RAM", range.start, range.end))
    }

    /// Not RAM is the guest's fault; all else is the host's, which costs it memory and the guest nothing.
    fn check(&mut self, result: io::Result<()>, outside: impl FnOnce() -> String) -> Result<(), GuestFault> {
        match result {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Err(GuestFault::new(outside())),
            Err(error) if !mem::replace(&mut self.warned, true) => {
                log::warn!("{}: the host cannot take memory back: {error}", self.name);
            }
            _ => {}
        }
        Ok(())
    }

    /// The pages take memory again when the guest touches them.
    fn deflate(&mut self) -> Result<(), GuestFault> {
        let queue = &mut self.queues.deflate;
        while let Some(chain) = queue.pop()? {
            queue.push(chain, 0);
        }
        queue.signal();
        Ok(())
    }

    /// Each buffer is a range of free pages, which the driver keeps until it gets it back (section 5.5.6.7).
    fn take_reports(&mut self) -> Result<(), GuestFault> {
        while let Some(chain) = self.queues.reports.as_mut().map_or(Ok(None), VirtQueue::pop)? {
            for piece in chain.writable() {
                let result = memory::discard_mapped(&self.memory, piece.address(), piece.len());
                self.check(result, || "a report of free pages is not in RAM".to_owned())?;
            }
            if let Some(queue) = &mut self.queues.reports {
                queue.push(chain, 0);
            }
        }
        if let Some(queue) = &mut self.queues.reports {
            queue.signal();
        }
        Ok(())
    }

    /// The driver has one buffer for statistics: the device keeps it until it wants new ones (section 5.5.6.3).
    fn take_statistics(&mut self) -> Result<(), GuestFault> {
        let Some(queue) = &mut self.queues.statistics else { return Ok(()) };
        while let Some(chain) = queue.pop()? {
            self.statistics.read(&chain)?;
            // Another one would make its own; the device needs one at most.
            if let Some(before) = self.held.replace(chain) {
                queue.push(before, 0);
            }
        }
        queue.signal();
        Ok(())
    }

    fn ask_for_statistics(&mut self) {
        if let (Some(queue), Some(chain)) = (&mut self.queues.statistics, self.held.take()) {
            queue.push(chain, 0);
            queue.signal();
        }
    }
}

impl Handler for BalloonHandler {
    fn watch(&mut self, watch: &mut Watch<'_>) -> io::Result<()> {
        watch.add(&self.queues.inflate, INFLATE)?;
        watch.add(&self.queues.deflate, DEFLATE)?;
        for (queue, token) in [(&self.queues.statistics, STATISTICS), (&self.queues.reports, REPORTS)] {
            if let Some(queue) = queue {
                watch.add(queue, token)?;
            }
        }
        self.timer.as_ref().map_or(Ok(()), |timer| watch.add(timer, TIMER))
    }

    fn ready(&mut self, token: u32, _watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        let queue = match token {
            INFLATE => Some(&mut self.queues.inflate),
            DEFLATE => Some(&mut self.queues.deflate),
            STATISTICS => self.queues.statistics.as_mut(),
            REPORTS => self.queues.reports.as_mut(),
            _ => None,
        };
        if let Some(queue) = queue {
            queue.kicked();
        }
        match token {
            INFLATE => self.inflate(),
            DEFLATE => self.deflate(),
            STATISTICS => self.take_statistics(),
            REPORTS => self.take_reports(),
            _ => {
                // The descriptor is ready, so this does not wait.
                let _ = self.timer.as_mut().map(TimerFd::wait);
                self.ask_for_statistics();
                Ok(())
            }
        }
    }
}
