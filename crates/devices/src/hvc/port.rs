//! What the console on the main thread and the handler on an I/O thread share.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio::ConfigChange;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::console::GuestSide;
use crate::console::output::{INPUT, OUTPUT, Output};

/// Two queues of bytes and the terminal's size. The lock is between the main thread, the I/O thread and, for the size, a
/// vCPU thread; nobody holds it across a system call that could block.
pub struct Port {
    state: Mutex<State>,
    /// Tells the console that output waits, or that there is room for input again.
    wake: EventFd,
    /// Tells the handler that there is input.
    input: EventFd,
}

struct State {
    input: VecDeque<u8>,
    output: Output,
    /// The console has been told that there is no room.
    full: bool,
    /// Columns and rows, for a console at a terminal.
    size: Option<(u16, u16)>,
    /// A driver that wants to know about changes of the size.
    driver: Option<ConfigChange>,
}

impl Port {
    /// What becomes readable when there is input.
    pub(super) fn input(&self) -> &EventFd {
        &self.input
    }

    /// The guest says something, after `lost` bytes that were too many.
    pub(super) fn say(&self, bytes: &[u8], lost: usize) {
        let mut state = self.lock();
        let idle = state.output.is_empty();
        state.output.lose(lost as u64);
        state.output.push(bytes);
        let wake = idle && !state.output.is_empty();
        drop(state);
        if wake {
            self.wake();
        }
    }

    /// Moves input to `room`, as much as there is of both. Returns how many bytes that are.
    pub(super) fn hear(&self, room: &mut [u8]) -> usize {
        let mut state = self.lock();
        let count = state.input.len().min(room.len());
        for (to, from) in room.iter_mut().zip(state.input.drain(..count)) {
            *to = from;
        }
        let wake = state.full && state.input.len() <= INPUT / 2;
        state.full &= !wake;
        drop(state);
        if wake {
            self.wake();
        }
        count
    }

    /// Columns and rows, if there is a terminal.
    pub(super) fn size(&self) -> Option<(u16, u16)> {
        self.lock().size
    }

    /// The terminal has this many columns and rows.
    pub(crate) fn resize(&self, size: (u16, u16)) {
        let mut state = self.lock();
        let changed = state.size.replace(size) != Some(size);
        let driver = state.driver.clone().filter(|_| changed);
        drop(state);
        if let Some(driver) = driver {
            driver.raise();
        }
    }

    /// Who wants to know about changes of the size.
    pub(super) fn set_driver(&self, driver: Option<ConfigChange>) {
        self.lock().driver = driver;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GuestSide for Port {
    fn new() -> io::Result<Arc<Self>> {
        let output = Output::with_room();
        let state = State { input: VecDeque::new(), output, full: false, size: None, driver: None };
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        Ok(Arc::new(Self { state: Mutex::new(state), wake: event()?, input: event()? }))
    }

    fn woken(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    fn wake(&self) {
        // Nobody reads it, and each write is an edge; long before the counter is full it begins anew.
        if self.wake.write(1).is_err() {
            let _ = self.wake.read();
            let _ = self.wake.write(1);
        }
    }

    fn take_output(&self, empty: &mut VecDeque<u8>) -> u64 {
        empty.reserve(OUTPUT);
        self.lock().output.take(empty)
    }

    fn has_output(&self) -> bool {
        !self.lock().output.is_empty()
    }

    fn print(&self, text: &str) {
        self.lock().output.push(text.as_bytes());
        self.wake();
    }

    fn discard_output(&self) {
        self.lock().output.discard();
    }

    fn input_room(&self) -> usize {
        let mut state = self.lock();
        let room = INPUT.saturating_sub(state.input.len());
        state.full = room == 0;
        room
    }

    fn push_input(&self, bytes: &[u8]) {
        self.lock().input.extend(bytes);
        // A full counter wakes the handler, too.
        let _ = self.input.write(1);
    }
}
