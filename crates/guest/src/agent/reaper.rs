//! Waits for all children, also those that were left to PID 1 by their parents, and says how commands have ended.
//!
//! A child is first seen dead and then, under the table's lock, waited for; programs are started under the same lock.
//! So no command ends before it is known, no process ID is anybody else's while it stands in the table, and no status
//! is lost. The reaper must be the only one in the process who waits for children.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Pid, WaitOptions, WaitStatus, waitpid};

use super::sys;

/// Starts programs and waits for them.
#[derive(Default)]
pub(crate) struct Reaper {
    table: Mutex<Table>,
    /// A child was started, or the last one was waited for.
    changed: Condvar,
}

#[derive(Default)]
struct Table {
    running: Vec<Arc<Child>>,
    /// How many were started so far.
    started: u64,
    /// As many were started when there was last nobody to wait for.
    childless: Option<u64>,
    /// Nothing more is started: the machine goes down.
    closed: bool,
}

/// A command that was started. It leads a process group.
pub(crate) struct Child {
    pid: Pid,
    status: OnceLock<WaitStatus>,
    /// Becomes readable at its end.
    event: OwnedFd,
}

impl Child {
    /// How it has ended, if it has.
    pub(crate) fn status(&self) -> Option<WaitStatus> {
        self.status.get().copied()
    }

    fn end(&self, status: WaitStatus) {
        let _ = self.status.set(status);
        let event: BorrowedFd<'_> = self.event.as_fd();
        // It counts to one: there is always room.
        let _ = rustix::io::write(event, &1u64.to_ne_bytes());
    }
}

impl AsFd for Child {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl Reaper {
    /// Begins to wait for children, on a thread of its own, for as long as the process lives.
    ///
    /// # Errors
    ///
    /// There is no room for a thread.
    pub(crate) fn start() -> io::Result<Arc<Self>> {
        let reaper = Arc::new(Self::default());
        let theirs = Arc::clone(&reaper);
        thread::Builder::new().name("reaper".into()).stack_size(super::STACK).spawn(move || theirs.run())?;
        Ok(reaper)
    }

    /// Starts a program, which must be made the leader of its group.
    ///
    /// # Errors
    ///
    /// It could not be started.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<Arc<Child>> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let mut table = self.lock();
        if table.closed {
            return Err(io::Error::other("the machine is going down"));
        }
        table.started += 1;
        // One that never became the program is waited for by std; the reaper cannot get ahead of it, since it needs the
        // lock for that.
        let spawned = command.spawn();
        self.changed.notify_all();
        let pid = i32::try_from(spawned?.id()).ok().and_then(Pid::from_raw).expect("a process has a number");
        let child = Arc::new(Child { pid, status: OnceLock::new(), event });
        table.running.push(Arc::clone(&child));
        Ok(child)
    }

    /// Sends a signal to the group of a command, unless it has ended.
    pub(crate) fn signal(&self, child: &Child, signal: i32) {
        let _table = self.lock();
        if child.status().is_none() {
            // A signal that the kernel does not know, or a group that is about to be waited for: nobody is hit.
            let _ = sys::signal_group(child.pid, signal);
        }
    }

    /// From now on nothing is started.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
    }

    /// Waits until there are no children, for at most so long. As PID 1 that is until there are no processes. Returns
    /// whether that is so.
    pub(crate) fn wait_until_childless(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let mut table = self.lock();
        while table.childless != Some(table.started) {
            let Some(left) = end.checked_duration_since(Instant::now()) else { return false };
            table = self.changed.wait_timeout(table, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn run(&self) {
        loop {
            let started = self.lock().started;
            match sys::ended_child() {
                Ok(Some(pid)) => self.reap(pid),
                Err(error) if error.raw_os_error() == Some(libc::ECHILD) => self.wait_for_children(started),
                // A signal.
                Ok(None) | Err(_) => {}
            }
        }
    }

    fn reap(&self, pid: Pid) {
        let mut table = self.lock();
        // There is none where std has waited for a child that never became its program.
        let Ok(Some((_, status))) = waitpid(Some(pid), WaitOptions::NOHANG) else { return };
        if let Some(at) = table.running.iter().position(|child| child.pid == pid) {
            table.running.swap_remove(at).end(status);
        }
    }

    /// There were no children after `started` of them.
    fn wait_for_children(&self, started: u64) {
        let mut table = self.lock();
        table.childless = Some(started);
        self.changed.notify_all();
        while table.started == started {
            table = self.changed.wait(table).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
