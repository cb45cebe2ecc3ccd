//! Threads that run the handlers of devices: an epoll loop into which handlers are moved, and from which they come back.
//!
//! A handler is reached by nobody but its thread, so it takes no lock. To change one from outside, take it out, change
//! it, put it back: each is a round trip to the loop.

use std::any::Any;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

pub use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::Handler;

/// A thread `io-N`. A clone is another handle on it; it ends with the last one.
#[derive(Clone)]
pub struct IoThread(Arc<Shared>);

struct Shared {
    /// Which handle sends is up to the callers, so the sender is locked; the loop never takes this lock.
    commands: Mutex<Sender<Command>>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
}

/// Names a handler on its thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket(u32);

/// Called on the I/O thread when the handler has been parked.
pub(crate) type OnFault = Box<dyn FnOnce(&dyn fmt::Display) + Send>;

enum Command {
    Insert(Ticket, Box<dyn Handler>, Option<OnFault>),
    Remove(Ticket, SyncSender<Box<dyn Handler>>),
    End,
}

impl IoThread {
    /// Starts the thread `io-{number}`, which calls `at_start` first.
    ///
    /// # Errors
    ///
    /// The host has no room for a thread or three descriptors.
    pub fn spawn(number: u32, at_start: fn()) -> io::Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let epoll = Epoll::new()?;
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), EpollEvent::new(EventSet::IN, data(WAKE, 0)))?;
        let (sender, commands) = channel();
        let event_loop = Loop { epoll, wake: wake.try_clone()?, commands, entries: Vec::new() };
        let thread = std::thread::Builder::new().name(format!("io-{number}")).spawn(move || {
            at_start();
            event_loop.run();
        })?;
        Ok(Self(Arc::new(Shared { commands: Mutex::new(sender), wake, thread: Some(thread) })))
    }

    /// Moves a handler to the thread, which has it register its descriptors. Does not wait for that. Without `on_fault`
    /// it is parked there from the start.
    pub(crate) fn insert(&self, handler: Box<dyn Handler>, ticket: Ticket, on_fault: Option<OnFault>) {
        self.0.send(Command::Insert(ticket, handler, on_fault));
    }

    /// Brings a handler back. When this returns nothing of it runs any more. Must not be called by a handler.
    pub(crate) fn remove(&self, ticket: Ticket) -> Box<dyn Handler> {
        let (reply, answer) = sync_channel(1);
        self.0.send(Command::Remove(ticket, reply));
        answer.recv().expect("an I/O thread lives as long as its handles, and gives back each handler once")
    }
}

impl Ticket {
    /// A ticket that no other handler has.
    pub(crate) fn new() -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            if number != WAKE {
                return Self(number);
            }
        }
    }
}

impl Shared {
    fn send(&self, command: Command) {
        let commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        // The loop ends only by the command that the last handle sends, and a full counter wakes it, too.
        let _ = commands.send(command);
        let _ = self.wake.write(1);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.send(Command::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What a handler waits for. Waiting is level-triggered: a descriptor is reported for as long as it is ready.
///
/// Take a descriptor out before it is closed.
pub struct Watch<'a> {
    epoll: &'a Epoll,
    ticket: u32,
    descriptors: &'a mut Vec<RawFd>,
}

impl Watch<'_> {
    /// Has [`Handler::ready`] called with `token` when `descriptor` can be read.
    ///
    /// # Errors
    ///
    /// The descriptor is watched already, cannot be watched (a regular file), or the host's limit is reached.
    pub fn add(&mut self, descriptor: &impl AsRawFd, token: u32) -> io::Result<()> {
        self.add_for(descriptor, EventSet::IN, token)
    }

    /// Has [`Handler::ready`] called with `token` when one of `events` is there. Errors and hang-ups always are.
    ///
    /// # Errors
    ///
    /// See [`add`](Self::add).
    pub fn add_for(&mut self, descriptor: &impl AsRawFd, events: EventSet, token: u32) -> io::Result<()> {
        let descriptor = descriptor.as_raw_fd();
        self.epoll.ctl(ControlOperation::Add, descriptor, EpollEvent::new(events, data(self.ticket, token)))?;
        self.descriptors.push(descriptor);
        Ok(())
    }

    /// Changes what a watched descriptor is watched for; an empty set leaves errors and hang-ups.
    ///
    /// # Errors
    ///
    /// The descriptor is not watched.
    pub fn modify(&mut self, descriptor: &impl AsRawFd, events: EventSet, token: u32) -> io::Result<()> {
        let event = EpollEvent::new(events, data(self.ticket, token));
        self.epoll.ctl(ControlOperation::Modify, descriptor.as_raw_fd(), event)
    }

    /// Watches a descriptor no more. One that is not watched is left alone.
    pub fn remove(&mut self, descriptor: &impl AsRawFd) {
        let descriptor = descriptor.as_raw_fd();
        if let Some(at) = self.descriptors.iter().position(|other| *other == descriptor) {
            self.descriptors.swap_remove(at);
            forget(self.epoll, descriptor);
        }
    }
}

/// The ticket of the loop's own wake-up.
const WAKE: u32 = u32::MAX;

/// What epoll keeps for a descriptor: whose it is and what it means to it.
fn data(ticket: u32, token: u32) -> u64 {
    u64::from(ticket) << 32 | u64::from(token)
}

fn forget(epoll: &Epoll, descriptor: RawFd) {
    // The one error is a descriptor that was closed before, which epoll has forgotten by itself.
    let _ = epoll.ctl(ControlOperation::Delete, descriptor, EpollEvent::default());
}

/// A handler on its thread.
struct Entry {
    ticket: u32,
    handler: Box<dyn Handler>,
    descriptors: Vec<RawFd>,
    /// Gone when the handler is parked.
    on_fault: Option<OnFault>,
}

impl Entry {
    fn run(&mut self, epoll: &Epoll, f: impl FnOnce(&mut dyn Handler, &mut Watch<'_>) -> anyhow::Result<()>) {
        if self.on_fault.is_none() {
            return;
        }
        let mut watch = Watch { epoll, ticket: self.ticket, descriptors: &mut self.descriptors };
        if let Err(error) = f(&mut *self.handler, &mut watch) {
            self.unwatch(epoll);
            if let Some(on_fault) = self.on_fault.take() {
                on_fault(&error);
            }
        }
    }

    fn unwatch(&mut self, epoll: &Epoll) {
        for descriptor in self.descriptors.drain(..) {
            forget(epoll, descriptor);
        }
    }
}

struct Loop {
    epoll: Epoll,
    wake: EventFd,
    commands: Receiver<Command>,
    /// Few, so that a search from the start is the fastest.
    entries: Vec<Entry>,
}

impl Loop {
    fn run(mut self) {
        let mut events = [EpollEvent::default(); 64];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => panic!("epoll refuses to wait: {error}"),
            };
            let mut woken = false;
            for event in &events[..count] {
                #[allow(clippy::cast_possible_truncation, reason = "each half is cut out of its place")]
                let (ticket, token) = ((event.data() >> 32) as u32, event.data() as u32);
                woken |= ticket == WAKE;
                // An event of a handler that has just been parked may still be in this batch.
                if let Some(entry) = self.entries.iter_mut().find(|entry| entry.ticket == ticket) {
                    entry.run(&self.epoll, |handler, watch| Ok(handler.ready(token, watch)?));
                }
            }
            if woken && self.obey() {
                return;
            }
        }
    }

    /// Whether the thread shall end.
    fn obey(&mut self) -> bool {
        let _ = self.wake.read();
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Insert(Ticket(ticket), handler, on_fault) => {
                    let mut entry = Entry { ticket, handler, descriptors: Vec::new(), on_fault };
                    entry.run(&self.epoll, |handler, watch| Ok(handler.watch(watch)?));
                    self.entries.push(entry);
                }
                Command::Remove(Ticket(ticket), reply) => {
                    if let Some(at) = self.entries.iter().position(|entry| entry.ticket == ticket) {
                        let mut entry = self.entries.swap_remove(at);
                        entry.unwatch(&self.epoll);
                        let _ = reply.send(entry.handler);
                    }
                }
                Command::End => return true,
            }
        }
        false
    }
}

/// The handler behind the trait, for the device that made it.
pub(crate) fn downcast<H: Handler>(handler: Box<dyn Handler>) -> H {
    let handler: Box<dyn Any> = handler;
    *handler.downcast().expect("a device gets its own handler back")
}

#[cfg(test)]
mod tests;
